"""PEFT's LoRA layer around a quantised base: merging dequantises, adds and quantises again.

PEFT's own adds to the weight in place, which packed codes cannot take. Everything else, training included, is PEFT's.
"""

from __future__ import annotations

from typing import Any

import torch
from peft.tuners.lora.layer import Linear as LoraLinear
from peft.tuners.tuners_utils import check_adapters_to_merge
from torch import nn

from onegpu.convert.quantized import holds_codes
from onegpu.kernels.quant_int8 import dequantize_rows
from onegpu.nn import Int8Params, Linear4bit, Linear8bitLt, Params4bit


def adopt(layer: Any) -> Any:
    """Make what PEFT's dispatcher returned a :class:`QuantizedLoraLinear` where it stands around a quantised layer."""
    if type(layer) is LoraLinear and isinstance(layer.get_base_layer(), (Linear4bit, Linear8bitLt)):
        layer.__class__ = QuantizedLoraLinear
    return layer


class QuantizedLoraLinear(LoraLinear):  # type: ignore[misc,unused-ignore]  # where PEFT is missing
    """``peft.tuners.lora.Linear`` whose base layer is a ``Linear4bit`` or ``Linear8bitLt``.

    While adapters are merged, the codes that were there before stay in CPU memory: unmerging puts them back bit for
    bit, and another merge starts from them, so that rounding does not add up.
    """

    # Weight and bias before the first merge; in a dict, lest PyTorch take them for parameters of this module.
    _unmerged: dict[str, Any] | None = None

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Add adapters to the base weight, which is quantised again, in its format.

        Args:
            safe_merge: taken for PEFT's sake: codes cannot hold NaN or infinity, so that they are looked for always.
            adapter_names: the adapters; the active ones by default.

        Raises:
            ValueError: the sum is not finite. Nothing has changed then.
        """
        base: Any = self.get_base_layer()
        if not holds_codes(base):  # floats; also the stand-in below, since PEFT's merging calls itself
            super().merge(safe_merge, adapter_names)
            return
        names = [name for name in check_adapters_to_merge(self, adapter_names) or () if name in self.lora_A]
        if not names:
            return
        before = list(self.merged_adapters)
        kept = self._unmerged or {"weight": _codes(base).cpu(), "bias": _copy(base.bias)}
        try:
            weight, bias = self._sum(base, kept, before, names)
        except Exception:
            self.merged_adapters = before
            raise
        self._unmerged = kept
        _set(base, weight, bias)

    def unmerge(self) -> None:
        """Put the codes and the bias back that were there before the first merge, bit for bit."""
        base: Any = self.get_base_layer()
        if self._unmerged is None or not holds_codes(base):
            super().unmerge()
            return
        _set(base, self._unmerged["weight"].to(base.weight.device), self._unmerged["bias"])
        for name in self.merged_adapters:
            self._caches.pop(f"{name}-weight_norm", None)  # DoRA's
        self.merged_adapters = []
        self._unmerged = None

    def _sum(
        self, base: Linear4bit | Linear8bitLt, kept: dict[str, Any], before: list[str], names: list[str]
    ) -> tuple[nn.Parameter, torch.Tensor | None]:
        """PEFT's own merge, on a float layer in place of ``base``. Returns its weight, quantised, and its bias."""
        device = base.weight.device
        stand_in = nn.Linear(base.in_features, base.out_features, base.bias is not None, device="meta")
        stand_in.weight = nn.Parameter(_dequantize(kept["weight"].to(device)), requires_grad=False)
        if base.bias is not None:
            stand_in.bias = nn.Parameter(kept["bias"].to(device, copy=True), requires_grad=False)
        self.base_layer = stand_in
        try:
            self.merged_adapters = []
            for group in (before, names):
                if group:
                    super().merge(False, group)
        finally:
            self.base_layer = base
        # Through the dtype that the weight had: the codes that the merged model would get in that dtype.
        weight = stand_in.weight.data.to(_float_dtype(base))
        if not bool(torch.isfinite(weight).all()):
            raise ValueError(
                f"adapter_names={names}: merged, the weight holds NaN or infinity in {weight.dtype}, which codes "
                "cannot hold. Train the adapter again, or merge it into the float model."
            )
        return _quantize(base, weight), None if base.bias is None else stand_in.bias.data


def _codes(base: Linear4bit | Linear8bitLt) -> Params4bit | Int8Params:
    """The weight with the scales of the module's buffers, which tools may have moved past the parameter."""
    if isinstance(base, Linear4bit):
        return base.weight._like(base.weight.data, base._state_from_buffers())
    return base.weight._like(base.weight.data, base._scales())


def _dequantize(weight: Params4bit | Int8Params) -> torch.Tensor:
    """In float32, whatever dtype it had."""
    if isinstance(weight, Int8Params):
        assert weight.SCB is not None
        return dequantize_rows(weight.data, weight.SCB, torch.float32)
    assert weight.quant_state is not None
    return weight.quant_state.packed(weight.data).dequantize(torch.float32)


def _float_dtype(base: Linear4bit | Linear8bitLt) -> torch.dtype:
    """The dtype that the weight was quantised from; int8 codes are always made from float16."""
    state = base.quant_state if isinstance(base, Linear4bit) else None
    return torch.float16 if state is None or state.dtype is None else state.dtype


def _quantize(base: Linear4bit | Linear8bitLt, weight: torch.Tensor) -> nn.Parameter:
    """``weight`` as a parameter for ``base``, with the settings of the one that it has."""
    kind = Params4bit if isinstance(base, Linear4bit) else Int8Params
    dropped = ("quant_state", "bnb_quantized", "CB", "SCB")
    fields = {name: value for name, value in base.weight.__dict__.items() if name not in dropped}
    return kind(weight, requires_grad=False, **fields).to(weight.device)


def _set(base: nn.Linear, weight: nn.Parameter, bias: torch.Tensor | None) -> None:
    base.weight = weight
    if bias is not None:
        base.bias.data = bias.to(base.bias.device, base.bias.dtype)


def _copy(bias: torch.Tensor | None) -> torch.Tensor | None:
    return None if bias is None else bias.detach().to("cpu", copy=True)
