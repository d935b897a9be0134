"""Hooks in other people's packages: that they are needed, that they hold, and that they can be taken back."""

from __future__ import annotations

import inspect
import subprocess
import sys
import types
from pathlib import Path

import pytest

from onegpu.convert import hooks

ROOT = Path(__file__).parents[2]


@pytest.fixture
def fake(monkeypatch, tmp_path):
    """A package that nobody imported yet, and the one hook into it."""
    (tmp_path / "fake_package").mkdir()
    (tmp_path / "fake_package" / "__init__.py").write_text("")
    (tmp_path / "fake_package" / "inner.py").write_text("def answer():\n    return 1\n")
    monkeypatch.syspath_prepend(tmp_path)
    hook = hooks.Hook("fake_package.inner", "answer", lambda original: lambda: original() + 41, "nothing answers")
    monkeypatch.setattr(hooks, "HOOKS", (hook,))
    monkeypatch.setattr(hooks, "_originals", {})
    yield hook
    hooks.undo()
    for name in ("fake_package", "fake_package.inner"):
        sys.modules.pop(name, None)


def test_a_hook_waits_for_the_import(fake):
    hooks.install()
    hooks.install()
    assert sys.meta_path.count(hooks._finder) == 1 and "fake_package" not in sys.modules
    import fake_package.inner

    assert fake_package.inner.answer() == 42 and hooks._finder not in sys.meta_path
    # The module looks as if nobody had waited for it.
    assert type(fake_package.inner.__loader__).__name__ == type(fake_package.inner.__spec__.loader).__name__
    assert "return 1" in inspect.getsource(fake_package.inner)
    hooks.install()
    assert fake_package.inner.answer() == 42


def test_a_hook_into_what_is_imported_already_and_back(fake):
    import fake_package.inner

    original = fake_package.inner.answer
    hooks.install()
    assert fake_package.inner.answer() == 42
    hooks.undo()
    assert fake_package.inner.answer is original and hooks._finder not in sys.meta_path
    hooks.undo()
    hooks.install()
    assert fake_package.inner.answer() == 42


def test_undone_before_the_import(fake):
    hooks.install()
    hooks.undo()
    import fake_package.inner

    assert fake_package.inner.answer() == 1


def test_somebody_elses_wrapper_around_ours_stays(fake):
    import fake_package.inner

    hooks.install()
    ours = fake_package.inner.answer
    theirs = fake_package.inner.answer = lambda: ours() * 2
    hooks.undo()
    assert fake_package.inner.answer is theirs


def test_a_name_that_is_gone_is_said_once_and_breaks_nothing(fake, caplog):
    module = sys.modules["fake_package.inner"] = types.ModuleType("fake_package.inner")
    hooks.install()
    assert "fake_package.inner has no answer in the version installed here: nothing answers" in caplog.text
    assert not hasattr(module, "answer")


def test_a_missing_package_stays_missing(fake, monkeypatch):
    monkeypatch.setattr(hooks, "HOOKS", (hooks.Hook("fake_package.absent", "x", lambda original: original, ""),))
    hooks.install()
    with pytest.raises(ModuleNotFoundError, match=r"fake_package\.absent"):
        import fake_package.absent  # noqa: F401


def test_canary_peft_builds_its_lora_layers_through_the_name_that_is_wrapped(monkeypatch):
    """Fails when PEFT moves or renames its dispatcher, looks it up elsewhere, or changes what it returns."""
    torch = pytest.importorskip("torch")
    peft = pytest.importorskip("peft")
    import peft.tuners.lora.model as module
    from peft.tuners.lora.layer import Linear

    (hook,) = hooks.HOOKS
    assert hook.module == module.__name__ and callable(getattr(module, hook.name))
    built = []
    original = getattr(module, hook.name)
    monkeypatch.setattr(module, hook.name, lambda *args, **kwargs: built.append(original(*args, **kwargs)) or built[-1])
    model = torch.nn.Sequential(torch.nn.Linear(4, 4))
    peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["0"]))
    assert [type(layer) for layer in built] == [Linear]
    # What QuantizedLoraLinear takes over, and what it uses.
    for name in ("merge", "unmerge", "get_delta_weight", "get_base_layer"):
        assert callable(getattr(Linear, name))
    assert list(inspect.signature(Linear.merge).parameters) == ["self", "safe_merge", "adapter_names"]
    assert built[0].merged_adapters == [] and built[0]._caches == {} and "default" in built[0].lora_A


def test_canary_pefts_own_merge_still_fails_on_codes(tiny):
    """The day PEFT merges into our layers by itself, the hook can go."""
    peft = pytest.importorskip("peft")
    import onegpu

    model = onegpu.AutoModelForCausalLM.from_pretrained(tiny("llama"), load_in_4bit=True)
    hooks.undo()
    try:
        adapted = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["q_proj"]))
        with pytest.raises(RuntimeError, match=r"size of tensor|shape"):
            adapted.merge_adapter()
    finally:
        hooks.install()


def test_neither_peft_nor_bitsandbytes_is_imported_for_a_hook(tiny):
    pytest.importorskip("peft")
    code = """
import sys, onegpu
model = onegpu.AutoModelForCausalLM.from_pretrained(sys.argv[1], load_in_4bit=True)
assert "peft" not in sys.modules and "bitsandbytes" not in sys.modules
from peft import LoraConfig, get_peft_model
from onegpu.convert.peft import QuantizedLoraLinear
model = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"]))
assert sum(isinstance(module, QuantizedLoraLinear) for module in model.modules()) == 2
"""
    done = subprocess.run(
        [sys.executable, "-c", code, str(tiny("llama"))], cwd=ROOT, capture_output=True, text=True, timeout=200
    )
    assert done.returncode == 0, done.stderr[-3000:]
