"""A model's folder: is it one, which files hold its weights, and which belong to it beside them.

A name on the hub becomes a folder of the hub's cache; only the files that are needed are downloaded.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from onegpu.errors import CheckpointError, bad_argument
from onegpu.formats.checkpoint import read_headers

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
# What a copy of a model needs beside config and weights: tokenizer, processor, chat template, licence.
COMPANIONS = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.*",
    "vocab-*.json", "merges.txt", "*.model", "*.tiktoken", "tekken.json", "sentencepiece.*", "source.spm", "target.spm",
    "normalizer.json", "*.jinja", "chat_template.json", "additional_chat_templates/*.jinja",
    "preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json",
    "audio_tokenizer_config.json", "modules.json", "sentence_bert_config.json", "config_sentence_transformers.json",
    "1_Pooling/config.json", "LICENSE*", "LICENCE*", "NOTICE*", "USE_POLICY*",
)  # fmt: skip
_METADATA = ("config.json", "generation_config.json", INDEX, "README.md")
_PICKLED = (".bin", ".pt", ".pth", ".ckpt")
_AGAIN = "download or save the checkpoint again"


@dataclass(frozen=True)
class Source:
    """A checkpoint on disk.

    folder: where it is. name: what to call it elsewhere (the name on the hub, or the folder's own; never a path).
    commit: the hub's, None for a folder. weights: its safetensors files, in the order of their names.
    """

    folder: Path
    name: str
    commit: str | None
    weights: tuple[Path, ...]

    def companions(self) -> list[str]:
        """Files of :data:`COMPANIONS` that are there, relative to the folder."""
        found = {file for pattern in COMPANIONS for file in self.folder.glob(pattern) if file.is_file()}
        return sorted(file.relative_to(self.folder).as_posix() for file in found)


def check_path(path: Any, name: str = "pretrained_model_name_or_path") -> None:
    """Raise ``ArgumentError`` or ``CheckpointError`` for a local path that is no loadable model; names on the hub pass.

    Damaged files count: their headers are read. ``name`` is the argument to blame.
    """
    text = os.fspath(path)
    if not text:
        raise bad_argument(name, text, "is empty", "pass a folder or a model's name")
    folder = Path(text).expanduser()
    looks_local = text.startswith((".", "~", os.sep)) or text.count("/") > 1
    if not folder.exists():
        if looks_local:
            raise bad_argument(name, text, "does not exist", "check the path, or pass a model's name (owner/name)")
        return
    if folder.is_file():
        raise bad_argument(name, text, "is a file", "pass the folder that holds config.json and the weights")
    names = {entry.name for entry in folder.iterdir()}
    if not names & {"config.json", "adapter_config.json"}:
        raise CheckpointError(file=folder, reason="holds no config.json: it is no model", fix="pass the model's folder")
    pickled = sorted(name for name in names if name.endswith(_PICKLED))
    if pickled and not any(name.endswith(".safetensors") for name in names):
        raise _pickled_only(folder, pickled)
    if "config.json" in names and names & {SINGLE, INDEX}:
        read_headers(_weights(folder))


def find_source(model: str | os.PathLike[str], revision: str | None = None) -> Source:
    """The checkpoint that a folder or a name on the hub means, downloaded if it has to be.

    Raises:
        ArgumentError: it does not exist, or ``revision`` is given for a folder.
        CheckpointError: it holds no safetensors weights, or its index is damaged.
    """
    check_path(model, "model")
    folder = Path(model).expanduser()
    if folder.is_dir():
        if revision is not None:
            raise bad_argument("revision", revision, "is given for a folder, which has only one", "leave it out")
        return Source(folder, folder.resolve().name, None, _weights(folder))
    text = os.fspath(model)
    folder = _download(text, revision, [*_METADATA, *COMPANIONS])
    if (folder / INDEX).is_file() and not (folder / SINGLE).is_file():
        names = sorted(set(_weight_map(folder).values()))
    else:
        names = [SINGLE]
    folder = _download(text, folder.name, names)
    return Source(folder, text, folder.name, _weights(folder))


def _download(name: str, revision: str | None, patterns: list[str]) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError

    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=patterns))
    except (OSError, HFValidationError) as error:  # not found, no access, no network, no name of a repository
        text = " ".join(str(error).split())[:300]
        what = f" at revision {revision!r}" if revision else ""
        why = f"is no folder and was not found on the hub{what}: {text}"
        raise bad_argument("model", name, why, "check the name and the connection") from error


def _weights(folder: Path) -> tuple[Path, ...]:
    """As transformers chooses: one file by that name, else what the index lists."""
    if not (folder / "config.json").is_file():
        raise CheckpointError(file=folder, reason="holds no config.json: it is no model", fix="pass the model's folder")
    if (folder / SINGLE).is_file():
        return (folder / SINGLE,)
    if not (folder / INDEX).is_file():
        pickled = sorted(entry.name for entry in folder.iterdir() if entry.name.endswith(_PICKLED))
        if pickled:
            raise _pickled_only(folder, pickled)
        raise CheckpointError(
            file=folder, reason=f"holds no weights: neither {SINGLE} nor {INDEX}", fix="pass a safetensors model"
        )
    files = sorted(set(_weight_map(folder).values()))
    for file in files:
        if not (folder / file).is_file():
            raise CheckpointError(file=folder / file, reason=f"is listed in {INDEX} and missing", fix=_AGAIN)
    return tuple(folder / file for file in files)


def _weight_map(folder: Path) -> dict[str, str]:
    """File of every tensor, by the index."""
    try:
        weight_map = json.loads((folder / INDEX).read_text(encoding="utf-8"))["weight_map"]
        good = isinstance(weight_map, dict) and bool(weight_map) and all(map(_is_plain, weight_map.values()))
    except (ValueError, KeyError, TypeError, RecursionError):
        good = False
    if not good:
        raise CheckpointError(file=folder / INDEX, reason="is no index of safetensors files", fix=_AGAIN)
    return weight_map  # type: ignore[no-any-return]


def _is_plain(file: object) -> bool:
    """A safetensors file of the same folder: an index must not lead out of it."""
    return isinstance(file, str) and file.endswith(".safetensors") and file == Path(file).name


def check_complete(source: Source, names: set[str]) -> None:
    """Raise ``CheckpointError`` if the index lists a tensor that none of the files holds."""
    if source.weights[0].name == SINGLE:
        return
    missing = sorted(set(_weight_map(source.folder)) - names)
    if missing:
        raise CheckpointError(
            file=source.folder / INDEX, tensor=missing[0], reason="is listed, and in none of the files", fix=_AGAIN
        )


def _pickled_only(folder: Path, pickled: list[str]) -> CheckpointError:
    return CheckpointError(
        file=folder,
        reason=f"holds only pickled weights ({', '.join(pickled[:3])}), and unpickling runs code",
        fix="convert them to safetensors (in an environment you trust: load, then save_pretrained)",
    )
