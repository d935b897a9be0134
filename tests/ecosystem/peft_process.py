"""transformers + PEFT + bitsandbytes in a process of their own, and the training loop that both sides run.

Run as a script with a file of jobs it never imports onegpu. Tests import the loop, so that nothing but the layers under
the adapters differs between the two sides.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).parents[2]
# What bitsandbytes' CPU kernels take: blocks must not cross rows.
SIZES = {"intermediate_size": 192}
STEPS = 50
RANK = 8


def rows(count: int = 64, vocabulary: int = 100) -> list[dict[str, list[int]]]:
    """Counting sequences of different lengths and strides: something to learn."""
    data = []
    for number in range(count):
        length, stride = 8 + number % 9, 1 + number % 3
        ids = [5 + (7 * number + stride * i) % vocabulary for i in range(length)]
        data.append({"input_ids": ids, "labels": ids})
    return data


def collate(batch: list[dict[str, list[int]]]) -> dict[str, torch.Tensor]:
    """Pad on the left, as tokenizers of decoders do; padding is not learnt."""
    width = max(len(row["input_ids"]) for row in batch)
    pad = [width - len(row["input_ids"]) for row in batch]
    return {
        "input_ids": torch.tensor([[0] * n + row["input_ids"] for n, row in zip(pad, batch, strict=True)]),
        "attention_mask": torch.tensor([[0] * n + [1] * (width - n) for n in pad]),
        "labels": torch.tensor([[-100] * n + row["labels"] for n, row in zip(pad, batch, strict=True)]),
    }


def adapt(model: Any, **options: Any) -> Any:
    """A LoRA adapter on every linear layer, the same one on both sides."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(7)
    config = LoraConfig(r=RANK, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM", **options)
    return get_peft_model(model, config)


def train(model: Any, folder: Any, steps: int = STEPS, **options: Any) -> list[float]:
    """``transformers.Trainer`` with gradient checkpointing. Returns the loss of every step."""
    from transformers import Trainer, TrainingArguments

    defaults = {
        "max_steps": steps,
        "per_device_train_batch_size": 4,
        "gradient_checkpointing": True,
        "learning_rate": 1e-2,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": [],
        "use_cpu": True,
        "disable_tqdm": True,
        "seed": 3,
        "remove_unused_columns": False,
    }
    arguments = TrainingArguments(str(folder), **{**defaults, **options})
    trainer = Trainer(model=model, args=arguments, train_dataset=rows(), data_collator=collate)
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def loss(model: Any) -> float:
    """On a fixed batch: the losses of steps are of different rows."""
    with torch.no_grad():
        return model.eval()(**collate(rows(8))).loss.item()


def logits(model: Any) -> torch.Tensor:
    """What the model makes of two of the rows."""
    batch = collate(rows(2))
    with torch.no_grad():
        return model.eval()(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits.float()


def _run(job: dict[str, Any]) -> None:
    import transformers
    from peft import PeftModel, prepare_model_for_kbit_training

    options = job.get("options")
    config = {} if options is None else {"quantization_config": transformers.BitsAndBytesConfig(**options)}
    model = transformers.AutoModelForCausalLM.from_pretrained(job["source"], device_map="cpu", **config)
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False  # rounds to bfloat16: the definition is what is compared
    if "adapter" in job:
        model = PeftModel.from_pretrained(model, job["adapter"])
    if "train" in job:
        model = adapt(prepare_model_for_kbit_training(model))
        Path(job["losses"]).write_text(json.dumps(train(model, job["train"])))
        model.save_pretrained(job["train"])
    torch.save(logits(model), job["logits"])


def run_jobs(jobs: list[dict[str, Any]], folder: Path) -> None:
    """Run ``jobs`` with bitsandbytes in one subprocess."""
    path = folder / "jobs.json"
    path.write_text(json.dumps(jobs, default=str))
    # bitsandbytes compiles its CPU definitions anew for every shape; uncompiled they give the same numbers.
    environment = {**os.environ, "TORCHDYNAMO_DISABLE": "1"}
    command = [sys.executable, "-m", "tests.ecosystem.peft_process", str(path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=240, env=environment)
    assert done.returncode == 0, done.stderr[-4000:]


if __name__ == "__main__":
    for each in json.loads(Path(sys.argv[1]).read_text()):
        _run(each)
    assert not [name for name in sys.modules if name.partition(".")[0] == "onegpu"], "the oracle used onegpu"
    assert "bitsandbytes" in sys.modules, "the oracle is not bitsandbytes"
