"""The 4-bit ops below `functional`: slabs, memory, schema. Codes are compared in tests/test_functional.py."""

from __future__ import annotations

import pytest
import torch

from onegpu.kernels import quant_4bit
from onegpu.kernels.quant_4bit import cost, packed_bytes
from tests.matrices import weights
from tests.memory import peak_bytes

OPS = torch.ops.onegpu
MIB = 1 << 20


@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
@pytest.mark.parametrize("storage", [torch.uint8, torch.bfloat16])
def test_opcheck(device: str, quant_type: str, storage: torch.dtype) -> None:
    A = weights((24, 66), torch.float32, device)
    # Packed codes viewed as floats hold NaNs, which two runs of the same op are not "close" in: shapes only.
    some = {"test_utils": ("test_schema", "test_faketensor")} if storage.is_floating_point else {}
    torch.library.opcheck(OPS.quantize_4bit.default, (A, 64, quant_type, storage), **some)
    packed, absmax = OPS.quantize_4bit(A, 64, quant_type, storage)
    arguments = (packed, absmax, 64, quant_type, [24, 66], torch.bfloat16)
    torch.library.opcheck(OPS.dequantize_4bit.default, arguments)


@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
@pytest.mark.parametrize("shape", [(113, 203), (3, 4096), (2, 4097)])
def test_slabs_change_nothing(
    device: str, monkeypatch: pytest.MonkeyPatch, shape: tuple[int, int], quant_type: str
) -> None:
    A = weights(shape, torch.float16, device)
    packed, absmax = OPS.quantize_4bit(A, 128, quant_type, torch.uint8)
    values = OPS.dequantize_4bit(packed, absmax, 128, quant_type, shape, torch.float32)
    monkeypatch.setattr(quant_4bit, "_SLAB", 4096)
    slabs = OPS.quantize_4bit(A, 128, quant_type, torch.uint8)
    assert torch.equal(slabs[0], packed) and torch.equal(slabs[1], absmax)
    assert torch.equal(OPS.dequantize_4bit(packed, absmax, 128, quant_type, shape, torch.float32), values)


def test_a_slab_holds_whole_blocks_and_whole_bytes() -> None:
    assert quant_4bit._SLAB % 4096 == 0


@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
def test_quantising_takes_64_mib_beside_input_and_output(device: str, quant_type: str) -> None:
    A = torch.randn(4096, 4096, device=device).bfloat16()
    outputs = A.numel() // 2 + A.numel() // 64 * 4
    extra = peak_bytes(device, lambda: OPS.quantize_4bit(A, 64, quant_type, torch.uint8)) - outputs
    assert extra < 64 * MIB, f"{extra / MIB:.0f} MiB"


def test_dequantising_takes_64_mib_beside_input_and_output(device: str) -> None:
    packed = torch.randint(0, 255, (8 * MIB, 1), dtype=torch.uint8, device=device)
    arguments = (packed, torch.ones(MIB // 4, device=device), 64, "nf4", (4096, 4096), torch.bfloat16)
    extra = peak_bytes(device, lambda: OPS.dequantize_4bit(*arguments)) - 32 * MIB
    assert extra < 64 * MIB, f"{extra / MIB:.0f} MiB"


@pytest.mark.parametrize(
    ("numel", "storage", "size"),
    [
        (0, torch.uint8, 0),
        (1, torch.uint8, 1),
        (7, torch.uint8, 4),
        (8, torch.bfloat16, 4),
        (9, torch.bfloat16, 6),
        (7, torch.float32, 4),
        (9, torch.float32, 8),
    ],
)
def test_packed_bytes_are_whole_elements(numel: int, storage: torch.dtype, size: int) -> None:
    assert packed_bytes(numel, storage) == size
    packed, _ = OPS.quantize_4bit(torch.ones(numel), 32, "nf4", storage)
    assert packed.nbytes == size and packed.shape == (size // storage.itemsize, 1)


def test_what_fills_up_a_storage_element_is_zero() -> None:
    packed, absmax = OPS.quantize_4bit(torch.ones(5), 32, "nf4", torch.float32)
    assert packed.view(torch.uint8).view(-1).tolist() == [0xFF, 0xFF, 0xF7, 0]
    assert OPS.dequantize_4bit(packed, absmax, 32, "nf4", [5], torch.float32).tolist() == [1.0] * 5


def test_results_are_the_same_from_run_to_run(device: str) -> None:
    A = weights((113, 203), torch.bfloat16, device)
    first, second = (OPS.quantize_4bit(A, 64, "fp4", torch.uint8) for _ in range(2))
    assert torch.equal(first[0], second[0]) and torch.equal(first[1], second[1])


def test_cost_counts_weights_codes_and_scales() -> None:
    assert cost(numel=4096, itemsize=2, blocksize=64) == (8192 + 2048 + 256, 8192)
