"""The rotary kernel: it compiles everywhere within limits, and agrees with the definition as interpreted."""

from __future__ import annotations

import pytest

from tests.triton_tools import ARCHITECTURES, SHARED_MEMORY_LIMIT, compiled, interpret, needs_triton, stack_bytes


@needs_triton
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_compiles_within_the_limits(architecture: int) -> None:
    from onegpu.kernels import rotary_triton as kernels

    kernel = kernels._rotary_kernel
    for interleaved, half in ((False, 64), (True, 16)):
        constants = {"D": 128, "DV": 128, "HALF": half, "BH": kernels._HEADS, "BHALF": half, "BREST": 128, "BDV": 128}
        constants |= {"INTERLEAVED": interleaved, "CACHE": True}
        names = [name for name in kernel.arg_names if name not in constants]
        arguments = {name: "*bf16" if name.startswith("p_") and len(name) > 3 else "i32" for name in names}
        arguments |= {"p_q": "*bf16", "p_k": "*bf16", "p_v": "*bf16", "p_places": "*i32"}
        made = compiled(kernel, arguments, constants, architecture, num_warps=2)
        assert made.metadata.shared <= SHARED_MEMORY_LIMIT and stack_bytes(made) == 0


@needs_triton
def test_agrees_with_the_definition() -> None:
    interpret(
        """
        from onegpu.kernels import rotary, rotary_triton as kernels
        def close(ours, wanted):
            torch.testing.assert_close(ours, wanted, rtol=2e-3, atol=2e-3)  # the definition rounds products too
        for dtype, interleaved, d, half in (
            (torch.float32, False, 16, 8), (torch.float32, True, 24, 6), (torch.float16, False, 20, 6),
            (torch.float16, True, 16, 0),
        ):
            q, k = (torch.randn(2, 3, h, d).to(dtype).transpose(1, 2) for h in (6, 2))
            v = torch.randn(2, 2, 3, 12).to(dtype)
            angles = torch.randn(2, 3, half)
            cos, sin = angles.cos().to(dtype), angles.sin().to(dtype)
            outs = [torch.full_like(x, float("nan")) for x in (q, k)]
            kernels.rotary(q, k, cos, sin, interleaved, *outs)
            close(outs, list(rotary._rotary(q, k, cos, sin, interleaved)))
            caches = [torch.randn(2, 2, 9, d).to(dtype), torch.randn(2, 9, 2, 12).to(dtype).transpose(1, 2)]
            wanted = [cache.clone() for cache in caches]
            places = torch.tensor([[3, 4, 8], [-1, 9, 0]], dtype=torch.int32)
            out = torch.full_like(q, float("nan"))
            kernels.rotary_cache(q, k, v, cos, sin, places, *caches, interleaved, out)
            close(out, rotary._rotary_cache(q, k, v, cos, sin, places, *wanted, interleaved))
            close(caches, wanted)
        """
    )
