"""`linear_4bit` and its gradients against dequantise-then-float32-matmul."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as torchF

from onegpu import functional as F
from onegpu.kernels.linear_4bit import Packed4bit, cost, linear_4bit
from tests.compare import assert_close, assert_same_nonfinite
from tests.matrices import FLOATS, activations, weights

OPS = torch.ops.onegpu


def make(n: int, k: int, device: str, quant_type: str = "nf4", nested: bool = False, blocksize: int = 64) -> Packed4bit:
    A = weights((n, k), torch.float32, device, seed=3).clamp(-0.3, 0.3)
    packed, state = F.quantize_4bit(A, quant_type=quant_type, compress_statistics=nested, blocksize=blocksize)
    return state.packed(packed)


def product_reordered(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """``a @ b`` in the dtype of both, its sum taken from the other end."""
    return a.flip(-1) @ b.flip(0)


# K odd, K no multiple of the block, less than a block, whole blocks; N odd too.
MATRICES = [(113, 203), (65, 96), (1, 63), (48, 1), (64, 256)]


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("n_k", MATRICES)
@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
def test_forward(device: str, n_k: tuple[int, int], quant_type: str, nested: bool, dtype: torch.dtype) -> None:
    packed = make(*n_k, device, quant_type, nested)
    w = packed.dequantize(torch.float32)
    for m, bias in ((1, None), (7, activations((n_k[0],), dtype, device, seed=5))):
        x = activations((m, n_k[1]), dtype, device)
        y = linear_4bit(x, packed, bias)
        reference = torchF.linear(x.float(), w, None if bias is None else bias.float())
        reordered = product_reordered(x, w.to(dtype).t())
        assert y.dtype == dtype
        assert_close(y, reference, reordered if bias is None else reordered + bias)


@pytest.mark.parametrize("rows", [1, 8, 16])
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
def test_large_activations_and_blocks_of_tiny_weights(device: str, quant_type: str, rows: int) -> None:
    """Neither products of codes nor scales leave the range of what holds them: 1e5 is past float16, 1e-7 below."""
    w = torch.randn(48, 256, device=device)
    w[::2, :64] *= 1e-7
    codes, state = F.quantize_4bit(w, quant_type=quant_type)
    packed = state.packed(codes)
    x = 1e5 * activations((rows, 256), torch.bfloat16, device)
    for small in (x, torch.cat([x[:, :64], torch.zeros_like(x[:, 64:])], 1)):  # the second sees tiny weights only
        wide = packed.dequantize(torch.float32)
        assert_close(
            linear_4bit(small, packed),
            torchF.linear(small.float(), wide),
            product_reordered(small, wide.bfloat16().t()),
        )


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("n_k", MATRICES)
@pytest.mark.parametrize("nested", [False, True])
def test_gradients(device: str, n_k: tuple[int, int], nested: bool, dtype: torch.dtype) -> None:
    packed = make(*n_k, device, nested=nested)
    w = packed.dequantize(torch.float32)
    x = activations((2, 5, n_k[1]), dtype, device).requires_grad_()
    bias = activations((n_k[0],), dtype, device, seed=5).requires_grad_()
    grad = activations((2, 5, n_k[0]), dtype, device, seed=6)
    linear_4bit(x, packed, bias).backward(grad)
    assert x.grad is not None and bias.grad is not None
    assert_close(x.grad, grad.float() @ w, product_reordered(grad, w.to(dtype)), gradient=True, what="x")
    rows = grad.view(-1, n_k[0])
    assert_close(bias.grad, rows.float().sum(0), rows.flip(0).cumsum(0)[-1], gradient=True, what="bias")


@pytest.mark.parametrize("shape", [(96,), (1, 96), (4, 96), (2, 3, 96), (2, 2, 2, 96), (0, 96), (2, 0, 96)])
@pytest.mark.parametrize("learns", [False, True])
def test_any_number_of_dimensions_and_empty_batches(device: str, shape: tuple[int, ...], learns: bool) -> None:
    packed = make(65, 96, device)
    w, bias = packed.dequantize(torch.float32), torch.arange(65.0, device=device)
    x = activations(shape, torch.float32, device).requires_grad_(learns)
    y = linear_4bit(x, packed, bias)
    reference = torchF.linear(x.detach(), w, bias)
    assert y.shape == (*shape[:-1], 65) and y.requires_grad == learns
    assert_close(y.detach(), reference, product_reordered(x.detach(), w.t()) + bias)
    if learns:
        y.sum().backward()
        assert x.grad is not None and x.grad.shape == x.shape


@pytest.mark.parametrize("learns", [False, True])
def test_strides_change_nothing(device: str, learns: bool) -> None:
    packed = make(65, 96, device)
    w = packed.dequantize(torch.float32)
    wide = activations((8, 193), torch.float32, device)
    for x in (wide[:, :192:2], wide[:, 1:97], wide[:, :1].expand(8, 96), wide[:1, :96].expand(8, 96)):
        assert not x.is_contiguous()
        x = x.detach().requires_grad_(learns)
        wanted = linear_4bit(x.detach().contiguous(), packed)
        assert_close(linear_4bit(x, packed).detach(), wanted, product_reordered(x.detach(), w.t()))
    columns = activations((96, 8), torch.float32, device).t()
    y = linear_4bit(columns, packed)
    assert_close(y, columns @ w.t(), product_reordered(columns, w.t()))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("dtype", FLOATS)
def test_nan_and_infinity_stay_visible(device: str, dtype: torch.dtype, value: float) -> None:
    packed = make(65, 96, device)
    x = activations((4, 96), dtype, device)
    x[2, 7] = value
    y = linear_4bit(x, packed)
    assert y[2].isfinite().logical_not().all() and y[[0, 1, 3]].isfinite().all()
    assert_same_nonfinite(y, x.float() @ packed.dequantize(torch.float32).t())


@pytest.mark.parametrize("learns", [False, True])
def test_autocast_is_that_of_f_linear(device: str, learns: bool) -> None:
    packed = make(65, 96, device)
    w = packed.dequantize(torch.bfloat16)
    x = activations((4, 96), torch.float32, device).requires_grad_(learns)
    bias = torch.arange(65.0, device=device)
    with torch.autocast(device, dtype=torch.bfloat16):
        y, wanted = linear_4bit(x, packed, bias), torchF.linear(x, w, bias)
    assert y.dtype == wanted.dtype == torch.bfloat16
    reference = torchF.linear(x.detach().bfloat16().float(), w.float(), bias)
    assert_close(y.detach(), reference, wanted.detach())
    if learns:
        y.float().sum().backward()
        assert x.grad is not None and x.grad.dtype == torch.float32


def test_the_output_can_be_modified_in_place_while_learning(device: str) -> None:
    """Falcon adds its residual with ``out += x``; autograd refuses that where a custom function returns a view."""
    packed = make(96, 96, device)
    w = packed.dequantize(torch.float32)
    x = activations((2, 3, 96), torch.float32, device).requires_grad_()
    grad = activations((6, 96), torch.float32, device, seed=6)
    for shape in ((2, 3, 96), (6, 96), (1, 6, 96)):
        rows = x.view(shape)
        y = linear_4bit(rows, packed)
        y += rows
        (got,) = torch.autograd.grad(y, x, grad.view(shape))
        assert_close(got.view(6, 96), grad @ w + grad, grad + product_reordered(grad, w), gradient=True)


def test_a_bias_in_another_dtype_is_cast_and_learns(device: str) -> None:
    packed = make(65, 96, device)
    bias = torch.ones(65, device=device, requires_grad=True)
    y = linear_4bit(activations((4, 96), torch.bfloat16, device), packed, bias)
    y.sum().backward()
    assert y.dtype == torch.bfloat16 and bias.grad is not None and bias.grad.tolist() == [4.0] * 65


def test_forward_is_the_same_from_run_to_run(device: str) -> None:
    packed, x = make(113, 203, device, nested=True), activations((33, 203), torch.bfloat16, device)
    assert torch.equal(linear_4bit(x, packed), linear_4bit(x, packed))


@pytest.mark.parametrize("nested", [False, True])
def test_opcheck(device: str, nested: bool) -> None:
    packed = make(65, 96, device, nested=nested)
    x, bias = activations((2, 3, 96), torch.float32, device), torch.ones(65, device=device)
    torch.library.opcheck(OPS.linear_4bit.default, (x, *packed, bias))
    torch.library.opcheck(OPS.linear_4bit.default, (x[0], *packed, None))
    grad = activations((2, 3, 65), torch.float32, device)
    torch.library.opcheck(OPS.linear_4bit_backward.default, (grad, *packed))


def test_meta_tensors_pass_shapes_on() -> None:
    packed = Packed4bit(*(t.to("meta") if isinstance(t, torch.Tensor) else t for t in make(65, 96, "cpu", nested=True)))
    y = linear_4bit(torch.ones(2, 3, 96, device="meta", dtype=torch.float16), packed, torch.ones(65, device="meta"))
    assert y.is_meta and y.shape == (2, 3, 65) and y.dtype == torch.float16


def test_cost_counts_codes_scales_and_activations() -> None:
    assert cost(m=2, n=64, k=128, itemsize=2, blocksize=64) == (4096 + 128 * 4 + 2 * 192 * 2, 2 * 2 * 64 * 128)
    assert cost(m=2, n=64, k=128, itemsize=2, blocksize=64, nested=True)[0] == 4096 + 128 + 2 * 192 * 2
