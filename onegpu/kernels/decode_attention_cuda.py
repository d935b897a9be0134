"""Launches decode_attention.cu: up to eight rows, in 16 bits, on Hopper. What it does not serve, Triton's kernels do.

The blocks of a cluster share the keys of a head and put the output together, so that no second kernel follows. Half to
three quarters of the SMs are enough to read a cache of moderate length; of a long one they take longer than a second
kernel costs (docs/worklog.md).
"""

from __future__ import annotations

from functools import lru_cache
from importlib.util import find_spec

import torch

from onegpu.kernels.decode_step_layouts import ALONE
from onegpu.kernels.launch import CudaKernel, source_text

MAX_ROWS = 8
_CLUSTER = 8  # blocks at most; more are a matter of luck with the layout of the chip
_WARPS = 8  # of a block
_FEWEST_KEYS = 128  # that a block has
_COMMON = {"NESTED": 0, "TABLE_SHIFT": 7, "FP4": 0, "FMT": 0, "WARPS": _WARPS}


@lru_cache(maxsize=1024)
def blocks(heads: int, rows: int, d: int, d_v: int, keys: int, sms: int) -> int:
    """Of a cluster; 0: another kernel is faster, or this one cannot.

    ``heads``: batch × key heads; ``rows``: queries × heads of a group; ``keys``: most keys seen.
    """
    if rows > MAX_ROWS or d != d_v or d % 8 or not 0 < d <= 256 or not heads:
        return 0
    parts = -(-keys // _FEWEST_KEYS)  # as a power of two, that a cache which grows compiles few kernels
    few = min(_CLUSTER, max(2, sms * 3 // 4 // heads // 2 * 2), 1 << max(0, parts.bit_length() - 1))
    # Of a block: few blocks cannot read much, and a second kernel has more to add where there are many parts.
    most = 1024 if 5 * heads * few < 2 * sms else 4096 if few == _CLUSTER else 2048
    return few if few > 1 and heads * few <= sms and keys <= few * most else 0


def _stages(rows: int) -> int:
    """Steps of values in a warp's ring."""
    return 1 if rows == 1 else 2


def decode(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    length: torch.Tensor,
    first: torch.Tensor | None,
    scale: float,
    window: int,
    softcap: float,
    slopes: torch.Tensor | None,
    out: torch.Tensor,
) -> bool:
    """Arguments as of the op; ``out``: ``[B, H, T, D_v]`` with any strides but the last. Whether it was served."""
    (b, h, t, d), (_, h_kv, room, d_v) = q.shape, v.shape
    sms = _multiprocessors(q.get_device())
    group = h // h_kv
    few = blocks(b * h_kv, group * t, d, d_v, min(room, window + t - 1) if window else room, sms)
    if not few or not _aligned(q, k, v):
        return False
    kernel = _kernel(
        few, q.dtype == torch.bfloat16, d, t, group, first is not None, window > 0, softcap > 0, slopes is not None
    )
    kernel(
        (b * h_kv * few,), 32 * _WARPS, max(_shared(few, d, group * t), ALONE), q, k, v, length, first, slopes, out,
        *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *out.stride()[:3], h_kv, room, window,
        scale / softcap if softcap else scale, softcap, pdl=True, cluster=(few, 1, 1),
    )  # fmt: skip
    return True


def _aligned(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> bool:
    """16 bits a value, and rows begin at multiples of 16 bytes."""
    if q.dtype not in (torch.float16, torch.bfloat16) or (q.data_ptr() | k.data_ptr() | v.data_ptr()) & 15:
        return False
    (a, b, c, one), (d, e, f, two), (g, h, i, three) = q.stride(), k.stride(), v.stride()
    return one == two == three == 1 and not (a | b | c | d | e | f | g | h | i) & 7


@lru_cache(maxsize=64)
def _multiprocessors(device: int) -> int:
    """Of a Hopper GPU for which kernels can be compiled; else 0."""
    if device < 0 or find_spec("cuda") is None or torch.cuda.get_device_capability(device)[0] != 9:
        return 0
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


def _shared(few: int, d: int, rows: int) -> int:
    """Bytes of a block: rings, the warps' ends, what the others send, a barrier."""
    wide = -(-d // 32) * 32
    chunk = -(-rows * d // few)
    floats = _WARPS * 16 + (few * chunk + 1) // 2 * 2 + 2 * few * rows
    return _WARPS * _stages(rows) * (16 if d > 128 else 32) * wide * 2 + 4 * floats + 8


@lru_cache(maxsize=1024)
def _kernel(
    few: int, bf16: bool, d: int, t: int, group: int, first: bool, window: bool, softcap: bool, slopes: bool
) -> CudaKernel:
    constants = {"CL": few, "BF16": bf16, "HD": d, "QUERIES": t, "GROUP": group, "FIRST": first, "WINDOW": window}
    constants |= {"SOFTCAP": softcap, "SLOPES": slopes, "STAGES": _stages(t * group)}
    return _source().variant(None, **_COMMON, **{name: int(value) for name, value in constants.items()})


@lru_cache(maxsize=1)
def _source() -> CudaKernel:
    text = "".join(map(source_text, ["few_rows_common.cu", "decode_step_common.cu", "decode_attention.cu"]))
    return CudaKernel("decode_attention", text, "decode", "P" * 7 + "q" * 12 + "iii" + "ff")
