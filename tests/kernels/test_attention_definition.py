"""The definition agrees with torch's own attention where that has the same semantics; more in test_attention.py."""

from __future__ import annotations

import pytest
import torch

from onegpu.kernels.attention_definition import Options, backward, forward, forward_fake


@pytest.mark.parametrize("causal", [False, True])
def test_forward_and_backward_are_those_of_torch(causal: bool) -> None:
    tensors = [torch.randn(2, 6, 4, 8, dtype=torch.float64, requires_grad=True) for _ in range(3)]
    turned = [x.transpose(1, 2) for x in tensors]
    expected = torch.nn.functional.scaled_dot_product_attention(*turned, is_causal=causal).transpose(1, 2)
    grad = torch.randn_like(expected)
    wanted = torch.autograd.grad(expected, tensors, grad)
    options = Options(8**-0.5, right=0 if causal else -1)
    given = [x.detach() for x in tensors]
    out, lse = forward(*given, *options)
    torch.testing.assert_close(out, expected)
    assert [(x.shape, x.dtype) for x in forward_fake(*given, *options)] == [(x.shape, x.dtype) for x in (out, lse)]
    for x, y in zip(backward(grad, None, *given, out, lse, True, *options), wanted, strict=True):
        torch.testing.assert_close(x, y)
