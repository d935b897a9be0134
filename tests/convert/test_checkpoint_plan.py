"""What becomes of each tensor, before anything is read."""

from __future__ import annotations

import pytest
import torch
import transformers

from onegpu.convert.checkpoint_plan import Step, make_plan, meta_model, pieces
from onegpu.errors import ArgumentError, CheckpointError
from onegpu.formats.bitsandbytes import Settings
from onegpu.formats.checkpoint import TensorInfo, read_headers, read_tensor
from tests.tiny import tiny_config

CLASSES = {
    "llama": "LlamaForCausalLM", "gpt2": "GPT2LMHeadModel", "mixtral": "MixtralForCausalLM",
    "falcon_new": "FalconForCausalLM", "t5": "T5ForConditionalGeneration",
}  # fmt: skip
FORMATS = [Settings("nf4"), Settings("nf4", double_quant=True), Settings("int8")]


def plan_of(tiny, model_type: str, settings: Settings = FORMATS[0], dtype=torch.float32, **options):
    model = meta_model(getattr(transformers, CLASSES[model_type]), tiny_config(model_type), dtype)
    return make_plan(model, read_headers([tiny(model_type) / "model.safetensors"]), settings, **options)


@pytest.mark.parametrize(
    ("model_type", "kinds"), [("llama", {"copy", "linear"}), ("mixtral", {"copy", "linear", "matrix"})]
)
def test_kinds(tiny, model_type, kinds):
    plan = plan_of(tiny, model_type)
    assert {step.kind for step in plan.steps} == kinds
    head = next(step for step in plan.steps if step.info.name == "lm_head.weight")
    assert head.kind == "copy" and [change.name for change in plan.left] == ["lm_head"]


@pytest.mark.parametrize("settings", FORMATS, ids=str)
@pytest.mark.parametrize("model_type", CLASSES)
def test_the_bound_of_the_size_holds_and_is_close(tiny, model_type, settings):
    plan = plan_of(tiny, model_type, settings)
    written = 0
    for step in plan.steps:
        for group in pieces(step, read_tensor(step.info), plan.model, plan.settings, "cpu"):
            written += sum(tensor.nbytes for tensor in group.values())
    tables = 2048 * sum(step.kind != "copy" for step in plan.steps) + 256 * len(plan.steps)
    assert written <= plan.output_bytes() <= 1.1 * written + tables


def test_a_stack_becomes_a_group_for_each_matrix():
    config = tiny_config("mixtral")
    model = meta_model(transformers.MixtralForCausalLM, config, torch.float32)
    name = "model.layers.0.mlp.experts.gate_up_proj"
    shape = tuple(model.get_parameter(name).shape)
    info = TensorInfo(name, "file", "F32", shape, 4 * torch.Size(shape).numel())
    step = Step(info, "stack", torch.float32, name, ("{}.w1.weight", "{}.w3.weight"))
    value = torch.randn(shape)
    for settings in FORMATS:
        groups = list(pieces(step, value, model, settings, "cpu"))
        assert len(groups) == 2 * shape[0]
        assert "model.layers.0.mlp.experts.0.w1.weight" in groups[0]
        assert sum(t.nbytes for group in groups for t in group.values()) <= step.output_bytes(settings)
        row = Step(TensorInfo("e.w3.weight", "file", "F32", (shape[1] // 2, shape[2]), 0), "matrix", torch.float32)
        (single,) = pieces(row, value[0, shape[1] // 2 :].clone(), model, settings, "cpu")
        assert torch.equal(single["e.w3.weight"], groups[1]["model.layers.0.mlp.experts.0.w3.weight"])


def test_what_the_model_keeps_in_float32_is_kept(tiny):
    plan = plan_of(tiny, "t5", dtype=torch.float16)
    kept = {step.dtype for step in plan.steps if ".wo." in step.info.name}
    assert kept == {torch.float32}
    assert {step.dtype for step in plan.steps if ".wo." not in step.info.name} == {torch.float16}


def test_nothing_to_quantise_and_names_that_match_nothing(tiny):
    with pytest.raises(ArgumentError, match="leaves nothing to quantise"):
        plan_of(tiny, "falcon_new", compatible=True)
    with pytest.raises(ArgumentError, match="in the skip list"):
        plan_of(tiny, "llama", Settings("nf4", skip=("layers",)))
    with pytest.raises(ArgumentError, match="matches no layer"):
        plan_of(tiny, "llama", Settings("nf4", skip=("layer",)))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"shape": (64, 63)}, r"has shape \(64, 63\), the model needs \(64, 64\)"),
        ({"dtype": "I32"}, "only float weights can be quantised"),
        ({"name": "model.layers.0.self_attn.qproj.weight"}, "q_proj.*is missing from the files"),
    ],
)
def test_tensors_that_do_not_fit(tiny, change, message):
    model = meta_model(transformers.LlamaForCausalLM, tiny_config("llama"), torch.float32)
    model.config.architectures = ["LlamaForCausalLM"]
    name = "model.layers.0.self_attn.q_proj.weight"
    headers = [
        TensorInfo(**{**vars(info), **change}) if info.name == name else info
        for info in read_headers([tiny("llama") / "model.safetensors"])
    ]
    with pytest.raises(CheckpointError, match=message):
        make_plan(model, headers, FORMATS[0])


def test_a_config_that_makes_no_model():
    config = tiny_config("llama")
    config.hidden_size = -1
    with pytest.raises(CheckpointError, match=r"config\.json cannot be used"):
        meta_model(transformers.LlamaForCausalLM, config, torch.float32)
