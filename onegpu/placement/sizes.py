"""Exact bytes of a model that is still on the meta device, as it will be once its weights are loaded and quantised."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from onegpu.kernels.quant_4bit import packed_bytes
from onegpu.nn import Linear4bit, Linear8bitLt
from onegpu.nn.bytes_of import nbytes


@dataclass
class Sizes:
    """bytes: of every parameter and buffer by name, a quantised weight with its scales, a tied one 0.

    tied: name of each tied tensor to the one that holds the memory.
    """

    bytes: dict[str, int]
    tied: dict[str, str]

    @property
    def total(self) -> int:
        """Bytes of the model."""
        return sum(self.bytes.values())


def bytes_4bit(numel: int, blocksize: int = 64, nested: bool = False, storage: torch.dtype = torch.uint8) -> int:
    """Bytes of ``numel`` weights in 4 bits, scales included."""
    blocks = -(-numel // blocksize)
    scales = blocks + 4 * -(-blocks // 256) + 4 if nested else 4 * blocks
    return packed_bytes(numel, storage) + scales


def stored_sizes(
    model: nn.Module, *, known: Mapping[str, int] | None = None, dtypes: Mapping[str, torch.dtype] | None = None
) -> Sizes:
    """Sizes of ``model`` when it is loaded.

    Args:
        model: with its quantised layers in place, empty (on the meta device) or full.
        known: bytes of tensors that will be replaced by something else (stacks of experts), by name.
        dtypes: parts of names whose float tensors are loaded in another dtype than they have now; ``*`` is any text.
    """
    known = known or {}
    tied = {name: source for name, source in (getattr(model, "all_tied_weights_keys", None) or {}).items()}
    sizes: dict[str, int] = {}
    owners: dict[int, str] = {}
    for module, name, tensor in _tensors(model):
        owner = owners.setdefault(id(tensor), name)
        if owner != name:
            tied.setdefault(name, owner)
        if name in known:
            sizes[name] = known[name]
        else:
            sizes[name] = _weight_bytes(module, tensor) if name.endswith("weight") else nbytes(tensor)
            sizes[name] = _in_dtype(name, tensor, sizes[name], dtypes or {})
    tied = {name: _root(source, tied) for name, source in tied.items() if name in sizes and source in sizes}
    tied = {name: source for name, source in tied.items() if name != source}
    return Sizes({name: 0 if name in tied else size for name, size in sizes.items()}, tied)


def in_4_bits(model: nn.Module, sizes: Sizes) -> Sizes:
    """The same model if it were loaded with ``load_in_4bit=True``: for advice, not for placing."""
    smaller = dict(sizes.bytes)
    head = output_head(model)
    holds = set(sizes.tied) | set(sizes.tied.values())
    for module, name, tensor in _tensors(model):
        linear = isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"
        if name in holds or module is head or not ((linear and tensor.dim() == 2) or tensor.dim() == 3):
            continue
        if isinstance(module, Linear4bit) or not isinstance(tensor, nn.Parameter):
            continue
        smaller[name] = min(smaller[name], bytes_4bit(tensor.numel()))
    return Sizes(smaller, sizes.tied)


def output_head(model: Any) -> nn.Module | None:
    """The module that turns hidden states into logits; None where the model names none."""
    head: nn.Module | None = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    return head


def _tensors(model: nn.Module) -> Iterator[tuple[nn.Module, str, torch.Tensor]]:
    for prefix, module in model.named_modules(remove_duplicate=False):
        held: Mapping[str, Any] = {**module._parameters, **module._buffers}
        for name, tensor in held.items():
            if tensor is not None:
                yield module, f"{prefix}.{name}".lstrip("."), tensor


def _root(name: str, tied: Mapping[str, str]) -> str:
    seen = {name}
    while name in tied and tied[name] not in seen:
        name = tied[name]
        seen.add(name)
    return name


def _weight_bytes(module: nn.Module, tensor: torch.Tensor) -> int:
    """Bytes of a weight; of a quantised one that is still empty with the scales it will have."""
    if isinstance(module, Linear4bit) and tensor is module.weight and not module.weight.bnb_quantized:
        weight = module.weight
        numel = module.in_features * module.out_features
        return bytes_4bit(numel, weight.blocksize, weight.compress_statistics, module.quant_storage)
    if isinstance(module, Linear8bitLt) and tensor is module.weight and not module.has_fp16_weights:
        scales = 0 if module.SCB is not None else 4 * module.out_features
        return module.in_features * module.out_features + scales
    return nbytes(tensor)


def _in_dtype(name: str, tensor: torch.Tensor, size: int, dtypes: Mapping[str, torch.dtype]) -> int:
    plain = size == nbytes(tensor) and tensor.is_floating_point()
    for part, dtype in dtypes.items():
        if plain and isinstance(tensor, nn.Parameter) and re.search(re.escape(part).replace(r"\*", ".*"), name):
            return tensor.numel() * dtype.itemsize
    return size
