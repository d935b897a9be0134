"""The fused step in every structure it serves: definitions against models, kernels against definitions, generate()."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from transformers import BloomConfig, BloomForCausalLM, DynamicCache

import onegpu
from onegpu.engine.fused_step import FusedStep, plan
from onegpu.engine.generate import Generate
from onegpu.engine.loop import Engine
from tests.compare import assert_close
from tests.decode_models import STRUCTURES, decoder
from tests.decode_structures import moved
from tests.engine.test_fused_step import compare

FORMS = ["16bit", "int8", "nf4"]
# Every structure once, and those that differ most in every format.
ON_A_GPU = [(name, FORMS[i % 3]) for i, name in enumerate(STRUCTURES)]
FORMATS_OF = ("gemma2", "falcon-7b", "bloom", "gpt2")
ON_A_GPU += [(name, form) for name in FORMATS_OF for form in FORMS if (name, form) not in ON_A_GPU]


def served(name: str, form: str, dtype: torch.dtype = torch.float32, device: str = "cpu") -> Any:
    """A model that was optimised, in a format."""
    model = decoder(name).to(device, dtype)
    onegpu.optimize(model, quantize=None if form == "16bit" else form)
    return model


@pytest.mark.parametrize("name", STRUCTURES)
def test_logits_are_the_models(name: str) -> None:
    compare(served(name, "16bit"))


@pytest.mark.parametrize("name", ["gemma2", "falcon-7b", "falcon-40b", "opt-350m", "bloom"])
def test_generate_takes_it(name: str) -> None:
    model = served(name, "16bit")
    ids = torch.randint(4, 100, (2, 7), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    want = decoder(name).generate(ids, attention_mask=mask, max_new_tokens=30, do_sample=False)
    engine = Engine("emulate")
    model.__dict__["generate"] = Generate(model, engine)
    assert torch.equal(model.generate(ids, attention_mask=mask, max_new_tokens=30, do_sample=False), want)
    assert engine.last is not None
    assert engine.last.fused


def test_rounding_of_alibi_is_the_models() -> None:
    """In bf16 a bias of 100 is a multiple of 1/2, whichever way it was computed: BLOOM's logits follow from that."""
    config = BloomConfig(vocab_size=64, hidden_size=1024, n_layer=2, n_head=16)
    torch.manual_seed(2)
    model = BloomForCausalLM(config).eval().bfloat16()
    ids = torch.randint(0, 64, (4, 200), generator=torch.Generator().manual_seed(1))
    cache = DynamicCache(config=config)
    with torch.no_grad():
        model(ids[:, :-1], past_key_values=cache)
        want = model(ids).logits[:, -1].float()
    step = plan(model)
    assert isinstance(step, FusedStep), step
    at, error = torch.tensor([199]), []
    for rounded in (True, False):
        heads = step.structure.layers[0].heads._replace(rounded=rounded)
        layers = [dataclasses.replace(layer, heads=heads) for layer in step.structure.layers]
        found = dataclasses.replace(step.structure, layers=layers)
        memory = [(F.pad(layer.keys, (0, 0, 0, 1)), F.pad(layer.values, (0, 0, 0, 1))) for layer in cache.layers]
        error.append(float((FusedStep(found)(ids[:, -1:], at, at[None], memory) - want).norm()))
    assert step.structure.layers[0].heads.rounded
    assert 2 * error[0] < error[1]


def test_a_cache_of_another_shape_takes_the_models_forward() -> None:
    """Falcon's own attention keeps the keys of each query head, of groups as large as they are."""
    model = decoder("falcon-40b")
    ids = torch.randint(4, 100, (1, 7), generator=torch.Generator().manual_seed(1))
    want = model.generate(ids, max_new_tokens=20, do_sample=False)
    engine = Engine("emulate")
    model.__dict__["generate"] = Generate(model, engine)
    assert torch.equal(model.generate(ids, max_new_tokens=20, do_sample=False), want)
    assert engine.last is not None
    assert not engine.last.fused
    assert engine.last.loop == "captured"


def memory_of(found: Any, rows: int, length: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    g = torch.Generator().manual_seed(2)
    made = []
    for layer in found.layers:
        heads, size = layer.heads, min(length, layer.heads.window or length)
        make = lambda heads=heads, size=size: torch.randn(rows, heads.kv, size, heads.size, generator=g)  # noqa: E731
        made.append((make().to(found.dtype), make().to(found.dtype)))
    return made


# On a CPU each kernel's variants are emulated in tests/kernels, and every launch is held against a driver there.
@pytest.mark.gpu
@pytest.mark.parametrize(("name", "form"), [(name, form) for name in STRUCTURES for form in FORMS])
def test_the_kernels_are_the_definitions(name: str, form: str) -> None:
    dtype = (torch.bfloat16, torch.float16)[STRUCTURES.index(name) % 2]
    step = plan(served(name, form, dtype, "cuda"))
    assert isinstance(step, FusedStep), step
    found = moved(step.structure, "cpu")
    ids, at, first = torch.tensor([[5], [9]]), torch.tensor([70]), torch.tensor([0, 11], dtype=torch.int32)
    turn = (at - first)[:, None].contiguous()
    memory = memory_of(found, 2, 96)
    exactly = dataclasses.replace(found, embedding=found.embedding.float())
    want = FusedStep(exactly)(ids, at, turn, [(k.float(), v.float()) for k, v in memory], first)
    rounded = FusedStep(found)(ids, at, turn, [(k.clone(), v.clone()) for k, v in memory], first)
    there = [(k.cuda(), v.cuda()) for k, v in memory]
    got = step(ids.cuda(), at.cuda(), turn.cuda(), there, first.cuda())
    assert_close(got.cpu().to(dtype), want, rounded.to(dtype))


@pytest.mark.gpu
@pytest.mark.parametrize(("name", "form"), ON_A_GPU)
def test_it_generates_on_a_gpu(name: str, form: str) -> None:
    model = served(name, form, torch.bfloat16, "cuda")
    engine = Engine()
    model.__dict__["generate"] = Generate(model, engine)
    ids = torch.randint(4, 100, (2, 30), device="cuda")
    mask = torch.ones_like(ids)
    mask[1, :5] = 0
    out = model.generate(
        ids, attention_mask=mask, max_new_tokens=20, do_sample=False, output_logits=True, return_dict_in_generate=True
    )
    assert engine.last is not None
    assert engine.last.fused
    mask = torch.cat([mask, mask.new_ones(2, 20)], 1)
    places = {} if name in ("bloom",) else {"position_ids": (mask.cumsum(1) - 1).clamp(min=0)}
    with torch.no_grad():
        want = model(out.sequences, attention_mask=mask, **places).logits[:, 29:-1].float()
    got = torch.stack(out.logits, 1).float()
    assert float((got - want).norm() / want.norm()) < 2e-2
    chosen = want.gather(-1, out.sequences[:, 30:, None])[..., 0]
    assert bool((chosen >= want.amax(-1) - 5e-2 * (want.amax(-1) - want.amin(-1))).all())
