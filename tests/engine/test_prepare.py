"""What is compiled ahead of a request is what the request then launches."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import onegpu
from onegpu.engine import prepare
from onegpu.kernels import ahead, launch, warmup


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
    prepare.begin_attention(model)
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
    prepare.begin_attention(model)
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

    onegpu.optimize(model, quantize=quantize)
    assert begun(), "nothing began"
    on_hopper = torch.cuda.get_device_capability() == (9, 0)
    if on_hopper:  # elsewhere one kernel serves every length
        assert "attention_sm90_few.few_kernel" in begun()
    ids = torch.randint(3, 500, (1, 128), device="cuda")
    out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=20, do_sample=False)
    assert out.shape == (1, 148) and model.generate.report.loop == "captured"
    assert model.generate.report.compile_s > 0 and len(model.generate.engine.prepared) == 2
    # All was guessed right, what was begun before the conversion too, but that of two choices of a token, with padding
    # and without, one was taken. Nothing was begun that only a long prompt needs.
    assert begun() in ([], ["next_token_triton.take_kernel"]), begun()
    assert not any(kernel.function.__module__.endswith(".attention_sm90") for kernel in launch._TRITON.values())
    again = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=20, do_sample=False)
    assert torch.equal(again, out) and model.generate.report.compile_s == 0
