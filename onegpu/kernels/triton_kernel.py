"""Triton and Gluon kernels, compiled by Triton and launched by us: use `onegpu.kernels.launch.triton_launch`.

Triton's own launch binds, specialises and hashes all arguments in Python, and builds a launcher with the C compiler of
the machine; here a tuple of what matters is the key, and the driver is called directly. Compiling needs no GPU.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import torch

from onegpu.errors import KernelError
from onegpu.kernels import ahead, driver, triton_compile
from onegpu.kernels.guard import current_device, not_on_cuda, other_device, raw_stream, refuse_capture
from onegpu.kernels.tensor_map import encode
from onegpu.kernels.triton_compile import INT32

_KIND = {
    "i8": "b", "i16": "h", "i32": "i", "i64": "q", "u1": "B", "i1": "B", "u8": "B", "u16": "H", "u32": "I", "u64": "Q",
    "fp16": "e", "fp32": "f", "fp64": "d",
}  # fmt: skip
_TF32 = 11  # CU_TENSOR_MAP_DATA_TYPE_TFLOAT32
# Held, by threads that compile ahead, while a kernel's key is made and while Triton's front end runs: that is Python,
# and where many threads want its lock, the program's own thread gets a turn of microseconds for each of milliseconds of
# theirs. That thread itself does not wait for a turn.
_TURN = threading.Lock()


_TENSORS: set[type] = {torch.Tensor, torch.nn.Parameter}  # and subclasses that were met: isinstance is slow for those


def _is_tensor(arg: Any) -> bool:
    """Whether an argument is a tensor, else it is a descriptor of one."""
    found = isinstance(arg, torch.Tensor)
    if found:
        _TENSORS.add(type(arg))
    return found


class _Made:
    """One compiled form: how its arguments are written, and the kernel."""

    def __init__(self, compiled: triton_compile.Compiled, kept: list[tuple[int, str]], op: str) -> None:
        self.kept = kept
        code, name, numbers = compiled
        self.descriptors: list[dict[str, Any]] = numbers["tensordesc_meta"]
        kinds = ""
        for _, kind in kept:
            if kind.startswith("tensordesc"):
                rank = kind[kind.index("[") : kind.index("]")].count(",") + 1
                kinds += "T" + "i" * rank + "q" * rank
            else:
                kinds += "P" if kind.startswith("*") else _KIND[kind]
        if len(self.descriptors) != sum(kind.startswith("tensordesc") for _, kind in kept):
            raise KernelError(f"{op}: descriptors that Triton takes apart are not served; this is for TMA")
        self.plain = "T" not in kinds
        self.packer = driver.Packer(kinds + "PP")  # the two scratch memories come last
        self.kernel = driver.LoadedKernel(code, name, op)
        self.threads = (32 * numbers["num_warps"], 1, 1)
        self.shared, self.ctas = numbers["shared"], numbers["num_ctas"]
        self.scratch = numbers["global_scratch_size"] or 0
        pdl, cooperative = bool(numbers["launch_pdl"]), bool(numbers["launch_cooperative_grid"])
        self.cooperative, self.pdl = cooperative, pdl
        self.attributes = driver.attributes(pdl, cooperative, (self.ctas, 1, 1), spread=True)
        self.indices = [index for index, _ in kept]

    def values(self, args: tuple[Any, ...], addresses: list[Any]) -> list[Any]:
        """What is written for the arguments that were not compiled in."""
        if self.plain:
            return [addresses[index] for index in self.indices]
        written: list[Any] = []
        meta = iter(self.descriptors)
        for index, kind in self.kept:
            written += _descriptor(args[index], next(meta)) if kind.startswith("tensordesc") else [addresses[index]]
        return written


def _descriptor(given: Any, meta: dict[str, Any]) -> list[Any]:
    """A descriptor object of Triton's as the kernel takes it: the map, shape and strides."""
    return [encode(given.base.data_ptr(), *_map_of(given, meta)), *given.shape, *given.strides]


def _map_of(given: Any, meta: dict[str, Any]) -> tuple[Any, ...]:
    """What `encode` takes behind the address."""
    # Triton's numbers for dtypes are the driver's, but for these three.
    kind = {8: 10, 9: 8, 10: 9}.get(meta["elem_type"], meta["elem_type"])
    if getattr(given, "round_f32_to_tf32", False):
        kind = _TF32
    shape, strides, box = tuple(given.shape), tuple(given.strides), tuple(meta["block_size"])
    return kind, meta["elem_size"], shape, strides, box, meta["swizzle"], given.padding == "nan"


Bound = Callable[..., None]  # called with its tensors, in the order of the arguments


class TritonKernel:
    """All compiled forms of one ``@triton.jit`` or ``@gluon.jit`` function."""

    def __init__(self, function: Any) -> None:
        self.function = function
        self.op = getattr(function, "__name__", "kernel").strip("_")
        # The interpreter's functions have no parameters to look at and are called as they are.
        self._interpreted = not hasattr(function, "params")
        self._parameters: list[Any] = getattr(function, "params", [])
        self._runtime = [p for p in self._parameters if not p.is_constexpr]
        self._specialize = [not p.do_not_specialize for p in self._runtime]
        self._made: dict[tuple[Any, ...], _Made] = {}
        self._begun: dict[tuple[Any, ...], Future[Any]] = {}  # compiled, or under way, and not loaded yet

    def __call__(self, grid: tuple[int, ...], args: tuple[Any, ...], constants: dict[str, Any]) -> None:
        if self._interpreted:
            self.function[grid](*args, **constants)
            return
        device, key, addresses = self._key(args, constants)
        if device != current_device():
            with torch.cuda.device(device):
                return self(grid, args, constants)
        made = self._made.get(key)
        if made is None:
            if self._noted(key, device, args, constants):
                return
            made = self._make(key, device, args, constants)
        sizes = (*grid, 1, 1)[:3]
        if 0 in sizes:
            return
        values = made.values(args, addresses)
        scratch = 0
        if made.scratch:  # of this call alone: the allocator keeps it until the stream is done with it
            blocks = sizes[0] * sizes[1] * sizes[2] * made.ctas
            memory = torch.empty(blocks * made.scratch, dtype=torch.int8, device=torch.device("cuda", device))
            scratch = memory.data_ptr()
        values += (scratch, 0)
        stream = raw_stream(device)
        if made.ctas > 1:
            sizes = (sizes[0] * made.ctas, sizes[1], sizes[2])
        made.packer.launch(made.kernel, sizes, made.threads, made.shared, stream, made.attributes, values, device)

    def _key(self, args: tuple[Any, ...], constants: dict[str, Any]) -> tuple[int, tuple[Any, ...], list[Any]]:
        """The device, what decides the compiled form, and the arguments with addresses for tensors."""
        key: list[Any] = []
        addresses: list[Any] = []
        device, unaligned, bit = None, 0, 1
        for arg, specialize in zip(args, self._specialize, strict=False):
            kind = type(arg)
            if kind is int:
                # do_not_specialize: one code for every length, but for those beyond 32 bits
                key.append(4 if arg not in INT32 else 3 if not specialize else 2 if arg == 1 else arg & 15 == 0)
            elif kind is float or kind is bool or arg is None:
                key.append(kind)
            else:
                base = arg
                if kind in _TENSORS or _is_tensor(arg):
                    key.append(arg.dtype)
                else:
                    base = arg.base
                    key.append((base.dtype, *arg.block_shape, getattr(arg, "layout", None)))
                where = base.get_device()
                if where != device:
                    if device is not None:
                        raise other_device(self.op, base, device)
                    device = where
                arg = base.data_ptr()
                if arg & 15:
                    unaligned |= bit
                bit += bit
            addresses.append(arg)
        if device is None or device < 0:
            raise not_on_cuda(self.op)
        return device, (*key, device, unaligned, *constants.values(), *constants), addresses

    def bind(
        self, grid: tuple[int, ...], args: tuple[Any, ...], constants: dict[str, Any], cluster: int, shared: int = 0
    ) -> Bound:
        """A launch of which only the addresses are open, see `onegpu.kernels.launch.triton_bind`."""
        # tensors, and descriptors, for which their tensors are given
        tensors = [index for index, arg in enumerate(args) if isinstance(arg, torch.Tensor) or hasattr(arg, "base")]
        if self._interpreted:

            def call(*given: torch.Tensor) -> None:
                filled = dict(zip(tensors, given, strict=True))
                self.function[grid](*(filled.get(index, arg) for index, arg in enumerate(args)), **constants)

            return call
        device, key, _ = self._key(args, constants)
        if key not in self._made and self._noted(key, device, args, constants):
            return _nothing
        with torch.cuda.device(device):
            made = self._made.get(key) or self._make(key, device, args, constants)
            if cluster > 8:
                made.kernel.allow_large_cluster(device)
            shared = max(shared, made.shared)
            made.kernel.allow_shared(shared, device)
        if made.scratch or made.ctas > 1:
            raise KernelError(f"{self.op}: Triton's scratch and its clusters cannot be bound")
        attributes = driver.attributes(made.pdl, made.cooperative, (cluster, 1, 1), spread=True)
        sizes = (*grid, 1, 1)[:3]
        values: list[Any] = []
        place_of: dict[int, tuple[int, dict[int, bytes] | None, tuple[Any, ...]]] = {}
        meta = iter(made.descriptors)
        for index, kind in made.kept:
            if kind.startswith("tensordesc"):  # the maps of addresses that were met, and what else makes one
                one = next(meta)
                place_of[index] = len(values), {}, _map_of(args[index], one)
                values += _descriptor(args[index], one)
            else:
                place_of[index] = len(values), None, ()
                values.append(0 if index in tensors else args[index])  # the examples are not kept alive
        # A tensor that the code does not read has no place among them: it goes to the end, which is taken off again.
        places = [place_of.get(index, (-1, None, ())) for index in tensors]
        values += (0, 0, 0)
        kernel, threads, launch_packed = made.kernel, made.threads, made.packer.launch

        def launch(*given: torch.Tensor) -> None:
            if device != current_device():
                with torch.cuda.device(device):
                    return launch(*given)
            if 0 in sizes:
                return None
            filled = values.copy()
            for (place, maps, rest), tensor in zip(places, given, strict=True):
                if tensor.get_device() != device:
                    raise other_device(self.op, tensor, device)
                address: Any = tensor.data_ptr()
                if maps is None:
                    filled[place] = address
                    continue
                found = maps.get(address)
                if found is None:
                    if len(maps) >= 256:
                        maps.clear()
                    found = maps[address] = encode(address, *rest)
                filled[place] = found
            filled.pop()
            launch_packed(kernel, sizes, threads, shared, raw_stream(device), attributes, filled, device)
            return None

        return launch

    def _noted(self, key: tuple[Any, ...], device: int, args: tuple[Any, ...], constants: dict[str, Any]) -> bool:
        """Whether compiling is left to `ahead.start`."""

        def begin(pool: ThreadPoolExecutor) -> Future[Any] | None:
            if key in self._made or key in self._begun:
                return None
            self._begun[key] = begun = pool.submit(self._cached, _capability(device), args, constants, _TURN)
            return begun

        return ahead.note(begin)

    def _make(self, key: tuple[Any, ...], device: int, args: tuple[Any, ...], constants: dict[str, Any]) -> _Made:
        refuse_capture(self.op)
        with ahead.waiting(), driver.LOCK:
            if key in self._made:
                return self._made[key]
            begun = self._begun.pop(key, None)
            compiled, kept = self._cached(_capability(device), args, constants) if begun is None else begun.result()
            made = _Made(compiled, kept, self.op)
            made.kernel.load(device)
            made.kernel.allow_shared(made.shared, device)
            if made.ctas > 8:
                made.kernel.allow_large_cluster(device)
            self._made[key] = made
            return made

    def compile(
        self, capability: int, args: tuple[Any, ...], constants: dict[str, Any]
    ) -> tuple[Any, list[tuple[int, str]]]:
        """Triton's own compiled kernel for such arguments, and which of them it takes at run time: (index, type)."""
        form, kept = triton_compile.form(self.function, capability, args, constants, self.op)
        return triton_compile.by_triton(form), kept

    def _cached(
        self, capability: int, args: tuple[Any, ...], constants: dict[str, Any], turn: Any = None
    ) -> tuple[triton_compile.Compiled, list[tuple[int, str]]]:
        """As `compile`, the machine code alone, from disk where it is. turn: see `triton_compile.cached`."""
        form, kept = triton_compile.form(self.function, capability, args, constants, self.op)
        return triton_compile.cached(form, turn), kept


def _capability(device: int) -> int:
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


def _nothing(*_: torch.Tensor) -> None:
    """The launch of a kernel that is not compiled, while those are collected."""
