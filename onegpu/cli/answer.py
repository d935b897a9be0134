"""One answer: prompt in, tokens out, measured. Shared by `generate`, `chat` and the demo."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

from onegpu.cli.options import SamplingOptions
from onegpu.engine.cache_size import cache_bytes
from onegpu.engine.prompt import check_prompt, room_for
from onegpu.engine.streaming import TimedStreamer, Timings
from onegpu.errors import CheckpointError

DEFAULT_NEW_TOKENS = 256


@dataclass
class Answer:
    """The answer's text and what it took. `interrupted`: Ctrl-C came before its end."""

    text: str
    prompt_tokens: int
    timings: Timings
    kv_cache_bytes: int
    interrupted: bool = False


def encode(tokenizer: Any, prompt: str | list[dict[str, str]]) -> dict[str, Any]:
    """Token ids [1, n] and mask of a text, or of a conversation through the chat template.

    Raises:
        CheckpointError: the tokenizer makes nothing of it. transformers invents an empty one for some model types when
            the folder holds none.
    """
    if isinstance(prompt, str):
        encoded = tokenizer(prompt, return_tensors="pt", verbose=False)  # a prompt too long is our error to raise
    else:
        encoded = tokenizer.apply_chat_template(
            prompt, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
    if prompt and encoded["input_ids"].shape[-1] == 0:
        reason, fix = "its tokenizer makes no tokens of the prompt", "Add the tokenizer's files to the model's folder"
        raise CheckpointError(file=str(tokenizer.name_or_path), reason=reason, fix=fix)
    return {name: encoded[name] for name in ("input_ids", "attention_mask") if name in encoded}


def plan_length(prompt_tokens: int, config: Any, wanted: int | None) -> int:
    """How many tokens to make: what the user wants, else 256 or what fits.

    Raises:
        ArgumentError: the prompt is empty, or it does not fit the model's context with the answer asked for.
    """
    check_prompt(prompt_tokens, config, wanted)
    if wanted is not None:
        return wanted
    room = room_for(config, prompt_tokens)
    return DEFAULT_NEW_TOKENS if room is None else min(DEFAULT_NEW_TOKENS, room)


def answer(
    model: Any,
    tokenizer: Any,
    inputs: dict[str, Any],
    sampling: SamplingOptions,
    max_new_tokens: int,
    write: Callable[[str], None] | None,
    interruptible: bool = False,
) -> Answer:
    """Runs `generate`.

    Args:
        inputs: from `encode`; moved to the model's device.
        write: gets the text in pieces as it becomes certain; None if nothing is to be shown.
        interruptible: Ctrl-C ends the answer and not the program.
    """
    import torch

    if sampling.seed is not None:
        torch.manual_seed(sampling.seed)  # transformers.set_seed would import the Trainer for the same effect
    arguments = sampling.arguments()
    inputs = {name: value.to(model.device) for name, value in inputs.items()}
    prompt_tokens = int(inputs["input_ids"].shape[1])
    streamer = TimedStreamer(tokenizer, write, stop=sampling.stop or ())
    beams = arguments.get("num_beams", 1) > 1  # transformers does not stream beam search
    if sampling.stop and not beams:  # beams are cut at the end
        arguments["stopping_criteria"] = [streamer.stopping_criterion]
    cache, interrupted = None, False
    streamer.start()
    try:
        with torch.inference_mode():
            output = model.generate(
                **inputs,
                **arguments,
                max_new_tokens=max_new_tokens,
                return_dict_in_generate=True,
                streamer=None if beams else streamer,
            )
        cache = output.past_key_values if "past_key_values" in output else None
        if beams:
            skip = 1 if model.config.is_encoder_decoder else prompt_tokens  # the decoder's start token, or the prompt
            streamer.put(inputs["input_ids"])
            streamer.put(output.sequences[0, skip:].cpu())
            streamer.end()
    except KeyboardInterrupt:
        if not interruptible:
            raise
        streamer.end()
        interrupted = True
    return Answer(streamer.text, prompt_tokens, streamer.timings(), cache_bytes(cache), interrupted)


def as_json(result: Answer, model: Any, load_s: float) -> dict[str, Any]:
    """The object that `--json` prints for an answer."""
    timings = asdict(result.timings)
    return {
        "text": result.text,
        "tokens": {"prompt": result.prompt_tokens, "new": timings.pop("new_tokens")},
        "timings": {"load_s": load_s, **timings},
        "memory": memory(model, result.kv_cache_bytes),
    }


def memory(model: Any, kv_cache_bytes: int) -> dict[str, Any]:
    """Bytes by use: weights by format against 16 bits, key/value cache, the process's and the GPU's peak."""
    import torch

    from onegpu.hardware import peak_process_bytes
    from onegpu.placement import memory_table

    gpus = range(torch.cuda.device_count()) if torch.cuda.is_available() else range(0)
    return {
        "weights": [asdict(row) for row in memory_table(model)],
        "kv_cache_bytes": kv_cache_bytes,
        "process_peak_bytes": peak_process_bytes(),
        "gpu_peak_bytes": {str(index): torch.cuda.max_memory_allocated(index) for index in gpus},
    }


def speed_line(result: Answer) -> str:
    """`42 tokens, 31.4 tokens/s, first after 0.21 s`: what is known, in one line."""
    timings = result.timings
    parts = [f"{timings.new_tokens} tokens"]
    if timings.decode_tokens_per_s is not None:
        parts.append(f"{timings.decode_tokens_per_s:.1f} tokens/s")
    if timings.time_to_first_token_s is not None:
        parts.append(f"first after {timings.time_to_first_token_s:.2f} s")
    return ", ".join(parts) + (" (interrupted)" if result.interrupted else "")
