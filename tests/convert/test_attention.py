"""Our entries in transformers' attention interfaces, in models."""

from __future__ import annotations

import copy
from types import SimpleNamespace

import pytest
import torch
import transformers
from transformers import DataCollatorWithFlattening, masking_utils

import onegpu
from onegpu.convert import attention as module
from onegpu.convert.attention import attention_function, mask_function, register
from onegpu.errors import ArgumentError
from onegpu.nn import attention_context
from onegpu.nn.attention_mask import AttentionMask
from tests.contract import harness
from tests.contract.harness import assert_near
from tests.tiny import tiny_model

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _registered():
    register()


def both(name: str, **overrides):
    eager = tiny_model(name, attn_implementation="eager", **overrides)
    return eager, tiny_model(name, attn_implementation="onegpu", **overrides)


def test_the_name_is_known_to_plain_transformers(tmp_path):
    eager, named = both("llama")
    assert named.config._attn_implementation == "onegpu"
    ids = harness.text()["input_ids"]
    assert_near(named(ids).logits, eager(ids).logits)
    eager.set_attn_implementation("onegpu")
    torch.testing.assert_close(eager(ids).logits, named(ids).logits, rtol=0, atol=0)
    named.save_pretrained(tmp_path)
    assert "onegpu" not in (tmp_path / "config.json").read_text()
    assert transformers.AutoModelForCausalLM.from_pretrained(tmp_path).config._attn_implementation == "sdpa"


def test_a_mask_that_hides_nothing_is_none_and_a_causal_one_never():
    size = {"batch_size": 2, "q_length": 4, "kv_length": 4, "device": CPU}
    both_ways = masking_utils.bidirectional_mask_function
    assert mask_function(**size, mask_function=both_ways, allow_is_bidirectional_skip=True) is None
    assert type(mask_function(**size, mask_function=both_ways)) is AttentionMask
    # BLOOM and others would take None for "nothing is hidden"
    assert type(mask_function(**size, allow_is_causal_skip=True)) is AttentionMask


PATTERNS = {
    "causal": (masking_utils.causal_mask_function, (True, -1, -1)),
    "bidirectional": (masking_utils.bidirectional_mask_function, (False, -1, -1)),
    "sliding": (masking_utils.sliding_window_causal_mask_function(3), (True, 2, -1)),
    "sliding both ways": (masking_utils.sliding_window_bidirectional_mask_function(3), (False, 3, 3)),
}


@pytest.mark.parametrize("pattern", PATTERNS)
def test_canary_the_patterns_of_the_transformers_installed_are_recognised(pattern):
    function, expected = PATTERNS[pattern]
    padding = torch.ones(2, 7, dtype=torch.bool)
    padding[1, :3] = False
    mask = mask_function(2, 7, 7, mask_function=function, attention_mask=padding, device=CPU)
    assert (mask.rule.causal, mask.rule.left, mask.rule.right) == expected
    theirs = masking_utils.sdpa_mask(
        2, 7, 7, mask_function=function, attention_mask=padding, allow_is_causal_skip=False, device=CPU
    )
    assert torch.equal(mask.dense(), theirs)


def test_canary_packed_patterns_are_recognised():
    config = copy.deepcopy(tiny_model("mistral").config)
    config._attn_implementation = "onegpu"
    positions = torch.tensor([[0, 1, 2, 0, 1, 0]])
    for make, left in (
        (masking_utils.create_causal_mask, -1),
        (masking_utils.create_sliding_window_causal_mask, config.sliding_window - 1),
    ):
        mask = make(config, torch.zeros(1, 6, 64), None, None, positions)
        assert type(mask) is AttentionMask and mask.rule.left == left
        assert mask.plan().cu_seqlens.tolist() == [0, 3, 5, 6]


def test_other_patterns_are_a_matrix():
    def every_third(batch_idx, head_idx, q_idx, kv_idx):
        return (kv_idx % 3 == 0) & (kv_idx <= q_idx)

    def odd(batch_idx, head_idx, q_idx, kv_idx):
        return kv_idx % 2 == 1

    mask = mask_function(2, 5, 5, mask_function=every_third, device=CPU)
    assert type(mask) is torch.Tensor and mask.dtype == torch.bool and mask.shape == (2, 1, 5, 5)
    union = masking_utils.or_masks(masking_utils.causal_mask_function, odd)
    assert type(mask_function(2, 5, 5, mask_function=union, device=CPU)) is torch.Tensor
    chunked = masking_utils.chunked_causal_mask_function(2, torch.zeros(2, dtype=torch.long))
    assert type(mask_function(2, 5, 5, mask_function=chunked, device=CPU)) is torch.Tensor
    eager, ours = both("llama")  # such a mask in a model
    ids = harness.text(length=5)["input_ids"]
    assert_near(ours(ids, attention_mask=mask).logits, eager(ids, attention_mask=_added(mask)).logits)
    assert_near(ours(ids, attention_mask=_added(mask)).logits, eager(ids, attention_mask=_added(mask)).logits)


def _added(mask: torch.Tensor) -> torch.Tensor:
    return torch.where(mask, 0.0, torch.finfo(torch.float32).min)


@pytest.mark.parametrize("name", ["bloom", "mpt", "codegen"])
def test_a_model_that_attends_by_itself_does_not_answer_under_our_name(name):
    """transformers checks only that the name is registered; without a word the answers would be wrong."""
    model = tiny_model(name, attn_implementation="onegpu")
    with pytest.raises(ArgumentError, match="attn_implementation='onegpu' is set for a model that applies masks"):
        model(**harness.text(padding="left"))


@pytest.mark.parametrize(("name", "word"), [("gemma2", "softcap"), ("gpt_oss", "s_aux"), ("t5", "position_bias")])
def test_settings_that_are_not_served_raise_under_our_name(name, word):
    model = tiny_model(name, attn_implementation="onegpu")
    arguments = harness.text(padding="left")
    if name == "t5":
        arguments["decoder_input_ids"] = arguments["input_ids"]
    with pytest.raises(ArgumentError, match=f"^{word}="):
        model(**arguments)


def test_ends_of_the_keys_alone_are_no_packing():
    q, ends = torch.randn(1, 2, 3, 8), torch.tensor([0, 3], dtype=torch.int32)
    with pytest.raises(ArgumentError, match=r"^cu_seq_lens_q=None is missing beside cu_seq_lens_k"):
        attention_function(SimpleNamespace(is_causal=True), q, q, q, None, cu_seq_lens_k=ends)


def test_ends_that_are_no_tensor():
    q = torch.randn(1, 2, 3, 8)
    with pytest.raises(ArgumentError, match=r"^cu_seq_lens_q=\[0, 3\] is no tensor of ends"):
        attention_function(SimpleNamespace(is_causal=True), q, q, q, None, cu_seq_lens_q=[0, 3])


def test_a_mask_of_another_batch_or_of_too_few_tokens_is_named():
    """Without a word the tokens that a short mask leaves out would count as padding."""
    model = tiny_model("llama", attn_implementation="onegpu")
    ids = harness.text(batch=3)["input_ids"]
    for mask in (torch.ones(2, 14), torch.ones(3, 13)):
        with pytest.raises(ArgumentError, match=r"^attention_mask=\[.*\] does not go with a batch of 3 and 14 tokens"):
            model(ids, attention_mask=mask.long())
    cache = model(ids[:, :9], use_cache=True).past_key_values
    with pytest.raises(ArgumentError, match=r"^attention_mask=\[3, 5\] does not go with a batch of 3 and 14 tokens"):
        model(ids[:, 9:], attention_mask=torch.ones(3, 5).long(), past_key_values=cache)
    padded = torch.ones(1, 14).long()
    padded[:, :4] = 0
    one = model(ids, attention_mask=padded).logits
    assert torch.equal(one, model(ids, attention_mask=padded.repeat(3, 1)).logits)


def test_an_unknown_tensor_raises():
    q = torch.randn(1, 2, 3, 8)
    caller = SimpleNamespace(is_causal=True)
    with pytest.raises(ArgumentError, match=r"^some_bias=\[3\] is a tensor that this attention does not know"):
        attention_function(caller, q, q, q, None, some_bias=torch.zeros(3))
    known = {"position_ids": torch.arange(3)[None], "use_cache": True, "softcap": None, "unknown": None}
    assert attention_function(caller, q, q, q, None, **known)[0].shape == (1, 3, 2, 8)


def test_weights_are_not_returned_and_it_says_so_once(caplog):
    module._say_no_weights.cache_clear()
    q, caller = torch.randn(1, 2, 3, 8), SimpleNamespace(is_causal=True)
    for _ in range(2):
        assert attention_function(caller, q, q, q, None, output_attentions=True)[1] is None
    assert [record.message for record in caplog.records] == [
        "onegpu's attention returns no weights: load with attn_implementation='eager' for them"
    ]


@pytest.mark.parametrize("name", ["mistral", "gemma3_text"])
@pytest.mark.parametrize("padding", [None, "left"])
def test_sequences_longer_than_the_window(name, padding, monkeypatch):
    """Prefill in chunks, and steps beyond the window: the cache then begins later than the sequence."""
    eager, ours = both(name, sliding_window=6)
    batch = harness.text(length=20, padding=padding)
    real = batch["attention_mask"].bool()
    with torch.no_grad():
        expected = eager(**batch).logits
        cache = transformers.DynamicCache(config=ours.config)
        parts, start = [], 0
        with harness.counted(monkeypatch) as calls:
            for size in (4, 7, 1, 5, 1, 1, 1):
                inputs = {"input_ids": batch["input_ids"][:, start : start + size]}
                places = (real.long().cumsum(-1) - 1).clamp(min=0)[:, start : start + size]
                inputs |= {"attention_mask": batch["attention_mask"][:, : start + size], "position_ids": places}
                parts.append(ours(**inputs, past_key_values=cache).logits)
                start += size
    assert calls.ours == 2 * 7 and not calls.sdpa
    assert_near(
        torch.cat(parts, 1)[real], eager(**batch, position_ids=(real.long().cumsum(-1) - 1).clamp(min=0)).logits[real]
    )
    assert padding or torch.equal(expected.argmax(-1), torch.cat(parts, 1).argmax(-1))


@pytest.mark.parametrize("cache", ["static", "dynamic"])
@pytest.mark.parametrize("name", ["mistral", "gemma3_text", "llama"])
def test_generation_beyond_the_window(name, cache):
    overrides = {} if name == "llama" else {"sliding_window": 6}
    eager, ours = both(name, **overrides)
    batch = harness.text(padding="left")
    options = {"max_new_tokens": 12, "do_sample": False, "cache_implementation": cache}
    assert torch.equal(ours.generate(**batch, **options), eager.generate(**batch, **options))
    options |= {"num_beams": 3}
    assert torch.equal(ours.generate(**batch, **options), eager.generate(**batch, **options))


def test_a_forward_waits_for_the_device_once(monkeypatch):
    """Counted where it happens: masks come to the host in `answer_all` and `restarts`, and nowhere else."""
    waits, cpu = [], torch.Tensor.cpu
    monkeypatch.setattr(torch.Tensor, "cpu", lambda self: waits.append(self.shape) or cpu(self))
    for name in ("llama", "gemma3_text"):
        model = tiny_model(name, attn_implementation="onegpu")
        for arguments in (
            harness.text(padding="left"),
            harness.text(),
            {"input_ids": torch.ones(1, 9, dtype=torch.long)},
        ):
            waits.clear()
            model(**arguments)
            assert len(waits) == 1, (name, list(arguments))
        waits.clear()
        model(
            input_ids=torch.ones(1, 5, dtype=torch.long), position_ids=torch.tensor([[0, 1, 0, 1, 2]]), use_cache=False
        )
        assert len(waits) == 1


def test_the_engines_step_in_a_model():
    """A static cache with a position on the device: no mask is read, and the answer is that of a growing cache."""
    model = tiny_model("llama", attn_implementation="onegpu")
    batch = harness.text(padding="left")
    generated = model.generate(**batch, max_new_tokens=2, do_sample=False)
    cache = transformers.StaticCache(config=model.config, max_cache_len=32)
    first = (batch["attention_mask"] == 0).sum(-1).int()
    with torch.no_grad():
        places = (batch["attention_mask"].cumsum(-1) - 1).clamp(min=0)
        logits = model(**batch, past_key_values=cache, position_ids=places).logits
        token = logits[:, -1:].argmax(-1)
        with attention_context.decode_step(first, torch.full_like(first, 15), keys=32):
            logits = model(token, past_key_values=cache, position_ids=places[:, -1:] + 1).logits
    assert torch.equal(torch.cat([token, logits.argmax(-1)], 1), generated[:, -2:])


def test_what_is_compiled_gets_tensors():
    eager, ours = both("llama")
    batch = harness.text(padding="left")
    compiled = torch.compile(ours, backend="eager", fullgraph=True)
    real = batch["attention_mask"].bool()
    with torch.no_grad():
        assert_near(compiled(**batch, use_cache=False).logits[real], eager(**batch).logits[real])


def gradients(model) -> dict[str, torch.Tensor]:
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    assert found
    return found


def batches() -> dict[str, dict[str, torch.Tensor]]:
    padded = harness.text(padding="right")
    rows = [{"input_ids": row.tolist()} for row in harness.text(batch=1, length=14)["input_ids"][0].split([5, 3, 6])]
    packed = DataCollatorWithFlattening(return_tensors="pt", return_flash_attn_kwargs=True)(rows)
    return {
        "padded": {**padded, "labels": padded["input_ids"].masked_fill(padded["attention_mask"] == 0, -100)},
        "packed": dict(packed),
        "positions": {name: packed[name] for name in ("input_ids", "labels", "position_ids")},
    }


@pytest.mark.parametrize("reentrant", [None, False, True])
@pytest.mark.parametrize("kind", ["padded", "packed", "positions"])
@pytest.mark.parametrize("name", ["llama", "gemma3_text", "falcon_new"])
def test_training_steps(name, kind, reentrant, monkeypatch):
    """Loss and gradients of eager attention on separate sequences, also where layers run again in the backward."""
    eager = tiny_model(name, attn_implementation="eager").train()
    ours = tiny_model(name).train()
    onegpu.optimize(ours)
    batch = batches()[kind]
    if reentrant is not None:
        ours.gradient_checkpointing_enable({"use_reentrant": reentrant})
        ours.enable_input_require_grads()
    if kind == "padded":
        expected = eager(**batch).loss
    else:
        labels, losses = batch["labels"][0].split([5, 3, 6]), []
        for ids, wanted in zip(batch["input_ids"][0].split([5, 3, 6]), labels, strict=True):
            losses.append(eager(input_ids=ids[None], labels=wanted[None]).loss * (len(ids) - 1))
        expected = sum(losses) / (14 - 3)
    with harness.counted(monkeypatch) as calls:
        loss = ours(**batch).loss
        torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-5)
        loss.backward()
    assert calls.ours == (2 if reentrant is None else 4) and not calls.sdpa
    expected.backward()
    wanted = gradients(eager)
    size = max(g.abs().max().item() for g in wanted.values())
    for key, gradient in gradients(ours).items():
        error = (gradient - wanted[key]).abs().max().item()
        assert error <= 1e-4 * max(wanted[key].abs().max().item(), 1e-2 * size), f"{key}: {error:.2e}"


@pytest.mark.parametrize("trained", ["adapters", "everything"])
@pytest.mark.parametrize("kind", ["padded", "packed"])
def test_it_learns_under_autocast_with_checkpointing(kind, trained, device, monkeypatch):
    from peft import LoraConfig, get_peft_model

    losses = {}
    for attention in ("eager", "onegpu"):
        model = tiny_model("llama", attn_implementation=attention).train().to(device)
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.enable_input_require_grads()
        torch.manual_seed(0)
        if trained == "adapters":
            model = get_peft_model(model, LoraConfig(r=8, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"))
        batch = batches()[kind]
        if kind == "packed" and attention == "eager":  # knows packing only without a cache
            batch = {name: batch[name] for name in ("input_ids", "labels", "position_ids")}
            assert not model.config.use_cache or model.training
        batch = {name: value.to(device) if torch.is_tensor(value) else value for name, value in batch.items()}
        rate = 1e-2 if trained == "adapters" else 1e-3  # Adam moves every weight by it, whatever its gradient is
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=rate)
        losses[attention] = []
        with harness.counted(monkeypatch) as calls:
            for _ in range(5):
                with torch.autocast(device, torch.bfloat16):
                    loss = model(**batch).loss
                loss.backward()
                optimizer.step()
                optimizer.zero_grad()
                losses[attention].append(loss.item())
        assert calls.ours == (20 if attention == "onegpu" else 0) and not calls.sdpa
    assert losses["onegpu"] == sorted(losses["onegpu"], reverse=True)
    torch.testing.assert_close(losses["onegpu"], losses["eager"], rtol=2e-2, atol=0)


@pytest.mark.gpu
def test_memory_is_linear_in_the_length_of_a_sequence():
    """Forward and backward of a padded batch, above the model; eager attention's grows with the square."""
    model = tiny_model("llama", dtype=torch.bfloat16, attn_implementation="onegpu", max_position_embeddings=8192).cuda()
    peaks = []
    for length in (2048, 8192):
        ids = torch.randint(4, 120, (2, length), device="cuda")
        mask = torch.ones_like(ids)
        mask[1, : length // 3] = 0
        for _ in range(2):
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            model(ids, attention_mask=mask, use_cache=False).logits.float().mean().backward()
            peak = torch.cuda.max_memory_allocated() - before
            model.zero_grad()
        peaks.append(peak)
    assert peaks[1] < 5 * peaks[0]


def test_dropout_in_training_is_pytorchs():
    model = tiny_model("gpt2", attn_implementation="onegpu", attn_pdrop=0.5, resid_pdrop=0.0, embd_pdrop=0.0)
    batch = harness.text(padding="left")
    real = batch["attention_mask"].bool()
    assert torch.equal(model(**batch).logits, model(**batch).logits)
    model.train()
    assert not torch.equal(model(**batch).logits[real], model(**batch).logits[real])


def test_continuous_batching_is_refused_by_transformers_and_works_with_another_attention():
    """Its paged cache is not served here: nobody may get an answer from an attention that does not read that cache."""
    model = tiny_model("llama", attn_implementation="sdpa")
    model._supports_flash_attn = False  # where the flash-attn package is installed, transformers would turn to that
    settings = transformers.GenerationConfig(max_new_tokens=3, do_sample=False, eos_token_id=-1, pad_token_id=0)
    prompt = [5, 6, 7, 8]
    expected = model.generate(torch.tensor([prompt]), generation_config=settings)[0, len(prompt) :].tolist()
    small = transformers.ContinuousBatchingConfig(num_blocks=8, max_batch_tokens=8)  # else as much as memory holds
    options = {"generation_config": settings, "continuous_batching_config": small, "progress_bar": False}
    onegpu.optimize(model)
    with pytest.raises(ValueError, match=r"onegpu.* is not supported"):
        model.generate_batch([prompt], **options)
    assert model.config._attn_implementation == "onegpu"
    model.set_attn_implementation("sdpa")
    (answer,) = model.generate_batch([prompt], **options).values()
    assert answer.generated_tokens == expected
