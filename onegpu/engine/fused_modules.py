"""Reads the small modules of a decoder (norms, linear layers, activations, embeddings) as what a fused step takes.

What a module computes for a few values decides what it is, never its name.
"""

from __future__ import annotations

import inspect
from collections.abc import Hashable
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from onegpu.kernels import decode_step as ops
from onegpu.kernels.decode_step import Matrix, Norm, Part
from onegpu.nn import Linear4bit, Linear8bitLt
from onegpu.nn.norm import LayerNorm, RMSNorm
from onegpu.nn.stand_in import settings, stand_in


class Declined(Exception):
    """A model has no fused step; the message says why. Never reaches the user: its own forward then runs."""


# Numbers and switches that the modules of such a model may hold; anything else there may change what forward does.
_KNOWN = frozenset(
    {
        "training", "config", "hidden_size", "layer_idx", "head_dim", "num_key_value_groups", "num_key_value_heads",
        "num_heads", "num_attention_heads", "scaling", "attention_dropout", "is_causal", "sliding_window", "layer_type",
        "use_rope", "intermediate_size", "act_fn", "activation_fn", "variance_epsilon", "padding_idx", "vocab_size",
        "gradient_checkpointing", "has_sliding_layers", "attention_type", "block_size", "rope_theta",
        "max_position_embeddings", "rotary_fn", "is_quantized", "is_loaded_in_4bit", "is_loaded_in_8bit",
        # of gemma; falcon, bloom, gpt_neox; opt, gpt2, phi: what they do is asked, read below, or nothing in a step
        "attn_logit_softcapping", "is_sliding",
        "head_size", "rotary_ndims", "inv_norm_factor", "beta", "split_size", "hidden_dropout", "num_kv_heads",
        "new_decoder_architecture", "multi_query", "pretraining_tp", "slow_but_exact", "use_parallel_residual",
        "apply_residual_connection_post_layernorm", "embed_dim", "use_alibi",
        "dropout", "layerdrop", "embedding_dropout", "enable_bias", "do_layer_norm_before", "max_target_positions",
        "residual_dropout", "scale_attn_weights", "scale_attn_by_inverse_layer_idx", "reorder_and_upcast_attn",
        "is_cross_attention", "qk_layernorm",
    }
)  # fmt: skip


def children(module: nn.Module) -> dict[str, nn.Module]:
    """Those that are no dropouts. Declines a module that has children and holds numbers that are not known."""
    found = {name: child for name, child in module.named_children() if type(child) is not nn.Dropout}
    numbers = {
        name for name, value in vars(module).items()
        if not name.startswith("_") and isinstance(value, (bool, int, float)) and name not in _KNOWN
    }  # fmt: skip
    if found and numbers:
        raise Declined(f"{type(module).__name__} has {', '.join(sorted(numbers))}")
    return found


def unknown(module: nn.Module, names: Any) -> Declined:
    """For a module with children that are not known."""
    return Declined(f"{type(module).__name__} is made of {', '.join(sorted(names)) or 'nothing'}")


def mentions(owner: Any, name: str) -> bool:
    """Whether the code of a class's forward asks for an attribute of that name."""
    return name in inspect.unwrap(type(owner).forward).__code__.co_names


class Modules:
    """Reads modules of one model, whose embedding says the dtype and the device."""

    def __init__(self, table: torch.Tensor) -> None:
        self.table = table
        self._acts: dict[tuple[type, str], str] = {}
        self._plain: set[type] = {nn.Linear}
        self._norms: dict[Hashable, Norm] = {}

    def norm(self, module: Any) -> Norm:
        """An RMSNorm (also with 1 + gain) or a LayerNorm (also without gain and bias). One of each kind is tried."""
        self._leaf(module)
        weight, bias = (getattr(module, name, None) for name in ("weight", "bias"))
        given = [t for t in (weight, bias) if isinstance(t, torch.Tensor)]
        shape = getattr(module, "normalized_shape", None) if weight is None else weight.shape
        other = Declined(f"{type(module).__name__}, a norm of another form")
        if len(given) != len(list(module.parameters())) or not isinstance(shape, tuple) or len(shape) != 1:
            raise other
        gain, bias = (None if t is None else self.tensor(t) for t in (weight, bias))
        key = shape, gain is None, bias is None, settings(module)
        if key in self._norms:
            return self._norms[key]._replace(gain=gain, bias=bias)
        eps = getattr(module, "variance_epsilon", getattr(module, "eps", 1e-5))
        tries = [Norm("layer", gain, eps, bias)]
        if gain is not None and bias is None:
            tries = [Norm("rms", gain, eps), Norm("rms", gain, eps, one=1.0), *tries]
        probe = torch.linspace(-2.0, 3.0, shape[0], device=self.table.device).to(self.table.dtype)
        probe = torch.stack([probe, probe * 1e-3])  # of small values the epsilon shows
        with torch.no_grad():
            # Of ours, the module that it was made from: the same bits, and nobody waits for Triton.
            got = (module.original if isinstance(module, (RMSNorm, LayerNorm)) else module)(probe)
            for norm in tries:
                if all(_close(one.float(), norm(two), probe.dtype) for one, two in zip(got, probe, strict=True)):
                    self._norms[key] = norm
                    return norm
        raise other

    def matrix(self, *modules: Any) -> Matrix:
        """Linears below one another."""
        return self.below(*(self._linear(module) for module in modules))

    def below(self, *read: Matrix) -> Matrix:
        """Matrices below one another."""
        kinds = {(m.format, m.columns, m.blocksize, m.parts[0].nested is None, m.transposed) for m in read}
        if len(kinds) != 1 or (read[0].transposed and len(read) > 1):
            raise Declined("projections of several formats, which run as one product")
        return read[0]._replace(parts=tuple(part for m in read for part in m.parts))

    def _linear(self, module: Any) -> Matrix:
        self._leaf(module)
        from transformers.pytorch_utils import Conv1D

        rows, columns = getattr(module, "out_features", 0), getattr(module, "in_features", 0)
        bias = None if getattr(module, "bias", None) is None else self.tensor(module.bias)
        if isinstance(module, Linear8bitLt):
            if (
                module.weight.dtype != torch.int8
                or module.SCB is None
                or module.exact
                or module.SCB.device.type == "cpu"
            ):
                raise Declined("an int8 layer that is not quantised, or is to be computed exactly (as on a CPU)")
            codes = self.tensor(module.weight, torch.int8)
            return Matrix("int8", columns, (Part(rows, codes, bias, self.tensor(module.SCB, torch.float32)),))
        if isinstance(module, Linear4bit):
            if module.compute_dtype not in (None, torch.float32, self.table.dtype):
                raise Declined(f"a 4-bit layer that computes in {module.compute_dtype}")
            if module.quant_state is None:
                raise Declined("a 4-bit layer that is not quantised")
            packed = module.packed()
            if packed.nested_blocksize != 256 or (packed.nested_code is not None and packed.nested_absmax is None):
                raise Declined("scales quantised in another way")
            weight = self.tensor(packed.weight.view(torch.uint8), torch.uint8)
            part = Part(rows, weight, bias, packed.absmax, packed.nested_absmax, packed.offset)
            return Matrix(packed.quant_type, columns, (part,), packed.blocksize)
        if isinstance(module, nn.Linear) and self._multiplies(module):
            return Matrix("16bit", columns, (Part(rows, self.tensor(module.weight), bias),))
        if type(module) is Conv1D:
            columns, rows = module.weight.shape
            return Matrix("16bit", columns, (Part(rows, self.tensor(module.weight), bias),), transposed=True)
        raise Declined(f"{type(module).__name__} where a linear layer is expected")

    def _multiplies(self, module: nn.Linear) -> bool:
        """A class of linear layers does what its base does; asked once."""
        if type(module) not in self._plain:
            w, b, x = (
                torch.linspace(-1, 2, 12).view(4, 3),
                torch.linspace(0.1, 1, 4),
                torch.linspace(-2, 1, 6).view(2, 3),
            )
            if not torch.allclose(stand_in(module, weight=w, bias=b)(x), F.linear(x, w, b)):
                return False
            self._plain.add(type(module))
        return True

    def tensor(self, tensor: torch.Tensor, dtype: torch.dtype | None = None) -> torch.Tensor:
        """As the kernels take it: of the model's dtype (or `dtype`), on its device, in one piece."""
        tensor = tensor.detach()
        if type(tensor) is not torch.Tensor:
            tensor = tensor.as_subclass(torch.Tensor)
        if tensor.device != self.table.device or tensor.is_meta:
            raise Declined("weights on several devices")
        if tensor.dtype != (dtype or self.table.dtype):
            raise Declined("weights of several dtypes")
        if not tensor.is_contiguous():
            raise Declined("a weight that is not in memory in one piece")
        return tensor

    def activation(self, act: Any) -> str:
        """One of `decode_step.ACTIVATIONS`."""
        key = type(act), repr(act)
        if key not in self._acts:
            probe = torch.linspace(-6.0, 6.0, 97)
            with torch.no_grad():
                got = act(probe)
            found = [n for n in ops.ACTIVATIONS if torch.allclose(got, ops.activation(n, probe), atol=2e-6)]
            if not found:
                raise Declined(f"the activation {type(act).__name__}")
            self._acts[key] = found[0]
        return self._acts[key]

    def _leaf(self, module: nn.Module) -> None:
        if names := [name for name, _ in module.named_children()]:
            raise unknown(module, names)


def embedding(module: Any) -> tuple[torch.Tensor, float]:
    """The table, and what its rows are multiplied by."""
    if not isinstance(module, nn.Embedding) or module.max_norm is not None:
        raise Declined("an embedding of another kind")
    table = module.weight.detach()
    if not table.is_contiguous() or table.is_meta:
        raise Declined("an embedding that is not in memory in one piece")
    scale = getattr(module, "embed_scale", 1.0)
    scale = float(scale.to(table.dtype)) if isinstance(scale, torch.Tensor) else scale
    if type(module) is not nn.Embedding:
        ids = torch.arange(min(4, len(table)), device=table.device)
        with torch.no_grad():
            if not _close(module(ids).float(), table[ids].float() * scale, table.dtype):
                raise Declined(f"{type(module).__name__}, an embedding of another kind")
    return table, float(scale)


def positions(module: Any) -> tuple[torch.Tensor, int]:
    """The table of learned positions, and in which row the first one is."""
    if not isinstance(module, nn.Embedding) or module.max_norm is not None:
        raise Declined("positions of another kind")
    table, offset = module.weight.detach(), getattr(module, "offset", 0)
    if not table.is_contiguous() or not isinstance(offset, int):
        raise Declined("positions of another kind")
    if type(module) is not nn.Embedding:
        with torch.no_grad():
            got = module(torch.ones(1, 3, dtype=torch.int64, device=table.device))
        if not torch.equal(got[0], table[offset : offset + 3]):
            raise Declined(f"{type(module).__name__}, positions of another kind")
    return table, offset


def _close(got: torch.Tensor, want: torch.Tensor, dtype: torch.dtype) -> bool:
    tolerance = {torch.float32: 1e-5, torch.float16: 4e-3}.get(dtype, 3e-2)
    return got.shape == want.shape and bool((got - want).abs().max() <= tolerance * want.abs().max())
