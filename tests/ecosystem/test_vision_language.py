"""Quantised models that read images, through ``AutoModelForImageTextToText``."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import transformers

import onegpu
from onegpu.nn import Linear4bit, Linear8bitLt
from tests.tiny import CONTEXT, PAD, VOCAB_SIZE, tiny_tokenizer

IMAGE = VOCAB_SIZE  # the id of the image token: the one after the characters
TEXT = {
    "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": CONTEXT, "vocab_size": VOCAB_SIZE + 8, "pad_token_id": PAD,
    "bos_token_id": 1, "eos_token_id": 2, "initializer_range": 0.2,
}  # fmt: skip


def llava() -> tuple[transformers.PreTrainedModel, dict[str, torch.Tensor]]:
    """CLIP, two layers of projection, a Llama."""
    vision = {
        "model_type": "clip_vision_model", "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
        "num_attention_heads": 4, "image_size": 16, "patch_size": 8, "projection_dim": 32, "initializer_range": 0.2,
    }  # fmt: skip
    config = transformers.LlavaConfig(
        vision_config=vision, text_config={"model_type": "llama", **TEXT}, image_token_id=IMAGE,
        vision_feature_layer=-1, vision_feature_select_strategy="default",
    )  # fmt: skip
    ids = torch.tensor([[1, 9, IMAGE, IMAGE, IMAGE, IMAGE, 40, 41]])
    return transformers.LlavaForConditionalGeneration(config), {
        "input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": torch.randn(1, 3, 16, 16),
    }  # fmt: skip


def qwen2_vl() -> tuple[transformers.PreTrainedModel, dict[str, torch.Tensor]]:
    """Patches of any grid, merged by fours, and rotary positions of three axes."""
    vision = {
        "depth": 2, "embed_dim": 32, "hidden_size": 64, "num_heads": 4, "mlp_ratio": 2, "patch_size": 4,
        "temporal_patch_size": 2, "spatial_merge_size": 2, "in_channels": 3,
    }  # fmt: skip
    text = {**TEXT, "rope_parameters": {"rope_type": "default", "mrope_section": [2, 3, 3], "rope_theta": 1e4}}
    config = transformers.Qwen2VLConfig(
        vision_config=vision, text_config=text, image_token_id=IMAGE, video_token_id=IMAGE + 1,
        vision_start_token_id=IMAGE + 2, vision_end_token_id=IMAGE + 3, pad_token_id=PAD,
    )  # fmt: skip
    ids = torch.tensor([[9, IMAGE + 2, IMAGE, IMAGE, IMAGE, IMAGE, IMAGE + 3, 40]])
    return transformers.Qwen2VLForConditionalGeneration(config), {
        "input_ids": ids, "attention_mask": torch.ones_like(ids), "mm_token_type_ids": (ids == IMAGE).long(),
        "pixel_values": torch.randn(16, 3 * 2 * 4 * 4), "image_grid_thw": torch.tensor([[1, 4, 4]]),
    }  # fmt: skip


MAKERS = {"llava": llava, "qwen2_vl": qwen2_vl}
FORMATS = {
    "nf4_double": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True},
    "int8": {"load_in_8bit": True},
}


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """``saved("llava")``: the folder of a random model, and inputs for it."""
    made: dict[str, tuple[Path, dict[str, torch.Tensor]]] = {}

    def make(name: str) -> tuple[Path, dict[str, torch.Tensor]]:
        if name not in made:
            torch.manual_seed(0)
            model, inputs = MAKERS[name]()
            model.generation_config.eos_token_id = None
            folder = tmp_path_factory.mktemp(name)
            model.eval().save_pretrained(folder)
            made[name] = folder, inputs
        return made[name]

    return make


def logits(model, inputs) -> torch.Tensor:
    with torch.no_grad():
        return model(**inputs).logits


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("name", MAKERS)
def test_it_sees_generates_saves_and_comes_back(saved, tmp_path, name, kind):
    folder, inputs = saved(name)
    floats = onegpu.AutoModelForImageTextToText.from_pretrained(folder)
    model = onegpu.AutoModelForImageTextToText.from_pretrained(folder, **FORMATS[kind])
    assert type(model) is type(floats)
    layers = {n: m for n, m in model.named_modules() if isinstance(m, (Linear4bit, Linear8bitLt))}
    # Text and vision alike; the head stays.
    assert sum("language_model" in n for n in layers) == 14 and sum("vis" in n for n in layers) >= 8
    assert not any("lm_head" in n for n in layers)
    got = logits(model, inputs)
    wanted = logits(model.__class__.from_pretrained(folder), inputs)
    assert torch.equal(wanted, logits(floats, inputs))
    assert torch.nn.functional.cosine_similarity(got.flatten(), wanted.flatten(), dim=0) > 0.8
    # The image matters.
    other = {**inputs, "pixel_values": -inputs["pixel_values"]}
    assert not torch.allclose(logits(model, other), got, atol=1e-3)
    tokens = model.generate(**inputs, max_new_tokens=5, do_sample=False)
    assert tokens.shape == (1, inputs["input_ids"].shape[1] + 5)
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["quantization_config"]["quant_method"] == "bitsandbytes"
    again = onegpu.AutoModelForImageTextToText.from_pretrained(tmp_path)
    assert torch.equal(logits(again, inputs), got)
    assert torch.equal(again.generate(**inputs, max_new_tokens=5, do_sample=False), tokens)


@pytest.mark.parametrize("kind", FORMATS)
def test_an_adapter_on_the_language_part(saved, kind):
    peft = pytest.importorskip("peft")
    folder, inputs = saved("llava")
    model = onegpu.AutoModelForImageTextToText.from_pretrained(folder, **FORMATS[kind])
    config = peft.LoraConfig(r=4, target_modules=r".*language_model.*\.(q_proj|v_proj)")
    model = peft.get_peft_model(peft.prepare_model_for_kbit_training(model), config).train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    labels = inputs["input_ids"].masked_fill(inputs["input_ids"] == IMAGE, -100)
    losses = []
    for _ in range(5):
        loss = model(**inputs, labels=labels).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    merged = model.merge_and_unload()
    assert logits(merged.eval(), inputs).isfinite().all()


def test_pipeline_from_an_image_to_text(saved):
    image_module = pytest.importorskip("PIL.Image", reason="pillow is not installed here")
    folder, _ = saved("llava")
    tokenizer = tiny_tokenizer()
    assert tokenizer.add_tokens(["<image>"], special_tokens=True) == 1
    assert tokenizer.convert_tokens_to_ids("<image>") == IMAGE
    try:
        images = transformers.CLIPImageProcessor(
            size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16}, do_convert_rgb=True
        )
    except ImportError as error:
        pytest.skip(f"transformers' image processor needs another package: {error}")
    processor = transformers.LlavaProcessor(
        images, tokenizer, patch_size=8, vision_feature_select_strategy="default", num_additional_image_tokens=1,
    )  # fmt: skip
    model = onegpu.AutoModelForImageTextToText.from_pretrained(folder, load_in_4bit=True)
    describe = onegpu.pipeline("image-text-to-text", model=model, processor=processor)
    picture = image_module.new("RGB", (20, 30), (200, 30, 90))
    (answer,) = describe(images=picture, text="<image> What is it?", max_new_tokens=4)
    assert len(answer["generated_text"]) > len(" What is it?")
