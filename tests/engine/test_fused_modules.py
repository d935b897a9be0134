"""What the small modules of a decoder are read as."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers
from torch import nn

from onegpu.engine.fused_modules import Declined, Modules, embedding, mentions, positions
from onegpu.nn import LinearNF4
from onegpu.nn.norm import LayerNorm, RMSNorm
from tests.decode_models import decoder

TABLE = torch.randn(20, 32)


def gained(norm: Any) -> Any:
    with torch.no_grad():
        for parameter in norm.parameters():
            parameter.normal_(0.5, 0.3, generator=torch.Generator().manual_seed(0))
    return norm


class Plus(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(32)), 1e-6

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.rms_norm(x, (32,), eps=self.eps) * (1 + self.weight)


class Bare(nn.Module):
    normalized_shape = (32,)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.layer_norm(x, (32,), eps=1e-5)


@pytest.mark.parametrize(
    ("norm", "kind", "one"),
    [
        (nn.RMSNorm(32, eps=1e-6), "rms", 0.0), (Plus(), "rms", 1.0), (nn.LayerNorm(32), "layer", 0.0),
        (nn.LayerNorm(32, bias=False), "layer", 0.0), (Bare(), "layer", 0.0),
    ],
    ids=["rms", "1 + gain", "layer", "no bias", "no gain"],
)  # fmt: skip
def test_norms(norm: Any, kind: str, one: float) -> None:
    found = Modules(TABLE).norm(gained(norm))
    assert (found.kind, found.one) == (kind, one)
    x = torch.randn(3, 32)
    torch.testing.assert_close(found(x), norm(x))
    torch.testing.assert_close(found(x * 1e-3), norm(x * 1e-3))


def test_what_ours_were_made_from_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ours would wait for Triton."""
    llama = transformers.models.llama.modeling_llama.LlamaRMSNorm(32)
    x = torch.randn(3, 32)
    for original, made, kind in (
        (llama, RMSNorm(gained(llama), "llama"), "rms"),
        (plain := nn.LayerNorm(32), LayerNorm(gained(plain)), "layer"),
    ):
        monkeypatch.setattr(type(made), "forward", lambda self, x: pytest.fail("asked"))
        found = Modules(TABLE).norm(made)
        assert found.kind == kind
        torch.testing.assert_close(found(x), original(x))


class Halved(nn.RMSNorm):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 0.5 * super().forward(x)


class Mean(nn.LayerNorm):
    eps = 1e-3

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.layer_norm(x, (32,), self.weight, self.bias, eps=1e-4)


@pytest.mark.parametrize("norm", [Halved(32, eps=1e-6), Mean(32), nn.GroupNorm(2, 32), nn.BatchNorm1d(32)])
def test_other_norms_are_declined(norm: Any) -> None:
    with pytest.raises(Declined, match="norm of another form"):
        Modules(TABLE).norm(gained(norm).eval())


class Twice(nn.Linear):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 2 * super().forward(x)


def test_linear_layers() -> None:
    falcon = decoder("falcon-7b").transformer.h[0].self_attention.dense
    assert type(falcon) is not nn.Linear
    (part,) = Modules(TABLE).matrix(falcon).parts
    assert part.weight.data_ptr() == falcon.weight.data_ptr()
    three = Modules(TABLE).matrix(nn.Linear(32, 8), nn.Linear(32, 16, bias=False), nn.Linear(32, 8))
    assert (three.rows, three.columns, [part.rows for part in three.parts]) == (32, 32, [8, 16, 8])
    conv = transformers.pytorch_utils.Conv1D(8, 32)
    found, x = Modules(TABLE).matrix(conv), torch.randn(3, 32)
    assert (found.rows, found.columns, found.transposed) == (8, 32, True)
    torch.testing.assert_close(found.multiply(x), conv(x))
    with pytest.raises(Declined, match="one product"):
        Modules(TABLE).matrix(conv, conv)
    for other, reason in (
        (Twice(32, 8), "Twice"), (nn.Bilinear(2, 3, 4), "linear"),
        (nn.Linear(32, 8).double(), "dtypes"), (LinearNF4(32, 8), "not quantised"),
    ):  # fmt: skip
        with pytest.raises(Declined, match=reason):
            Modules(TABLE).matrix(other)


def test_activations() -> None:
    modules = Modules(TABLE)
    bloom = decoder("bloom").transformer.h[0].mlp.gelu_impl
    for act, name in ((nn.ReLU(), "relu"), (nn.GELU(), "gelu"), (nn.GELU("tanh"), "gelu_tanh"), (bloom, "gelu_tanh")):
        assert modules.activation(act) == name
    with pytest.raises(Declined, match="Tanh"):
        modules.activation(nn.Tanh())


def test_embeddings() -> None:
    gemma = decoder("gemma").model.embed_tokens
    assert embedding(gemma)[1] == pytest.approx(128**0.5)
    assert embedding(nn.Embedding(4, 8))[1] == 1.0
    twice = type("Twice", (nn.Embedding,), {"forward": lambda self, ids: 2 * F.embedding(ids, self.weight)})
    for other in (twice(8, 4), nn.Embedding(8, 4, max_norm=1.0), nn.Linear(4, 8)):
        with pytest.raises(Declined, match="of another kind"):
            embedding(other)


def test_positions() -> None:
    assert positions(decoder("opt").model.decoder.embed_positions)[1] == 2
    assert positions(decoder("gpt2").transformer.wpe)[1] == 0
    moved = type("Moved", (nn.Embedding,), {"forward": lambda self, mask: F.embedding(mask.cumsum(1), self.weight)})
    with pytest.raises(Declined, match="positions"):
        positions(moved(8, 4))


def test_what_a_forward_mentions() -> None:
    gemma = decoder("gemma2")
    assert mentions(gemma, "final_logit_softcapping")
    assert not mentions(decoder("llama"), "final_logit_softcapping")
    assert mentions(gemma.model.layers[0].self_attn, "attn_logit_softcapping")
