"""Our loop beside transformers', token for token."""

from __future__ import annotations

import pytest
import torch
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM, LogitsProcessor, StoppingCriteria

from benchmarks.hand_captured import HandCaptured
from onegpu.engine.stops import Ring
from tests.engine.models import LENGTHS, WAYS, Way, causal_model, ours, padded, pair, prompts, served
from tests.tiny import PAD, tiny_model, tiny_tokenizer


@pytest.mark.parametrize("way", WAYS)
def test_a_window_that_is_left_behind(way: Way):
    theirs, model = pair("mistral", way)  # its window has 32 tokens
    ids = prompts().to(way[0])
    for length in (3, 30, 40):
        expected = theirs.generate(ids[:, :length], max_new_tokens=90)
        assert torch.equal(model.generate(ids[:, :length], max_new_tokens=90), expected)
        served(model, way)


@pytest.mark.parametrize("way", WAYS)
def test_end_of_sequence_at_every_place(way: Way):
    theirs, model = pair("llama", way)
    ids = prompts()[:2].to(way[0])
    made = theirs.generate(ids, max_new_tokens=12)[:, LENGTHS[-1] :]
    for place in range(12):
        for rows in (1, 2):
            eos = [int(made[0, place]), int(made[-1, (place * 5) % 12])]
            expected = theirs.generate(ids[:rows], max_new_tokens=12, eos_token_id=eos)
            assert torch.equal(model.generate(ids[:rows], max_new_tokens=12, eos_token_id=eos), expected), (place, rows)


class StopsRows(StoppingCriteria):
    """Ends row 0 at 45 tokens and row 1 at 50; keeps what it was shown."""

    def __init__(self):
        self.shown = []

    def __call__(self, input_ids, scores, **kwargs):
        self.shown.append((input_ids.cpu(), None if scores is None else len(scores)))
        length = input_ids.shape[1]
        return torch.tensor([length >= 45, length >= 50], device=input_ids.device)[: input_ids.shape[0]]


@pytest.mark.parametrize("scores", [False, True])
@pytest.mark.parametrize("eos", [None, 3])
@pytest.mark.parametrize("way", WAYS)
def test_a_criterion_of_the_users(way: Way, eos: int | None, scores: bool):
    theirs, model = pair("llama", way)
    ids, results = prompts()[:2].to(way[0]), []
    criteria = StopsRows(), StopsRows()
    for one, criterion in zip((theirs, model), criteria, strict=True):
        results.append(
            one.generate(
                ids,
                max_new_tokens=20,
                eos_token_id=eos,
                stopping_criteria=[criterion],
                return_dict_in_generate=True,
                output_scores=scores,
                output_logits=scores,
            )
        )
    served(model, way)
    expected, got = results
    assert torch.equal(got.sequences, expected.sequences) and got.sequences.shape[1] == 50
    assert len(criteria[0].shown) == len(criteria[1].shown)
    for (seen, count), (also_seen, also_count) in zip(criteria[0].shown, criteria[1].shown, strict=True):
        assert torch.equal(seen, also_seen) and count == also_count
    for name in ("scores", "logits"):
        mine, its = getattr(got, name), getattr(expected, name)
        assert (mine is None) == (its is None) == (not scores)
        for a, b in zip(mine or (), its or (), strict=True):
            assert a.dtype == b.dtype
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-3)
    assert got.past_key_values.get_seq_length() == expected.past_key_values.get_seq_length() == 49


@pytest.mark.parametrize("way", WAYS)
def test_stop_strings(way: Way):
    theirs, model = pair("llama", way)
    ids, tokenizer = prompts()[:2].to(way[0]), tiny_tokenizer()
    made = theirs.generate(ids, max_new_tokens=20)[0, LENGTHS[-1] :].tolist()
    place = next(i for i in range(4, 18) if max(made[i : i + 2]) < 90)  # ASCII: a stop string is made of whole tokens
    arguments = {
        "max_new_tokens": 20,
        "stop_strings": [tokenizer.decode(made[place : place + 2])],
        "tokenizer": tokenizer,
    }
    expected = theirs.generate(ids[:1], **arguments)
    assert expected.shape[1] < LENGTHS[-1] + 20 and torch.equal(model.generate(ids[:1], **arguments), expected)
    served(model, way)
    assert torch.equal(model.generate(ids, **arguments), theirs.generate(ids, **arguments))


class Written:
    def __init__(self):
        self.calls = []

    def put(self, value):
        assert value.device.type == "cpu"
        self.calls.append(value.tolist())

    def end(self):
        self.calls.append("end")


@pytest.mark.parametrize("stops", [False, True])
@pytest.mark.parametrize("way", WAYS)
def test_a_streamer_gets_the_same_calls_in_the_same_order(way: Way, stops: bool):
    theirs, model = pair("llama", way)
    ids, streamers = prompts()[:1].to(way[0]), (Written(), Written())
    eos = int(theirs.generate(ids, max_new_tokens=9)[0, 45]) if stops else None
    for one, streamer in zip((theirs, model), streamers, strict=True):
        one.generate(ids, max_new_tokens=9, eos_token_id=eos, streamer=streamer)
    served(model, way)
    assert streamers[0].calls == streamers[1].calls and streamers[1].calls[-1] == "end"


@pytest.mark.parametrize("way", WAYS)
def test_max_time(way: Way):
    model = ours(causal_model("llama"), way)
    out = model.generate(prompts()[:1].to(way[0]), max_new_tokens=200, max_time=0.0)
    assert out.shape[1] == LENGTHS[-1] + 1
    out = model.generate(prompts()[:1].to(way[0]), max_new_tokens=20, max_time=600.0)
    assert out.shape[1] == LENGTHS[-1] + 20


class Forbids(LogitsProcessor):
    """What only the host can do."""

    def __call__(self, input_ids, scores):
        scores = scores.clone()
        scores[:, int(input_ids[0, -1]) % scores.shape[1]] = -torch.inf
        return scores


@pytest.mark.parametrize("way", WAYS)
def test_processors_of_the_users_and_transformers_own(way: Way):
    theirs, model = pair("llama", way)
    ids = prompts().to(way[0])
    for arguments in (
        {"logits_processor": [Forbids()]},
        {"repetition_penalty": 1.5, "no_repeat_ngram_size": 2, "bad_words_ids": [[5], [7, 9]]},
        {"num_return_sequences": 2, "do_sample": True, "top_k": 20, "temperature": 0.7},
        {"do_sample": True, "logits_processor": [Forbids()]},
        {
            "do_sample": True,
            "top_p": 0.9,
            "min_p": 0.02,
            "typical_p": 0.95,
            "suppress_tokens": [9],
            "min_new_tokens": 4,
        },
        {"forced_eos_token_id": 5, "sequence_bias": {(7,): 4.0}, "begin_suppress_tokens": [11]},
    ):
        torch.manual_seed(3)
        expected = theirs.generate(ids, max_new_tokens=12, **arguments)
        for _ in range(2):  # captured, then replayed
            torch.manual_seed(3)
            assert torch.equal(model.generate(ids, max_new_tokens=12, **arguments), expected), arguments
            served(model, way)


@pytest.mark.parametrize("model_type", ["llama", "mistral", "bloom"])
@pytest.mark.parametrize("way", WAYS)
def test_a_cache_goes_out_and_in_again(way: Way, model_type: str):
    theirs, model = pair(model_type, way)
    arguments = {"max_new_tokens": 12, "return_dict_in_generate": True}
    ids = prompts()[:2, :20].to(way[0])
    expected, got = theirs.generate(ids, **arguments), model.generate(ids, **arguments)
    for turn in range(4):
        assert torch.equal(got.sequences, expected.sequences), turn
        for mine, its in zip(got.past_key_values.layers, expected.past_key_values.layers, strict=True):
            torch.testing.assert_close(mine.keys, its.keys, rtol=1e-4, atol=1e-3)
            torch.testing.assert_close(mine.values, its.values, rtol=1e-4, atol=1e-3)
        said = torch.full((2, 3), 9 + turn, device=way[0])
        expected = theirs.generate(
            torch.cat([expected.sequences, said], 1), past_key_values=expected.past_key_values, **arguments
        )
        got = model.generate(torch.cat([got.sequences, said], 1), past_key_values=got.past_key_values, **arguments)
        served(model, way)


@pytest.mark.parametrize("way", WAYS)
def test_a_cache_made_by_transformers(way: Way):
    theirs, model = pair("gemma3_text", way)
    ids = prompts()[:2].to(way[0])
    caches = DynamicCache(config=theirs.config), DynamicCache(config=theirs.config)
    results = []
    for one, cache in zip((theirs, model), caches, strict=True):
        with torch.no_grad():
            one(ids[:, :25], past_key_values=cache)
        results.append(one.generate(ids, past_key_values=cache, max_new_tokens=12))
    assert torch.equal(*results)
    served(model, way)
    with torch.no_grad():
        logits = [
            one(ids[:, :1], past_key_values=cache).logits for one, cache in zip((theirs, model), caches, strict=True)
        ]
    torch.testing.assert_close(logits[1], logits[0], rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("way", WAYS)
def test_embeddings_instead_of_tokens(way: Way):
    theirs, model = pair("llama", way)
    embeds = theirs.get_input_embeddings()(prompts()[:2].to(way[0])).detach()
    expected = theirs.generate(inputs_embeds=embeds, max_new_tokens=12)
    assert torch.equal(model.generate(inputs_embeds=embeds, max_new_tokens=12), expected)
    served(model, way)


@pytest.mark.parametrize("way", WAYS)
def test_a_mask_with_gaps(way: Way):
    theirs, model = pair("llama", way)
    ids, mask = padded("left")
    mask[2, 10:14] = 0
    ids, mask = ids.to(way[0]), mask.to(way[0])
    expected = theirs.generate(input_ids=ids, attention_mask=mask, max_new_tokens=12)
    assert torch.equal(model.generate(input_ids=ids, attention_mask=mask, max_new_tokens=12), expected)
    served(model, way)


@pytest.mark.parametrize("way", WAYS)
def test_rows_that_ended_are_padded(way: Way):
    model = ours(causal_model("llama"), way)
    ids = prompts()[:2].to(way[0])
    made = model.generate(ids, max_new_tokens=8)[:, LENGTHS[-1] :]
    out = model.generate(ids, max_new_tokens=8, eos_token_id=int(made[0, 2]), pad_token_id=PAD)
    assert out[0, LENGTHS[-1] + 3 :].eq(PAD).all() and torch.equal(out[1, LENGTHS[-1] :], made[1])


@pytest.mark.parametrize(
    ("way", "tokens"),
    [
        pytest.param(("cpu", "emulate"), 800, id="cpu-static"),
        pytest.param(("cuda", "auto"), 10_000, id="cuda-graph", marks=pytest.mark.gpu),
    ],
)
def test_a_long_answer(way: Way, tokens: int):
    theirs, model = (tiny_model("llama", max_position_embeddings=16384).to(way[0]) for _ in range(2))
    ours(model, way)
    ids = prompts()[:1].to(way[0])
    if way[0] == "cuda":  # transformers' loop would take a minute: its forward, captured
        peer = HandCaptured(theirs, 1, LENGTHS[-1] + tokens)
        peer.capture(ids)
        expected = torch.cat([ids, peer.generate(ids, tokens)], 1)
    else:
        expected = theirs.generate(ids, max_new_tokens=tokens)
    assert torch.equal(model.generate(ids, max_new_tokens=tokens), expected)
    served(model, way)


@pytest.mark.parametrize(
    ("way", "tokens"),
    [
        pytest.param(("cpu", "emulate"), 20, id="cpu-static"),
        pytest.param(("cuda", "auto"), 500, id="cuda-graph", marks=pytest.mark.gpu),
    ],
)
def test_what_the_choice_writes_to_the_host_is_what_a_copy_was(way: Way, tokens: int, monkeypatch: pytest.MonkeyPatch):
    """Of one, two, and three rows, which take a step for four."""
    made: list[torch.Tensor] = []

    class Kept:
        def put(self, shown: torch.Tensor) -> None:
            made.append(shown.clone())

        def end(self) -> None:
            made.append(torch.zeros(0))

    class Late(StoppingCriteria):
        def __call__(self, input_ids, scores, **kwargs):
            made.append(input_ids.cpu())
            ended = input_ids.shape[1] >= LENGTHS[-1] + tokens - 5
            return torch.full((len(input_ids),), ended, device=input_ids.device)

    def ring(out: torch.Tensor) -> Ring | None:
        rings.append(make(out))
        return rings[-1]

    sizes = {"hidden_size": 256, "intermediate_size": 192, "num_attention_heads": 4, "num_hidden_layers": 2}
    config = LlamaConfig(vocab_size=2048, eos_token_id=None, pad_token_id=PAD, initializer_range=0.2, **sizes)
    dtype = torch.bfloat16 if way[0] == "cuda" else torch.float32
    ids, results, rings, make = prompts().to(way[0]), [], [], Ring.make
    for way_back in (ring, lambda out: None):
        monkeypatch.setattr(Ring, "make", way_back)
        torch.manual_seed(0)
        model = ours(LlamaForCausalLM(config).eval().to(dtype), way)
        for rows in (1, 2, 3):
            answer = model.generate(ids[:rows], max_new_tokens=tokens)
            absent = max(set(range(2048)) - set(answer.flatten().tolist()))
            ways = [
                {},
                {"do_sample": True, "top_k": 0},
                {"do_sample": True, "top_k": 5},
                {"stopping_criteria": [Late()]},
            ]
            ways += [{"streamer": Kept()}] if rows == 1 else []
            for more in ways * 2:  # the second time in the other request's memory
                torch.manual_seed(7)
                made.append(model.generate(ids[:rows], max_new_tokens=tokens, eos_token_id=absent, **more).cpu())
                served(model, way)
                assert model.generate.report.fused
        results.append(made.copy())
        made.clear()
    assert rings and None not in rings and max(len(x.T) for x in results[0] if x.ndim == 2) == LENGTHS[-1] + tokens
    assert len(results[0]) == len(results[1]) and all(map(torch.equal, *results))
