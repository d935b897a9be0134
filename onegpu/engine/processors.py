"""transformers' logits processors as tensor operations that a CUDA graph can hold.

transformers' own classes ask the host for the length of the sequence, and grow the tensors that they read by one column
a token. Here the shapes are fixed, each row's length is a number on the device, and whatever a second call of
`generate` may change (token ids, limits, tables) is a tensor that can be overwritten under a captured graph. The scores
are transformers' bit for bit: the same operations on the same numbers.

`translate` maps one processor; the ones that shape the distribution for sampling are in `warpers`.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

from onegpu.engine.steps import Frame, Step, Text, Translated, Unsupported, members, number, outside
from onegpu.engine.warpers import WARPERS

if TYPE_CHECKING:
    from torch import Tensor


MODULE = "transformers.generation.logits_process"
_ANY = -1  # matches every token


def translate_all(processors: Iterable[Any], frame: Frame) -> list[Step] | Unsupported:
    """The steps of a `LogitsProcessorList`, in its order; `Unsupported` if one of them needs the host."""
    steps = []
    for processor in processors:
        step = translate(processor, frame)
        if isinstance(step, str):
            return Unsupported(f"{type(processor).__name__} {step}", processor)
        if step is not None:
            steps.append(step)
    return steps


def translate(processor: Any, frame: Frame) -> Translated:
    """The step for one processor, None if it never changes a score, or a text: why it has to run on the host."""
    kind = type(processor)
    # A subclass may have overridden anything: only transformers' own classes are known.
    known = kind.__module__ == MODULE
    make = {**_PROCESSORS, **WARPERS}.get(kind.__name__) if known else None
    return "runs on the host: its code is not known to onegpu" if make is None else make(processor, frame)


def _min_length(processor: Any, frame: Frame) -> Translated:
    return _ban_below(processor.min_length, processor.eos_token_id, frame)


def _min_new_tokens(processor: Any, frame: Frame) -> Translated:
    return _ban_below(processor.prompt_length_to_skip + processor.min_new_tokens, processor.eos_token_id, frame)


def _ban_below(limit: int, ids: Tensor, frame: Frame) -> Step:
    return Step(ban_below, tensors={"limit": number(limit, frame), "banned": members(ids.tolist(), frame)})


def ban_below(scores: Tensor, text: Text, *, limit: Tensor, banned: Tensor) -> Tensor:
    """Rows shorter than `limit` do not get the tokens `banned` [V]."""
    import torch

    return torch.where((text.lengths < limit)[:, None] & banned, -math.inf, scores)


def _suppress_at_begin(processor: Any, frame: Frame) -> Translated:
    banned = members(processor.begin_suppress_tokens.tolist(), frame)
    return Step(ban_at, tensors={"place": number(processor.begin_index, frame), "banned": banned})


def ban_at(scores: Tensor, text: Text, *, place: Tensor, banned: Tensor) -> Tensor:
    """The token at `place` is none of `banned` [V]."""
    import torch

    return torch.where((text.lengths == place)[:, None] & banned, -math.inf, scores)


def _suppress(processor: Any, frame: Frame) -> Translated:
    return Step(ban, tensors={"banned": members(processor.suppress_tokens.tolist(), frame)})


def ban(scores: Tensor, text: Text, *, banned: Tensor) -> Tensor:
    """No token is one of `banned` [V]."""
    return scores.masked_fill(banned, -math.inf)


def _forced_bos(processor: Any, frame: Frame) -> Translated:
    return _force_at(1, [processor.bos_token_id], frame)


def _forced_eos(processor: Any, frame: Frame) -> Translated:
    return _force_at(processor.max_length - 1, processor.eos_token_id.tolist(), frame)


def _force_at(place: int, ids: list[int], frame: Frame) -> Translated:
    import torch

    if wrong := outside(ids, frame):
        return wrong
    row = torch.where(members(ids, frame), 0.0, -math.inf)
    return Step(force_at, tensors={"place": number(place, frame), "row": row})


def force_at(scores: Tensor, text: Text, *, place: Tensor, row: Tensor) -> Tensor:
    """The scores of the token at `place` are `row` [V]."""
    import torch

    return torch.where((text.lengths == place)[:, None], row, scores)


def _repetition(processor: Any, frame: Frame) -> Translated:
    import torch

    if processor.penalty == 1.0:
        return None
    # 5.23 skips each row's padding with a tensor [rows]; 5.17 has a number, and penalises the pad token.
    skip = processor.prompt_ignore_length
    start = torch.zeros(frame.batch, dtype=torch.int64)
    if isinstance(skip, torch.Tensor):
        if skip.shape != (frame.rows,):
            return f"has a prompt_ignore_length of shape {tuple(skip.shape)} for {frame.rows} rows"
        start[: frame.rows] = skip
    else:
        start += skip or 0
    return Step(penalise_repetition, {"penalty": processor.penalty}, {"start": start.to(frame.device)})


def penalise_repetition(scores: Tensor, text: Text, *, penalty: float, start: Tensor) -> Tensor:
    """Tokens of the text from `start` [B] on get less likely: negative scores times `penalty`, others divided by it."""
    import torch

    history, lengths = text
    vocab = scores.shape[1]
    places = torch.arange(history.shape[1], device=history.device)
    counted = (places >= start[:, None]) & (places < lengths[:, None])
    ids = torch.where(counted, history.clamp(max=vocab), vocab)
    seen = torch.zeros(scores.shape[0], vocab + 1, dtype=torch.bool, device=scores.device).scatter_(1, ids, True)
    return _penalise(scores, seen[:, :vocab], penalty)


def _encoder_repetition(processor: Any, frame: Frame) -> Translated:
    import torch

    ids = processor.encoder_input_ids
    if frame.rows % ids.shape[0]:
        return f"has {ids.shape[0]} prompts for {frame.rows} rows"
    if wrong := outside(ids.flatten().tolist(), frame):
        return wrong
    seen = torch.zeros(frame.batch, frame.vocab, dtype=torch.bool, device=frame.device)
    # 5.17 forgets all but the first of several return sequences; later versions repeat the prompts, as here.
    seen[: frame.rows].scatter_(1, ids.to(frame.device).repeat_interleave(frame.rows // ids.shape[0], dim=0), True)
    return Step(penalise, {"penalty": processor.penalty}, {"seen": seen})


def penalise(scores: Tensor, text: Text, *, penalty: float, seen: Tensor) -> Tensor:
    """The same penalty for a fixed set of tokens, `seen` [B, V]."""
    return _penalise(scores, seen, penalty)


def _penalise(scores: Tensor, seen: Tensor, penalty: float) -> Tensor:
    import torch

    return torch.where(seen, torch.where(scores < 0, scores * penalty, scores / penalty), scores)


def _no_repeat_ngram(processor: Any, frame: Frame) -> Translated:
    return Step(ban_repeated_ngrams, {"size": processor.ngram_size})


def ban_repeated_ngrams(scores: Tensor, text: Text, *, size: int) -> Tensor:
    """No token completes an n-gram of `size` tokens that the row has already."""
    import torch

    history, lengths = text
    vocab = scores.shape[1]
    if history.shape[1] < size:
        return scores
    windows = history.unfold(1, size, 1)  # [B, W, size]
    matches = (windows[..., :-1] == _last(text, size - 1)[:, None]).all(-1)
    matches &= torch.arange(size, size + windows.shape[1], device=history.device) <= lengths[:, None]
    # Windows that do not match, and ids outside the logits, go to a spare column.
    ids = torch.where(matches, windows[..., -1].clamp(max=vocab), vocab)
    banned = torch.zeros(scores.shape[0], vocab + 1, dtype=torch.bool, device=scores.device).scatter_(1, ids, True)
    return scores.masked_fill(banned[:, :vocab], -math.inf)


def _sequence_bias(processor: Any, frame: Frame) -> Translated:
    import torch

    biases: dict[tuple[int, ...], float] = processor.sequence_bias
    if wrong := outside([token for ids in biases for token in ids], frame):
        return wrong
    single = torch.zeros(frame.vocab)
    for ids, bias in biases.items():
        if len(ids) == 1:
            single[ids[0]] = bias
    tensors = {"single": single.to(frame.device)}
    longer = [ids for ids in biases if len(ids) > 1]
    if not longer:
        return Step(add_biases, {"rounds": ()}, tensors)
    grouped = hasattr(processor, "multi_token_biases")  # newer versions: length by length, and one token earlier
    if grouped:
        lengths = list(dict.fromkeys(map(len, longer)))
        longer.sort(key=lambda ids: lengths.index(len(ids)))
    # Sequences may end with the same token. Their biases are added in transformers' order, in rounds within which no
    # two additions meet: a sum by atomics would not repeat.
    seen: Counter[int] = Counter()
    turns = []
    for ids in longer:
        turns.append(seen[ids[-1]])
        seen[ids[-1]] += 1
    order = sorted(range(len(longer)), key=turns.__getitem__)
    longer = [longer[number] for number in order]
    width = max(map(len, longer)) - 1
    made = {
        "prefixes": torch.tensor([[_ANY] * (width + 1 - len(ids)) + list(ids[:-1]) for ids in longer]),
        "last": torch.tensor([ids[-1] for ids in longer]),
        "biases": torch.tensor([biases[ids] for ids in longer], dtype=torch.float32),
        "needed": torch.tensor([len(ids) - 1 if grouped else len(ids) for ids in longer]),
    }
    tensors.update({name: value.to(frame.device) for name, value in made.items()})
    rounds = Counter(turns)
    return Step(add_biases, {"rounds": tuple(rounds[turn] for turn in range(len(rounds)))}, tensors)


def add_biases(scores: Tensor, text: Text, *, rounds: tuple[int, ...], single: Tensor, **longer: Tensor) -> Tensor:
    """Adds `single` [V], and for each of S sequences whose beginning ends the text its bias to its last token.

    `longer` holds the sequences, sorted into `rounds`: prefixes int64 [S, P] (filled with `_ANY` from the left), last
    int64 [S], biases float32 [S], needed int64 [S] (shorter rows are left alone).
    """
    import torch

    if not rounds:
        return scores + single
    prefixes = longer["prefixes"]
    tails = _last(text, prefixes.shape[1])[:, None]  # [B, 1, P]
    matches = ((tails == prefixes) | (prefixes == _ANY)).all(-1) & (text.lengths[:, None] >= longer["needed"])
    added = torch.where(matches, longer["biases"], 0.0)  # [B, S]
    bias = torch.zeros_like(scores) + single
    first = 0
    for count in rounds:
        now = slice(first, first + count)
        bias.index_add_(1, longer["last"][now], added[:, now])
        first += count
    return scores + bias


def _exponential_decay(processor: Any, frame: Frame) -> Translated:
    import torch

    ids = processor.eos_token_id.tolist()
    start, factor = processor.regulation_start, processor.regulation_factor
    if wrong := outside(ids, frame):
        return wrong
    if not isinstance(factor, int | float) or not isinstance(start, int) or factor <= 0:
        return f"has a start of {start!r} and a factor of {factor!r}"
    lengths = range(frame.max_length + 2)
    if math.log(factor) * (lengths[-1] - start) > 700:
        return f"grows beyond every float within {frame.max_length} tokens"
    # Python's own powers, in float64, as transformers computes them.
    table = torch.tensor([factor ** (n - start) - 1 if n > start else 0.0 for n in lengths], dtype=torch.float64)
    return Step(
        decay,
        tensors={
            "table": table.float().to(frame.device),
            "ids": torch.tensor(ids, device=frame.device),
            "start": number(start, frame),
        },
    )


def decay(scores: Tensor, text: Text, *, table: Tensor, ids: Tensor, start: Tensor) -> Tensor:
    """Past `start` the tokens `ids` gain their own absolute score, times ``table[length]``.

    A score that is not finite stays as it is: transformers 5.17 makes NaN of -inf, later versions do not.
    """
    import torch

    lengths = text.lengths.clamp(max=table.shape[0] - 1)
    columns = scores[:, ids]
    raised = columns + columns.abs() * table[lengths][:, None]
    raise_it = (lengths > start)[:, None] & columns.isfinite()
    return scores.index_copy(1, ids, torch.where(raise_it, raised, columns))


def _remove_invalid(processor: Any, frame: Frame) -> Translated:
    return Step(remove_invalid)


def remove_invalid(scores: Tensor, text: Text) -> Tensor:
    """NaN becomes 0, infinities the largest numbers."""
    return scores.nan_to_num()


def _normalise(processor: Any, frame: Frame) -> Translated:
    return Step(normalise)


def normalise(scores: Tensor, text: Text) -> Tensor:
    """Scores become logarithms of probabilities."""
    return scores.log_softmax(dim=-1)


# The rest comes with `warpers.WARPERS`. Those that call the model or the user's code, or keep lists on the host
# (guidance, watermarks, prefix constraints, encoder n-grams), are not here: they run on the host.
_PROCESSORS: dict[str, Callable[[Any, Frame], Translated]] = {
    "MinLengthLogitsProcessor": _min_length,
    "MinNewTokensLengthLogitsProcessor": _min_new_tokens,
    "SuppressTokensAtBeginLogitsProcessor": _suppress_at_begin,
    "SuppressTokensLogitsProcessor": _suppress,
    "ForcedBOSTokenLogitsProcessor": _forced_bos,
    "ForcedEOSTokenLogitsProcessor": _forced_eos,
    "RepetitionPenaltyLogitsProcessor": _repetition,
    "EncoderRepetitionPenaltyLogitsProcessor": _encoder_repetition,
    "NoRepeatNGramLogitsProcessor": _no_repeat_ngram,
    "SequenceBiasLogitsProcessor": _sequence_bias,
    "NoBadWordsLogitsProcessor": _sequence_bias,
    "ExponentialDecayLengthPenalty": _exponential_decay,
    "InfNanRemoveLogitsProcessor": _remove_invalid,
    "LogitNormalization": _normalise,
}


def _last(text: Text, count: int) -> Tensor:
    """The last `count` tokens of each row, int64 [B, count]; anything where a row is shorter, or past its end."""
    import torch

    places = text.lengths[:, None] + torch.arange(-count, 0, device=text.lengths.device)
    return text.history.gather(1, places.clamp(0, text.history.shape[1] - 1))
