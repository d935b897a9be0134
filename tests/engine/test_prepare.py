"""What is compiled ahead of a request is what the request then launches."""

from __future__ import annotations

import itertools
import threading
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import onegpu
from onegpu.convert.optimize import settings_of
from onegpu.convert.quantized import find_targets
from onegpu.engine import prepare
from onegpu.engine.fused_step import FusedStep, plan
from onegpu.formats.bitsandbytes import Settings
from onegpu.kernels import ahead, decode_step, decode_step_cuda, few_rows, launch, nvrtc, warmup
from onegpu.kernels.triton_kernel import TritonKernel
from tests.tiny import tiny_model


def _llama(**sizes: int) -> LlamaForCausalLM:
    given = {"hidden_size": 320, "num_attention_heads": 5, "intermediate_size": 640, "num_hidden_layers": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=512, **{**given, **sizes})).to(torch.bfloat16).eval()


def test_the_ops_of_a_model(monkeypatch: pytest.MonkeyPatch) -> None:
    model = _llama(num_key_value_heads=1)
    onegpu.optimize(model)
    sizes, told = {"heads": 5, "kv_heads": 1, "d": 64}, {"heads": 5, "heads_kv": 1, "d": 64, "d_v": 64}
    tokens = [("next_token", {"vocab": 512, "pads": pads}) for pads in (False, True)]
    shapes = [("attention", {**told, "batch": 1}), *tokens]
    attention = ("attention", {**told, "batch": 4}, None)
    assert prepare._shapes(model, 4) == [attention, *((*one, 4) for one in tokens)]
    assert prepare.ops(model) == model.generate.warmup_shapes() == shapes
    kinds = {kind for kind, _ in prepare._of_modules(model)}
    assert kinds == {"rms_norm", "gated_mlp"}
    # Each runs as registered, on the definitions.
    shapes.append(("decode_attention", {**sizes, "keys": 9, "window": 4}))
    for kind, given in shapes + prepare._of_modules(model):
        warmup._REGISTRY[kind](torch.device("cpu"), torch.float32, 3, **given)


def test_other_attention_is_not_compiled() -> None:
    assert [kind for kind, _, _ in prepare._shapes(_llama(), 1)] == ["next_token", "next_token"]


def test_heads_are_taken_from_configs_that_tell_them() -> None:
    model = _llama()
    assert prepare._heads(model) == {"heads": 5, "heads_kv": 5, "d": 64, "d_v": 64}
    for name, value in (("num_attention_heads", [5, 5]), ("num_key_value_heads", 2), ("head_dim", [64])):
        other = _llama()
        other.config.__dict__[name] = value
        assert prepare._heads(other) == {}


def test_nothing_happens_on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ahead, "start", lambda jobs: pytest.fail("started"))
    model = _llama()
    prepare.begin_conversion(model)
    onegpu.optimize(model)
    prepare.begin(model, 1, 5, 128)


def test_what_a_first_short_request_needs_comes_first(monkeypatch: pytest.MonkeyPatch) -> None:
    def jobs(rows: Any, shapes: Any, device: Any, dtype: Any) -> list[Any]:
        assert device == torch.device("cuda:0") and dtype == torch.bfloat16
        return [(kind, sizes.get("padded"), row) for kind, sizes in shapes for row in rows]

    started: list[Any] = []
    monkeypatch.setattr(prepare, "_device", lambda model: torch.device("cuda:0"))
    monkeypatch.setattr(prepare, "plan", lambda model: "not here")
    monkeypatch.setattr(warmup, "jobs", jobs)
    monkeypatch.setattr(ahead, "start", started.extend)
    model = _llama()
    prepare.begin_conversion(model)
    assert started == [("attention", False, 128), ("attention", False, 1)]
    monkeypatch.undo()
    onegpu.optimize(model)
    monkeypatch.setattr(prepare, "_device", lambda model: torch.device("cuda:0"))
    monkeypatch.setattr(prepare, "plan", lambda model: "not here")
    monkeypatch.setattr(warmup, "jobs", jobs)
    found: list[Any] = []
    monkeypatch.setattr(ahead, "start", found.extend)
    prepare.begin(model)
    assert found[:2] == started
    assert {kind for kind, _, _ in found[2:]} == {"next_token", "rms_norm", "gated_mlp"}
    found.clear()
    prepare.begin(model, 4, 300, 512)  # padding is likely in a batch, but not certain
    assert found[:2] == [("attention", False, 300), ("attention", False, 1)]
    assert found[-2:] == [("attention", True, 300), ("attention", True, 1)]
    assert ("decode_attention", None, 4) in found
    whole = found.copy()
    found.clear()
    prepare.begin(model, 4, 300, 512, begun=True)  # that was for a single row
    assert found == whole
    found.clear()
    prepare.begin(model, 1, 128, 512, begun=True)
    assert {kind for kind, _, _ in found} == {"rms_norm", "gated_mlp", "decode_attention"}
    rest = found.copy()
    found.clear()
    prepare.begin(model, 1, 300, 512, begun=True)  # a longer prompt may be another kernel's
    assert found[0] == ("attention", False, 300) and {kind for kind, _, _ in found[2:]} == {kind for kind, _, _ in rest}


def _products(step: FusedStep) -> list[Any]:
    """Of a step: its matrices, as far as they decide which kernels run."""

    def told(tensor: torch.Tensor | None) -> Any:
        return None if tensor is None else (tensor.shape, tensor.dtype)

    def facts(matrix: Any) -> Any:
        return matrix and (*matrix._replace(parts=()), [(p.rows, *map(told, p[1:])) for p in matrix.parts])

    found = step.structure
    layers = [(layer.qkv, layer.both, layer.out, layer.up, layer.down) for layer in found.layers]
    return [facts(m) for m in (*itertools.chain(*layers), found.head, found.project_in, found.project_out)]


# Phi-3 has two parts in one layer, GPT-2 weights stored [in, out], Falcon one product of two layers.
@pytest.mark.parametrize("kind", ["llama", "phi3", "gpt2", "falcon_old", "bloom"])
@pytest.mark.parametrize("quantize", ["nf4", "double", "skip"])
def test_the_step_is_foreseen_before_the_conversion(kind: str, quantize: str) -> None:
    model = tiny_model(kind).eval()
    plain, skipped = plan(model), ["down_proj", "c_proj"] if quantize == "skip" else None
    assert isinstance(plain, FusedStep)
    settings = settings_of("fp4" if quantize == "double" else "nf4", quantize == "double", skipped)
    assert settings is not None
    linears = [model.get_submodule(target.name) for target in find_targets(model, settings)[0]]
    foreseen = prepare.foreseen(plain, linears, settings)
    onegpu.optimize(model, settings.quant_type, double_quant=settings.double_quant, skip_modules=skipped)
    made = plan(model)
    if (kind, quantize) == ("phi3", "double"):  # it has none: threads work for nothing, and that is all
        assert isinstance(made, str)
        return
    assert isinstance(made, FusedStep) and _products(foreseen) == _products(made) != _products(plain)


def test_the_kernels_are_those_of_the_step(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decode_step, "_on_gpu", lambda tensor: True)
    monkeypatch.setattr(decode_step_cuda, "multiprocessors", lambda device: 132)

    def kernels(step: FusedStep | str) -> list[Any]:
        assert isinstance(step, FusedStep)
        cache = torch.empty(1, 2, 128, 64, dtype=torch.bfloat16)
        return step.kernels(1, (cache, cache))

    model, settings = (
        _llama(num_attention_heads=4, num_key_value_heads=2, hidden_size=256),
        settings_of("nf4", False, None),
    )
    plain = plan(model)
    assert isinstance(plain, FusedStep) and settings is not None
    linears = [model.get_submodule(target.name) for target in find_targets(model, settings)[0]]
    unquantised, foreseen = kernels(plain), kernels(prepare.foreseen(plain, linears, settings))
    assert {k.name for k in foreseen} == {"embed", "product", "attend"} and foreseen != unquantised
    onegpu.optimize(model, quantize="nf4")
    assert kernels(plan(model)) == foreseen  # the same objects, of which each compiles once


def test_int8_is_foreseen_too() -> None:  # on a CPU such a model has no fused step, to compare with
    model, settings = tiny_model("llama").eval(), settings_of("int8", False, None)
    plain = plan(model)
    assert isinstance(plain, FusedStep) and settings is not None
    linears = [model.get_submodule(target.name) for target in find_targets(model, settings)[0]]
    matrices = list(prepare.foreseen(plain, linears, settings).structure.matrices())
    assert matrices[-1].format == "16bit" and {m.format for m in matrices[:-1]} == {"int8"}
    parts = [(part, matrix.columns) for matrix in matrices[:-1] for part in matrix.parts]
    assert all(part.weight.dtype == torch.int8 and part.weight.shape == (part.rows, k) for part, k in parts)
    assert all(part.scales is not None and part.scales.shape == (part.rows,) for part, _ in parts)


def test_what_is_begun_before_a_conversion(monkeypatch: pytest.MonkeyPatch) -> None:
    def quantized(old: Any, settings: Settings) -> None:
        assert ahead.note(("quantize", tuple(old.weight.shape)))  # type: ignore[arg-type]

    started: list[Any] = []
    monkeypatch.setattr(ahead, "start", started.extend)
    monkeypatch.setattr(prepare, "_device", lambda model: torch.device("cpu"))
    monkeypatch.setattr(prepare, "quantize_linear", quantized)
    monkeypatch.setattr(warmup, "jobs", lambda rows, shapes, device, dtype: [(kind, rows) for kind, _ in shapes])
    monkeypatch.setattr(few_rows, "jobs", lambda fmt, m, *_, n, k, **more: [(fmt, m, n, k, *more.values())])
    monkeypatch.setattr(
        prepare, "_step_jobs", lambda step, batch: [("step", batch, *(m.format for m in step.structure.matrices()))]
    )
    model = _llama(num_hidden_layers=1)
    sizes = [(320, 320), (640, 320), (320, 640)]
    attention, plain = ("attention", (128, 1)), ("step", 1, *["16bit"] * 5)
    prepare.begin_conversion(model)
    assert started == [attention, plain]
    started.clear()
    prepare.begin_conversion(model, settings_of("nf4", True, None))  # what the conversion waits for comes first
    products = [("4bit", m, *size, "nf4", True) for m in (128, 1) for size in sizes]
    step = ("step", 1, *["nf4"] * 4, "16bit")
    assert started == [("quantize", (16, 320)), attention, step, *products]
    started.clear()
    prepare.begin_conversion(model, settings_of("int8", False, None))
    products = [("int8", m, *size) for m in (128, 1) for size in sizes]
    assert started[:2] == [("quantize", (16, 320)), ("quantize", (16, 640))]  # a kernel each
    assert started[2:] == [attention, ("step", 1, *["int8"] * 4, "16bit"), *products]
    started.clear()
    prepare.begin_conversion(model.float(), settings_of("nf4", False, None))
    assert started == [("quantize", (16, 320))]
    started.clear()
    monkeypatch.setattr(type(model), "is_quantized", True, raising=False)
    prepare.begin_conversion(model.bfloat16(), settings_of("nf4", False, None))  # an error, which comes
    assert started == [attention, plain]


@pytest.mark.gpu
@pytest.mark.parametrize("quantize", [None, "nf4"])
def test_what_is_begun_is_what_is_launched(quantize: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    # Sizes of no other test, and no Triton kernel of one, so that nothing is compiled or under way yet.
    monkeypatch.setattr(launch, "_TRITON", {})
    width = 64 * 7 if quantize else 64 * 9
    model = _llama(hidden_size=width, num_attention_heads=width // 64, intermediate_size=192).cuda()

    def begun() -> list[str]:
        """Modules of kernels, with their names: two kinds have a forward_kernel."""
        of = [(kernel.function.__module__, kernel.op) for kernel in launch._TRITON.values() for _ in kernel._begun]
        return [f"{module.rpartition('.')[2]}.{op}" for module, op in of]

    alone: list[str] = []  # compiled by the thread that wanted it
    cubin, cached = nvrtc.cached_cubin, TritonKernel._cached

    def note(what: str) -> None:
        if threading.current_thread() is threading.main_thread():
            alone.append(what)

    monkeypatch.setattr(nvrtc, "cached_cubin", lambda *given: (note(given[-1]), cubin(*given))[1])
    monkeypatch.setattr(TritonKernel, "_cached", lambda self, *given: (note(self.op), cached(self, *given))[1])
    onegpu.optimize(model, quantize=quantize)
    assert begun(), "nothing began"
    on_hopper = torch.cuda.get_device_capability() == (9, 0)
    if on_hopper:  # elsewhere one kernel serves every length
        assert "attention_sm90_few.few_kernel" in begun()
    ids = torch.randint(3, 500, (1, 128), device="cuda")
    out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=20, do_sample=False)
    assert out.shape == (1, 148) and model.generate.report.loop == "captured"
    assert not {"decode_step", "few_rows", "quantize_kernel"}.intersection(alone), alone
    assert model.generate.report.compile_s > 0 and len(model.generate.engine.prepared) == 2
    # All was guessed right, what was begun before the conversion too, but that of two choices of a token, with padding
    # and without, one was taken. Nothing was begun that only a long prompt needs.
    assert begun() in ([], ["next_token_triton.take_kernel"]), begun()
    assert not any(kernel.function.__module__.endswith(".attention_sm90") for kernel in launch._TRITON.values())
    again = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=20, do_sample=False)
    assert torch.equal(again, out) and model.generate.report.compile_s == 0
