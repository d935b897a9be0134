from __future__ import annotations

import json
from pathlib import Path

import pytest

from onegpu.formats.gguf import materialize
from tests.tiny_gguf import tiny_gguf_tensors, write_tiny_gguf

pytest.importorskip("gguf", reason="the gguf package writes the files of these tests")


@pytest.fixture
def filled(tmp_path: Path) -> Path:
    for seed in (1, 2):
        file = write_tiny_gguf(tmp_path / f"{seed}.gguf", tensors=tiny_gguf_tensors(seed))
        materialize(file, cache_dir=tmp_path / "cache", progress=False)
    return tmp_path / "cache"


def test_list(run, filled: Path) -> None:
    listed = json.loads(run("cache", "list", "--cache-dir", filled, "--json").stdout)
    assert listed["root"] == str(filled)
    assert {Path(entry["source"]).name for entry in listed["entries"]} == {"1.gguf", "2.gguf"}
    text = run("cache", "list", "--cache-dir", filled).stdout
    assert "1.gguf" in text and "2 converted files" in text


def test_an_empty_cache(run, tmp_path: Path) -> None:
    assert "0 converted files" in run("cache", "list", "--cache-dir", tmp_path / "none").stdout
    assert run("cache", "clear", "--cache-dir", tmp_path / "none").exit_code == 0


def test_clear_one_and_then_all(run, filled: Path) -> None:
    key = json.loads(run("cache", "list", "--cache-dir", filled, "--json").stdout)["entries"][0]["key"]
    result = json.loads(run("cache", "clear", key, "--cache-dir", filled, "--json").stdout)
    assert [entry["key"] for entry in result["removed"]] == [key] and result["bytes"] > 0
    assert run("cache", "clear", "--cache-dir", filled, input="n\n").exit_code == 1
    assert "1 converted files" in run("cache", "list", "--cache-dir", filled).stdout
    assert run("cache", "clear", "--cache-dir", filled, input="y\n").exit_code == 0
    assert "0 converted files" in run("cache", "list", "--cache-dir", filled).stdout


def test_a_key_that_is_not_there(run, filled: Path) -> None:
    result = run("cache", "clear", "abc", "--cache-dir", filled, "--json")
    assert result.exit_code == 1 and "not in the cache" in json.loads(result.stdout)["error"]["message"]
