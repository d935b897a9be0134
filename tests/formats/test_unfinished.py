"""The folder that is written piece by piece. Kills at random moments: tests/convert/test_quantize_checkpoint.py."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError

from onegpu.errors import ArgumentError
from onegpu.formats.unfinished import (
    FOLDER,
    MANIFEST,
    Shard,
    check_output,
    check_room,
    disk_full,
    is_full,
    open_work,
    parse_size,
)

REQUEST = {"what": "this"}


def write(output: Path, *, until: int = 3, publish: bool = True) -> None:
    with open_work(output, REQUEST) as work:
        (work.files / "config.json").write_text("{}")
        (work.files / "sub").mkdir()
        (work.files / "sub" / "a.jinja").write_text("a")
        for number in range(len(work.shards), until):
            work.save_shard({f"t{number}": torch.full((3,), float(number))}, number + 1, 0)
        if publish:
            work.publish(work.index(total_parameters=9))


def names(folder: Path) -> set[str]:
    return {p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()}


def test_one_shard_and_several(tmp_path):
    write(tmp_path / "one", until=1)
    assert names(tmp_path / "one") == {"config.json", "sub/a.jinja", "model.safetensors"}
    write(tmp_path / "many")
    shards = {f"model-0000{n}-of-00003.safetensors" for n in (1, 2, 3)}
    assert names(tmp_path / "many") == {"config.json", "sub/a.jinja", "model.safetensors.index.json", *shards}
    index = json.loads((tmp_path / "many" / "model.safetensors.index.json").read_text())
    assert index["metadata"] == {"total_parameters": 9, "total_size": 36}
    assert index["weight_map"]["t1"] == "model-00002-of-00003.safetensors"


def test_work_is_continued_and_leftovers_are_removed(tmp_path):
    output = tmp_path / "out"
    write(output, until=2, publish=False)
    (output / FOLDER / "shard-00003.tmp").write_bytes(b"half")
    (output / FOLDER / "shard-00003.safetensors").write_bytes(b"not in the manifest")
    (output / f"{MANIFEST}.tmp").write_text("{")
    with open_work(output, REQUEST) as work:
        assert [shard.step for shard in work.shards] == [1, 2] and work.cursor == (2, 0)
        assert names(work.folder) == {"lock", "shard-00001.safetensors", "shard-00002.safetensors"}
    write(output)
    assert not [name for name in names(output) if name.startswith(".")]


def test_a_move_that_was_interrupted_is_finished(tmp_path, monkeypatch):
    import os

    write(tmp_path / "whole")
    for moved in range(7):
        output, replace, left = tmp_path / str(moved), os.replace, [moved]

        def stop(source, target, output=output, replace=replace, left=left):
            if FOLDER in Path(source).parts and Path(target).parent.name != FOLDER:
                if not left[0]:
                    raise KeyboardInterrupt
                left[0] -= 1
            replace(source, target)

        with monkeypatch.context() as patch:
            patch.setattr(os, "replace", stop)
            try:
                write(output)
            except KeyboardInterrupt:
                assert not (output / "config.json").exists()
        assert (output / MANIFEST).exists() == (moved < 6)
        if moved < 6:
            check_output(output)
            with open_work(output, REQUEST) as work:
                work.publish({})
        assert names(output) == names(tmp_path / "whole")


def test_discard(tmp_path):
    for output in (tmp_path / "new", tmp_path / "old"):
        if output.name == "old":
            output.mkdir()
        with open_work(output, REQUEST) as work:
            work.discard()
    assert not (tmp_path / "new").exists() and list((tmp_path / "old").iterdir()) == []


def test_outputs_that_cannot_be_used(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(ArgumentError, match="is a file"):
        check_output(tmp_path / "file")
    (tmp_path / "full").mkdir()
    for name in "dcba":
        (tmp_path / "full" / name).touch()
    with pytest.raises(ArgumentError, match=r"is not empty \(a, b, c, …\)"):
        check_output(tmp_path / "full")
    with pytest.raises(ArgumentError, match="is not empty"), open_work(tmp_path / "full", REQUEST):
        pass
    assert names(tmp_path / "full") == {"a", "b", "c", "d"}
    write(tmp_path / "half", until=1, publish=False)
    (tmp_path / "half" / "mine.txt").touch()
    with pytest.raises(ArgumentError, match=r"is not empty \(mine.txt\)"):
        check_output(tmp_path / "half")


def test_another_request_and_another_process(tmp_path):
    write(tmp_path / "out", until=1, publish=False)
    with pytest.raises(ArgumentError, match="differs in: what"), open_work(tmp_path / "out", {"what": "that"}):
        pass
    with open_work(tmp_path / "out", REQUEST), pytest.raises(ArgumentError, match="another process"):  # noqa: SIM117
        with open_work(tmp_path / "out", REQUEST):
            pass


@pytest.mark.parametrize("text", ["", "{", "[]", "3", '{"request": {}}'])
def test_a_damaged_manifest_starts_anew(tmp_path, text):
    write(tmp_path / "out", until=1, publish=False)
    (tmp_path / "out" / MANIFEST).write_text(text)
    with open_work(tmp_path / "out", REQUEST) as work:
        assert work.shards == [] and not list(work.folder.glob("*.safetensors"))


def test_sizes():
    assert [parse_size(s) for s in ("5GB", "5 GiB", "1.5kb", "300M", 7, "7")] == [
        5 * 10**9,
        5 * 2**30,
        1500,
        3 * 10**8,
        7,
        7,
    ]
    for bad in ("", "GB", "-5GB", "5XB", True, "0", "0.0001KB", "1e9"):
        with pytest.raises(ArgumentError, match="max_shard_size="):
            parse_size(bad)


def test_room(tmp_path):
    check_room(tmp_path / "not" / "there" / "yet", 1)
    with pytest.raises(ArgumentError, match=r"\d+ are missing"):
        check_room(tmp_path, 1 << 60)


def test_a_full_disk_is_recognised(tmp_path):
    full = SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")
    assert is_full(OSError(28, "x")) and is_full(full)
    assert not is_full(OSError(13, "x")) and not is_full(ValueError("os error 28"))
    assert "goes on" in str(disk_full(tmp_path)) and Shard(1, 2, 3).piece == 3
