"""One load of the load benchmark, in a process of its own: a checkpoint from the page cache to a quantised model.

    python -m benchmarks.load_side make FOLDER '{"layers": …}'      writes a random checkpoint
    python -m benchmarks.load_side ours|peer FOLDER '{"format": …}'  loads it; one JSON line on stdout

The side loads a tiny checkpoint first, so that imports, the device's context and kernels are there: the load alone is
timed. ``peer`` is transformers + bitsandbytes and never imports onegpu.
"""

from __future__ import annotations

import json
import sys
import threading
import time
from pathlib import Path
from typing import Any

import torch
import transformers

FORMATS: dict[str, dict[str, Any]] = {
    "nf4": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": torch.bfloat16},
    "int8": {"load_in_8bit": True},
}


def make(folder: Path, shape: dict[str, Any]) -> None:
    """Write a Llama checkpoint of random bfloat16 weights in shards of at most ``shard_bytes``, and a config."""
    from safetensors.torch import save_file

    config = transformers.LlamaConfig(
        num_hidden_layers=shape["layers"],
        hidden_size=shape["hidden"],
        intermediate_size=shape["intermediate"],
        num_attention_heads=shape["heads"],
        num_key_value_heads=shape["heads"],
        vocab_size=shape["vocab"],
        dtype="bfloat16",
        architectures=["LlamaForCausalLM"],
    )
    with torch.device("meta"):
        weights = transformers.LlamaForCausalLM(config).to(torch.bfloat16).state_dict()
    shards: list[list[str]] = [[]]
    size = 0
    for name, tensor in weights.items():
        size += tensor.nbytes
        if size > shape["shard_bytes"] and shards[-1]:
            shards.append([])
            size = tensor.nbytes
        shards[-1].append(name)
    folder.mkdir(parents=True, exist_ok=True)
    index = {}
    generator = torch.Generator(device=shape["device"]).manual_seed(0)
    for number, names in enumerate(shards, 1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        tensors = {}
        for name in names:
            tensor = torch.empty(weights[name].shape, dtype=torch.bfloat16, device=shape["device"])
            tensor = tensor.fill_(1) if tensor.dim() == 1 else tensor.normal_(0, 0.02, generator=generator)
            tensors[name] = tensor.cpu()
            index[name] = file
        save_file(tensors, folder / file, metadata={"format": "pt"})
    total = sum(tensor.nbytes for tensor in weights.values())
    (folder / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {"total_size": total}, "weight_map": index}), encoding="utf-8"
    )
    config.save_pretrained(folder)


def load(side: str, folder: Path, kind: str, device: str) -> Any:
    """The model on the device, in the checkpoint's dtype where it is not quantised."""
    place = {"": 0 if device == "cuda" else "cpu"}
    if side == "ours":
        from onegpu import AutoModelForCausalLM

        return AutoModelForCausalLM.from_pretrained(folder, dtype="auto", device_map=place, **FORMATS[kind])
    config = transformers.BitsAndBytesConfig(**FORMATS[kind])
    return transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype="auto", device_map=place, quantization_config=config
    )


class HostMemory:
    """The most host memory this process took while in the ``with`` block, beyond what it had before.

    Attributes:
        peak_bytes: resident, mapped files included (VmHWM where the kernel can reset it, else sampled).
        anonymous_bytes: without pages of files, which the kernel can drop; sampled every 5 ms.
    """

    peak_bytes = anonymous_bytes = 0

    def __enter__(self) -> HostMemory:
        try:
            Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # VmHWM starts again at what is resident
            self._exact = True
        except OSError:
            self._exact = False
        self._before, self._most = _status(), {"VmRSS": 0, "RssAnon": 0}
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="host-memory", daemon=True)
        self._thread.start()
        return self

    def _watch(self) -> None:
        while not self._stop.wait(0.005):
            now = _status()
            self._most = {name: max(size, now[name]) for name, size in self._most.items()}

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()
        peak = _status()["VmHWM"] if self._exact else self._most["VmRSS"]
        self.peak_bytes = max(0, peak - self._before["VmRSS"])
        self.anonymous_bytes = max(0, self._most["RssAnon"] - self._before["RssAnon"])


def _status() -> dict[str, int]:
    """Bytes by name of /proc/self/status; zeros where there is none."""
    sizes = {"VmHWM": 0, "VmRSS": 0, "RssAnon": 0}
    try:
        text = Path("/proc/self/status").read_text(encoding="ascii")
    except OSError:
        return sizes
    for line in text.splitlines():
        name, _, value = line.partition(":")
        if name in sizes:
            sizes[name] = int(value.split()[0]) * 1024
    return sizes


def measure(side: str, folder: Path, job: dict[str, Any]) -> dict[str, Any]:
    """Seconds and peaks of one load; with ``job["profile"]`` also where the time went, as text."""
    kind, device, cuda = job["format"], job["device"], job["device"] == "cuda"
    start = time.perf_counter()
    load(side, Path(job["warm_up"]), kind, device)
    warm_up = time.perf_counter() - start
    if cuda:
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    profile = None
    with HostMemory() as host:
        start = time.perf_counter()
        if job.get("profile"):
            from benchmarks.sampling import StackSampler

            with StackSampler() as sampler:
                model = load(side, folder, kind, device)
            profile = sampler.report()
        else:
            model = load(side, folder, kind, device)
        if cuda:
            torch.cuda.synchronize()
        seconds = time.perf_counter() - start
    result: dict[str, Any] = {
        "seconds": seconds,
        "warm_up_s": warm_up,
        "host_peak_bytes": host.peak_bytes,
        "host_anonymous_bytes": host.anonymous_bytes,
        "model_bytes": sum(t.nbytes for t in {id(t): t for t in (*model.parameters(), *model.buffers())}.values()),
    }
    if cuda:
        result["device_model_bytes"] = torch.cuda.memory_allocated() - before
        result["device_peak_bytes"] = torch.cuda.max_memory_allocated() - before
        result["device_reserved_bytes"] = torch.cuda.max_memory_reserved()
    if profile is not None:
        result["profile"] = profile
    if side == "peer" and "onegpu" in sys.modules:
        raise RuntimeError("the peer's process imported onegpu: this was no independent measurement")
    return result


def main() -> None:
    action, folder, job = sys.argv[1], Path(sys.argv[2]), json.loads(sys.argv[3])
    transformers.utils.logging.disable_progress_bar()
    if action == "make":
        make(folder, job)
    else:
        print(json.dumps(measure(action, folder, job)), flush=True)


if __name__ == "__main__":
    main()
