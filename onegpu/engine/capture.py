"""CUDA graphs: whether a function can be captured, and capturing it.

Whether it can is found out before a capture begins, by running it once under :class:`NoHostSync`: a capture that fails
half-way leaves torch's allocator in a bad state.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import torch
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
            waits = target is not None and torch.device(target).type == "cpu" != args[0].device.type
        elif name == "copy_":
            waits = args[0].device.type == "cpu" != args[1].device.type
        elif name in ("index", "index_put", "index_put_", "_index_put_impl_"):
            waits = any(i is not None and i.dtype in (torch.bool, torch.uint8) for i in args[1])
        elif name == "repeat_interleave":
            waits = kwargs.get("output_size") is None and func._overloadname == "Tensor"
        if waits:
            raise NotCapturableError(f"the model waits for the device in {name}")
        return func(*args, **kwargs)


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
                with torch.cuda.stream(stream), NoHostSync():
                    run()  # compiles, loads and allocates (cuBLAS its workspace of this stream) what a capture must not
            with _capturing, torch.cuda.stream(stream):
                self._record(graph, run, pool)
        finally:
            current.wait_stream(stream)
        self._graph, self._stream = graph, stream  # the stream's cuBLAS workspace lives as long as the graph

    @staticmethod
    def _record(graph: Any, run: Callable[[], None], pool: Any) -> None:
        # Not torch.cuda.graph(): it collects garbage and empties the allocator's cache, which takes longer than all
        # the rest, and forbids CUDA calls of other threads.
        graph.capture_begin(pool=pool, capture_error_mode="thread_local")
        try:
            run()
        except Exception as error:
            try:
                graph.capture_end()
            except RuntimeError as second:
                raise NotCapturableError(f"capturing failed: {error} ({second})") from error
            raise NotCapturableError(f"capturing failed: {error}") from error
        graph.capture_end()

    def __call__(self) -> None:
        """Replay on the current stream."""
        self._graph.replay()


class Plain:
    """What :class:`Graph` is where nothing is captured: runs the function each time."""

    def __init__(self, run: Callable[[], None]) -> None:
        """Checks that ``run`` could be captured.

        Raises:
            NotCapturableError: it could not.
        """
        with NoHostSync():
            run()
        self._run = run

    def __call__(self) -> None:
        """Run it."""
        self._run()
