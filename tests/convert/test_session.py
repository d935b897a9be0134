"""One load at a time, in its own context."""

from __future__ import annotations

import threading

import pytest
import transformers

from onegpu.convert.quantizer import QUANT_METHOD
from onegpu.convert.session import Session, current, loading
from onegpu.formats.bitsandbytes import Settings
from tests.damage import damaged


def session(name: str) -> Session:
    return Session(name, None, Settings("nf4"))


def test_sessions_nest_and_end():
    with loading(session("outer")) as outer:
        with loading(session("inner")):
            assert current().source == "inner"
        assert current() is outer
    with pytest.raises(RuntimeError, match="outside of its Auto classes"):
        current()


def test_a_session_ends_with_an_error():
    with pytest.raises(KeyError), loading(session("a")):
        raise KeyError
    with pytest.raises(RuntimeError):
        current()


def test_threads_do_not_see_each_others():
    seen = []

    def look() -> None:
        try:
            seen.append(current().source)
        except RuntimeError:
            seen.append(None)

    with loading(session("here")):
        thread = threading.Thread(target=look)
        thread.start()
        thread.join()
    assert seen == [None]


def test_our_mark_in_a_file_is_not_for_plain_transformers(tiny, tmp_path):
    folder = damaged(tiny("llama"), tmp_path, lambda tensors: None, quantization_config={"quant_method": QUANT_METHOD})
    with pytest.raises(RuntimeError, match="load it with onegpu"):
        transformers.AutoModelForCausalLM.from_pretrained(folder)
