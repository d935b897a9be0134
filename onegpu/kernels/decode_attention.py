"""Attention of one to eight new queries a sequence over a static cache: ``softmax(scale * q k^T + bias) v``.

q ``[B, H, T, D]``, k ``[B, H_kv, L, D]``, v ``[B, H_kv, L, D_v]``, lengths int32 ``[B]`` -> ``[B, H, T, D_v]``. Query t
of a sequence with n valid keys, the T new ones included, stands at position ``n - T + t`` and sees the keys up to its
own, from the first real one, within the window. Bound by the bytes of the keys and values that are seen.

On a GPU the keys of a sequence are split among programs, by the length read there, so that one CUDA graph serves every
length (Flash-Decoding: Dao et al. 2023). The query heads that share a key head, times T, are the rows of one tile, so
keys are read once. A second kernel adds the parts in a fixed order, in float32 (``decode_attention_triton``), or, where
they are few, the programs of a head do, which are a cluster (``decode_attention_cuda``).
"""

from __future__ import annotations

import functools
from typing import Any

import torch

from onegpu.errors import bad_argument
from onegpu.kernels import decode_attention_cuda
from onegpu.kernels.library import check_implementation, define, has_triton
from onegpu.kernels.warmup import register

MAX_QUERIES = 8
_MAX_SPLITS = 256
_SPLIT_KEYS = 8192  # a split has at most so many, that a long sequence in a batch of short ones is not one program's
FEWEST_KEYS = 128  # and at least so many: less is not worth a part


def _decode(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    length: torch.Tensor,
    first: torch.Tensor | None,
    scale: float,
    window: int,
    softcap: float,
    slopes: torch.Tensor | None,
    portable: bool = False,
) -> torch.Tensor:
    (b, h, t, _), (_, h_kv, keys, d_v) = q.shape, v.shape
    place = torch.arange(keys, device=q.device)
    at = length.view(b, 1) - t + torch.arange(t, device=q.device)  # [B, T]
    seen = (place <= at[..., None]) & (place < length.view(b, 1, 1))  # [B, T, L]
    if first is not None:
        seen &= place >= first.view(b, 1, 1)
    if window:
        seen &= place > at[..., None] - window
    dtype = torch.promote_types(q.dtype, torch.float32)
    rows = q.reshape(b, h_kv, h // h_kv * t, q.shape[-1]).to(dtype)  # [B, H_kv, G * T, D]
    scores = (rows @ k.to(dtype).mT).view(b, h, t, keys) * scale
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    if slopes is not None:
        scores += slopes.to(dtype).view(h, 1, 1) * (place - at[..., None]).view(b, 1, t, keys)
    scores = scores.masked_fill(~seen[:, None], float("-inf"))
    peak = scores.amax(-1, keepdim=True) if keys else scores.new_zeros(b, h, t, 1)
    weights = torch.exp(scores - peak.masked_fill(peak == float("-inf"), 0.0))
    # What no query of the sequence sees may be anything: never written, for one.
    values = v.to(dtype).masked_fill(~seen.any(1)[:, None, :, None], 0.0)
    summed = (weights.view(b, h_kv, h // h_kv * t, keys) @ values).view(b, h, t, d_v)
    total = weights.sum(-1, keepdim=True)
    out = _empty(q, d_v)
    return out.copy_(summed / total.masked_fill(total == 0, 1.0))


def _empty(q: torch.Tensor, d_v: int) -> torch.Tensor:
    """In memory ``[B, T, H, D_v]``: the layout that the output projection reads."""
    b, h, t, _ = q.shape
    return torch.empty_strided((b, h, t, d_v), (t * h * d_v, d_v, h * d_v, 1), dtype=q.dtype, device=q.device)


def _decode_cuda(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    length: torch.Tensor,
    first: torch.Tensor | None,
    scale: float,
    window: int,
    softcap: float,
    slopes: torch.Tensor | None,
    portable: bool = False,
) -> torch.Tensor:
    if not has_triton() or q.dtype == torch.float64:
        return _decode(q, k, v, length, first, scale, window, softcap, slopes)
    out = _empty(q, v.shape[-1])
    arguments = (q, k, v, length, first, scale, window, softcap, slopes, out)
    if out.numel() and (portable or not decode_attention_cuda.decode(*arguments)):
        _kernels().decode(*arguments)
    return out


@functools.cache
def _kernels() -> Any:
    from onegpu.kernels import decode_attention_triton

    return decode_attention_triton


def _decode_fake(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, length: torch.Tensor, *_: object) -> torch.Tensor:
    return _empty(q, v.shape[-1])


define(
    "decode_attention(Tensor q, Tensor k, Tensor v, Tensor length, Tensor? first, float scale, int window, "
    "float softcap, Tensor? slopes, bool portable=False) -> Tensor",
    _decode,
    _decode_fake,
    cuda=_decode_cuda,
)


def decode_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    length: torch.Tensor,
    *,
    first: torch.Tensor | None = None,
    scale: float | None = None,
    window: int = 0,
    softcap: float = 0.0,
    slopes: torch.Tensor | None = None,
    implementation: str = "auto",
) -> torch.Tensor:
    """Attend from a few new queries to a cache, causally, without a gradient and without a host synchronisation.

    Args:
        q: ``[B, H, T, D]``, T from 1 to 8, the dtype of k and v; last stride 1, as k and v.
        k: ``[B, H_kv, L, D]``: a cache with room for L keys, any other strides. H is a multiple of H_kv.
        v: ``[B, H_kv, L, D_v]``.
        length: int32 ``[B]``, valid keys of each sequence, its T new ones included; at most L.
        first: int32 ``[B]``, index of the first real key, where prompts are padded on the left.
        scale: of the scores; ``D ** -0.5`` by default.
        window: a query sees so many keys, itself included; 0 is all.
        softcap: scores become ``softcap * tanh(score / softcap)``; 0 is none.
        slopes: float32 ``[H]``, ALiBi: ``slope * (key - query)`` is added to a score.
        implementation: "auto", or "portable": on a GPU no kernel but Triton's, which run everywhere.

    Returns:
        ``[B, H, T, D_v]`` in the dtype of q, in memory ``[B, T, H, D_v]``. A query that sees no key gets zeros.

    Raises:
        ArgumentError: shapes or dtypes that do not go together. Lengths stay on the GPU and are not checked; a length
            past L counts as L.
    """
    (b, h, t, d), (_, h_kv, _, _) = q.shape, k.shape
    if not 1 <= t <= MAX_QUERIES:
        raise bad_argument("q", tuple(q.shape), f"has {t} queries a sequence", f"pass [B, H, 1 to {MAX_QUERIES}, D]")
    if k.shape != (b, h_kv, k.shape[2], d) or v.shape[:3] != k.shape[:3] or h_kv == 0 or h % h_kv:
        raise bad_argument(
            "k", tuple(k.shape), f"does not go with q {tuple(q.shape)} and v {tuple(v.shape)}", "pass [B, H_kv, L, D]"
        )
    if not q.dtype == k.dtype == v.dtype:
        raise bad_argument("k", k.dtype, f"is not the dtype of q and v, {q.dtype} and {v.dtype}", "convert one of them")
    for name, of_each in ({"length": length} | ({} if first is None else {"first": first})).items():
        if not isinstance(of_each, torch.Tensor):
            raise bad_argument(name, of_each, "is no tensor", f"pass int32 [{b}]")
        if of_each.shape != (b,) or of_each.dtype != torch.int32:
            found = f"is {of_each.dtype} {list(of_each.shape)}, not a whole number for each sequence"
            raise bad_argument(name, of_each, found, f"pass int32 [{b}]")
    if slopes is not None and slopes.shape != (h,):
        raise bad_argument("slopes", list(slopes.shape), "is not one slope for each query head", f"pass float32 [{h}]")
    if window < 0:
        raise bad_argument("window", window, "is no number of keys", "pass 0 for no limit")
    check_implementation(implementation)
    scale = d**-0.5 if scale is None else scale
    return torch.ops.onegpu.decode_attention.default(  # type: ignore[no-any-return]
        q, k, v, length, first, scale, window, softcap, slopes, implementation == "portable"
    )


@register("decode_attention")
def _warm(
    device: torch.device, dtype: torch.dtype, rows: int, heads: int, kv_heads: int, d: int, keys: int, window: int = 0
) -> None:
    q, k = (torch.zeros(rows, n, t, d, dtype=dtype, device=device) for n, t in ((heads, 1), (kv_heads, keys)))
    length = torch.ones(rows, dtype=torch.int32, device=device)
    decode_attention(q, k, k, length, first=length - 1, window=window)


def splits(programs: int, keys: int, sms: int) -> int:
    """Into how many parts the keys of a sequence are split: a program for each SM, or two where that leaves many idle.

    Args:
        programs: batch × key heads × row tiles; each becomes as many programs as there are splits.
        keys: the most keys that a query can see.
        sms: streaming multiprocessors.
    """
    one = sms // programs if sms >= programs else 1
    even = one if one * programs >= 0.9 * sms else 2 * sms // programs
    return max(1, min(max(even, -(-keys // _SPLIT_KEYS)), -(-keys // FEWEST_KEYS), _MAX_SPLITS))


def cost(b: int, h: int, h_kv: int, t: int, keys: int, d: int, d_v: int, itemsize: int) -> tuple[int, int]:
    """Bytes moved and FLOPs, where each of ``b`` sequences sees ``keys`` keys."""
    return (b * h_kv * keys + b * h * t) * (d + d_v) * itemsize, 2 * b * h * t * keys * (d + d_v)
