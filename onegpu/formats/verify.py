"""After loading: is everything there, of the right shape, and a number?

transformers initialises missing tensors at random, ignores surplus ones and loads NaN, with a warning at most.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch

from onegpu.errors import CheckpointError

_STRICT = "correct the files, or pass strict=False to load them as they are"


def verify_loaded(
    model: Any,
    info: dict[str, Any],
    source: str,
    *,
    strict: bool = True,
    allow_mismatch: bool = False,
    noted: Sequence[tuple[str, torch.Tensor]] = (),
) -> None:
    """Raise ``CheckpointError`` unless ``model`` holds what its checkpoint should have given.

    Args:
        model: as transformers loaded it.
        info: its loading info: missing, unexpected and mismatched keys.
        source: the checkpoint, for the message.
        strict: also refuse missing and surplus tensors. A head that the checkpoint's own class does not have (a
            classifier on a language model) is new by intention and passes.
        allow_mismatch: the user asked for tensors of another shape to be initialised anew.
        noted: flags that were set while loading: name, and whether it was not finite.
    """
    mismatched = sorted(info.get("mismatched_keys") or ())
    if mismatched and not allow_mismatch:
        name, found, expected = mismatched[0]
        raise CheckpointError(
            file=source,
            tensor=name,
            reason=f"has shape {tuple(found)}, the model needs {tuple(expected)} ({len(mismatched)} tensors like it)",
            fix="correct config.json or the files",
        )
    if strict:
        _check_names(model, info, source)
    floats = [(name, _not_finite(tensor)) for name, tensor in _floats(model)]
    _check_finite([*noted, *floats], source)


def _check_names(model: Any, info: dict[str, Any], source: str) -> None:
    same_class = type(model).__name__ in (getattr(model.config, "architectures", None) or ())
    prefix = f"{model.base_model_prefix}."
    for kind, keys in (("is missing from the files", "missing_keys"), ("is unknown to the model", "unexpected_keys")):
        names = [n for n in sorted(info.get(keys) or ()) if same_class or n.startswith(prefix)]
        if names:
            more = f" ({len(names)} tensors like it)" if len(names) > 1 else ""
            raise CheckpointError(file=source, tensor=names[0], reason=f"{kind}{more}", fix=_STRICT)


def _check_finite(flags: Iterable[tuple[str, torch.Tensor]], source: str) -> None:
    """Look at flags that say "not finite", with one synchronisation for each device."""
    devices: dict[torch.device, list[tuple[str, torch.Tensor]]] = {}
    for name, flag in flags:
        devices.setdefault(flag.device, []).append((name, flag))
    for group in devices.values():
        if bool(torch.stack([flag for _, flag in group]).any()):
            name = next(name for name, flag in group if bool(flag))
            raise CheckpointError(
                file=source,
                tensor=name,
                reason="holds NaN or infinity (in float16, if it was quantised to 8 bits)",
                fix="download or save the checkpoint again",
            )


def _not_finite(tensor: torch.Tensor) -> torch.Tensor:
    """A flag on the device of ``tensor``, by its extremes: ``isfinite`` would take memory for the tensor again."""
    return ~torch.isfinite(torch.stack(torch.aminmax(tensor))).all() if tensor.numel() else torch.tensor(False)


def _floats(model: Any) -> Iterable[tuple[str, torch.Tensor]]:
    for name, parameter in model.named_parameters():
        codes = getattr(parameter, "bnb_quantized", False)  # 4-bit codes may be stored as a 16-bit dtype
        if parameter.is_floating_point() and not parameter.is_meta and not codes:
            yield name, parameter.detach()
