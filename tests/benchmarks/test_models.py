"""The peers and the costs of whole models: the hand-captured peer generates what transformers generates."""

from __future__ import annotations

import pytest
import torch

from benchmarks import first_use, host_time, models, step_budget, ties
from benchmarks.case import Context
from benchmarks.cases import model as model_cases
from benchmarks.hand_captured import HandCaptured

# BLOOM's position bias is made from numbers on the host; Falcon's heads are picked with a list, copied from there.
_NOT_CAPTURED = ("BLOOM-7B1", "Falcon-7B")


@pytest.mark.parametrize("shape", models.SHAPES)
def test_the_hand_captured_peer_is_transformers(shape: str, device: str) -> None:
    model = models.plain(shape, device, True, "float32")
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter.data.normal_(0, 0.3)
    ids = torch.randint(3, 250, (3, 7), device=device)
    peer = HandCaptured(model, 3, 7 + 12)
    if shape not in _NOT_CAPTURED:
        peer.capture(ids)
    expected = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=12, do_sample=False)[:, 7:]
    for _ in range(2):
        assert torch.equal(peer.generate(ids, 12), expected)
    assert len(expected.unique()) > 3  # not one token over and over
    assert (peer.graph is not None) == (device == "cuda" and shape not in _NOT_CAPTURED)


@pytest.mark.parametrize(("shape", "billions", "kv_bytes"), [
    ("Llama-2-7B", 6.607, 524288), ("Mistral-7B", 7.111, 131072), ("Qwen2.5-0.5B", 0.494, 12288),
    ("Falcon-7B", 6.922, 8192), ("BLOOM-7B1", 7.069, 491520),
])  # fmt: skip
def test_costs_of_the_real_shapes(shape: str, billions: float, kv_bytes: int) -> None:
    model = models.plain(shape, "meta", False)
    # Falcon's and BLOOM's head is the embedding: it is read, and counted once.
    assert models.parameters(model) == pytest.approx(billions * 1e9, rel=1e-3)
    layers, heads, _, width = models.attention_sizes(model)
    assert 2 * 2 * layers * models.attention_sizes(model)[2] * width == kv_bytes
    assert models.attention_flops(model, 1000) == 2 * 10**6 * layers * heads * width


def test_step_cost_counts_each_byte_once() -> None:
    model = models.plain("Llama-2-7B", "cpu", True)
    costs = models.step_cost(model, 3, 10)
    weights = sum(p.numel() for p in model.parameters()) - model.get_input_embeddings().weight.numel()
    buffers = {b.data_ptr(): b for b in model.buffers()}  # the rotary frequencies, under two names
    assert costs["linear"] == 2 * weights + sum(b.numel() * b.element_size() for b in buffers.values())
    assert costs["attention"] == 2 * 2 * 4 * 16 * 2 * 3 * 10
    assert models.step_cost(models.ours(model, "nf4"), 1, 1)["linear"] < 0.75 * costs["linear"]


def test_a_captured_step_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    ours, context = models.ours(models.plain("Llama-2-7B", "cpu", True), "bf16"), Context("cuda", True)
    ids = model_cases._ids(ours, 1, 8)
    ours.generate.engine.capture = "never"
    model_cases._generate(ours, ids, 40)
    assert model_cases._replay(ours, 20, 8, context) is None  # nothing is captured
    ours.generate.engine.capture = "emulate"
    expected = model_cases._generate(ours, ids, 40)
    assert model_cases._first_use(ours)["capture_s"] > 0
    with torch.no_grad():
        assert model_cases._replay(ours, 20, 8, context) > 0
    assert torch.equal(model_cases._generate(ours, ids, 40), expected)  # and nothing of it stays


def test_host_time_is_the_loop_without_the_model(monkeypatch: pytest.MonkeyPatch) -> None:
    ours = models.ours(models.plain("Llama-2-7B", "cpu", True), "bf16")
    ids = model_cases._ids(ours, 1, 8)
    ours.generate.engine.capture = "emulate"
    before = model_cases._generate(ours, ids, 110)
    step = model_cases._captured_step(ours)
    runs: list[int] = []
    run = step._run
    monkeypatch.setattr(step, "_run", lambda: (runs.append(1), run()))
    found = host_time.host_us(ours, ids, step, 100, repeats=2)
    assert set(found) == {"greedy", "eos", "eos, max_time", "eos, streamer", "eos, sampled"}
    assert not runs and all(micro < 20_000 for micro in found.values())
    assert found["greedy"] > 0
    with torch.no_grad():
        model_cases._rewind(step, 8)
        assert host_time.launch_us(step, lambda: model_cases._rewind(step, 8), 2, 2) > 0 and len(runs) == 4
    assert torch.equal(model_cases._generate(ours, ids, 110), before)  # all of it is put back


def test_a_fresh_process_uses_a_model_for_the_first_time() -> None:
    found = first_use.measure("Llama-2-7B", "bf16", "cpu", True)
    assert found.keys() == {"empty", "filled"}
    for one in found.values():
        assert one["loop"] == "eager" and 0 < one["optimize_s"] < 60 and 0 < one["first_s"] < 60
        assert one["first_use_s"] < one["first_s"] and 0 < one["second_s"] < 60
        assert one["compile_s"] == one["capture_s"] == 0
    with pytest.raises(RuntimeError, match="KeyError"):
        first_use.measure("No-7B", "bf16", "cpu", True)


def test_tokens_that_differ_are_weighed_by_the_peers_logits() -> None:
    plain = models.plain("Llama-2-7B", "cpu", True)
    ids = model_cases._ids(plain, 2, 8)
    theirs = plain.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=5, do_sample=False)[:, 8:]
    assert ties.first_difference(plain, ids, theirs, theirs) is None
    with torch.inference_mode():
        logits = plain(torch.cat([ids, theirs], 1)).logits[1, 8 + 2 - 1].float()
    order = logits.argsort(descending=True)
    ours = theirs.clone()
    ours[1, 2] = order[200]
    found = ties.first_difference(plain, ids, ours, theirs)
    assert found is not None and found["at"] == 2 and not found["near_tie"] and 150 < found["rank"] < 250
    assert found["gap"] == pytest.approx(float(logits[theirs[1, 2]] - logits[order[200]]), abs=0.02)
    ours[1, 2] = order[0] if order[0] != theirs[1, 2] else order[1]
    ours[1, 4] = order[200]  # what comes behind the first one does not count
    found = ties.first_difference(plain, ids, ours, theirs)
    assert found is not None and found["at"] == 2 and found["rank"] <= 1


def test_time_of_kernels_that_wait_for_each_other_is_counted_once() -> None:
    spans = [("a", 0.0, 10.0), ("b", 4.0, 15.0), ("a", 14.0, 21.0), ("copy", 5.0, 9.0)]
    assert step_budget.exclusive(reversed(spans)) == {"a": (2, 16.0), "b": (1, 5.0), "copy": (1, 0.0)}


def test_the_budget_is_the_difference_of_two_traces() -> None:
    gemm = "void cutlass::gemm::Kernel2<float, int>(float const*, int)"
    long = {gemm: (12, 240.0), "nvjet_tst_64x8": (4, 40.0), "once": (1, 7.0), "rms_norm_kernel": (4, 8.0)}
    short = {gemm: (2, 40.0), "once": (1, 8.0)}
    kernels = step_budget.difference(long, short, 4)
    assert [(k["kernel"], k["what"], k["launches"], k["us"]) for k in kernels] == [
        ("Kernel2", "linear", 2.5, 50.0),
        ("nvjet_tst_64x8", "linear", 1.0, 10.0),
        ("rms_norm_kernel", "other", 1.0, 2.0),
    ]
    work = step_budget.by_work(kernels, {"linear": 30_000_000, "attention": 5}, 1e12)
    assert work[0] == {
        "what": "linear", "launches": 3.5, "us": 60.0, "bytes": 30_000_000, "roofline_us": 30.0, "share": 0.5
    }  # fmt: skip
    assert [entry["what"] for entry in work] == ["linear", "other"] and "share" not in work[1]


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("_row_4bit", "linear"),
        ("product(unsigned char const*, float)", "linear"),
        ("attend(float const*, long const*)", "attention"),
        ("void gemv2T_kernel_val<int>", "linear"),
        ("fmha_cutlassF_bf16_aligned_64x64_rf_sm80", "attention"),
        ("void pytorch_flash::flash_fwd_splitkv_kernel", "attention"),
        ("Memcpy DtoD (Device -> Device)", "copy"),
        ("_dequantize_kernel", "dequantise"),
        (
            "void at::native::reduce_kernel<512, 1, ReduceOp<float, ArgMaxOps<float>>>",
            "choice of token",
        ),
        ("void at::native::vectorized_elementwise_kernel<4, at::native::silu>", "other"),
    ],
)
def test_kernels_are_known_by_their_names(name: str, expected: str) -> None:
    assert step_budget.what(name) == expected


@pytest.mark.gpu
def test_on_a_gpu_kernels_are_traced() -> None:
    x = torch.randn(512, 512, device="cuda", dtype=torch.bfloat16)
    x @ x
    times = step_budget.kernel_times(lambda: [x @ x for _ in range(5)])
    count, micro = max(times.values(), key=lambda pair: pair[0])
    assert count >= 5 and 1 < micro < 1e5
