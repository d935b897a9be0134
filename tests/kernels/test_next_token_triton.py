"""The kernels that choose tokens compile everywhere within limits, and choose what the definition does."""

from __future__ import annotations

from typing import Any

import pytest

from onegpu.kernels.next_token import MOST_CANDIDATES
from tests.triton_tools import ARCHITECTURES, SHARED_MEMORY_LIMIT, compiled, interpret, needs_triton

_STATE = {"p_eos": "*i64", "n_eos": "i32", "p_pad": "*i64", "p_out": "*i64", "n_rows": "i32", "p_history": "*i64"}
_STATE.update({"L": "i32", "p_lengths": "*i64", "p_shown": "*i64", "n_shown": "i32"})


def _fits(kernel: Any, arguments: dict[str, str], constants: dict[str, Any], architecture: int, **options: int) -> None:
    made = compiled(kernel, arguments, constants, architecture, **options)
    assert made.metadata.shared <= SHARED_MEMORY_LIMIT


@needs_triton
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_compiles_within_the_limits(architecture: int) -> None:
    from onegpu.kernels import next_token_triton as kernels

    best = {"p_scores": "*bf16", "p_noise": "*fp32", "p_best": "*i64", "V": "i32", "stride": "i32", "scale": "fp32"}
    best["span"] = "i32"
    constants: dict[str, Any] = {"BLOCK": 1024, "RACE": True, "PDL": architecture >= 90}
    _fits(kernels._best_kernel, best, constants, architecture)
    _fits(kernels._best_kernel, best, {**constants, "RACE": False}, architecture)
    constants = {"PARTS": 512, "RACE": True, "EOS": 16, "PAD": True, "PDL": architecture >= 90}
    _fits(kernels._take_kernel, {"p_best": "*i64", "parts": "i32", **_STATE}, constants, architecture, num_warps=1)
    names = ("p_values", "p_ids", "p_noise", "V", "scale", "top_k", "cut", "least_top_p", "min_p", "least_min_p")
    kinds = ("*bf16", "*i64", "*fp32", "i32", "fp32", "i32", "fp32", "i32", "fp32", "i32")
    arguments = {**dict(zip(names, kinds, strict=True)), **_STATE}
    for count in (128, MOST_CANDIDATES) if architecture in (80, 90) else (128,):
        constants = {"K": count, "TOP_P": True, "MIN_P": True, "EOS": 16, "PAD": True}
        _fits(kernels._candidates_kernel, arguments, constants, architecture, num_warps=4)


@needs_triton
def test_takes_what_the_definition_takes() -> None:
    interpret(
        """
        import math
        from onegpu.kernels import next_token_triton as kernels
        from onegpu.kernels.next_token import _take
        from tests.kernels.test_next_token import _noise, _same_tokens, _state

        def check(scores, noise, temperature, allowed=0.0, **state):
            rows = len(scores)
            got, wanted = _state(rows, **state), _state(rows, **state)
            kernels.take(scores, noise, temperature, got)
            _take(scores, noise, temperature, *wanted)
            _same_tokens(got, wanted, allowed)

        for dtype in (torch.float32, torch.float16, torch.bfloat16):
            for rows, vocab in ((1, 1), (9, 63), (2, 1024), (3, 3001)):
                scores = (torch.randn(rows, vocab + 3) * 4).to(dtype)[:, :vocab]
                check(scores, None, 1.0)
                check(scores, _noise(rows, vocab), 0.7)
        kernels._PROGRAMS = 4  # rows share the GPU: each program has a longer span
        check(torch.randn(3, 5000), None, 1.0, eos=(), pad=None)
        scores = torch.zeros(6, 3000)
        scores[0, 1500:] = -0.0
        scores[1, [700, 2900]] = -math.nan
        scores[2, [800, 100]] = math.inf
        scores[3] = -math.inf
        scores[4, [2500, 40]] = 2.0
        scores[5] = -1.0
        check(scores, None, 1.0)
        got = _state(6)
        kernels.take(scores, _noise(6, 3000), 1.0, got)
        assert got.out[2].tolist() == [0, 1, 1, 1, 0, 0], got.out
        """
    )


@needs_triton
def test_draws_what_the_definition_draws() -> None:
    interpret(
        """
        import math
        from onegpu.kernels import next_token_triton as kernels
        from onegpu.kernels.next_token import Shape, _take_candidates
        from tests.kernels.test_next_token import _candidates, _same_tokens, _state

        def check(candidates, shape):
            got, wanted = (_state(len(candidates[0])) for _ in range(2))
            kernels.take_candidates(*candidates, Shape(*shape), got)
            _take_candidates(*candidates, *Shape(*shape), *wanted)
            _same_tokens(got, wanted)

        for dtype in (torch.float32, torch.bfloat16):
            for shape in ((1.0, 8), (0.7, 5, 0.9), (1.3, 8, 0.8, 4, 0.05, 2), (1.0, 7, 1.0, 1, 0.1), (2.0, 1)):
                check(_candidates(6, 16, 300, "cpu", dtype), shape)
        check(_candidates(1, 128, 3000, "cpu"), (0.8, 50, 0.95))
        values, ids, noise = _candidates(5, 16, 300, "cpu")
        values[0, 3], values[1, 4], values[2], values[3, :] = math.nan, math.inf, -math.inf, 0.0
        got = _state(5)
        kernels.take_candidates(values, ids, noise, Shape(0.7, 5, 0.9), got)
        assert got.out[2].tolist() == [1, 1, 1, 0, 0], got.out
        check((values[3:], ids[3:], noise[3:]), (0.7, 5, 0.9))
        """
    )
