"""`onegpu generate`: continue a text or answer a question."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated

import typer

from onegpu.cli import options as opt
from onegpu.cli.failure import guarded
from onegpu.errors import bad_argument


@guarded
def generate(
    model: opt.Model,
    prompt: Annotated[str | None, typer.Argument(help="The prompt; - reads it from stdin.")] = None,
    file: Annotated[Path | None, typer.Option(help="Read the prompt from a file.")] = None,
    chat: Annotated[bool, typer.Option("--chat/--raw", help="Put the prompt through the chat template.")] = False,
    gguf_file: opt.GgufFile = None,
    load_in_4bit: opt.LoadIn4Bit = False,
    load_in_8bit: opt.LoadIn8Bit = False,
    quant_type: opt.Quant = None,
    double_quant: opt.DoubleQuant = False,
    dtype: opt.Type = None,
    device_map: opt.DeviceMap = None,
    max_memory: opt.MaxMemory = None,
    trust_remote_code: opt.TrustRemoteCode = False,
    cache_dir: opt.CacheDir = None,
    max_new_tokens: opt.MaxNewTokens = None,
    do_sample: opt.Sample = None,
    temperature: opt.Temperature = None,
    top_k: opt.TopK = None,
    top_p: opt.TopP = None,
    min_p: opt.MinP = None,
    typical_p: opt.TypicalP = None,
    repetition_penalty: opt.RepetitionPenalty = None,
    no_repeat_ngram_size: opt.NoRepeatNgramSize = None,
    num_beams: opt.NumBeams = None,
    seed: opt.Seed = None,
    stop: opt.Stop = None,
    json_output: opt.Json = False,
) -> None:
    """Continue a text, or answer it with --chat. The text streams to stdout; everything else goes to stderr.

    Examples:

        onegpu generate Qwen/Qwen2.5-0.5B-Instruct "Why is the sky blue?" --chat --load-in-4bit

        onegpu generate ./model --file prompt.txt --max-new-tokens 500 --temperature 0.7 --seed 1

        git diff | onegpu generate ./model.gguf - --load-in-4bit --quant-type nf4 --json
    """
    text = read_prompt(prompt, file)
    weights = opt.ModelOptions(
        model, gguf_file, load_in_4bit, load_in_8bit, quant_type, double_quant, dtype, device_map, max_memory,
        trust_remote_code, cache_dir,
    )  # fmt: skip
    settings = {
        "temperature": temperature, "top_k": top_k, "top_p": top_p, "min_p": min_p, "typical_p": typical_p,
        "repetition_penalty": repetition_penalty, "no_repeat_ngram_size": no_repeat_ngram_size, "num_beams": num_beams,
    }  # fmt: skip
    sampling = opt.SamplingOptions(max_new_tokens, do_sample, seed, stop, settings)
    sampling.arguments()  # refuses contradictions now, before the model is found
    run(text, chat, weights, sampling, json_output)


def read_prompt(prompt: str | None, file: Path | None) -> str:
    """The prompt from whichever of the three places the user named.

    Raises:
        ArgumentError: none or two places, an unreadable file, or nothing but white space in it.
    """
    if (prompt is None) == (file is None):
        why = "is missing" if prompt is None else "and --file exclude each other"
        raise bad_argument("prompt", prompt, why, "Pass a text, or --file FILE, or - to read stdin")
    if file is not None:
        try:
            text = file.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise bad_argument(
                "--file", str(file), f"is not UTF-8 text ({error.reason})", "Pass a text file"
            ) from error
        except OSError as error:
            raise bad_argument("--file", str(file), f"cannot be read: {error.strerror}", "Check the path") from error
    else:
        assert prompt is not None
        text = sys.stdin.read() if prompt == "-" else prompt
    if not text.strip():
        raise bad_argument("prompt", text, "is empty: there is nothing to continue", "Pass some text")
    return text


def run(
    text: str, chat: bool, weights: opt.ModelOptions, sampling: opt.SamplingOptions, json_output: bool = False
) -> None:
    """Prepares, checks, loads, answers, prints."""
    from onegpu.cli.answer import answer, as_json, encode, plan_length, speed_line
    from onegpu.cli.loading import load, prepare

    prepared = prepare(weights, progress=not json_output)
    tokenizer = prepared.tokenizer
    if chat and not tokenizer.chat_template:
        raise bad_argument("--chat", True, f"needs a chat template, and {weights.model} has none", "Use --raw")
    inputs = encode(tokenizer, [{"role": "user", "content": text}] if chat else text)
    length = plan_length(int(inputs["input_ids"].shape[1]), prepared.config, sampling.max_new_tokens)
    model, load_s = load(prepared)
    result = answer(model, tokenizer, inputs, sampling, length, None if json_output else write)
    if json_output:
        typer.echo(json.dumps(as_json(result, model, load_s)))
    else:
        typer.echo()
        typer.secho(speed_line(result), dim=True, err=True)


def write(piece: str) -> None:
    """Shows a piece of text at once."""
    typer.echo(piece, nl=False)
    sys.stdout.flush()
