"""Drop-in Auto classes: ``from onegpu import AutoModelForCausalLM`` in place of ``from transformers import …``.

Every Auto class of transformers that loads a model is subclassed by one factory; the others are transformers' own. What
``from_pretrained`` returns is an instance of transformers' class for that model.
"""

from __future__ import annotations

import copy
import functools
import logging
import math
import os
import pydoc
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
import transformers
from transformers import AutoConfig, AutoProcessor, AutoTokenizer, BitsAndBytesConfig
from transformers.initialization import no_init_weights
from transformers.models.auto.auto_factory import _BaseAutoModelClass

from onegpu.arguments import Request, check_path, checkpoint_dtype, translate
from onegpu.convert import instance
from onegpu.convert.attention import register
from onegpu.convert.attention_rule import say_left, take_attention
from onegpu.convert.dequantize import leave_new_layers
from onegpu.convert.optimize import optimize
from onegpu.convert.session import Session, loading
from onegpu.engine.generate import attach as attach_generate
from onegpu.errors import ArgumentError, CheckpointError, bad_argument
from onegpu.formats.bitsandbytes import Settings
from onegpu.formats.checkpoint import read_headers
from onegpu.formats.config import CONFIG_ERRORS, config_error, sanitize
from onegpu.formats.folder import find_source
from onegpu.formats.gguf import is_gguf, materialize
from onegpu.formats.verify import verify_loaded
from onegpu.placement.device_map import POLICIES, Placement, Weights, Wish, place
from onegpu.placement.expand import allow_expansion
from onegpu.placement.fit import check_fits
from onegpu.placement.sizes import stored_sizes

logger = logging.getLogger("onegpu")

__all__ = ["AutoConfig", "AutoProcessor", "AutoTokenizer", "BitsAndBytesConfig", "pipeline"]

register()  # two entries in dictionaries: attn_implementation="onegpu" works in plain transformers from here on

_CONFIG_ARGUMENTS = ("dtype", "torch_dtype", "quantization_config", "attn_implementation", "experts_implementation")


@functools.cache
def __getattr__(name: str) -> Any:
    base = getattr(transformers, name, None) if name.startswith("Auto") else None
    if base is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}: transformers has no such Auto class")
    if not (isinstance(base, type) and issubclass(base, _BaseAutoModelClass)):
        return base
    return _make(base)


def _make(base: type) -> type:
    """A subclass of transformers' Auto class ``base`` that loads through :func:`load`."""

    def from_pretrained(cls: Any, pretrained_model_name_or_path: Any, *model_args: Any, **kwargs: Any) -> Any:
        return load(super(made, cls).from_pretrained, pretrained_model_name_or_path, model_args, kwargs)

    from_pretrained.__doc__ = load.__doc__
    made: Any = type(base.__name__, (base,), {"from_pretrained": classmethod(from_pretrained), "__module__": __name__})
    return made  # type: ignore[no-any-return]


def load(from_pretrained: Any, path: Any, model_args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Load a model: transformers' ``from_pretrained`` and its arguments, and these.

    Args:
        load_in_4bit, load_in_8bit: quantise while loading, as ``BitsAndBytesConfig(load_in_4bit=True)`` would.
        quantization_config: a ``BitsAndBytesConfig`` (or dict) served by onegpu; another one goes to transformers.
        bnb_4bit_*, llm_int8_*: fields of ``BitsAndBytesConfig``, beside ``load_in_…bit``.
        llm_int8_exact: the arithmetic of LLM.int8() on a GPU too, where activations are otherwise not rounded; slower.
            Of a model in 8 bits, quantised while loading or before; files do not keep it.
        replace_default_skips: ``llm_int8_skip_modules`` replaces the default skip list instead of adding to it.
        use_flash_attention_2: the same as ``attn_implementation="flash_attention_2"`` and ``"onegpu"``: FlashAttention,
            no package needed. Parts of a model that it does not serve keep their own attention, and it says so.
        torch_dtype, dtype: dtype of the float weights; the checkpoint's by default.
        device_map: "auto", "balanced", "balanced_low_0", "sequential", a device, or a dict from parts to devices. What
            does not fit on GPUs goes to CPU memory, quantised weights as they are.
        max_memory: bytes for each device: ``{0: "6GB", "cpu": "30GB"}``; without it, what is free less a reserve.
        strict: tensors missing from the files or unknown to the model are errors (True by default).

    Raises:
        ArgumentError: an argument's value cannot work. CheckpointError: a file is damaged, incomplete or of another
        format than it says. MemoryBudgetError: it does not fit. All before anything is half loaded.
    """
    kwargs = dict(kwargs)
    request = translate(kwargs)
    wants_info = kwargs.pop("output_loading_info", False)
    wants_mismatch = kwargs.pop("ignore_mismatched_sizes", False)
    gguf_file = kwargs.pop("gguf_file", None)
    if is_gguf(path, gguf_file):
        path = materialize(path, gguf_file=gguf_file)
    check_path(path)
    config, kwargs = _load_config(path, kwargs)
    flash = take_attention(config) or request.flash
    session = _claim(path, config, request, kwargs)
    if request.exact:
        if session is None or session.settings.bits != 8:
            why = "is about int8 layers, and this model gets none"
            raise bad_argument("llm_int8_exact", True, why, "add load_in_8bit=True, or leave it out")
        session.settings = replace(session.settings, exact=True)
    kwargs["dtype"] = _resolve_dtype(path, config, request)
    placement = _settle(from_pretrained, path, config, request, session, kwargs)
    try:
        with loading(session) if session is not None else _nothing():
            model, info = from_pretrained(
                path, *model_args, config=config, output_loading_info=True, ignore_mismatched_sizes=True, **kwargs
            )
    except Exception as error:
        if session is not None and session.errors:
            raise session.errors[0] from error
        raise _explain(error, path) from error
    if session is not None:
        session.report.leave(leave_new_layers(model), "new: not in the checkpoint")
    noted = session.scales if session is not None else []
    verify_loaded(model, info, str(path), strict=request.strict, allow_mismatch=wants_mismatch, noted=noted)
    placement = session.placement if session is not None else placement
    if placement is not None and placement.spread:
        from onegpu.placement.hooks import attach

        attach(model, placement)
        logger.warning("%s", placement.text)
    else:
        allow_expansion(model)
    instance.bind_conversions(model)
    if flash:
        say_left(optimize(model), model)
    attach_generate(model)
    return (model, info) if wants_info else model


def _nothing() -> Any:
    import contextlib

    return contextlib.nullcontext()


def _load_config(path: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """The config, cleaned of fields that name code, and the arguments that it did not take."""
    given = kwargs.pop("config", None)
    if given is not None and not isinstance(given, str):
        return copy.deepcopy(given), kwargs
    held = {name: kwargs.pop(name) for name in _CONFIG_ARGUMENTS if name in kwargs}
    try:
        config, rest = AutoConfig.from_pretrained(given or path, return_unused_kwargs=True, **kwargs)
    except CONFIG_ERRORS as error:
        explained = _explain(error, path)
        raise (config_error(path, error) if explained is error else explained) from error
    sanitize(config)
    # AutoConfig takes hub arguments for itself and drops them; the weights need them as well.
    return config, {**{name: value for name, value in kwargs.items() if name in rest or name in _HUB}, **held}


_HUB = frozenset(
    (
        "cache_dir",
        "code_revision",
        "force_download",
        "local_files_only",
        "proxies",
        "revision",
        "subfolder",
        "token",
        "trust_remote_code",
        "use_safetensors",
    )
)


def _claim(path: Any, config: Any, request: Request, kwargs: dict[str, Any]) -> Session | None:
    """Decide who quantises, and mark the config so that transformers asks us. None: nobody, or transformers."""
    stored = getattr(config, "quantization_config", None)
    if stored is None and hasattr(config, "get_text_config"):
        stored = getattr(config.get_text_config(), "quantization_config", None)
    if stored is None and request.config is None:
        return None
    from onegpu.convert.quantizer import QUANT_METHOD, OneGPUConfig

    if stored is None:
        assert request.settings is not None
        kwargs["quantization_config"] = OneGPUConfig()
        return Session(str(path), request.config, request.settings)
    fields = stored if isinstance(stored, dict) else stored.to_dict()
    method = str(getattr(fields.get("quant_method"), "value", fields.get("quant_method")))
    if not (method == "bitsandbytes" or fields.get("load_in_4bit") or fields.get("load_in_8bit")):
        if request.config is not None:
            raise bad_argument(
                f"load_in_{request.settings.bits if request.settings else 4}bit",
                True,
                f"is asked of a checkpoint that is quantised with {method} already",
                "load it without, or start from the unquantised checkpoint",
            )
        return None
    try:
        saved = BitsAndBytesConfig.from_dict({k: v for k, v in fields.items() if k != "quant_method"})
        settings = Settings.from_config(saved)
    except (TypeError, ValueError, AttributeError) as error:
        raise CheckpointError(
            file=str(path), reason=f"quantization_config in config.json is damaged: {error}", fix="correct config.json"
        ) from None
    if request.settings is not None and request.settings.bits != settings.bits:
        raise bad_argument(
            f"load_in_{request.settings.bits}bit",
            True,
            f"is asked of a checkpoint that is quantised to {settings.bits} bits already",
            "load it without, or start from the unquantised checkpoint",
        )
    config.quantization_config = {"quant_method": QUANT_METHOD}
    return Session(str(path), saved, settings)


def _settle(
    from_pretrained: Any, path: Any, config: Any, request: Request, session: Session | None, kwargs: dict[str, Any]
) -> Placement | None:
    """Give transformers its ``device_map``: a plain dict of ours, or what the user asked for where that is one device.

    A quantised model is planned by the quantizer, on the model that transformers builds; for another one it is built
    here, on the meta device, where the map has to be planned.
    """
    wish = request.wish
    asked = {name: value for name, value in (("device_map", wish.device_map), ("max_memory", wish.max_memory)) if value}
    if wish.device_map is not None:
        asked["device_map"] = wish.device_map  # GPU 0 is a device too
    if session is not None:
        session.wish = wish
        if asked or wish.max_memory is not None:
            kwargs["device_map"] = {}  # filled in by the quantizer, before anything is loaded
        return None
    several = isinstance(wish.device_map, Mapping) and len(set(map(str, wish.device_map.values()))) > 1
    words = wish.max_memory is not None or (isinstance(wish.device_map, str) and wish.device_map in POLICIES)
    foreign = "quantization_config" in kwargs or getattr(config, "quantization_config", None) is not None
    if not (several or words) or foreign or _wants_disk(wish):
        kwargs.update(asked)  # transformers' own: one device, another quantizer, or the disk
        if not (several or words or foreign):
            _check_plain(path, config, wish.device_map, kwargs)
        return None
    dtype = kwargs["dtype"]
    if not isinstance(dtype, torch.dtype):
        dtype = checkpoint_dtype(path, config) or torch.float32
    with torch.device("meta"), no_init_weights():
        auto = from_pretrained.__self__
        model = auto.from_config(copy.deepcopy(config), dtype=dtype, trust_remote_code=kwargs["trust_remote_code"])
    sizes = stored_sizes(model, dtypes=model._get_dtype_plan(dtype))
    placement = place(Weights(model, sizes, str(dtype).removeprefix("torch."), shrinks=True), wish)
    kwargs["device_map"] = placement.device_map
    return placement


def _check_plain(path: Any, config: Any, device: Any, kwargs: dict[str, Any]) -> None:
    """Read the headers of a folder's files and compare their bytes, in the dtype to load in, with the free memory.

    A name on the hub is checked by transformers as it downloads.
    """
    if not os.path.isdir(path) or kwargs.get("variant") or kwargs.get("subfolder"):
        return
    dtype = kwargs["dtype"]
    tensors = read_headers(find_source(path).weights)
    size = dtype.itemsize if isinstance(dtype, torch.dtype) else None
    needed = sum(t.nbytes if size is None else math.prod(t.shape) * size for t in tensors)
    if isinstance(device, Mapping):
        device = next(iter(device.values()), "cpu")
    target = torch.device("cuda", device) if isinstance(device, int) else torch.device(device or "cpu")
    if target.type != "meta":
        check_fits(needed, target, f"{config.model_type} from {path}", "load_in_4bit=True makes it smaller.")


def _wants_disk(wish: Wish) -> bool:
    devices = list(wish.device_map.values()) if isinstance(wish.device_map, Mapping) else [wish.device_map]
    return "disk" in [*devices, *(wish.max_memory if isinstance(wish.max_memory, Mapping) else ())]


def _resolve_dtype(path: Any, config: Any, request: Request) -> Any:
    """The dtype to load in: the one asked for, else the checkpoint's; 16 bits where FlashAttention was asked for."""
    if request.dtype not in (None, "auto"):
        return request.dtype
    if request.flash and checkpoint_dtype(path, config) in (None, torch.float32):
        before_ampere = torch.cuda.is_available() and torch.cuda.get_device_capability()[0] < 8
        dtype = torch.float16 if before_ampere else torch.bfloat16
        _say_once(
            f"FlashAttention works in 16 bits: loading the float32 checkpoint in {str(dtype)[6:]} (dtype= changes that)"
        )
        return dtype
    return "auto"


@functools.cache
def _say_once(message: str) -> None:
    logger.warning(message)


def _explain(error: Exception, path: Any) -> Exception:
    """Our error for one that transformers or safetensors raises about a user's input; others come back as they are."""
    from safetensors import SafetensorError

    from onegpu.errors import OneGPUError

    if isinstance(error, OneGPUError):
        return error
    if isinstance(error, ValueError) and "trust_remote_code" in str(error):
        return bad_argument(
            "trust_remote_code",
            False,
            f"but {str(path)!r} is a model only with code of its own, which loading would run",
            "read that code, and pass trust_remote_code=True if you trust it",
        )
    text = " ".join(str(error).split())[:400]
    if isinstance(error, SafetensorError):
        return CheckpointError(file=str(path), reason=text, fix="download or save the file again")
    if isinstance(error, (OSError, KeyError)) or (isinstance(error, ValueError) and "config" in text.lower()):
        return ArgumentError(
            f"pretrained_model_name_or_path={str(path)!r} cannot be loaded: {text} Pass a model's folder or its name."
        )
    return error


def pipeline(task: str | None = None, model: Any = None, **kwargs: Any) -> Any:
    """transformers' ``pipeline``; a model given by name is loaded through our Auto classes.

    ``model_kwargs`` may hold every argument of :func:`load`, for example ``{"load_in_4bit": True}``.
    """
    from transformers.pipelines import check_task, get_task

    build: Any = transformers.pipeline  # overloaded by task; ours is a string
    if not isinstance(model, str):
        return build(task, model=model, **kwargs)
    task = task or get_task(model, token=kwargs.get("token"))
    options = {**(kwargs.pop("model_kwargs", None) or {})}
    for name in ("dtype", "torch_dtype", "device_map", "trust_remote_code", "revision", "token"):
        if kwargs.get(name) is not None:
            options.setdefault(name, kwargs[name])
    for name in ("device_map", "dtype", "torch_dtype"):
        kwargs.pop(name, None)
    _, spec, _ = check_task(task)
    config, _ = _load_config(model, {k: v for k, v in options.items() if k in _HUB})
    classes = [auto for auto in spec["pt"] if type(config) in auto._model_mapping] or list(spec["pt"])
    loaded = __getattr__(classes[0].__name__).from_pretrained(model, **options)
    # Given an object, transformers no longer knows where its companions are: it is told their name.
    made_by = spec["impl"]
    if isinstance(made_by, str):  # since 5.2x the class is named, not imported
        made_by = pydoc.locate(made_by)
    for part in ("tokenizer", "image_processor", "feature_extractor", "processor"):
        if getattr(made_by, f"_load_{part}", None) is True:
            kwargs.setdefault(part, model)
    return build(task, model=loaded, **kwargs)
