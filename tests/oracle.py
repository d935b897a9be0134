"""bitsandbytes as the oracle, in a process of its own that never imports onegpu.

Importing it takes seconds, so one process serves all tests of a session: it runs Python snippets one after the other,
each in fresh globals. Tensors travel by file, read with ``weights_only``.
"""

from __future__ import annotations

import atexit
import functools
import json
import os
import subprocess
import sys
import tempfile
import textwrap
from pathlib import Path
from typing import Any


class OracleError(AssertionError):
    """The snippet failed in the other process; the message has its traceback."""


class Oracle:
    """A process with ``torch`` and ``bitsandbytes`` (as ``bnb``) imported."""

    def __init__(self) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="oracle-")
        self._errors = open(Path(self._folder.name, "stderr"), "w+")  # noqa: SIM115  (lives as long as the process)
        # bitsandbytes compiles its CPU definitions anew for every shape; uncompiled they give the same numbers.
        environment = {**os.environ, "TORCHDYNAMO_DISABLE": "1"}
        self._process = subprocess.Popen(
            [sys.executable, "-P" if sys.version_info >= (3, 11) else "-s", __file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
            env=environment,
            cwd=self._folder.name,
        )
        self._calls = 0

    def run(self, snippet: str, **inputs: Any) -> Any:
        """Run ``snippet`` there and return what it assigned to ``result``.

        Args:
            snippet: Python source; indentation is taken off. It sees ``torch``, ``bnb`` and the inputs by name.
            inputs: whatever ``torch.load(weights_only=True)`` reads: tensors, numbers, strings, dtypes, lists, dicts.
        """
        import torch

        self._calls += 1
        request = Path(self._folder.name, f"{self._calls}.in")
        reply = request.with_suffix(".out")
        torch.save({"snippet": textwrap.dedent(snippet), "inputs": inputs}, request)
        assert self._process.stdin is not None and self._process.stdout is not None
        try:
            self._process.stdin.write(f"{json.dumps([str(request), str(reply)])}\n")
            self._process.stdin.flush()
            error = json.loads(self._process.stdout.readline())
        except (BrokenPipeError, json.JSONDecodeError):
            self._errors.seek(0)
            raise OracleError(f"the process of bitsandbytes ended:\n{self._errors.read()[-4000:]}") from None
        if error is not None:
            raise OracleError(error)
        result = torch.load(reply, weights_only=True)
        request.unlink()
        reply.unlink()
        return result

    def close(self) -> None:
        """End the process and remove its files."""
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.close()
        self._process.stdout.close()
        self._process.wait(timeout=30)
        self._errors.close()
        self._folder.cleanup()


@functools.cache
def oracle() -> Oracle:
    """The oracle of this session, started on first use."""
    instance = Oracle()
    atexit.register(instance.close)
    return instance


def _serve() -> None:
    """The other side: one line of JSON a request, one a reply (null, or a traceback)."""
    import traceback

    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # bitsandbytes and friends print; only replies go to the pipe
    import bitsandbytes as bnb
    import torch

    for line in sys.stdin:
        request, reply = json.loads(line)
        error = None
        try:
            message = torch.load(request, weights_only=True)
            names = {"torch": torch, "bnb": bnb, **message["inputs"]}
            exec(compile(message["snippet"], "<snippet>", "exec"), names)
            torch.save(names["result"], reply)
            if ours := [name for name in sys.modules if name.split(".")[0] == "onegpu"]:
                raise ImportError(f"the oracle must not import onegpu, but it did: {ours}")
        except BaseException:
            error = traceback.format_exc()
        replies.write(f"{json.dumps(error)}\n")
        replies.flush()


if __name__ == "__main__":
    _serve()
