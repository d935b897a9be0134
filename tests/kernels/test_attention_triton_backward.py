"""The portable backward: it compiles everywhere within limits, and the interpreter agrees with the definition."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from tests.kernels.test_attention_triton import CASES, compile_attention
from tests.triton_tools import ARCHITECTURES, SHARED_MEMORY_LIMIT, interpret, needs_triton


@needs_triton
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_compiles_within_the_limits(architecture: int) -> None:
    from onegpu.kernels import attention_triton_backward as kernels

    for kernel, table in ((kernels.keys_kernel, kernels._KEYS), (kernels.queries_kernel, kernels._QUERIES)):
        for width in (128, 256) if architecture == 90 else (128,):
            made = compile_attention(kernel, table[width], width, architecture)
            limit = 227 * 1024 if architecture == 100 else SHARED_MEMORY_LIMIT  # other products, in other layouts
            assert made.metadata.shared <= limit, (width, table[width])
    rows = {"DV": 80, "D1": 128, "BM": 64, "p_dlse": None}
    assert compile_attention(kernels.rows_kernel, (64, 0, 4, 1), 80, architecture, **rows).metadata.shared < 4096


@needs_triton
def test_larger_blocks_where_there_is_room(monkeypatch: pytest.MonkeyPatch) -> None:
    """On Hopper and data-centre Blackwell, where they compile within what a block may have."""
    from onegpu.kernels import attention_triton_backward as kernels

    properties = SimpleNamespace(shared_memory_per_block_optin=0, shared_memory_per_block=48 * 1024)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    for room, expected in ((99, (32, 32, 8, 1)), (163, (32, 32, 8, 1)), (227, (64, 64, 8, 1))):
        properties.shared_memory_per_block_optin = room * 1024
        kernels._shared_memory.cache_clear()
        x = SimpleNamespace(dtype=torch.bfloat16, is_cuda=True, get_device=lambda: 0)
        assert kernels.tables(x)[0][256] == expected  # type: ignore[arg-type]
    kernels._shared_memory.cache_clear()
    assert kernels.tables(torch.zeros(1)) == (kernels._FP32, kernels._FP32)
    for architecture in (90, 100):
        made = compile_attention(kernels.queries_kernel, kernels._ROOMY_QUERIES[256], 256, architecture)
        assert SHARED_MEMORY_LIMIT < made.metadata.shared <= kernels._ROOM


@needs_triton
def test_fp32_within_the_limits() -> None:
    from onegpu.kernels import attention_triton_backward as kernels

    for kernel in (kernels.keys_kernel, kernels.queries_kernel):
        made = compile_attention(kernel, kernels._FP32[256], 256, 80, dtype="fp32")
        assert made.metadata.shared <= SHARED_MEMORY_LIMIT


@needs_triton
def test_gradients_are_those_of_the_definition() -> None:
    interpret(
        CASES
        + """
    for q, k, v, rest, what in list(cases())[::3]:
        out, lse = torch.ops.onegpu.attention_forward(q, k, v, *rest)
        grad, grad_lse = torch.randn_like(out), torch.randn_like(lse)
        padding = q[..., 0, 0].isnan()  # what reaches it is not read
        grad[padding], grad_lse.movedim(-2, -1)[padding] = math.nan, math.nan
        clean = grad.nan_to_num(), grad_lse.nan_to_num()
        expected = torch.ops.onegpu.attention_backward(*clean, q, k, v, out, lse, True, *rest)
        got = tuple(torch.full_like(x, 0 if rest[5] is not None else math.nan) for x in expected)
        configs = (16, 32, 4, 1), (32, 16, 4, 1)
        attention_triton_backward.backward(grad, grad_lse, q, k, v, out, lse, got, *rest[:-1], configs=configs)
        for x, y in zip(got, expected):
            torch.testing.assert_close(x, y, rtol=0, atol=2e-2 if q.dtype == torch.float16 else 1e-4, msg=str(what))
        """
    )
