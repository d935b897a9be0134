"""File to file: the bytes of a load and save, after any kill, in little memory, and no half-finished folder."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections import namedtuple
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import onegpu
from onegpu.convert import quantize_checkpoint as module
from onegpu.convert.quantize_checkpoint import quantize_checkpoint
from onegpu.errors import ArgumentError, CheckpointError
from tests.quantize_process import contents
from tests.tiny import AUTO_CLASS

ROOT = Path(__file__).parents[2]
KINDS = {"nf4": ("nf4", False), "nf4_double": ("nf4", True), "fp4": ("fp4", False), "int8": ("int8", False)}
BESIDE = {"README.md", "chat_template.jinja", "tokenizer.json", "tokenizer_config.json"}


def saved_by_a_load(source: Path, folder: Path, model_type: str, kind: str, **options) -> dict[str, bytes]:
    to, double = KINDS[kind]
    if to == "int8":
        options |= {"load_in_8bit": True}
    else:
        options |= {"load_in_4bit": True, "bnb_4bit_quant_type": to, "bnb_4bit_use_double_quant": double}
    options.setdefault("device_map", "cpu")
    model = getattr(onegpu, AUTO_CLASS[model_type]).from_pretrained(source, **options)
    model.save_pretrained(folder)
    return contents(folder)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("model_type", ["llama", "gpt2", "mixtral", "falcon_new", "t5"])
def test_the_bytes_of_load_and_save(tiny, tmp_path, model_type, kind):
    source = tiny(model_type, dtype=torch.bfloat16 if kind == "fp4" else torch.float32)
    to, double = KINDS[kind]
    result = quantize_checkpoint(source, tmp_path / "ours", to, double_quant=double, device="cpu")
    ours, loaded = contents(tmp_path / "ours"), saved_by_a_load(source, tmp_path / "loaded", model_type, kind)
    assert set(ours) - set(loaded) == BESIDE
    assert [name for name in loaded if ours.get(name) != loaded[name]] == []
    assert result.shards == 1 and result.output_bytes == len(ours["model.safetensors"])
    assert (tmp_path / "ours" / "model.safetensors").stat().st_mode == (
        tmp_path / "ours" / "config.json"
    ).stat().st_mode


@pytest.mark.parametrize(("model_type", "dtype"), [("t5", "float16"), ("llama", "bfloat16")])
def test_another_dtype_is_that_of_a_load(tiny, tmp_path, model_type, dtype):
    quantize_checkpoint(tiny(model_type), tmp_path / "ours", "nf4", dtype=dtype, device="cpu")
    loaded = saved_by_a_load(tiny(model_type), tmp_path / "loaded", model_type, "nf4", dtype=getattr(torch, dtype))
    ours = contents(tmp_path / "ours")
    assert [name for name in loaded if ours[name] != loaded[name]] == []  # T5 keeps a part in float32


def test_a_skip_list_is_that_of_a_load(tiny, tmp_path):
    quantize_checkpoint(tiny("llama"), tmp_path / "ours", "nf4", skip_modules=["q_proj", "mlp.up_proj"], device="cpu")
    skips = {"llm_int8_skip_modules": ["q_proj", "mlp.up_proj"]}
    loaded = saved_by_a_load(tiny("llama"), tmp_path / "loaded", "llama", "nf4", **skips)
    ours = contents(tmp_path / "ours")
    assert [name for name in loaded if ours[name] != loaded[name]] == []


@pytest.mark.parametrize("model_type", ["llama", "mixtral", "gpt2"])
def test_shards_hold_the_same_and_load(tiny, tmp_path, model_type):
    quantize_checkpoint(tiny(model_type), tmp_path / "one", "nf4", device="cpu")
    steps: list[tuple[int, int]] = []
    result = quantize_checkpoint(
        tiny(model_type), tmp_path / "many", "nf4", max_shard_size="20KB", device="cpu",
        progress=lambda *step: steps.append(step),
    )  # fmt: skip
    files = sorted((tmp_path / "many").glob("*.safetensors"))
    assert len(files) == result.shards > 3 and files[0].name == f"model-00001-of-{result.shards:05d}.safetensors"
    index = json.loads((tmp_path / "many" / "model.safetensors.index.json").read_text())
    tensors = {name: tensor for file in files for name, tensor in load_file(file).items()}
    whole = load_file(tmp_path / "one" / "model.safetensors")
    assert tensors.keys() == whole.keys() == index["weight_map"].keys()
    assert all(torch.equal(tensors[name], whole[name]) for name in whole)
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in whole.values())
    assert steps == sorted(steps) and steps[-1][0] == steps[-1][1]
    model = getattr(onegpu, AUTO_CLASS[model_type]).from_pretrained(tmp_path / "many", device_map="cpu")
    model.save_pretrained(tmp_path / "again")
    assert contents(tmp_path / "again")["model.safetensors"] == contents(tmp_path / "one")["model.safetensors"]


def test_a_checkpoint_in_shards_is_read_by_its_index(tiny, tmp_path):
    model = onegpu.AutoModelForCausalLM.from_pretrained(tiny("llama"))
    model.save_pretrained(tmp_path / "sharded", max_shard_size="30KB")
    assert len(list((tmp_path / "sharded").glob("*.safetensors"))) > 3
    for source, name in ((tmp_path / "sharded", "a"), (tiny("llama"), "b")):
        quantize_checkpoint(source, tmp_path / name, "int8", device="cpu")
    a, b = contents(tmp_path / "a"), contents(tmp_path / "b")
    assert a["model.safetensors"] == b["model.safetensors"] and a["config.json"] == b["config.json"]


def test_experts_stored_in_one_tensor(tiny, tmp_path):
    """Saved in transformers' own form, three dimensions in one tensor, they become what single matrices become."""
    model = onegpu.AutoModelForCausalLM.from_pretrained(tiny("mixtral"))
    model.save_pretrained(tmp_path / "merged", save_original_format=False)
    assert any(t.dim() == 3 for t in load_file(tmp_path / "merged" / "model.safetensors").values())
    for source, name in ((tmp_path / "merged", "a"), (tiny("mixtral"), "b")):
        quantize_checkpoint(source, tmp_path / name, "nf4", double_quant=True, device="cpu")
    a, b = (load_file(tmp_path / name / "model.safetensors") for name in "ab")
    assert all(torch.equal(a[name.replace("block_sparse_moe", "mlp")], b[name]) for name in b)
    model = onegpu.AutoModelForCausalLM.from_pretrained(tmp_path / "a", device_map="cpu")
    assert "experts" in type(model.model.layers[0].mlp.experts).__name__.lower()


def gpt_oss(folder: Path) -> Path:
    """A mixture whose checkpoints hold all experts of a layer in one tensor."""
    import transformers

    sizes = {"hidden_size": 32, "intermediate_size": 32, "head_dim": 16, "vocab_size": 64}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "num_local_experts": 4, "num_experts_per_tok": 2}
    config = transformers.GptOssConfig(num_hidden_layers=1, **sizes, **heads)
    transformers.GptOssForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("kind", ["nf4_double", "int8"])
def test_experts_that_transformers_never_splits(tmp_path, kind):
    source = gpt_oss(tmp_path / "model")
    to, double = KINDS[kind]
    quantize_checkpoint(source, tmp_path / "ours", to, double_quant=double, device="cpu")
    ours, loaded = contents(tmp_path / "ours"), saved_by_a_load(source, tmp_path / "loaded", "llama", kind)
    assert [name for name in loaded if ours.get(name) != loaded[name]] == []
    tensors = load_file(tmp_path / "ours" / "model.safetensors")
    assert "model.layers.0.mlp.experts.3.down_proj.weight" in tensors
    onegpu.AutoModel.from_pretrained(tmp_path / "ours", device_map="cpu")
    damaged = {name.replace("experts.3.down", "experts.03.down"): tensor for name, tensor in tensors.items()}
    save_file(damaged, tmp_path / "ours" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match="is no name of an expert's matrix"):
        onegpu.AutoModelForCausalLM.from_pretrained(tmp_path / "ours", device_map="cpu")


def test_a_model_without_its_quantised_head(tmp_path):
    import transformers

    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_attention_heads": 2, "image_size": 32}
    config = transformers.ViTConfig(num_hidden_layers=1, **sizes)
    transformers.ViTForImageClassification(config).save_pretrained(tmp_path / "model")
    result = quantize_checkpoint(tmp_path / "model", tmp_path / "out", "nf4", device="cpu")
    assert "classifier" in {change.name for change in result.quantized}
    assert "AutoModelForImageClassification" in (tmp_path / "out" / "README.md").read_text()
    onegpu.AutoModelForImageClassification.from_pretrained(tmp_path / "out", device_map="cpu")
    onegpu.AutoModel.from_pretrained(tmp_path / "out", device_map="cpu")


@pytest.mark.gpu
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("model_type", ["llama", "mixtral"])
def test_on_a_gpu_the_bytes_of_load_and_save_there(tiny, tmp_path, model_type, kind):
    to, double = KINDS[kind]
    quantize_checkpoint(tiny(model_type), tmp_path / "ours", to, double_quant=double, device="cuda")
    loaded = saved_by_a_load(tiny(model_type), tmp_path / "loaded", model_type, kind, device_map="cuda")
    ours = contents(tmp_path / "ours")
    assert [name for name in loaded if ours[name] != loaded[name]] == []


def test_what_bitsandbytes_cannot_load_is_left_for_it(tiny, tmp_path):
    pytest.importorskip("bitsandbytes")
    from tests.bnb_process import Job, logits, run_jobs

    result = quantize_checkpoint(tiny("mixtral"), tmp_path / "m", "nf4", bitsandbytes_compatible=True, device="cpu")
    assert result.notes == [] and {c.reason for c in result.left} == {
        "output embeddings",
        "bitsandbytes cannot load it",
    }
    quantize_checkpoint(tiny("llama"), tmp_path / "l", "int8", device="cpu")
    auto = "AutoModelForCausalLM"
    jobs = [Job(n, str(tmp_path / n), auto, None, "", str(tmp_path / f"{n}.safetensors")) for n in "ml"]
    assert run_jobs(jobs, tmp_path) == {}
    for name in "ml":
        ours = logits(onegpu.AutoModelForCausalLM.from_pretrained(tmp_path / name, device_map="cpu"))
        torch.testing.assert_close(load_file(tmp_path / f"{name}.safetensors")["logits"], ours, rtol=1e-5, atol=1e-5)
    with pytest.raises(ArgumentError, match="leaves nothing to quantise in FalconForCausalLM"):
        quantize_checkpoint(tiny("falcon_new"), tmp_path / "f", "nf4", bitsandbytes_compatible=True)
    assert "onegpu only" in quantize_checkpoint(tiny("falcon_new"), tmp_path / "g", "nf4", device="cpu").notes[0]


def test_gguf(tmp_path, monkeypatch):
    pytest.importorskip("gguf")
    from onegpu.formats.gguf import materialize
    from tests.tiny_gguf import write_tiny_gguf

    file = write_tiny_gguf(tmp_path / "tiny.gguf")
    folder = materialize(file, cache_dir=tmp_path / "cache", progress=False)
    monkeypatch.setattr(module, "materialize", lambda path, progress: folder)
    quantize_checkpoint(file, tmp_path / "out", "nf4", device="cpu")
    assert "tiny.gguf" in (tmp_path / "out" / "README.md").read_text()
    onegpu.AutoModelForCausalLM.from_pretrained(tmp_path / "out", device_map="cpu")
    onegpu.AutoTokenizer.from_pretrained(tmp_path / "out")


@pytest.mark.parametrize(("signal", "count"), [("SIGKILL", 20), ("SIGINT", 6)])
def test_stopped_at_random_moments_and_repeated(tiny, tmp_path, signal, count):
    """Nothing half-written under a final name, nothing that looks finished, and in the end the same bytes."""
    command = [
        sys.executable,
        "-m",
        "tests.quantize_process",
        str(tiny("llama")),
        str(tmp_path),
        signal,
        str(count),
        "0",
    ]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr[-4000:]
    seen = json.loads(done.stdout.splitlines()[-1])
    assert seen["shards"] > 8 and seen["stages"].get("some shards", 0) >= 1, seen


class Stop(Exception):
    """A run that a test ends half-way."""


def stop_after(fraction: float):
    def progress(done: int, total: int) -> None:
        if done >= fraction * total:
            raise Stop

    return progress


def half_done(source: Path, output: Path, **options) -> None:
    with pytest.raises(Stop):
        quantize_checkpoint(
            source, output, "nf4", max_shard_size="10KB", device="cpu", progress=stop_after(0.5), **options
        )


def test_only_the_rest_is_done_again(tiny, tmp_path):
    half_done(tiny("llama"), tmp_path / "out")
    assert not [entry for entry in (tmp_path / "out").iterdir() if not entry.name.startswith(".onegpu-quantize")]
    steps: list[int] = []
    result = quantize_checkpoint(
        tiny("llama"), tmp_path / "out", "nf4", max_shard_size="10KB", device="cpu",
        progress=lambda done, total: steps.append(done * 2 > total),
    )  # fmt: skip
    assert result.resumed > 2 and steps[0] is False and sum(steps) > len(steps) / 2
    with pytest.raises(ArgumentError, match="is not empty"):
        quantize_checkpoint(tiny("llama"), tmp_path / "out", "nf4")


def test_a_damaged_shard_of_unfinished_work_is_made_again(tiny, tmp_path):
    for name in ("whole", "out"):
        (tmp_path / name).mkdir()
    quantize_checkpoint(tiny("llama"), tmp_path / "whole" / "x", "nf4", max_shard_size="10KB", device="cpu")
    half_done(tiny("llama"), tmp_path / "out" / "x")
    shard = tmp_path / "out" / "x" / ".onegpu-quantize" / "shard-00002.safetensors"
    shard.write_bytes(shard.read_bytes()[:-1])
    result = quantize_checkpoint(tiny("llama"), tmp_path / "out" / "x", "nf4", max_shard_size="10KB", device="cpu")
    assert result.resumed == 1
    assert contents(tmp_path / "whole" / "x") == contents(tmp_path / "out" / "x")


def test_unfinished_work_of_another_request_is_not_mixed_in(tiny, tmp_path):
    source = Path(shutil.copytree(tiny("llama"), tmp_path / "model"))
    half_done(source, tmp_path / "out")
    with pytest.raises(ArgumentError, match="unfinished work that differs in: options"):
        quantize_checkpoint(source, tmp_path / "out", "nf4", max_shard_size="10KB", double_quant=True, device="cpu")
    tensors = load_file(source / "model.safetensors")
    tensors["lm_head.weight"] += 1
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ArgumentError, match="differs in: files of the model"):
        quantize_checkpoint(source, tmp_path / "out", "nf4", max_shard_size="10KB", device="cpu")


def test_a_number_that_is_none_leaves_nothing(tiny, tmp_path):
    for name, value in (("model.norm.weight", float("nan")), ("model.layers.1.mlp.up_proj.weight", float("inf"))):
        source = Path(shutil.copytree(tiny("llama"), tmp_path / name))
        tensors = load_file(source / "model.safetensors")
        tensors[name].view(-1)[5] = value
        save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
        with pytest.raises(CheckpointError, match=rf"{name}.*NaN or infinity"):
            quantize_checkpoint(source, tmp_path / "out", "nf4", max_shard_size="10KB", device="cpu")
        assert not (tmp_path / "out").exists()
        (tmp_path / "kept").mkdir(exist_ok=True)
        with pytest.raises(CheckpointError):
            quantize_checkpoint(source, tmp_path / "kept", "int8", device="cpu")
        assert list((tmp_path / "kept").iterdir()) == []
    large = Path(shutil.copytree(tiny("llama"), tmp_path / "large"))
    tensors = load_file(large / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][3, 4] = 1e6
    save_file(tensors, large / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match="NaN or infinity"):  # int8 goes through float16, as in bitsandbytes
        quantize_checkpoint(large, tmp_path / "out", "int8", device="cpu")


def test_the_disk_is_asked_first(tiny, tmp_path, monkeypatch):
    Usage = namedtuple("Usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(10**9, 10**9 - 50_000, 50_000))
    with pytest.raises(ArgumentError, match=r"50000 bytes free, and \d+ are needed: \d+ are missing"):
        quantize_checkpoint(tiny("llama"), tmp_path / "out", "nf4", device="cpu")
    assert not (tmp_path / "out").exists()


def test_a_disk_that_fills_up_keeps_what_is_done(tiny, tmp_path, monkeypatch):
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with pytest.raises(ArgumentError, match="full now"):
        quantize_checkpoint(tiny("llama"), tmp_path / "out", "nf4", max_shard_size="10KB", device="cpu", progress=full)
    assert (tmp_path / "out" / ".onegpu-quantize.json").is_file()
    quantize_checkpoint(tiny("llama"), tmp_path / "out", "nf4", max_shard_size="10KB", device="cpu")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"to": "int4"}, "to='int4' is not a format"),
        ({"to": "int8", "double_quant": True}, "double_quant=True is for 4-bit"),
        ({"skip_modules": ["q_porj"]}, "skip_modules='q_porj' matches no layer"),
        ({"max_shard_size": "5 bananas"}, "max_shard_size='5 bananas' is no size"),
        ({"max_shard_size": 0}, "max_shard_size=0 is nothing"),
        ({"dtype": "int8"}, "dtype='int8' is no dtype for weights"),
        ({"device": "tpu"}, "device='tpu' cannot quantise"),
        ({"device": "cuda:99"}, "cuda:99|99"),
        ({"revision": "main"}, "revision='main' is given for a folder"),
        ({"model": "/no/such/folder"}, "does not exist"),
        ({"model": ""}, "is empty"),
        ({"model": "owner/not-on-the-hub"}, "was not found on the hub"),
    ],
)
def test_arguments_that_cannot_work(tiny, tmp_path, arguments, message):
    with pytest.raises(ArgumentError, match=message):
        quantize_checkpoint(**{"model": tiny("llama"), "output": tmp_path / "out", "to": "nf4", **arguments})
    assert not (tmp_path / "out").exists()


def test_sources_that_cannot_work(tiny, tmp_path):
    out = tmp_path / "out"
    quantize_checkpoint(tiny("llama"), tmp_path / "done", "nf4", device="cpu")
    with pytest.raises(CheckpointError, match="quantised already"):
        quantize_checkpoint(tmp_path / "done", out, "nf4")
    pickled = tmp_path / "pickled"
    pickled.mkdir()
    (pickled / "config.json").write_bytes((tiny("llama") / "config.json").read_bytes())
    (pickled / "pytorch_model.bin").write_bytes(b"\x80\x02.")
    with pytest.raises(CheckpointError, match="only pickled weights"):
        quantize_checkpoint(pickled, out, "nf4")
    short = Path(shutil.copytree(tiny("llama"), tmp_path / "short"))
    tensors = load_file(short / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, short / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"up_proj.*missing from the files"):
        quantize_checkpoint(short, out, "nf4")
    (tmp_path / "file").touch()
    with pytest.raises(ArgumentError, match="is a file"):
        quantize_checkpoint(tiny("llama"), tmp_path / "file", "nf4")
    with pytest.raises(ArgumentError, match="is not empty"):
        quantize_checkpoint(tiny("llama"), tiny("llama"), "nf4")
    assert not out.exists()


def test_memory_is_a_tensor_and_a_shard(tmp_path):
    """A checkpoint of 200 MB in one file; what it takes beside the same run on a small one is far less."""
    from tests.tiny import tiny_model_dir

    sizes = {"hidden_size": 512, "intermediate_size": 1536, "tokenizer": False}
    large = tiny_model_dir(tmp_path / "large", "llama", num_hidden_layers=16, **sizes)
    small = tiny_model_dir(tmp_path / "small", "llama", num_hidden_layers=1, **sizes)
    assert (large / "model.safetensors").stat().st_size > 190e6

    def peak(source: Path) -> int:
        code = (
            "import sys\nfrom onegpu.convert.quantize_checkpoint import quantize_checkpoint\n"
            "from onegpu.hardware import peak_process_bytes\n"
            "quantize_checkpoint(sys.argv[1], sys.argv[2], 'nf4', max_shard_size='2MB', device='cpu')\n"
            "print(peak_process_bytes())"
        )
        out = tmp_path / f"out-{source.parent.name}"
        run = subprocess.run([sys.executable, "-c", code, source, out], cwd=ROOT, capture_output=True, text=True)
        assert run.returncode == 0, run.stderr[-2000:]
        return int(run.stdout.splitlines()[-1])

    assert peak(large) - peak(small) < 40e6


def test_to_dict_is_json(tiny, tmp_path):
    result = quantize_checkpoint(str(tiny("bert")), str(tmp_path / "out"), "fp4", device="cpu")
    text = json.loads(json.dumps(result.to_dict()))
    assert text["to"] == "fp4" and text["output"] == str(tmp_path / "out") and len(text["quantized"]) > 10
