"""What a benchmark case is: a name, how to build its inputs, what it costs, and which tests must be green first.

A file of ``benchmarks/cases/`` has a function ``cases()`` that yields `Case` objects, for ``python -m benchmarks.run``.
Nothing is imported or allocated before a case runs: ``cases()`` is also called to list names.
"""

from __future__ import annotations

import hashlib
import importlib
import pkgutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from benchmarks.environment import ROOT

Call = Callable[[], Any]


@dataclass
class Sides:
    """Ours and the peers, ready to be timed.

    Attributes:
        ours, peers: calls without arguments, each on other weights (see `Context.copies`): a replay runs all of them,
            so that none finds its weights in the cache. The first peer is the one that the ratio is to.
        bytes, flops: of one call of ours, from the op's ``cost``; for the share of the roofline.
        peer_bytes: of one call of the first peer, where it moves others than ours.
        shape: what the row says about sizes.
    """

    ours: list[Call]
    peers: dict[str, list[Call]]
    bytes: int
    flops: int
    peer_bytes: int | None = None
    shape: dict[str, Any] = field(default_factory=dict)


@dataclass
class Context:
    """What a case is told: where it runs, how small, and until when.

    Attributes:
        device: "cuda" or "cpu". tiny: sizes of a dry run, whose numbers mean nothing.
        seconds: device time that the case may take.
        ceilings: as `ceilings.measure` gives them, in bytes/s and FLOP/s.
        kept: what cases of one `Case.group` share, such as a model; emptied between groups.
    """

    device: str
    tiny: bool = False
    seconds: float = 3.0
    ceilings: dict[str, float] = field(default_factory=dict)
    kept: dict[str, Any] = field(default_factory=dict)

    def copies(self, bytes_each: int, most: int = 64) -> int:
        """How many different weights of this size a replay must go through: 4 x L2 in all, and at least two."""
        if self.device != "cuda":
            return 2
        import torch

        cache: int = torch.cuda.get_device_properties(torch.cuda.current_device()).L2_cache_size
        return max(2, min(most, -(-4 * cache // max(bytes_each, 1))))


@dataclass(frozen=True)
class Case:
    """One row.

    Attributes:
        benchmark: the results file it goes to, such as "linear".
        name: unique in that file, such as "nf4 qkv M=1".
        prepare: builds both sides.
        measure: instead of `prepare`, for what is no op: returns the row's fields itself.
        sources: files and folders of the repository; while their text is the same, a stored row stays valid.
        tests: pytest node ids (a prefix before ``[`` is enough) that must pass in the same run, or nothing is timed.
        bound: most that the ratio ours / first peer may be; None: shown, not judged. goal: what it should be.
        ceiling: "read" or "copy", whichever the bytes of `Sides` are like.
        compute: "bf16" or "int8", whichever the operations are.
        seconds: device time that it usually takes, for ``--budget``.
        group: cases of one group run one after the other and share `Context.kept`.
    """

    benchmark: str
    name: str
    prepare: Callable[[Context], Sides] | None = None
    measure: Callable[[Context], dict[str, Any]] | None = None
    sources: tuple[str, ...] = ()
    tests: tuple[str, ...] = ()
    bound: float | None = None
    goal: float | None = None
    ceiling: str = "read"
    compute: str = "bf16"
    seconds: float = 3.0
    group: str = ""

    @property
    def full_name(self) -> str:
        """What ``--cases`` is compared with."""
        return f"{self.benchmark}/{self.name}"

    def digest(self) -> str:
        """Of the text of `sources` and of how timing is done: the row is valid while it stays the same.

        Raises:
            ValueError: a source does not exist.
        """
        total = hashlib.sha256()
        for source in sorted({*self.sources, "benchmarks/case.py", "benchmarks/timing.py"}):
            place = ROOT / source
            if not place.exists():
                raise ValueError(f"case {self.full_name!r} names {source} as its source, which does not exist")
            files = sorted(place.rglob("*")) if place.is_dir() else [place]
            for file in files:
                if file.is_file() and file.suffix in (".py", ".cu", ".json"):
                    total.update(f"{file.relative_to(ROOT).as_posix()}\n".encode() + file.read_bytes())
        return total.hexdigest()[:16]


def all_cases() -> Iterator[Case]:
    """Every case of every file in ``benchmarks/cases/``.

    Raises:
        ValueError: two have one name, or a case has neither or both of `prepare` and `measure`.
    """
    import benchmarks.cases

    seen = set()
    for info in sorted(pkgutil.iter_modules(benchmarks.cases.__path__), key=lambda info: info.name):
        for case in importlib.import_module(f"benchmarks.cases.{info.name}").cases():
            if case.full_name in seen:
                raise ValueError(f"case {case.full_name!r} is defined twice")
            if (case.prepare is None) == (case.measure is None):
                raise ValueError(f"case {case.full_name!r} needs prepare or measure, one of them")
            seen.add(case.full_name)
            yield case
