"""The portable attention: it compiles everywhere within limits, and the interpreter agrees with the definition.

The backward's file has its tests in test_attention_triton_backward.py; what runs on a GPU stands in test_attention.py.
"""

from __future__ import annotations

import json
import re
from typing import Any

import pytest

from tests.kernels import attention_resources as resources
from tests.triton_tools import ARCHITECTURES, SHARED_MEMORY_LIMIT, compiled, interpret, needs_triton


def compile_attention(kernel: Any, config: tuple[int, int, int, int], d: int, architecture: int, **other: Any) -> Any:
    """One kernel of the portable attention, causal, for 16-bit inputs without ranges or packing unless ``other``."""
    from onegpu.kernels import attention_triton

    dtype, given = other.pop("dtype", "bf16"), other.pop("given", ())
    constants = {**attention_triton.constants(d, d, -1, 0), "BM": config[0], "BN": config[1]}
    ranges = "p_q_range", "p_k_range", "p_cu_q", "p_cu_k"
    constants |= dict.fromkeys(name for name in ranges if name not in given) | other
    kinds = {}
    for name in kernel.arg_names:
        if name in constants:
            continue
        if name in ranges:
            kinds[name] = "*i32"
        elif name.startswith("p_"):
            kinds[name] = "*fp32" if name in ("p_lse", "p_dlse", "p_rows") else f"*{dtype}"
        else:
            kinds[name] = "fp32" if name.startswith("scale") else "i32"
    constants = {name: value for name, value in constants.items() if name in kernel.arg_names}
    # in the order of the signature: aligned pointers and strides are told by position
    order = {name: kinds.get(name, "constexpr") for name in kernel.arg_names}
    return compiled(kernel, order, constants, architecture, num_warps=config[2], num_stages=config[3])


@needs_triton
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_compiles_within_the_limits(architecture: int) -> None:
    from onegpu.kernels import attention_triton as kernels

    for width in (96, 128, 256) if architecture == 90 else (128,):
        config = kernels._CONFIGS[width]
        made = compile_attention(kernels.forward_kernel, config, width, architecture, LEFT=width == 96)
        assert made.metadata.shared <= SHARED_MEMORY_LIMIT, (width, config)


def all_variants() -> dict[tuple[str, str], Any]:
    return {(str(arch), name): make for name, arch, make in (*resources.portable(), *resources.hopper())}


@needs_triton
def test_the_record_has_every_variant_within_the_limits() -> None:
    for version, record in json.loads(resources.RECORD.read_text()).items():
        recorded = {(arch, name): row for arch, rows in record.items() for name, row in rows.items()}
        assert recorded.keys() == all_variants().keys(), f"run python -m tests.kernels.attention_resources ({version})"
        for (arch, name), (shared, spilled) in recorded.items():
            assert shared <= resources.SHARED[int(arch)], (version, arch, name)
            assert spilled <= (32 * 1024 if "fp32" in name else 4096), (version, arch, name)


@needs_triton
@pytest.mark.parametrize("variant", [("86", "keys bf16 64 packed window"), ("90", "queries bf16 128 causal")])
def test_the_record_is_what_is_compiled(variant: tuple[str, str]) -> None:
    import triton

    record = json.loads(resources.RECORD.read_text()).get(triton.__version__)
    if record is None:
        pytest.skip(f"no record of Triton {triton.__version__}: run python -m tests.kernels.attention_resources")
    assert resources.measure(all_variants()[variant]) == record[variant[0]][variant[1]]


@needs_triton
@pytest.mark.parametrize("given", [("p_q_range", "p_k_range"), ("p_cu_q", "p_cu_k")])
def test_ranges_and_packing_compile(given: tuple[str, ...]) -> None:
    from onegpu.kernels import attention_triton as kernels

    config = kernels._CONFIGS[128]
    assert compile_attention(kernels.forward_kernel, config, 80, 80, given=given).metadata.shared > 0


@needs_triton
def test_fp32_is_exact() -> None:
    from onegpu.kernels import attention_triton as kernels

    made = compile_attention(kernels.forward_kernel, kernels._CONFIGS_FP32[256], 256, 80, dtype="fp32")
    assert made.metadata.shared <= SHARED_MEMORY_LIMIT and not re.search("tf32", made.asm["ptx"])


@needs_triton
def test_head_dims_are_covered() -> None:
    from onegpu.kernels.attention_triton import split

    covered = {1: (16, 0), 16: (16, 0), 59: (64, 0), 64: (64, 0), 72: (64, 16), 96: (64, 32), 112: (128, 0)}
    covered |= {128: (128, 0), 192: (128, 64), 200: (256, 0), 256: (256, 0)}
    assert {d: split(d) for d in covered} == covered
    assert all(d <= sum(split(d)) < max(2 * d, 17) for d in range(1, 257))


CASES = """
    import math, warnings
    from onegpu.kernels import attention_triton, attention_triton_backward
    from onegpu.kernels.attention import attention
    warnings.simplefilter("ignore")  # NumPy's, of 1 / 0 and log 0

    def int32(*x):
        return torch.tensor(x, dtype=torch.int32)

    def cases():
        shapes = ((37, 53, 4, 2, 16, 16), (53, 37, 2, 1, 24, 40), (1, 1, 1, 1, 72, 64), (20, 20, 2, 2, 96, 80))
        windows = ((-1, -1), (-1, 0), (7, 3), (9, 0), (-1, 4))
        for i, (s_q, s_k, h, h_kv, d, d_v) in enumerate(shapes):
            for j, (left, right) in enumerate(windows):
                mode, dtype = ("dense", "padded", "packed")[(i + j) % 3], (torch.float16, torch.float32)[j % 2]
                q, k, v = torch.randn(2, s_q, h, d), torch.randn(2, s_k, h_kv, d), torch.randn(2, s_k, h_kv, d_v)
                q, k, v = (x.to(dtype) for x in (q, k, v))
                ranges = [None] * 4
                if mode == "padded":
                    ranges[:2] = int32((min(3, s_q // 3), s_q // 2), (0, s_q)), int32((s_k // 3, s_k // 2), (0, s_k))
                    for x, rows in zip((q, k, v), (ranges[0], ranges[1], ranges[1])):
                        for b, (first, n) in enumerate(rows.tolist()):
                            x[b, :first] = x[b, first + n :] = math.nan
                elif mode == "packed":
                    q, k, v = (x.flatten(0, 1).clone() for x in (q, k, v))
                    ranges[2:] = int32(1, s_q // 2 + 1, max(2, 2 * s_q - 2)), int32(0, s_k // 3 + 1, 2 * s_k - 1)
                    q[:1] = math.nan
                rest = (d**-0.5, left, right, *ranges, q.shape[-3], k.shape[-3], "definition")
                yield q, k, v, rest, (s_q, s_k, h, h_kv, d, d_v, left, right, mode, dtype)
"""


@needs_triton
def test_forward_is_that_of_the_definition() -> None:
    interpret(
        CASES
        + """
    for q, k, v, rest, what in list(cases())[::2]:
        expected, expected_lse = torch.ops.onegpu.attention_forward(q, k, v, *rest)
        out, lse = torch.full_like(expected, math.nan), torch.full_like(expected_lse, math.nan)
        attention_triton.forward(q, k, v, out, lse, *rest[:-2], config=(16, 16, 4, 1))
        atol = 3e-3 if q.dtype == torch.float16 else 1e-5
        torch.testing.assert_close(out, expected, rtol=0, atol=atol, msg=str(what))
        torch.testing.assert_close(lse, expected_lse, rtol=1e-4, atol=1e-4, msg=str(what))
        """
    )
