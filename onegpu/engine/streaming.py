"""Text as it is made, and how fast it is made.

`TimedStreamer` is handed to `generate(streamer=…)`: it stamps each token with the time of its arrival and turns tokens
into text as soon as the text can no longer change.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

_INCOMPLETE = "\ufffd"  # what decoders write for the first bytes of a character whose last ones are still to come


@dataclass(frozen=True)
class Timings:
    """Speed of one answer.

    Attributes:
        new_tokens: tokens made.
        time_to_first_token_s: from the call to the first token; None if there was none.
        decode_tokens_per_s: the tokens after the first one, over the time after the first one; None for fewer than two.
        total_s: from the call to the last token or the end.
    """

    new_tokens: int
    time_to_first_token_s: float | None
    decode_tokens_per_s: float | None
    total_s: float


class TextPieces:
    """Tokens in, pieces of text out; the pieces joined are the decoded text, cut before the first stop string.

    A piece is held back while its last character is incomplete, or while it may be the beginning of a stop string.
    """

    def __init__(self, tokenizer: Any, stop: Sequence[str] = ()) -> None:
        self._tokenizer = tokenizer
        self._stop = [text for text in stop if text]
        self._ids: list[int] = []
        self._start = 0  # decoding begins here: far enough back for the tokenizer to place its spaces
        self._done = 0  # tokens before this one have been turned into text
        self._held = ""
        self._stopped = False

    @property
    def stopped(self) -> bool:
        """Whether a stop string was found: no more text will come."""
        return self._stopped

    def add(self, ids: Sequence[int]) -> str:
        """The text that became certain with these tokens, often "", never to be taken back."""
        self._ids.extend(ids)
        before, text = self._decode(self._start, self._done), self._decode(self._start, None)
        if text.endswith(_INCOMPLETE) or len(text) <= len(before):
            return ""
        self._start, self._done = self._done, len(self._ids)
        return self._release(text[len(before) :], last=False)

    def finish(self) -> str:
        """The rest of the text; after this the object is spent."""
        before, text = self._decode(self._start, self._done), self._decode(self._start, None)
        self._done = len(self._ids)
        return self._release(text[len(before) :], last=True)

    def _decode(self, start: int, end: int | None) -> str:
        text: str = self._tokenizer.decode(self._ids[start:end], skip_special_tokens=True)
        return text

    def _release(self, text: str, last: bool) -> str:
        if self._stopped:
            return ""
        text, self._held = self._held + text, ""
        places = [place for stop in self._stop if (place := text.find(stop)) >= 0]
        if places:
            self._stopped = True
            return text[: min(places)]
        if last:
            return text
        keep = max((_overlap(text, stop) for stop in self._stop), default=0)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]


class TimedStreamer:
    """A streamer for `generate` that measures, and passes text on as it becomes certain.

    Args:
        tokenizer: decodes the new tokens.
        write: called with each piece of new text; None only measures and collects.
        stop: stop strings; the text ends before the first one.

    Attributes:
        ids: the new tokens so far; what an interrupted answer leaves is here.
        text: the new text so far.
    """

    def __init__(self, tokenizer: Any, write: Callable[[str], None] | None = None, stop: Sequence[str] = ()) -> None:
        self.ids: list[int] = []
        self.text = ""
        self._pieces = TextPieces(tokenizer, stop)
        self._write = write
        self._started = time.perf_counter()
        self._arrivals: list[float] = []
        self._prompt_seen = False

    def start(self) -> None:
        """Begins the time to the first token here instead of at the object's making."""
        self._started = time.perf_counter()

    def put(self, value: Any) -> None:
        """Takes a tensor of token ids, [1, n] or [n]; the first call brings the prompt, which is not text of ours."""
        if not self._prompt_seen:
            self._prompt_seen = True
            return
        ids = [int(token) for token in value.reshape(-1).tolist()]
        now = time.perf_counter()
        self._arrivals.extend(now for _ in ids)
        self.ids.extend(ids)
        self._emit(self._pieces.add(ids))

    def end(self) -> None:
        """The answer is complete: passes on what was held back."""
        self._emit(self._pieces.finish())

    def stopping_criterion(self, input_ids: Any, scores: Any, **_: Any) -> Any:
        """For `generate(stopping_criteria=[…])`: a bool tensor [batch], true once a stop string was found.

        transformers' own `stop_strings` look at the vocabulary instead of the text: slow to set up for a large one, and
        an error for a string that no token contains.
        """
        import torch

        return torch.full((input_ids.shape[0],), self._pieces.stopped, dtype=torch.bool, device=input_ids.device)

    def timings(self) -> Timings:
        """What was measured so far."""
        arrivals = self._arrivals
        first = arrivals[0] - self._started if arrivals else None
        rate = None
        # Several tokens may come at once (assisted decoding): those of the first arrival cost no decoding time.
        later = sum(1 for arrival in arrivals if arrival > arrivals[0])
        if later:
            rate = later / (arrivals[-1] - arrivals[0])
        total = (arrivals[-1] if arrivals else time.perf_counter()) - self._started
        return Timings(len(self.ids), first, rate, total)

    def _emit(self, piece: str) -> None:
        self.text += piece
        if piece and self._write is not None:
            self._write(piece)


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that is a beginning of `stop`."""
    for length in range(min(len(text), len(stop) - 1), 0, -1):
        if text.endswith(stop[:length]):
            return length
    return 0
