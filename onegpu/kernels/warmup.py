"""`onegpu.warmup`: compile and load what a model's ops need before the first token, or before a CUDA graph is captured.

An op registers, under a name, a function that runs it once for a number of rows; a module says in `warmup_shapes` which
ops it calls with which sizes. Equal sizes are run once.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeVar

import torch

from onegpu.errors import bad_argument
from onegpu.kernels import ahead
from onegpu.kernels.guard import refuse_capture

_Function = TypeVar("_Function", bound=Callable[..., None])
_REGISTRY: dict[str, Callable[..., None]] = {}
Shape = tuple[str, dict[str, Any]]
_TELLERS: list[Callable[[torch.nn.Module], list[Shape]]] = []


def register(kind: str) -> Callable[[_Function], _Function]:
    """Decorates the warm-up of an op: ``f(device, dtype, rows, **shape)`` runs it once, on memory of its own."""

    def keep(function: _Function) -> _Function:
        _REGISTRY[kind] = function
        return function

    return keep


def tells(function: Callable[[torch.nn.Module], list[Shape]]) -> Callable[[torch.nn.Module], list[Shape]]:
    """Decorates what says for modules that are not ours which ops they call, none for most."""
    _TELLERS.append(function)
    return function


def warmup(
    model: torch.nn.Module | None = None,
    *,
    rows: Sequence[int] = (1,),
    shapes: Iterable[Shape] = (),
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
) -> dict[str, float]:
    """Compile and load the kernels of a model, each for each number of rows. On a CPU this finds nothing to do.

    Not needed for a right result: without it the first call of each kind compiles. What it is for: to have that time at
    a moment of your choosing, and to make a step capturable in a CUDA graph (nothing compiles during a capture).

    Args:
        model: its modules on GPUs are warmed; None warms only `shapes`.
        rows: numbers of rows (batch x tokens) that will be multiplied at once, such as ``(1, 16, 512)``.
        shapes: more ops, as ``(name, sizes)``, for instance ``("linear_4bit", {"n": 4096, "k": 4096})``.
        device: of `shapes`; the current GPU by default.
        dtype: of the activations; by default the model's, or float16 where it has no 16-bit tensor.

    Returns:
        Seconds: of compiling all at once, in threads; then by op, sizes and rows, in the order in which they ran.

    Raises:
        ArgumentError: model is no module, rows is not a number above 0, or an op is not known.
        KernelError: a kernel cannot be compiled, or a CUDA graph is being captured.
    """
    if model is not None and not isinstance(model, torch.nn.Module):
        raise bad_argument("model", model, "is no module", "Pass a model that is loaded, from_pretrained's result")
    runs = _runs(model, rows, shapes, device, dtype)
    start = time.perf_counter()
    for done in ahead.start(_jobs(runs)):
        done.result()
    seconds = {"compiling, in threads": time.perf_counter() - start} if runs else {}
    for name, place, run in runs:
        start = time.perf_counter()
        run()
        torch.cuda.synchronize(place)
        seconds[name] = time.perf_counter() - start
    return seconds


def begin(
    model: torch.nn.Module | None = None,
    *,
    rows: Sequence[int] = (1,),
    shapes: Iterable[Shape] = (),
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
) -> None:
    """Start to compile what `warmup` would, with the same arguments, in threads, and return at once.

    The first call of each kind then waits for what is still under way.
    """
    ahead.start(jobs(model, rows=rows, shapes=shapes, device=device, dtype=dtype))


def jobs(
    model: torch.nn.Module | None = None,
    *,
    rows: Sequence[int] = (1,),
    shapes: Iterable[Shape] = (),
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
) -> list[ahead.Job]:
    """What `begin` would hand to `ahead.start`."""
    return _jobs(_runs(model, rows, shapes, device, dtype))


_Run = tuple[str, torch.device, Callable[[], None]]


def _jobs(runs: list[_Run]) -> list[ahead.Job]:
    with ahead.collecting() as found:
        for _, _, run in runs:
            run()
    return found


def _runs(
    model: torch.nn.Module | None,
    rows: Sequence[int],
    shapes: Iterable[Shape],
    device: torch.device | str | None,
    dtype: torch.dtype | None,
) -> list[_Run]:
    """Name, device and function of each run."""
    for count in rows if isinstance(rows, Sequence) else (None,):
        if isinstance(count, bool) or not isinstance(count, int) or count < 1:
            raise bad_argument("rows", rows, "holds something else than numbers above 0", "Pass rows=(1, 16)")
    wanted: dict[tuple[Any, ...], Shape] = {}
    for kind, sizes, place, kept in [*_of_model(model, dtype), *_given(shapes, device, dtype)]:
        if kind not in _REGISTRY:
            known = ", ".join(sorted(_REGISTRY))
            raise bad_argument("shapes", kind, "names no op with a warm-up", f"Use one of {known}")
        if place.type == "cuda":
            wanted[(kind, place, kept, *sorted(sizes.items()))] = (kind, sizes)
    runs: list[_Run] = []
    for key, (kind, sizes) in wanted.items():
        place, kept = key[1], key[2]
        refuse_capture(kind)
        name = " ".join([kind, *(f"{size}={value}" for size, value in sizes.items()), str(kept), str(place)])
        for count in rows:

            def run(
                kind: str = kind, place: Any = place, kept: Any = kept, count: int = count, sizes: Any = sizes
            ) -> None:
                with torch.cuda.device(place), torch.no_grad():
                    _REGISTRY[kind](place, kept, count, **sizes)

            runs.append((f"{name}, {count} rows", place, run))
    return runs


def _of_model(
    model: torch.nn.Module | None, dtype: torch.dtype | None
) -> list[tuple[str, dict[str, Any], torch.device, torch.dtype]]:
    """Op, sizes, device and dtype of activations of every module that says what it needs."""
    if model is None:
        return []
    if dtype is None:
        floats = {t.dtype for t in model.parameters() if t.is_floating_point()}
        dtype = torch.bfloat16 if torch.bfloat16 in floats else torch.float16
    found = []
    for module in (*model.modules(), model.__dict__.get("generate")):
        holder = module if isinstance(module, torch.nn.Module) else model
        tell = getattr(module, "warmup_shapes", None)
        shapes = list(tell()) if tell is not None else []
        if holder is module:
            shapes += [shape for other in _TELLERS for shape in other(holder)]
        place = next((t.device for t in (*holder.parameters(), *holder.buffers())), None) if shapes else None
        if place is not None:
            found += [(kind, sizes, place, dtype) for kind, sizes in shapes]
    return found


def _given(
    shapes: Iterable[Shape], device: torch.device | str | None, dtype: torch.dtype | None
) -> list[tuple[str, dict[str, Any], torch.device, torch.dtype]]:
    place = torch.device(device or "cuda")
    if place.type == "cuda" and place.index is None and torch.cuda.is_available():
        place = torch.device("cuda", torch.cuda.current_device())
    return [(kind, sizes, place, dtype or torch.float16) for kind, sizes in shapes]
