"""The functions named after bitsandbytes': the same bytes as its own, on the same kind of device."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from onegpu import functional as F
from onegpu.kernels.codebooks import codebook_4bit
from tests.matrices import FLOATS, SHAPES, weights
from tests.oracle import Oracle

QUANTIZE_4BIT = """
    packed, state = bnb.functional.quantize_4bit(A.to(device), **options)
    result = {"packed": packed.cpu(), **{k: v.cpu() for k, v in state.as_dict(packed=True).items()}}
"""


def assert_same_entries(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> None:
    """Same names in the same order, and every tensor the same bytes."""
    assert list(ours) == list(theirs)
    for name, tensor in ours.items():
        wanted = theirs[name]
        assert (tensor.dtype, tensor.shape) == (wanted.dtype, wanted.shape), name
        # As bytes: `==` calls plus and minus zero the same.
        ours_raw, theirs_raw = (t.cpu().reshape(-1).view(torch.uint8) for t in (tensor, wanted))
        assert torch.equal(ours_raw, theirs_raw), f"{name}: {(ours_raw != theirs_raw).sum().item()} bytes differ"


def assert_4bit_as_bitsandbytes(oracle: Oracle, A: torch.Tensor, **options: Any) -> None:
    packed, state = F.quantize_4bit(A, **options)
    theirs = oracle.run(QUANTIZE_4BIT, A=A.cpu(), device=A.device.type, options=options)
    assert_same_entries({"packed": packed, **state.as_dict(packed=True)}, theirs)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
@pytest.mark.parametrize("blocksize", [32, 64, 128, 256, 512, 1024, 2048, 4096])
def test_4bit_is_bitsandbytes_at_every_block_size(
    bitsandbytes: Oracle, device: str, blocksize: int, quant_type: str, dtype: torch.dtype
) -> None:
    A = weights((113, 203), dtype, device)
    for nested in (False, True):
        assert_4bit_as_bitsandbytes(
            bitsandbytes, A, blocksize=blocksize, quant_type=quant_type, compress_statistics=nested
        )


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
def test_4bit_is_bitsandbytes_at_every_shape(
    bitsandbytes: Oracle, device: str, shape: tuple[int, ...], quant_type: str
) -> None:
    for nested in (False, True):
        A = weights(shape, torch.float32, device, seed=2)
        assert_4bit_as_bitsandbytes(bitsandbytes, A, quant_type=quant_type, compress_statistics=nested)


@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
@pytest.mark.parametrize("storage", [torch.bfloat16, torch.float16, torch.float32])
def test_4bit_storage_is_bitsandbytes(bitsandbytes: Oracle, device: str, storage: torch.dtype, quant_type: str) -> None:
    A = weights((24, 256), torch.bfloat16, device)
    assert_4bit_as_bitsandbytes(bitsandbytes, A, quant_type=quant_type, quant_storage=storage, compress_statistics=True)


@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
def test_4bit_decision_points_are_bitsandbytes(bitsandbytes: Oracle, device: str, quant_type: str) -> None:
    """On, just above and just below the middle between each two codes; with a scale of one, so that none moves."""
    values = codebook_4bit(quant_type, torch.device("cpu")).sort().values
    middles = (values[1:] + values[:-1]) / 2
    points = torch.cat([middles, middles.nextafter(torch.tensor(2.0)), middles.nextafter(torch.tensor(-2.0)), values])
    A = torch.zeros(64)
    A[: points.numel()] = points
    assert A.abs().max() == 1.0
    assert_4bit_as_bitsandbytes(bitsandbytes, A.to(device), quant_type=quant_type)


@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
def test_4bit_of_nothing_but_zeros_is_bitsandbytes(bitsandbytes: Oracle, device: str, quant_type: str) -> None:
    for shape in ((64, 64), (7, 9)):
        A = torch.zeros(shape, device=device)
        assert_4bit_as_bitsandbytes(bitsandbytes, A, quant_type=quant_type)
        assert F.dequantize_4bit(*F.quantize_4bit(A, quant_type=quant_type)).count_nonzero() == 0


def by_hand(packed: torch.Tensor, absmax: torch.Tensor, state: F.QuantState) -> torch.Tensor:
    """``codebook[code] * absmax`` in float32, code by code."""
    assert state.code is not None and state.blocksize is not None and state.shape is not None
    pairs = packed.contiguous().view(torch.uint8).view(-1)
    codes = torch.stack((pairs >> 4, pairs & 15), dim=1).view(-1)[: state.shape.numel()].long()
    return (state.code[codes] * absmax.repeat_interleave(state.blocksize)[: codes.numel()]).view(state.shape)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
def test_dequantize_4bit_is_code_times_scale(
    device: str, shape: tuple[int, ...], dtype: torch.dtype, quant_type: str
) -> None:
    """By hand and not against bitsandbytes: on the CPU it restarts its blocks at each row where the row length is even,
    though its own codes (and ours) have blocks that run on; values are wrong there unless rows are whole blocks."""
    A = weights(shape, dtype, device)
    packed, state = F.quantize_4bit(A, quant_type=quant_type, quant_storage=torch.uint8)
    values = F.dequantize_4bit(packed, state)
    if packed.shape[0] == 1 and values.dim() == 2:
        values = values.t()  # one byte of codes looks like the transposed form, which comes back transposed
    assert values.dtype == dtype and values.shape == A.shape
    assert torch.equal(values, by_hand(packed, state.absmax, state).to(dtype))


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
@pytest.mark.parametrize("blocksize", [32, 64, 256])
def test_dequantize_4bit_is_bitsandbytes_where_rows_are_whole_blocks(
    bitsandbytes: Oracle, device: str, blocksize: int, quant_type: str, dtype: torch.dtype
) -> None:
    A = weights((24, 256), dtype, device)
    packed, state = F.quantize_4bit(A, blocksize=blocksize, quant_type=quant_type, compress_statistics=True)
    theirs = bitsandbytes.run(
        "result = bnb.functional.dequantize_4bit(*bnb.functional.quantize_4bit(A.to(device), **options)).cpu()",
        A=A.cpu(),
        device=device,
        options={"blocksize": blocksize, "quant_type": quant_type, "compress_statistics": True},
    )
    assert torch.equal(F.dequantize_4bit(packed, state).cpu(), theirs)


def test_4bit_quantises_a_view_as_its_elements_stand(device: str) -> None:
    A = weights((48, 66), torch.float32, device)
    for view in (A.t(), A[:, ::2], A[1:, 1:], A[:1].expand(48, 66)):
        packed, state = F.quantize_4bit(view, quant_type="nf4")
        expected, expected_state = F.quantize_4bit(view.clone(memory_format=torch.contiguous_format), quant_type="nf4")
        assert torch.equal(packed, expected) and torch.equal(state.absmax, expected_state.absmax)
        codes, blockwise = F.quantize_blockwise(view)
        expected, expected_state = F.quantize_blockwise(view.clone(memory_format=torch.contiguous_format))
        assert torch.equal(codes, expected) and torch.equal(blockwise.absmax, expected_state.absmax)


def test_4bit_keeps_a_nan_visible(device: str) -> None:
    A = weights((4, 64), torch.float32, device)
    A[2, 5] = float("nan")
    values = F.dequantize_4bit(*F.quantize_4bit(A, quant_type="nf4"))
    assert values[2].isnan().all() and values[[0, 1, 3]].isfinite().all()


def test_4bit_of_an_empty_tensor_has_no_bytes(device: str) -> None:
    packed, state = F.quantize_4bit(torch.empty(0, 64, device=device))
    assert packed.shape == (0, 1) and state.absmax.shape == (0,)
    assert F.dequantize_4bit(packed, state).shape == (0, 64)


def test_4bit_fills_out_and_absmax(device: str) -> None:
    A = weights((24, 256), torch.float32, device)
    packed, state = F.quantize_4bit(A)
    out, absmax, values = torch.empty_like(packed), torch.empty_like(state.absmax), torch.empty_like(A)
    returned, returned_state = F.quantize_4bit(A, absmax=absmax, out=out)
    assert returned is out and returned_state.absmax is absmax
    assert torch.equal(out, packed) and torch.equal(absmax, state.absmax)
    assert F.dequantize_4bit(packed, absmax=absmax, out=values, quant_type="fp4") is values
    assert torch.equal(values, F.dequantize_4bit(packed, state))


def test_4bit_codes_given_transposed_come_back_transposed(device: str) -> None:
    packed, state = F.quantize_nf4(weights((24, 64), torch.float32, device))
    assert torch.equal(F.dequantize_nf4(packed.t(), state), F.dequantize_nf4(packed, state).t())
    packed, state = F.quantize_fp4(weights((24, 64), torch.float32, device))
    assert torch.equal(F.dequantize_fp4(packed.t(), state), F.dequantize_fp4(packed, state).t())


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("options", [{}, {"blocksize": 64}, {"blocksize": 256, "nested": True}])
def test_blockwise_is_bitsandbytes(
    bitsandbytes: Oracle, device: str, shape: tuple[int, ...], dtype: torch.dtype, options: dict[str, Any]
) -> None:
    A = weights(shape, dtype, device)
    codes, state = F.quantize_blockwise(A, **options)
    theirs = bitsandbytes.run(
        """
        codes, state = bnb.functional.quantize_blockwise(A.to(device), **options)
        values = bnb.functional.dequantize_blockwise(codes, state)
        nested = {"absmax2": state.state2.absmax, "offset": state.offset} if state.nested else {}
        result = {"codes": codes, "absmax": state.absmax, "code": state.code, **nested, "values": values}
        result = {name: tensor.cpu() for name, tensor in result.items()}
        """,
        A=A.cpu(),
        device=device,
        options=options,
    )
    assert state.code is not None
    ours = {"codes": codes, "absmax": state.absmax, "code": state.code}
    if state.state2 is not None and state.offset is not None:
        ours |= {"absmax2": state.state2.absmax, "offset": state.offset}
    assert_same_entries({**ours, "values": F.dequantize_blockwise(codes, state)}, theirs)


def test_blockwise_takes_another_table_and_fills_out(device: str) -> None:
    A, code = weights((24, 256), torch.float32, device), torch.linspace(-1, 1, 256, device=device)
    out, absmax, values = torch.empty(24, 256, dtype=torch.uint8, device=device), torch.empty(24, device=device), A * 0
    codes, state = F.quantize_blockwise(A, code, absmax, out, blocksize=256)
    assert codes is out and state.absmax is absmax
    assert F.dequantize_blockwise(codes, absmax=absmax, code=code, out=values, blocksize=256) is values
    assert (values - A).abs().amax(dim=1).le(absmax / 255 * 1.001).all()  # half a step of the even table


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda A: F.quantize_4bit(A, blocksize=48), "blocksize=48 .*32, 64"),
        (lambda A: F.quantize_4bit(A, quant_type="nf5"), "quant_type='nf5' .*nf4, fp4"),
        (lambda A: F.quantize_4bit(A.double()), "A.dtype=torch.float64"),
        (lambda A: F.quantize_4bit(A.int()), "A.dtype=torch.int32"),
        (lambda A: F.dequantize_4bit(A.byte()), "needs quant_state"),
        (lambda A: F.dequantize_4bit(A.byte(), F.QuantState(A, A.shape, None, 64, "fp4", torch.int8)), "torch.int8"),
        (lambda A: F.quantize_blockwise(A, blocksize=0), "blocksize=0"),
        (lambda A: F.quantize_blockwise(A.long()), "A.dtype=torch.int64"),
        (lambda A: F.dequantize_blockwise(A), "A.dtype=torch.float32"),
        (lambda A: F.dequantize_blockwise(A.byte()), "quant_state or absmax"),
        (lambda A: F.dequantize_blockwise(A.byte(), absmax=A, blocksize=-1), "blocksize=-1"),
    ],
)
def test_bad_arguments_are_named(call: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call(torch.ones(64, 64))
