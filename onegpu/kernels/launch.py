"""How every op launches its kernels: `CudaKernel` for CUDA C++, `triton_launch` for Triton and Gluon.

Both keep what they made, by device, architecture, source and constants, and launch through `onegpu.kernels.driver`, so
that a call costs a few microseconds of host time. What they see to, so that no op has to:

- the device of the tensors is the current one during the launch, and the stream is torch's current stream there;
- nothing compiles or loads while a CUDA graph is captured: that is an error which names the op;
- scratch memory is allocated per call, never kept, and TMA descriptors are passed by value.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from functools import lru_cache, partial
from typing import Any

import torch

from onegpu.errors import KernelError
from onegpu.kernels import ahead, driver, nvrtc
from onegpu.kernels.guard import architecture, current_device, not_on_cuda, other_device, raw_stream, refuse_capture
from onegpu.kernels.tensor_map import tensor_map
from onegpu.kernels.triton_kernel import Bound, TritonKernel

__all__ = ["CudaKernel", "compile_together", "tensor_map", "triton_bind", "triton_launch"]

Grid = tuple[int, ...]  # one to three sizes


class CudaKernel:
    """A kernel in CUDA C++, compiled when it is first launched on an architecture.

    Args:
        op: the op that it belongs to, for error messages.
        source: CUDA C++, or the name of a ``.cu`` file beside the op (package data of ``onegpu.kernels``).
        name: of the kernel; of a template, an instantiation: ``"rows<4, true>"``.
        arguments: one letter each, in order: ``P`` tensor or None, ``i`` int32, ``q`` int64, ``I``/``Q`` unsigned,
            ``f`` float, ``d`` double, ``B`` bool, ``T`` TMA descriptor (`tensor_map`); compared with the compiled
            kernel when it is loaded.
        constants: macros.
        options: compiler options, see `nvrtc.compile_cubin`.
    """

    def __init__(
        self,
        op: str,
        source: str,
        name: str,
        arguments: str,
        constants: Mapping[str, object] | None = None,
        options: tuple[str, ...] = (),
    ) -> None:
        self.op, self.name, self.arguments = op, name, arguments
        self._source, self._constants, self._options = source, dict(constants or {}), options
        self._tensors = [kind == "P" for kind in arguments]
        self._first = arguments.index("P")
        self._loaded: dict[str, driver.LoadedKernel] = {}  # by architecture
        self._begun: dict[str, Future[nvrtc.Cubin]] = {}  # by architecture: compiled, or under way, and not loaded yet
        self._ready: dict[int, driver.LoadedKernel] = {}  # by device
        self._packer: driver.Packer | None = None
        self._variants: dict[tuple[Any, ...], CudaKernel] = {}

    def variant(self, name: str | None = None, **constants: object) -> CudaKernel:
        """The same source with another instantiation or other constants; kept, so that asking again costs a look-up."""
        key = (name, *constants.items())
        found = self._variants.get(key)
        if found is None:
            merged = {**self._constants, **constants}
            found = CudaKernel(self.op, self._source, name or self.name, self.arguments, merged, self._options)
            self._variants[key] = found
        return found

    def __call__(
        self,
        grid: Grid,
        block: int,
        shared: int,
        *args: Any,
        pdl: bool = False,
        cooperative: bool = False,
        cluster: tuple[int, int, int] = (1, 1, 1),
    ) -> None:
        """Launch on the device of the first tensor, on torch's current stream there.

        Args:
            grid: blocks, one to three sizes; with a zero among them nothing is launched.
            block: threads a block.
            shared: bytes of dynamic shared memory a block.
            args: as the constructor's `arguments`; tensors are CUDA tensors of one device, or None.
            pdl: programmatic dependent launch: the kernel may start before the one in front of it has ended, and must
                wait for it itself (``griddepcontrol.wait``).
        """
        first = args[self._first]
        if first is None:
            first = next(
                arg for arg, is_tensor in zip(args, self._tensors, strict=False) if is_tensor and arg is not None
            )
        device = first.get_device()
        if device != current_device():
            if device < 0:
                raise not_on_cuda(self.op)
            with torch.cuda.device(device):
                return self(grid, block, shared, *args, pdl=pdl, cooperative=cooperative, cluster=cluster)
        kernel = self._ready.get(device)
        if kernel is None:
            if ahead.note(partial(self.compile_ahead, architecture(device))):
                return None
            kernel = self.load(device)
        if 0 in grid:
            return None
        if len(args) != len(self._tensors):
            raise KernelError(f"{self.op}: {self.name} takes {len(self._tensors)} arguments, got {len(args)}")
        values = []
        for is_tensor, arg in zip(self._tensors, args, strict=True):
            if is_tensor:
                if arg is None:
                    arg = 0
                elif arg.get_device() != device:
                    raise other_device(self.op, arg, device)
                else:
                    arg = arg.data_ptr()
            values.append(arg)
        if shared > 49152:
            kernel.allow_shared(shared, device)
        attributes = driver.attributes(pdl, cooperative, cluster)
        stream = raw_stream(device)
        sizes = (*grid, 1, 1)[:3]
        assert self._packer is not None
        self._packer.launch(kernel, sizes, (block, 1, 1), shared, stream, attributes, values, device)
        return None

    def load(self, device: int) -> driver.LoadedKernel:
        """Compile for a device and put the code there, unless it is. Raises KernelError during graph capture."""
        refuse_capture(self.op)
        with ahead.waiting(), driver.LOCK:
            if device in self._ready:
                return self._ready[device]
            arch = architecture(device)
            kernel = self._loaded.get(arch)
            if kernel is None:
                begun = self._begun.pop(arch, None)
                made = self._cubin(arch) if begun is None else begun.result()
                kernel = driver.LoadedKernel(made.code, made.name, self.op)
                check_parameters(kernel, self.arguments)
                self._loaded[arch] = kernel
            with torch.cuda.device(device):
                kernel.load(device)
            self._packer = self._packer or driver.Packer(self.arguments)
            self._ready[device] = kernel
            return kernel

    def _cubin(self, arch: str) -> nvrtc.Cubin:
        text = source_text(self._source)
        return nvrtc.cached_cubin(text, self.name, arch, self._constants, self._options, self.op)

    def compile_ahead(self, arch: str, pool: ThreadPoolExecutor) -> Future[nvrtc.Cubin] | None:
        """Compile in a thread what `load` will need; None: that is done, or under way."""
        if arch in self._loaded or arch in self._begun:
            return None
        nvrtc.compiler_version()  # imports, here and not in the thread
        self._begun[arch] = begun = pool.submit(self._cubin, arch)
        return begun

    def compile(self, arch: str) -> nvrtc.Cubin:
        """The machine code for an architecture such as ``"sm_90a"``; needs no GPU and uses no cache."""
        text = source_text(self._source)
        return nvrtc.compile_cubin(text, self.name, arch, self._constants, self._options, self.op)


def compile_together(kernels: Iterable[CudaKernel], device: int) -> None:
    """Compile kernels for a device in threads, and wait. Raises the first KernelError."""
    arch = architecture(device)
    with ahead.waiting():
        for done in ahead.start(partial(kernel.compile_ahead, arch) for kernel in kernels):
            done.result()


def triton_launch(kernel: Any, grid: Grid, *args: Any, **constants: Any) -> None:
    """Launch a Triton or Gluon kernel on the device of its first tensor, on torch's current stream there.

    Args:
        kernel: the ``@triton.jit`` or ``@gluon.jit`` function.
        grid: one to three sizes; with a zero among them nothing is launched.
        args: all run-time arguments, in the order of the signature (without the constexprs): CUDA tensors of one device
            or None, numbers, TMA descriptor objects.
        constants: constexprs by name, and compile options (num_warps, num_stages, launch_pdl, maxnreg, …).

    As in Triton, an integer that is 1 or a multiple of 16 and a pointer that is a multiple of 16 get code of their own,
    unless the kernel's ``do_not_specialize`` names them; None and 1 become constants.
    """
    _triton(kernel)(grid, args, constants)


def triton_bind(kernel: Any, grid: Grid, *args: Any, cluster: int = 1, shared: int = 0, **constants: Any) -> Bound:
    """Settle a launch once, for an op that keeps it by all that decides it: shapes, strides, alignment, options.

    Args:
        kernel, grid, args, constants: as of `triton_launch`; the tensors are examples.
        cluster: so many blocks in a row run at once and may use ``barrier.cluster`` (compute capability 9.0 and up).
        shared: bytes of shared memory a block at least, so that fewer fit beside one another.

    Returns:
        The launch: called with its tensors alone, alike in dtype, device and 16-byte alignment, without the Nones.
    """
    return _triton(kernel).bind(grid, args, constants, cluster, shared)


def _triton(kernel: Any) -> TritonKernel:
    found = _TRITON.get(id(kernel))
    if found is None:
        found = _TRITON[id(kernel)] = TritonKernel(kernel)
    return found


_TRITON: dict[int, TritonKernel] = {}  # a TritonKernel keeps its function alive, so that no id comes twice


@lru_cache(maxsize=64)
def source_text(source: str) -> str:
    """The source itself, or what is in the package's ``.cu`` file of that name."""
    if not source.endswith(".cu"):
        return source
    from importlib.resources import files

    return files("onegpu.kernels").joinpath(source).read_text(encoding="utf-8")


def check_parameters(kernel: driver.LoadedKernel, arguments: str) -> None:
    """The kernel, as compiled, takes what the launcher will write."""
    expected, found = [driver.KINDS[kind][1] for kind in arguments], kernel.parameter_bytes()
    if expected != found:
        raise KernelError(
            f"{kernel.op}: {kernel.name} takes parameters of {found} bytes, its launcher passes {expected}"
        )
