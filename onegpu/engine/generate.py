"""``model.generate`` bound to the instance: transformers prepares the call, our loop runs it.

Whatever our loop does not serve goes to transformers' own on the same model; ``model.generate.report`` says which it
was, and why. The class is untouched, and ``detach`` gives the instance its class's method back.
"""

from __future__ import annotations

import copy
import functools
import inspect
import logging
from collections.abc import Callable
from typing import Any

import torch

from onegpu.engine import prepare
from onegpu.engine.loop import Engine, Run, UnservedError, decode
from onegpu.errors import bad_argument
from onegpu.formats.bitsandbytes import Settings

logger = logging.getLogger("onegpu")

# Settings of other ways to generate than greedy search and sampling, and the values that mean "not that".
_OTHER_WAYS: dict[str, tuple[Any, ...]] = {
    "num_beams": (None, 1),
    "num_beam_groups": (None, 1),
    "constraints": (None,),
    "force_words_ids": (None,),
    "penalty_alpha": (None, 0, 0.0),
    "dola_layers": (None,),
    "prompt_lookup_num_tokens": (None,),
    "assistant_early_exit": (None,),
    "speculation_type": (None,),
    "use_mtp": (None, False),
}
_REPLACED = ("assistant_model", "custom_generate", "synced_gpus")


class Generate:
    """``generate`` of one model: called as transformers' method is, with the same result.

    Attributes:
        engine: what is kept between calls.
    """

    __name__ = "generate"

    def __init__(self, model: Any, engine: Engine | None = None) -> None:
        self.__self__, self.engine = model, engine or Engine()

    @property
    def __func__(self) -> Callable[..., Any]:
        return type(self.__self__).generate  # type: ignore[no-any-return]

    @property
    def __doc__(self) -> str | None:  # type: ignore[override]
        return self.__func__.__doc__

    @property
    def __signature__(self) -> inspect.Signature:
        signature = inspect.signature(self.__func__)
        return signature.replace(parameters=list(signature.parameters.values())[1:])

    @property
    def report(self) -> Run | None:
        """How the last call went; prints as a sentence."""
        return self.engine.last

    def warmup_shapes(self) -> list[tuple[str, dict[str, Any]]]:
        """What `onegpu.warmup` runs for it, beside what the model's modules say."""
        return prepare.ops(self.__self__)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        model, generate = self.__self__, self.__func__
        given = self.__signature__.bind(*args, **kwargs).arguments
        given.update(given.pop("kwargs", {}))
        _check_mask(given)
        home = _device_of_inputs(given)
        moves = home is not None and home != model.device and model.device.type != "meta"
        if moves:  # transformers would warn, and then fail, or copy every token
            given = _moved(given, model.device)
        reason = _other_way(model, given)
        if reason is None:
            streamer = given.get("streamer")
            given.pop("custom_generate", None)
            _stop_strings(model, given)
            given["custom_generate"] = functools.partial(_custom, self.engine, streamer)
        else:
            self.engine.last = Run("transformers", reason)
        result = generate(model, **given)
        return _brought_home(result, home) if moves and home is not None else result


def _check_mask(given: dict[str, Any]) -> None:
    """Name a mask that is not the prompt's, which torch would complain of somewhere in the model."""
    prompt = given.get("inputs", given.get("input_ids"))
    mask = given.get("attention_mask")
    if not isinstance(prompt, torch.Tensor) or not isinstance(mask, torch.Tensor) or prompt.ndim != 2 or mask.ndim != 2:
        return
    if mask.shape[0] not in (1, prompt.shape[0]) or mask.shape[1] < prompt.shape[1]:
        why = f"does not go with a prompt of {prompt.shape[0]} x {prompt.shape[1]} tokens"
        fix = "Pass a 1 or a 0 for each token, those in past_key_values too"
        raise bad_argument("attention_mask", list(mask.shape), why, fix)


def _device_of_inputs(given: dict[str, Any]) -> torch.device | None:
    """Where the prompt is."""
    prompts = (given.get(name) for name in ("inputs", "input_ids", "inputs_embeds"))
    return next((prompt.device for prompt in prompts if isinstance(prompt, torch.Tensor)), None)


def _moved(given: dict[str, Any], device: torch.device) -> dict[str, Any]:
    """Arguments of a call, tensors among them on ``device``."""
    return {name: value.to(device) if isinstance(value, torch.Tensor) else value for name, value in given.items()}


def _brought_home(result: Any, home: torch.device) -> Any:
    """What ``generate`` returned, on the device of its input; a cache stays where it is."""
    if isinstance(result, torch.Tensor):
        return result.to(home)
    for name in ("sequences", "scores", "logits"):
        value = getattr(result, name, None)
        if isinstance(value, torch.Tensor):
            result[name] = value.to(home)
        elif isinstance(value, tuple):
            result[name] = tuple(part.to(home) for part in value)
    return result


def _custom(
    engine: Engine,
    streamer: Any,
    model: Any,
    input_ids: torch.Tensor,
    logits_processor: Any,
    stopping_criteria: Any,
    generation_config: Any,
    **model_kwargs: Any,
) -> Any:
    """What transformers calls in the place of its own loop."""
    prepared = {
        "generation_config": generation_config,
        "logits_processor": logits_processor,
        "stopping_criteria": stopping_criteria,
        "streamer": streamer,
        "model_kwargs": model_kwargs,
    }
    try:
        return decode(engine, model, input_ids, prepared)
    except UnservedError as error:
        engine.last = Run("transformers", str(error))
    return type(model)._sample(
        model,
        input_ids,
        logits_processor=logits_processor,
        stopping_criteria=stopping_criteria,
        generation_config=generation_config,
        streamer=streamer,
        **model_kwargs,
    )


def begin(model: Any, settings: Settings | None = None) -> None:
    """Start compiling what ``attach`` would begin with, before the model is converted, and what that takes.

    settings: how it will be quantised, or None.
    """
    if _never(model) is None:
        prepare.begin_conversion(model, settings)


def attach(model: Any) -> str | None:
    """Give ``model`` our ``generate``; returns why not where transformers' stays."""
    reason = _never(model)
    if reason is None and not isinstance(model.__dict__.get("generate"), Generate):
        model.__dict__["generate"] = made = Generate(model)
        if prepare.begin(model):
            made.engine.prepared.add((model.device, model.dtype))
    return reason


def detach(model: Any) -> bool:
    """Give the class's ``generate`` back, with all memory that ours held; whether there was something to do."""
    ours = isinstance(model.__dict__.get("generate"), Generate)
    if ours:
        del model.__dict__["generate"]
    return ours


def _never(model: Any) -> str | None:
    from transformers import GenerationMixin, PreTrainedModel

    if not isinstance(model, PreTrainedModel) or not isinstance(model, GenerationMixin) or not model.can_generate():
        return "the model does not generate"
    if model.config.is_encoder_decoder:
        return "encoder-decoder models generate with transformers' loop"
    if type(model).generate is not GenerationMixin.generate or type(model)._sample is not GenerationMixin._sample:
        return f"{type(model).__name__} has a loop of its own"
    if "generate" in model.__dict__ and not isinstance(model.__dict__["generate"], Generate):
        return "the checkpoint brought its own generate"
    if model._is_stateful:
        return "the model keeps a state that is no key/value cache"
    return None


def _other_way(model: Any, given: dict[str, Any]) -> str | None:
    """Why this call is none of greedy search or sampling, or None."""
    for name in _REPLACED:
        if given.get(name):
            return f"{name} is given"
    for name, ordinary in _OTHER_WAYS.items():
        value = _setting(model, given, name)
        if not any(value is None if plain is None else value == plain for plain in ordinary):
            return f"{name}={value!r}"
    if model.generation_config.stop_strings is not None:
        return "stop_strings stand in the model's generation_config"
    if _sharded(model):
        return "the model is sharded over processes"
    return None


def _setting(model: Any, given: dict[str, Any], name: str) -> Any:
    """What transformers will take: the argument, else the configuration given, else the model's."""
    for source in (given.get(name), getattr(given.get("generation_config"), name, None)):
        if source is not None:
            return source
    return getattr(model.generation_config, name, None)


def _sharded(model: Any) -> bool:
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return False
    return torch.distributed.get_world_size() > 1


def _stop_strings(model: Any, given: dict[str, Any]) -> None:
    """Turn ``stop_strings`` into the criterion that they are: transformers loses the tokenizer on its way to us."""
    from transformers import StoppingCriteriaList, StopStringCriteria

    strings, tokenizer = _setting(model, given, "stop_strings"), given.get("tokenizer")
    if strings is None or tokenizer is None:
        return
    del given["tokenizer"]
    given.pop("stop_strings", None)
    if getattr(given.get("generation_config"), "stop_strings", None) is not None:
        given["generation_config"] = copy.copy(given["generation_config"])
        given["generation_config"].stop_strings = None
    criterion = StopStringCriteria(stop_strings=strings, tokenizer=tokenizer)
    given["stopping_criteria"] = StoppingCriteriaList([*(given.get("stopping_criteria") or []), criterion])
