"""From scores to the next token of each row, and everything that the row keeps of it, in one or two launches.

`take` reads each score once: greedy, ``argmax_v s[v]``; drawn, ``argmax_v p[v] / q[v]`` with ``p = softmax(s / T)`` and
q from the exponential distribution with rate 1, which draws v with probability p[v]. Bound by bytes: 2 or 4 for a
score, and 4 for its q. `take_candidates` draws from a few candidates behind top-k, top-p and min-p: one launch.

Both then write what a decoding step needs: a finished row gets the pad token, a row with an EOS token is finished, the
token goes to the end of the row's text, and the row is one longer. In plain PyTorch that is nine launches.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch

from onegpu.kernels.library import define, has_triton
from onegpu.kernels.warmup import register

MOST_CANDIDATES = 1024


class Shape(NamedTuple):
    """What cuts candidates, in this order.

    Attributes:
        temperature: divides the scores.
        top_k: so many stay, and all that equal the last of them.
        top_p: the most probable that together reach this stay, at least `least_top_p`; 1: all.
        min_p: those with this share of the highest probability stay, at least `least_min_p`; 0: all.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    least_top_p: int = 1
    min_p: float = 0.0
    least_min_p: int = 1


class State(NamedTuple):
    """What a row is and becomes, all int64.

    Attributes:
        eos: [E], tokens that finish a row; E may be 0.
        pad: [], what finished rows get; None leaves their tokens as they come.
        out: [3, B], updated: the token; 1 once the row is finished; 1 once a probability was NaN.
        history: [B, L], updated: the token is written to column ``min(lengths[b], L - 1)``.
        lengths: [B], updated: 1 is added.
        shown: [N, 3, B], N a power of two, or None; updated: ``shown[lengths[b] % N, :, b]`` becomes what ``out`` is
            then. It may be memory of the host that the device has mapped.
    """

    eos: torch.Tensor
    pad: torch.Tensor | None
    out: torch.Tensor
    history: torch.Tensor
    lengths: torch.Tensor
    shown: torch.Tensor | None = None


_SHAPE = "float temperature, int top_k, float top_p, int least_top_p, float min_p, int least_min_p"
_STATE = "Tensor eos, Tensor? pad, Tensor(a!) out, Tensor(b!) history, Tensor(c!) lengths, Tensor(d!)? shown=None"


def _record(token: torch.Tensor, state: State) -> None:
    eos, pad, out, history, lengths, shown = state
    finished = out[1]
    if pad is not None:
        token = torch.where(finished != 0, pad, token)
    out[0].copy_(token)
    finished.logical_or_((token[:, None] == eos).any(dim=1))
    # A step may run past the end before the host has seen it: the last column takes that token.
    history.scatter_(1, lengths.clamp(max=history.shape[1] - 1)[:, None], token[:, None])
    if shown is not None:
        shown[lengths % len(shown), :, torch.arange(len(lengths), device=out.device)] = out.T
    lengths.add_(1)


def _race(scores: torch.Tensor, noise: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
    probabilities = scores.softmax(dim=-1)
    out[2].logical_or_(probabilities[:, 0].isnan())  # one NaN makes the whole row NaN
    return (probabilities / noise).argmax(dim=-1)


def _take(scores: torch.Tensor, noise: torch.Tensor | None, temperature: float, *flat: Any) -> None:
    state = State(*flat)
    if noise is None:
        token = scores.argmax(dim=-1)  # of 16-bit numbers: making them float32 changes no order
    else:
        scores = scores.float()
        token = _race(scores if temperature == 1 else scores / temperature, noise, state.out)
    _record(token, state)


def _take_candidates(values: torch.Tensor, ids: torch.Tensor, noise: torch.Tensor, *flat: Any) -> None:
    shape, state = Shape(*flat[:6]), State(*flat[6:])
    # Ascending, and among equals in the order of their ids: as a stable sort of the whole row would have them.
    ids, order = ids.sort(dim=-1)
    values, order = values.gather(1, order).float().sort(dim=-1, stable=True)
    ids = ids.gather(1, order)
    values = values / shape.temperature
    values = values.masked_fill(values < values[:, -shape.top_k, None], -math.inf)
    if shape.top_p < 1:
        removed = values.softmax(dim=-1).cumsum(dim=-1) <= 1 - shape.top_p
        removed[:, -shape.least_top_p :].fill_(False)
        values = values.masked_fill(removed, -math.inf)
    if shape.min_p > 0:
        probabilities = values.softmax(dim=-1)
        removed = probabilities < shape.min_p * probabilities[:, -1:]
        removed[:, -shape.least_min_p :].fill_(False)
        values = values.masked_fill(removed, -math.inf)
    place = _race(values, noise.gather(1, ids), state.out)
    _record(ids.gather(1, place[:, None])[:, 0], state)


def _take_cuda(scores: torch.Tensor, noise: torch.Tensor | None, temperature: float, *flat: Any) -> None:
    state = State(*flat)
    if not (has_triton() and scores.numel() and scores.stride(-1) == 1 and _contiguous(noise, *state)):
        return _take(scores, noise, temperature, *flat)
    from onegpu.kernels import next_token_triton

    next_token_triton.take(scores, noise, temperature, state)


def _take_candidates_cuda(values: torch.Tensor, ids: torch.Tensor, noise: torch.Tensor, *flat: Any) -> None:
    shape, state = Shape(*flat[:6]), State(*flat[6:])
    count = values.shape[1]
    serves = has_triton() and count & (count - 1) == 0 and count <= MOST_CANDIDATES
    if not (serves and values.numel() and _contiguous(values, ids, noise, *state)):
        return _take_candidates(values, ids, noise, *flat)
    from onegpu.kernels import next_token_triton

    next_token_triton.take_candidates(values, ids, noise, shape, state)


def _contiguous(*tensors: torch.Tensor | None) -> bool:
    return all(tensor is None or tensor.is_contiguous() for tensor in tensors)


def _nothing(*_: object) -> None:
    """The result's shape of an op that only writes into its arguments."""


define(f"take_token(Tensor scores, Tensor? noise, float temperature, {_STATE}) -> ()", _take, _nothing, _take_cuda)
define(
    f"take_token_of_candidates(Tensor values, Tensor ids, Tensor noise, {_SHAPE}, {_STATE}) -> ()",
    _take_candidates,
    _nothing,
    _take_candidates_cuda,
)


def take(scores: torch.Tensor, noise: torch.Tensor | None, temperature: float, state: State) -> None:
    """The next token of each row, among all scores.

    Args:
        scores: [B, V] of any float dtype.
        noise: float32 [B, V] from the exponential distribution with rate 1; None takes the highest score.
        temperature: divides the scores, where one is drawn.
        state: updated.
    """
    torch.ops.onegpu.take_token(scores, noise, temperature, *state)


def take_candidates(values: torch.Tensor, ids: torch.Tensor, noise: torch.Tensor, shape: Shape, state: State) -> None:
    """The next token of each row, drawn from its candidates behind temperature, top-k, top-p and min-p.

    Args:
        values: [B, K] of any float dtype, the K >= top_k >= 1 highest scores of each row, in any order.
        ids: int64 [B, K], their tokens.
        noise: as for `take`, [B, V]: a token's number is the same whether it is drawn here or there.
        shape: what cuts the candidates.
        state: updated.
    """
    torch.ops.onegpu.take_token_of_candidates(values, ids, noise, *shape, *state)


@register("next_token")
def _warm(device: torch.device, dtype: torch.dtype, rows: int, vocab: int, pads: bool) -> None:
    rows = min(rows, 8)  # one code for all

    def numbers(*shape: int) -> torch.Tensor:
        return torch.zeros(*shape, dtype=torch.int64, device=device)

    state = State(numbers(0), numbers(1)[0] if pads else None, numbers(3, rows), numbers(rows, 2), numbers(rows))
    take(torch.zeros(rows, vocab, device=device), None, 1.0, state)


def cost(rows: int, vocab: int, itemsize: int, drawn: bool) -> tuple[int, int]:
    """Bytes moved and FLOPs of `take`."""
    return rows * vocab * (itemsize + 4 * drawn), rows * vocab * (3 if drawn else 1)
