"""``model.generate``: bound, called, copied and given back."""

from __future__ import annotations

import copy
import inspect
import pickle
import threading

import accelerate
import pytest
import torch
from transformers import AutoModelForCausalLM, GenerationConfig
from transformers.generation.utils import GenerateDecoderOnlyOutput

import onegpu
from onegpu.engine.generate import Generate, _brought_home, _device_of_inputs, _moved, attach, detach
from onegpu.errors import ArgumentError
from tests.engine.models import LENGTHS, WAYS, Way, causal_model, ours, padded, pair, prompts, served
from tests.tiny import tiny_model, tiny_tokenizer


def test_it_looks_like_transformers_method():
    model = tiny_model("llama")
    before = inspect.signature(model.generate), model.generate.__doc__
    assert attach(model) is None and isinstance(model.generate, Generate)
    assert (inspect.signature(model.generate), model.generate.__doc__) == before
    assert model.generate.__self__ is model and model.generate.__func__ is type(model).generate
    first = model.generate
    assert attach(model) is None and model.generate is first
    assert detach(model) and "generate" not in model.__dict__ and not detach(model)


@pytest.mark.parametrize(("model_type", "reason"), [("t5", "encoder-decoder"), ("bert", "does not generate")])
def test_models_that_keep_transformers_own(model_type: str, reason: str):
    model = tiny_model(model_type)
    assert reason in attach(model) and "generate" not in model.__dict__
    assert "does not generate" in attach(torch.nn.Linear(2, 2))


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ({"num_beams": 2}, "num_beams=2"),
        ({"prompt_lookup_num_tokens": 2}, "prompt_lookup_num_tokens"),
        ({"generation_config": GenerationConfig(num_beams=3, pad_token_id=0)}, "num_beams=3"),
        ({"use_cache": False}, "switched off"),
        ({"cache_implementation": "static"}, "StaticCache"),
        ({"return_dict_in_generate": True, "output_hidden_states": True}, "hidden"),
        ({"token_type_ids": "ids"}, "token_type_ids"),
    ],
)
def test_what_we_do_not_serve_goes_to_transformers_and_the_report_says_so(arguments, reason):
    theirs, model = pair("gpt2", ("cpu", "emulate"))
    ids = prompts()[:1]
    arguments = {"max_new_tokens": 8, **arguments}
    if "token_type_ids" in arguments:
        arguments["token_type_ids"] = torch.zeros_like(ids)
    expected, got = theirs.generate(ids, **arguments), model.generate(ids, **arguments)
    if not isinstance(expected, torch.Tensor):
        expected, got = expected.sequences, got.sequences
    assert torch.equal(got, expected)
    assert model.generate.report.loop == "transformers" and reason in str(model.generate.report)


def test_an_assistant_and_a_callers_own_loop():
    theirs, model = pair("llama", ("cpu", "emulate"))
    helper, ids = tiny_model("llama", seed=0), prompts()[:1]
    assert torch.equal(
        model.generate(ids, assistant_model=helper, max_new_tokens=8), theirs.generate(ids, max_new_tokens=8)
    )
    assert "assistant_model" in str(model.generate.report)
    called = []

    def loop(model, input_ids, **kwargs):
        called.append(model)
        return input_ids

    assert torch.equal(model.generate(ids, custom_generate=loop), ids) and called == [model]


def test_settings_come_from_where_transformers_takes_them():
    theirs, model = pair("llama", ("cpu", "emulate"))
    ids, tokenizer = prompts()[:1], tiny_tokenizer()
    made = theirs.generate(ids, max_new_tokens=20)[0, LENGTHS[-1] :].tolist()
    place = next(i for i in range(4, 18) if max(made[i : i + 2]) < 90)
    config = GenerationConfig(
        max_new_tokens=20, stop_strings=[tokenizer.decode(made[place : place + 2])], pad_token_id=0
    )
    before = config.to_dict()
    expected = theirs.generate(ids, generation_config=config, tokenizer=tokenizer)
    assert expected.shape[1] < LENGTHS[-1] + 20
    assert torch.equal(model.generate(ids, generation_config=config, tokenizer=tokenizer), expected)
    served(model, ("cpu", "emulate"))
    assert config.to_dict() == before
    with pytest.raises(ValueError, match="tokenizer"):
        model.generate(ids, generation_config=config)
    for one in (theirs, model):
        one.generation_config.stop_strings = config.stop_strings
    assert torch.equal(model.generate(ids, tokenizer=tokenizer), theirs.generate(ids, tokenizer=tokenizer))


def test_errors_of_transformers_are_still_raised():
    model = ours(causal_model("llama"), ("cpu", "emulate"))
    with pytest.raises(ValueError, match="not_an_argument"):
        model.generate(prompts(), not_an_argument=1)
    with pytest.raises(TypeError):
        model.generate(prompts(), None, None, None, None, None, None, None, None, None, None, 1)


@pytest.mark.parametrize("shape", [(2, LENGTHS[-1]), (3, 7)])
def test_a_mask_of_another_prompt_is_named(shape: tuple[int, int]):
    """Also one of ones, which transformers leaves out after it has made wrong positions of it."""
    model = ours(causal_model("llama"), ("cpu", "emulate"))
    for mask in (torch.ones(shape), torch.arange(shape[1]).gt(3).repeat(shape[0], 1)):
        with pytest.raises(ArgumentError, match=r"^attention_mask=\[.*\] does not go with a prompt of 3 x 40 tokens"):
            model.generate(prompts(), attention_mask=mask.long(), max_new_tokens=3)
    longer = torch.ones(1, LENGTHS[-1] + 5, dtype=torch.long)  # which transformers takes
    assert model.generate(prompts(), attention_mask=longer, max_new_tokens=3).shape == (3, LENGTHS[-1] + 3)


@pytest.mark.parametrize("way", WAYS)
def test_a_cache_of_other_sequences_is_named_and_does_no_harm(way: Way):
    model = ours(causal_model("llama"), way)
    ids = prompts().to(way[0])
    expected = model.generate(ids, max_new_tokens=12)
    cache = model.generate(ids[:2], max_new_tokens=2, return_dict_in_generate=True).past_key_values
    with pytest.raises(ArgumentError, match=r"^past_key_values=.*holds 2 sequences, the prompt has 3\. Pass"):
        model.generate(ids, past_key_values=cache, max_new_tokens=3)
    assert torch.equal(model.generate(ids, max_new_tokens=12), expected)


def test_a_fraction_of_a_token_is_a_token():
    theirs, model = pair("llama", ("cpu", "emulate"))
    expected = theirs.generate(prompts(), max_new_tokens=2.5)
    assert torch.equal(model.generate(prompts(), max_new_tokens=2.5), expected)
    assert model.generate.report.loop == "eager" and expected.shape[1] == LENGTHS[-1] + 3


@pytest.mark.parametrize("way", WAYS)
def test_copies_and_pickles_generate_by_themselves(way: Way):
    model = ours(causal_model("llama"), way)
    ids = prompts().to(way[0])
    expected = model.generate(ids, max_new_tokens=12)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert other.generate.__self__ is other and other.generate.engine is not model.generate.engine
        assert torch.equal(other.generate(ids, max_new_tokens=12), expected)
        with torch.no_grad():
            other.lm_head.weight.neg_()
        assert not torch.equal(other.generate(ids, max_new_tokens=12), expected)
        assert torch.equal(model.generate(ids, max_new_tokens=12), expected)


@pytest.mark.parametrize("way", WAYS)
def test_changes_of_the_model_are_followed(way: Way):
    theirs, model = pair("mistral", way)
    ids = prompts()[:2].to(way[0])
    other = {name: value.to(way[0]) for name, value in causal_model("mistral", seed=5).state_dict().items()}

    def negate(one):
        with torch.no_grad():
            one.model.layers[0].mlp.down_proj.weight.neg_()

    changes = [
        lambda one: None,
        negate,
        lambda one: one.load_state_dict(other),
        lambda one: one.load_state_dict({name: value.clone() for name, value in other.items()}, assign=True),
        lambda one: one.double(),
        lambda one: one.float(),
        lambda one: one.set_attn_implementation("eager"),
        lambda one: one.model.norm.register_forward_hook(lambda module, args, output: output * 0.5),
    ]
    seen = []
    for change in changes:
        change(theirs)
        change(model)
        expected = theirs.generate(ids, max_new_tokens=12)
        for _ in range(2):
            assert torch.equal(model.generate(ids, max_new_tokens=12), expected), len(seen)
        seen.append(model.generate.report.loop)
    assert seen[-1] == "eager"
    assert set(seen[:-1]) == {"eager" if way[1] == "never" else "captured"}


@pytest.mark.parametrize("way", WAYS)
def test_adapters_are_followed(way: Way):
    peft = pytest.importorskip("peft")
    theirs, model = pair("llama", way)
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False, task_type="CAUSAL_LM")
    ids, wrapped = prompts()[:2].to(way[0]), []
    for one in (theirs, model):
        torch.manual_seed(0)
        wrapped.append(peft.get_peft_model(one, config, adapter_name="one"))
        wrapped[-1].add_adapter("two", config)
    results = set()
    for act in (
        lambda one: one.set_adapter("one"),
        lambda one: one.set_adapter("two"),
        lambda one: one.merge_adapter(),
        lambda one: one.unmerge_adapter(),
        lambda one: one.base_model.disable_adapter_layers(),
    ):
        for one in wrapped:
            act(one)
        expected, got = (one.generate(input_ids=ids, max_new_tokens=12) for one in wrapped)
        assert torch.equal(got, expected)
        served(model, way)
        results.add(tuple(expected[0].tolist()))
    assert len(results) == 3, "the adapters change the answer"


@pytest.mark.parametrize("way", WAYS)
def test_two_models_in_two_threads_each(way: Way):
    models = [ours(causal_model("llama"), way), ours(causal_model("mistral", seed=1), way)]
    ids = prompts()[:2].to(way[0])
    expected = [type(model).generate(model, ids, max_new_tokens=16) for model in models]
    wrong = []

    def work(index):
        for _ in range(3):
            out = models[index].generate(ids, max_new_tokens=16)
            if not torch.equal(out, expected[index]):
                wrong.append(index)

    threads = [threading.Thread(target=work, args=(index,)) for index in (0, 1, 0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    for model in models:
        served(model, way)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_an_offloaded_model_runs_eagerly_and_gives_the_same_tokens(device: str, tmp_path):
    way = device, "emulate" if device == "cpu" else "auto"
    model = ours(causal_model("llama"), way)
    ids, mask = (tensor.to(device) for tensor in padded("right"))
    expected = model.generate(ids, attention_mask=mask, max_new_tokens=12)
    served(model, way)
    accelerate.dispatch_model(
        model, {"model": 0 if device == "cuda" else "cpu", "lm_head": "disk"}, offload_dir=tmp_path
    )
    assert torch.equal(model.generate(ids, attention_mask=mask, max_new_tokens=12), expected)
    assert model.generate.report.loop == "eager" and "offloading does that" in model.generate.report.reason


@pytest.mark.parametrize("way", WAYS)
def test_inside_and_outside_of_inference_mode(way: Way):
    model = ours(causal_model("gemma3_text"), way)
    ids = prompts().to(way[0])
    with torch.inference_mode():
        expected = model.generate(ids, max_new_tokens=12)
    assert torch.equal(model.generate(ids, max_new_tokens=12), expected)
    served(model, way)


@pytest.mark.parametrize("way", WAYS)
def test_an_error_in_a_streamer_leaves_the_model_usable(way: Way):
    model = ours(causal_model("llama"), way)
    ids = prompts()[:1].to(way[0])
    expected = model.generate(ids, max_new_tokens=12)

    class Breaks:
        puts = 0

        def put(self, value):
            self.puts += 1
            if self.puts == 5:
                raise KeyboardInterrupt

        def end(self):
            """Not reached."""

    with pytest.raises(KeyboardInterrupt):
        model.generate(ids, max_new_tokens=12, streamer=Breaks())
    assert torch.equal(model.generate(ids, max_new_tokens=12), expected)
    served(model, way)


def test_models_from_our_auto_classes_have_it(tiny):
    path = tiny("llama")
    model, plain = onegpu.AutoModelForCausalLM.from_pretrained(path), AutoModelForCausalLM.from_pretrained(path)
    assert isinstance(model.generate, Generate) and "generate" not in plain.__dict__
    assert torch.equal(model.generate(prompts(), max_new_tokens=8), plain.generate(prompts(), max_new_tokens=8))
    assert model.generate.report.loop == "eager" and "no graphs on cpu" in str(model.generate.report)


@pytest.mark.gpu
@pytest.mark.parametrize("capture", ["auto", "never"])
def test_inputs_on_the_cpu_are_moved_without_a_word_and_the_answer_comes_back(capture: str, recwarn, caplog):
    plain, model = pair("llama", ("cuda", capture))
    ids, mask = padded("left")
    want = plain.generate(ids.cuda(), attention_mask=mask.cuda(), max_new_tokens=20)
    recwarn.clear()
    assert torch.equal(model.generate(ids, attention_mask=mask, max_new_tokens=20), want.cpu())
    served(model, ("cuda", capture))
    full = model.generate(
        inputs=ids, attention_mask=mask, max_new_tokens=20, return_dict_in_generate=True, output_scores=True
    )
    assert torch.equal(full.sequences, want.cpu()) and all(score.device.type == "cpu" for score in full.scores)
    assert full.past_key_values.layers[0].keys.is_cuda
    beams = model.generate(ids, attention_mask=mask, max_new_tokens=4, num_beams=2)
    assert beams.device.type == "cpu" and model.generate.report.loop == "transformers"
    assert not [w for w in recwarn if "device" in str(w.message)] and "device" not in caplog.text


def test_what_is_moved_to_the_model_and_back():
    ids = torch.ones(2, 3, dtype=torch.long)
    there = _moved({"input_ids": ids, "max_new_tokens": 4, "attention_mask": None}, torch.device("meta"))
    assert there["input_ids"].is_meta and there["max_new_tokens"] == 4 and there["attention_mask"] is None
    assert _device_of_inputs(there).type == "meta" and _device_of_inputs({"max_length": 3}) is None
    output = GenerateDecoderOnlyOutput(sequences=ids, scores=(ids, ids), past_key_values="cache")
    back = _brought_home(output, torch.device("meta"))
    assert back.sequences.is_meta and back["scores"][1].is_meta and back.logits is None
    assert back.past_key_values == "cache"
    assert _brought_home(ids, torch.device("meta")).is_meta
