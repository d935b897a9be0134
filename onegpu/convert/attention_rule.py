"""The conversion of attention: the name in a config, or an exceptional module's ``forward``. No weight is touched."""

from __future__ import annotations

import logging
from typing import Any

from onegpu.convert import exceptions
from onegpu.convert.admission import examine
from onegpu.convert.attention import NAME, register
from onegpu.convert.report import Change, Report
from onegpu.formats.config import with_subconfigs

logger = logging.getLogger("onegpu")
_ASKED = ("flash_attention_2", NAME)


class UseAttention:
    """Every attention module that can be served, by config; the others keep what they had, and the report says why."""

    def apply(self, model: Any, settings: Any, state: Any, keep_original: bool, report: Report) -> None:
        """See :class:`onegpu.convert.rules.Rule`."""
        register()
        examined = examine(model)
        found = {name: row for name, row in exceptions.find(model).items() if not exceptions.applied(model, name)}
        for group in examined.groups:
            before = group.config._attn_implementation
            if before == NAME:
                continue
            for name, module in group.modules.items():
                after = None if group.reasons else f"{NAME} attention"
                reason = "; ".join(group.reasons) or "attention interface"
                report.changes.append(Change(name, f"{type(module).__name__} ({before})", after, reason))
            if not group.reasons:
                state.attention.append((group.config, before))
                group.config._attn_implementation_internal = NAME
        exceptions.apply(model, found)
        for name, row in found.items():
            report.changes.append(Change(name, type(model.get_submodule(name)).__name__, f"{NAME} attention", row.why))
        for name, module in examined.outside.items():
            if name not in found and not exceptions.applied(model, name):
                reason = "attends outside transformers' attention interface"
                report.changes.append(Change(name, type(module).__name__, None, reason))

    def restore(self, model: Any, state: Any, report: Report) -> None:
        """See :class:`onegpu.convert.rules.Rule`. What the user set since then stays as it is set."""
        for config, before in state.attention:
            if config._attn_implementation == NAME:
                config._attn_implementation_internal = before
                report.changes.append(Change(config.model_type, f"{NAME} attention", str(before), "as it was"))
        state.attention.clear()
        for name in exceptions.restore(model):
            kind = type(model.get_submodule(name)).__name__
            report.changes.append(Change(name, f"{NAME} attention", kind, "as it was"))


def take_attention(config: Any) -> bool:
    """Take our names out of a config that is to be loaded: its class may know none of them. True if one was there."""
    taken = False
    for part in with_subconfigs(config):
        if part._attn_implementation in _ASKED:
            part._attn_implementation_internal, taken = None, True
    return taken


def of_attention(report: Report) -> Report:
    """The part of a report that is about attention: ``optimize`` changes norms and MLPs too."""
    changes = [change for change in report.changes if "attention" in f"{change.before} {change.after}".lower()]
    return Report(report.action, changes)


def say_left(report: Report, model: Any) -> None:
    """Log what keeps its own attention, and why."""
    reasons = sorted({f"{change.before}: {change.reason}" for change in of_attention(report).left})
    if reasons:
        logger.warning("FlashAttention does not serve all of %s (%s)", type(model).__name__, "; ".join(reasons))
