"""After loading: is everything there, of the right shape, and a number?

transformers initialises missing tensors at random, ignores surplus ones and loads NaN, with a warning at most.
"""

from __future__ import annotations

import math
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
        noted: scales of what was quantised while loading, by name.
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
    _check_finite([*noted, *_floats(model)], source)


def _check_names(model: Any, info: dict[str, Any], source: str) -> None:
    same_class = type(model).__name__ in (getattr(model.config, "architectures", None) or ())
    prefix = f"{model.base_model_prefix}."
    for kind, keys in (("is missing from the files", "missing_keys"), ("is unknown to the model", "unexpected_keys")):
        names = [n for n in sorted(info.get(keys) or ()) if same_class or n.startswith(prefix)]
        if names:
            more = f" ({len(names)} tensors like it)" if len(names) > 1 else ""
            raise CheckpointError(file=source, tensor=names[0], reason=f"{kind}{more}", fix=_STRICT)


def _check_finite(tensors: Iterable[tuple[str, torch.Tensor]], source: str) -> None:
    """Look for NaN and infinity, with one synchronisation for each device.

    By their extremes: ``isfinite`` would take memory for the tensor again. Scales go through one kernel for all.
    """
    groups: dict[tuple[torch.device, bool], list[tuple[str, torch.Tensor]]] = {}
    for name, tensor in tensors:
        if tensor.numel():
            groups.setdefault((tensor.device, tensor.dim() <= 1), []).append((name, tensor))
    for (_, flat), group in groups.items():
        values = [tensor for _, tensor in group]
        if flat:
            extremes = torch.stack(torch._foreach_norm([value.float() for value in values], math.inf))
        else:
            extremes = torch.stack([torch.stack(torch.aminmax(v)).float().sum() for v in values])
        finite = torch.isfinite(extremes)
        if not bool(finite.all()):
            raise CheckpointError(
                file=source,
                tensor=group[int((~finite).nonzero()[0])][0],
                reason="holds NaN or infinity (in float16, if it was quantised to 8 bits)",
                fix="download or save the checkpoint again",
            )


def _floats(model: Any) -> Iterable[tuple[str, torch.Tensor]]:
    for name, parameter in model.named_parameters():
        codes = getattr(parameter, "bnb_quantized", False)  # 4-bit codes may be stored as a 16-bit dtype
        if parameter.is_floating_point() and not parameter.is_meta and not codes:
            yield name, parameter.detach()
