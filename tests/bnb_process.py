"""transformers + bitsandbytes in a process of its own: the oracle of the checkpoint tests.

Run as a script with a file of jobs it never imports onegpu, so that nothing of ours can help it. Imported by tests, it
writes those files: tiny float checkpoints, what onegpu makes of them, what bitsandbytes makes of them, and what each
side computes from the other's files, all once for a test session, whichever worker comes first.
"""

from __future__ import annotations

import fcntl
import json
import os
import subprocess
import sys
import traceback
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).parents[1]

# Fields of BitsAndBytesConfig, as JSON holds them.
FORMATS: dict[str, dict[str, Any]] = {
    "fp4": {"load_in_4bit": True},
    "nf4": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
    "nf4_double": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True},
    "nf4_bf16": {
        "load_in_4bit": True,
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_quant_storage": "bfloat16",
        "bnb_4bit_compute_dtype": "bfloat16",
    },
    "int8": {"load_in_8bit": True},
}
# Types in which transformers + bitsandbytes quantises what we do, so that files are compared byte for byte.
SAME_FILES = ("llama", "opt", "bloom", "gpt2", "t5", "qwen2", "gemma3_text")
# Where sizes or dtype differ: files only. bitsandbytes' CPU kernel dequantises wrongly where blocks cross rows
# (K no multiple of 64); its quantisation is right.
FILES_ONLY: dict[str, tuple[str, dict[str, Any]]] = {
    "llama_odd": ("llama", {"intermediate_size": 113}),
    "opt_bf16": ("opt", {"dtype": torch.bfloat16}),
}
_WIDTHS = {"opt": {"ffn_dim": 192}, "t5": {"d_ff": 192}, "bloom": {}, "gpt2": {}, "falcon_old": {}, "falcon_new": {}}
# Types in which it does not: it loads what we save with bitsandbytes_compatible=True.
OURS_ONLY = ("falcon_old", "falcon_new", "mixtral")


@dataclass
class Job:
    """Load `source`, quantising as `options` say (None: as the files do); then save, and compute logits.

    Fields: name; source; auto (class); options; save (folder or ""); logits (file or ""); save_options.
    """

    name: str
    source: str
    auto: str
    options: dict[str, Any] | None = None
    save: str = ""
    logits: str = ""
    save_options: dict[str, Any] = field(default_factory=dict)


def inputs(model: Any) -> dict[str, torch.Tensor]:
    """The same two rows of tokens for everyone, none of them special."""
    ids = (torch.arange(24).reshape(2, 12) * 7) % 120 + 5
    extra = {"decoder_input_ids": ids[:, :6]} if model.config.is_encoder_decoder else {}
    return {"input_ids": ids, **extra}


def logits(model: Any) -> torch.Tensor:
    """What `model` makes of :func:`inputs`, in float32."""
    with torch.no_grad():
        return model(**inputs(model)).logits.float()


def _run_job(job: Job) -> None:
    import transformers
    from safetensors.torch import save_file

    # Not quantization_config=None: transformers would take it for a wish to load the codes as floats.
    config = {} if job.options is None else {"quantization_config": transformers.BitsAndBytesConfig(**job.options)}
    model = getattr(transformers, job.auto).from_pretrained(job.source, device_map="cpu", **config)
    for module in model.modules():
        # On CPUs with AVX-512 bitsandbytes repacks the weights at the first forward, rounds to bfloat16, and refuses
        # odd sizes. The definition is what is compared.
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    if job.save:
        model.save_pretrained(job.save, **job.save_options)
    if job.logits:
        save_file({"logits": logits(model.eval()).contiguous()}, job.logits)


def _main(path: str) -> None:
    errors = {}
    for job in (Job(**fields) for fields in json.loads(Path(path).read_text())):
        try:
            _run_job(job)
        except Exception:
            errors[job.name] = traceback.format_exc()
    assert not [name for name in sys.modules if name.partition(".")[0] == "onegpu"], "the oracle used onegpu"
    assert "bitsandbytes" in sys.modules, "the oracle is not bitsandbytes"
    Path(path).with_suffix(".errors.json").write_text(json.dumps(errors))


def run_jobs(jobs: list[Job], folder: Path) -> dict[str, str]:
    """Run `jobs` with bitsandbytes in one subprocess. Returns tracebacks by name of the job that failed."""
    path = folder / "jobs.json"
    path.write_text(json.dumps([asdict(job) for job in jobs]))
    command = [sys.executable, "-m", "tests.bnb_process", str(path)]
    # bitsandbytes compiles its CPU definitions anew for every shape; uncompiled they give the same numbers.
    environment = {**os.environ, "TORCHDYNAMO_DISABLE": "1"}
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=240, env=environment)
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(path.with_suffix(".errors.json").read_text())


class Checkpoints:
    """Where the files of a session are; `errors` holds the oracle's tracebacks by job."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def float_dir(self, model_type: str) -> Path:
        """The unquantised checkpoint."""
        return self.folder / "float" / model_type / f"tiny-{FILES_ONLY.get(model_type, (model_type,))[0]}"

    def ours(self, model_type: str, kind: str) -> Path:
        """As onegpu loaded and saved it in format `kind`."""
        return self.folder / "ours" / model_type / kind

    def theirs(self, model_type: str, kind: str) -> Path:
        """As transformers + bitsandbytes did."""
        return self.folder / "theirs" / model_type / kind

    def logits(self, side: str, model_type: str, kind: str) -> torch.Tensor:
        """What bitsandbytes computes from the files of `side` ("ours" or "theirs")."""
        from safetensors.torch import load_file

        name = f"{side}-{model_type}-{kind}"
        errors = json.loads((self.folder / "jobs.errors.json").read_text())
        assert name not in errors, errors[name]
        return load_file(self.folder / "logits" / f"{name}.safetensors")["logits"]


def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Checkpoints:
    """All files, made by whoever asks first; other workers of the same session wait."""
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "bnb"
    folder.mkdir(exist_ok=True)
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (folder / "jobs.errors.json").exists():
            _make(Checkpoints(folder))
    return Checkpoints(folder)


def _make(made: Checkpoints) -> None:
    """First our side, in this process; then everything that bitsandbytes has to do, in one other."""
    import onegpu
    from tests.tiny import AUTO_CLASS, tiny_model_dir

    (made.folder / "logits").mkdir(exist_ok=True)
    jobs: list[Job] = []

    def save(model_type: str, kind: str, options: dict[str, Any], **save_options: Any) -> None:
        """Our files, and the jobs that make theirs and read both."""
        auto = AUTO_CLASS.get(model_type, "AutoModelForCausalLM")
        source = made.float_dir(model_type)
        config = onegpu.BitsAndBytesConfig(**options)
        model = getattr(onegpu, auto).from_pretrained(source, quantization_config=config)
        model.save_pretrained(made.ours(model_type, kind), **save_options)
        save_options.pop("bitsandbytes_compatible", None)
        # A skip list adds to the default here and replaces it there: they are given what our config.json has.
        saved = json.loads((made.ours(model_type, kind) / "config.json").read_text()).get("quantization_config", {})
        options = {**options, "llm_int8_skip_modules": saved.get("llm_int8_skip_modules")}
        for side, folder in (("theirs", made.theirs(model_type, kind)), ("ours", made.ours(model_type, kind))):
            name = f"{side}-{model_type}-{kind}"
            where = str(made.folder / "logits" / f"{name}.safetensors")
            if side == "theirs":
                jobs.append(Job(name, str(source), auto, options, str(folder), where, save_options))
            else:
                jobs.append(Job(name, str(folder), auto, None, "", where))

    for model_type in (*SAME_FILES, *OURS_ONLY):
        sizes = _WIDTHS.get(model_type, {"intermediate_size": 192})
        tiny_model_dir(made.folder / "float" / model_type, model_type, tokenizer=False, **sizes)
    for name, (model_type, changes) in FILES_ONLY.items():
        tiny_model_dir(made.folder / "float" / name, model_type, tokenizer=False, **changes)
    for model_type in (*SAME_FILES, *FILES_ONLY):
        for kind, options in FORMATS.items():
            save(model_type, kind, options)
    save("llama", "sharded_nf4", FORMATS["nf4_double"], max_shard_size="40KB")
    save("gpt2", "sharded_int8", FORMATS["int8"], max_shard_size="40KB")
    for model_type in OURS_ONLY:
        for kind in ("nf4_double", "int8"):
            save(model_type, kind, FORMATS[kind], bitsandbytes_compatible=True)
    save("llama", "skips", {**FORMATS["nf4"], "llm_int8_skip_modules": ["q_proj", "mlp.up_proj"]})
    run_jobs(jobs, made.folder)


if __name__ == "__main__":
    _main(sys.argv[1])
