"""The norms' kernels: they compile everywhere within limits, and agree with the definitions as interpreted."""

from __future__ import annotations

import pytest

from onegpu.kernels.rms_norm import MAX_BACKWARD_WIDTH, MAX_WIDTH
from tests.triton_tools import ARCHITECTURES, SHARED_MEMORY_LIMIT, compiled, interpret, needs_triton, stack_bytes


@needs_triton
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_compiles_within_the_limits(architecture: int) -> None:
    import triton.language as tl

    from onegpu.kernels import norm_triton as kernels

    floats, numbers = dict.fromkeys(("x", "residual", "weight", "bias", "y", "total"), "*bf16"), {"eps": "fp32"}
    forward = {f"p_{name}": kind for name, kind in floats.items()} | {"x_row": "i32", "r_row": "i32"} | numbers
    backward = dict.fromkeys(("p_grad", "p_x", "p_weight", "p_grad_x"), "*bf16")
    backward |= dict.fromkeys(("p_grad_weight", "p_grad_bias"), "*fp32")
    backward |= dict.fromkeys(("rows", "g_row", "x_row"), "i32") | numbers
    more = {"RESIDUAL": True, "BIAS": True, "MIDDLE": tl.float32}
    for kernel, arguments, fixed, n in (
        (kernels._forward_kernel, forward, more, 4096),
        (kernels._forward_kernel, forward, more, MAX_WIDTH),
        (kernels._backward_kernel, backward, {}, 4096),
        (kernels._backward_kernel, backward, {}, MAX_BACKWARD_WIDTH),
    ):
        fixed = {"N": n, "BLOCK": n, "MEAN": True, "WEIGHT": True, **fixed}
        options = {"num_warps": kernels._warps(n)}
        made = compiled(kernel, arguments | {"offset": "fp32"}, fixed, architecture, **options)
        assert made.metadata.shared <= SHARED_MEMORY_LIMIT and stack_bytes(made) == 0


@needs_triton
def test_agrees_with_the_definitions() -> None:
    interpret(
        """
        from onegpu.kernels import layer_norm, norm_triton as kernels, rms_norm
        close = torch.testing.assert_close
        for dtype in (torch.float32, torch.float16):
            for n in (64 if dtype == torch.float32 else 203,):
                x = torch.randn(5, 2, n + 3).to(dtype)[..., :n]
                r, grad = torch.randn(2, 5, 2, n).to(dtype)
                w, b = torch.randn(2, n).to(dtype)
                y, total, grad_x = torch.full((3, 5, 2, n), float("nan")).to(dtype)
                for offset, middle in ((0.0, dtype), (1.0, torch.float32)):
                    kernels.forward(x, None, w, None, 1e-5, offset, middle, False, y, None)
                    close(y, rms_norm._norm(x, w, 1e-5, offset, middle, dtype))
                    kernels.forward(x, r, w, None, 1e-5, offset, middle, False, y, total)
                    wanted, wanted_total = rms_norm._add_norm(x, r, w, 1e-5, offset, middle, dtype)
                    close(y, wanted)
                    assert torch.equal(total, wanted_total)
                    ours = kernels.backward(grad, x, w, 1e-5, offset, False, grad_x)[0]
                    wanted_x, wanted_w = rms_norm._backward(grad, x, w, 1e-5, offset)
                    close(grad_x, wanted_x)
                    close(ours.to(dtype), wanted_w)
                for weight, bias in ((w, b), (w, None), (None, None)):
                    kernels.forward(x, r, weight, bias, 1e-5, 0.0, torch.float32, True, y, total)
                    wanted, wanted_total = layer_norm._add_norm(x, r, weight, bias, 1e-5)
                    close(y, wanted)
                    assert torch.equal(total, wanted_total)
                    ours = kernels.backward(grad, x, weight, 1e-5, 0.0, True, grad_x)
                    wanted_x, *wanted = layer_norm._backward(grad, x, weight, 1e-5)
                    close(grad_x, wanted_x)
                    close([g.to(dtype) for g in ours], wanted)
        """
    )
