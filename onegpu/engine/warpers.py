"""The processors that shape a distribution for sampling: temperature, top-k, top-p, min-p and their relatives.

Over all scores and bit for bit as in transformers. `split` finds those that need not be run like this: at the end of
the list, and where nobody asks for the scores, they become part of drawing the token.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from onegpu.engine.steps import Frame, Step, Text, Translated
from onegpu.kernels.next_token import MOST_CANDIDATES, Shape

if TYPE_CHECKING:
    from torch import Tensor

_SCAN_BLOCK = 1024
_FEWEST = 128  # candidates


def split(steps: list[Step], vocab: int) -> tuple[list[Step], Shape, int]:
    """What has to be computed over all scores before a token is drawn, and how it is drawn.

    Returns:
        the steps before; the shape that the others amount to; from how many of the highest
        scores it draws, 0 for all. That is a power of two, at least twice the top-k, because scores may be equal to the
        last of the top k. Beyond that equals are dropped: where hundreds of scores are all the k-th highest, k and some
        are kept.
    """
    before = list(steps)

    def last(function: Callable[..., Tensor]) -> dict[str, Any]:
        step = before[-1] if before else None
        if step is None or step.function is not function or step.numbers.get("filter_value", -math.inf) != -math.inf:
            return {}
        return dict(before.pop().numbers)

    min_p, top_p, top_k, temperature = last(keep_min_p), last(keep_top_p), last(keep_top_k), last(cool)
    shape = Shape(
        temperature.get("temperature", 1.0),
        top_k.get("top_k", 0),
        top_p.get("top_p", 1.0),
        top_p.get("least", 1),
        min_p.get("min_p", 0.0),
        min_p.get("least", 1),
    )
    candidates = 1 << (max(2 * shape.top_k, _FEWEST) - 1).bit_length()
    if top_k and candidates <= min(MOST_CANDIDATES, vocab // 2):
        return before, shape, candidates
    if temperature and not (top_k or top_p or min_p):
        return before, shape, 0
    return list(steps), Shape(), 0


def _temperature(processor: Any, frame: Frame) -> Translated:
    if processor.temperature == 1.0:
        return None
    return Step(cool, {"temperature": processor.temperature})


def cool(scores: Tensor, text: Text, *, temperature: float) -> Tensor:
    """Scores divided by the temperature."""
    return scores / temperature


def _top_k(processor: Any, frame: Frame) -> Translated:
    if processor.top_k >= frame.vocab:
        return None
    numbers = {"top_k": processor.top_k, "filter_value": processor.filter_value}
    return Step(keep_top_k, numbers)


def keep_top_k(scores: Tensor, text: Text, *, top_k: int, filter_value: float) -> Tensor:
    """The `top_k` highest scores stay, and all that equal the last of them."""
    import torch

    least = torch.topk(scores, top_k, dim=-1).values[:, -1:]
    return scores.masked_fill(scores < least, filter_value)


def _top_p(processor: Any, frame: Frame) -> Translated:
    numbers = {"top_p": processor.top_p, "filter_value": processor.filter_value, "least": processor.min_tokens_to_keep}
    return Step(keep_top_p, numbers)


def keep_top_p(scores: Tensor, text: Text, *, top_p: float, filter_value: float, least: int) -> Tensor:
    """The most probable tokens stay that together reach the probability `top_p`, at least `least` of them."""
    import torch

    values, order = torch.sort(scores, descending=False)
    removed = cumulated(values.softmax(dim=-1)) <= (1 - top_p)
    removed[..., -least:].fill_(False)
    return scores.masked_fill(removed.scatter(1, order, removed), filter_value)


def _min_p(processor: Any, frame: Frame) -> Translated:
    if processor.min_p == 0:
        return None
    numbers = {"min_p": processor.min_p, "filter_value": processor.filter_value, "least": processor.min_tokens_to_keep}
    return Step(keep_min_p, numbers)


def keep_min_p(scores: Tensor, text: Text, *, min_p: float, filter_value: float, least: int) -> Tensor:
    """Tokens stay that have at least the share `min_p` of the highest probability, at least `least` of them."""
    probabilities = scores.softmax(dim=-1)
    removed = probabilities < min_p * probabilities.amax(dim=-1, keepdim=True)
    if least > 1:  # the highest itself is never removed
        removed.scatter_(-1, probabilities.topk(min(least, scores.shape[1]), dim=-1).indices, False)
    return scores.masked_fill(removed, filter_value)


def _typical(processor: Any, frame: Frame) -> Translated:
    numbers = {"mass": processor.mass, "filter_value": processor.filter_value, "least": processor.min_tokens_to_keep}
    return Step(keep_typical, numbers)


def keep_typical(scores: Tensor, text: Text, *, mass: float, filter_value: float, least: int) -> Tensor:
    """Tokens stay whose surprise is nearest to the expected one, until they reach the probability `mass`."""
    import torch

    surprise = -scores.log_softmax(dim=-1)
    expected = -(-surprise * torch.exp(-surprise)).nansum(-1, keepdim=True)
    distance, order = torch.sort((surprise - expected).abs(), descending=False)
    mass_so_far = cumulated(scores.gather(-1, order).softmax(dim=-1))
    last = (mass_so_far < mass).sum(dim=1, keepdim=True).clamp_(max=scores.shape[1] - 1)
    removed = distance > distance.gather(1, last)
    removed[..., :least].fill_(False)
    return scores.masked_fill(removed.scatter(1, order, removed), filter_value)


def _epsilon(processor: Any, frame: Frame) -> Translated:
    numbers = {
        "epsilon": processor.epsilon,
        "filter_value": processor.filter_value,
        "least": processor.min_tokens_to_keep,
    }
    return Step(keep_above_epsilon, numbers)


def keep_above_epsilon(scores: Tensor, text: Text, *, epsilon: float, filter_value: float, least: int) -> Tensor:
    """Tokens stay whose probability is at least `epsilon`, and the `least` highest."""
    removed = (scores.softmax(dim=-1) < epsilon) & _below_highest(scores, least)
    return scores.masked_fill(removed, filter_value)


def _eta(processor: Any, frame: Frame) -> Translated:
    numbers = {"filter_value": processor.filter_value, "least": processor.min_tokens_to_keep}
    return Step(keep_above_eta, numbers, {"epsilon": processor.epsilon.to(frame.device, copy=True)})


def keep_above_eta(scores: Tensor, text: Text, *, epsilon: Tensor, filter_value: float, least: int) -> Tensor:
    """The same with a threshold that falls with the entropy: ``min(epsilon, sqrt(epsilon) * exp(-entropy))``."""
    import torch

    eta = torch.min(epsilon, torch.sqrt(epsilon) * torch.exp(-_distribution(scores)[1]))[..., None]
    removed = (scores.softmax(dim=-1) < eta) & _below_highest(scores, least)
    return scores.masked_fill(removed, filter_value)


def _top_h(processor: Any, frame: Frame) -> Translated:
    numbers = {"top_n": processor.top_n, "top_h": processor.top_h, "filter_value": processor.filter_value}
    return Step(keep_top_h, numbers)


def keep_top_h(scores: Tensor, text: Text, *, top_n: int, top_h: float, filter_value: float) -> Tensor:
    """Of the `top_n` highest those stay that, in order, make up at most the share `top_h` of their entropy."""
    import torch

    values, order = torch.topk(scores, min(top_n, scores.shape[1]), dim=-1)
    probabilities, entropy = _distribution(values)
    so_far = torch.cumsum(-probabilities * torch.log(probabilities), dim=-1)
    kept = so_far <= (entropy * top_h)[:, None]
    kept[:, 0].fill_(True)
    removed = torch.ones_like(scores, dtype=torch.bool).scatter_(1, order, ~kept)
    return scores.masked_fill(removed, filter_value)


def _distribution(logits: Tensor) -> tuple[Tensor, Tensor]:
    """Probabilities [B, n] and entropy [B] as `torch.distributions.Categorical` has them, without its checks."""
    import torch

    logits = logits - logits.logsumexp(dim=-1, keepdim=True)
    probabilities = logits.softmax(dim=-1)
    return probabilities, -(logits.clamp(min=torch.finfo(logits.dtype).min) * probabilities).sum(-1)


def _below_highest(scores: Tensor, count: int) -> Tensor:
    """bool [B, V]: lower than the `count` highest."""
    if count == 1:
        return scores < scores.amax(dim=-1, keepdim=True)
    return scores < scores.topk(min(count, scores.shape[1]), dim=-1).values[:, -1:]


def cumulated(probabilities: Tensor) -> Tensor:
    """`cumsum` along the last dimension of [B, n], the same in every run.

    For a single long row on a GPU, torch's own has an order of additions that depends on timing.
    """
    rows, length = probabilities.shape
    if rows > 1 or length <= _SCAN_BLOCK or probabilities.device.type == "cpu":
        return probabilities.cumsum(dim=-1)
    return cumulated_in_blocks(probabilities)


def cumulated_in_blocks(row: Tensor) -> Tensor:
    """`cumsum` of [1, n] as that of many short rows, for which torch has a kernel with one order of additions."""
    import torch

    length = row.shape[1]
    blocks = torch.nn.functional.pad(row, (0, -length % _SCAN_BLOCK)).view(-1, _SCAN_BLOCK).cumsum(dim=-1)
    # The sums of the blocks before each, in the same way: as two equal rows.
    before = torch.nn.functional.pad(blocks[:-1, -1], (1, 0)).expand(2, -1).cumsum(dim=-1)[0]
    return (blocks + before[:, None]).view(1, -1)[:, :length]


WARPERS: dict[str, Callable[[Any, Frame], Translated]] = {
    "TemperatureLogitsWarper": _temperature,
    "TopKLogitsWarper": _top_k,
    "TopPLogitsWarper": _top_p,
    "MinPLogitsWarper": _min_p,
    "TypicalLogitsWarper": _typical,
    "EpsilonLogitsWarper": _epsilon,
    "EtaLogitsWarper": _eta,
    "TopHLogitsWarper": _top_h,
}
