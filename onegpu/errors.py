"""The errors a user can meet, in one place.

Each one says what was wrong, with which value, and what to do about it. `OneGPUError` catches them all; each is also
the built-in error (`ValueError`, `MemoryError`, `RuntimeError`) that existing scripts already catch. The command line
prints them without a traceback. Anything else that escapes the package is a bug.
"""

from __future__ import annotations

import os
import reprlib
from functools import partial


class OneGPUError(Exception):
    """Base of every error that onegpu raises on purpose."""


class ArgumentError(OneGPUError, ValueError):
    """An argument has a value that cannot work. Made by `bad_argument`, so that all of them read alike."""


class CheckpointError(OneGPUError, ValueError):
    """A file on disk is not what its name or its metadata says.

    Args:
        file: the file (or folder) that was read.
        tensor: the tensor in it that is wrong; None when the file as a whole is.
        reason: what was found, and what was expected.
        fix: what the user can do.

    All four are kept as attributes of the same names.
    """

    def __init__(
        self, *, file: str | os.PathLike[str], tensor: str | None = None, reason: str, fix: str | None = None
    ) -> None:
        self.file = os.fspath(file)
        self.tensor = tensor
        self.reason = reason
        self.fix = fix
        where = self.file if tensor is None else f"{self.file}: tensor {tensor!r}"
        super().__init__(_sentences(f"{where}: {reason}", fix))

    def __reduce__(self) -> tuple[object, ...]:
        # The default rebuilds with positional arguments, which this constructor does not take.
        return partial(type(self), file=self.file, tensor=self.tensor, reason=self.reason, fix=self.fix), ()


class MemoryBudgetError(OneGPUError, MemoryError):
    """The model, or one layer of it, does not fit in the memory allowed. The message says by how many bytes."""


class KernelError(OneGPUError, RuntimeError):
    """A GPU kernel cannot be compiled, loaded or launched. The message names the op and the reason that was given."""


class SamplingError(OneGPUError, RuntimeError):
    """Scores that no token can be sampled from, where `torch.multinomial` raises a `RuntimeError`."""


def bad_argument(name: str, value: object, why: str, fix: str) -> ArgumentError:
    """Returns (does not raise) the error for one argument: `raise bad_argument(...)`.

    Args:
        name: the argument as the user typed it, such as `"quant_type"`.
        value: what they passed; long values are shortened in the message.
        why: why it cannot work, such as `"is not a quantisation type"`; reads on from `name=value`.
        fix: what to pass instead.
    """
    return ArgumentError(_sentences(f"{name}={_shown.repr(value)} {why}", fix))


_shown = reprlib.Repr()
_shown.maxstring = _shown.maxother = 200  # the default, 30 characters, cuts paths that the user needs to read


def _sentences(*parts: str | None) -> str:
    """Joins the parts with a full stop after each that ends in none."""
    kept = [part.strip() for part in parts if part and part.strip()]
    return " ".join(part if part[-1] in ".!?" else f"{part}." for part in kept)
