"""The sampler against transformers' own loop, and against exact probabilities."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.generation import logits_process as hf
from transformers.generation.logits_process import LogitsProcessorList

from onegpu.engine import sampling
from onegpu.engine.sampling import Sampler, Unsupported
from onegpu.errors import SamplingError

VOCAB = 400  # wide enough for a top-k to be worth candidates
LENGTH = 12
EOS = [3, 5]
PAD = 0


def _plan(processors: list[Any], device: str = "cpu", **changed: Any) -> Sampler:
    arguments: dict[str, Any] = {
        "do_sample": True,
        "eos_token_ids": EOS,
        "pad_token_id": PAD,
        "batch": 4,
        "vocab_size": VOCAB,
        "max_length": LENGTH,
        "device": device,
        **changed,
    }
    sampler = Sampler.plan(LogitsProcessorList(processors), **arguments)
    assert isinstance(sampler, Sampler)
    return sampler


def _model(history: torch.Tensor, lengths: torch.Tensor, seed: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Logits [B, V] that depend on the last token: a table. In 16 bits many of a row are equal."""
    generator = torch.Generator().manual_seed(seed)
    table = (torch.randn(VOCAB, VOCAB, generator=generator) * 2).to(history.device)
    table[:, EOS] += 2.0
    return table[history.gather(1, lengths[:, None] - 1)[:, 0]].to(dtype)


def _prompt(batch: int, device: str = "cpu") -> tuple[torch.Tensor, torch.Tensor]:
    history = torch.full((batch, LENGTH + 1), -99, device=device)
    history[:, :2] = torch.tensor([[7, 8]], device=device) + torch.arange(batch, device=device)[:, None]
    return history, torch.full((batch,), 2, device=device)


def _ours(sampler: Sampler, batch: int, seed: int, device: str = "cpu", dtype: torch.dtype = torch.float32) -> Any:
    history, lengths = _prompt(batch, device)
    sampler.begin(LENGTH - 2)
    all_scores, steps = [], 0
    while steps < LENGTH - 2 and not sampler.out[1].all():
        scores = sampler.step(_model(history, lengths, seed, dtype), history, lengths)
        steps += 1
        all_scores.append(scores)
        assert torch.equal(sampler.out[0], history.gather(1, lengths[:, None] - 1)[:, 0])
    sampler.end(steps)
    return history[:, : 2 + steps], all_scores


def _theirs(
    processors: list[Any],
    batch: int,
    seed: int,
    do_sample: bool,
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> Any:
    """transformers' loop (`GenerationMixin._sample`), by hand."""
    history, lengths = _prompt(batch, device)
    ids, unfinished, all_scores = history[:, :2], torch.ones(batch, dtype=torch.int64, device=device), []
    while ids.shape[1] < LENGTH and unfinished.any():
        lengths = torch.full((batch,), ids.shape[1], device=device)
        scores = LogitsProcessorList(processors)(ids, _model(ids, lengths, seed, dtype).float())
        all_scores.append(scores)
        token = torch.multinomial(scores.softmax(-1), 1)[:, 0] if do_sample else scores.argmax(-1)
        token = token * unfinished + PAD * (1 - unfinished)
        ids = torch.cat([ids, token[:, None]], dim=1)
        unfinished = unfinished & ~torch.isin(token, torch.tensor(EOS, device=device))
    return ids, all_scores


TEXT = {
    "repetition": hf.RepetitionPenaltyLogitsProcessor(1.4),
    "ngram": hf.NoRepeatNGramLogitsProcessor(2),
    "bad words": hf.NoBadWordsLogitsProcessor([[9], [8, 10], [10, 11]], EOS),
    "min new": hf.MinNewTokensLengthLogitsProcessor(2, 4, EOS),
    "forced eos": hf.ForcedEOSTokenLogitsProcessor(LENGTH, 5),
    "suppress": hf.SuppressTokensLogitsProcessor([1, 2]),
}
SHAPE = {
    "temperature": hf.TemperatureLogitsWarper(0.8),
    "top_k": hf.TopKLogitsWarper(20),
    "top_k 2": hf.TopKLogitsWarper(9),
    "top_p": hf.TopPLogitsWarper(0.9),
    "min_p": hf.MinPLogitsWarper(0.05),
    "typical": hf.TypicalLogitsWarper(0.9),
    "epsilon": hf.EpsilonLogitsWarper(0.01),
    "eta": hf.EtaLogitsWarper(0.02),
}


@settings(max_examples=60, deadline=None)
@given(
    words=st.lists(st.sampled_from(sorted(TEXT)), max_size=3, unique=True),
    shape=st.lists(st.sampled_from(sorted(SHAPE)), max_size=4, unique=True),
    do_sample=st.booleans(),
    scores=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_the_same_tokens_as_transformers(words: list[str], shape: list[str], do_sample: bool, scores: bool, seed: int):
    processors = [TEXT[name] for name in words] + [SHAPE[name] for name in shape if do_sample]
    torch.manual_seed(seed)
    wanted, wanted_scores = _theirs(processors, 4, seed, do_sample)
    behind = torch.rand(3)
    torch.manual_seed(seed)
    got, got_scores = _ours(_plan(processors, do_sample=do_sample, scores=scores), 4, seed)
    assert torch.equal(got, wanted) and torch.equal(torch.rand(3), behind)
    if scores:
        assert all(map(torch.equal, got_scores, wanted_scores))
    else:
        assert got_scores == [None] * len(wanted_scores)


def test_a_common_setting_looks_at_candidates_only():
    usual = [SHAPE["temperature"], SHAPE["top_k"], SHAPE["top_p"]]

    def whole(processors: list[Any], **changed: Any) -> tuple[int, int]:
        sampler = _plan(processors, **changed)
        return len(sampler._before), sampler._candidates

    assert whole(usual) == whole([SHAPE["top_k"], SHAPE["min_p"]]) == (0, 128)
    assert whole([TEXT["ngram"], *usual, SHAPE["min_p"]]) == whole([SHAPE["min_p"], *usual]) == (1, 128)
    assert whole([TEXT["ngram"], SHAPE["temperature"]]) == (1, 0)
    for processors, why in (
        ([*usual, SHAPE["typical"]], "needs every token"),
        ([*usual[:2], SHAPE["min_p"], SHAPE["top_p"]], "not the order of the kernel"),
        ([SHAPE["temperature"], SHAPE["top_p"]], "no top-k"),
        ([hf.TopKLogitsWarper(300)], "nearly the whole vocabulary"),
        ([hf.TopKLogitsWarper(20, filter_value=-5.0)], "filtered tokens stay possible"),
    ):
        assert whole(processors) == (len(processors), 0), why
    assert whole(usual, scores=True) == (3, 0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit_logits_with_equals_at_every_border(dtype: torch.dtype):
    # Which of several equal scores a sort of the vocabulary puts first is not defined: distributions are compared.
    processors = [hf.TemperatureLogitsWarper(0.9), hf.TopKLogitsWarper(50), hf.TopPLogitsWarper(0.95)]
    history, lengths = _prompt(1)
    logits = _model(history, lengths, 1, dtype)
    assert logits.unique().numel() < VOCAB  # else there would be nothing to see
    wanted = LogitsProcessorList(processors)(history[:, :2], logits.float()).softmax(-1)[0]
    counts = _counts(_plan(processors, batch=2000), logits)
    # Tokens of equal probability stand for each other.
    levels, level_of = logits[0].float().unique(return_inverse=True)
    expected = torch.zeros(len(levels)).index_add_(0, level_of, wanted)
    seen = torch.zeros(len(levels)).index_add_(0, level_of, counts)
    assert _chi_squared_p(seen, expected) > 1e-4


def _counts(sampler: Sampler, logits: torch.Tensor, rounds: int = 10) -> torch.Tensor:
    """How often each token comes; one row of logits for the whole batch."""
    batch = sampler.out.shape[1]
    counts = torch.zeros(VOCAB)
    for _ in range(rounds):
        history, lengths = _prompt(batch, str(logits.device))
        sampler.begin(1)
        sampler.step(logits.expand(batch, -1), history, lengths)
        sampler.end(1)
        counts += torch.bincount(sampler.out[0], minlength=VOCAB).cpu()
    return counts


def _chi_squared_p(counts: torch.Tensor, probabilities: torch.Tensor) -> float:
    """The probability of counts as unlikely as these; rare tokens are taken together, impossible ones must not come."""
    assert counts[probabilities == 0].sum() == 0
    expected = probabilities.double() * counts.sum()
    often = expected >= 10
    seen = torch.cat([counts[often].double(), counts[~often].double().sum()[None]])
    wanted = torch.cat([expected[often], expected[~often].sum()[None]])
    seen, wanted = seen[wanted > 0], wanted[wanted > 0]
    statistic, freedom = ((seen - wanted) ** 2 / wanted).sum(), len(wanted) - 1
    return float(torch.special.gammaincc(torch.tensor(freedom / 2.0, dtype=torch.float64), statistic / 2))


@pytest.mark.parametrize(
    "names",
    [[], ["temperature"], ["temperature", "top_k", "top_p"], ["top_p"], ["min_p"], ["typical"], ["top_k", "min_p"]],
)
def test_tokens_come_as_often_as_they_should(names: list[str], device: str):
    processors = [SHAPE[name] for name in names]
    history, lengths = _prompt(1, device)
    logits = _model(history, lengths, 2)
    probabilities = LogitsProcessorList(processors)(history[:, :2], logits).softmax(-1)[0].cpu()
    torch.manual_seed(1234)
    counts = _counts(_plan(processors, device, batch=2000), logits)
    assert _chi_squared_p(counts, probabilities) > 1e-4
    # The test itself sees a wrong temperature.
    assert _chi_squared_p(counts, (probabilities**0.9 / (probabilities**0.9).sum())) < 1e-4


def test_a_seed_repeats_and_the_next_call_differs(device: str):
    sampler = _plan([SHAPE["temperature"]], device, eos_token_ids=[])
    torch.manual_seed(5)
    first, second = (_ours(sampler, 4, 0, device)[0] for _ in range(2))
    torch.manual_seed(5)
    again = [_ours(sampler, 4, 0, device)[0] for _ in range(2)]
    assert torch.equal(first, again[0]) and torch.equal(second, again[1]) and not torch.equal(first, second)
    fresh = _plan([SHAPE["temperature"]], device, eos_token_ids=[])
    torch.manual_seed(5)
    assert torch.equal(_ours(fresh, 4, 0, device)[0], first)


def test_a_rehearsal_leaves_no_trace(device: str):
    sampler = _plan([SHAPE["top_k"], SHAPE["top_p"]], device)
    torch.manual_seed(6)
    plain = _ours(sampler, 4, 0, device)[0]
    torch.manual_seed(6)
    history, lengths = _prompt(4, device)
    sampler.begin(LENGTH - 2)
    before = history.clone(), lengths.clone(), sampler.out.clone()
    sampler.rehearse(_model(history, lengths, 0), history, lengths)
    assert all(map(torch.equal, (history, lengths, sampler.out), before))
    sampler.step(_model(history, lengths, 0), history, lengths)
    assert torch.equal(history[:, 2], plain[:, 2])


def test_finished_rows_get_the_pad_token_and_grow(device: str):
    sampler = _plan([], device, do_sample=False, rows=3)
    history, lengths = _prompt(4, device)
    sampler.begin(3)
    logits = torch.zeros(4, VOCAB, device=device)
    logits[torch.arange(4), torch.tensor([9, 5, 9, 9])] = 1.0
    sampler.step(logits, history, lengths)
    assert sampler.out.tolist() == [[9, 5, 9, PAD], [0, 1, 0, 1], [0, 0, 0, 0]]
    sampler.out[1, 2] = 1  # the host found a stop string
    sampler.step(logits, history, lengths)
    assert sampler.out[:2].tolist() == [[9, PAD, PAD, PAD], [0, 1, 1, 1]]
    assert history[:, 2:4].tolist() == [[9, 9], [5, PAD], [9, PAD], [PAD, PAD]] and lengths.tolist() == [4] * 4
    sampler.begin(3)
    assert sampler.out.tolist() == [[0] * 4, [0, 0, 0, 1], [0] * 4]


def test_without_a_pad_token_a_finished_row_goes_on():
    sampler = _plan([], do_sample=False, eos_token_ids=[], pad_token_id=None)
    history, lengths = _prompt(4)
    sampler.begin(2)
    sampler.out[1].fill_(1)
    logits = torch.zeros(4, VOCAB)
    logits[:, 77] = 1.0
    sampler.step(logits, history, lengths)
    assert sampler.out[0].tolist() == [77] * 4


def test_a_step_past_the_end_stays_inside():
    sampler = _plan([TEXT["repetition"], TEXT["ngram"], TEXT["forced eos"]])
    history, lengths = _prompt(4)
    history.clamp_(min=0)
    lengths.fill_(LENGTH)
    sampler.begin(3)
    for _ in range(3):
        sampler.step(torch.randn(4, VOCAB), history, lengths)
    assert lengths.tolist() == [LENGTH + 3] * 4 and torch.equal(history[:, -1], sampler.out[0])


@pytest.mark.parametrize("narrow", [False, True])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_scores_that_cannot_be_sampled_from(value: float, narrow: bool, device: str):
    sampler = _plan([SHAPE["top_k"]] if narrow else [], device)
    assert (sampler._candidates > 0) == narrow
    history, lengths = _prompt(4, device)
    sampler.begin(2)
    logits = torch.randn(4, VOCAB, device=device)
    logits[2, 300 if value != -math.inf else slice(None)] = value
    sampler.step(logits, history, lengths)
    assert sampler.out[2].tolist() == [0, 0, 1, 0]
    sampler.step(torch.randn(4, VOCAB, device=device), history, lengths)
    with pytest.raises(SamplingError, match=r"probability tensor contains .* in batch row 2"):
        sampler.raise_if_invalid(sampler.out.cpu())
    with pytest.raises(RuntimeError, match="probability tensor contains"):
        torch.multinomial(logits[2:3].cpu().softmax(-1), 1)
    sampler.begin(2)
    sampler.step(torch.randn(4, VOCAB, device=device), history, lengths)
    sampler.raise_if_invalid(sampler.out.cpu())


def test_greedy_takes_what_transformers_takes_from_nan():
    sampler = _plan([], do_sample=False)
    history, lengths = _prompt(4)
    logits = torch.randn(4, VOCAB)
    logits[1, 50] = math.nan
    sampler.begin(1)
    sampler.step(logits, history, lengths)
    assert torch.equal(sampler.out[0], logits.argmax(-1)) and sampler.out[2].sum() == 0
    sampler.raise_if_invalid(sampler.out)


SETTINGS: dict[str, tuple[list[str], bool]] = {
    "greedy": ([], False),
    "greedy, every processor": ([*TEXT], False),
    "plain": ([], True),
    "usual": (["temperature", "top_k", "top_p"], True),
    "usual, every processor": ([*TEXT, "temperature", "top_k", "top_p"], True),
    "every token": (["temperature", "top_p", "min_p", "typical", "epsilon", "eta"], True),
}


def _named(names: list[str]) -> list[Any]:
    on_cuda = {
        "min new": hf.MinNewTokensLengthLogitsProcessor(2, 4, EOS, device="cuda"),
        "forced eos": hf.ForcedEOSTokenLogitsProcessor(LENGTH, 5, device="cuda"),
        "eta": hf.EtaLogitsWarper(0.02, device="cuda"),
    }
    return [{**TEXT, **SHAPE, **on_cuda}[name] for name in names]


@pytest.mark.gpu
@pytest.mark.parametrize("scores", [False, True])
@pytest.mark.parametrize("setting", SETTINGS)
def test_a_captured_step_chooses_as_an_eager_one_and_as_transformers(setting: str, scores: bool):
    names, do_sample = SETTINGS[setting]
    processors, batch, seed = _named(names), 4, 11
    torch.manual_seed(seed)
    wanted, wanted_scores = _theirs(processors, batch, seed, do_sample, "cuda")
    behind = torch.rand(3, device="cuda")
    sampler = _plan(processors, "cuda", do_sample=do_sample, scores=scores)
    torch.manual_seed(seed)
    eager, _ = _ours(sampler, batch, seed, "cuda")
    assert torch.equal(eager, wanted) and torch.equal(torch.rand(3, device="cuda"), behind)

    torch.manual_seed(seed)
    history, lengths = _prompt(batch, "cuda")
    logits = _model(history, lengths, seed)
    sampler.begin(LENGTH - 2)
    graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        sampler.rehearse(logits, history, lengths)
    torch.cuda.current_stream().wait_stream(stream)
    if sampler.generator is not None:
        graph.register_generator_state(sampler.generator)
    with torch.cuda.graph(graph):
        captured = sampler.step(logits, history, lengths)
    for step in range(wanted.shape[1] - 2):
        logits.copy_(_model(history, lengths, seed))
        torch.cuda.set_sync_debug_mode("error")
        try:
            graph.replay()
        finally:
            torch.cuda.set_sync_debug_mode("default")
        if scores:
            assert captured is not None and torch.equal(captured, wanted_scores[step])
    sampler.end(wanted.shape[1] - 2)
    assert torch.equal(history[:, : wanted.shape[1]], wanted)
    assert torch.equal(torch.rand(3, device="cuda"), behind)


@pytest.mark.gpu
@pytest.mark.parametrize("setting", SETTINGS)
def test_an_eager_step_never_waits_for_the_device(setting: str):
    names, do_sample = SETTINGS[setting]
    sampler = _plan(_named(names), "cuda", do_sample=do_sample)
    history, lengths = _prompt(4, "cuda")
    logits = _model(history, lengths, 0)
    sampler.begin(1)
    torch.cuda.set_sync_debug_mode("error")
    try:
        sampler.step(logits, history, lengths)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
def test_requests_at_once_share_no_random_numbers():
    torch.manual_seed(9)
    one, two = (_plan([], "cuda", eos_token_ids=[], vocab_size=VOCAB) for _ in range(2))
    one.begin(LENGTH - 2)
    two.begin(LENGTH - 2)
    texts = []
    for sampler in (one, two):
        history, lengths = _prompt(4, "cuda")
        for _ in range(LENGTH - 2):
            sampler.step(torch.zeros(4, VOCAB, device="cuda"), history, lengths)
        sampler.end(LENGTH - 2)
        texts.append(history[:, 2:LENGTH])
    assert (texts[0] == texts[1]).float().mean() < 0.2


def test_a_graph_serves_requests_with_the_same_key():
    def plan(limit: int, eos: list[int], temperature: float) -> Sampler:
        processors = [hf.MinLengthLogitsProcessor(limit, eos), hf.TemperatureLogitsWarper(temperature)]
        return _plan(processors, eos_token_ids=eos)

    old, new = plan(4, [3, 5], 0.5), plan(9, [7, 8], 0.5)
    assert old.key == new.key and hash(old.key) == hash(new.key)
    assert old.key != plan(4, [3, 5], 0.6).key and old.key != plan(4, [3], 0.5).key
    old.copy_from(new)
    texts = []
    for sampler in (old, new):
        torch.manual_seed(8)
        texts.append(_ours(sampler, 4, 3)[0])
    assert torch.equal(*texts)


def test_a_sampler_made_in_inference_mode_serves_outside_and_leaves_the_processors_alone():
    warper = hf.EtaLogitsWarper(0.02)
    with torch.inference_mode():
        old = _plan([TEXT["min new"], warper])
        _ours(old, 4, 3)
    new = _plan([TEXT["min new"], hf.EtaLogitsWarper(0.5)])
    torch.manual_seed(8)
    wanted = _ours(new, 4, 3)[0]
    old.copy_from(new)
    torch.manual_seed(8)
    assert torch.equal(_ours(old, 4, 3)[0], wanted) and float(warper.epsilon) == pytest.approx(0.02)


def test_a_sampler_is_replaced_within_a_request(device: str):
    first, second = (_plan([SHAPE["temperature"]], device, eos_token_ids=[9]) for _ in range(2))
    history, lengths = _prompt(4, device)
    torch.manual_seed(10)
    wanted = _ours(first, 4, 3, device)[0]
    torch.manual_seed(10)
    first.begin(LENGTH - 2)
    first.step(_model(history, lengths, 3), history, lengths)
    second.copy_from(first)
    for _ in range(wanted.shape[1] - 3):
        second.step(_model(history, lengths, 3), history, lengths)
    assert torch.equal(history[:, : wanted.shape[1]], wanted)


class _Stream:
    """A CUDA generator as far as a sampler uses it: a seed and a place."""

    device = "cuda:0"

    def __init__(self, seed: int = 0) -> None:
        self.seed, self.offset = seed, 0

    def manual_seed(self, seed: int) -> None:
        self.seed, self.offset = seed, 0

    def initial_seed(self) -> int:
        return self.seed

    def get_offset(self) -> int:
        return self.offset

    def set_offset(self, offset: int) -> None:
        self.offset = offset


def test_a_request_reserves_its_part_of_the_stream(monkeypatch: pytest.MonkeyPatch):
    default = _Stream(seed=77)
    default.offset = 100
    monkeypatch.setattr(sampling, "_default_generator", lambda device: default)
    one, two = (_plan([]) for _ in range(2))
    for sampler in (one, two):
        sampler.generator, sampler._advance = _Stream(), 4
    one.begin(10)
    assert (one.generator.seed, one.generator.offset, default.offset) == (77, 100, 140)
    one.end(3)
    assert default.offset == 112  # where three steps of transformers' loop would have left it
    one.begin(10)
    two.begin(5)
    assert (one.generator.offset, two.generator.offset, default.offset) == (112, 152, 172)
    one.end(2)
    assert default.offset == 172  # the second request has begun behind
    two.end(1)
    assert default.offset == 156
    one.begin(10)
    default.manual_seed(78)
    one.end(1)
    assert (default.seed, default.offset) == (78, 0)


def test_what_needs_the_host_is_reported():
    found = Sampler.plan(
        [lambda ids, scores: scores],
        do_sample=True,
        eos_token_ids=[],
        pad_token_id=None,
        batch=1,
        vocab_size=VOCAB,
        max_length=LENGTH,
        device="cpu",
    )
    assert isinstance(found, Unsupported) and "function runs on the host" in found.reason


def test_logits_are_left_alone():
    logits = torch.randn(4, VOCAB)
    kept = logits.clone()
    for processors, do_sample in (
        ([], True),
        ([], False),
        ([SHAPE["top_k"]], True),
        ([hf.InfNanRemoveLogitsProcessor()], False),
    ):
        history, lengths = _prompt(4)
        sampler = _plan(processors, do_sample=do_sample, scores=True)
        sampler.begin(1)
        sampler.step(logits, history, lengths)
        assert torch.equal(logits, kept)
