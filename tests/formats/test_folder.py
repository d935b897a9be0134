"""Folders of models: which files count, and which are none."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import huggingface_hub
import pytest

from onegpu.errors import ArgumentError, CheckpointError
from onegpu.formats.folder import INDEX, SINGLE, check_complete, check_path, find_source


@pytest.fixture
def folder(tiny, tmp_path) -> Path:
    return Path(shutil.copytree(tiny("llama"), tmp_path / "model"))


def with_index(folder: Path, table: object) -> None:
    (folder / SINGLE).rename(folder / "model-00001-of-00001.safetensors")
    (folder / INDEX).write_text(table if isinstance(table, str) else json.dumps(table))


def test_a_folder(folder):
    for name in ("notes.txt", "model.onnx", "training_args.bin", "LICENSE"):
        (folder / name).touch()
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "tools.jinja").touch()
    (folder / "checkpoint-5").mkdir()
    (folder / "checkpoint-5" / "tokenizer.json").touch()
    source = find_source(folder)
    assert (source.name, source.commit, source.weights) == ("model", None, (folder / SINGLE,))
    assert source.companions() == [
        "LICENSE", "additional_chat_templates/tools.jinja", "chat_template.jinja", "tokenizer.json",
        "tokenizer_config.json",
    ]  # fmt: skip
    check_complete(source, set())


def test_an_index(folder):
    with_index(folder, {"weight_map": {"a": "model-00001-of-00001.safetensors"}})
    source = find_source(folder)
    assert [file.name for file in source.weights] == ["model-00001-of-00001.safetensors"]
    check_complete(source, {"a", "b"})
    with pytest.raises(CheckpointError, match=r"tensor 'a': is listed, and in none"):
        check_complete(source, {"b"})


@pytest.mark.parametrize(
    "table",
    [
        "", "[]", "{", '"text"', "[" * 100_000, {}, {"weight_map": {}}, {"weight_map": []}, {"weight_map": {"a": 1}},
        {"weight_map": {"a": "../model.safetensors"}}, {"weight_map": {"a": "/etc/passwd"}},
        {"weight_map": {"a": "pytorch_model.bin"}},
    ],
    ids=str,
)  # fmt: skip
def test_an_index_that_is_none(folder, table):
    with_index(folder, table)
    for check in (find_source, check_path):
        with pytest.raises(CheckpointError, match="is no index of safetensors files"):
            check(folder)


def test_a_file_that_the_index_lists_is_missing(folder):
    with_index(folder, {"weight_map": {"a": "model-00001-of-00001.safetensors", "b": "gone.safetensors"}})
    for check in (find_source, check_path):
        with pytest.raises(CheckpointError, match=r"gone\.safetensors: is listed in"):
            check(folder)


def test_paths_that_are_no_model(folder, tmp_path):
    for path, message in (("", "is empty"), (str(tmp_path / "gone"), "does not exist"), (folder / SINGLE, "is a file")):
        with pytest.raises(ArgumentError, match=rf"^model=.*{message}"):
            find_source(path)
    (folder / SINGLE).unlink()
    with pytest.raises(CheckpointError, match="holds no weights"):
        find_source(folder)
    (folder / "pytorch_model.bin").touch()
    with pytest.raises(CheckpointError, match="only pickled weights"):
        find_source(folder)
    (folder / "config.json").unlink()
    with pytest.raises(CheckpointError, match=r"no config\.json"):
        find_source(folder)
    check_path("owner/name")


def test_a_name_on_the_hub_downloads_what_is_needed(folder, tmp_path, monkeypatch):
    """The hub is stood in for: two calls, the second for the weights in the first one's index, at its commit."""
    with_index(folder, {"weight_map": {"a": "model-00001-of-00001.safetensors"}})
    snapshot = Path(shutil.copytree(folder, tmp_path / "0123abc"))
    calls = []

    def snapshot_download(name, revision, allow_patterns):
        calls.append((name, revision, allow_patterns))
        return str(snapshot)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    source = find_source("owner/name", "v1")
    assert (source.name, source.commit) == ("owner/name", "0123abc")
    assert [call[1] for call in calls] == ["v1", "0123abc"]
    assert not any("safetensors" in p for p in calls[0][2] if p != INDEX)
    assert calls[1][2] == ["model-00001-of-00001.safetensors"]
    with pytest.raises(ArgumentError, match="revision='v1' is given for a folder"):
        find_source(folder, "v1")


@pytest.mark.parametrize("name", ["owner/no-such-model", "no such name", "a--b"])
def test_a_name_that_nobody_has(name):
    with pytest.raises(ArgumentError, match="was not found on the hub"):
        find_source(name)
