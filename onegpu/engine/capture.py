"""CUDA graphs: whether a function can be captured, and capturing it.

Whether it can is found out before a capture begins, by running it once under :class:`NoHostSync`: a capture that fails
half-way leaves torch's allocator in a bad state.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

_capturing = threading.Lock()

# Ops whose result the host waits for, or whose output's shape depends on values.
_SYNCHRONISING = frozenset(
    {
        "_local_scalar_dense",
        "is_nonzero",
        "equal",
        "nonzero",
        "masked_select",
        "unique_consecutive",
        "_unique",
        "_unique2",
        "unique_dim",
        "bincount",
        "argwhere",
    }
)


_MASKS = (torch.bool, torch.uint8)


class NotCapturableError(Exception):
    """A step has to run in Python each time. Never reaches the user: the step then does."""


class NoHostSync(TorchDispatchMode):
    """Inside, an op that waits for the device raises :class:`NotCapturableError`. For this thread only."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        kwargs = kwargs or {}
        waits = name in _SYNCHRONISING
        if name == "_to_copy":
            target = kwargs.get("device")
            waits = target is not None and torch.device(target).type != args[0].device.type
        elif name == "copy_":
            waits = args[0].device.type != args[1].device.type
        elif name in ("index", "index_put", "index_put_", "_index_put_impl_"):
            there = args[0].device
            waits = any(i is not None and (i.dtype in _MASKS or i.device != there) for i in args[1])
        elif name == "repeat_interleave":
            waits = kwargs.get("output_size") is None and func._overloadname == "Tensor"
        if waits:
            raise NotCapturableError(f"the model waits for the device in {name}")
        return func(*args, **kwargs)


class _Numbers(TorchFunctionMode):
    """Inside, what would copy a number from the host does without: ``torch.tensor(2.0, device="cuda")`` fills memory
    there, and ``x[..., [-2], :]`` (Falcon's keys) is ``x[..., -2:-1, :]``."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.Tensor.__getitem__:
            return func(args[0], _as_slices(args[1]))
        if func is torch.tensor and kwargs.get("device") is not None and torch.device(kwargs["device"]).type == "cuda":
            if not isinstance(args[0], (bool, int, float)):
                raise NotCapturableError("the model makes a tensor of a list")
            return torch.full((), args[0], **{name: kwargs[name] for name in ("device", "dtype") if name in kwargs})
        return func(*args, **kwargs)


def _as_slices(index: Any) -> Any:
    """An index whose only list holds one number, with a slice in its place: the same values, nothing to copy."""
    parts = index if isinstance(index, tuple) else (index,)
    lists = [part for part in parts if isinstance(part, list)]
    if len(lists) != 1 or not all(isinstance(part, (list, slice, type(None), type(...))) for part in parts):
        return index
    if len(lists[0]) != 1 or type(lists[0][0]) is not int:
        return index
    at = lists[0][0]
    return tuple(slice(at, at + 1 or None) if isinstance(part, list) else part for part in parts)


class Graph:
    """``run`` captured; calling it replays. Its memory comes from ``pool``."""

    def __init__(
        self,
        run: Callable[[], None],
        device: torch.device,
        pool: Any,
        generators: tuple[Any, ...] = (),
        warm: bool = False,
    ) -> None:
        """Captures ``run``.

        Args:
            generators: whose random numbers it draws. warm: run it once before, because nothing has yet; what it
                changes is changed then.

        Raises:
            NotCapturableError: CUDA refused.
        """
        current, stream = torch.cuda.current_stream(device), torch.cuda.Stream(device)
        stream.wait_stream(current)
        graph = torch.cuda.CUDAGraph()
        for generator in generators:
            graph.register_generator_state(generator)
        try:
            if warm:
                with torch.cuda.stream(stream), NoHostSync(), _Numbers():
                    run()  # compiles, loads and allocates (cuBLAS its workspace of this stream) what a capture must not
            with _capturing, torch.cuda.stream(stream), _Numbers():
                self._record(graph, run, device, pool, generators)
        finally:
            current.wait_stream(stream)
        self._graph, self._stream = graph, stream  # the stream's cuBLAS workspace lives as long as the graph

    @staticmethod
    def _record(
        graph: Any, run: Callable[[], None], device: torch.device, pool: Any, generators: tuple[Any, ...]
    ) -> None:
        # Not torch.cuda.graph(): it collects garbage and empties the allocator's cache, which takes longer than all
        # the rest, and forbids CUDA calls of other threads.
        graph.capture_begin(pool=pool, capture_error_mode="thread_local")
        try:
            run()
        except Exception as error:
            for end in (graph.capture_end, lambda: torch._C._cuda_endAllocateToPool(device.index, pool)):
                # The first fails on a broken capture before it comes to the second's part, which the allocator needs.
                with contextlib.suppress(RuntimeError):
                    end()
            release_generators((torch.cuda.default_generators[device.index], *generators))
            raise NotCapturableError(f"CUDA refused: {str(error).splitlines()[0]}") from error
        graph.capture_end()

    def __call__(self) -> None:
        """Replay on the current stream."""
        self._graph.replay()


def release_generators(generators: Iterable[torch.Generator]) -> None:
    """Let generators be used again that a capture took part in and did not come to its end.

    Each keeps its seed and its place, in a state object of its own: the old one stays marked as captured.
    """
    for generator in generators:
        fresh = torch.Generator(generator.device)
        fresh.set_state(generator.get_state())
        generator.graphsafe_set_state(fresh.graphsafe_get_state())


class Plain:
    """What :class:`Graph` is where nothing is captured: runs the function each time."""

    def __init__(self, run: Callable[[], None]) -> None:
        """Checks that ``run`` could be captured.

        Raises:
            NotCapturableError: it could not.
        """
        with NoHostSync(), _Numbers():
            run()
        self._run = run

    def __call__(self) -> None:
        """Run it."""
        self._run()
