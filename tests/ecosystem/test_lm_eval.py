"""EleutherAI's lm-evaluation-harness on quantised models: ``HFLM(pretrained=model, tokenizer=…)``, tasks of our own."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import onegpu

pytest.importorskip("lm_eval", reason="lm-eval is not installed here: pip install 'onegpu[ecosystem]'")

ROOT = Path(__file__).parents[2]
TASKS = ["onegpu_facts", "onegpu_facts_written"]


def evaluate(model, tokenizer, batch_size: int) -> dict:
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=str(ROOT / "tests" / "ecosystem" / "data"), include_defaults=False)
    harness = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size, device="cpu")
    return simple_evaluate(harness, tasks=TASKS, task_manager=manager, log_samples=True, bootstrap_iters=0)


def answers(result: dict) -> tuple[torch.Tensor, list[str]]:
    """Log-probabilities of every choice, and what was written."""
    chosen = sorted(result["samples"]["onegpu_facts"], key=lambda sample: sample["doc_id"])
    written = sorted(result["samples"]["onegpu_facts_written"], key=lambda sample: sample["doc_id"])
    scores = [[float(part[0]) for part in sample["filtered_resps"]] for sample in chosen]
    return torch.tensor(scores), [sample["resps"][0][0] for sample in written]


@pytest.mark.parametrize("options", [{"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}, {"load_in_8bit": True}])
def test_the_harness_scores_the_model(tiny, tmp_path, monkeypatch, options):
    import datasets

    monkeypatch.chdir(ROOT)  # the tasks name their file from here
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path)
    model = onegpu.AutoModelForCausalLM.from_pretrained(tiny("llama"), **options)
    tokenizer = onegpu.AutoTokenizer.from_pretrained(tiny("llama"))
    result = evaluate(model, tokenizer, batch_size=4)
    scores, written = answers(result)
    assert scores.shape == (6, 3) and scores.isfinite().all() and (scores < 0).all()
    best = [int(row.argmax()) for row in scores]
    assert result["results"]["onegpu_facts"]["acc,none"] == pytest.approx(
        sum(a == b for a, b in zip(best, [0, 1, 2, 0, 1, 2], strict=True)) / 6
    )
    assert len(written) == 6 and any(written)
    # By hand, one question: what the harness adds up is what the model says.
    question, choice = (tokenizer(t, return_tensors="pt").input_ids for t in ("The capital of France is", " Paris"))
    ids = torch.cat([question, choice], dim=1)
    with torch.no_grad():
        logprobs = model(ids).logits.log_softmax(-1)[0, question.shape[1] - 1 : -1]
    expected = logprobs.gather(1, choice[0, :, None]).sum()
    close = 2e-2 if "load_in_8bit" in options else 1e-4  # LLM.int8 rounds activations; padding changes a last bit
    torch.testing.assert_close(scores[0, 0], expected, rtol=close, atol=close)
