"""`onegpu version`."""

from __future__ import annotations

import json

import typer

from onegpu import __version__
from onegpu.cli.failure import guarded
from onegpu.cli.options import Json


@guarded
def version(json_output: Json = False) -> None:
    """Print onegpu's version.

    Example:

        onegpu version --json
    """
    typer.echo(json.dumps({"onegpu": __version__}) if json_output else __version__)
