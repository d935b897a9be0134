"""The gated MLP's kernels: they compile everywhere within limits, and agree with the definition as interpreted."""

from __future__ import annotations

import pytest

from tests.triton_tools import ARCHITECTURES, compiled, interpret, needs_triton, stack_bytes


@needs_triton
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_compiles_without_shared_memory(architecture: int) -> None:
    from onegpu.kernels import gated_mlp_triton as kernels

    for kernel in (kernels._forward_kernel, kernels._backward_kernel):
        names = [name for name in kernel.arg_names if name not in ("ACTIVATION", "BLOCK")]
        arguments = {name: "*bf16" if name.startswith("p_") else "i32" for name in names}
        for activation in ("silu", "gelu", "gelu_tanh"):
            made = compiled(kernel, arguments, {"ACTIVATION": activation, "BLOCK": kernels._BLOCK}, architecture)
            assert made.metadata.shared == 0 and stack_bytes(made) == 0


@needs_triton
def test_agrees_with_the_definition() -> None:
    interpret(
        """
        from onegpu.kernels import gated_mlp, gated_mlp_triton as kernels
        close = torch.testing.assert_close
        for dtype in (torch.float32, torch.float16):
            for activation in gated_mlp.ACTIVATIONS:
                gate, up = (3 * torch.randn(3, 2, 2200)).to(dtype).chunk(2, -1)
                grad = torch.randn(3, 2, 1100).to(dtype)
                y, grad_gate, grad_up = torch.full((3, 3, 2, 1100), float("nan")).to(dtype)
                kernels.forward(gate, up, activation, y)
                close(y, gated_mlp._gated(gate, up, activation), rtol=2e-3, atol=2e-5)
                kernels.backward(grad, gate, up, activation, grad_gate, grad_up)
                close((grad_gate, grad_up), gated_mlp._backward(grad, gate, up, activation), rtol=2e-3, atol=2e-5)
        """
    )
