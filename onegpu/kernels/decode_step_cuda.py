"""Launches the kernels of decode_step_{input, product, attention, embed}.cu; the ops are in decode_step.py.

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
from onegpu.kernels.codebooks import dynamic_map
from onegpu.kernels.decode_step import ACTIVATIONS, Attended, Heads, Matrix, Norm, Part, Places, Stream
from onegpu.kernels.launch import CudaKernel, source_text

MAX_ROWS, MAX_GROUP, MAX_SPLITS = 8, 8, 8
_FORMATS = {"16bit": 0, "int8": 1, "nf4": 2, "fp4": 2}
_SINKS = {"store": 0, "add": 1, "gated": 2, "act": 3, "both": 3}
_NORMS = {None: 0, "rms": 1, "layer": 2}
_WHOLE = 232448  # bytes of shared memory that a block may have on Hopper
_ALONE = 116736  # of a Hopper SM's 228 KiB, less 1 KiB a block: no second block fits beside one that has this
_COMMON = {"NESTED": 0, "TABLE_SHIFT": 7, "CL": 1, "CLUSTERED": 0, "FP4": 0}


class Shape(NamedTuple):
    """How a product is laid out on an SM.

    warps: of a block. width: bytes of a row of W in a piece. slots: pieces in a warp's ring. table_shift: 8 makes the
    look-up table of 4-bit products twice as large and a look-up one instruction shorter. per_sm: blocks that the
    registers allow on an SM.
    """

    warps: int
    width: int
    slots: int
    table_shift: int = 7
    per_sm: int = 2

    def shared(self, form: str, rows: int, columns: int, nested: bool) -> int:
        """Bytes of shared memory, as the kernel divides it: table, map, x, sums, shares of the norm, rings."""
        fmt = _FORMATS[form]
        piece = (self.width // 2, self.width, 2 * self.width)[fmt]
        pitch = -(-(-(-columns // piece) * piece * 2) // 128) * 128 + (16 if fmt else 64)
        table = (256 << self.table_shift) + 1024 * nested if fmt == 2 else 0
        sums = 2 * _tiles(rows) * self.warps * 16 * rows * 4
        shares = (5 * rows * self.warps + self.warps + rows + 3) // 4 * 16
        ring = self.warps * self.slots * (16 * self.width + (piece if fmt == 2 else 0))
        return table + rows * pitch + sums + shares + ring


# The layout of each format: what measured best for Llama-2-7B's products on an H100 (docs/worklog.md). Fewer slots are
# taken where the rows of x leave no room.
LAYOUTS = {"16bit": Shape(16, 128, 4, 7, 1), "int8": Shape(16, 128, 3, 7, 1), "nf4": Shape(16, 128, 2, 8, 1),
           "fp4": Shape(16, 128, 2, 8, 1)}  # fmt: skip


@lru_cache(maxsize=256)
def shape(form: str, rows: int, columns: int, nested: bool) -> Shape | None:
    """The layout for a product; None if x does not fit into shared memory."""
    best = LAYOUTS[form]
    tried = [best._replace(slots=slots) for slots in range(best.slots, 1, -1)]
    for width in (64,) if _FORMATS[form] == 2 else (128, 64):
        tried += [Shape(8, width, slots) for slots in range(8, 1, -1)]
    return next((found for found in tried if found.shared(form, rows, columns, nested) <= _WHOLE), None)


def _tiles(rows: int) -> int:
    return max(1, 8 // rows)


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
    fixed: Shape | None = None,
) -> None:
    """One launch of decode_step_product.cu, whose head says what the sinks are."""
    stream, attended = (x if isinstance(x, Stream) else None), (x if isinstance(x, Attended) else None)
    read = x.h if isinstance(x, Stream) else x.values if isinstance(x, Attended) else x
    rows, columns = len(read), matrix.columns
    nested = matrix.parts[0].nested is not None
    found = fixed or shape(matrix.format, rows, columns, nested)
    if found is None:
        raise bad_argument(
            "rows", rows, f"is too many: x of {columns} columns does not fit into shared memory", "Use fewer rows"
        )
    dtype = stream.dtype if stream else read.dtype
    inner, outer, added, to = (stream.norm, stream.outer, stream.added, stream.to) if stream else (None,) * 4
    splits, size = (attended.sums.shape[2], attended.values.shape[3]) if attended else (1, 64)
    kernel = _kernel("product").variant(
        None, **_COMMON | {"NESTED": int(nested), "FP4": int(matrix.format == "fp4"), "TABLE_SHIFT": found.table_shift},
        FMT=_FORMATS[matrix.format], BF16=int(dtype == torch.bfloat16), M=rows, K=columns,
        WARPS=found.warps, SLOTS=found.slots, CB=found.width, PER_SM=found.per_sm, TG=_tiles(rows),
        SOURCE=0 if stream else 1 if attended else 2, NORM=_kind(inner),
        OUTER=0 if outer is None else 1 if added is None else 2, OUTER_NORM=_kind(outer),
        SINK=_SINKS[sink], SPLITS=splits, HD=size, ACT=ACTIVATIONS.index(act),
    )  # fmt: skip
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
    blocks = matrix.blocksize.bit_length() - 7  # log2 of how many 64 columns share a scale
    shared = max(found.shared(matrix.format, rows, columns, nested), _ALONE)
    numbers = [(0.0, 0.0) if norm is None else (norm.eps, norm.one) for norm in (inner, outer)]
    kernel(
        (multiprocessors(out.get_device()),), 32 * found.warps, shared,
        *pointers, table, *_weights(inner), *_weights(outer), read, attended.sums if attended else None, added, to, out,
        also, *counts, blocks, *numbers[0], *numbers[1], cap, pdl=pdl,
    )  # fmt: skip


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
    warps: int = 4,
    stages: int = 3,
) -> None:
    """One launch of decode_step_attention.cu."""
    size, rotated = heads.size, 0 if heads.inv_freq is None else 2 * heads.inv_freq.numel()
    group, wide = heads.query // heads.kv, -(-size // 32) * 32
    norms = 0 if heads.q_gain is None else 1 if heads.q_gain.numel() == size else 2
    kernel = _kernel("attention").variant(
        None, **_COMMON, FMT=0, BF16=int(keys.dtype == torch.bfloat16), HD=size, ALL=group,
        GQ=-(-group // chunks(heads)), HKV=heads.kv, SPLITS=out.values.shape[2], ROT=rotated, NORMS=norms,
        GROUPED=int(heads.grouped), CAP=int(heads.cap > 0), ALIBI=int(heads.slopes is not None),
        CLIP=int(heads.clip > 0), WARPS=warps, STAGES=stages,
    )  # fmt: skip
    if _collected(kernel):
        return
    shared = (warps * stages + 1) * 64 * wide + 16 * wide + 4 * warps * wide + 4 * max(rotated, 2) + 64 * warps
    shared = max(shared, _ALONE)
    length = keys.shape[2]
    kernel(
        (multiprocessors(qkv.get_device()),), 32 * warps, shared,
        qkv, position, rope_position, first, keys, values, heads.inv_freq, heads.q_gain, heads.k_gain, heads.slopes,
        *out,
        len(qkv), length, heads.window or length, int(position.numel() > 1), int(rope_position.numel() > 1),
        heads.scale, heads.rope_scale, heads.eps, heads.one, heads.cap, heads.clip, pdl=pdl,
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
        (len(h),), 256, 0, ids, table, position, spots, *_weights(norm), h, *lengths, h.shape[1],
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


_KERNELS = {"product": ("product", "P" * 26 + "iiiifffff"), "attention": ("attend", "P" * 12 + "iiiiiffffff"),
            "embed": ("embed", "PPPPPPPqqiiifff")}  # fmt: skip


def source(kind: str) -> str:
    """The whole text of a kernel of `_KERNELS`."""
    files = ["decode_step_input.cu"] * (kind == "product") + [f"decode_step_{kind}.cu"]
    return "".join(map(source_text, ["few_rows_common.cu", "decode_step_common.cu", *files]))


@lru_cache(maxsize=8)
def _kernel(kind: str) -> CudaKernel:
    name, arguments = _KERNELS[kind]
    return CudaKernel("decode_step", source(kind), name, arguments)
