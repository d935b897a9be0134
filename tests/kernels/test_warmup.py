"""`onegpu.warmup` runs each registered op once for each size and number of rows that a model needs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

import onegpu
from onegpu.errors import ArgumentError, KernelError
from onegpu.kernels import linear_16bit  # noqa: F401 (registers)
from onegpu.kernels import warmup as module
from tests.fake_driver import FakeDriver
from tests.tiny import tiny_model


class Layer(torch.nn.Module):
    """A module that says what to warm; its weight is on the meta device unless told otherwise."""

    def __init__(self, n: int, kind: str = "thing") -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.empty(n, dtype=torch.bfloat16))
        self.n, self.kind = n, kind

    def warmup_shapes(self) -> list[tuple[str, dict[str, Any]]]:
        return [(self.kind, {"n": self.n})]


@pytest.fixture
def calls(fake: FakeDriver, monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    seen: list[tuple[Any, ...]] = []
    monkeypatch.setattr(module, "_REGISTRY", {})
    monkeypatch.setattr(torch.cuda, "synchronize", lambda _: None)

    @module.register("thing")
    def _(device: torch.device, dtype: torch.dtype, rows: int, n: int) -> None:
        seen.append((str(device), dtype, rows, n))

    return seen


def test_each_size_runs_once_for_each_number_of_rows(
    calls: list[tuple[Any, ...]], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = torch.nn.Sequential(Layer(4), Layer(8), torch.nn.ReLU(), Layer(4))
    place = torch.device("cuda", 1)
    monkeypatch.setattr(module, "_of_model", _moved(module._of_model, place))
    seconds = onegpu.warmup(model, rows=(1, 16))
    bf16 = torch.bfloat16
    assert calls == 2 * [("cuda:1", bf16, rows, n) for n in (4, 8) for rows in (1, 16)]  # to collect, and to run
    assert list(seconds)[1] == "thing n=4 torch.bfloat16 cuda:1, 1 rows" and len(seconds) == 5
    onegpu.warmup(shapes=[("thing", {"n": 5})], device="cuda:0")
    assert calls[8:] == 2 * [("cuda:0", torch.float16, 1, 5)]
    module.begin(shapes=[("thing", {"n": 6})], device="cuda:0")
    assert calls[10:] == [("cuda:0", torch.float16, 1, 6)]


def _moved(of_model: Callable[..., Any], place: torch.device) -> Callable[..., Any]:
    return lambda *args: [(kind, sizes, place, dtype) for kind, sizes, _, dtype in of_model(*args)]


def test_a_model_on_the_cpu_has_nothing_to_warm(calls: list[tuple[Any, ...]]) -> None:
    assert onegpu.warmup(torch.nn.Sequential(Layer(4), torch.nn.Linear(3, 3))) == {} and not calls
    assert onegpu.warmup() == {}


def test_quantised_layers_tell_their_sizes() -> None:
    four = onegpu.nn.Linear4bit(64, 32, quant_type="nf4").to("cpu")
    eight = onegpu.nn.Linear8bitLt(64, 32, bias=False, has_fp16_weights=False).to("cpu")
    sizes = {"n": 32, "k": 64}
    facts = {"blocksize": 64, "quant_type": "nf4", "bias": True, "nested": True}
    assert four.warmup_shapes() == [("linear_4bit", {**sizes, **facts})]
    assert eight.warmup_shapes() == [("linear_int8", {**sizes, "bias": False})]
    plain = [("linear_4bit", {**sizes, **facts, "nested": False}), ("linear_16bit", {**sizes, "bias": True})]
    for kind, arguments in (*four.warmup_shapes(), *eight.warmup_shapes(), *plain):
        module._REGISTRY[kind](torch.device("cpu"), torch.float32, 3, **arguments)  # runs as registered


def test_a_models_generate_tells_its_own() -> None:
    model = torch.nn.Sequential(Layer(4))
    model.__dict__["generate"] = Layer(8, "attention")
    assert [(kind, sizes["n"]) for kind, sizes, _, _ in module._of_model(model, None)] == [
        ("thing", 4),
        ("attention", 8),
    ]


def test_attention_tells_its_sizes() -> None:
    model = tiny_model("mistral").eval()
    assert not _attentions(model)
    onegpu.optimize(model)
    config = model.config
    (sizes,) = _attentions(model)  # of both layers
    heads = {"heads": config.num_attention_heads, "heads_kv": config.num_key_value_heads}
    assert sizes.items() >= {**heads, "causal": True, "window": config.sliding_window, "backward": False}.items()
    assert (
        sizes["d"] * sizes["heads"] == model.model.layers[0].self_attn.q_proj.out_features
        and sizes["d_v"] == sizes["d"]
    )
    (trained,) = _attentions(model.train())
    assert trained == {**sizes, "backward": True}
    for told in (sizes, trained):
        module._REGISTRY["attention"](torch.device("cpu"), torch.bfloat16, 5, **told)


def _attentions(model: torch.nn.Module) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = []
    for kind, sizes, _, _ in module._of_model(model, None):
        found += [sizes] if kind == "attention" and "window" in sizes and sizes not in found else []  # of modules
    return found


def test_wrong_arguments_and_a_capture_are_errors(calls: list[tuple[Any, ...]], fake: FakeDriver) -> None:
    with pytest.raises(ArgumentError, match=r"^model='gpt2' is no module"):
        onegpu.warmup("gpt2")  # type: ignore[arg-type]
    for rows in ((0,), (1, "2"), (True,), 16):
        with pytest.raises(ArgumentError, match=r"rows=.*holds something else than numbers above 0"):
            onegpu.warmup(rows=rows)  # type: ignore[arg-type]
    with pytest.raises(ArgumentError, match=r"names no op with a warm-up\. Use one of thing"):
        onegpu.warmup(shapes=[("other", {})])
    fake.capturing = True
    with pytest.raises(KernelError, match="thing would compile"):
        onegpu.warmup(shapes=[("thing", {"n": 5})], device="cuda:0")


@pytest.mark.gpu
def test_after_it_a_step_can_be_captured() -> None:
    model = onegpu.nn.Linear4bit(256, 128, quant_type="nf4", compute_dtype=torch.float16).half().cuda()
    seconds = onegpu.warmup(model, rows=(1, 64))
    assert len(seconds) == 3 and all(value > 0 for value in seconds.values())  # compiling, and each number of rows
    graph, x = torch.cuda.CUDAGraph(), torch.randn(1, 256, device="cuda", dtype=torch.float16)
    with torch.no_grad(), torch.cuda.graph(graph):
        y = model(x)
    graph.replay()
    with torch.no_grad():
        assert torch.equal(y, model(x))
