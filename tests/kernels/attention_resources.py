"""What each variant of the attention kernels takes: ``python -m tests.kernels.attention_resources`` compiles them all.

Shared memory and spilled bytes, by Triton's version, architecture and variant, in ``attention_resources.json``, which
`test_attention_triton.py` holds against the limits and, with a few variants, against what is compiled now.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

from tests.triton_tools import ARCHITECTURES, spills

RECORD = Path(__file__).with_suffix(".json")
KB = 1024
SHARED = {80: 163 * KB, 86: 99 * KB, 89: 99 * KB, 90: 227 * KB, 100: 227 * KB}  # what a block may have, of an SM
RANGES, PACKED = ("p_q_range", "p_k_range"), ("p_cu_q", "p_cu_k")


def portable() -> Iterator[tuple[str, int, Any]]:
    """(variant, architecture, how to compile it): each configuration of each kernel, causal, and packed in a window."""
    from onegpu.kernels import attention_triton as forward
    from onegpu.kernels import attention_triton_backward as backward
    from tests.kernels.test_attention_triton import compile_attention

    tables = (
        ("forward", forward.forward_kernel, forward._CONFIGS, forward._CONFIGS_FP32),
        ("keys", backward.keys_kernel, backward._KEYS, backward._FP32),
        ("queries", backward.queries_kernel, backward._QUERIES, backward._FP32),
    )
    roomy = (
        ("keys", backward.keys_kernel, backward._ROOMY_KEYS),
        ("queries", backward.queries_kernel, backward._ROOMY_QUERIES),
    )
    for architecture in (90, 100):
        for name, kernel, table in roomy:
            for width in (192, 256):
                made = partial(compile_attention, kernel, table[width], width, architecture)
                for mask, other in (("causal", {}), ("padded", {"given": RANGES}), ("window", {"LEFT": True})):
                    yield f"{name} bf16 {width} {mask}, roomy", architecture, partial(made, **other)
    for architecture in ARCHITECTURES:
        for name, kernel, half, single in tables:
            for table, dtype in ((half, "bf16"), (single, "fp32")):
                for width, config in table.items():
                    made = partial(compile_attention, kernel, config, width, architecture, dtype=dtype)
                    yield f"{name} {dtype} {width} causal", architecture, made
                    if width in (64, 256) and dtype == "bf16":
                        both = {"given": PACKED, "LEFT": True} if width == 64 else {"given": RANGES}
                        yield (
                            f"{name} {dtype} {width} {'packed window' if width == 64 else 'padded'}",
                            architecture,
                            partial(made, **both),
                        )


def hopper() -> Iterator[tuple[str, int, Any]]:
    """The same of the Gluon kernels."""
    import torch

    from onegpu.kernels import attention_hopper, attention_sm90, attention_sm90_backward
    from tests.kernels.test_attention_sm90 import compile_gluon, meta_descriptor
    from tests.kernels.test_attention_sm90_few import compile_few

    for d in (64, 128, 256):
        for kind, left in (("causal", False), ("window", True)):
            yield f"Hopper forward {d} {kind}, few tiles", 90, partial(compile_few, d, d, left)

    kinds: dict[str, dict[str, Any]] = {
        "causal": {"RIGHT": True},
        "full": {},
        "padded causal": {"RIGHT": True, "RQ": 1, "RK": 1},
        "packed window": {"RIGHT": True, "LEFT": True, "RQ": 2, "RK": 2},
    }
    ahead = {"AHEAD": True, "ST": 4, "HALF": 0}
    of_64 = {"causal, S ahead": {"RIGHT": True} | ahead, "full, S ahead": ahead}
    for d in (64, 128, 256):
        for kind, options in (kinds | (of_64 if d == 64 else {})).items():
            bn = 64 if d == 256 else 128
            constants = {"LEFT": False, "RIGHT": False, "RQ": 0, "RK": 0} | options
            given = {
                "HEAD": d,
                "BN": bn,
                "ST": 2,
                "ALIGNED": kind.startswith("causal"),
                "WIDE": False,
                "ROTATE": 0,
                "DRAW": True,
                "ALIAS": d == 256,
                "AHEAD": False,
                "HALF": int(kind == "causal" and bn == 128),
            } | constants

            def make(given: dict[str, Any] = given, d: int = d, bn: int = bn) -> Any:
                boxes = [meta_descriptor(rows, d) for rows in (64, bn, bn, 64)]
                return compile_gluon(attention_sm90.forward_kernel, boxes, **given)

            yield f"Hopper forward {d} {kind}", 90, make
            if d == 256 or kind not in kinds:
                continue
            diagonal = constants["RIGHT"] and not constants["LEFT"]
            for order in (False, True):
                given = constants | {"HEAD": d, "HEAD_V": d, "ST": 2, "EVEN": not constants["RK"]}
                given |= {
                    "SWAP": d == 64 or diagonal,
                    "SPLIT": diagonal and not order,
                    "DRAW": 2 if order else 1,
                    "ORDER": order,
                }

                def make(given: dict[str, Any] = given, d: int = d) -> Any:
                    m = 8192 // d
                    boxes = [meta_descriptor(rows, d) for rows in (m, 64, 64, m, 64, 64)]
                    boxes += attention_hopper.scratch(torch.zeros(2, 2 * m), torch.zeros(2 * m, d))
                    return compile_gluon(attention_sm90_backward.backward_kernel, boxes, **given)

                yield f"Hopper backward {d} {kind}{', deterministic' if order else ''}", 90, make


def measure(make: Any) -> list[int]:
    """[shared memory, spilled bytes] of one."""
    made = make()
    return [made.metadata.shared, spills(made)]


def main() -> None:
    """Write the record of this Triton, beside those of others."""
    import triton

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", default="", help="those whose architecture and name contain this; others are kept")
    only = parser.parse_args().only
    record = json.loads(RECORD.read_text()) if RECORD.exists() else {}
    mine = record.setdefault(triton.__version__, {})
    for name, architecture, make in (*portable(), *hopper()):
        if only in f"{architecture} {name}":
            mine.setdefault(str(architecture), {})[name] = measure(make)
            print(triton.__version__, architecture, name, mine[str(architecture)][name], flush=True)
            RECORD.write_text(json.dumps(record, indent=1, sort_keys=True) + "\n")


if __name__ == "__main__":
    main()
