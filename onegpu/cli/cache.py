"""`onegpu cache`: the GGUF files that were converted, and how to be rid of them."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from onegpu.cli.failure import guarded
from onegpu.cli.options import Json
from onegpu.errors import bad_argument

cache = typer.Typer(no_args_is_help=True, help="List and clear the GGUF files that were converted to safetensors.")

CacheDir = Annotated[Path | None, typer.Option(help="The cache to look at.  [the user's]")]


@cache.command("list")
@guarded
def list_entries(cache_dir: CacheDir = None, json_output: Json = False) -> None:
    """Show the conversions, their size and the file each was made from.

    Examples:

        onegpu cache list

        onegpu cache list --json
    """
    from onegpu.formats.gguf_cache import cache_root, list_cache

    entries, root = list_cache(cache_dir), cache_root(cache_dir)
    if json_output:
        typer.echo(json.dumps({"root": str(root), "entries": [_plain(entry) for entry in entries]}))
        return
    for entry in entries:
        state = "" if entry.complete else "  (incomplete: will be made again)"
        typer.echo(f"{entry.key}  {entry.bytes / 1e6:.1f} MB  {entry.created}  {entry.source}{state}")
    total = sum(entry.bytes for entry in entries)
    typer.echo(f"{len(entries)} converted files, {total / 1e6:.1f} MB, in {root}")


@cache.command()
@guarded
def clear(
    key: Annotated[str | None, typer.Argument(help="One entry, as `list` names it.  [all]", metavar="KEY")] = None,
    cache_dir: CacheDir = None,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
    json_output: Json = False,
) -> None:
    """Remove one conversion, or all of them. The GGUF files themselves stay.

    Examples:

        onegpu cache clear

        onegpu cache clear --yes --json
    """
    from onegpu.formats.gguf_cache import clear_cache, list_cache

    entries = [entry for entry in list_cache(cache_dir) if key is None or entry.key == key]
    if key is not None and not entries:
        raise bad_argument("KEY", key, "is not in the cache", "See `onegpu cache list`")
    size = sum(entry.bytes for entry in entries)
    if entries and not yes and not json_output:
        typer.confirm(f"Remove {len(entries)} converted files, {size / 1e6:.1f} MB?", abort=True)
    removed = clear_cache(cache_dir, key=key)
    freed = sum(entry.bytes for entry in removed)
    if json_output:
        typer.echo(json.dumps({"removed": [_plain(entry) for entry in removed], "bytes": freed}))
    else:
        typer.echo(f"removed {len(removed)} converted files, {freed / 1e6:.1f} MB")


def _plain(entry: Any) -> dict[str, Any]:
    return {**asdict(entry), "path": str(entry.path)}
