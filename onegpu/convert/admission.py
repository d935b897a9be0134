"""Which attention modules of a model may call ours, found in what their classes do."""

from __future__ import annotations

import ast
import functools
import inspect
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from torch import nn

# What a call of the interface may name; anything else must be None in the module that calls it.
_UNDERSTOOD = frozenset(
    (
        "query", "key", "value", "attention_mask", "dropout", "scaling", "is_causal", "sliding_window", "position_ids",
        "cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k", "output_attentions", "deterministic",
    )
)  # fmt: skip


@dataclass
class Group:
    """The attention modules that read one config. reasons: why they cannot be served; none if they can."""

    config: Any
    modules: dict[str, nn.Module] = field(default_factory=dict)
    reasons: list[str] = field(default_factory=list)


@dataclass
class Examination:
    """groups: by config. outside: modules that attend by themselves, and would go on doing so."""

    groups: list[Group]
    outside: dict[str, nn.Module]


def examine(model: nn.Module) -> Examination:
    """Sort the attention modules of ``model``. Nothing is changed, nothing is run."""
    from transformers import PreTrainedModel

    groups: dict[int, Group] = {}
    calling = {name: module for name, module in model.named_modules() if calls_of(type(module))}
    for name, module in calling.items():
        group = groups.setdefault(id(module.config), Group(module.config))
        group.modules[name] = module
        group.reasons += [reason for reason in _unserved(module) if reason not in group.reasons]
    outside = {name: module for name, module in model.named_modules() if _attends_by_itself(name, module, calling)}
    parts = [(name, part) for name, part in model.named_modules() if isinstance(part, PreTrainedModel)]
    for name, part in parts:
        group = groups.get(id(part.config))  # type: ignore[assignment]
        if group is None:
            continue
        if not part._can_set_attn_implementation():
            group.reasons.append(f"{type(part).__name__} attends outside transformers' attention interface")
        elif not part._supports_sdpa:
            group.reasons.append(f"{type(part).__name__} does not support scaled dot-product attention")
        own = [other for at, other in outside.items() if at.startswith(f"{name}." if name else "") and _masked(other)]
        if own and all(getattr(other, "config", part.config) is part.config for other in own):
            group.reasons.append(f"{type(own[0]).__name__} beside it attends outside the interface")
    for group in groups.values():
        if getattr(group.config, "output_attentions", False):
            group.reasons.append("output_attentions asks for the weights")
        group.reasons = list(dict.fromkeys(group.reasons))
    return Examination(list(groups.values()), outside)


def calls_of(cls: type) -> tuple[tuple[str, str], ...] | None:
    """Keywords of the calls of transformers' attention interface in the source of a module's class, each with its value
    as text; None if it has no such call."""
    return _calls_of(cls) if "attention" in cls.__name__.lower() or "attn" in cls.__name__.lower() else None


@functools.cache
def _calls_of(cls: type) -> tuple[tuple[str, str], ...] | None:
    found, keywords = False, []
    for base in cls.__mro__:
        if not issubclass(base, nn.Module) or base is nn.Module:
            continue
        try:
            tree = ast.parse(textwrap.dedent(inspect.getsource(base)))
        except (OSError, TypeError, SyntaxError):
            continue  # without its source a class is one that attends by itself
        for call in _interface_calls(tree):
            found = True
            keywords += [(word.arg, ast.unparse(word.value)) for word in call.keywords if word.arg is not None]
        if found:
            break
    return tuple(keywords) if found else None


def _interface_calls(tree: ast.AST) -> Iterator[ast.Call]:
    names = {
        target.id
        for node in ast.walk(tree)
        if isinstance(node, (ast.Assign, ast.AnnAssign)) and _gets_interface(node.value)
        for target in (node.targets if isinstance(node, ast.Assign) else [node.target])
        if isinstance(target, ast.Name)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in names:
            yield node


def _gets_interface(value: ast.expr | None) -> bool:
    return (
        isinstance(value, ast.Call)
        and isinstance(value.func, ast.Attribute)
        and value.func.attr == "get_interface"
        and ast.unparse(value.func.value) == "ALL_ATTENTION_FUNCTIONS"
    )


def _unserved(module: nn.Module) -> Iterator[str]:
    for keyword, value in calls_of(type(module)) or ():
        if keyword in _UNDERSTOOD:
            continue
        path = value.split(".")
        if path[0] == "self" and all(part.isidentifier() for part in path):
            held: Any = module
            for part in path[1:]:
                held = getattr(held, part, None)
            if held is None:
                continue
        yield f"{type(module).__name__} passes {keyword}"


def _attends_by_itself(name: str, module: nn.Module, calling: dict[str, nn.Module]) -> bool:
    if isinstance(module, nn.MultiheadAttention):
        return True
    if name in calling or "attention" not in type(module).__name__.lower():
        return False
    weights = [child for child in module.children() if getattr(child, "weight", None) is not None]
    matrices = [child for child in weights if child.weight.dim() >= 2]  # type: ignore[operator]
    return len(matrices) >= 2 and not any(inner.startswith(f"{name}.") for inner in calling)


def _masked(module: nn.Module) -> bool:
    """It takes a mask, so it depends on which kind of mask its config's name gives."""
    return not isinstance(module, nn.MultiheadAttention) and any(
        "mask" in parameter for parameter in inspect.signature(module.forward).parameters
    )
