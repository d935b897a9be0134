"""LLM.int8() linear layers: bitsandbytes' ``Linear8bitLt`` and ``Int8Params``, on our ops.

The codes are the parameter ``weight`` (int8 ``[N, K]``); the row maxima are the buffer ``SCB`` (float32 ``[N]``),
which a dtype cast does not reach.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from onegpu.functional import MatmulLtState, int8_vectorwise_quant
from onegpu.kernels.linear_int8 import linear_int8
from onegpu.kernels.quant_int8 import dequantize_rows
from onegpu.nn.bytes_of import move_as_bytes, nbytes
from onegpu.nn.set_aside import set_aside

# `weight_format` of a state dict: 0 is row-major. The others are layouts of GPUs before 2023.
_OLD_FORMATS = {1: "col32", 2: "col_turing", 3: "col_ampere"}


class Int8Params(nn.Parameter):
    """A weight ``[N, K]`` that becomes int8 at its first move to a device, unless ``has_fp16_weights``.

    After that ``CB`` is the int8 matrix and ``SCB`` the float32 row maxima ``[N]``.
    """

    CB: torch.Tensor | None
    SCB: torch.Tensor | None
    has_fp16_weights: bool

    def __new__(
        cls,
        data: torch.Tensor | None = None,
        requires_grad: bool = True,
        has_fp16_weights: bool = False,
        CB: torch.Tensor | None = None,
        SCB: torch.Tensor | None = None,
        **_: Any,  # transformers and PEFT pass a parameter's whole __dict__ back
    ) -> Int8Params:
        data = torch.empty(0) if data is None else data
        self: Int8Params = torch.Tensor._make_subclass(cls, data.detach(), requires_grad and data.is_floating_point())
        self.CB, self.SCB, self.has_fp16_weights = CB, SCB, has_fp16_weights
        return self

    def _like(self, data: torch.Tensor, SCB: torch.Tensor | None) -> Int8Params:
        CB = data if data.dtype == torch.int8 else None
        return type(self)(data, self.requires_grad, self.has_fp16_weights, CB, SCB)

    def _quantize(self, device: torch.device) -> Int8Params:
        # Through float16, as bitsandbytes does whatever the dtype: the codes in a checkpoint depend on it.
        codes, maxima, _ = int8_vectorwise_quant(self.data.contiguous().to(device).half())
        self.requires_grad_(False)
        self.data, self.CB, self.SCB = codes, codes, maxima
        return self

    def to(self, *args: Any, **kwargs: Any) -> Int8Params:
        """Move; the first move to a real device quantises. A dtype casts only a weight that is still float."""
        device, dtype, non_blocking, _ = torch._C._nn._parse_to(*args, **kwargs)
        quantized = self.data.dtype == torch.int8
        if not quantized:
            if device is not None and device.type != "meta" and not self.has_fp16_weights:
                return self._quantize(device)
            return self._like(self.data.to(device=device, dtype=dtype, non_blocking=non_blocking), None)
        if device is None:
            return self
        # accelerate puts a weight on the meta device while it is not needed; its maxima would not come back from there.
        scales = self.SCB if self.SCB is None or device.type == "meta" else self.SCB.to(device)
        return self._like(self.data.to(device=device, non_blocking=non_blocking), scales)

    def cuda(self, device: Any = None, non_blocking: bool = False) -> Int8Params:  # type: ignore[override]
        """``to("cuda")``."""
        return self.to(device="cuda" if device is None else device, non_blocking=non_blocking)

    def cpu(self) -> Int8Params:  # type: ignore[override]
        """``to("cpu")``."""
        return self.to(device="cpu")

    def __deepcopy__(self, memo: dict[int, Any]) -> Int8Params:
        if id(self) not in memo:
            memo[id(self)] = self._like(copy.deepcopy(self.data, memo), copy.deepcopy(self.SCB, memo))
        return memo[id(self)]  # type: ignore[no-any-return]

    def __reduce_ex__(self, protocol: Any) -> Any:
        return _rebuild_int8, (self.data, self.requires_grad, self.has_fp16_weights, self.SCB)


def _rebuild_int8(data: torch.Tensor, requires_grad: bool, has_fp16_weights: bool, SCB: torch.Tensor) -> Int8Params:
    return Int8Params(data, requires_grad, has_fp16_weights, data if data.dtype == torch.int8 else None, SCB)


class Linear8bitLt(nn.Linear):
    """``y = x @ W.T + b`` by LLM.int8() (arXiv:2208.07339): int8 times int8, outlier columns in the dtype of x.

    Load a float weight ``[N, K]``, then move the module to a device: that quantises it.

    Args:
        input_features, output_features: K and N.
        bias: whether there is one; it stays in the float dtype.
        has_fp16_weights: keep the float weight, which can learn, and quantise it anew in every forward.
        threshold: columns of x with a value at or above it are multiplied in the dtype of x; 0 turns that off.
        index: accepted for bitsandbytes' signature; unused there too.
        device: where the weight is created.

    On a GPU x is not quantised, so the threshold has no effect there, unless the attribute ``exact`` is set. On a CPU
    that is so in training mode only, as it is in bitsandbytes.

    Raises:
        RuntimeError: forward before the weight was quantised. ValueError: negative threshold.
    """

    weight: Int8Params
    SCB: torch.Tensor | None
    exact: bool = False

    def __init__(
        self,
        input_features: int,
        output_features: int,
        bias: bool = True,
        has_fp16_weights: bool = True,
        threshold: float = 0.0,
        index: Any = None,
        device: Any = None,
    ) -> None:
        if threshold < 0:
            raise ValueError(f"threshold={threshold} must not be negative; 0 turns outliers off, 6.0 is the paper's")
        super().__init__(input_features, output_features, bias, device)
        self.register_buffer("SCB", None)
        self.index = index
        self.threshold = threshold
        self.has_fp16_weights = has_fp16_weights
        self.weight = Int8Params(self.weight.data, has_fp16_weights=has_fp16_weights, requires_grad=has_fp16_weights)

    @property
    def state(self) -> MatmulLtState:
        """What PEFT and scripts read of bitsandbytes' layer; a snapshot, so that setting it changes nothing."""
        quantized = self.weight.dtype == torch.int8
        return MatmulLtState(
            CB=self.weight.data if quantized else None,
            SCB=self.SCB,
            threshold=self.threshold,
            has_fp16_weights=self.has_fp16_weights,
            is_training=self.training,
            use_pool=self.threshold > 0 and not self.has_fp16_weights,
        )

    @property
    def W_q(self) -> Int8Params:
        """The weight. PEFT calls ``dequantize()`` of a layer that has this name, else it asks bitsandbytes."""
        return self.weight

    def reset_parameters(self) -> None:
        """As ``nn.Linear``; on the meta device nothing, where drawing numbers costs time and gives none."""
        if not self.weight.is_meta:
            super().reset_parameters()

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        """Also called by ``module.weight = …``: a quantised weight brings its row maxima along."""
        built = "has_fp16_weights" in self.__dict__
        if built and name == "weight" and param is not None and not isinstance(param, Int8Params):
            # Tools that rebuild parameters (accelerate, FSDP) lose the subclass.
            param = Int8Params(param.data, param.requires_grad, self.has_fp16_weights, None, self.SCB)
        super().register_parameter(name, param)
        # A float weight has no maxima: those of the codes that it replaces must not be used for the codes it becomes.
        if name == "weight" and isinstance(param, Int8Params) and (param.SCB is not None or param.is_floating_point()):
            self._buffers["SCB"] = param.SCB

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Linear8bitLt:
        self._notice()
        weight, scales = self._parameters["weight"], self._buffers["SCB"]
        with set_aside(self, "weight", "SCB"):
            super()._apply(fn, recurse)  # the bias, and whatever children an adapter added
        assert isinstance(weight, Int8Params)
        if weight.dtype != torch.int8:
            if weight.has_fp16_weights:  # an ordinary trainable parameter: keep its identity for the optimiser
                weight.data = fn(weight.data)
                if weight.grad is not None:
                    weight.grad.data = fn(weight.grad.data)
                return self
            moved = fn(weight)  # Int8Params.to quantises where fn names a device
            self.weight = moved if isinstance(moved, Int8Params) else weight._like(moved, None)
            return self
        self._buffers["SCB"] = None if scales is None else move_as_bytes(scales, fn)
        self.weight = weight._like(fn(weight.data), self._buffers["SCB"])
        return self

    def warmup_shapes(self) -> list[tuple[str, dict[str, Any]]]:
        """What `onegpu.warmup` runs for this layer."""
        sizes = {"n": self.out_features, "k": self.in_features, "bias": self.bias is not None}
        return [("linear_int8", sizes)] if self.weight.dtype == torch.int8 else []

    def dequantize(self, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """The weight as floats, ``[N, K]``."""
        if self.weight.dtype != torch.int8:
            return self.weight.data.to(dtype)
        return dequantize_rows(self.weight.data, self._scales(), dtype)

    def _notice(self) -> None:
        """Take over the maxima of a weight that was quantised in place, by ``layer.weight.cuda()``."""
        if self.SCB is None and self.weight.SCB is not None:
            self._buffers["SCB"] = self.weight.SCB

    def _scales(self) -> torch.Tensor:
        self._notice()
        if self.SCB is None or self.weight.dtype != torch.int8:
            raise RuntimeError(
                "Linear8bitLt holds a float weight: move it to a device first (`.to(device)`, `.cuda()`), that "
                "quantises it"
            )
        return self.SCB

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x ``[..., K]`` to ``[..., N]`` in the dtype of x."""
        bias: torch.Tensor | None = self.bias
        if bias is not None and bias.dtype != x.dtype:
            bias = bias.to(x.dtype)
        exact = self.exact or (x.device.type == "cpu" and not self.training)
        if self.has_fp16_weights and self.weight.dtype != torch.int8:
            codes, maxima, _ = int8_vectorwise_quant(self.weight.detach().half())
            source = self.weight if self.weight.requires_grad else None
            return linear_int8(x, codes, maxima, bias, self.threshold, source, exact)
        return linear_int8(x, self.weight.data, self._scales(), bias, self.threshold, exact=exact)

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        self._notice()
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.SCB is not None:
            destination[f"{prefix}weight_format"] = torch.tensor(0, dtype=torch.uint8)

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
        own = [f"{prefix}{name}" for name in ("weight", "SCB", "weight_format")]
        weight, scales, layout = (state_dict.get(name) for name in own)
        aside = []
        if weight is not None and (scales is not None or torch.int8 in (weight.dtype, self.weight.dtype)):
            try:
                self._load_quantized(weight, scales, layout, bool(local_metadata.get("assign_to_params_buffers")))
            except ValueError as error:
                error_msgs.append(f"{prefix}weight: {error}")
                return
            aside = ["weight", "SCB"]  # what is left for torch is the bias
            state_dict = {key: value for key, value in state_dict.items() if key not in own}
        with set_aside(self, *aside):
            super()._load_from_state_dict(
                state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
            )

    def _load_quantized(
        self, weight: torch.Tensor, SCB: torch.Tensor | None, layout: torch.Tensor | None, assign: bool
    ) -> None:
        """Take over checked entries; copies, unless ``assign``."""
        if SCB is None and weight.dtype == torch.int8:
            raise ValueError("int8 codes without SCB, the scales of their rows")
        if SCB is None:
            raise ValueError(
                "no SCB beside it, and this layer is quantised; load float weights before it is moved to a device"
            )
        check_int8(weight, SCB, layout, (self.out_features, self.in_features))
        device = self.weight.device if self.weight.device.type != "meta" else weight.device
        if not assign:
            weight, SCB = weight.clone(), SCB.clone()
        self.weight = Int8Params(weight.to(device), False, False, None, SCB.to(device))
        self.has_fp16_weights = False

    def nbytes(self) -> dict[str, int]:
        """Bytes by kind: weight, scales, bias."""
        return {"weight": nbytes(self.weight), "scales": nbytes(self.SCB), "bias": nbytes(self.bias)}


def check_int8(
    weight: torch.Tensor, SCB: torch.Tensor, weight_format: torch.Tensor | int | None, shape: tuple[int, ...]
) -> None:
    """Raise ``ValueError`` unless a checkpoint's int8 entries are row-major, whole and of ``shape`` ``(N, K)``."""
    layout = int(weight_format.item() if isinstance(weight_format, torch.Tensor) else weight_format or 0)
    if layout != 0:
        raise ValueError(
            f"weight_format={layout} ({_OLD_FORMATS.get(layout, 'unknown')}) is a column layout of old bitsandbytes; "
            "save the checkpoint again with bitsandbytes >= 0.45"
        )
    if weight.dtype != torch.int8:
        raise ValueError(f"weight has dtype {weight.dtype}, an entry with SCB is int8")
    if tuple(weight.shape) != tuple(shape):
        raise ValueError(f"weight has shape {tuple(weight.shape)}, the layer needs {tuple(shape)}")
    if SCB.dtype != torch.float32 or SCB.numel() != shape[0]:
        raise ValueError(f"SCB is {SCB.dtype} {tuple(SCB.shape)}, the layer needs float32 ({shape[0]},)")
    if not SCB.is_meta and not bool(torch.isfinite(SCB).all()):
        raise ValueError("SCB holds NaN or infinity")
