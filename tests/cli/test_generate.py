from __future__ import annotations

import json
from pathlib import Path

import pytest
import transformers

from tests.tiny import CONTEXT, tiny_model_dir, tiny_tokenizer
from tests.tiny_gguf import write_tiny_gguf


def reference(folder: Path, prompt: str, tokens: int, **settings: object) -> str:
    """What plain transformers answers."""
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    inputs = tiny_tokenizer()(prompt, return_tensors="pt")
    out = model.generate(**inputs, max_new_tokens=tokens, do_sample=False, **settings)
    return tiny_tokenizer().decode(out[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


def error_of(result) -> str:
    assert result.exit_code == 1 and "Traceback" not in result.output
    assert result.stderr.count("error: ") == 1
    return result.stderr


# ---- answers


def test_text_goes_to_stdout_and_the_rest_to_stderr(run, llama: Path) -> None:
    result = run("generate", llama, "Hello", "--max-new-tokens", 12)
    assert result.exit_code == 0, result.output
    assert result.stdout == reference(llama, "Hello", 12) + "\n"
    assert "12 tokens" in result.stderr and "tokens/s" in result.stderr


@pytest.mark.parametrize("how", ["argument", "file", "stdin"])
def test_three_places_for_the_prompt(run, llama: Path, tmp_path: Path, how: str) -> None:
    file = tmp_path / "prompt.txt"
    file.write_text("Hello\nworld")
    arguments = {"argument": ["Hello\nworld"], "file": ["--file", file], "stdin": ["-"]}[how]
    result = run("generate", llama, *arguments, "--max-new-tokens", 6, input="Hello\nworld" if how == "stdin" else None)
    assert result.stdout == reference(llama, "Hello\nworld", 6) + "\n"


def test_json_is_one_object_and_nothing_else(run, llama: Path) -> None:
    result = run("generate", llama, "Hello", "--max-new-tokens", 12, "--json")
    facts = json.loads(result.stdout)
    assert facts["text"] == reference(llama, "Hello", 12)
    assert facts["tokens"] == {"prompt": 5, "new": 12}
    timings, memory = facts["timings"], facts["memory"]
    assert timings["load_s"] > 0 and 0 < timings["time_to_first_token_s"] < timings["total_s"]
    assert timings["decode_tokens_per_s"] > 0
    assert memory["kv_cache_bytes"] == 2 * 2 * 128 * 2 * 16 * 4  # layers, k and v, places set aside, heads, width, fp32
    assert sum(row["bytes"] for row in memory["weights"]) > 0 and memory["process_peak_bytes"] > 0


@pytest.mark.parametrize("flags", [["--load-in-4bit"], ["--load-in-4bit", "--quant-type", "nf4", "--double-quant"],
                                   ["--load-in-8bit"]])  # fmt: skip
def test_quantised(run, llama: Path, flags: list[str]) -> None:
    result = run("generate", llama, "Hello", "--max-new-tokens", 4, "--json", *flags)
    assert result.exit_code == 0, result.output
    formats = {row["format"] for row in json.loads(result.stdout)["memory"]["weights"]}
    expected = {1: "fp4", 4: "nf4 double"}[len(flags)] if "--load-in-4bit" in flags else "int8"
    assert expected in formats


def test_what_from_pretrained_is_asked_for(run, llama: Path, loads: list) -> None:
    run("generate", llama, "Hello", "--max-new-tokens", 1, "--dtype", "bfloat16", "--device-map", "cpu")
    run("generate", llama, "Hello", "--max-new-tokens", 1, "--load-in-4bit", "--quant-type", "nf4")
    assert loads == [
        (str(llama), {"dtype": "bfloat16", "device_map": "cpu"}),
        (str(llama), {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}),
    ]


def test_a_seed_repeats_a_sample(run, llama: Path) -> None:
    texts = [
        run("generate", llama, "Hi", "--temperature", 1.5, "--max-new-tokens", 16, "--seed", seed).stdout
        for seed in (1, 1, 2)
    ]
    assert texts[0] == texts[1] != texts[2]


@pytest.mark.parametrize("flags", [[], ["--num-beams", "2"]])
def test_stop_strings_do_not_show(run, llama: Path, flags: list[str]) -> None:
    common = ["generate", llama, "Hello", "--max-new-tokens", 40, "--json", *flags]
    text = json.loads(run(*common).stdout)["text"]
    stop = text[10:12]
    facts = json.loads(run(*common, "--stop", "日本", "--stop", stop).stdout)
    assert facts["text"] == text[: text.index(stop)]
    assert flags or facts["tokens"]["new"] < 40


def test_beams_are_not_streamed_but_answered(run, llama: Path) -> None:
    result = run("generate", llama, "Hello", "--max-new-tokens", 8, "--num-beams", 3)
    assert result.stdout == reference(llama, "Hello", 8, num_beams=3) + "\n"


def test_an_encoder_decoder(run, t5: Path) -> None:
    for flags in ([], ["--num-beams", "2"]):
        facts = json.loads(run("generate", t5, "Hello", "--max-new-tokens", 8, "--json", *flags).stdout)
        assert facts["tokens"] == {"prompt": 5, "new": 8} and facts["text"]


def test_chat_goes_through_the_template(run, llama: Path) -> None:
    result = run("generate", llama, "Hi", "--chat", "--max-new-tokens", 6)
    assert result.stdout == reference(llama, "[user] Hi\n[assistant] ", 6) + "\n"


def test_the_answer_ends_where_the_context_does(run, llama: Path) -> None:
    facts = json.loads(run("generate", llama, "a" * (CONTEXT - 5), "--json").stdout)
    assert facts["tokens"]["new"] == 5


def test_a_gguf_file(run, tmp_path: Path) -> None:
    pytest.importorskip("gguf", reason="the gguf package writes the file")
    file = write_tiny_gguf(tmp_path / "tiny.gguf")
    common = ["Hello", "--max-new-tokens", 4, "--cache-dir", tmp_path / "cache"]
    first = run("generate", file, *common)
    assert first.exit_code == 0 and "Converting tiny.gguf" in first.stderr, first.output
    again = run("generate", tmp_path, *common, "--gguf-file", "tiny.gguf", "--load-in-8bit")
    assert again.exit_code == 0 and "Converting" not in again.stderr, again.output


# ---- mistakes


@pytest.mark.parametrize("prompt", ["", "  \n"])
def test_empty_prompt(run, llama: Path, prompt: str) -> None:
    assert "is empty" in error_of(run("generate", llama, prompt))
    assert "is empty" in error_of(run("generate", llama, "-", input=prompt))


def test_no_prompt_or_two(run, llama: Path, tmp_path: Path) -> None:
    assert "prompt=None is missing" in error_of(run("generate", llama))
    assert "exclude each other" in error_of(run("generate", llama, "a", "--file", tmp_path / "b"))


def test_a_prompt_file_that_cannot_be_read(run, llama: Path, tmp_path: Path) -> None:
    assert "No such file" in error_of(run("generate", llama, "--file", tmp_path / "none.txt"))
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    assert "not UTF-8" in error_of(run("generate", llama, "--file", tmp_path / "binary"))


def test_a_prompt_longer_than_the_context_is_refused_before_loading(run, llama: Path, loads: list) -> None:
    message = error_of(run("generate", llama, "a" * 300))
    assert "300 tokens" in message and "context of 256 tokens" in message and "255" in message
    message = error_of(run("generate", llama, "a" * 200, "--max-new-tokens", 100))
    assert "max_new_tokens=100" in message and "at most 56" in message
    assert loads == []


def test_models_that_are_none(run, tmp_path: Path) -> None:
    assert "does not exist" in error_of(run("generate", tmp_path / "nowhere", "a"))
    assert "does not exist" in error_of(run("generate", tmp_path / "nowhere.gguf", "a"))
    (tmp_path / "empty").mkdir()
    assert "config.json" in error_of(run("generate", tmp_path / "empty", "a"))
    (tmp_path / "bad.gguf").write_bytes(b"GGML" + bytes(100))
    assert "not a GGUF file" in error_of(run("generate", tmp_path / "bad.gguf", "a"))
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "config.json").write_text("{")
    error_of(run("generate", tmp_path / "bad", "a"))


def test_pickled_weights(run, tmp_path: Path) -> None:
    folder = tiny_model_dir(tmp_path, "llama")
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    assert "pickle" in error_of(run("generate", folder, "a"))


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--load-in-4bit", "--load-in-8bit"], "exclude each other"),
        (["--quant-type", "nf4"], "Add --load-in-4bit"),
        (["--device-map", "cuda:99"], "cuda:99"),
        (["--device-map", "99"], "99"),
        (["--max-memory", "99=1GB"], "99"),
        (["--max-memory", "cpu"], "DEVICE=SIZE"),
        (["--top-p", "0.5", "--greedy"], "has no effect"),
    ],
)
def test_options_that_cannot_work(run, llama: Path, loads: list, flags: list[str], message: str) -> None:
    assert message in error_of(run("generate", llama, "a", *flags))
    assert loads == []


def test_no_chat_template(run, tmp_path: Path) -> None:
    folder = tiny_model_dir(tmp_path, "llama")
    (folder / "chat_template.jinja").unlink()
    assert "has none" in error_of(run("generate", folder, "Hi", "--chat"))


def test_errors_as_json(run, llama: Path) -> None:
    result = run("generate", llama, "a" * 300, "--json")
    assert result.exit_code == 1
    assert json.loads(result.stdout)["error"]["type"] == "ArgumentError"


def test_interrupted_while_loading(run, llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(prepared: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("onegpu.cli.loading.load", stop)
    result = run("generate", llama, "a")
    assert result.exit_code == 130 and "Traceback" not in result.output


def test_code_in_a_checkpoint_is_not_run(run, llama: Path, tmp_path: Path) -> None:
    import shutil

    folder, mark = tmp_path / "trap", tmp_path / "ran"
    shutil.copytree(llama, folder)
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "trap", "auto_map": {"AutoConfig": "trap.Config", "AutoModelForCausalLM": "trap.Model"}}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "trap.py").write_text(f"open({str(mark)!r}, 'w')\n")
    result = run("generate", folder, "a", input="")
    assert result.exit_code == 1 and not mark.exists(), result.output
