"""The fused step: logits of the model's own forward, in every structure it recognises; tokens through generate()."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
import transformers

import onegpu
from onegpu.engine.fused_step import Fused, FusedStep, left_padded, plan
from onegpu.engine.fused_structure import Structure
from onegpu.engine.generate import Generate
from onegpu.engine.loop import Engine
from onegpu.errors import KernelError
from onegpu.kernels import decode_step_cuda
from onegpu.kernels import decode_step_layouts as layouts
from onegpu.nn import LinearNF4
from tests.compare import assert_close
from tests.decode_structures import caches, moved, structure
from tests.engine.models import causal_model
from tests.kernels.emulated_step import DEVICES, on

TYPES = ["llama", "mistral", "qwen2", "qwen3", "phi3", "smollm3"]


def step_of(model: Any) -> FusedStep:
    step = plan(model)
    assert isinstance(step, FusedStep), step
    return step


def memory_of(cache: Any, length: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """The cache's layers in memory of `length` positions, rings for sliding ones."""
    made = []
    for layer in cache.layers:
        held, seen = layer.keys.shape[2], cache.get_seq_length()
        size = min(length, getattr(layer, "sliding_window", None) or length)
        slots = torch.arange(seen - held, seen) % size
        pair = [t.new_full((*t.shape[:2], size, t.shape[3]), float("nan")) for t in (layer.keys, layer.values)]
        for t, source in zip(pair, (layer.keys, layer.values), strict=True):
            t[:, :, slots] = source
        made.append((pair[0], pair[1]))
    return made


def compare(model: Any, rows: int = 2, prompt: int = 40) -> None:
    """Three steps against the model's own; the second row is padded on the left."""
    ids = torch.randint(4, 100, (rows, prompt + 3), generator=torch.Generator().manual_seed(3))
    mask = torch.ones_like(ids)
    mask[1:, :5] = 0
    places = (mask.cumsum(1) - 1).clamp(min=0)
    cache = transformers.DynamicCache(config=model.config)
    step = step_of(model)
    with torch.no_grad():
        model(ids[:, :prompt], attention_mask=mask[:, :prompt], position_ids=places[:, :prompt], past_key_values=cache)
        memory = memory_of(cache, 64)
        first = (mask == 0).sum(1, dtype=torch.int32)
        for at in range(prompt, prompt + 3):
            new = slice(at, at + 1)
            arguments = {"attention_mask": mask[:, : at + 1], "position_ids": places[:, new]}
            want = model(ids[:, new], past_key_values=cache, **arguments).logits[:, -1]
            got = step(ids[:, new], torch.tensor([at]), places[:, new], memory, first)
            torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("model_type", TYPES)
def test_logits_are_the_models(model_type: str) -> None:
    compare(causal_model(model_type))


def in_4_bits() -> Any:
    model = causal_model("llama")
    for layer in model.model.layers:
        for name, linear in [*layer.self_attn.named_children(), *layer.mlp.named_children()]:
            if isinstance(linear, torch.nn.Linear):
                parent = layer.self_attn if name in dict(layer.self_attn.named_children()) else layer.mlp
                made = LinearNF4(
                    linear.in_features, linear.out_features, bias=False, compress_statistics=name == "o_proj"
                )
                made.weight.data = linear.weight.data
                setattr(parent, name, made.to("cpu"))
    return model


def test_logits_of_4_bit_layers_are_the_models() -> None:
    model = in_4_bits()
    assert step_of(model).structure.layers[0].qkv.format == "nf4"
    compare(model)


@pytest.mark.parametrize("quantize", [None, "nf4"])
def test_an_optimised_model_generates_with_it(quantize: str | None) -> None:
    model = causal_model("llama")
    onegpu.optimize(model, quantize=quantize)
    assert step_of(model).structure.layers[0].qkv.format == (quantize or "16bit")
    engine = Engine("emulate")
    model.__dict__["generate"] = Generate(model, engine)
    model.generate(torch.randint(4, 100, (1, 9)), max_new_tokens=20, do_sample=False)
    assert engine.last is not None
    assert engine.last.fused


@pytest.mark.gpu
@pytest.mark.parametrize("quantize", [None, "nf4", "int8"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_it_generates_on_a_gpu(quantize: str | None, dtype: torch.dtype) -> None:
    config = transformers.LlamaConfig(
        vocab_size=500, hidden_size=256, intermediate_size=512, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=256, eos_token_id=None,
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(config).to("cuda", dtype).eval()
    model.generation_config.eos_token_id = None
    onegpu.optimize(model, quantize=quantize)
    engine = Engine()
    model.__dict__["generate"] = Generate(model, engine)
    ids = torch.randint(4, 400, (2, 30), device="cuda")
    out = model.generate(ids, max_new_tokens=30, do_sample=False, output_logits=True, return_dict_in_generate=True)
    assert engine.last is not None
    assert engine.last.fused
    with torch.no_grad():
        want = model(out.sequences).logits[:, 29:-1].float()
    got = torch.stack(out.logits, 1).float()
    assert float((got - want).norm() / want.norm()) < 2e-2


def tensors(value: Any) -> list[torch.Tensor]:
    """Of a structure, or whatever it is made of."""
    if isinstance(value, torch.Tensor):
        return [value]
    if hasattr(value, "__dataclass_fields__"):
        value = tuple(vars(value).values())
    return [t for item in value for t in tensors(item)] if isinstance(value, tuple) else []


@pytest.mark.parametrize("make", [*TYPES, in_4_bits])
def test_what_a_graph_reads_outlives_the_step(make: Any) -> None:
    """Captured kernels know addresses only; the rotary frequencies of a model cast as a whole are a copy of its own."""
    model = (causal_model(make) if isinstance(make, str) else make()).to(torch.bfloat16)
    assert model.model.rotary_emb.inv_freq.dtype == torch.bfloat16
    fused = Fused.make(model, 1, torch.ones(1, 4))
    assert fused is not None
    assert fused.step is not None
    read = {t.untyped_storage().data_ptr() for t in tensors(fused.step.structure)}
    fused.release()
    held = [*model.parameters(), *model.buffers(), *fused.made]
    assert read <= {t.untyped_storage().data_ptr() for t in held}


def test_llama_with_biases_and_scaled_rotary_embedding() -> None:
    config = transformers.LlamaConfig(
        vocab_size=100, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=1, max_position_embeddings=256, attention_bias=True, mlp_bias=True, hidden_act="gelu",
        rope_parameters={
            "rope_type": "yarn", "factor": 4.0, "rope_theta": 100.0, "original_max_position_embeddings": 64,
        },
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    compare(model)


def test_as_many_sequences_as_pay_are_served(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Structure, "device", property(lambda _: torch.device("cuda")))
    for form in ("16bit", "int8", "nf4", "fp4"):
        step = FusedStep(structure(form))
        assert [step.serves(n) for n in (1, 5, 16, 17)] == [True, True, True, False]


@pytest.mark.parametrize("model_type", TYPES)
def test_generate_takes_it(model_type: str) -> None:
    model = causal_model(model_type)
    ids = torch.randint(4, 100, (2, 7), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    want = model.generate(ids, attention_mask=mask, max_new_tokens=40, do_sample=False)
    engine = Engine("emulate")
    model.__dict__["generate"] = Generate(model, engine)
    assert torch.equal(model.generate(ids, attention_mask=mask, max_new_tokens=40, do_sample=False), want)
    assert engine.last is not None
    assert engine.last.fused
    assert "five kernels a layer" in str(engine.last)


def test_a_mask_with_holes_takes_the_models_forward_even_after_a_fused_request() -> None:
    model = causal_model("llama")
    ids = torch.randint(4, 100, (1, 9), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    holes = mask.clone()
    holes[0, 4] = 0
    wants = [model.generate(ids, attention_mask=m, max_new_tokens=20, do_sample=False) for m in (mask, holes, mask)]
    engine = Engine("emulate")
    model.__dict__["generate"] = Generate(model, engine)
    for m, want, fused in zip((mask, holes, mask), wants, (True, False, True), strict=True):
        assert torch.equal(model.generate(ids, attention_mask=m, max_new_tokens=20, do_sample=False), want)
        assert engine.last is not None
        assert engine.last.loop == "captured"
        assert engine.last.fused == fused


def _waits(*_: Any) -> Any:
    return torch.ones(1).item()


def _fails(*_: Any) -> Any:
    raise KernelError("no compiler")


WRONG = {"wrong": lambda *_: torch.arange(128.0)[None], "nan": lambda *_: torch.full((1, 128), float("nan"))}
WRONG |= {"waits": _waits, "fails": _fails}


@pytest.mark.parametrize("what", WRONG)
def test_a_wrong_step_is_found_out_and_not_taken_again(what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = causal_model("llama")
    ids = torch.randint(4, 100, (1, 9), generator=torch.Generator().manual_seed(1))
    want = model.generate(ids, max_new_tokens=20, do_sample=False)
    monkeypatch.setattr(Fused, "__call__", WRONG[what])
    engine = Engine("emulate")
    model.__dict__["generate"] = Generate(model, engine)
    assert torch.equal(model.generate(ids, max_new_tokens=20, do_sample=False), want)
    assert engine.last is not None
    assert engine.last.loop == "captured"
    assert not engine.last.fused
    assert not engine.fuse


def test_left_padded() -> None:
    assert left_padded(torch.tensor([[0, 0, 1], [1, 1, 1], [0, 0, 0]]))
    assert not left_padded(torch.tensor([[1, 1, 0]]))
    assert not left_padded(torch.tensor([[0, 1, 0, 1]]))
    assert left_padded(torch.ones(2, 0))


# what, dtype, rows, length of the cache, position, first
KERNELS = [
    ({}, torch.bfloat16, 1, 64, 40, None),
    ({"form": "nf4", "nested": True, "norms": True, "rotated": 16}, torch.float16, 2, 64, 40, [0, 11]),
    ({"form": "int8", "window": 32, "act": "gelu_tanh"}, torch.bfloat16, 4, 32, 70, [0, 50, 60, 69]),
]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("case", KERNELS, ids=["16bit", "nf4", "int8"])
def test_the_chain_of_kernels_is_the_chain_of_definitions(
    device: str, case: tuple, monkeypatch: pytest.MonkeyPatch
) -> None:
    what, dtype, rows, length, position, first = case
    found = structure(dtype=dtype, **what)
    ids, at = torch.arange(rows)[:, None], torch.tensor([position])
    begin = None if first is None else torch.tensor(first, dtype=torch.int32)
    turn = (at - (0 if begin is None else begin))[:, None].expand(rows, 1).contiguous()
    memory = caches(found, rows, length)
    exact = [(k.float(), v.float()) for k, v in memory]
    exactly = moved(found, "cpu")
    want = FusedStep(_in_float32(exactly))(ids, at, turn, exact, begin)
    rounded = FusedStep(found)(ids, at, turn, [(k.clone(), v.clone()) for k, v in memory], begin)
    place = on(device, monkeypatch)
    step, there = FusedStep(moved(found, place)), moved(tuple(memory), place)
    got = step(ids.to(place), at.to(place), turn.to(place), list(there), moved(begin, place))
    assert_close(got.cpu().to(dtype), want, rounded.to(dtype))


@pytest.mark.gpu
@pytest.mark.parametrize("form", ["16bit", "int8", "nf4"])
def test_16_rows_whose_columns_clusters_share(form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = {"form": form, "width": 4096, "inner": 5504, "query": 32, "kv": 32, "size": 128, "layers": 1}
    found = layouts.shape(form, 16, 5504, False, 4096)
    assert found is not None
    assert found.cluster > 1
    case = (sizes, torch.bfloat16, 16, 64, 40, [*range(15), 2**30])
    test_the_chain_of_kernels_is_the_chain_of_definitions("cuda", case, monkeypatch)


def _in_float32(found: Any) -> Any:
    """The same weights; activations and outputs between kernels are not rounded."""
    return dataclasses.replace(found, embedding=found.embedding.float())


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("form", "rows"), [("16bit", 1), ("int8", 1), ("nf4", 1), ("16bit", 16), ("int8", 8), ("nf4", 4), ("nf4", 16)]
)
def test_a_chain_replayed_a_thousand_times_reads_only_what_it_wrote(
    form: str, rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    if rows > 1:
        monkeypatch.setattr(decode_step_cuda, "shape", lambda *_: layouts.Shape(8, 256, 4, cluster=2))
    found = moved(structure(form, width=512, inner=1536, query=8, kv=8, size=64, layers=4), "cuda")
    step, memory = FusedStep(found), list(moved(tuple(caches(found, rows, 256)), "cuda"))
    ids, at = torch.arange(rows, device="cuda")[:, None], torch.tensor([200], device="cuda")
    want = step(ids, at, at, memory)
    step.pdl = False
    assert torch.equal(step(ids, at, at, memory), want)
    step.pdl = True
    empty = torch.empty

    def poisoned(*args: Any, **kwargs: Any) -> torch.Tensor:
        made = empty(*args, **kwargs)
        return made.fill_(float("nan")) if made.is_floating_point() else made

    graph = torch.cuda.CUDAGraph()
    torch.cuda.synchronize()
    with monkeypatch.context() as patched, torch.cuda.graph(graph):
        patched.setattr(torch, "empty", poisoned)
        got = step(ids, at, at, memory)
    wrong = torch.zeros((), dtype=torch.int64, device="cuda")
    noise = torch.randn(4096, 4096, device="cuda")
    other = torch.cuda.Stream()
    for replay in range(1000):
        if replay % 10 == 0:
            with torch.cuda.stream(other):
                noise @ noise  # takes multiprocessors away in the middle of the chain
        graph.replay()
        wrong += (got != want).any()
    assert int(wrong) == 0


@pytest.mark.gpu
@pytest.mark.parametrize("rows", [1, 16])
def test_a_step_reads_what_kernels_in_front_of_it_wrote(rows: int) -> None:
    """The attention reads positions and the cache before it waits."""
    found = moved(structure("int8", width=512, inner=1408, query=8, kv=8, size=64, layers=3), "cuda")
    step, kept = FusedStep(found), list(moved(tuple(caches(found, rows, 512)), "cuda"))
    ids, place = torch.arange(rows, device="cuda")[:, None], torch.tensor([400], device="cuda")
    memory, at = [(k.clone(), v.clone()) for k, v in kept], place.clone()
    want = step(ids, at, at, memory)
    graph = torch.cuda.CUDAGraph()
    torch.cuda.synchronize()
    with torch.cuda.graph(graph):
        at.fill_(7)
        for pair in memory:
            for tensor in pair:
                tensor.fill_(float("nan"))
        torch.cuda._sleep(200_000)
        for pair, old in zip(reversed(memory), reversed(kept), strict=True):
            for tensor, value in zip(pair, old, strict=True):
                tensor.copy_(value)
        at.copy_(place)
        got = step(ids, at, at, memory)
    wrong = torch.zeros((), dtype=torch.int64, device="cuda")
    for _ in range(200):
        graph.replay()
        wrong += (got != want).any()
    assert int(wrong) == 0
