"""`quantize_checkpoint` in child processes that are killed. A script: a fork of pytest is no place for it.

    python -m tests.quantize_process MODEL FOLDER SIGNAL COUNT SEED

COUNT times: start a run that takes its time, send SIGNAL at a random moment, look at what is there, run to the end, and
compare. The result is one JSON object on stdout.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import time
from pathlib import Path

SHARD = 6000  # bytes: some twenty shards of a tiny model
PAUSE = 0.004


def contents(folder: Path) -> dict[str, bytes]:
    """Every file below `folder`, by name."""
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def _slowly(function):
    def slow(*args, **kwargs):
        time.sleep(PAUSE)
        result = function(*args, **kwargs)
        time.sleep(PAUSE)
        return result

    return slow


def _fork(source: str, output: Path, slow: bool) -> int:
    """A child that quantises; with pauses before and after every step that changes what is on the disk."""
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        from onegpu.convert.quantize_checkpoint import quantize_checkpoint

        signal.signal(signal.SIGINT, signal.default_int_handler)
        if slow:
            for name in ("replace", "fsync", "unlink", "rmdir", "mkdir"):
                setattr(os, name, _slowly(getattr(os, name)))
        pause = (lambda *_: time.sleep(PAUSE)) if slow else None
        quantize_checkpoint(source, output, "nf4", double_quant=True, max_shard_size=SHARD, progress=pause)
        code = 0
    except KeyboardInterrupt:
        code = 130
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(code)


def _wait(pid: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def main(source: str, folder: Path, number: int, count: int, seed: int) -> dict[str, object]:
    """The runs; see the module."""
    import torch
    import transformers

    from onegpu.convert.quantize_checkpoint import quantize_checkpoint

    torch.set_num_threads(1)  # threads do not survive a fork
    transformers.logging.set_verbosity_error()
    quantize_checkpoint(source, folder / "first", "nf4")  # imports what the children would each import again
    whole = folder / "whole"
    start = time.perf_counter()
    assert _wait(_fork(source, whole, slow=True)) == 0
    seconds = time.perf_counter() - start
    expected = contents(whole)
    moments = random.Random(seed)
    seen: dict[str, object] = {"seconds": seconds, "shards": sum(n.endswith(".safetensors") for n in expected)}
    stages: dict[str, int] = {}
    for index in range(count):
        output = folder / str(index) / "whole"  # the model card has the folder's last name
        output.parent.mkdir()
        pid = _fork(source, output, slow=True)
        # One moment from each equal part of the run, the whole of which is thereby seen.
        time.sleep(seconds * (index + moments.random()) / count)
        os.kill(pid, number)
        code = _wait(pid)
        assert code in (0, 130, -number), code
        found = contents(output) if output.is_dir() else {}
        visible = {name: data for name, data in found.items() if not name.startswith(".onegpu-quantize")}
        wrong = [name for name, data in visible.items() if expected.get(name) != data]
        assert not wrong, f"half-written under their final names: {wrong}"
        unfinished = ".onegpu-quantize.json" in found
        assert "config.json" not in visible or visible == expected, "looks finished, and is not"
        done = sum(name.startswith(".onegpu-quantize/shard-") and not name.endswith(".tmp") for name in found)
        stage = "moving" if visible and unfinished else "finished" if visible else "some shards" if done else "no shard"
        stages[stage] = stages.get(stage, 0) + 1
        if visible != expected or unfinished:
            assert _wait(_fork(source, output, slow=False)) == 0, "the second run failed"
        assert contents(output) == expected, "differs from an uninterrupted run"
    return {**seen, "stages": stages}


if __name__ == "__main__":
    model, place, name, times, start_seed = sys.argv[1:]
    print(json.dumps(main(model, Path(place), getattr(signal, name), int(times), int(start_seed))))
