"""transformers' two attention interfaces under the name "onegpu", and which models may use it.

A model asks one for its mask (:func:`mask_function`) and the other for its attention (:func:`attention_function`).
Nobody else validates that name: a model that looks masks up by it but attends by itself would answer wrongly. So models
are admitted by what their classes do (``convert/admission.py``), the mask refuses to be added to scores, and the
attention refuses tensors that it does not know.
"""

from __future__ import annotations

import functools
import logging
from dataclasses import replace
from typing import Any

import torch

from onegpu.errors import bad_argument
from onegpu.kernels.warmup import tells
from onegpu.nn.attention import Packed, attend
from onegpu.nn.attention_context import current_step
from onegpu.nn.attention_mask import AttentionMask, Rule

logger = logging.getLogger("onegpu")
NAME = "onegpu"

# Tensors that reach the function beside the attention's own and do not change what it computes.
_NO_MATTER = frozenset({"position_ids", "cache_position", "input_ids", "labels", "token_type_ids"})


def register() -> None:
    """Make ``attn_implementation="onegpu"`` known to transformers. A second call changes nothing."""
    from transformers import AttentionInterface, AttentionMaskInterface

    AttentionInterface.register(NAME, attention_function)
    AttentionMaskInterface.register(NAME, mask_function)


@tells
def attention_of(module: torch.nn.Module) -> list[tuple[str, dict[str, Any]]]:
    """Sizes of a module's attention for ``onegpu.warmup``, where its projections and its config tell them."""
    projections = [getattr(module, name, None) for name in ("q_proj", "k_proj", "v_proj")]
    d = getattr(module, "head_dim", None)
    config = getattr(module, "config", None)
    if (
        getattr(config, "_attn_implementation", None) != NAME
        or not isinstance(d, int)
        or not all(isinstance(x, torch.nn.Linear) for x in projections)
    ):
        return []
    width, width_k, width_v = (projection.out_features for projection in projections)  # type: ignore[union-attr]
    heads, heads_kv = width // d, width_k // d
    sizes: dict[str, Any] = {"heads": heads, "heads_kv": heads_kv, "d": d, "d_v": width_v // heads_kv}
    window = getattr(module, "sliding_window", getattr(config, "sliding_window", None))
    causal = bool(getattr(module, "is_causal", True))
    sizes |= {"causal": causal, "window": window if causal else None, "scale": getattr(module, "scaling", None)}
    learns = module.training and any(p.requires_grad for p in module.parameters())
    return [("attention", sizes | {"backward": learns})]


def attention_function(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    sliding_window: int | None = None,
    **others: Any,
) -> tuple[torch.Tensor, None]:
    """What a transformers attention module calls, see ``transformers.AttentionInterface``.

    Args:
        module: the caller. query: ``[B, H, S_q, D]``. key, value: ``[B, H_kv, S_k, D]`` (value D_v), with the cache.
        attention_mask: as :func:`onegpu.nn.attention.attend` takes it.
        others: ``cu_seq_lens_q``, ``cu_seq_lens_k``, ``max_length_q``, ``max_length_k`` of a packed batch, and what
            does not matter.

    Returns:
        ``[B, S_q, H, D_v]`` and None in the place of the weights.

    Raises:
        ArgumentError: a tensor or a setting that changes attention in a way unknown here.
    """
    if others:
        _check(others)
        if others.get("output_attentions"):
            _say_no_weights()
        positions = others.get("position_ids")
        if positions is not None and type(attention_mask) is AttentionMask:
            attention_mask.consider(positions)
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal

    def sdpa(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: Any, causal: bool) -> torch.Tensor:
        from transformers.integrations.sdpa_attention import sdpa_attention_forward

        caller: Any = _Caller(q.shape[1] // k.shape[1])
        out, _ = sdpa_attention_forward(caller, q, k, v, mask, dropout=dropout, scaling=scaling, is_causal=causal)
        return out

    out = attend(
        query,
        key,
        value,
        attention_mask,
        sdpa=sdpa,
        scale=scaling,
        causal=causal,
        window=sliding_window,
        dropout=dropout,
        packed=_packed(others),
    )
    return out, None


class _Caller:
    """What transformers' function asks of a module; not every module has it."""

    def __init__(self, groups: int) -> None:
        self.num_key_value_groups = groups


@functools.cache
def _say_no_weights() -> None:
    logger.warning("onegpu's attention returns no weights: load with attn_implementation='eager' for them")


def _check(others: dict[str, Any]) -> None:
    for name, value in others.items():
        if isinstance(value, torch.Tensor) and name not in _NO_MATTER and name not in _PACKING:
            why = "is a tensor that this attention does not know"
            raise bad_argument(name, list(value.shape), why, "use attn_implementation='sdpa'")
        if name in ("softcap", "s_aux", "position_bias", "cache") and value is not None:
            why = "changes attention in a way that this one does not serve"
            raise bad_argument(name, value, why, "use attn_implementation='eager'")


_PACKING = ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k")


def _packed(others: dict[str, Any]) -> Packed | None:
    ends_q, ends_k = others.get("cu_seq_lens_q"), others.get("cu_seq_lens_k")
    if ends_q is None:
        if ends_k is not None:
            raise bad_argument("cu_seq_lens_q", None, "is missing beside cu_seq_lens_k", "pass the ends of the queries")
        return None
    ends_k = ends_q if ends_k is None else ends_k
    for name, ends in (("cu_seq_lens_q", ends_q), ("cu_seq_lens_k", ends_k)):
        if not isinstance(ends, torch.Tensor):
            raise bad_argument(name, ends, "is no tensor of ends", "pass int32 [N + 1] for N sequences")
    longest = [others.get(name) for name in ("max_length_q", "max_length_k")]
    return Packed(
        ends_q.to(torch.int32), ends_k.to(torch.int32), *(None if size is None else int(size) for size in longest)
    )


def mask_function(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: Any = 0,
    kv_offset: Any = 0,
    mask_function: Any = None,
    attention_mask: torch.Tensor | None = None,
    allow_is_bidirectional_skip: bool = False,
    device: Any = "cpu",
    **others: Any,
) -> torch.Tensor | None:
    """What transformers calls to make a mask, see ``transformers.AttentionMaskInterface``.

    An :class:`AttentionMask` where the pattern is one that its rule can say, else the boolean matrix. None for a mask
    that hides nothing and may be left out.
    """
    from transformers.masking_utils import causal_mask_function, sdpa_mask

    pattern = causal_mask_function if mask_function is None else mask_function
    if isinstance(q_offset, torch.Tensor):
        q_offset = q_offset.clone()  # the cache counts on in place, and the mask may be read after that

    def matrix() -> torch.Tensor:
        made = sdpa_mask(
            batch_size=batch_size,
            q_length=q_length,
            kv_length=kv_length,
            q_offset=q_offset,
            kv_offset=kv_offset,
            mask_function=pattern,
            attention_mask=attention_mask,
            **{**others, "allow_is_causal_skip": False, "allow_is_bidirectional_skip": False, "device": device},
        )
        assert made is not None  # no skip is allowed
        return made

    rule, device = _rule_of(pattern), torch.device(device)
    if attention_mask is not None and isinstance(q_offset, int):
        # Of queries beyond its end a shorter mask says nothing: they would count as padding, without a word.
        least = q_offset + q_length if rule is not None and rule.causal else 0
        attention_mask = _of_batch(attention_mask, batch_size, least)
    # A step of a static cache, which generate() may have compiled: it takes tensors. One of our engine's does not look.
    static = isinstance(q_offset, torch.Tensor) and q_length == 1 and current_step() is None
    numbered = isinstance(kv_offset, int) and (rule is None or rule.sequences is None or attention_mask is None)
    if rule is None or static or not numbered or torch.compiler.is_compiling():
        return matrix()
    plain = not rule.causal and rule.left < 0 and rule.right < 0
    if plain and attention_mask is None and allow_is_bidirectional_skip:
        return None
    rule = replace(rule, padding=attention_mask, q_offset=q_offset, k_offset=kv_offset)
    return AttentionMask(rule, (batch_size, q_length, kv_length), matrix, device)


def _of_batch(mask: torch.Tensor, rows: int, columns: int) -> torch.Tensor:
    """A 2-D mask for ``rows``; raises where it is of another batch, or ends before ``columns``."""
    if mask.shape[0] not in (1, rows) or mask.shape[1] < columns:
        why = f"does not go with a batch of {rows} and {columns} tokens, those in the cache counted"
        raise bad_argument("attention_mask", list(mask.shape), why, "pass a 1 or a 0 for each of these tokens")
    return mask.expand(rows, -1)


def _rule_of(pattern: Any) -> Rule | None:
    """The rule of a pattern of ``transformers.masking_utils``; None for one that is not known here.

    Patterns are closures; what they are made of is read off them, by name. One that has changed in a newer version is
    one that is not known, and its mask a matrix.
    """
    from transformers import masking_utils

    if pattern is masking_utils.causal_mask_function:
        return Rule(causal=True)
    if pattern is masking_utils.bidirectional_mask_function:
        return Rule()
    if getattr(pattern, "__module__", None) != masking_utils.__name__:
        return None
    cells = pattern.__closure__ or ()
    held = {name: cell.cell_contents for name, cell in zip(pattern.__code__.co_freevars, cells, strict=True)}
    match pattern.__qualname__.split(".<locals>")[0], held:
        case "and_masks", {"mask_functions": parts}:
            return _both([_rule_of(part) for part in parts])
        case "sliding_window_overlay", {"sliding_window": int(window)} if window > 0:
            return Rule(left=window - 1)
        case "sliding_window_bidirectional_overlay", {"sliding_window": int(window)} if window >= 0:
            return Rule(left=window, right=window)
        case "packed_sequence_mask_function", {"packed_sequence_mask": torch.Tensor() as sequences}:
            return Rule(sequences=sequences)
        case "remap_positions_for_packed_sequence", {"mask_function": inner, "position_ids": _}:
            # Distances inside a sequence are those of its positions, which rise by one.
            return _rule_of(inner)
    return None


def _both(rules: list[Rule | None]) -> Rule | None:
    result = Rule()
    for rule in rules:
        if rule is None or (rule.sequences is not None and result.sequences is not None):
            return None
        result = Rule(
            result.causal or rule.causal,
            _tighter(result.left, rule.left),
            _tighter(result.right, rule.right),
            rule.sequences if result.sequences is None else result.sequences,
        )
    return result


def _tighter(one: int, other: int) -> int:
    return max(one, other) if min(one, other) < 0 else min(one, other)
