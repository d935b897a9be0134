"""``from_pretrained``'s arguments, in every spelling people type, to one request."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from onegpu.errors import ArgumentError, bad_argument
from onegpu.formats.bitsandbytes import Settings
from onegpu.formats.folder import check_path as check_path  # part of this module for its callers
from onegpu.hardware import check_device
from onegpu.placement.device_map import POLICIES, Wish

_FLASH = ("flash_attention_2", "onegpu")
_DTYPES = ("auto", "float32", "float16", "bfloat16", "float64")
# Arguments of 2023 that no longer mean anything to transformers; people's scripts still pass them.
_OBSOLETE = ("resume_download", "offload_state_dict", "low_cpu_mem_usage", "_fast_init")


@dataclass
class Request:
    """What the user asked for, checked.

    config: a ``BitsAndBytesConfig`` or None. exact: int8 layers round activations on every device. flash:
    FlashAttention was asked for. strict: missing or surplus tensors are errors. dtype: None (the checkpoint's), "auto"
    or a torch dtype. wish: the devices asked for.
    """

    config: Any = None
    settings: Settings | None = None
    exact: bool = False
    flash: bool = False
    strict: bool = True
    dtype: Any = None
    wish: Wish = field(default_factory=Wish)


def translate(kwargs: dict[str, Any]) -> Request:
    """Take our arguments out of ``kwargs`` and leave what transformers understands.

    Raises:
        ArgumentError: values that contradict each other or mean nothing, naming argument, value and fix.
    """
    request = Request(strict=_flag(kwargs, "strict", True), exact=_flag(kwargs, "llm_int8_exact"))
    _quantization(kwargs, request)
    _attention(kwargs, request)
    _dtype(kwargs, request)
    _device(kwargs, request)
    if kwargs.pop("use_safetensors", None) is False:
        raise bad_argument(
            "use_safetensors", False, "would unpickle weights, which runs code", "convert the weights to safetensors"
        )
    kwargs["use_safetensors"] = True
    kwargs.setdefault("trust_remote_code", False)
    if "use_auth_token" in kwargs:
        kwargs.setdefault("token", kwargs.pop("use_auth_token"))
    for name in _OBSOLETE:
        kwargs.pop(name, None)
    return request


def _flag(kwargs: dict[str, Any], name: str, default: bool = False) -> bool:
    value = kwargs.pop(name, default)
    value = default if value is None else value
    if not isinstance(value, bool):
        raise bad_argument(name, value, "is no truth value", "pass True or False")
    return value


def _quantization(kwargs: dict[str, Any], request: Request) -> None:
    from transformers import BitsAndBytesConfig

    four, eight = _flag(kwargs, "load_in_4bit"), _flag(kwargs, "load_in_8bit")
    replace_skips = _flag(kwargs, "replace_default_skips")
    config = kwargs.pop("quantization_config", None)
    if four and eight:
        raise bad_argument("load_in_4bit", True, "and load_in_8bit=True exclude each other", "pass one of them")
    options = {key: kwargs.pop(key) for key in list(kwargs) if key.startswith(("bnb_4bit_", "llm_int8_"))}
    if config is not None and (four or eight or options):
        named = next(iter(options), "load_in_4bit" if four else "load_in_8bit")
        raise bad_argument(
            named,
            options.get(named, True),
            "is given beside quantization_config",
            f"put {named} into quantization_config",
        )
    if four or eight:
        _check_known(options)
        _check_4bit_type(options.get("bnb_4bit_quant_type", "fp4"))
        try:
            config = BitsAndBytesConfig(load_in_4bit=four, load_in_8bit=eight, **options)
        except (TypeError, ValueError, AttributeError) as error:
            raise ArgumentError(
                f"quantisation options {options!r} do not fit together: {error}. Correct them."
            ) from None
    elif options:
        named = next(iter(options))
        raise bad_argument(
            named, options[named], "is given without quantisation", "add load_in_4bit=True or load_in_8bit=True"
        )
    if isinstance(config, Mapping) and (config.get("load_in_4bit") or config.get("load_in_8bit")):
        if config.get("load_in_4bit") and config.get("load_in_8bit"):
            raise bad_argument("quantization_config", dict(config), "asks for 4 and 8 bits at once", "keep one of them")
        _check_known(config)
        _check_4bit_type(config.get("bnb_4bit_quant_type", "fp4"))
        config = BitsAndBytesConfig.from_dict(dict(config))
    if isinstance(config, BitsAndBytesConfig):
        request.config, request.settings = config, Settings.from_config(config, not replace_skips)
    elif config is not None:
        kwargs["quantization_config"] = config  # transformers' own quantizers: GPTQ, AWQ, torchao, …


def _check_known(options: Mapping[str, Any]) -> None:
    """transformers drops what it does not know, and quantises in another way than was asked for."""
    from transformers import BitsAndBytesConfig

    known = {*inspect.signature(BitsAndBytesConfig.__init__).parameters, *BitsAndBytesConfig().to_dict()} - {"self"}
    for name, value in options.items():
        if name not in known:
            near = difflib.get_close_matches(name, known, 1, 0.85)
            fix = f"did you mean {near[0]}?" if near else f"use one of {', '.join(sorted(known))}"
            raise bad_argument(name, value, "is no option of BitsAndBytesConfig", fix)


def _check_4bit_type(quant_type: Any) -> None:
    if quant_type not in ("nf4", "fp4"):
        raise bad_argument("bnb_4bit_quant_type", quant_type, "is not a 4-bit type", "use 'nf4' or 'fp4'")


def _attention(kwargs: dict[str, Any], request: Request) -> None:
    flash, attention = _flag(kwargs, "use_flash_attention_2"), kwargs.get("attn_implementation")
    if flash and attention not in (None, *_FLASH):
        raise bad_argument(
            "use_flash_attention_2", True, f"contradicts attn_implementation={attention!r}", "pass one of them"
        )
    request.flash = flash or attention in _FLASH
    if request.flash:
        # Loaded with what transformers chooses: models that have no other attention than their own load as well, and
        # whatever ours can serve is converted after that.
        kwargs.pop("attn_implementation", None)


def _dtype(kwargs: dict[str, Any], request: Request) -> None:
    old, new = kwargs.pop("torch_dtype", None), kwargs.pop("dtype", None)
    if old is not None and new is not None and old != new:
        raise bad_argument("torch_dtype", old, f"contradicts dtype={new!r}", "pass one of them")
    value = old if new is None else new
    if isinstance(value, str):
        if value.removeprefix("torch.") not in _DTYPES:
            raise bad_argument("dtype", value, "is no dtype to load a model in", f"use one of {', '.join(_DTYPES)}")
        value = value if value == "auto" else getattr(torch, value.removeprefix("torch."))
    elif value is not None and not isinstance(value, (torch.dtype, Mapping)):  # a mapping: by sub-model
        raise bad_argument("dtype", value, "is no dtype", f"use one of {', '.join(_DTYPES)}")
    if isinstance(value, torch.dtype) and not value.is_floating_point:
        raise bad_argument("dtype", value, "cannot hold weights", "use float16, bfloat16 or float32")
    request.dtype = value


def _device(kwargs: dict[str, Any], request: Request) -> None:
    device_map, max_memory = kwargs.pop("device_map", None), kwargs.pop("max_memory", None)
    devices = device_map.values() if isinstance(device_map, Mapping) else [device_map]
    for device in devices:
        if device not in (*POLICIES, "disk", "meta", None):
            check_device(device, name="device_map")
            _check_word(device)
    if isinstance(device_map, Mapping) and not device_map:
        raise bad_argument("device_map", device_map, "names no device", "leave it out, or pass 'auto'")
    request.wish = Wish(device_map, max_memory)


def _check_word(device: Any) -> None:
    if isinstance(device, str) and not device.isdecimal():
        try:
            torch.device(device)
        except RuntimeError:
            raise bad_argument(
                "device_map", device, "is no device", f"use {', '.join(map(repr, sorted(POLICIES)))}, 'cuda:0' or 'cpu'"
            ) from None


def checkpoint_dtype(path: str | Path, config: Any) -> torch.dtype | None:
    """The dtype a checkpoint says it has, None if it does not."""
    dtype = getattr(config, "dtype", None)
    if dtype is None and hasattr(config, "get_text_config"):
        dtype = getattr(config.get_text_config(), "dtype", None)
    return getattr(torch, dtype) if isinstance(dtype, str) else dtype
