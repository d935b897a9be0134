"""A decoding step in five kernels a layer, instead of the model's own forward.

``plan(model)`` says whether a model has one: a decoder of embedding, equal layers and head, whose layers are made of
norms, attention and an MLP in one of the orders of `onegpu.engine.fused_layers`. It looks at what the modules are made
of, never at names of models, and asks the small functions that it replaces (norm, activation, rotary embedding, the
layer's own order) for a few values; anything that it does not know makes it decline, with the reason. What follows from
a wrong guess is caught once more: the engine compares the first step with an ordinary one.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import torch

from onegpu.engine.fused_structure import PARALLEL, SEQUENTIAL, Declined, Layer, Structure, read
from onegpu.kernels import decode_step as ops
from onegpu.kernels.codebooks import dynamic_map
from onegpu.kernels.decode_step import Attended, Matrix, Norm, Stream

if TYPE_CHECKING:
    from onegpu.kernels.launch import CudaKernel

# What was compared with the definition on a device (docs/fused_step.md).
HEAD_SIZES = (64, 80, 96, 128, 256)
Pair = tuple[torch.Tensor, torch.Tensor]


def plan(model: Any) -> FusedStep | str:
    """The step of a model, or why it has none. Nothing is copied; on a GPU the dtype must be a 16-bit one."""
    try:
        structure = read(model)
        if structure.device.type == "cuda":
            _check_gpu(structure)
    except Declined as reason:
        return str(reason)
    return FusedStep(structure)


@dataclass
class FusedStep:
    """One token for each of several sequences, up to 16 (on a CPU, any number).

    Attributes:
        pdl: whether kernels may start before the one in front has ended; off only to measure what that gives.
    """

    structure: Structure
    pdl: bool = True
    _compiled: set[int] = field(default_factory=set, init=False, repr=False)  # for which numbers of rows

    def serves(self, rows: int) -> bool:
        """Whether the kernels take so many sequences of the model's products (on a CPU, any number)."""
        found = self.structure
        if found.device.type != "cuda":
            return True
        from onegpu.kernels import decode_step_cuda as gpu

        return rows <= gpu.MAX_ROWS and all(gpu.fits(m, rows) for m in found.matrices())

    def __call__(
        self,
        input_ids: torch.Tensor,
        position: torch.Tensor,
        rope_position: torch.Tensor,
        caches: list[Pair],
        first: torch.Tensor | None = None,
        out: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Logits of the next token; writes this one's keys and values.

        Runs without a host synchronisation, so that it can be captured in a CUDA graph, once it has run outside of a
        capture (that compiles).

        Args:
            input_ids: int64 ``[B, 1]``.
            position: int64 ``[1]`` or ``[B]``, where the token stands in the cache. rope_position: int64 ``[B, 1]`` or
                ``[1]``, where it stands in its text.
            caches: for each layer keys and values ``[B, H_kv, L, D]``, contiguous; position p is in slot p % L.
            first: int32 ``[B]``: the first position of the cache that a row sees, or None for all.
            out: float32 ``[B, V]``, contiguous, for the logits.

        Returns:
            float32 ``[B, V]``: `out`, if it was given.
        """
        rows = len(input_ids)
        if self.structure.device.type == "cuda" and rows not in self._compiled:
            from onegpu.kernels.launch import compile_together

            compile_together(self.kernels(rows, caches[0]), self.structure.embedding.get_device())
            self._compiled.add(rows)
        return self._launch(input_ids, position, rope_position, caches, first, out)

    def kernels(self, rows: int, cache: Pair) -> list[CudaKernel]:
        """What a step of so many sequences launches, over caches like ``cache``; launches nothing."""
        from onegpu.kernels import decode_step_cuda as gpu

        place = torch.zeros(rows, 1, dtype=torch.int64, device=self.structure.device)
        with gpu.collecting() as kernels:
            self._launch(place, place[0], place, [cache] * len(self.structure.layers), None)
        return list(dict.fromkeys(kernels))

    def _launch(
        self,
        input_ids: torch.Tensor,
        position: torch.Tensor,
        rope_position: torch.Tensor,
        caches: list[Pair],
        first: torch.Tensor | None,
        out: torch.Tensor | None = None,
    ) -> torch.Tensor:
        found, rows = self.structure, len(input_ids)
        run = _Run(found, rows, self.pdl)
        run.embed(input_ids.view(-1), rope_position)
        for layer, cache in zip(found.layers, caches, strict=True):
            run.layer(layer, cache, position, rope_position, first)
        return run.logits(out)


class _Run:
    """One step's launches, and the memory between them.

    h is the residual stream, and `waiting` what the next product has yet to do to it: a norm of it, or of `added`; the
    result goes into `spare`.
    """

    def __init__(self, found: Structure, rows: int, pdl: bool) -> None:
        self.found, self.rows, self.pdl = found, rows, pdl
        heads = found.layers[0].heads
        split = 1
        if found.device.type == "cuda":
            from onegpu.kernels.decode_step_cuda import chunks, splits

            split = splits(found.embedding.get_device(), rows, heads.kv * chunks(heads))
        dtype = found.dtype
        self.h, self.qkv = self._make(found.width), self._make(heads.width)
        self.act = self._make(found.inner, kind=dtype)
        parts = self._make(heads.query, split, heads.size, kind=dtype), self._make(heads.query, split, 2)
        self.attended = Attended(*parts)
        self.spare, self.added, self.waiting = self.h, self.h, Stream(self.h, dtype)
        if any(layer.norms[1] is not None or layer.norms[3] is not None for layer in found.layers):
            self.spare, self.added = self._make(found.width), self._make(found.width)

    def _make(self, *shape: int, kind: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.empty(self.rows, *shape, dtype=kind, device=self.found.device)

    def embed(self, ids: torch.Tensor, position: torch.Tensor) -> None:
        """h, of the tokens and their positions."""
        found = self.found
        places = None if found.places is None else ops.Places(found.places[0], position, found.places[1])
        if found.project_in is None:
            ops.embed(ids, found.embedding, self.h, found.scale, places, found.embedding_norm, self.pdl)
            return
        small = self._make(found.embedding.shape[1])
        ops.embed(ids, found.embedding, small, found.scale, pdl=self.pdl)
        if places is None:
            self._product(Stream(small, found.dtype), found.project_in, "store", self.h)
            return
        ops.embed(ids, None, self.h, places=places, pdl=self.pdl)
        self._product(Stream(small, found.dtype), found.project_in, "add", self.h)

    def layer(
        self,
        layer: Layer,
        cache: Pair,
        position: torch.Tensor,
        rope_position: torch.Tensor,
        first: torch.Tensor | None,
    ) -> None:
        """h, behind a layer; what is passed on to its attention is explained in `FusedStep`."""
        norms, up = layer.norms, "gated" if layer.gated else "act"
        if (both := layer.both) is not None:
            self._product(self._read(norms[0]), both, "both", self.qkv, act=layer.act, also=self.act)
        else:
            self._product(self._read(norms[0]), layer.qkv, "store", self.qkv)
            if layer.order == PARALLEL:
                self._product(self._read(norms[2]), layer.up, up, self.act, act=layer.act)
        ops.attend(self.qkv, layer.heads, *cache, position, rope_position, first, self.attended, self.pdl)
        self._add(self.attended, layer.out, norms[1], layer.order)
        if layer.order != PARALLEL:
            self._product(self._read(norms[2]), layer.up, up, self.act, act=layer.act)
        self._add(self.act, layer.down, norms[3], layer.order)

    def logits(self, out: torch.Tensor | None) -> torch.Tensor:
        """float32 ``[rows, V]``."""
        found, last = self.found, self._read(self.found.norm, keep=False)
        logits = self._make(found.head.rows) if out is None else out
        if found.project_out is not None:
            small = self._make(found.project_out.rows)
            self._product(last, found.project_out, "store", small)
            last = Stream(small, found.dtype)
        self._product(last, found.head, "store", logits, cap=found.cap)
        return logits

    def _read(self, norm: Norm | None, keep: bool = True) -> Stream:
        """The stream for the next product, which writes it down if that is more than h."""
        stream = self.waiting._replace(norm=norm)
        if stream.outer is not None and keep:
            stream = stream._replace(to=self.spare)
            self.h, self.spare = self.spare, self.h
            self.waiting = Stream(self.h, self.found.dtype)
        return stream

    def _add(self, x: Attended | torch.Tensor, matrix: Matrix, outer: Norm | None, order: str) -> None:
        if outer is not None and order == SEQUENTIAL:
            self._product(x, matrix, "store", self.added)
            self.waiting = Stream(self.h, self.found.dtype, added=self.added, outer=outer)
            return
        self._product(x, matrix, "add", self.h)
        self.waiting = Stream(self.h, self.found.dtype, outer=outer)

    def _product(self, x: Any, matrix: Matrix, sink: str, out: torch.Tensor, **more: Any) -> None:
        ops.product(x, matrix, sink, out, pdl=self.pdl, **more)


class Fused:
    """A fused step for a batch of a fixed size, with what it needs to know of each row's padding.

    Args:
        step: the model's.
        batch: rows, at most what it serves.
    """

    def __init__(self, step: FusedStep, batch: int) -> None:
        self.step: FusedStep | None = step
        self.first = torch.zeros(batch, dtype=torch.int32, device=step.structure.device)
        self.made = step.structure.made()

    @staticmethod
    def make(
        model: Any, batch: int, mask: torch.Tensor, memory: list[Pair] | None = None, placed: bool = True
    ) -> Fused | None:
        """For a model and a mask as in `takes`, or None.

        memory: what the step will be called with. placed: whether with positions in the text too.
        """
        if not left_padded(mask):
            return None
        step = plan(model)
        if not isinstance(step, FusedStep) or not step.serves(batch):
            return None
        found = step.structure
        if found.places is not None and not placed:
            return None  # the model finds them out by itself, each in its own way
        wanted = [(layer.heads.kv, layer.heads.size, found.dtype) for layer in found.layers]
        if memory is not None and wanted != [(k.shape[1], k.shape[3], k.dtype) for k, _ in memory]:
            return None  # Falcon's own forward keeps the keys of each query head
        return Fused(step, batch)

    def takes(self, mask: torch.Tensor) -> bool:
        """Whether a mask ``[rows, length]`` of real tokens has padding on the left only."""
        return left_padded(mask)

    def load(self, mask: torch.Tensor) -> None:
        """Take over the padding; rows that the mask has not see nothing but themselves."""
        self.first.fill_(2**30)
        self.first[: len(mask)] = (mask == 0).sum(1, dtype=torch.int32)

    def release(self) -> None:
        """Let go of the model's weights: a captured graph does not need them here, and they may leave the GPU."""
        self.step = None  # not of self.made: the graph reads it, and its memory would be given to others

    def __call__(
        self,
        ids: torch.Tensor,
        position: torch.Tensor,
        rope_position: torch.Tensor | None,
        memory: list[Pair],
        out: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """See `FusedStep`."""
        assert self.step is not None, "released"
        return self.step(ids, position, position if rope_position is None else rope_position, memory, self.first, out)


def left_padded(mask: torch.Tensor) -> bool:
    """Whether each row of a mask ``[rows, length]`` is zeros, then ones."""
    mask = mask != 0
    return bool((mask[:, 1:] >= mask[:, :-1]).all())


def _check_gpu(found: Structure) -> None:
    """What the kernels ask for beyond what the definitions do."""
    from onegpu.kernels import decode_step_cuda as gpu

    if find_spec("cuda") is None or find_spec("cuda.core") is None:
        raise Declined("cuda-core is not installed")
    if found.dtype not in (torch.float16, torch.bfloat16):
        raise Declined(f"activations in {found.dtype}")
    if torch.cuda.get_device_capability(found.device)[0] != 9:
        raise Declined("a GPU that is no Hopper")  # the layouts take the shared memory that it has
    for matrix in found.matrices():
        if matrix.columns % 64:
            raise Declined(f"a product over {matrix.columns} columns, no multiple of 64")
        if any(part.weight.data_ptr() % 16 for part in matrix.parts):
            raise Declined("a weight that begins off 16 bytes")
        if any(part.nested is not None for part in matrix.parts):
            dynamic_map(found.device)  # now, because it is copied from the host, which the step itself may not do
        if matrix.format in ("nf4", "fp4") and (matrix.blocksize < 64 or matrix.columns % matrix.blocksize):
            raise Declined(f"4-bit blocks of {matrix.blocksize} in rows of {matrix.columns}")
        if matrix.transposed and matrix.rows % 32:
            raise Declined(f"weights stored [in, out] with {matrix.rows} columns, no multiple of 32")
        if not gpu.fits(matrix, 1):
            raise Declined(f"a product over {matrix.columns} columns, more than shared memory holds")
    for layer in found.layers:
        heads = layer.heads
        if heads.size not in HEAD_SIZES:
            raise Declined(f"heads of {heads.size}")
