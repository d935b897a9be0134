"""Decode attention's kernels: they compile everywhere within limits, and agree with the definition as interpreted."""

from __future__ import annotations

import re
from typing import Any

import pytest

from tests.triton_tools import SHARED_MEMORY_LIMIT, compiled, interpret, needs_triton, stack_bytes


def _compiled_split(architecture: int, dtype: str, d: int, rows: int, whole: bool) -> Any:
    from onegpu.kernels import decode_attention_triton as kernels

    config = kernels.configure(32, rows, d, d, 4096, 4 if dtype == "fp32" else 2, 132, architecture >= 90)
    names = [argument for argument in kernels._split_kernel.arg_names if not argument.isupper()]
    floats = dict.fromkeys(("p_q", "p_k", "p_v", "p_out"), f"*{dtype}")
    others = {"p_length": "*i32", "p_first": "*i32", "p_slopes": "*fp32", "p_parts": "*fp32"}
    kinds = {**floats, **others, "scale": "fp32", "softcap": "fp32"}
    sizes = dict.fromkeys(("HKV", "L", "ROW_TILES", "SPLITS"), "i32")
    arguments = {name: kinds.get(name, "i32") for name in names} | sizes
    padded = kernels._padded(d)
    constants = {
        "T": 1, "G": rows, "D": d, "DV": d, "BM": config.bm, "BN": config.bn, "BD": padded, "BDV": padded,
        "PIECE": kernels.piece(padded, 4 if dtype == "fp32" else 2), "ALIGN": 8, "FIRST": whole, "WINDOW": whole,
        "SOFTCAP": whole, "SLOPES": whole, "WHOLE": whole, "PDL": architecture >= 90,
        "PRECISION": "ieee" if dtype == "fp32" else None,
        "UNIT": 1.4426950408889634 if dtype == "fp32" else 1.0,
        "BS": 4 if architecture >= 90 and not whole else 0,
    }  # fmt: skip
    arguments = {name: arguments[name] for name in kernels._split_kernel.arg_names if name in arguments}
    options = {"num_warps": config.warps, "num_stages": config.stages}
    return compiled(kernels._split_kernel, arguments, constants, architecture, **options)


@needs_triton
@pytest.mark.parametrize("architecture", [80, 90])
def test_compiles_within_the_limits(architecture: int) -> None:
    from onegpu.kernels import decode_attention_triton as kernels

    # The widest tile of each kind. The two architectures differ in their matrix instructions for 64 rows, and clusters.
    shapes = [("bf16", 64, 71, True)]
    shapes += [("bf16", 128, 64, False), ("bf16", 80, 1, True)] if architecture == 90 else [("bf16", 256, 32, False)]
    shapes += [("fp32", 256, 8, True)] if architecture == 80 else []
    for dtype, d, rows, whole in shapes:
        kernel = _compiled_split(architecture, dtype, d, rows, whole)
        what = (dtype, d, rows)
        assert kernel.metadata.shared <= SHARED_MEMORY_LIMIT, what
        assert stack_bytes(kernel) <= 16, what  # ptxas sets 8 bytes aside here and there
        assert "cp.async.cg.shared.global" in kernel.asm["ptx"], what  # 16 bytes at a time, while it computes
        assert ("barrier.cluster.wait" in kernel.asm["ptx"]) == (architecture == 90 and not whole), what
        _check_order(kernel.asm["ptx"], architecture)
    arguments = {"p_parts": "*fp32", "p_out": "*bf16"}
    arguments |= dict.fromkeys(("HKV", "SPLITS", "o_b", "o_t", "o_h"), "i32")
    constants = {"T": 1, "G": 8, "DV": 256, "BP": 8, "BDV": 256, "PDL": architecture >= 90, "UNIT": 1.0}
    kernel = compiled(kernels._combine_kernel, arguments, constants, architecture, num_warps=1)
    assert kernel.metadata.shared <= SHARED_MEMORY_LIMIT and stack_bytes(kernel) == 0
    _check_order(kernel.asm["ptx"], architecture)


@needs_triton
@pytest.mark.parametrize(
    ("heads", "rows", "d", "keys", "config"),
    [
        (8, 4, 128, 32768, (16, 64, 4, 3, 16, False, False)),
        (32, 1, 128, 4096, (16, 64, 4, 3, 4, False, False)),
        (128, 4, 128, 4096, (16, 64, 4, 3, 1, False, False)),
        (8, 4, 128, 4096, (16, 64, 4, 3, 8, True, True)),
        (32, 1, 128, 512, (16, 64, 4, 3, 2, True, True)),
        (8, 16, 128, 4096, (16, 64, 4, 3, 16, False, False)),
        (1, 64, 256, 8192, (16, 32, 4, 3, 33, False, False)),
        (4, 71, 64, 4096, (64, 64, 4, 3, 16, False, True)),
        (1, 1, 128, 100, (16, 64, 4, 3, 1, False, False)),  # nothing to split
    ],
)
def test_what_was_fastest_is_chosen(heads: int, rows: int, d: int, keys: int, config: tuple[Any, ...]) -> None:
    from onegpu.kernels import decode_attention_triton as kernels

    assert kernels.configure(heads, rows, d, d, keys, 2, 132, True) == config
    assert kernels.configure(heads, rows, d, d, keys, 2, 108, False)[5:] == (False, False)


def _check_order(ptx: str, architecture: int) -> None:
    """The next kernel may start at once, and nothing is read or written before the wait."""
    before, wait, behind = ptx.partition("griddepcontrol.wait")
    assert bool(wait) == (architecture == 90)
    if wait:
        assert "griddepcontrol.launch_dependents" in before and "griddepcontrol" not in behind
        assert not re.search(r"(ld|st|red|atom)\.(volatile\.|relaxed\.)?global|cp\.async|prefetch", before)


@needs_triton
def test_agrees_with_the_definition() -> None:
    interpret(
        """
        from onegpu.kernels import decode_attention_triton as kernels
        from onegpu.kernels.decode_attention import _decode, _empty
        from tests.kernels.test_decode_attention import CASES, inputs

        def check(parts, bn, dtype=torch.float32, **case):
            (q, k, v, length), options = inputs(dtype=dtype, **case)
            get = options.get
            arguments = (q, k, v, length, get("first"), get("scale", 0.2), get("window", 0), get("softcap", 0.0))
            arguments += (get("slopes"),)
            out = torch.full_like(_empty(q, v.shape[-1]), float("nan"))
            kernels.decode(*arguments, out, kernels.Config(16, bn, 4, 1, parts))
            tolerance = 1e-5 if dtype == torch.float32 else 2e-3
            torch.testing.assert_close(out.float(), _decode(*arguments).float(), rtol=tolerance, atol=tolerance)

        for number, case in enumerate(CASES.values()):
            check((1, 3, 2)[number % 3], 16, **case)
        check(2, 16, lengths=(0, 30), h=40, h_kv=1, d=16)  # no keys; more rows than a tile
        check(5, 32, torch.float16, room=200, lengths=(200, 33))
        """
    )


@needs_triton
def test_nan_is_not_lost_between_the_parts() -> None:
    interpret(
        """
        from onegpu.kernels import decode_attention_triton as kernels
        from tests.kernels.test_decode_attention import inputs
        (q, k, v, length), _ = inputs(room=64, lengths=(64, 20))
        k[0, 0, 20:50] = float("nan")  # a part of NaN alone beside parts of numbers
        v[1, 1, 3] = float("nan")
        out = torch.zeros(2, 4, 1, 64)
        kernels.decode(q, k, v, length, None, 0.1, 0, 0.0, None, out, kernels.Config(16, 16, 4, 1, 4))
        nan = out.isnan().all(-1).view(2, 4)
        assert nan.tolist() == [[True, True, False, False], [False, False, True, True]], nan
        """
    )
