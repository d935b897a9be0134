"""A model's folder that is written piece by piece, survives a kill at any point, and looks finished only when it is.

    DIR/.onegpu-quantize.json     what is asked for, and the shards that are done; replaced by rename
    DIR/.onegpu-quantize/         the shards, and in files/ what goes beside them
    DIR/config.json, …            moved here at the very end, whole files, config.json last

The one JSON file decides everything: no such file, no unfinished work.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from onegpu.errors import ArgumentError, bad_argument
from onegpu.formats.checkpoint import read_headers
from onegpu.formats.folder import INDEX, SINGLE

FOLDER, MANIFEST = ".onegpu-quantize", ".onegpu-quantize.json"
_TEMPORARY = f"{MANIFEST}.tmp"
_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12, "KI": 2**10, "MI": 2**20, "GI": 2**30, "TI": 2**40}


@dataclass(frozen=True)
class Shard:
    """A finished shard: its bytes on disk, and where the tensors that it does not hold begin (step, piece)."""

    nbytes: int
    step: int
    piece: int


@dataclass
class Unfinished:
    """The work on one output folder; made by :func:`open_work`.

    request: what is asked for, as JSON; work is continued only for the same request. publishing: final name of every
    file, in the order of their moves, once all of them are written.
    """

    output: Path
    request: dict[str, Any]
    shards: list[Shard] = field(default_factory=list)
    publishing: dict[str, str] | None = None
    made_folder: bool = False

    @property
    def folder(self) -> Path:
        """Where everything is written."""
        return self.output / FOLDER

    @property
    def files(self) -> Path:
        """Where the files beside the weights are written."""
        return self.folder / "files"

    @property
    def cursor(self) -> tuple[int, int]:
        """Step and piece at which to go on."""
        return (self.shards[-1].step, self.shards[-1].piece) if self.shards else (0, 0)

    def shard_path(self, number: int) -> Path:
        """Where shard ``number`` (from 0) lies until the end."""
        return self.folder / f"shard-{number + 1:05d}.safetensors"

    def save_shard(self, tensors: dict[str, torch.Tensor], step: int, piece: int) -> None:
        """Write the next shard, make sure that the disk has it, and only then say so."""
        from safetensors.torch import save_file

        path = self.shard_path(len(self.shards))
        temporary = path.with_suffix(".tmp")
        save_file(tensors, temporary, metadata={"format": "pt"})
        shutil.copymode(self.output / MANIFEST, temporary)  # safetensors writes for the owner's eyes only
        _sync(temporary)
        os.replace(temporary, path)
        self.shards.append(Shard(path.stat().st_size, step, piece))
        self._save()

    def index(self, total_parameters: int) -> dict[str, str]:
        """Write the index, if there is more than one shard. Returns the final name of every shard's file."""
        count = len(self.shards)
        names = {self.shard_path(i).name: f"model-{i + 1:05d}-of-{count:05d}.safetensors" for i in range(count)}
        if count == 1:
            return {self.shard_path(0).name: SINGLE}
        infos = read_headers(self.shard_path(number) for number in range(count))
        table = {
            "metadata": {"total_parameters": total_parameters, "total_size": sum(info.nbytes for info in infos)},
            "weight_map": {info.name: names[Path(info.file).name] for info in infos},
        }
        text = json.dumps(table, indent=2, sort_keys=True) + "\n"
        (self.files / INDEX).write_text(text, encoding="utf-8")
        return names

    def publish(self, shards: Mapping[str, str]) -> None:
        """Move everything to its final name and remove what was ours. Also finishes a move that was interrupted."""
        if self.publishing is None:
            # as_posix: additional_chat_templates/… ; config.json last: without it a folder is no model
            names = sorted(p.relative_to(self.files).as_posix() for p in self.files.rglob("*") if p.is_file())
            names.sort(key=lambda name: name == "config.json")
            for name in names:
                _sync(self.files / name)
            self.publishing = {**shards, **{f"files/{name}": name for name in names}}
            self._save()
        for place, name in self.publishing.items():
            if (self.folder / place).exists():
                (self.output / name).parent.mkdir(parents=True, exist_ok=True)
                os.replace(self.folder / place, self.output / name)
        shutil.rmtree(self.folder, ignore_errors=True)
        (self.output / MANIFEST).unlink()

    def discard(self) -> None:
        """Remove the work, and the folder if it was made for it."""
        shutil.rmtree(self.folder, ignore_errors=True)
        for name in (MANIFEST, _TEMPORARY):
            (self.output / name).unlink(missing_ok=True)
        if self.made_folder:
            with contextlib.suppress(OSError):  # somebody else put something there
                self.output.rmdir()

    def _save(self) -> None:
        state = {key: value for key, value in asdict(self).items() if key != "output"}
        temporary = self.output / _TEMPORARY
        temporary.write_text(json.dumps(state), encoding="utf-8")
        _sync(temporary)
        os.replace(temporary, self.output / MANIFEST)


def check_output(output: Path) -> None:
    """Raise ``ArgumentError`` unless ``output`` can take a model: new, empty, or with unfinished work of ours."""
    if output.exists() and not output.is_dir():
        raise bad_argument("output", str(output), "is a file", "name a folder that does not exist yet")
    if not output.is_dir():
        return
    names = {entry.name for entry in output.iterdir()} - {FOLDER, MANIFEST, _TEMPORARY}
    state = _read(output)
    if state is not None and state.get("publishing"):
        names -= {name.partition("/")[0] for name in state["publishing"].values()}
    if names:
        shown = ", ".join(sorted(names)[:3]) + (", …" if len(names) > 3 else "")
        raise bad_argument("output", str(output), f"is not empty ({shown})", "name a new folder, or empty this one")


@contextlib.contextmanager
def open_work(output: Path, request: dict[str, Any]) -> Iterator[Unfinished]:
    """Start the work on ``output``, or go on with what a killed process left; one process at a time.

    Raises:
        ArgumentError: the folder holds something else, or unfinished work of another request, or is being written.
    """
    import filelock  # huggingface_hub and torch both depend on it

    check_output(output)
    made = not output.is_dir()
    (output / FOLDER).mkdir(parents=True, exist_ok=True)
    lock = filelock.FileLock(str(output / FOLDER / "lock"), timeout=0)
    try:
        lock.acquire()
    except filelock.Timeout:
        raise bad_argument("output", str(output), "is being written by another process", "wait for it") from None
    try:
        yield _restore(output, request, made)
    finally:
        lock.release()


def _restore(output: Path, request: dict[str, Any], made: bool) -> Unfinished:
    state = _read(output)
    if state is None:
        work = Unfinished(output, request, made_folder=made)
        _clean(work)
        work._save()
        return work
    if state["request"] != request:
        old = state["request"]
        changed = sorted(key for key in {*old, *request} if old.get(key) != request.get(key))
        raise bad_argument(
            "output",
            str(output),
            f"holds unfinished work that differs in: {', '.join(changed)}",
            f"repeat the command that began it, or remove {FOLDER} and {MANIFEST} from it to start anew",
        )
    shards = [Shard(**shard) for shard in state["shards"]]
    work = Unfinished(output, request, shards, state["publishing"], state["made_folder"])
    if work.publishing is None:
        for number, shard in enumerate(shards):
            path = work.shard_path(number)
            if not path.is_file() or path.stat().st_size != shard.nbytes:
                del work.shards[number:]
                break
        _clean(work)
    return work


def _clean(work: Unfinished) -> None:
    """Remove what is not known to be whole."""
    keep = {"lock", *(work.shard_path(number).name for number in range(len(work.shards)))}
    for entry in work.folder.iterdir():
        if entry.is_dir():
            shutil.rmtree(entry)
        elif entry.name not in keep:
            entry.unlink()
    work.files.mkdir()


def _read(output: Path) -> dict[str, Any] | None:
    """The manifest; None where there is none, or one that we did not write."""
    try:
        state = json.loads((output / MANIFEST).read_text(encoding="utf-8"))
        known = set(state) == {"request", "shards", "publishing", "made_folder"}
    except (OSError, ValueError, TypeError):
        return None
    return state if known else None


def check_room(output: Path, needed: int) -> None:
    """Raise ``ArgumentError`` that says how many bytes are missing unless ``output``'s disk has ``needed`` bytes."""
    place = output.absolute()
    while not place.exists():
        place = place.parent
    free = shutil.disk_usage(place).free
    if free < needed:
        raise bad_argument(
            "output",
            str(output),
            f"is on a disk with {free} bytes free, and {needed} are needed: {needed - free} are missing",
            "free them, or name a folder on another disk",
        )


def parse_size(size: str | int, name: str = "max_shard_size") -> int:
    """Bytes in ``"5GB"`` (10⁹), ``"5GiB"`` (2³⁰), ``"300MB"`` or a number; ``name`` is the argument to blame."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?I?)B?", str(size).strip().upper())
    if isinstance(size, bool) or match is None or match[2] not in _UNITS:
        raise bad_argument(name, size, "is no size", 'write it as "5GB", "500MB" or a number of bytes')
    count = int(float(match[1]) * _UNITS[match[2]])
    if count < 1:
        raise bad_argument(name, size, "is nothing", 'write it as "5GB", "500MB" or a number of bytes')
    return count


def is_full(error: BaseException) -> bool:
    """Whether an error of the system, or safetensors' wrapper of one, says that the disk is full."""
    import errno

    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return True
    return type(error).__name__ == "SafetensorError" and "os error 28" in str(error)


def disk_full(output: Path) -> ArgumentError:
    """The error for it; the work stays."""
    fix = "free space and repeat the command: it goes on from here"
    return bad_argument("output", str(output), "is on a disk that is full now", fix)


def _sync(path: Path) -> None:
    with open(path, "rb+") as stream:
        os.fsync(stream.fileno())
