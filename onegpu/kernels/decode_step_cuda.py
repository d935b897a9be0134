"""Launches decode_step_{input, product, held, bulk, transposed, attention, embed}.cu; the ops are in decode_step.py.

A block an SM, in every kernel of the chain, and more than half of an SM's shared memory for each: where two blocks fit,
blocks of a kernel that starts early gather on the SMs that are free first, and the others idle (measured on an H100:
5.3 instead of 2.1 ms a step with nf4 weights).
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from functools import lru_cache
from typing import NamedTuple

import torch

from onegpu.errors import bad_argument
from onegpu.kernels import decode_step_stream
from onegpu.kernels.codebooks import dynamic_map
from onegpu.kernels.decode_step import ACTIVATIONS, Attended, Heads, Matrix, Norm, Part, Places, Stream
from onegpu.kernels.decode_step_layouts import ALONE, FORMATS, WHOLE, Bulk, Held, Shape, blocks, bulk, held, shape
from onegpu.kernels.launch import CudaKernel, source_text

MAX_ROWS, MAX_GROUP, MAX_SPLITS = 16, 8, 8
_SINKS = {"store": 0, "add": 1, "gated": 2, "act": 3, "both": 3}
_NORMS = {None: 0, "rms": 1, "layer": 2}
_COMMON = {"NESTED": 0, "TABLE_SHIFT": 7, "CL": 1, "FP4": 0}


def fits(matrix: Matrix, rows: int) -> bool:
    """Whether a product has room for x in shared memory."""
    if matrix.transposed:
        return len(matrix.parts) == 1 and matrix.rows % _STRIP == 0 and _room(rows, matrix.columns) <= WHOLE
    return _shape(matrix, rows) is not None


def _shape(matrix: Matrix, rows: int) -> Shape | None:
    return shape(matrix.format, rows, matrix.columns, matrix.parts[0].nested is not None, matrix.rows)


_STRIP, _WARPS = 32, 16  # of decode_step_transposed.cu


def _room(rows: int, columns: int) -> int:
    """Bytes of shared memory of decode_step_transposed.cu: x, sums, shares of the norm."""
    pitch = -(-columns * 2 // 128) * 128 + 64
    return rows * pitch + 4 * (_WARPS * _STRIP * rows + (5 * rows + 1) * _WARPS + rows)


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
    fixed: Shape | Held | Bulk | None = None,
) -> None:
    """One launch of decode_step_product.cu, whose head says what the sinks are, or of one that serves in its place."""
    rows, columns = len(out), matrix.columns
    nested = matrix.parts[0].nested is not None
    streamed = None if fixed else decode_step_stream.plan(x, matrix, sink, rows)
    if streamed:
        if not _collected(streamed.kernel):
            decode_step_stream.launch(streamed, matrix, out, dynamic_map(out.device) if nested else None, pdl)
        return
    found = fixed or (None if matrix.transposed else _own(x, matrix, out) or _shape(matrix, rows))
    if not (fits(matrix, rows) if matrix.transposed else found):
        raise bad_argument(
            "rows", rows, f"is too many: x of {columns} columns does not fit into shared memory", "Use fewer rows"
        )
    if found is None:
        _transposed(x, matrix, sink, out, act, pdl)
        return
    read = _read(x)
    constants = _COMMON | read.constants | {
        "NESTED": int(nested), "FP4": int(matrix.format == "fp4"),
        "FMT": FORMATS[matrix.format], "M": rows, "K": columns, "SINK": _SINKS[sink], "ACT": ACTIVATIONS.index(act),
    }  # fmt: skip
    sms = multiprocessors(out.get_device())
    if isinstance(found, Held):
        of_size = (columns, matrix.rows, sms)
        kernel = _kernel("held").variant(None, **constants | found.constants(*of_size))
        warps, cluster, grid = found.warps, found.cluster, blocks(sms, found.cluster)
        shared = found.shared(rows, *of_size, isinstance(x, torch.Tensor))
    elif isinstance(found, Bulk):
        kernel = _kernel("bulk").variant(None, **constants | found.constants, SHARE=columns)
        warps, cluster, grid = found.warps, 1, sms
        shared = found.shared(columns, matrix.rows, sms, isinstance(x, torch.Tensor))
    else:
        whole = FORMATS[matrix.format] == 2 and not nested and matrix.blocksize == 64 and columns % 256 == 0
        whole = whole and not any(part.scales.data_ptr() % 16 for part in matrix.parts if part.scales is not None)
        kernel = _kernel("product").variant(
            None, **constants | {"CL": found.cluster, "TABLE_SHIFT": found.table_shift},
            SHARE=found.share(matrix.format, columns), WARPS=found.all_warps, FETCHERS=found.fetchers,
            SLOTS=found.slots, CB=found.width, TG=found.group(rows), OWN=int(found.own),
            BULK=int(whole and not found.own),
        )  # fmt: skip
        warps, cluster, grid = found.all_warps, found.cluster, blocks(sms, found.cluster)
        shared = found.shared(matrix.format, rows, columns, nested)
    if _collected(kernel):
        return
    parts: list[Part | None] = [*matrix.parts]
    if sink == "act":
        parts, also = [None, *parts], out
    parts += [None] * (3 - len(parts))
    pointers = [
        None if part is None else getattr(part, name)
        for name in ("weight", "scales", "nested", "offset", "bias")
        for part in parts
    ]
    table = dynamic_map(out.device) if nested else None
    counts = [0 if part is None else part.rows for part in parts]
    shift = matrix.blocksize.bit_length() - 7  # log2 of how many 64 columns share a scale
    if isinstance(found, Bulk):
        shift = (counts[0] if sink == "gated" else matrix.rows) // grid  # rows of a block, instead
    kernel(
        (grid,), 32 * warps, max(shared, ALONE), *pointers, table, *read.tensors, out, also, *counts, shift,
        *read.numbers, cap, pdl=pdl, cluster=(cluster, 1, 1),
    )  # fmt: skip


def _held(x: Stream | Attended | torch.Tensor, matrix: Matrix, rows: int, device: int) -> Held | None:
    """The layout of decode_step_held.cu, if it serves."""
    plain = FORMATS[matrix.format] == 2 and matrix.parts[0].nested is None and matrix.blocksize == 64
    aligned = 4 if matrix.columns % 256 else 16
    if not plain or any(part.scales is None or part.scales.data_ptr() % aligned for part in matrix.parts):
        return None
    parts = tuple(part.rows for part in matrix.parts)
    return held(rows, matrix.columns, parts, multiprocessors(device), isinstance(x, torch.Tensor))


def _own(x: Stream | Attended | torch.Tensor, matrix: Matrix, out: torch.Tensor) -> Held | Bulk | None:
    """The layout of a kernel for few rows of one format."""
    one_row = len(out) == 1 and matrix.format == "int8"
    return _bulk(x, matrix, out) if one_row else _held(x, matrix, len(out), out.get_device())


def _bulk(x: Stream | Attended | torch.Tensor, matrix: Matrix, out: torch.Tensor) -> Bulk | None:
    """The layout of decode_step_bulk.cu, if it serves."""
    if any(part.weight.data_ptr() % 16 for part in matrix.parts):
        return None
    return bulk(matrix.columns, matrix.rows, multiprocessors(out.get_device()), isinstance(x, torch.Tensor))


def _transposed(
    x: Stream | Attended | torch.Tensor,
    matrix: Matrix,
    sink: str,
    out: torch.Tensor,
    act: str,
    pdl: bool,
) -> None:
    """One launch of decode_step_transposed.cu."""
    read, rows, columns = _read(x), len(out), matrix.columns
    kernel = _kernel("transposed").variant(
        None, **_COMMON, FMT=0, CB=64, M=rows, K=columns, SHARE=columns, WARPS=_WARPS, SINK=_SINKS[sink],
        ACT=ACTIVATIONS.index(act), **read.constants,
    )  # fmt: skip
    if _collected(kernel):
        return
    kernel(
        (multiprocessors(out.get_device()),), 32 * _WARPS, max(_room(rows, columns), ALONE), matrix.parts[0].weight,
        matrix.parts[0].bias, *read.tensors, out, matrix.rows, *read.numbers, pdl=pdl,
    )  # fmt: skip


class _Read(NamedTuple):
    """What decode_step_input.cu is told of x: macros, pointers, and of each norm the epsilon and what gains lack."""

    constants: dict[str, int]
    tensors: tuple[torch.Tensor | None, ...]
    numbers: tuple[float, ...]


def _read(x: Stream | Attended | torch.Tensor) -> _Read:
    if isinstance(x, Stream):
        outer = 0 if x.outer is None else 1 if x.added is None else 2
        constants = {"SOURCE": 0, "NORM": _kind(x.norm), "OUTER": outer, "OUTER_NORM": _kind(x.outer)}
        norms = [(0.0, 0.0) if norm is None else (norm.eps, norm.one) for norm in (x.norm, x.outer)]
        numbers, bf16 = (*norms[0], *norms[1]), x.dtype == torch.bfloat16
        tensors = (*_weights(x.norm), *_weights(x.outer), x.h, None, x.added, x.to)
        return _Read(constants | {"SPLITS": 1, "HD": 64, "BF16": int(bf16)}, tensors, numbers)
    if isinstance(x, Attended) and x.sums.shape[2] == 1:  # nothing to put together
        x = x.values.flatten(1)
    values, sums = (x.values, x.sums) if isinstance(x, Attended) else (x, None)
    splits, size = (x.sums.shape[2], x.values.shape[3]) if isinstance(x, Attended) else (1, 64)
    constants = {"SOURCE": 2 if sums is None else 1, "NORM": 0, "OUTER": 0, "OUTER_NORM": 0, "SPLITS": splits}
    constants |= {"HD": size, "BF16": int(values.dtype == torch.bfloat16)}
    return _Read(constants, (None,) * 4 + (values, sums, None, None), (0.0,) * 4)


def _kind(norm: Norm | None) -> int:
    return _NORMS[None if norm is None else norm.kind]


def _weights(norm: Norm | None) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    return (None, None) if norm is None else (norm.gain, norm.bias)


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
    warps: int | None = None,
    stages: int | None = None,
    groups: int | None = None,
) -> None:
    """One launch of decode_step_attention.cu."""
    size, rotated = heads.size, 0 if heads.inv_freq is None else 2 * heads.inv_freq.numel()
    group, wide = heads.query // heads.kv, -(-size // 32) * 32
    together = -(-group // chunks(heads))
    sms, length = multiprocessors(qkv.get_device()), keys.shape[2]
    parts = out.values.shape[2]
    items = len(qkv) * heads.kv * chunks(heads) * parts
    # Where blocks take several heads, two groups of warps have one each on its way; else a block is one group, of eight
    # warps where each has many keys: by the room of the cache, in which a step finds no more (docs/worklog.md).
    groups = groups or (2 if items > sms else 1)
    warps = warps or (4 if groups > 1 or size > 128 or (group == 1 and length < 256 * parts) else 8)
    stages = stages or (1 if group == 1 and warps == 8 and length <= 512 * parts else 2)
    floats = wide * (bool(rotated % 64) + together) * warps + max(rotated, 2) + 16 * (warps + 1)
    shared = warps * stages * (16 if size > 128 else 32) * 2 * wide + 2 * wide * (together + 2) + 4 * floats
    shared = groups * (-(-shared // 128) * 128)
    norms = 0 if heads.q_gain is None else 1 if heads.q_gain.numel() == size else 2
    kernel = _kernel("attention").variant(
        None, **_COMMON, FMT=0, BF16=int(keys.dtype == torch.bfloat16), HD=size, ALL=group,
        GQ=together, HKV=heads.kv, SPLITS=parts, ROT=rotated, NORMS=norms,
        GROUPED=int(heads.grouped), CAP=int(heads.cap > 0), ALIBI=0 if heads.slopes is None else 1 + heads.rounded,
        CLIP=int(heads.clip > 0), WARPS=warps, STAGES=stages, GROUPS=groups,
    )  # fmt: skip
    if _collected(kernel):
        return
    kernel(
        (sms,), 32 * warps * groups, max(shared, ALONE),
        qkv, position, rope_position, first, keys, values, heads.inv_freq, heads.q_gain, heads.k_gain, heads.slopes,
        *out, len(qkv), length, heads.window or length, int(position.numel() > 1),
        int(rope_position.numel() > 1), heads.scale, heads.rope_scale, heads.eps, heads.one, heads.cap, heads.clip,
        pdl=pdl,
    )  # fmt: skip


def embed(
    ids: torch.Tensor,
    table: torch.Tensor | None,
    h: torch.Tensor,
    scale: float = 1.0,
    places: Places | None = None,
    norm: Norm | None = None,
    pdl: bool = True,
) -> None:
    """One launch of decode_step_embed.cu."""
    one = table if table is not None else places.table if places is not None else h
    kernel = _kernel("embed").variant(None, **_COMMON, FMT=0, BF16=int(one.dtype == torch.bfloat16), NORM=_kind(norm))
    if _collected(kernel):
        return
    spots, position, offset = (places.table, places.position, places.offset) if places else (None, None, 0)
    lengths = [0 if t is None else len(t) for t in (table, spots)]
    kernel(
        (len(h),), 512, 0, ids, table, position, spots, *_weights(norm), h, *lengths, h.shape[1],
        int(position is not None and position.numel() > 1), offset, scale, norm.eps if norm else 0.0,
        norm.one if norm else 0.0, pdl=pdl,
    )  # fmt: skip


def chunks(heads: Heads) -> int:
    """How often the keys of a head are read: by up to 8 query heads at a time."""
    return -(-heads.query // (heads.kv * MAX_GROUP))


def splits(device: int, rows: int, kv_heads: int) -> int:
    """Into how many parts the keys of a head are cut."""
    return min(MAX_SPLITS, max(1, multiprocessors(device) // (rows * kv_heads)))


@lru_cache(maxsize=64)
def multiprocessors(device: int) -> int:
    """Of a CUDA device."""
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


class _Collecting(threading.local):
    kernels: list[CudaKernel] | None = None


_collecting = _Collecting()


@contextlib.contextmanager
def collecting() -> Iterator[list[CudaKernel]]:
    """Inside, in this thread, nothing is launched: the list holds what would be."""
    kernels: list[CudaKernel] = []
    _collecting.kernels = kernels
    try:
        yield kernels
    finally:
        _collecting.kernels = None


def _collected(kernel: CudaKernel) -> bool:
    if _collecting.kernels is None:
        return False
    _collecting.kernels.append(kernel)
    return True


_KERNELS = {
    "product": ("product", "P" * 26 + "i" * 4 + "fffff"),
    "held": ("product", "P" * 26 + "i" * 4 + "fffff"),
    "bulk": ("product", "P" * 26 + "i" * 4 + "fffff"),
    "transposed": ("transposed_product", "P" * 11 + "i" + "ffff"),
    "attention": ("attend", "P" * 12 + "i" * 5 + "ffffff"),
    "embed": ("embed", "PPPPPPPqqiiifff"),
}


def source(kind: str) -> str:
    """The whole text of a kernel of `_KERNELS`."""
    files = ["decode_step_input.cu"] * (kind not in ("attention", "embed")) + [f"decode_step_{kind}.cu"]
    return "".join(map(source_text, ["few_rows_common.cu", "decode_step_common.cu", *files]))


@lru_cache(maxsize=8)
def _kernel(kind: str) -> CudaKernel:
    name, arguments = _KERNELS[kind]
    return CudaKernel("decode_step", source(kind), name, arguments)
