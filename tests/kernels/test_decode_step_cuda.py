"""How the step's kernels are laid out on an SM, and that they compile."""

from __future__ import annotations

import dataclasses
from functools import cache
from pathlib import Path
from typing import ClassVar

import pytest
import torch

from benchmarks.case import Context
from benchmarks.cases import fused_structures
from onegpu.engine import fused_step
from onegpu.engine.fused_step import FusedStep
from onegpu.engine.fused_structure import Structure, read
from onegpu.errors import ArgumentError, KernelError
from onegpu.kernels import decode_step as ops
from onegpu.kernels import decode_step_cuda as gpu
from onegpu.kernels import driver, launch, nvrtc
from tests.decode_models import STRUCTURES, decoder
from tests.decode_structures import caches, matrix, moved, structure
from tests.fake_driver import FakeDriver
from tests.kernels import machine_code
from tests.kernels.emulated_step import emulate
from tests.nvrtc_tools import needs_nvrtc

SIZES = [896, 2048, 4096, 4864, 8192, 11008, 14336]


@pytest.mark.parametrize("form", gpu.FORMATS)
@pytest.mark.parametrize("columns", SIZES)
def test_one_row_takes_the_layout_of_its_format(form: str, columns: int) -> None:
    found = gpu.shape(form, 1, columns, True)
    assert found is not None
    best = gpu.OWN.get(form, gpu.LAYOUTS[form])
    assert found._replace(slots=0) == best._replace(slots=0)
    assert found.slots >= (2 if found.own else 3)
    assert found.shared(form, 1, columns, True) <= gpu.WHOLE


@pytest.mark.parametrize("form", gpu.FORMATS)
@pytest.mark.parametrize("rows", range(2, 17))
def test_more_rows_have_a_layout_too(form: str, rows: int) -> None:
    for columns in SIZES[:4]:
        found = gpu.shape(form, rows, columns, True)
        assert found is not None
        assert found.shared(form, rows, columns, True) <= gpu.WHOLE


def test_rows_that_do_not_fit() -> None:
    assert gpu.shape("16bit", 16, 4096, False) is not None
    assert gpu.shape("16bit", 16, 14336, False) is None
    m, stream = ops.Matrix("16bit", 14336, matrix_parts()), ops.Stream(torch.empty(16, 14336), torch.bfloat16)
    with pytest.raises(ArgumentError, match=r"rows=16.*shared memory"):
        gpu.product(stream, m, "store", torch.empty(16, 4))


@pytest.mark.parametrize("form", gpu.FORMATS)
@pytest.mark.parametrize("columns", SIZES)
def test_what_is_added_may_be_cut_into_columns(form: str, columns: int) -> None:
    for rows in (1, 5, 16):
        cut = gpu.windows(form, rows, columns, True)
        assert sum(size for _, size in cut) == columns
        assert [first for first, _ in cut] == [sum(size for _, size in cut[:i]) for i in range(len(cut))]
        assert all(first % 256 == 0 for first, _ in cut)
        assert len(cut) <= (1, 2, 3)[rows // 8], (form, columns, rows, cut)


def matrix_parts() -> tuple[ops.Part, ...]:
    return matrix("16bit", (4,), 64, torch.bfloat16).parts


def test_keys_are_cut_where_there_are_more_multiprocessors_than_heads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "multiprocessors", lambda _: 132)
    assert [gpu.splits(0, rows, kv) for rows, kv in ((1, 32), (1, 8), (1, 64), (8, 32), (4, 8))] == [4, 8, 2, 1, 4]


@pytest.mark.parametrize(
    "fixed",
    [gpu.Shape(3, 128, 2, 8, 2), gpu.Shape(2, 64, 3, 7, 1), gpu.Shape(3, 128, 2, 8, 2, own=True),
     gpu.Shape(2, 64, 3, 7, 2, own=True)],
)  # fmt: skip
def test_any_layout_gives_the_product(fixed: gpu.Shape, monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randn(1, 192, generator=torch.Generator().manual_seed(0)).bfloat16()
    for form in ("16bit", "int8", "nf4"):
        m = matrix(form, (40,), 192, torch.bfloat16)
        with monkeypatch.context() as patched:
            emulate(patched)
            out = torch.zeros(1, 40)
            gpu.product(x, m, "add", out, fixed=fixed)
        torch.testing.assert_close(out, m.multiply(x.float()), rtol=2e-3, atol=2e-3)


@needs_nvrtc
def test_a_steps_kernels_compile_together(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(ops, "_on_gpu", lambda _: True)
    monkeypatch.setattr(gpu, "multiprocessors", lambda _: 132)
    monkeypatch.setattr(nvrtc, "cache_folder", lambda: tmp_path)
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

    def __call__(self, grid: tuple[int], block: int, shared: int, *args: object, pdl: bool) -> None:
        assert len(args) == len(gpu._KERNELS[self.kind][1])
        code = KERNEL(self.kind).variant(None, **self.constants).compile("sm_90a").code
        Compiled.made[tuple(self.constants.items())] = code


KERNEL = gpu._kernel


def assert_compiled_well() -> None:
    assert len(Compiled.made) >= 6
    for constants, code in Compiled.made.items():
        attention = dict(constants).get("STAGES") is not None  # the cosine of a large angle has 28 bytes there
        assert machine_code.stack_bytes(code) <= 32 * attention, constants
        assert machine_code.copies_with_a_uniform_base(code) == 0, constants
        assert machine_code.static_shared(code) - 1024 <= 232448 - gpu.WHOLE, constants  # 1 KiB is the system's


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
    patched.setattr(fused_step, "MAX_ROWS", dict.fromkeys(fused_step.MAX_ROWS, 16))
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
        assert seen.shared <= gpu.WHOLE
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
