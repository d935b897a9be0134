"""A decoding step of a pre-norm model in five kernels a layer, instead of the model's own forward.

``plan(model)`` says whether a model is one: a decoder of embedding, equal layers and head, a layer of two RMSNorms,
attention with rotary embedding (or none) and a gated MLP, in the order of Llama. It looks at what the modules are made
of, never at names of models, and asks the small functions that it replaces (norm, activation, rotary embedding) for a
few values; anything that it does not know makes it decline, with the reason. What follows from a wrong guess is caught
once more: the engine compares the first step with an ordinary one.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import torch

from onegpu.engine.fused_structure import Declined, Structure, read
from onegpu.kernels import decode_step as ops
from onegpu.kernels.codebooks import dynamic_map
from onegpu.kernels.decode_step import Matrix

if TYPE_CHECKING:
    from onegpu.kernels.launch import CudaKernel

# What was compared with the definition on a device (docs/fused_step.md); the kernels themselves take more.
MAX_ROWS, HEAD_SIZES = 16, (64, 128)
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
    """One token for each of up to 16 sequences (on a CPU, any number).

    Attributes:
        pdl: whether kernels may start before the one in front has ended; off only to measure what that gives.
    """

    structure: Structure
    pdl: bool = True
    _compiled: set[int] = field(default_factory=set, init=False, repr=False)  # for which numbers of rows

    def serves(self, rows: int) -> bool:
        """Whether so many sequences fit."""
        found = self.structure
        if found.device.type != "cuda":
            return True
        from onegpu.kernels import decode_step_cuda as gpu

        def fits(matrix: Matrix, cut: bool = False) -> bool:
            asked = matrix.format, rows, matrix.columns, matrix.parts[0].nested is not None
            return bool(gpu.windows(*asked)) if cut else gpu.shape(*asked) is not None

        whole = [found.head, *(m for layer in found.layers for m in (layer.qkv, layer.out, layer.gate_up))]
        return rows <= MAX_ROWS and all(map(fits, whole)) and all(fits(layer.down, True) for layer in found.layers)

    def __call__(
        self,
        input_ids: torch.Tensor,
        position: torch.Tensor,
        rope_position: torch.Tensor,
        caches: list[Pair],
        first: torch.Tensor | None = None,
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

        Returns:
            float32 ``[B, V]``.
        """
        rows = len(input_ids)
        if self.structure.device.type == "cuda" and rows not in self._compiled:
            from onegpu.kernels.launch import compile_together

            compile_together(self.kernels(rows, caches[0]), self.structure.embedding.get_device())
            self._compiled.add(rows)
        return self._launch(input_ids, position, rope_position, caches, first)

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
    ) -> torch.Tensor:
        found, rows = self.structure, len(input_ids)
        device, dtype = found.device, found.dtype
        heads = found.layers[0].heads
        split = 1
        if device.type == "cuda":
            from onegpu.kernels.decode_step_cuda import splits

            split = splits(found.embedding.get_device(), rows, heads.kv)

        def make(*shape: int, kind: torch.dtype = torch.float32) -> torch.Tensor:
            return torch.empty(rows, *shape, dtype=kind, device=device)

        h, qkv, act = make(found.width), make(heads.width), make(found.inner, kind=dtype)
        attended = ops.Attended(make(heads.query, split, heads.size, kind=dtype), make(heads.query, split, 2))
        logits = make(found.head.rows)
        ops.embed(input_ids.view(-1), found.embedding, h, self.pdl)
        coming = [*(layer.qkv for layer in found.layers[1:]), found.head]
        for layer, (keys, values), after in zip(found.layers, caches, coming, strict=True):
            ops.norm_product(h, layer.attention_gain, layer.attention_eps, layer.qkv, qkv, self.pdl)
            ops.attend(qkv, layer.heads, keys, values, position, rope_position, first, attended, self.pdl, layer.out)
            ops.add_attention(attended, layer.out, h, self.pdl, layer.gate_up)
            ops.norm_gated(h, layer.mlp_gain, layer.mlp_eps, layer.gate_up, layer.act, act, self.pdl, layer.down)
            ops.add_product(act, layer.down, h, self.pdl, after)
        ops.norm_product(h, found.gain, found.eps, found.head, logits, self.pdl)
        return logits


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
    def make(model: Any, batch: int, mask: torch.Tensor) -> Fused | None:
        """For a model and a mask as in `takes`, or None."""
        if not left_padded(mask):
            return None
        step = plan(model)
        return Fused(step, batch) if isinstance(step, FusedStep) and step.serves(batch) else None

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
        self, ids: torch.Tensor, position: torch.Tensor, rope_position: torch.Tensor | None, memory: list[Pair]
    ) -> torch.Tensor:
        """See `FusedStep`."""
        assert self.step is not None, "released"
        return self.step(ids, position, position if rope_position is None else rope_position, memory, self.first)


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
        if gpu.shape(matrix.format, 1, matrix.columns, matrix.parts[0].nested is not None) is None:
            raise Declined(f"a product over {matrix.columns} columns, more than shared memory holds")
    for layer in found.layers:
        heads = layer.heads
        if heads.size not in HEAD_SIZES:
            raise Declined(f"heads of {heads.size}")
        if heads.window is not None:
            raise Declined("a sliding window")
        if heads.query // heads.kv > gpu.MAX_GROUP:
            raise Declined(f"{heads.query // heads.kv} query heads to a key head")
