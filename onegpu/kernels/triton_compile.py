"""Triton's compiler called for machine code alone, which is kept on disk with that of NVRTC (`disk_cache.py`).

`triton.compile` has a cache of its own, and reads and hashes all of Triton for it, half a gigabyte, before anything
else. Here the size and the time of those files tell one build from another, and a kernel that is on disk is there
before Triton's compiler is asked anything. Compiling needs no GPU.
"""

from __future__ import annotations

import contextlib
import inspect
import json
import os
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from types import BuiltinFunctionType, CodeType, FunctionType, ModuleType
from typing import Any, NamedTuple

import torch

from onegpu.errors import KernelError
from onegpu.kernels import disk_cache, driver

INT32 = range(-(1 << 31), 1 << 31)
_CONSTANT = "constexpr"
# What a launch must know of the machine code, by the names that Triton has for it.
_NUMBERS = (
    "num_warps", "num_ctas", "shared", "global_scratch_size", "launch_pdl", "launch_cooperative_grid",
    "tensordesc_meta",
)  # fmt: skip
# What a Triton of another interface raises where this one is expected: then its own `compile` serves.
_OTHER = (AttributeError, ImportError, KeyError, OSError, TypeError, ValueError)


class Form(NamedTuple):
    """What is compiled: Triton's source with types, constants and hints; its target; its options."""

    source: Any
    target: Any
    options: dict[str, Any]


class Compiled(NamedTuple):
    """Machine code, the name of the kernel in it, and numbers for its launches by Triton's names."""

    code: bytes
    name: str
    numbers: dict[str, Any]


def form(
    function: Any, capability: int, args: tuple[Any, ...], constants: dict[str, Any], op: str
) -> tuple[Form, list[tuple[int, str]]]:  # fmt: skip
    """What is compiled for such arguments of a ``@triton.jit`` or ``@gluon.jit`` function.

    Args:
        capability: of the device, such as 90. args, constants: as `triton_launch` takes them. op: for errors.

    Returns:
        The form, and which of the arguments the kernel takes at run time: (index, type).
    """
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, make_backend

    source_kind: Any = ASTSource
    if function.is_gluon():
        from triton.experimental.gluon._runtime import GluonASTSource

        source_kind = GluonASTSource
    runtime = [p for p in function.params if not p.is_constexpr]
    if len(args) != len(runtime):
        names = ", ".join(p.name for p in runtime)
        raise KernelError(f"{op} takes {len(runtime)} run-time arguments ({names}), got {len(args)}")
    options = dict(constants)
    signature, fixed, hints = {}, {}, {}
    kept: list[tuple[int, str]] = []
    given = iter(enumerate(args))
    for parameter in function.params:
        if parameter.is_constexpr:
            if parameter.name not in options and not parameter.has_default:
                raise KernelError(f"{op}: the constant {parameter.name} is missing")
            fixed[(parameter.num,)] = options.pop(parameter.name, parameter.default)
            signature[parameter.name] = _CONSTANT
            continue
        index, arg = next(given)
        kind, value, divisible = _specialized(arg, not parameter.do_not_specialize, parameter.annotation_type)
        signature[parameter.name] = kind
        if kind == _CONSTANT:
            fixed[(parameter.num,)] = value
            continue
        kept.append((index, kind))
        if divisible:
            hints[(parameter.num,)] = [["tt.divisibility", 16]]
    target = GPUTarget("cuda", capability, 32)
    known = vars(make_backend(target).parse_options(dict(options)))
    if not options.keys() <= known.keys():
        raise KernelError(f"{op} has no constant or option {', '.join(options.keys() - known.keys())}")
    return Form(source_kind(function, signature, fixed, hints), target, options), kept


def cached(what: Form, turn: Any = None) -> Compiled:
    """The machine code, from the cache on disk where it has the entry.

    turn: a lock to hold while this is Python.
    """
    with turn or contextlib.nullcontext():
        key = _key(what)

    def make() -> tuple[str, bytes]:
        made = compiled(what, turn)
        return json.dumps([made.name, made.numbers]), made.code

    line, code = make() if key is None else disk_cache.cached(key, make)
    return Compiled(code, *json.loads(line))


def compiled(what: Form, turn: Any = None) -> Compiled:
    """The machine code, without our cache, and without Triton's unless only its own `compile` serves."""
    with turn or contextlib.nullcontext():
        begun = None if _watched() else _begun(what)
    if begun is None:
        made = by_triton(what)
        return Compiled(made.kernel, made.metadata.name, _numbers(made.metadata._asdict()))
    stages, module, metadata = begun
    for stage in stages:  # not Python: MLIR, LLVM and ptxas
        module = stage(module, metadata)
    return Compiled(module, metadata["name"], _numbers(metadata))


def by_triton(what: Form) -> Any:
    """Triton's own compiled kernel, with the texts of all stages, and by its own cache."""
    from triton.compiler import compile

    return compile(what.source, target=what.target, options=what.options)


def _numbers(metadata: dict[str, Any]) -> dict[str, Any]:
    found = {name: metadata.get(name) for name in _NUMBERS}
    return found | {"tensordesc_meta": [dict(one) for one in found["tensordesc_meta"] or ()]}


def _begun(what: Form) -> tuple[list[Any], Any, dict[str, Any]] | None:
    """The stages behind Triton's front end, what they begin with, and what they add to; None: Triton has others.

    As `triton.compiler.compile` calls them, in Triton 3.6 and 3.7.
    """
    from triton.compiler import make_backend

    source, target, options = what
    try:
        from triton._C.libtriton import ir

        backend = make_backend(target)
        parsed = backend.parse_options(dict(options, **source.parse_options()))
        stages: dict[str, Any] = {}
        backend.add_stages(stages, parsed, source.language)
        names = list(stages)
        first = names.index(source.ext)
        context = ir.context()
        ir.load_dialects(context)
        backend.load_dialects(context)
        functions, modules = backend.get_codegen_implementation(parsed), backend.get_module_map()
        metadata = {"target": target, **vars(parsed)}
    except _OTHER:
        return None
    if names[-1] != "cubin":
        return None
    module = source.make_ir(target, parsed, functions, modules, context)
    return list(stages.values())[first:], module, metadata


def _watched() -> bool:
    """Whether somebody looks into Triton's compiler, or changes it, by tools that only `triton.compile` has."""
    from triton import knobs

    compilation = knobs.compilation
    names = ("always_compile", "dump_ir", "override", "use_ir_loc", "listener", "allow_non_constexpr_globals")
    stages = getattr(knobs.runtime, "add_stages_inspection_hook", None)
    return stages is not None or any(getattr(compilation, name, None) for name in names)


def _key(what: Form) -> tuple[object, ...] | None:
    """All that decides the machine code; None where it cannot be told, and nothing is kept."""
    import triton

    if _watched():
        return None
    source = what.source
    try:
        from triton._C.libtriton import get_cache_invalidating_env_vars

        backend = triton.compiler.make_backend(what.target)
        constants = sorted((place, _text(value)) for place, value in source.constants.items())
        sources, named = _sources(source.fn)
        # What only its address tells from others is something else in the next process; a function's name is no source.
        values = repr((constants, named))
        if " at 0x" in values or "JITFunction(" in values or getattr(backend, "instrumentation", None) is not None:
            return None
        return (
            "triton", triton.__version__, _build(), list(_settings()), driver.driver_version(), what.target,
            sorted(get_cache_invalidating_env_vars().items()),
            sorted(vars(backend.parse_options(dict(what.options))).items()),
            source.language, sources, named, list(source.signature.items()), sorted(source.attrs.items()), constants,
        )  # fmt: skip
    except _OTHER:
        return None


def _sources(function: Any) -> tuple[list[Any], list[Any]]:
    """The source of a function and of all that it calls, and the values that those name: globals, closures, defaults.

    Triton's `cache_key` lacks some of these values, and is another one if what it calls was asked for its own before.
    """
    from triton.runtime.jit import JITCallable

    sources, named, seen = [], [], set()
    queue: list[tuple[str, Any]] = [("", function)]
    for name, value in queue:
        jitted = isinstance(value, JITCallable)
        plain: Any = value.fn if jitted else value
        if getattr(plain, "__triton_aggregate__", False):
            queue += [(name, method) for method in plain.hash_attrs]
        elif not isinstance(plain, (type, ModuleType, FunctionType, BuiltinFunctionType)):
            named.append((name, _text(plain)))
        elif isinstance(plain, FunctionType) and plain not in seen and not plain.__module__.startswith("triton."):
            seen.add(plain)
            told = (value.raw_src, value.starting_line_number) if jitted else inspect.getsourcelines(plain)
            sources.append((name, *told))
            queue += _named(plain)
    return sources, named


def _named(function: FunctionType) -> Iterator[tuple[str, Any]]:
    """What the code of a function may look up outside of it."""
    codes = [function.__code__]
    for code in codes:
        codes += [constant for constant in code.co_consts if isinstance(constant, CodeType)]
    names = dict.fromkeys(name for code in codes for name in code.co_names)
    cells = zip(function.__code__.co_freevars, function.__closure__ or (), strict=True)
    scope = function.__globals__ | {name: cell.cell_contents for name, cell in cells}
    for name in filter(scope.__contains__, (*names, *function.__code__.co_freevars)):
        value = scope[name]
        yield name, value
        if isinstance(value, ModuleType) and not value.__name__.startswith("triton."):
            yield from ((f"{name}.{field}", getattr(value, field)) for field in names if hasattr(value, field))
    yield from (("", value) for value in (function.__defaults__ or ()))
    yield from (function.__kwdefaults__ or {}).items()


def _text(value: Any) -> Any:
    """A constant as the same text in every process."""
    if hasattr(value, "cache_key"):  # a function
        return _sources(value)
    if isinstance(value, (tuple, list)):
        return type(value).__name__, [_text(one) for one in value]
    return type(value).__qualname__, repr(value)


@lru_cache(maxsize=1)
def _build() -> list[tuple[str, int, int]]:
    """What tells one build of Triton from another: its files, their sizes and times."""
    import triton
    from triton._C import libtriton

    root = Path(triton.__file__).parent
    found = [Path(libtriton.__file__)]
    for part in ("compiler", "language", "backends/nvidia", "experimental/gluon"):
        for folder, _, names in os.walk(root / part):
            found += [Path(folder, name) for name in names if name.endswith((".py", ".bc"))]
    return [_stamp(path) for path in sorted(found)]


def _stamp(path: Path) -> tuple[str, int, int]:
    told = path.stat()
    return str(path), told.st_size, told.st_mtime_ns


def _settings() -> Iterator[object]:
    """Triton's switches, and the ptxas that it runs."""
    from triton import knobs

    for group in (knobs.compilation, knobs.language, knobs.nvidia):
        for name, knob in group.knob_descriptors.items():
            if not hasattr(knob, "default_path"):
                yield name, getattr(group, name)
                continue
            # Asking for a program runs it, to see whether it does: its file tells as much, and the default stands in.
            chosen = vars(group).get(name) or knobs.getenv(knob.key)
            yield name, [_stamp(path) for path in map(Path, filter(None, (chosen, knob.default_path))) if path.exists()]


def _specialized(arg: Any, specialize: bool, annotated: str) -> tuple[str, Any, bool]:
    """Triton's type of an argument, its value where it is a constant, and whether it is known to be divisible by 16."""
    if arg is None:
        return _CONSTANT, None, False
    if isinstance(arg, bool):
        return annotated or "u1", None, False
    if isinstance(arg, int):
        narrow = arg in INT32
        if specialize and arg == 1 and not annotated:
            return _CONSTANT, 1, False
        return annotated or ("i32" if narrow else "i64"), None, specialize and narrow and arg % 16 == 0
    if isinstance(arg, float):
        return annotated or "fp32", None, False
    from triton.runtime.jit import mangle_type

    return mangle_type(arg), None, isinstance(arg, torch.Tensor) and arg.data_ptr() % 16 == 0
