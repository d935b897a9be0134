"""4-bit linear layers: bitsandbytes' ``Linear4bit`` on our ops.

The packed codes are the parameter ``weight``; its scales live as buffers of the module (so that footprints count them
and hooks move them), float32 or uint8 whatever the model's dtype, under the names that a checkpoint gives them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from onegpu.functional import QuantState
from onegpu.kernels.autocast import autocast_dtype
from onegpu.kernels.codebooks import codebook_4bit, dynamic_map
from onegpu.kernels.linear_4bit import Packed4bit, linear_4bit
from onegpu.nn.bytes_of import move_as_bytes, nbytes
from onegpu.nn.check import check_state
from onegpu.nn.params_4bit import Params4bit, state_tensors
from onegpu.nn.set_aside import set_aside

# The value tables are constants of the format, shared by all layers of a device: no buffers.
_BUFFERS = ("absmax", "nested_absmax", "nested_offset")


class Linear4bit(nn.Linear):
    """``y = x @ W.T + b`` with W in 4-bit blocks (QLoRA, arXiv:2305.14314).

    Load a float weight ``[N, K]``, then move the module to a device: that quantises it.

    Args:
        input_features, output_features: K and N.
        bias: whether there is one; it stays in the float dtype.
        compute_dtype: dtype of the product; None or float32 follow the dtype of 16-bit inputs (accumulation is
            float32 either way: what float32 would protect against does not happen here).
        compress_statistics: double quantisation of the scales.
        quant_type: "nf4" or "fp4". quant_storage: dtype that the packed bytes are viewed as.
        device: where the weight is created.

    Raises:
        ValueError: quant type unknown. RuntimeError: forward before the weight was quantised.
    """

    weight: Params4bit
    absmax: torch.Tensor
    nested_absmax: torch.Tensor | None
    nested_offset: torch.Tensor | None
    expanded: torch.Tensor | None
    expand_on_cpu: bool = False
    _packed_meta: tuple[int, str, torch.dtype | None] | None = None

    def __init__(
        self,
        input_features: int,
        output_features: int,
        bias: bool = True,
        compute_dtype: torch.dtype | None = None,
        compress_statistics: bool = True,
        quant_type: str = "fp4",
        quant_storage: torch.dtype = torch.uint8,
        device: Any = None,
    ) -> None:
        super().__init__(input_features, output_features, bias, device)
        for name in _BUFFERS:
            # Persistent in torch's books, though state dicts give them other names: transformers' loader wipes buffers
            # that are not.
            self.register_buffer(name, None)
        self.register_buffer("expanded", None, persistent=False)
        self.compute_dtype = compute_dtype
        self.quant_storage = quant_storage
        self.weight = Params4bit(
            self.weight.data,
            compress_statistics=compress_statistics,
            quant_type=quant_type,
            quant_storage=quant_storage,
        )

    @property
    def quant_state(self) -> QuantState | None:
        """The state of the weight, None before it is quantised."""
        return getattr(self.weight, "quant_state", None)

    @property
    def W_q(self) -> Params4bit:
        """The weight. PEFT calls ``dequantize()`` of a layer that has this name, else it asks bitsandbytes."""
        return self.weight

    def reset_parameters(self) -> None:
        """As ``nn.Linear``; on the meta device nothing, where drawing numbers costs time and gives none."""
        if not self.weight.is_meta:
            super().reset_parameters()

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        """Also called by ``module.weight = …``: a quantised weight brings its scales along."""
        if name == "weight" and not isinstance(param, Params4bit) and self._packed_meta is not None:
            # Tools that rebuild parameters (accelerate, FSDP) lose the subclass; the bytes are what they were.
            param = self._restate(param)
        super().register_parameter(name, param)
        if name == "weight" and isinstance(param, Params4bit):
            self._adopt(param)

    def _adopt(self, weight: Params4bit) -> None:
        """Make the buffers and the shape facts follow ``weight``."""
        state = weight.quant_state
        tensors: dict[str, torch.Tensor | None] = state_tensors(state) if state is not None else {}
        for name in _BUFFERS:
            self._buffers[name] = tensors.get(name)
        self._buffers["expanded"] = None
        facts = None if state is None else (state.blocksize or 64, state.quant_type or "fp4", state.dtype)
        self._packed_meta = facts

    def _restate(self, param: nn.Parameter | None) -> Params4bit:
        if param is None:
            raise ValueError("weight=None: a Linear4bit cannot be without its weight; delete the module instead")
        state = self._state_from_buffers()
        return Params4bit(
            param.data,
            quant_state=state,
            blocksize=state.blocksize,
            compress_statistics=state.nested,
            quant_type=state.quant_type or "fp4",
            quant_storage=self.quant_storage,
            bnb_quantized=True,
        )

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Linear4bit:
        self._notice()
        weight, buffers = self._parameters["weight"], {name: self._buffers[name] for name in _BUFFERS}
        with set_aside(self, "weight", "expanded", *_BUFFERS):
            super()._apply(fn, recurse)  # the bias, and whatever children an adapter added
        assert isinstance(weight, Params4bit)
        if not weight.bnb_quantized:
            moved = fn(weight)  # Params4bit.to quantises where fn names a device
            self.weight = moved if isinstance(moved, Params4bit) else weight._like(moved, None)
            return self
        for name, scales in buffers.items():
            self._buffers[name] = None if scales is None else move_as_bytes(scales, fn)
        self.weight = weight._like(move_as_bytes(weight.data, fn), self._state_from_buffers())
        return self

    def _state_from_buffers(self) -> QuantState:
        """The state as the buffers have it: accelerate's hooks move buffers one by one, past ``weight``."""
        blocksize, quant_type, dtype = self._facts()
        device = self.absmax.device
        state2 = None
        if self.nested_absmax is not None:
            state2 = QuantState(self.nested_absmax, None, dynamic_map(device), 256, None, torch.float32)
        shape, code = (self.out_features, self.in_features), codebook_4bit(quant_type, device)
        return QuantState(self.absmax, shape, code, blocksize, quant_type, dtype, self.nested_offset, state2)

    def _notice(self) -> None:
        """Adopt a weight that was quantised in place, by ``layer.weight.cuda()``."""
        if self._packed_meta is None and self.weight.bnb_quantized:
            self._adopt(self.weight)

    def _facts(self) -> tuple[int, str, torch.dtype | None]:
        """Block size, quant type and original dtype of the quantised weight."""
        self._notice()
        if self._packed_meta is None:
            raise RuntimeError(
                "Linear4bit holds a float weight: move it to a device first (`.to(device)`, `.cuda()`), "
                "which quantises it"
            )
        return self._packed_meta

    def packed(self) -> Packed4bit:
        """Codes and scales as kernels take them."""
        blocksize, quant_type, _ = self._facts()
        shape = (self.out_features, self.in_features)
        nested = (self.nested_absmax, None, self.nested_offset)  # the format's own table
        weight = self.weight
        if isinstance(weight, Params4bit) and weight.quant_state is None:
            # FSDP rebuilds parameters without it; the buffers still know.
            weight.quant_state = self._state_from_buffers()
        return Packed4bit(weight.data, self.absmax, blocksize, quant_type, shape, *nested)

    def warmup_shapes(self) -> list[tuple[str, dict[str, Any]]]:
        """What `onegpu.warmup` runs for this layer."""
        blocksize, quant_type, _ = self._facts()
        sizes = {"n": self.out_features, "k": self.in_features, "blocksize": blocksize, "quant_type": quant_type}
        return [("linear_4bit", {**sizes, "bias": self.bias is not None, "nested": self.nested_absmax is not None})]

    def dequantize(self, dtype: torch.dtype | None = None) -> torch.Tensor:
        """The weight as floats, ``[N, K]``, in ``dtype`` (by default the one it had before quantisation)."""
        return self.packed().dequantize(dtype or self._facts()[2] or torch.float32)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x ``[..., K]`` to ``[..., N]`` in the dtype of x."""
        dtype = x.dtype
        if self.compute_dtype not in (None, torch.float32, dtype):
            x = x.to(self.compute_dtype)
        if self.expand_on_cpu and x.device.type == "cpu" and not torch.is_grad_enabled():
            if self.expanded is None or self.expanded.dtype != x.dtype:
                self.expanded = self.dequantize(x.dtype)
            bias = None if self.bias is None else self.bias.to(x.dtype)
            return nn.functional.linear(x, self.expanded, bias).to(dtype)
        y = linear_4bit(x, self.packed(), self.bias)
        return y.to(dtype) if autocast_dtype(x.device.type) is None else y

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        self._notice()
        super()._save_to_state_dict(destination, prefix, keep_vars)
        for name in _BUFFERS:
            destination.pop(prefix + name, None)
        if self._packed_meta is not None and self.absmax is not None and not self.absmax.is_meta:
            for key, value in self._state_from_buffers().as_dict(packed=True).items():
                destination[f"{prefix}weight.{key}"] = value if keep_vars else value.detach()

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        entry = f"{prefix}weight."
        stats = {key[len(entry) :]: value for key, value in state_dict.items() if key.startswith(entry)}
        weight = state_dict.get(f"{prefix}weight")
        aside = set(_BUFFERS)
        if weight is not None and (stats or self.weight.bnb_quantized):
            try:
                self._load_quantized(weight, stats, bool(local_metadata.get("assign_to_params_buffers")))
            except (TypeError, ValueError) as error:
                error_msgs.append(f"{prefix}weight: {error}")
                return
            aside.add("weight")  # what is left for torch is the bias
            state_dict = {k: v for k, v in state_dict.items() if not k.startswith(entry) and k != f"{prefix}weight"}
        with set_aside(self, *aside):
            super()._load_from_state_dict(
                state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
            )

    def _load_quantized(self, weight: torch.Tensor, stats: dict[str, torch.Tensor], assign: bool) -> None:
        """Take over checked entries; copies, unless ``assign``."""
        if not stats:
            raise ValueError(
                "no scales beside it, and this layer is quantised; load float weights before it is moved to a device"
            )
        device = self.weight.device if self.weight.device.type != "meta" else weight.device
        if not assign:
            weight, stats = weight.clone(), {name: value.clone() for name, value in stats.items()}
        loaded = Params4bit.from_prequantized(weight, stats, device=device)
        check_state(loaded, (self.out_features, self.in_features))
        self.weight = loaded

    def nbytes(self) -> dict[str, int]:
        """Bytes by kind: weight, scales, bias, expanded (the copy that speeds up a CPU)."""
        self._notice()
        scales = nbytes(*(self._buffers[name] for name in _BUFFERS))
        return {
            "weight": nbytes(self.weight),
            "scales": scales,
            "bias": nbytes(self.bias),
            "expanded": nbytes(self.expanded),
        }


class LinearNF4(Linear4bit):
    """:class:`Linear4bit` with ``quant_type="nf4"``."""

    def __init__(
        self,
        input_features: int,
        output_features: int,
        bias: bool = True,
        compute_dtype: torch.dtype | None = None,
        compress_statistics: bool = True,
        quant_storage: torch.dtype = torch.uint8,
        device: Any = None,
    ) -> None:
        super().__init__(
            input_features, output_features, bias, compute_dtype, compress_statistics, "nf4", quant_storage, device
        )


class LinearFP4(Linear4bit):
    """:class:`Linear4bit` with ``quant_type="fp4"``."""

    def __init__(
        self,
        input_features: int,
        output_features: int,
        bias: bool = True,
        compute_dtype: torch.dtype | None = None,
        compress_statistics: bool = True,
        quant_storage: torch.dtype = torch.uint8,
        device: Any = None,
    ) -> None:
        super().__init__(
            input_features, output_features, bias, compute_dtype, compress_statistics, "fp4", quant_storage, device
        )
