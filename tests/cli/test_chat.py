from __future__ import annotations

import json
from pathlib import Path

import pytest

from onegpu.cli.chat import Conversation
from onegpu.cli.options import SamplingOptions
from onegpu.errors import ArgumentError
from tests.tiny import tiny_model, tiny_model_dir, tiny_tokenizer

GREEDY = ["--max-new-tokens", "8", "--greedy"]


@pytest.fixture
def conversation() -> Conversation:
    return Conversation(tiny_model("llama"), tiny_tokenizer(), SamplingOptions(8, do_sample=False))


def test_a_conversation(run, llama: Path, tmp_path: Path) -> None:
    file = tmp_path / "talk.json"
    lines = ["Hi", "", "More", f"/save {file}", "/reset", "/system Be kind", "Again", f"/save {file}", "/exit", "never"]
    result = run("chat", llama, *GREEDY, input="\n".join(lines))
    assert result.exit_code == 0, result.output
    saved = json.loads(file.read_text())
    assert saved["model"] == str(llama)
    assert [turn["role"] for turn in saved["messages"]] == ["system", "user", "assistant"]
    assert saved["messages"][0]["content"] == "Be kind" and saved["messages"][1]["content"] == "Again"
    assert result.stdout.count("\n") == 3 and "never" not in result.output  # three answers, one line each


def test_the_answer_depends_on_what_was_said_before(conversation: Conversation) -> None:
    first = conversation.reply("Hi", None).text
    second = conversation.reply("Hi", None).text
    assert [turn["content"] for turn in conversation.turns] == ["Hi", first, "Hi", second] and first != second
    conversation.turns.clear()
    assert conversation.reply("Hi", None).text == first


def test_the_end_of_input_ends_it(run, llama: Path) -> None:
    assert run("chat", llama, *GREEDY, input="Hi\n").exit_code == 0


def test_json_lines(run, llama: Path) -> None:
    result = run("chat", llama, *GREEDY, "--json", input="Hi\nMore\n/nonsense\n")
    first, second, error = (json.loads(line) for line in result.stdout.splitlines())
    assert first["tokens"]["new"] == 8 and second["tokens"]["prompt"] > first["tokens"]["prompt"]
    assert "/nonsense" in error["error"]["message"]


def test_mistakes_do_not_end_the_conversation(run, llama: Path, tmp_path: Path) -> None:
    (tmp_path / "there").write_text("mine")
    lines = [
        "/nonsense",
        "/save",
        f"/save {tmp_path}/no/such/file",
        f"/save {tmp_path}/there",
        "a" * 300,
        "/help",
        "Hi",
    ]
    result = run("chat", llama, *GREEDY, input="\n".join(lines))
    assert result.exit_code == 0 and result.stderr.count("error: ") == 5 and "Traceback" not in result.output
    assert "/reset" in result.stderr and (tmp_path / "there").read_text() == "mine"
    assert "8 tokens" in result.stderr


def test_ctrl_c_ends_the_answer_only(conversation: Conversation) -> None:
    shown: list[str] = []

    def write(piece: str) -> None:
        shown.append(piece)
        if len(shown) == 3:
            raise KeyboardInterrupt

    result = conversation.reply("Hi", write)
    assert result.interrupted and 3 <= result.timings.new_tokens < 8
    assert conversation.turns[-1]["content"] == result.text == "".join(shown)
    assert conversation.reply("More", None).interrupted is False


def test_ctrl_c_at_the_prompt_leaves(run, llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(prompt: str = "") -> str:
        raise KeyboardInterrupt

    monkeypatch.setattr("builtins.input", interrupted)
    assert run("chat", llama).exit_code == 130


def test_a_message_that_does_not_fit_is_forgotten(conversation: Conversation) -> None:
    with pytest.raises(ArgumentError, match="context of 256"):
        conversation.reply("a" * 300, None)
    assert conversation.turns == []


def test_a_model_without_a_template(run, tmp_path: Path) -> None:
    folder = tiny_model_dir(tmp_path, "llama")
    (folder / "chat_template.jinja").unlink()
    result = run("chat", folder)
    assert result.exit_code == 1 and "no chat template" in result.stderr
