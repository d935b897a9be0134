"""Products with quantised matrices under bitsandbytes' names."""

from __future__ import annotations

import pytest
import torch

from onegpu import functional as F
from onegpu.kernels.linear_4bit import Packed4bit
from tests.compare import assert_close
from tests.matrices import activations, weights


def test_matmul_4bit_is_the_product_and_fills_out(device: str) -> None:
    packed, state = F.quantize_nf4(weights((24, 64), torch.float32, device))
    x, bias = activations((3, 64), torch.float32, device), torch.ones(24, device=device)
    out = torch.empty(3, 24, device=device)
    assert F.matmul_4bit(x, packed, state, out=out, bias=bias) is out
    w = F.dequantize_4bit(packed, state)
    assert_close(out, torch.nn.functional.linear(x, w, bias), bias + x.flip(1) @ w.flip(1).t())
    assert isinstance(state.packed(packed), Packed4bit)


def test_codes_of_a_transposed_matrix_are_multiplied_with_a_warning(device: str) -> None:
    w, x = weights((24, 64), torch.float32, device), activations((3, 64), torch.float32, device)
    packed, state = F.quantize_nf4(w.t().contiguous())
    with pytest.warns(DeprecationWarning, match=r"\[64, 24\] is \[K, N\]"):
        y = F.matmul_4bit(x, packed, state)
    torch.testing.assert_close(y, x @ F.dequantize_4bit(packed, state))
    with pytest.raises(ValueError, match="needs the quant_state"):
        F.matmul_4bit(x, packed, F.quantize_blockwise(w)[1])


def test_gemv_4bit_takes_codes_either_way_round(device: str) -> None:
    packed, state = F.quantize_fp4(weights((24, 64), torch.float16, device))
    x = activations((1, 64), torch.float16, device).requires_grad_()
    y = F.gemv_4bit(x, packed.t(), state=state)
    assert torch.equal(y, F.matmul_4bit(x.detach(), packed, state)) and not y.requires_grad
    with pytest.raises(ValueError, match="needs state"):
        F.gemv_4bit(x, packed)


@pytest.mark.parametrize("has_fp16_weights", [False, True])
def test_matmul_multiplies_and_remembers_the_codes(device: str, has_fp16_weights: bool) -> None:
    w = weights((24, 64), torch.float32, device).requires_grad_(has_fp16_weights)
    x, bias = activations((2, 3, 64), torch.float32, device).requires_grad_(), torch.ones(24, device=device)
    state = F.MatmulLtState(has_fp16_weights=has_fp16_weights)
    y = F.matmul(x, w, state=state, threshold=6.0, bias=bias)
    codes, maxima, _ = F.int8_vectorwise_quant(w.detach().half())
    assert torch.equal(state.CB, codes) and torch.equal(state.SCB, maxima) and state.threshold == 6.0
    torch.testing.assert_close(y, torch.nn.functional.linear(x, w, bias), rtol=0.03, atol=0.5)
    y.sum().backward()
    assert x.grad is not None and (w.grad is not None) == has_fp16_weights
    with torch.no_grad():
        w.zero_()
    again = F.matmul(x, w, state=state, bias=bias)
    assert again.eq(1).all() if has_fp16_weights else torch.equal(again, y)
    state.is_training = False
    torch.testing.assert_close(F.matmul(x, w + 1, state=state, bias=bias), again, rtol=0.03, atol=0.5)  # codes stay
    state.reset_grads()
    assert state.CB is None and state.SCB is None


def test_matmul_of_no_rows(device: str) -> None:
    x, w = torch.empty(0, 64, device=device, requires_grad=True), weights((24, 64), torch.float32, device)
    y = F.matmul(x, w, threshold=6.0)
    y.sum().backward()
    assert y.shape == (0, 24) and x.grad.shape == (0, 64)


def test_states_are_equal_by_their_tensors() -> None:
    one, other = F.MatmulLtState(CB=torch.ones(3, 2)), F.MatmulLtState(CB=torch.ones(3, 2))
    assert one == other and one != F.MatmulLtState() and one != 3
    other.threshold = 6.0
    assert one != other
