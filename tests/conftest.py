"""Settings for every test: no network, no fight over the cores, fresh seeds, and a reason for each skipped GPU test."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from tests.oracle import Oracle, oracle

# Before huggingface_hub is imported. A test that needs the network is wrong: it fails at once, not after retries.
os.environ["HF_HUB_OFFLINE"] = "1"
if "PYTEST_XDIST_WORKER" in os.environ:
    # One thread a worker, in its subprocesses too: two workers with two threads each on two cores are slower than this.
    os.environ.setdefault("OMP_NUM_THREADS", "1")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    # Not `"gpu" in item.keywords`: the names of the folders above are keywords too.
    gpu_items = [item for item in items if item.get_closest_marker("gpu")]
    if not gpu_items:
        return
    import torch

    if not torch.cuda.is_available():
        skip = pytest.mark.skip(reason=f"needs a CUDA device; torch {torch.__version__} sees none")
        for item in gpu_items:
            item.add_marker(skip)


@pytest.fixture(autouse=True)
def _seeded() -> None:
    """The same random numbers whichever tests ran before, in tests that use torch at all."""
    if (torch := sys.modules.get("torch")) is not None:
        torch.manual_seed(0)


@pytest.fixture
def poisoned_empty() -> Iterator[None]:
    """Where `torch.empty` will be filled with NaN, so that an element that a kernel never writes shows in its result.

    It poisons nothing yet: it comes with the first kernel that allocates its own output.
    """
    yield


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> str:
    """Every device a definition or a kernel runs on: "cpu", and "cuda" where there is one."""
    name: str = request.param
    return name


@pytest.fixture(scope="session")
def bitsandbytes() -> Oracle:
    """bitsandbytes in its own process; the test is skipped where it is not installed."""
    if find_spec("bitsandbytes") is None:
        pytest.skip("bitsandbytes is not installed here: nothing to compare with")
    return oracle()


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """``tiny("llama", **overrides)``: a tiny checkpoint of that type, made once a session. Copy it to change it."""
    made: dict[tuple[Any, ...], Path] = {}

    def make(model_type: str, **overrides: Any) -> Path:
        from tests.tiny import tiny_model_dir

        key = (model_type, *sorted(overrides.items()))
        if key not in made:
            made[key] = tiny_model_dir(tmp_path_factory.mktemp(model_type), model_type, **overrides)
        return made[key]

    return make
