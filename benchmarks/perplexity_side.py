"""One side of the perplexity benchmark, in a process of its own.

``ours`` loads through onegpu; ``peer`` through transformers and bitsandbytes, and onegpu is never imported there.
``peer-float32`` is the peer kept from its CPU kernels: where the CPU has AVX512-BF16, bitsandbytes multiplies 4-bit
weights in bfloat16 with bfloat16 scales whatever dtype was asked for, unless the module is in training mode.

Reads a job (JSON) on stdin: side, model (folder), format, tokens, window, threads, device. Prints one JSON line;
progress goes to stderr.
"""

from __future__ import annotations

import json
import logging
import math
import sys
import time
from typing import Any

import torch
import transformers

FORMATS: dict[str, dict[str, Any]] = {
    "fp32": {},
    "bf16": {"dtype": torch.bfloat16},
    "int8": {"load_in_8bit": True},
    "nf4": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
    "nf4-double": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True},
    "fp4": {"load_in_4bit": True, "bnb_4bit_quant_type": "fp4"},
}


def load(side: str, folder: str, kind: str, device: str = "cpu") -> Any:
    """SmolLM2 in one of `FORMATS`, through the Auto class of this side."""
    options = {"dtype": torch.float32, "device_map": {"": device}, "attn_implementation": "sdpa", **FORMATS[kind]}
    if side == "ours":
        from onegpu import AutoModelForCausalLM

        return AutoModelForCausalLM.from_pretrained(folder, **options).eval()
    quantization = {name: options.pop(name) for name in list(options) if name.startswith(("load_in_", "bnb_"))}
    if quantization:
        options["quantization_config"] = transformers.BitsAndBytesConfig(**quantization)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, **options)
    return model.train(side == "peer-float32")  # SmolLM2 has no dropout: in training mode it computes the same


def window_nlls(model: Any, tokens: list[int], window: int, say: str = "") -> list[float]:
    """Mean negative log-likelihood (nats) in each of the non-overlapping windows, its first token unscored.

    Cross entropy is taken of float32 logits and summed in float64.
    """
    nlls: list[float] = []
    for start in range(0, len(tokens) - window + 1, window):
        ids = torch.tensor(tokens[start : start + window], device=model.device)
        with torch.inference_mode():
            logits = model(ids[None], use_cache=False).logits[0]
        losses = torch.nn.functional.cross_entropy(logits[:-1].float(), ids[1:], reduction="none")
        nlls.append(losses.double().mean().item())
        if say and (len(nlls) % 5 == 0 or start + 2 * window > len(tokens)):
            perplexity = math.exp(math.fsum(nlls) / len(nlls))
            print(f"-- {say}: {len(nlls)} windows, perplexity {perplexity:.4f}", file=sys.stderr, flush=True)
    return nlls


def measure(job: dict[str, Any]) -> dict[str, Any]:
    """Perplexity, the windows' nlls, seconds, and on our side the bytes of weights and of expanded copies."""
    model = load(job["side"], job["model"], job["format"], job["device"])
    start = time.perf_counter()
    nlls = window_nlls(model, job["tokens"], job["window"], f"{job['format']} {job['side']}")
    row: dict[str, Any] = {
        "perplexity": math.exp(math.fsum(nlls) / len(nlls)),
        "seconds": round(time.perf_counter() - start, 1),
        "window_nll": [round(nll, 6) for nll in nlls],
    }
    if job["side"] == "ours":
        from onegpu.placement import memory_table

        table = memory_table(model)
        row["weight_bytes"] = sum(line.bytes for line in table if line.name == "weights")
        row["expanded_bytes"] = sum(line.bytes for line in table if line.name != "weights")
    return row


def main() -> None:
    job = json.load(sys.stdin)
    torch.set_num_threads(job["threads"])
    transformers.utils.logging.disable_progress_bar()
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it warns in every layer that int8 casts to float16
    print(json.dumps(measure(job)), flush=True)
    if job["side"] != "ours" and "onegpu" in sys.modules:
        raise RuntimeError("the peer's process imported onegpu: this was no independent measurement")


if __name__ == "__main__":
    main()
