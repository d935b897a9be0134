"""The README.md of a quantised checkpoint: what was quantised, from what, and by which command."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from onegpu.formats.folder import Source

# Facts about a model that stay true when it is quantised.
_KEPT = ("license", "license_name", "license_link", "language", "pipeline_tag", "datasets")
_NAMES = {"nf4": "4-bit NF4", "fp4": "4-bit FP4", "int8": "8-bit LLM.int8()"}


def model_card(
    source: Source, *, to: str, command: str, version: str, auto: str, rows: list[tuple[str, str]], notes: list[str]
) -> str:
    """The text.

    Args:
        source: what was quantised.
        to: "nf4", "fp4" or "int8".
        command: that makes these files again, without paths of this machine.
        version: of onegpu.
        auto: name of the class that loads it.
        rows: facts for the table, name and value.
        notes: what a user of the files has to know.
    """
    head: dict[str, Any] = {"library_name": "transformers", **_kept(source.folder / "README.md")}
    if source.commit is not None:
        head |= {"base_model": source.name, "base_model_relation": "quantized"}
    head["tags"] = ["onegpu", "bitsandbytes", f"{8 if to == 'int8' else 4}-bit"]
    table = "\n".join(f"| {name} | {value} |" for name, value in rows)
    more = "".join(f"\n{note}\n" for note in notes)
    return f"""---
{_yaml(head)}---

# {source.name.rpartition("/")[2]}, {_NAMES[to]}

The weights of `{source.name}`, quantised to {_NAMES[to]} in the format of bitsandbytes by onegpu {version}:

```bash
{command}
```

| | |
|---|---|
{table}
{more}
```python
from onegpu import {auto}

model = {auto}.from_pretrained("<this folder>", device_map="auto")
```
"""


def _kept(readme: Path) -> dict[str, Any]:
    """Licence and the like from the model card of the source; {} if it has none, or one that cannot be read."""
    import yaml
    from huggingface_hub import metadata_load

    try:
        found = metadata_load(readme)
    except (OSError, ValueError, yaml.YAMLError):
        return {}
    return {key: found[key] for key in _KEPT if key in found} if isinstance(found, Mapping) else {}


def _yaml(head: dict[str, Any]) -> str:
    import yaml

    text: str = yaml.safe_dump(head, sort_keys=False, allow_unicode=True)
    return text
