"""The kernels of one decoding step: a layer is five of them, each with what stands before and after its product.

For ``rows`` sequences of one new token each, with the residual stream ``h`` float32 ``[rows, D]``, in Llama's order:

    embed    h = table[ids]
    product  qkv = norm(h) Wqkv^T + b                          float32 [rows, (HQ + 2 HKV) HD]     "store"
    attend   head norms, rotary embedding, cache write, and the attention over `splits` parts of the keys
    product  h += (the parts put together) Wo^T + b            "add"
    product  a = act(norm(h) Wgate^T) * (norm(h) Wup^T)        16-bit [rows, F]                    "gated"
    product  h += a Wdown^T + b                                "add"
    product  logits = norm(h) Whead^T                          float32 [rows, V]                   "store"

Other orders are made of the same: a norm behind a product (its output is stored, and the next product's `Stream` adds
it), behind the residual sum, an MLP without a gate ("act"), attention and MLP of one input ("both").

Bound by the bytes of the weights and of the cache, each read once. Outputs are written into tensors that the caller
passes, so that a whole step allocates a handful of tensors; `h` is changed in place. No op here has a gradient,
none is registered with torch: a step runs inside a captured CUDA graph (`onegpu.engine.fused_step`).

On a CPU the definitions below run. On a GPU `decode_step_cuda.py` launches the kernels of decode_step_product.cu and
decode_step_attention.cu, each of which may start before the one in front has ended (programmatic dependent launch).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

from onegpu.kernels.linear_4bit import Packed4bit
from onegpu.kernels.quant_int8 import dequantize_rows

ACTIVATIONS = ("silu", "gelu_tanh", "gelu", "relu")


class Part(NamedTuple):
    """Rows of a matrix as they are stored.

    weight: 16-bit or float32 ``[N, K]`` (``[K, N]`` in a transposed matrix), int8 ``[N, K]``, or packed codes
    ``[N * K / 2, 1]``. scales: None; the row maxima float32 ``[N]``; float32 ``[N * K / blocksize]``, or uint8 codes of
    them if `nested` (float32, one per 256) and `offset` (float32 scalar) are set. bias: ``[N]`` in the activations'
    dtype.
    """

    rows: int
    weight: torch.Tensor
    bias: torch.Tensor | None = None
    scales: torch.Tensor | None = None
    nested: torch.Tensor | None = None
    offset: torch.Tensor | None = None


class Matrix(NamedTuple):
    """Up to three parts below one another, which share K and the format: "16bit", "int8", "nf4" or "fp4".

    transposed: one part of 16 bits that is stored as ``[K, N]``.
    """

    format: str
    columns: int
    parts: tuple[Part, ...]
    blocksize: int = 64
    transposed: bool = False

    @property
    def rows(self) -> int:
        """N, of all parts."""
        return sum(part.rows for part in self.parts)

    def dense(self) -> torch.Tensor:
        """float32 ``[N, K]``."""
        return torch.cat([self._dense(part) for part in self.parts])

    def multiply(self, x: torch.Tensor) -> torch.Tensor:
        """float32 ``x W^T + b`` of x float32 ``[rows, K]``."""
        biases = [torch.zeros(part.rows, device=x.device) if part.bias is None else part.bias for part in self.parts]
        return F.linear(x, self.dense(), torch.cat([bias.float() for bias in biases]))

    def _dense(self, part: Part) -> torch.Tensor:
        if self.format == "16bit":
            return part.weight.float().t() if self.transposed else part.weight.float()
        assert part.scales is not None
        if self.format == "int8":
            return dequantize_rows(part.weight, part.scales, torch.float32)
        packed = Packed4bit(part.weight, part.scales, self.blocksize, self.format, (part.rows, self.columns))
        return packed._replace(nested_absmax=part.nested, offset=part.offset).dequantize(torch.float32)


class Norm(NamedTuple):
    """``x / sqrt(mean(x^2) + eps) * (gain + one)`` ("rms"); of x less its mean, and with a bias ("layer")."""

    kind: str
    gain: torch.Tensor | None
    eps: float
    bias: torch.Tensor | None = None
    one: float = 0.0

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """In float32."""
        x = x.float()
        if self.kind == "layer":
            x = x - x.mean(-1, keepdim=True)
        x = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps)
        x = x if self.gain is None else x * (self.gain.float() + self.one)
        return x if self.bias is None else x + self.bias.float()


class Stream(NamedTuple):
    """What a product reads of the residual stream s: norm(s).

    s is h, float32 ``[rows, D]``; or h + outer(added), of a product before (float32 ``[rows, D]``); or outer(h). In the
    last two cases s is written into `to`, if it is given: not h, which is still being read. dtype: of the product's x.
    """

    h: torch.Tensor
    dtype: torch.dtype
    norm: Norm | None = None
    added: torch.Tensor | None = None
    outer: Norm | None = None
    to: torch.Tensor | None = None


class Places(NamedTuple):
    """Learned positions ``[P, D]``; position int64 ``[1]`` or ``[rows, 1]``, of row position + offset of the table."""

    table: torch.Tensor
    position: torch.Tensor
    offset: int = 0


class Heads(NamedTuple):
    """What a layer's attention is made of.

    query, kv: heads; size: HD. scale: of the scores. window: how many keys back a token sees, itself among them, or
    None. inv_freq: float32 ``[rotated / 2]`` of the rotary embedding, None for none; rope_scale: what its sines and
    cosines are multiplied by. q_gain, k_gain: ``[HD]`` of the head norms, or ``[HQ HD]`` and ``[HKV HD]`` of norms over
    all heads, with their epsilon and what is added to the gains, or None. cap: scores are ``cap tanh(score / cap)``.
    slopes: float32 ``[HQ]`` (ALiBi): less slope times how far back a key is; if rounded, plus slope times how many keys
    of the row are in front of it, in the cache's dtype, to which the sum with the score is rounded too (BLOOM). clip:
    queries, keys and values are cut off at it; 0 for no cap, no clip. grouped: in qkv stand for each key head its
    queries, the key and the value, else all queries, all keys, all values.
    """

    query: int
    kv: int
    size: int
    scale: float
    window: int | None = None
    inv_freq: torch.Tensor | None = None
    rope_scale: float = 1.0
    q_gain: torch.Tensor | None = None
    k_gain: torch.Tensor | None = None
    eps: float = 0.0
    one: float = 0.0
    cap: float = 0.0
    slopes: torch.Tensor | None = None
    clip: float = 0.0
    grouped: bool = False
    rounded: bool = False

    @property
    def width(self) -> int:
        """Columns of qkv."""
        return (self.query + 2 * self.kv) * self.size


class Attended(NamedTuple):
    """The attention's output in parts: values in the model's dtype ``[rows, HQ, splits, HD]``, and of each part the
    maximum (of scores times log2 e) and the sum of exponentials, float32 ``[rows, HQ, splits, 2]``."""

    values: torch.Tensor
    sums: torch.Tensor


def embed(
    ids: torch.Tensor,
    table: torch.Tensor | None,
    h: torch.Tensor,
    scale: float = 1.0,
    places: Places | None = None,
    norm: Norm | None = None,
    pdl: bool = True,
) -> None:
    """h ``[rows, D]`` = norm(table ``[V, D]`` at ids int64 ``[rows]``, times scale, plus the places)."""
    if _on_gpu(h):
        _cuda().embed(ids, table, h, scale, places, norm, pdl)
        return
    h.zero_()
    if table is not None:
        h.add_(F.embedding(ids, table), alpha=scale)
    if places is not None:
        h.add_(F.embedding(places.position.view(-1) + places.offset, places.table))
    if norm is not None:
        h.copy_(norm(h))


def product(
    x: Stream | Attended | torch.Tensor,
    matrix: Matrix,
    sink: str,
    out: torch.Tensor,
    *,
    act: str = "silu",
    also: torch.Tensor | None = None,
    cap: float = 0.0,
    pdl: bool = True,
) -> None:
    """y = x W^T + b, and what becomes of it.

    Args:
        x: the stream, the attention's output, or ``[rows, K]`` in the model's dtype.
        sink: "store": out float32 ``[rows, N]`` is y, or cap tanh(y / cap). "add": out has y added. "gated": out
            ``[rows, N / 2]`` in the model's dtype is act(gate) * up. "act": out ``[rows, N]`` is act(y). "both": out
            float32 is the y of the matrix's first part; also, in the model's dtype, act of the second's.
        act: of `ACTIVATIONS`.
    """
    if _on_gpu(out):
        _cuda().product(x, matrix, sink, out, act=act, also=also, cap=cap, pdl=pdl)
        return
    y = matrix.multiply(_entered(x))
    if sink == "add":
        out.add_(y)
    elif sink == "gated":
        gate, up = y.chunk(2, dim=-1)
        out.copy_(activation(act, gate) * up)
    elif sink == "act":
        out.copy_(activation(act, y))
    elif sink == "both":
        assert also is not None
        out.copy_(y[:, : out.shape[1]])
        also.copy_(activation(act, y[:, out.shape[1] :]))
    else:
        out.copy_(cap * torch.tanh(y / cap) if cap else y)


def _entered(x: Stream | Attended | torch.Tensor) -> torch.Tensor:
    if isinstance(x, torch.Tensor):
        return x.float()
    if isinstance(x, Attended):
        return combine(x)
    s = x.h
    if x.outer is not None:
        s = x.outer(s) if x.added is None else s + x.outer(x.added)
        if x.to is not None:
            x.to.copy_(s)
    return s if x.norm is None else x.norm(s)


def attend(
    qkv: torch.Tensor,
    heads: Heads,
    keys: torch.Tensor,
    values: torch.Tensor,
    position: torch.Tensor,
    rope_position: torch.Tensor,
    first: torch.Tensor | None,
    out: Attended,
    pdl: bool = True,
) -> None:
    """One query a row against the cache and its own key, which is written into the cache.

    Args:
        qkv: float32 ``[rows, (HQ + 2 HKV) HD]``.
        keys, values: ``[rows, HKV, L, HD]``, contiguous, in the model's dtype; the token at position p stands in slot
            p % L. The kernel in front must not be the one that writes what they hold, or `position` or `first`.
        position: int64 ``[1]`` or ``[rows]``: of the new token in the cache. rope_position: the same for the rotary
            embedding.
        first: int32 ``[rows]``: the first position that a row sees (left padding), or None.
        out: overwritten.
    """
    if _on_gpu(qkv):
        _cuda().attend(qkv, heads, keys, values, position, rope_position, first, out, pdl)
        return
    rows, length = qkv.shape[0], keys.shape[2]
    q, k, v = new_heads(qkv, heads, rope_position)
    q = q.to(keys.dtype).float()
    now = position.expand(rows)
    slot = now % length
    each = torch.arange(rows)
    keys[each, :, slot], values[each, :, slot] = k.to(keys.dtype), v.to(values.dtype)
    ago = (slot[:, None] - torch.arange(length)) % length
    begin = 0 if first is None else first[:, None]
    seen = (ago <= now[:, None] - begin) & (ago < (heads.window or length)) | (ago == 0)
    group = heads.query // heads.kv
    k, v = (t.float().masked_fill(~seen[:, None, :, None], 0.0).repeat_interleave(group, 1) for t in (keys, values))
    scores = torch.einsum("bhd,bhjd->bhj", q, k) * heads.scale
    if heads.cap:
        scores = heads.cap * torch.tanh(scores / heads.cap)
    if heads.slopes is not None:
        if heads.rounded:
            place = torch.as_tensor(now[:, None] - begin) - ago
            bias = (heads.slopes[:, None] * place[:, None]).to(keys.dtype)
            scores = (scores + bias.float()).to(keys.dtype).float()
        else:
            scores = scores - heads.slopes[:, None] * ago[:, None]
    scores = scores.masked_fill(~seen[:, None], float("-inf"))
    out.values.zero_()
    out.values[:, :, 0] = torch.einsum("bhj,bhjd->bhd", scores.softmax(-1), v).to(out.values.dtype)
    out.sums.copy_(out.sums.new_tensor([float("-inf"), 0.0]))
    out.sums[:, :, 0] = out.sums.new_tensor([0.0, 1.0])


def new_heads(
    qkv: torch.Tensor, heads: Heads, rope_position: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Queries, keys and values ``[rows, H, HD]`` in float32, after head norms and the rotary embedding."""
    if heads.clip:
        qkv = qkv.clamp(-heads.clip, heads.clip)
    rows, group = len(qkv), heads.query // heads.kv
    if heads.grouped:
        parts = qkv.view(rows, heads.kv, group + 2, heads.size).split([group, 1, 1], 2)
    else:
        parts = qkv.split([n * heads.size for n in (heads.query, heads.kv, heads.kv)], -1)
    q, k, v = (part.reshape(rows, -1, heads.size) for part in parts)
    if heads.q_gain is not None and heads.k_gain is not None:
        q, k = (
            Norm("rms", gain, heads.eps, one=heads.one)(x.reshape(rows, -1, gain.numel())).view(x.shape)
            for x, gain in ((q, heads.q_gain), (k, heads.k_gain))
        )
    if heads.inv_freq is not None:
        angle = rope_position.view(-1, 1).float() * heads.inv_freq
        cos, sin = (wave.repeat(1, 2)[:, None] * heads.rope_scale for wave in (angle.cos(), angle.sin()))
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
    return q, k, v


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """The rotary embedding of the first values of each head, in halves; the rest passes."""
    turned, rest = x[..., : cos.shape[-1]], x[..., cos.shape[-1] :]
    a, b = turned.chunk(2, dim=-1)
    return torch.cat([turned * cos + torch.cat([-b, a], -1) * sin, rest], -1)


def combine(attended: Attended) -> torch.Tensor:
    """float32 ``[rows, HQ * HD]`` of the parts."""
    top, total = attended.sums.unbind(-1)
    weight = torch.exp2(top - top.amax(-1, keepdim=True)) * total
    whole = (attended.values.float() * weight[..., None]).sum(2) / weight.sum(-1, keepdim=True)
    return whole.flatten(1)


def activation(name: str, x: torch.Tensor) -> torch.Tensor:
    """One of `ACTIVATIONS`."""
    if name in ("silu", "relu"):
        return F.silu(x) if name == "silu" else F.relu(x)
    return F.gelu(x, approximate="tanh" if name == "gelu_tanh" else "none")


def cost(matrix: Matrix, rows: int) -> tuple[int, int]:
    """Bytes read and FLOPs of a product: weights and scales; activations are small beside them."""
    tensors = [t for part in matrix.parts for t in (part.weight, part.scales, part.nested) if t is not None]
    return sum(t.numel() * t.element_size() for t in tensors), 2 * rows * matrix.rows * matrix.columns


def _on_gpu(tensor: torch.Tensor) -> bool:
    return tensor.is_cuda


def _cuda() -> Any:
    from onegpu.kernels import decode_step_cuda

    return decode_step_cuda
