"""The attention of a decoding step beside the products around it: room on an SM, registers, what it reads ahead."""

from __future__ import annotations

import pytest
import torch

from onegpu.engine import fused_step
from onegpu.engine.fused_step import FusedStep
from onegpu.engine.fused_structure import Structure
from onegpu.kernels import decode_step as ops
from onegpu.kernels import decode_step_attention as attention
from onegpu.kernels import decode_step_cuda as gpu
from onegpu.kernels.decode_step_layouts import FORMATS
from tests.decode_structures import caches, matrix, moved, structure
from tests.kernels import machine_code
from tests.kernels.test_decode_step_cuda import Compiled
from tests.nvrtc_tools import needs_nvrtc

SM, EACH = 233472, 1024  # bytes of shared memory of a Hopper SM, and what the system takes of them for a block


def heads(query: int, kv: int, size: int, rotated: int | None = None) -> ops.Heads:
    rotated = size if rotated is None else rotated
    return ops.Heads(query, kv, size, 1.0, None, torch.empty(rotated // 2) if rotated else None)


def stands_for(form: str, columns: int) -> ops.Matrix:
    part = matrix("16bit", (4,), 64, torch.bfloat16).parts[0]
    if form == "transposed":
        return ops.Matrix("16bit", columns, (part._replace(rows=32),), transposed=True)
    return ops.Matrix(form, columns, (part,))


@pytest.mark.parametrize("form", [*FORMATS, "transposed"])
@pytest.mark.parametrize("of", [heads(32, 32, 128), heads(32, 8, 128), heads(71, 1, 64), heads(32, 32, 80, 32)])
def test_exactly_one_block_of_it_fits_beside_a_product(form: str, of: ops.Heads) -> None:
    m = stands_for(form, 2048 if form == "transposed" else 4096)
    left = attention.beside(of, 1, m, m)
    assert left > 0
    mine = -(-attention.BESIDE.shared(of) // 128) * 128 + EACH
    product = gpu._share(0, left)
    static = 64 * (form in ("nf4", "fp4"))  # in front of what starts at a multiple of 1024
    theirs = product + EACH + 1024 * (static > 0)
    assert product % 128 == 0
    assert theirs + mine <= SM < product + EACH + 2 * mine
    if form != "transposed":
        found = gpu.shape(form, 1, 4096, False, left)
        assert found is not None
        assert found.shared(form, 1, 4096, False) <= product


def test_where_it_stays_alone() -> None:
    m = stands_for("16bit", 4096)
    assert attention.beside(heads(32, 32, 128), 2, m) == 0  # registers
    assert attention.beside(heads(8, 4, 256), 1, m) == 0
    assert attention.beside(heads(32, 32, 128), 1, m, stands_for("16bit", 49152)) == 0  # x takes the room


def beside_on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fused_step._Run, "_beside", lambda self, of, *m: attention.beside(of, self.rows, *m))


@needs_nvrtc
@pytest.mark.parametrize("form", ["16bit", "int8", "nf4"])
def test_the_registers_of_an_sm_suffice_for_both(form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ops, "_on_gpu", lambda _: True)
    monkeypatch.setattr(gpu, "_kernel", Compiled)
    monkeypatch.setattr(gpu, "multiprocessors", lambda _: 132)
    monkeypatch.setattr(Compiled, "made", {})
    beside_on_a_cpu(monkeypatch)
    found = structure(form, layers=1, width=256, size=128, query=2, kv=2, nested=form == "nf4", norms=form == "nf4")
    at = torch.tensor([3])
    FusedStep(found)(torch.zeros(1, 1, dtype=torch.int64), at, at, caches(found, 1, 64))
    a_quarter = {"product": 0, "attention": 0}  # of the SM: of its warps on one of four schedulers, each with 16384
    for key, code in Compiled.made.items():
        constants = dict(key)
        if not constants.get("BESIDE"):
            continue
        kind = "attention" if "STAGES" in constants else "product"
        taken = -(-machine_code.registers(code) // 8) * 8 * 32 * -(-constants["WARPS"] // 4)
        a_quarter[kind] = max(a_quarter[kind], taken)
        assert (
            machine_code.stack_bytes(code) <= 64
        )  # the cosine of a large angle, and what is kept from before the loop
        assert machine_code.copies_with_a_uniform_base(code) == 0
    assert all(a_quarter.values())
    assert sum(a_quarter.values()) <= 16384


def test_products_around_it_give_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """And are told to leave room, those between which it stands."""
    from tests.kernels.emulated_step import emulate

    found, at = structure("int8", layers=2), torch.tensor([40])
    ids = torch.tensor([[3]])
    emulate(monkeypatch)
    want = FusedStep(found)(ids, at, at, caches(found, 1, 64))
    beside_on_a_cpu(monkeypatch)
    told: list[tuple[str, int]] = []
    product = gpu.product
    monkeypatch.setattr(
        gpu, "product", lambda x, m, sink, *a, **k: (told.append((sink, k["beside"])), product(x, m, sink, *a, **k))
    )
    got = FusedStep(found)(ids, at, at, caches(found, 1, 64))
    left = attention.beside(found.layers[0].heads, 1)
    assert told == [("store", left), ("add", left), ("gated", 0), ("add", 0)] * 2 + [("store", 0)]
    torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-3)


@pytest.mark.gpu
@pytest.mark.parametrize("form", ["16bit", "int8", "nf4"])
def test_it_reads_what_kernels_in_front_of_the_step_wrote(form: str) -> None:
    found = moved(structure(form, width=512, inner=1408, query=8, kv=8, size=64, layers=3), "cuda")
    assert isinstance(found, Structure)
    assert attention.beside(found.layers[0].heads, 1, found.layers[0].qkv, found.layers[0].out) > 0
    step, kept = FusedStep(found), list(moved(tuple(caches(found, 1, 512)), "cuda"))
    ids, place = torch.tensor([[3]], device="cuda"), torch.tensor([400], device="cuda")
    memory, at = [(k.clone(), v.clone()) for k, v in kept], place.clone()
    want = step(ids, at, at, memory)
    graph = torch.cuda.CUDAGraph()
    torch.cuda.synchronize()
    with torch.cuda.graph(graph):
        for k, v in memory:
            k.fill_(float("nan"))
            v.fill_(float("nan"))
        at.fill_(7)
        torch.cuda._sleep(200_000)
        for (k, v), (old_k, old_v) in zip(reversed(memory), reversed(kept), strict=True):
            k.copy_(old_k)
            v.copy_(old_v)
        at.copy_(place)
        got = step(ids, at, at, memory)
    wrong = torch.zeros((), dtype=torch.int64, device="cuda")
    for _ in range(200):
        graph.replay()
        wrong += (got != want).any()
    assert int(wrong) == 0
