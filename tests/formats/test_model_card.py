"""The model card says what was done, keeps the licence, and has no path of this machine in it."""

from __future__ import annotations

from pathlib import Path

import yaml

from onegpu.formats.folder import Source
from onegpu.formats.model_card import model_card


def card(source: Source, to: str = "nf4") -> tuple[dict, str]:
    text = model_card(
        source, to=to, command="onegpu quantize model --to nf4 --output out", version="1.2.3",
        auto="AutoModelForCausalLM", rows=[("Format", to)], notes=["A note."],
    )  # fmt: skip
    _, head, body = text.split("---\n", 2)
    return yaml.safe_load(head), body


def test_a_model_of_the_hub(tmp_path: Path):
    (tmp_path / "README.md").write_text("---\nlicense: mit\nlanguage: [en]\nwidget: [x]\n---\n# Hello\n")
    head, body = card(Source(tmp_path, "owner/model", "0123abc", ()))
    assert head["license"] == "mit" and head["language"] == ["en"] and "widget" not in head
    assert (head["base_model"], head["base_model_relation"]) == ("owner/model", "quantized")
    assert head["tags"] == ["onegpu", "bitsandbytes", "4-bit"]
    for part in (
        "# model, 4-bit NF4",
        "onegpu 1.2.3",
        "onegpu quantize model",
        "| Format | nf4 |",
        "A note.",
        "AutoModelForCausalLM",
    ):
        assert part in body
    assert str(tmp_path) not in body


def test_a_folder_without_a_card_or_with_a_damaged_one(tmp_path: Path):
    head, body = card(Source(tmp_path, "model", None, ()), "int8")
    assert head == {"library_name": "transformers", "tags": ["onegpu", "bitsandbytes", "8-bit"]}
    assert "8-bit LLM.int8()" in body
    for text in ("---\n: [\n---\n", "---\n- a\n---\n", "\xff", "no head"):
        (tmp_path / "README.md").write_text(text, encoding="latin-1")
        assert card(Source(tmp_path, "model", None, ()), "int8")[0] == head
