"""`linear_int8` against bitsandbytes' LLM.int8() and against the same steps in float32."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as torchF

from onegpu import functional as F
from onegpu.kernels.linear_int8 import _INT8_SQUARED_CPU, cost, linear_int8
from onegpu.kernels.quant_int8 import dequantize_rows
from tests.compare import assert_close, assert_same_nonfinite
from tests.matrices import FLOATS, activations, weights
from tests.oracle import Oracle

OPS = torch.ops.onegpu
# K and N that integer matrix units take, and that they do not: odd, and one. (Of a single output the tolerance rule is
# a lottery: which implementation rounds it better? So N = 1 is compared with bitsandbytes only.)
MATRICES = [(64, 256), (113, 203), (65, 63), (48, 1)]


def make(n: int, k: int, device: str) -> tuple[torch.Tensor, torch.Tensor]:
    codes, scb, _ = F.int8_vectorwise_quant(weights((n, k), torch.float16, device, seed=3).clamp(-0.3, 0.3))
    return codes, scb


def llm_int8(
    x: torch.Tensor, codes: torch.Tensor, scb: torch.Tensor, threshold: float, dtype: torch.dtype, reordered: bool
) -> torch.Tensor:
    """The paper's steps with dequantised factors, in ``dtype``: rows of x by int8, plus outlier columns as they are."""
    x_codes, x_max, _ = F.int8_vectorwise_quant(x.half(), threshold)
    outliers = (x.half().abs() >= threshold).any(dim=0) if threshold else torch.zeros_like(x[0], dtype=torch.bool)
    unit = _INT8_SQUARED_CPU * 127 * 127 if x.device.type == "cpu" else 1.0  # 1 + 2e-5, as in bitsandbytes
    rows = (dequantize_rows(x_codes, x_max, torch.float32) * unit).to(dtype)
    apart = torch.where(outliers, x.to(dtype), 0.0)
    w = dequantize_rows(codes, scb, dtype)
    if reordered:
        return apart.flip(-1) @ w.flip(-1).t() + rows.flip(-1) @ w.flip(-1).t()
    return (rows + apart) @ w.t()


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("n_k", MATRICES)
@pytest.mark.parametrize("threshold", [0.0, 6.0])
def test_forward(device: str, n_k: tuple[int, int], threshold: float, dtype: torch.dtype) -> None:
    codes, scb = make(*n_k, device)
    for m, bias in ((1, None), (7, activations((n_k[0],), dtype, device, seed=5)), (33, None)):
        x = activations((m, n_k[1]), dtype, device)
        y = linear_int8(x, codes, scb, bias, threshold, exact=True)
        reference = llm_int8(x, codes, scb, threshold, torch.float32, reordered=False)
        reordered = llm_int8(x, codes, scb, threshold, dtype, reordered=True)
        assert y.dtype == dtype
        if bias is not None:
            reference, reordered = reference + bias.float(), reordered + bias
        assert_close(y, reference, reordered)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("n_k", [*MATRICES, (1, 63)])
@pytest.mark.parametrize("threshold", [0.0, 6.0])
def test_forward_is_bitsandbytes(
    bitsandbytes: Oracle, device: str, n_k: tuple[int, int], threshold: float, dtype: torch.dtype
) -> None:
    if device == "cpu" and n_k[1] == 1:
        pytest.skip("bitsandbytes returns garbage: torch._int_mm of the CPU reads past its input where K = 1")
    A, x = weights(n_k, torch.float16, device, seed=3), activations((33, n_k[1]), dtype, device)
    bias = activations((n_k[0],), dtype, device, seed=5)
    theirs = bitsandbytes.run(
        """
        from bitsandbytes.autograd._functions import MatMul8bitLt, MatmulLtState
        state = MatmulLtState()
        state.threshold, state.has_fp16_weights, state.use_pool = threshold, False, False
        state.CB, state.SCB, _ = bnb.functional.int8_vectorwise_quant(A.to(device))
        result = MatMul8bitLt.apply(x.to(device), state.CB, None, bias.to(device), state).cpu()
        """,
        A=A.cpu(),
        x=x.cpu(),
        bias=bias.cpu(),
        device=device,
        threshold=threshold,
    )
    codes, scb, _ = F.int8_vectorwise_quant(A)
    ours = linear_int8(x, codes, scb, bias, threshold, exact=True).cpu()
    assert theirs.dtype == ours.dtype
    if device == "cpu":
        assert torch.equal(ours, theirs)
        return
    # On a GPU it makes a float16 whatever the dtype.
    error = (ours.float() - theirs.float()).abs().max() / theirs.float().abs().max()
    assert error <= max(1e-3, torch.finfo(dtype).eps)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("n_k", MATRICES)
def test_forward_on_a_gpu_rounds_no_activation(n_k: tuple[int, int], dtype: torch.dtype) -> None:
    codes, scb = make(*n_k, "cuda")
    x, bias = activations((7, n_k[1]), dtype, "cuda"), activations((n_k[0],), dtype, "cuda", seed=5)
    y = linear_int8(x, codes, scb, bias, 6.0)
    w = dequantize_rows(codes, scb, torch.float32)
    reordered = x.flip(-1) @ dequantize_rows(codes, scb, dtype).flip(-1).t() + bias
    assert_close(y, torchF.linear(x.float(), w, bias.float()), reordered)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("n_k", MATRICES)
@pytest.mark.parametrize("threshold", [0.0, 6.0])
def test_gradients(device: str, n_k: tuple[int, int], threshold: float, dtype: torch.dtype) -> None:
    codes, scb = make(*n_k, device)
    w = dequantize_rows(codes, scb, torch.float32)
    x = activations((2, 5, n_k[1]), dtype, device).requires_grad_()
    bias = activations((n_k[0],), dtype, device, seed=5).requires_grad_()
    grad = activations((2, 5, n_k[0]), dtype, device, seed=6)
    linear_int8(x, codes, scb, bias, threshold).backward(grad)
    assert x.grad is not None and bias.grad is not None
    reordered = grad.flip(-1) @ w.to(dtype).flip(0)
    assert_close(x.grad, grad.float() @ w, reordered, gradient=True, what="x")
    rows = grad.view(-1, n_k[0])
    assert_close(bias.grad, rows.float().sum(0), rows.flip(0).cumsum(0)[-1], gradient=True, what="bias")


def test_outlier_columns_leave_the_rest_of_their_row_its_precision(device: str) -> None:
    codes, scb = make(64, 256, device)
    x = torch.randn(8, 256, device=device)
    x[:, 17] = 1000.0
    wanted = x @ dequantize_rows(codes, scb, torch.float32).t()
    plain, mixed = ((linear_int8(x, codes, scb, None, t, exact=True) - wanted).abs().max() for t in (0.0, 6.0))
    assert mixed < plain / 50, f"{mixed:.2e} with outliers apart, {plain:.2e} without"


@pytest.mark.parametrize("threshold", [0.0, 6.0])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("dtype", FLOATS)
def test_nan_and_infinity_stay_visible(device: str, dtype: torch.dtype, value: float, threshold: float) -> None:
    codes, scb = make(64, 256, device)
    x = activations((4, 256), dtype, device)
    x[2, 7] = value
    for exact in (False, True):
        y = linear_int8(x, codes, scb, None, threshold, exact=exact)
        others = torch.ones_like(y).index_fill(0, torch.tensor([2], device=device), float("nan"))
        # An infinity times a code of zero is NaN, times another is infinite: both are visible, and only in their row.
        assert_same_nonfinite(torch.where(y.isfinite(), 1.0, float("nan")), others)


@pytest.mark.parametrize("shape", [(256,), (1, 256), (4, 256), (2, 3, 256), (2, 2, 2, 256), (0, 256), (2, 0, 256)])
@pytest.mark.parametrize("learns", [False, True])
@pytest.mark.parametrize("threshold", [0.0, 6.0])
def test_any_number_of_dimensions_and_empty_batches(
    device: str, shape: tuple[int, ...], learns: bool, threshold: float
) -> None:
    codes, scb = make(64, 256, device)
    x = activations(shape, torch.float32, device).requires_grad_(learns)
    bias = torch.arange(64.0, device=device)
    y = linear_int8(x, codes, scb, bias, threshold)
    assert y.shape == (*shape[:-1], 64) and y.requires_grad == learns
    rows = linear_int8(x.detach().reshape(-1, 256), codes, scb, bias, threshold)
    assert torch.equal(y.detach().view(-1, 64), rows)
    if learns:
        y.sum().backward()
        assert x.grad is not None and x.grad.shape == x.shape


@pytest.mark.parametrize("learns", [False, True])
def test_strides_change_nothing(device: str, learns: bool) -> None:
    codes, scb = make(64, 256, device)
    wide = activations((8, 520), torch.float32, device)
    for x in (wide[:, :512:2], wide[:, 1:257], wide[:, :1].expand(8, 256), wide[:1, :256].expand(8, 256)):
        assert not x.is_contiguous()
        y = linear_int8(x.detach().requires_grad_(learns), codes, scb, None, 6.0, exact=True)
        wanted = linear_int8(x.contiguous(), codes, scb, None, 6.0, exact=True)
        assert_close(y.detach(), wanted, llm_int8(x, codes, scb, 6.0, torch.float32, reordered=True))


@pytest.mark.parametrize("learns", [False, True])
def test_autocast_gives_its_dtype(device: str, learns: bool) -> None:
    codes, scb = make(64, 256, device)
    x = activations((4, 256), torch.float32, device).requires_grad_(learns)
    bias = torch.arange(64.0, device=device)
    with torch.autocast(device, dtype=torch.bfloat16):
        y = linear_int8(x, codes, scb, bias, 6.0)
    wanted = linear_int8(x.detach().bfloat16(), codes, scb, bias.bfloat16(), 6.0)
    assert y.dtype == torch.bfloat16 and torch.equal(y.detach(), wanted)
    if learns:
        y.float().sum().backward()
        assert x.grad is not None and x.grad.dtype == torch.float32


@pytest.mark.parametrize("threshold", [0.0, 6.0])
def test_the_output_can_be_modified_in_place_while_learning(device: str, threshold: float) -> None:
    codes, scb = make(256, 256, device)
    w = dequantize_rows(codes, scb, torch.float32)
    x = activations((2, 3, 256), torch.float32, device).requires_grad_()
    grad = activations((6, 256), torch.float32, device, seed=6)
    for shape in ((2, 3, 256), (6, 256), (1, 6, 256)):
        rows = x.view(shape)
        y = linear_int8(rows, codes, scb, None, threshold)
        y += rows
        (got,) = torch.autograd.grad(y, x, grad.view(shape))
        assert_close(got.view(6, 256), grad @ w + grad, grad + grad.flip(-1) @ w.flip(0), gradient=True)


def test_the_source_of_the_codes_learns(device: str) -> None:
    source = weights((64, 256), torch.float32, device, seed=3).requires_grad_()
    codes, scb, _ = F.int8_vectorwise_quant(source.detach().half())
    x = activations((2, 3, 256), torch.float32, device)
    grad = activations((2, 3, 64), torch.float32, device, seed=6)
    linear_int8(x, codes, scb, None, 0.0, source).backward(grad)
    rows, grads = x.view(6, 256), grad.view(6, 64)
    assert source.grad is not None
    assert_close(source.grad, grads.t() @ rows, grads.flip(0).t() @ rows.flip(0), gradient=True)


def test_forward_is_the_same_from_run_to_run(device: str) -> None:
    codes, scb = make(113, 203, device)
    x = activations((33, 203), torch.bfloat16, device)
    assert torch.equal(linear_int8(x, codes, scb, None, 6.0), linear_int8(x, codes, scb, None, 6.0))


@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize("threshold", [0.0, 6.0])
def test_opcheck(device: str, threshold: float, exact: bool) -> None:
    codes, scb = make(64, 256, device)
    x, bias = activations((2, 3, 256), torch.float32, device), torch.ones(64, device=device)
    torch.library.opcheck(OPS.int8_linear.default, (x, codes, scb, bias, threshold, exact))
    torch.library.opcheck(OPS.int8_linear.default, (x[0], codes, scb, None, threshold, exact))
    torch.library.opcheck(OPS.int8_linear_backward.default, (x[..., :64].contiguous(), codes, scb))


def test_cost_counts_codes_scales_and_activations() -> None:
    assert cost(m=2, n=64, k=128, itemsize=2) == (64 * 128 + 64 * 4 + 2 * 192 * 2, 2 * 2 * 64 * 128)
