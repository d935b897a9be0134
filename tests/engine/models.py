"""Tiny models of many types, and the ways in which our loop can run them."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
import transformers

from onegpu.engine.generate import Generate
from onegpu.engine.loop import Engine
from tests.tiny import CAUSAL_TYPES, CONTEXT, PAD, VOCAB_SIZE, tiny_model

# (device, Engine.capture). "emulate" runs the function that a graph would capture, so that the CPU tests it too.
WAYS = [
    pytest.param(("cpu", "never"), id="cpu-eager"),
    pytest.param(("cpu", "emulate"), id="cpu-static"),
    pytest.param(("cuda", "never"), id="cuda-eager", marks=pytest.mark.gpu),
    pytest.param(("cuda", "auto"), id="cuda-graph", marks=pytest.mark.gpu),
]
Way = tuple[str, str]

_COMMON: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 64,
    "intermediate_size": 112,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": CONTEXT,
    "initializer_range": 0.2,
    "pad_token_id": PAD,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_MORE: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen3": ("Qwen3", {"head_dim": 32}),
    "phi3": ("Phi3", {}),
    "gpt_neox": ("GPTNeoX", {"num_key_value_heads": None}),
    "olmo2": ("Olmo2", {}),
    "smollm3": ("SmolLM3", {}),
    "stablelm": ("StableLm", {}),
    "gemma2": (
        "Gemma2",
        {"head_dim": 32, "sliding_window": 16, "layer_types": ["sliding_attention", "full_attention"]},
    ),
    "mpt": ("Mpt", {"d_model": 64, "n_heads": 4, "n_layers": 2, "max_seq_len": CONTEXT, "use_cache": True}),
}
TYPES: tuple[str, ...] = (*CAUSAL_TYPES, *(name for name in _MORE if name != "mpt"))


def causal_model(model_type: str, seed: int = 0) -> Any:
    """A tiny random model of one of TYPES, in eval mode and float32, that never stops by itself."""
    if model_type in CAUSAL_TYPES:
        return tiny_model(model_type, seed=seed)
    name, changed = _MORE[model_type]
    arguments = {key: value for key, value in {**_COMMON, **changed}.items() if value is not None}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = getattr(transformers, f"{name}ForCausalLM")(getattr(transformers, f"{name}Config")(**arguments))
        with torch.no_grad():
            for parameter_name, parameter in model.named_parameters():
                if parameter.dim() == 1:
                    parameter.add_(0.1 * torch.randn_like(parameter))
                if model.config.tie_word_embeddings and ("embed" in parameter_name or "wte" in parameter_name):
                    parameter.mul_(0.1)
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = PAD
    return model.eval()


def ours(model: Any, way: Way) -> Any:
    """``model`` on the way's device, with our ``generate``."""
    device, capture = way
    model.to(device)
    model.__dict__["generate"] = Generate(model, Engine(capture))
    return model


def pair(model_type: str, way: Way, seed: int = 0) -> tuple[Any, Any]:
    """The same model twice: with transformers' ``generate``, and with ours."""
    return causal_model(model_type, seed).to(way[0]), ours(causal_model(model_type, seed), way)


def served(model: Any, way: Way) -> None:
    """The last call ran as ``way`` says, and not otherwise."""
    report = model.generate.report
    assert report.loop == ("eager" if way[1] == "never" else "captured"), report


LENGTHS = (33, 38, 40)  # real tokens of the three prompts


@cache
def prompts() -> torch.Tensor:
    """int64 [3, 40], no special tokens."""
    return torch.randint(4, VOCAB_SIZE, (3, LENGTHS[-1]), generator=torch.Generator().manual_seed(7))


@cache
def answers(model_type: str, new_tokens: int) -> tuple[torch.Tensor, ...]:
    """What transformers makes of each prompt alone, cut to its length: int64 [new_tokens] each, on the CPU."""
    model = causal_model(model_type)
    found = []
    for row, length in zip(prompts(), LENGTHS, strict=True):
        out = model.generate(row[None, :length], max_new_tokens=new_tokens)
        found.append(out[0, length:])
    assert len(set(torch.cat(found).tolist())) > 8, "a model that repeats itself proves nothing"
    return tuple(found)


def padded(side: str) -> tuple[torch.Tensor, torch.Tensor]:
    """The three prompts in one batch, and the mask."""
    ids, mask = torch.full_like(prompts(), PAD), torch.zeros_like(prompts())
    for row, length in enumerate(LENGTHS):
        where = slice(0, length) if side == "right" else slice(LENGTHS[-1] - length, None)
        ids[row, where], mask[row, where] = prompts()[row, :length], 1
    return ids, mask
