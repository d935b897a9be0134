"""One harness for many model types: the same tiny weights with eager attention and converted, on the same inputs.

A type is a name of :mod:`tests.tiny`; :data:`KINDS` says what it reads. What a run gives back are tensors with the mask
of the positions that are real, since what a model computes at padding is nobody's business.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch

import onegpu
from onegpu.convert.attention_rule import of_attention
from tests.tiny import PAD, tiny_model

CAUSAL = (
    "llama", "mistral", "mixtral", "qwen2", "qwen2_moe", "qwen3", "gemma", "gemma3_text", "phi", "phi3", "olmo",
    "olmo2", "smollm3", "stablelm", "starcoder2", "gpt_neox", "gpt2", "gpt_bigcode", "opt", "cohere", "glm", "granite",
    "deepseek_v3", "falcon_old", "falcon_new",
)  # fmt: skip
ENCODERS = ("bert", "roberta", "distilbert", "electra", "albert", "modernbert")
SEQ2SEQ = ("bart", "marian")
IMAGES = ("vit", "dinov2")
PAIRS = ("clip", "siglip")
SPEECH = ("whisper", "wav2vec2")
SERVED = (*CAUSAL, *ENCODERS, *SEQ2SEQ, *IMAGES, *PAIRS, *SPEECH)
PADDED = (*CAUSAL, *ENCODERS, *SEQ2SEQ, *PAIRS)  # of text, which is padded
LEFT = ("falcon_alibi", "bloom", "mpt", "gptj", "codegen", "t5", "gemma2", "gpt_oss")
# How a causal type may be told of a packed batch: positions that start again, without a cache or with one, or ends.
_SPELLINGS = ("position_ids", "position_ids with a cache", "cu_seq_lens")
PACKED = dict.fromkeys(CAUSAL, _SPELLINGS) | {
    "stablelm": ("position_ids", "position_ids with a cache"),  # hands no cu_seq_lens on to its layers
    "falcon_old": ("position_ids", "position_ids with a cache"),
    "falcon_new": ("position_ids", "position_ids with a cache"),
    "gpt_bigcode": ("position_ids", "cu_seq_lens"),  # hands its layers no positions
    "opt": ("cu_seq_lens",),  # makes positions from a mask of ones
}
# Padding reaches their answers on other ways than attention: position embeddings that count it.
ABSOLUTE = ("gpt2", "gpt_bigcode")


@dataclass
class Calls:
    """How often our op ran, and how often PyTorch's in its place."""

    ours: int = 0
    sdpa: int = 0


@contextlib.contextmanager
def counted(monkeypatch: pytest.MonkeyPatch) -> Iterator[Calls]:
    """Count the attention calls inside."""
    import transformers.integrations.sdpa_attention as theirs

    import onegpu.nn.attention as ours

    calls = Calls()

    def count(name: str, function: Any) -> Any:
        def counting(*args: Any, **kwargs: Any) -> Any:
            setattr(calls, name, getattr(calls, name) + 1)
            return function(*args, **kwargs)

        return counting

    with monkeypatch.context() as patch:
        patch.setattr(ours, "attention", count("ours", ours.attention))
        patch.setattr(theirs, "sdpa_attention_forward", count("sdpa", theirs.sdpa_attention_forward))
        yield calls


@dataclass
class Pair:
    """The same weights twice: eager, and converted."""

    name: str
    eager: Any
    ours: Any
    report: Any = None
    device: str = "cpu"
    dtype: torch.dtype = torch.float32
    inputs: dict[str, dict[str, torch.Tensor]] = field(default_factory=dict)


def pair(name: str, *, device: str = "cpu", dtype: torch.dtype = torch.float32) -> Pair:
    """Build both models of a type."""
    eager = tiny_model(name, dtype=dtype, attn_implementation="eager").to(device)
    ours = tiny_model(name, dtype=dtype).to(device)
    return Pair(name, eager, ours, of_attention(onegpu.optimize(ours)), device, dtype)


def text(batch: int = 2, length: int = 14, padding: str | None = None, device: str = "cpu") -> dict[str, torch.Tensor]:
    """Token ids and their mask; with padding "left" or "right" the second row is 5 tokens shorter than the first."""
    ids = torch.randint(4, 120, (batch, length), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    if padding is not None:
        mask[1, :5] = 0
        mask = mask if padding == "left" else mask.flip(-1)
        ids = ids.masked_fill(mask == 0, PAD)
    return {"input_ids": ids.to(device), "attention_mask": mask.to(device)}


def inputs_of(both: Pair, padding: str | None) -> tuple[dict[str, Any], torch.Tensor | None]:
    """(arguments of forward, which text positions are real)."""
    generator = torch.Generator().manual_seed(2)
    name, to = both.name, {"device": both.device, "dtype": both.dtype}
    pixels = torch.randn(2, 3, 32, 32, generator=generator).to(**to)
    if name in IMAGES:
        return {"pixel_values": pixels}, None
    if name == "whisper":
        features = torch.randn(2, 8, 64, generator=generator).to(**to)
        return {"input_features": features, "decoder_input_ids": text(device=both.device)["input_ids"]}, None
    if name == "wav2vec2":
        return {"input_values": torch.randn(2, 640, generator=generator).to(**to)}, None
    words = text(padding=padding, device=both.device)
    real = words["attention_mask"].bool()
    if name in PAIRS:
        return {**words, "pixel_values": pixels}, real
    if name in SEQ2SEQ:
        decoder = text(length=9, device=both.device)["input_ids"]
        return {**words, "decoder_input_ids": decoder}, None
    if padding is None:
        words.pop("attention_mask")
    elif name in CAUSAL:
        words["position_ids"] = (real.long().cumsum(-1) - 1).clamp(min=0)
    if name == "gpt_bigcode" and padding is not None:
        words["position_ids"] = words["position_ids"].clamp(min=0)
    if name == "opt":
        words.pop("position_ids", None)
    return words, real


def answers(model: Any, arguments: dict[str, Any], real: torch.Tensor | None) -> list[torch.Tensor]:
    """The outputs at the positions that are real."""
    out = model(**arguments)
    if hasattr(out, "vision_model_output"):
        words = out.text_model_output.last_hidden_state
        return [words if real is None else words[real], out.vision_model_output.last_hidden_state]
    logits = out.logits
    return [logits if real is None or logits.dim() == 2 else logits[real]]


def probe(outputs: list[torch.Tensor]) -> torch.Tensor:
    """A loss that every output moves in its own way."""
    generator = torch.Generator().manual_seed(3)
    weights = [torch.randn(out.shape, generator=generator).to(out.device) for out in outputs]
    return torch.stack([(out.float() * weight).mean() for out, weight in zip(outputs, weights, strict=True)]).sum()


def assert_near(actual: torch.Tensor, expected: torch.Tensor, what: str = "", limit: float = 1e-4) -> None:
    """float32 on both sides, with other orders of summation: within ``limit`` of the largest value."""
    assert actual.isfinite().all(), f"{what}: not finite"
    error, size = (actual - expected).abs().max().item(), expected.abs().max().item()
    assert error <= limit * size, f"{what}: differs by {error:.3e}, the largest value is {size:.3e}"
