"""`onegpu quantize`: a checkpoint on disk to a smaller one on disk."""

from __future__ import annotations

import json
import time
from enum import Enum
from pathlib import Path
from typing import Annotated, Any

import typer

from onegpu.cli.failure import guarded
from onegpu.cli.options import Json, Model

_FORMAT, _FILES = "Format", "Files"


class Format(str, Enum):
    """What the weights become."""

    nf4 = "nf4"
    fp4 = "fp4"
    int8 = "int8"


class FloatType(str, Enum):
    """Types of the weights that are not quantised."""

    float32 = "float32"
    float16 = "float16"
    bfloat16 = "bfloat16"


@guarded
def quantize(
    model: Model,
    to: Annotated[Format, typer.Option(help="Format of the quantised weights.", rich_help_panel=_FORMAT)],
    output: Annotated[Path, typer.Option("--output", "-o", help="The folder to make.", rich_help_panel=_FILES)],
    double_quant: Annotated[
        bool, typer.Option("--double-quant", help="Quantise the 4-bit scales as well.", rich_help_panel=_FORMAT)
    ] = False,
    skip_module: Annotated[
        list[str] | None,
        typer.Option(help="A layer to leave as it is, beside the head; repeatable.", rich_help_panel=_FORMAT),
    ] = None,
    dtype: Annotated[
        FloatType | None,
        typer.Option(help="Type of the other weights.  [the checkpoint's]", rich_help_panel=_FORMAT),
    ] = None,
    bitsandbytes_compatible: Annotated[
        bool,
        typer.Option(
            "--bitsandbytes-compatible",
            help="Leave what transformers + bitsandbytes cannot load quantised.",
            rich_help_panel=_FORMAT,
        ),
    ] = False,
    max_shard_size: Annotated[
        str, typer.Option(help="Most bytes of one file; also what is held in memory.", rich_help_panel=_FILES)
    ] = "5GB",
    revision: Annotated[
        str | None, typer.Option(help="Branch, tag or commit of a model on the hub.", rich_help_panel=_FILES)
    ] = None,
    device: Annotated[str | None, typer.Option(help="Where to quantise: cpu, cuda, cuda:1.  [the GPU, if any]")] = None,
    json_output: Json = False,
) -> None:
    """Quantise a checkpoint to a new folder, in bounded memory.

    A command that was interrupted goes on where it was when it is repeated.

    Examples:

        onegpu quantize meta-llama/Llama-3.1-8B --to nf4 --double-quant --output llama-nf4

        onegpu quantize ./my-model --to int8 --output ./my-model-int8 --skip-module q_proj
    """
    from onegpu.convert.quantize_checkpoint import quantize_checkpoint

    start = time.perf_counter()
    try:
        with _Bar(show=not json_output) as bar:
            result = quantize_checkpoint(
                model,
                output,
                to.value,
                double_quant=double_quant,
                skip_modules=skip_module or (),
                max_shard_size=max_shard_size,
                dtype=dtype.value if dtype is not None else None,
                revision=revision,
                bitsandbytes_compatible=bitsandbytes_compatible,
                device=device,
                progress=None if json_output else bar.advance,
            )
    except KeyboardInterrupt:
        typer.echo("Interrupted. The same command goes on from the last file that was finished.", err=True)
        raise
    seconds = time.perf_counter() - start
    if json_output:
        typer.echo(json.dumps({**result.to_dict(), "seconds": seconds}))
        return
    ratio = result.output_bytes / max(result.source_bytes, 1)
    typer.echo(
        f"{result.output}: {len(result.quantized)} weights in {result.to}, {len(result.left)} left as they were, "
        f"{result.output_bytes / 1e6:.1f} MB in {result.shards} file{'s' if result.shards != 1 else ''} "
        f"({ratio:.0%} of the source), {seconds:.1f} s"
    )
    for note in result.notes:
        typer.echo(note)


class _Bar:
    """A progress bar on stderr over the source's bytes; it appears with the first tensor."""

    def __init__(self, show: bool) -> None:
        self._show = show
        self._progress: Any = None
        self._task: Any = None

    def __enter__(self) -> _Bar:
        return self

    def __exit__(self, *_: object) -> None:
        if self._progress is not None:
            self._progress.stop()

    def advance(self, done: int, total: int) -> None:
        """Show that ``done`` of ``total`` bytes are done."""
        if not self._show:
            return
        if self._progress is None:
            from rich.console import Console
            from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

            columns = (TextColumn("quantising"), BarColumn(), DownloadColumn(), TimeRemainingColumn())
            self._progress = Progress(*columns, console=Console(stderr=True), transient=True)
            self._task = self._progress.add_task("", total=total)
            self._progress.start()
        self._progress.update(self._task, completed=done)
