"""How the step's kernels are laid out on an SM, and that they compile."""

from __future__ import annotations

import dataclasses
import subprocess
from functools import cache
from pathlib import Path
from typing import ClassVar

import pytest
import torch

from benchmarks.case import Context
from benchmarks.cases import fused_structures
from onegpu.engine.fused_step import FusedStep
from onegpu.engine.fused_structure import Structure, read
from onegpu.errors import ArgumentError, KernelError
from onegpu.kernels import decode_step as ops
from onegpu.kernels import decode_step_cuda as gpu
from onegpu.kernels import disk_cache, driver, launch
from onegpu.kernels.decode_step_layouts import WHOLE, Shape
from tests.decode_models import STRUCTURES, decoder
from tests.decode_structures import caches, matrix, moved, structure
from tests.fake_driver import FakeDriver
from tests.kernels import machine_code
from tests.kernels.emulated_step import DEVICES, emulate, on
from tests.nvrtc_tools import needs_nvrtc


def test_rows_that_do_not_fit() -> None:
    m, stream = ops.Matrix("16bit", 65536, matrix_parts()), ops.Stream(torch.empty(16, 65536), torch.bfloat16)
    with pytest.raises(ArgumentError, match=r"rows=16.*shared memory"):
        gpu.product(stream, m, "store", torch.empty(16, 4))


def matrix_parts() -> tuple[ops.Part, ...]:
    return matrix("16bit", (4,), 64, torch.bfloat16).parts


def test_keys_are_cut_where_there_are_more_multiprocessors_than_heads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "multiprocessors", lambda _: 132)
    assert [gpu.splits(0, rows, kv) for rows, kv in ((1, 32), (1, 8), (1, 64), (8, 32), (4, 8))] == [4, 8, 2, 1, 4]


@pytest.mark.parametrize(
    "fixed",
    [Shape(3, 128, 2, 8, 2), Shape(2, 64, 3, 7, 1), Shape(3, 128, 2, 8, 2, own=True),
     Shape(2, 64, 3, 7, 2, own=True)],
)  # fmt: skip
def test_any_layout_gives_the_product(fixed: Shape, monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randn(1, 192, generator=torch.Generator().manual_seed(0)).bfloat16()
    for form in ("16bit", "int8", "nf4"):
        m = matrix(form, (40,), 192, torch.bfloat16)
        with monkeypatch.context() as patched:
            emulate(patched)
            out = torch.zeros(1, 40)
            gpu.product(x, m, "add", out, fixed=fixed)
        torch.testing.assert_close(out, m.multiply(x.float()), rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize("form", ["16bit", "nf4"])
def test_fetching_warps_take_turns_around_the_ring(form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As many as slots, and a number that does not divide them, over many turns; more could be two turns ahead."""
    x = torch.randn(5, 512, generator=torch.Generator().manual_seed(0)).bfloat16()
    m, out = matrix(form, (200,), 512, torch.bfloat16), torch.zeros(5, 200)
    emulate(monkeypatch)
    for slots, fetchers in ((2, 2), (3, 2)):
        out.zero_()
        gpu.product(x, m, "add", out, fixed=Shape(4, 128, slots, fetchers=fetchers))
        torch.testing.assert_close(out, m.multiply(x.float()), rtol=2e-3, atol=2e-3)
    more = Shape(4, 128, 2, fetchers=3)
    assert not more.serves(form, 5, 512, False)
    with pytest.raises(subprocess.CalledProcessError):
        gpu.product(x, m, "add", out, fixed=more)


# form, rows, columns, rows of the parts, what x is, sink, layout. Columns that no share divides, tiles cut off, several
# tiles between two sums, more clusters than rows.
CLUSTERED = [
    ("16bit", 16, 512, (150,), "x", "add", Shape(16, 256, 3, cluster=2, fetchers=2)),
    ("16bit", 5, 576, (48,), "heads", "add", Shape(8, 128, 4, cluster=2, fetchers=4)),
    ("16bit", 5, 576, (48, 16, 16), "added", "store", Shape(8, 128, 4, cluster=2, fetchers=4)),
    ("16bit", 16, 832, (37, 37), "layer", "gated", Shape(8, 256, 3, cluster=4)),
    ("int8", 8, 448, (70,), "rms", "act", Shape(4, 128, 3, cluster=2)),
    ("int8", 16, 1984, (3,), "rms", "add", Shape(16, 128, 3, cluster=8)),
    ("int8", 2, 1344, (40,), "heads", "store", Shape(8, 128, 3, cluster=4)),
    ("int8", 2, 640, (130,), "x", "store", Shape(16, 128, 2, tiles=4, own=True, cluster=2)),
    ("nf4", 16, 1792, (40, 24), "rms", "both", Shape(8, 128, 3, cluster=4)),
    ("nf4", 9, 1280, (64,), "x", "add", Shape(5, 128, 2, 8, own=True, cluster=2)),
    ("nf4", 8, 1280, (64,), "heads", "add", Shape(5, 128, 2, 8, own=True, cluster=2)),
    ("nested", 8, 768, (36, 36), "layer", "gated", Shape(8, 128, 3, cluster=2, fetchers=3)),
    ("nested", 16, 1088, (64,), "added", "store", Shape(16, 128, 3, cluster=2)),
    ("fp4", 4, 1024, (64, 32), "layer", "store", Shape(8, 128, 4, 8, 8, cluster=4, fetchers=3)),
]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("case", CLUSTERED, ids=range(len(CLUSTERED)))
def test_clusters_share_the_columns(device: str, case: tuple, monkeypatch: pytest.MonkeyPatch) -> None:
    form, rows, columns, sizes, what, sink, fixed = case
    dtype, nested = (torch.bfloat16, torch.float16)[rows % 2], form == "nested"
    m = matrix("nf4" if nested else form, sizes, columns, dtype, nested=nested)
    x, outs = entered(what, rows, columns, dtype), outputs(sink, rows, sizes, dtype)
    wanted = [out.clone() for out in outs]
    ops.product(x, m, sink, wanted[0], also=wanted[1])
    place = on(device, monkeypatch)
    if device == "emulated":
        monkeypatch.setattr(gpu, "multiprocessors", lambda _: 8)
    got, there = [out.to(place) for out in outs], moved(x, place)
    if isinstance(there, ops.Stream) and there.to is not None:
        there.to.zero_()
    gpu.product(there, moved(m, place), sink, got[0], also=got[1], fixed=fixed)
    for ours, want in zip(got, wanted, strict=True):
        torch.testing.assert_close(ours.cpu().float(), want.float(), rtol=2e-2, atol=2e-2 * want.float().std().item())
    if isinstance(x, ops.Stream) and x.to is not None:
        torch.testing.assert_close(there.to.cpu(), x.to, rtol=1e-5, atol=1e-5)


def entered(what: str, rows: int, columns: int, dtype: torch.dtype) -> ops.Stream | ops.Attended | torch.Tensor:
    """What a product reads; "added": a norm in front of the residual sum too, which is written down; "heads": five
    parts of heads of 96 columns, else of 64 three, one of them without keys."""
    x, y, *weights = (torch.randn(rows, columns, generator=torch.Generator().manual_seed(i)) for i in range(4))
    if what == "heads":
        size, parts = (96, 5) if columns % 96 == 0 else (64, 3)
        shape = rows, columns // size, parts
        values = torch.randn(*shape, size, generator=torch.Generator().manual_seed(5)).to(dtype)
        sums = torch.rand(*shape, 2, generator=torch.Generator().manual_seed(6)) * 4
        sums[0, :, 1] = torch.tensor([float("-inf"), 0.0])
        values[0, :, 1] = 0
        return ops.Attended(values, sums)
    if what == "x":
        return x.to(dtype)
    gain, bias = ((1 + w[0] / 10).to(dtype) for w in weights)
    norm = ops.Norm("rms", gain, 1e-5) if what == "rms" else ops.Norm("layer", gain, 1e-5, bias)
    return ops.Stream(x + 3, dtype, norm, *((y, norm, torch.zeros_like(x)) if what == "added" else ()))


def outputs(sink: str, rows: int, sizes: tuple[int, ...], dtype: torch.dtype) -> list[torch.Tensor]:
    """What it writes, with what stands there before, and `also`."""
    n, second = sum(sizes), torch.zeros(rows, sizes[-1], dtype=dtype)
    first = {"gated": torch.zeros(rows, n // 2, dtype=dtype), "act": torch.zeros(rows, n, dtype=dtype),
             "both": torch.zeros(rows, sizes[0])}.get(sink, torch.ones(rows, n))  # fmt: skip
    return [first, second]


@cache
def large(form: str, sizes: tuple[int, ...], columns: int, nested: bool) -> ops.Matrix:
    return matrix(form, sizes, columns, torch.bfloat16, nested=nested)


@pytest.mark.gpu
@pytest.mark.parametrize("cluster", [None, 1, 2, 4, 8])
@pytest.mark.parametrize("form", ["16bit", "int8", "nf4", "nested"])
def test_clusters_give_the_same_bits_each_time(form: str, cluster: int | None) -> None:
    """Columns of Llama-2-7B, and several tiles a block; None: the layout that is taken."""
    nested = form == "nested"
    kind, rows = "nf4" if nested else form, 8 if cluster == 1 else 16
    for columns, sizes, what, sink in ((11008, (2048,), "x", "add"), (4096, (2752, 2752), "rms", "gated")):
        m = large(kind, sizes, columns, nested)
        fixed = None if cluster is None else Shape(8, 512, 3, cluster=cluster, fetchers=3)
        if fixed is not None and not fixed.serves(kind, rows, columns, nested):
            continue
        x, (out, _) = entered(what, rows, columns, torch.bfloat16), outputs(sink, rows, sizes, torch.bfloat16)
        x, m = moved(x, "cuda"), moved(m, "cuda")
        seen = []
        for _ in range(20):
            got = out.cuda()
            gpu.product(x, m, sink, got, fixed=fixed)
            seen.append(got)
        y = m.multiply(ops._entered(x))
        want = ops.activation("silu", y[:, : sizes[0]]) * y[:, sizes[0] :] if sink == "gated" else out.cuda() + y
        assert all(torch.equal(one, seen[0]) for one in seen)
        torch.testing.assert_close(seen[0].float(), want, rtol=2e-2, atol=2e-2 * want.std().item())


@needs_nvrtc
def test_a_steps_kernels_compile_together(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(ops, "_on_gpu", lambda _: True)
    monkeypatch.setattr(gpu, "multiprocessors", lambda _: 132)
    monkeypatch.setattr(disk_cache, "cache_folder", lambda: tmp_path)
    monkeypatch.setattr(driver, "driver_version", lambda: 13000)
    monkeypatch.setattr(launch, "architecture", lambda _: "sm_90a")
    found, at = structure("int8", layers=3), torch.tensor([3])
    with gpu.collecting() as kernels:
        FusedStep(found)(torch.zeros(1, 1, dtype=torch.int64), at, at, caches(found, 1, 64))
    assert len(kernels) == 3 * 5 + 2
    assert len(set(kernels)) == 7  # the layers' are the same
    launch.compile_together(kernels, 0)
    assert all(kernel._begun["sm_90a"].result().code for kernel in kernels)
    assert len(list(tmp_path.glob("*.cubin"))) == 7
    wrong = launch.CudaKernel("toy", "no C++", "toy", "P")
    with pytest.raises(KernelError, match="toy"):
        launch.compile_together([*kernels, wrong], 0)


class Compiled:
    """Stands for a kernel that is launched: compiles it, and keeps what it was made of and its machine code."""

    made: ClassVar[dict[tuple[tuple[str, int], ...], bytes]] = {}

    def __init__(self, kind: str, constants: dict[str, int] | None = None) -> None:
        self.kind, self.constants = kind, constants or {}

    def variant(self, name: None, **constants: int) -> Compiled:
        return Compiled(self.kind, constants)

    def __call__(self, grid: tuple[int], block: int, shared: int, *args: object, pdl: bool, **_: object) -> None:
        assert len(args) == len(gpu._KERNELS[self.kind][1])
        assert shared <= WHOLE
        code = KERNEL(self.kind).variant(None, **self.constants).compile("sm_90a").code
        Compiled.made[tuple(self.constants.items())] = code


KERNEL = gpu._kernel


def assert_compiled_well() -> None:
    assert len(Compiled.made) >= 6
    for constants, code in Compiled.made.items():
        attention = dict(constants).get("STAGES") is not None  # the cosine of a large angle has 28 bytes there
        assert machine_code.stack_bytes(code) <= 32 * attention, constants
        assert machine_code.copies_with_a_uniform_base(code) == 0, constants
        assert machine_code.static_shared(code) - 1024 <= 232448 - WHOLE, constants  # 1 KiB is the system's


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ops, "_on_gpu", lambda _: True)
    monkeypatch.setattr(gpu, "_kernel", Compiled)
    monkeypatch.setattr(gpu, "multiprocessors", lambda _: 132)
    monkeypatch.setattr(Compiled, "made", {})


@needs_nvrtc
@pytest.mark.parametrize(("form", "rows"), [("16bit", 2), ("int8", 1), ("nf4", 1)])
@pytest.mark.usefixtures("made")
def test_no_registers_spill_and_no_copy_is_encoded_wrongly(form: str, rows: int) -> None:
    found, at = structure(form, layers=1, nested=form == "nf4", norms=form == "nf4"), torch.tensor([3])
    FusedStep(found)(torch.zeros(rows, 1, dtype=torch.int64), at, at, caches(found, rows, 64))
    assert_compiled_well()


def shapes(what: str) -> tuple[Structure, list[tuple[torch.Tensor, torch.Tensor]]]:
    """Two layers of a benchmark's model, without memory, and their caches for one row."""
    name, form = what.split(", ")
    found = fused_structures._structure(name, form, Context("meta"))
    return without_memory(dataclasses.replace(found, layers=found.layers[:2]))


def without_memory(found: Structure) -> tuple[Structure, list[tuple[torch.Tensor, torch.Tensor]]]:
    found = moved(found, "meta")
    sizes = [(layer.heads.kv, 64, layer.heads.size) for layer in found.layers]
    return found, [(torch.empty(1, *size, dtype=found.dtype, device="meta"),) * 2 for size in sizes]


@needs_nvrtc
@pytest.mark.parametrize("what", ["Falcon-7B, nf4", "Gemma-2-9B, 16bit"])
@pytest.mark.usefixtures("made")
def test_no_registers_spill_in_other_models(what: str) -> None:
    (found, memory), at = shapes(what), torch.empty(1, dtype=torch.int64, device="meta")
    FusedStep(found)(at[:, None], at, at, memory)
    assert_compiled_well()


@needs_nvrtc
@pytest.mark.usefixtures("made")
def test_attentions_by_rows_and_the_room_of_the_cache() -> None:
    """Query heads, key heads, size, rows, room -> warps, stages, groups."""
    cases = {
        (32, 32, 128, 1, 512): (4, 2, 1), (32, 32, 128, 1, 4096): (8, 2, 1), (32, 32, 128, 4, 512): (8, 1, 1),
        (32, 32, 128, 16, 128): (4, 2, 2), (32, 8, 128, 1, 512): (8, 2, 1), (128, 16, 256, 16, 64): (4, 2, 2),
    }  # fmt: skip
    for (query, kv, size, rows, room), layout in cases.items():
        heads = ops.Heads(query, kv, size, 0.1, inv_freq=torch.empty(size // 2, device="meta"))
        keys = torch.empty(rows, kv, room, size, dtype=torch.bfloat16, device="meta")
        parts = (rows, query, gpu.splits(-1, rows, kv))
        out = ops.Attended(torch.empty(*parts, size, device="meta"), torch.empty(*parts, 2, device="meta"))
        at = torch.empty(1, dtype=torch.int64, device="meta")
        gpu.attend(torch.empty(rows, heads.width, device="meta"), heads, keys, keys, at, at, None, out)
        made = dict(list(Compiled.made)[-1])
        assert (made["WARPS"], made["STAGES"], made["GROUPS"]) == layout
    assert_compiled_well()


@needs_nvrtc
@pytest.mark.usefixtures("made")
def test_no_registers_spill_over_weights_stored_by_columns() -> None:
    """GPT-2 XL's up at 8 rows, and down of the small one at 16."""
    for rows, columns, n, sink in ((8, 1600, 6400, "act"), (16, 3072, 768, "add")):
        m = moved(matrix("transposed", (n,), columns, torch.bfloat16), "meta")
        x = torch.empty(rows, columns, dtype=torch.bfloat16, device="meta")
        norm = ops.Norm("layer", x[0], 1e-5, x[0])
        entered = x if sink == "add" else ops.Stream(x.float(), x.dtype, norm)
        ops.product(entered, m, sink, torch.empty(rows, n, device="meta"), act="gelu_tanh")
    assert all(machine_code.stack_bytes(code) == 0 for code in Compiled.made.values())
    assert len(Compiled.made) == 2


@needs_nvrtc
@pytest.mark.parametrize("form", ["16bit", "int8", "nf4", "nested"])
@pytest.mark.usefixtures("made")
def test_no_registers_spill_over_many_rows(form: str) -> None:
    """Llama-2-7B's columns, and a LayerNorm in front of another; the layouts are those that such products take."""
    kind, nested = ("nf4", True) if form == "nested" else (form, False)
    cases = [
        *((16, 4096, "rms", "gated"), (16, 4096, "added", "store"), (16, 4096, "x", "add"), (16, 11008, "x", "add")),
        *((8, 4096, "rms", "gated"), (8, 4096, "x", "add"), (8, 11008, "x", "add"), (4, 11008, "x", "add")),
    ]
    for rows, columns, what, sink in cases:
        m = moved(matrix(kind, (8, 8), columns, torch.bfloat16, nested=nested), "meta")
        each = 2048 if sink == "add" else 11008
        m = m._replace(parts=tuple(part._replace(rows=each) for part in m.parts))
        x, outs = entered(what, rows, columns, torch.bfloat16), outputs(sink, rows, (8, 8), torch.bfloat16)
        ops.product(moved(x, "meta"), m, sink, moved(outs[0], "meta"))
    assert {dict(constants)["CL"] for constants in Compiled.made} >= {1, 2, 4}
    assert len(Compiled.made) == len(cases)
    for code in Compiled.made.values():
        assert machine_code.stack_bytes(code) == 0
        assert machine_code.copies_with_a_uniform_base(code) == 0


@needs_nvrtc
@pytest.mark.usefixtures("made")
def test_no_registers_spill_over_one_row_of_four_bits() -> None:
    """Llama-2-7B's products, one behind two LayerNorms, 15 and 16 warps."""
    heads = ops.Attended(torch.empty(1, 32, 4, 128, dtype=torch.bfloat16), torch.empty(1, 32, 4, 2))
    cases = [(4096, (12288,), "rms", "store"), (4096, (11008, 11008), "rms", "gated"), (4096, (4096,), heads, "add"),
             (11008, (4096,), "x", "add"), (3584, (14336, 14336), "added", "gated"),
             (5120, (13824, 13824), "rms", "gated"), (16384, (4096,), "x", "add")]  # fmt: skip
    for columns, sizes, what, sink in cases:
        m = moved(matrix("nf4", (8,) * len(sizes), columns, torch.bfloat16), "meta")
        m = m._replace(parts=tuple(part._replace(rows=n) for part, n in zip(m.parts, sizes, strict=True)))
        x = entered(what, 1, columns, torch.bfloat16) if isinstance(what, str) else what
        ops.product(moved(x, "meta"), m, sink, moved(outputs(sink, 1, (8, 8), torch.bfloat16)[0], "meta"))
    assert len(Compiled.made) == len(cases)
    for constants, code in Compiled.made.items():
        assert "SECT" in dict(constants)
        assert machine_code.stack_bytes(code) == 0, constants
        assert machine_code.copies_with_a_uniform_base(code) == 0
        assert machine_code.static_shared(code) - 1024 <= 232448 - WHOLE  # 1 KiB is the system's


@needs_nvrtc
@pytest.mark.usefixtures("made")
def test_no_registers_spill_over_one_row_of_int8() -> None:
    """Llama-2-7B's products, one behind two LayerNorms, sections of 256 columns."""
    heads = ops.Attended(torch.empty(1, 32, 4, 128, dtype=torch.bfloat16), torch.empty(1, 32, 4, 2))
    cases = [(4096, (12288,), "rms", "store"), (4096, (11008, 11008), "rms", "gated"), (4096, (4096,), heads, "add"),
             (11008, (4096,), "x", "add"), (28672, (8192,), "x", "add"),
             (3584, (14336, 14336), "added", "gated")]  # fmt: skip
    for columns, sizes, what, sink in cases:
        m = moved(matrix("int8", (8,) * len(sizes), columns, torch.bfloat16), "meta")
        m = m._replace(parts=tuple(part._replace(rows=n) for part, n in zip(m.parts, sizes, strict=True)))
        x = entered(what, 1, columns, torch.bfloat16) if isinstance(what, str) else what
        ops.product(moved(x, "meta"), m, sink, moved(outputs(sink, 1, (8, 8), torch.bfloat16)[0], "meta"))
    assert {dict(constants)["SECT"] for constants in Compiled.made} == {8}
    assert len(Compiled.made) == len(cases)
    for constants, code in Compiled.made.items():
        assert machine_code.stack_bytes(code) == 0, constants
        assert machine_code.copies_with_a_uniform_base(code) == 0
        assert machine_code.static_shared(code) - 1024 <= 232448 - WHOLE  # 1 KiB is the system's


def test_weights_stored_by_columns_that_do_not_fit() -> None:
    m = moved(matrix("transposed", (1600,), 6400, torch.bfloat16), "meta")
    assert gpu.fits(m, 8)
    with pytest.raises(ArgumentError, match=r"rows=16.*shared memory"):
        gpu.product(torch.empty(16, 6400, dtype=torch.bfloat16), m, "add", torch.empty(16, 1600))
    assert not gpu.fits(moved(matrix("transposed", (48,), 64, torch.bfloat16), "meta"), 1)


def steps_launches(
    found: Structure, memory: list[tuple[torch.Tensor, torch.Tensor]], fake: FakeDriver, patched: pytest.MonkeyPatch
) -> None:
    """Everything between the ops and the driver, for each number of rows that the kernels have room for."""
    patched.setattr(ops, "_on_gpu", lambda _: True)
    patched.setattr(gpu, "multiprocessors", lambda _: 132)
    patched.setattr(gpu, "_kernel", cache(gpu._kernel.__wrapped__))
    patched.setattr(gpu, "dynamic_map", lambda _: torch.empty(256, device="meta"))
    patched.setattr(torch.Tensor, "get_device", lambda _: 0)
    patched.setattr(launch, "check_parameters", lambda *_: None)
    fake.sizes = []
    step, served = FusedStep(found), 0
    for rows in range(1, 17):
        with pytest.MonkeyPatch.context() as there:
            there.setattr(Structure, "device", torch.device("cuda"))
            if not step.serves(rows):
                continue
        served, before, at = rows, len(fake.launches), torch.empty(rows, 1, dtype=torch.int64, device="meta")
        step(at, at[0], at, [(k.expand(rows, -1, -1, -1), v.expand(rows, -1, -1, -1)) for k, v in memory])
        assert len(fake.launches) - before >= 4 * len(found.layers) + 2
    assert served >= 8
    for seen in fake.launches:
        assert seen.shared <= WHOLE
        assert seen.block[0] <= 1024


@pytest.mark.parametrize("name", STRUCTURES)
def test_a_driver_takes_every_launch(
    name: str, fake: FakeDriver, compiled: list[object], monkeypatch: pytest.MonkeyPatch
) -> None:
    found = read(decoder(name).to(torch.bfloat16))
    assert (found.layers[0].both is not None) == (name == "falcon-7b")
    steps_launches(*without_memory(found), fake, monkeypatch)


@pytest.mark.parametrize("form", ["16bit", "int8", "nf4"])
@pytest.mark.parametrize("name", fused_structures._SHAPES)
def test_a_driver_takes_every_launch_of_large_models(
    name: str, form: str, fake: FakeDriver, compiled: list[object], monkeypatch: pytest.MonkeyPatch
) -> None:
    steps_launches(*shapes(f"{name}, {form}"), fake, monkeypatch)
