from __future__ import annotations

import time

import pytest
import torch

from onegpu.engine.streaming import TextPieces, TimedStreamer
from tests.tiny import tiny_model, tiny_tokenizer

TEXTS = ["Hello, world", "naïve café\n\n  two  spaces", "é", "", "ends in a space "]


@pytest.mark.parametrize("text", TEXTS)
def test_pieces_joined_are_the_text(text: str) -> None:
    tokenizer = tiny_tokenizer()
    pieces = TextPieces(tokenizer)
    out = [pieces.add([token]) for token in tokenizer(text)["input_ids"]]
    assert "\ufffd" not in "".join(out)  # half a character never shows
    assert "".join(out) + pieces.finish() == text


def test_text_that_stays_incomplete_comes_at_the_end() -> None:
    tokenizer = tiny_tokenizer()
    half = tokenizer("é")["input_ids"][:1]
    pieces = TextPieces(tokenizer)
    assert pieces.add(half) == "" and pieces.finish() == "\ufffd"


@pytest.mark.parametrize("size", [1, 2, 3, 50])
@pytest.mark.parametrize(
    ("text", "stop", "expected"),
    [
        ("one END two", ["END"], "one "),
        ("one EN two E", ["END"], "one EN two E"),
        ("aab", ["ab"], "a"),
        ("x\n\ny", ["\n\n", "y"], "x"),
        ("stop", ["stop"], ""),
        ("text", [""], "text"),
    ],
)
def test_stop_strings_never_show(text: str, stop: list[str], expected: str, size: int) -> None:
    tokenizer = tiny_tokenizer()
    ids = tokenizer(text)["input_ids"]
    pieces = TextPieces(tokenizer, stop)
    out = "".join(pieces.add(ids[start : start + size]) for start in range(0, len(ids), size)) + pieces.finish()
    assert out == expected


def test_timings_leave_the_first_token_out_of_the_rate() -> None:
    streamer = TimedStreamer(tiny_tokenizer())
    streamer.start()
    streamer.put(torch.tensor([[5, 6, 7]]))  # the prompt
    assert streamer.timings().time_to_first_token_s is None
    time.sleep(0.2)
    streamer.put(torch.tensor([8]))
    assert streamer.timings().decode_tokens_per_s is None
    for _ in range(4):
        time.sleep(0.02)
        streamer.put(torch.tensor([9]))
    streamer.end()
    timings = streamer.timings()
    assert timings.new_tokens == 5 and streamer.ids == [8, 9, 9, 9, 9]
    assert timings.time_to_first_token_s is not None and 0.2 <= timings.time_to_first_token_s < 1
    assert timings.decode_tokens_per_s is not None and 10 < timings.decode_tokens_per_s <= 50
    assert timings.total_s >= 0.28


@pytest.mark.parametrize("model_type", ["llama", "t5"])
def test_what_is_streamed_is_what_generate_returns(model_type: str) -> None:
    model, tokenizer, written = tiny_model(model_type), tiny_tokenizer(), []
    streamer = TimedStreamer(tokenizer, written.append)
    inputs = tokenizer("Hello", return_tensors="pt")
    out = model.generate(**inputs, max_new_tokens=20, do_sample=False, streamer=streamer)
    new = out[0, -20:]
    assert streamer.ids == new.tolist() and streamer.timings().new_tokens == 20
    assert "".join(written) == streamer.text == tokenizer.decode(new, skip_special_tokens=True)
