"""Tables and plots are what the stored rows say."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks import plots, tables
from benchmarks.environment import store_rows

WHERE = {
    "device": "A CPU",
    "cores": 2,
    "driver": None,
    "date": "2026-01-02T03:04:05Z",
    "commit": "0123456789",
    "dirty": False,
    "versions": {"torch": "2", "transformers": "5", "bitsandbytes": "0.5"},
}


def perplexity_row(case: str, ours: float, theirs: float) -> dict[str, object]:
    return {
        "benchmark": "perplexity",
        "case": case,
        "ours": {"perplexity": ours, "weight_bytes": 166_000_000},
        "theirs": {"perplexity": theirs},
        "relative_difference": ours / theirs - 1,
        "tokens_scored": 20460,
        "environment": WHERE,
    }


def test_the_repository_is_up_to_date(capsys: pytest.CaptureFixture[str]):
    assert tables.main(["--check"]) == 0, capsys.readouterr().out


def test_a_marked_table_is_replaced_and_the_rest_of_the_page_is_not(tmp_path: Path):
    store_rows(tmp_path / "cpu" / "perplexity.jsonl", [perplexity_row("nf4-double", 10.5, 10.0)])
    page = "before\n<!-- table:fidelity -->\nold | table\n<!-- /table -->\nafter <!-- table:unmarked -->\n"
    new = tables.fill(page, tmp_path)
    assert new.startswith("before\n<!-- table:fidelity -->\n|") and new.endswith("after <!-- table:unmarked -->\n")
    assert "old" not in new
    assert "| nf4 + double quantisation (166 MB) | 10.5000 | 10.0000 | +5.0e-02 |" in new
    assert "20,460 tokens" in new and "commit 0123456" in new
    assert tables.fill(new, tmp_path) == new


def suite_row(case: str, theirs: dict[str, int] | None, **ours: object) -> dict[str, object]:
    counts = {"passed": 1000, "failed": 0, "excluded": {}, "skipped": {}, "different": {}, "unexplained": {}, **ours}
    row = {"benchmark": "bnb_suite", "case": case, "suite_commit": "abcdef0123", "ours": counts, "theirs": theirs}
    return {**row, "environment": WHERE}


def test_the_suite_is_counted_by_file_and_its_exceptions_by_reason(tmp_path: Path):
    rows = [
        suite_row("test_a", None, failed=3, different={"meant": 2}, unexplained={"t": "boom"}, excluded={"no": 4}),
        suite_row("test_b", {"passed": 7}, failed=1, different={"meant": 1}, skipped={"slow": 5, "other": 6}),
    ]
    store_rows(tmp_path / "cpu" / "bnb_suite.jsonl", rows)
    table = tables.render("bnb_suite", tmp_path)
    assert (
        "| `test_a.py` | 1,000 | 3 | 4 | 0 |\n| `test_b.py` | 1,000 | 1 | 0 | 11 |\n| all | 2,000 | 4 | 4 | 11 |"
        in table
    )
    assert (
        "| 3 fail | meant |\n| 4 not run | no |\n| 1 fail | not explained" in table
        and "bitsandbytes at abcdef0" in table
    )
    store_rows(tmp_path / "cpu" / "bnb_suite.jsonl", [suite_row("test_a", {"passed": 5})])
    assert "| all | 2,000 | 1 | 0 | 11 | 12 |" in tables.render("bnb_suite", tmp_path)


def spread(median: float) -> dict[str, object]:
    return {"median": median, "low": median * 0.9, "high": median * 1.1, "n": 3}


def speed_row(benchmark: str, case: str, **fields: object) -> dict[str, object]:
    row = {"benchmark": benchmark, "case": case, "peer": "cuBLAS", "ratio": spread(0.5), "share": 0.87, "note": None}
    ceilings = {"before": {"read": 3.1e12, "bf16": 7.5e14}}
    return {**row, **fields, "ceilings": ceilings, "environment": {**WHERE, "device": "A GPU", "driver": "580"}}


def test_tables_and_plots_of_speed(tmp_path: Path):
    theirs = {"us": spread(40.0), "ms": spread(8.3)}
    op = speed_row("linear", "nf4 M=1", ours={"us": spread(20.0), "host_us": 7.0}, theirs=theirs)
    peers = {"graph": theirs, "transformers generate, bf16": {"ms": spread(40.0)}, "bitsandbytes": {"ms": spread(50.0)}}
    name = "Llama-2-7B nf4"
    more = {"fused": True, "wall_over_replay": 1.0049, "capture_s": 0.141}
    decode = speed_row("model", f"{name} decode, batch 1", ours={"ms": spread(2.0), **more}, theirs=theirs, peers=peers)
    late = speed_row("model", "B decode, batch 1", ours={"ms": spread(2.0)}, theirs=theirs, peers=peers, note="why")
    prompt = speed_row("model", f"{name} prefill 1x4096", ours={"ms": spread(100.0)}, theirs={"ms": spread(120.0)})
    work = [
        {"what": "linear", "launches": 129.0, "us": 1500.0, "share": 0.8},
        {"what": "other", "launches": 64.0, "us": 90.0},
    ]
    step = speed_row(
        "model", f"{name} budget of one step", ours={"us": spread(1700.0)}, theirs=None, work=work, idle_us=110.0,
        launches=193.0,
    )  # fmt: skip
    store_rows(tmp_path / "gpu" / "linear.jsonl", [op])
    store_rows(tmp_path / "gpu" / "model.jsonl", [decode, late, prompt, step])
    assert "| nf4 M=1 | 20.0 | 40.0 | 0.50 (0.45–0.55) | 87% | 7.0 |" in (table := tables.render("linear", tmp_path))
    assert "Peer: cuBLAS. Ceilings: read 3.1 TB/s, bf16 750 TFLOP/s. <small>A GPU;" in table
    table = tables.render("model-decode", tmp_path)
    cells = "2.00 | 8.30 | 0.50 (0.45–0.55) | 40.0 | 50.0 | 1.005 | 0.14 | 87%"
    assert f"| {name}, batch 1 † | {cells} |\n" in table and "† five kernels a layer" in table
    assert "| B, batch 1 | 2.00 | 8.30 * | 0.50 (0.45–0.55) | 40.0 | 50.0 | – | – | 87% |" in table
    assert "\\* its forward cannot be captured" in table
    del peers["bitsandbytes"]
    store_rows(tmp_path / "other" / "model.jsonl", [{**decode, "peers": peers}])
    assert f"| {cells.replace(' 50.0 |', '')} |" in tables.render("model-decode", tmp_path)  # no column of dashes
    (tmp_path / "other" / "model.jsonl").unlink()
    assert f"| {name} 1x4096 | 100.0 | 120.0 |" in tables.render("model-prefill", tmp_path)
    table = tables.render("model-step", tmp_path)
    assert (
        f"| {name} | linear | 129 | 1500 | 80% |\n|  | other | 64 | 90 | – |\n|  | nothing runs |  | 110 |  |" in table
    )
    names = ["docs/images/model_decode.svg", "docs/images/model_step.svg"]
    assert plots.stale(tmp_path, tmp_path) == names
    pytest.importorskip("matplotlib")
    assert plots.draw_all(names, tmp_path, tmp_path) and plots.stale(tmp_path, tmp_path) == []


def test_tables_and_plots_of_attention_in_models(tmp_path: Path):
    def model(case: str, batch: int, padding: int, ours: float, **peers: float) -> dict[str, object]:
        sides = {f"transformers, {name}": {"ms": spread(ms), "peak_bytes": 3e9} for name, ms in peers.items()}
        peer, theirs = next(iter(sides.items()))
        return speed_row(
            "attention_model", case, peer=peer, theirs=theirs, peers=sides,
            ours={"ms": spread(ours), "peak_bytes": 2e9},
            shape={"batch": batch, "length": 4096, "padding": padding},
        )  # fmt: skip

    sizes = [(512, 16384, 2**23), (1024, 32768, 2**25)]
    rows = [
        model("Llama-2-7B batch 1 x 4096", 1, 0, 100.0, sdpa=50.0, eager=300.0),
        model("Llama-2-7B by optimize() batch 1 x 4096", 1, 0, 40.0, sdpa=50.0),
        model("Llama-2-7B batch 8 x 4096, 30 % padding", 8, 30, 100.0, sdpa=150.0),
    ]
    rows += [
        speed_row(
            "attention_model", f"memory, length {n}", shape={"length": n}, ours={"bytes": a, "training_bytes": 2 * a},
            theirs={"bytes": b, "training_bytes": 4 * b}, peers={},
        )
        for n, a, b in sizes
    ]  # fmt: skip
    store_rows(tmp_path / "gpu" / "attention_model.jsonl", rows)
    table = tables.render("attention-models", tmp_path)
    assert "| Llama-2-7B batch 1 x 4096 | 100.0 | 50.0 | 300.0 | 2.00 × sdpa (1.82–2.22) | 2.00 / 3.00 |" in table
    assert "| Llama-2-7B batch 8 x 4096, 30 % padding | 100.0 | 150.0 | – |" in table
    assert "| 512 | 0.0 | 8 | 512 × | 0.0 | 32 | 1024 × |" in tables.render("attention-memory", tmp_path)
    assert plots.attention_points(tmp_path) == [
        [
            "Llama-2-7B, n x 4096\nA GPU",
            [
                [1, "onegpu", 41.0],
                [1, "onegpu, optimize()", 102.4],
                [1, "transformers, eager", 13.7],
                [1, "transformers, sdpa", 81.9],
            ],
        ],
        ["Llama-2-7B, 8 x 4096\nA GPU", [[30, "onegpu", 327.7], [30, "transformers, sdpa", 218.5]]],
    ]
    assert plots.attention_memory_points(tmp_path)[1] == ["A GPU", 1024, 32768, 2**25, 65536, 2**27]
    pytest.importorskip("matplotlib")
    names = plots.stale(tmp_path, tmp_path)
    assert len(names) == 2 and plots.draw_all(names, tmp_path, tmp_path) and plots.stale(tmp_path, tmp_path) == []


def test_plots_over_lengths_and_over_rows(tmp_path: Path):
    def attention(case: str, length: int, us: float, **peers: float) -> dict[str, object]:
        sides = {name: {"us": spread(time)} for name, time in peers.items()}
        fields = {"ours": {"us": spread(us), "host_us": 9.0}, "theirs": None, "peers": sides}
        return speed_row("attention", case, shape={"length": length}, flops=5e9, **fields)

    def product(kind: str, m: int, faster: float, **fields: object) -> dict[str, object]:
        us = {"us": spread(9.0), "host_us": 9.0}
        case = f"{kind} gate+up M={m}"
        row = speed_row("few_rows", case, ours=us, theirs=us, shape={"m": m, "n": 22016, "k": 4096})
        return {**row, "peer": "cuBLAS bf16", "ratio": spread(1 / faster), **fields}

    rows = [
        attention("sweep forward D128 causal B16 H16 S1024", 1024, 10.0, cuDNN=20.0),
        attention("sweep forward D128 causal B32 H16 S512", 512, 5.0, cuDNN=4.0),
        attention("sweep backward D64 full B32 H16 S512", 512, 50.0, cuDNN=25.0),
        attention("forward D128 causal B4 H32 S4096", 4096, 1.0, cuDNN=1.0),
    ]
    store_rows(tmp_path / "gpu" / "attention.jsonl", rows)
    assert plots.sweep_points(tmp_path) == [
        [
            "forward D128 causal H16\nA GPU",
            [[512, "cuDNN", 1250.0], [512, "onegpu", 1000.0], [1024, "cuDNN", 250.0], [1024, "onegpu", 500.0]],
        ],
        ["backward D64 full H16\nA GPU", [[512, "cuDNN", 200.0], [512, "onegpu", 100.0]]],
    ]
    assert (
        "sweep" not in (table := tables.render("attention", tmp_path))
        and "| forward D128 causal B4 H32 S4096 |" in table
    )
    table = tables.render("attention-sweep", tmp_path)
    assert "| forward D128 causal B16 H16 S1024 | 500 | 250 | – | – | 0.50 (0.45–0.55) | 87% |" in table
    assert table.endswith("images/attention_sweep.svg)\n") and "S4096" not in table
    store_rows(tmp_path / "gpu" / "few_rows.jsonl", [product("nf4", m, 2.0) for m in (1, 2, 4, 8)])
    assert plots.few_rows_points(tmp_path) == [] and ".svg" not in tables.render("few-rows", tmp_path)
    more = [product("int8", 16, 0.5), product("fp4", 16, 1.0), product("nested", 17, 1.0, peer="nf4")]
    store_rows(tmp_path / "gpu" / "few_rows.jsonl", more)
    lines = [[m, "nf4", 2.0] for m in (1, 2, 4, 8)] + [[16, "int8", 0.5]]
    assert plots.few_rows_points(tmp_path) == [["gate+up, 22016 x 4096\nA GPU", lines]]
    assert (table := tables.render("few-rows", tmp_path)).endswith("images/few_rows.svg)\n")
    nf4 = "9.0 (0.50) | 9.0 (0.50) | 9.0 (0.50) | 9.0 (0.50) | –"  # and no column for what nobody measured
    assert f"| nf4 gate+up | {nf4} |" in table and "| int8 gate+up | – | – | – | – | 9.0 (2.00) |" in table
    assert "Peer: cuBLAS bf16, nf4." in table
    pytest.importorskip("matplotlib")
    names = plots.stale(tmp_path, tmp_path)
    assert len(names) == 2 and plots.draw_all(names, tmp_path, tmp_path) and plots.stale(tmp_path, tmp_path) == []


def test_the_fused_steps_rows_make_two_tables_and_a_plot(tmp_path: Path):
    work = [{"what": "norm, head", "launches": 1, "us": 90.0, "share": 0.9}]
    fields = {"work": work, "idle_us": 5.0, "launches": 2, "ours": {"us": spread(95.0)}}
    rows = [
        speed_row("fused_step", "nf4, batch 1, cache 512", ours={"us": spread(2066.0), "host_us": 900.0},
                  theirs={"us": spread(3876.0)}),
        speed_row("fused_step", "nf4 budget of one step", **fields),
    ]  # fmt: skip
    store_rows(tmp_path / "nvidia-h100" / "fused_step.jsonl", rows[:1])
    assert "| nf4, batch 1, cache 512 | 2066.0 | 3876.0 |" in tables.render("fused-step", tmp_path)
    assert tables.render("fused-budget", tmp_path) == tables._NONE
    store_rows(tmp_path / "nvidia-h100" / "fused_step.jsonl", rows)
    assert "budget" not in tables.render("fused-step", tmp_path)
    assert "| nf4 | norm, head | 1 | 90 | 90% |" in (made := tables.render("fused-budget", tmp_path))
    assert "images/fused_step.svg" in made
    assert plots.fused_points(tmp_path) == [["nf4\nA GPU", [["norm, head", 90.0], ["nothing runs", 5.0]]]]


def test_what_stands_beside_the_speed_of_a_model(tmp_path: Path):
    first = {"optimize_s": 0.5, "first_use_s": 2.5, "compile_s": 2.0, "capture_s": 0.1}
    rows = [
        {"case": "Llama bf16 decode, batch 1", "same_tokens": 2, "compared_tokens": 33,
         "ours": {"host_us": {"greedy": 11.6, "eos": 24.9}, "launch_us": 6.0},
         "first_difference": {"gap": 0.0156, "own_noise": 0.031, "rank": 1}},
        {"case": "Llama nf4 decode, batch 1", "ours": {}, "first_difference": None},
        {"case": "Llama bf16 first use", "ours": {"empty": first, "filled": {**first, "first_use_s": 0.25}}},
    ]  # fmt: skip
    store_rows(tmp_path / "gpu" / "model.jsonl", [{"benchmark": "model", "environment": WHERE, **row} for row in rows])
    host, use, ties = (tables.render(f"model-{name}", tmp_path) for name in ("host", "first-use", "ties"))
    assert "| Llama bf16, batch 1 | 12 | 25 | 6 |" in host and "nf4" not in host
    assert "| Llama bf16, no kernel on disk | 0.50 | 2.50 | 2.00 | 0.10 |" in use
    assert "| Llama bf16, kernels on disk | 0.50 | 0.25 | 2.00 | 0.10 |" in use
    assert "| Llama bf16, batch 1 | 2 of 33 | 0.016 | 0.031 | 2 |" in ties and "nf4" not in ties


def test_without_a_run_there_is_no_claim(tmp_path: Path):
    for name in tables.TABLES:
        assert tables.render(name, tmp_path) == "*No run is stored yet.*\n"


def test_an_unknown_table_is_an_error(tmp_path: Path):
    with pytest.raises(ValueError, match="table:nosuch is unknown"):
        tables.fill("<!-- table:nosuch -->\n<!-- /table -->", tmp_path)


def test_a_plot_of_other_numbers_is_found(tmp_path: Path):
    images = tmp_path / "images"
    assert plots.stale(tmp_path, images) == []
    store_rows(tmp_path / "cpu" / "perplexity.jsonl", [perplexity_row("nf4", 10.0, 10.0)])
    assert plots.stale(tmp_path, images) == ["docs/images/perplexity.svg"]
    pytest.importorskip("matplotlib")
    assert plots.draw_all(["docs/images/perplexity.svg"], tmp_path, images)
    assert plots.stale(tmp_path, images) == []
    first = (images / "perplexity.svg").read_bytes()
    plots.draw_all(["docs/images/perplexity.svg"], tmp_path, images)
    assert (images / "perplexity.svg").read_bytes() == first
    store_rows(tmp_path / "cpu" / "perplexity.jsonl", [perplexity_row("nf4", 10.1, 10.0)])
    assert plots.stale(tmp_path, images) == ["docs/images/perplexity.svg"]
