"""The command `onegpu`, put together from its verbs."""

from __future__ import annotations

import typer

from onegpu.cli.cache import cache
from onegpu.cli.chat import chat
from onegpu.cli.env import env
from onegpu.cli.generate import generate
from onegpu.cli.quantize import quantize
from onegpu.cli.version import version

app = typer.Typer(
    name="onegpu",
    help="Hugging Face transformer models at the limit of the GPU you have.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,  # cli.failure decides what a user sees of an error
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command()(generate)
app.command()(chat)
app.command()(quantize)
app.command()(env)
app.command()(version)
app.add_typer(cache, name="cache")
