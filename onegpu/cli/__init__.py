"""The command line: one verb for each thing a person does, one file for each verb."""

from __future__ import annotations


def main() -> None:
    """Entry point of the command `onegpu`."""
    from onegpu.cli.app import app

    app()
