"""What stands beside a quantised checkpoint's weights: its config read, its class found, and both written again."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from onegpu.convert.checkpoint_plan import Plan, loads_there
from onegpu.convert.quantized import Target
from onegpu.errors import CheckpointError, bad_argument
from onegpu.formats.config import CONFIG_ERRORS, config_error, sanitize
from onegpu.formats.folder import Source


def load_config(source: Source) -> Any:
    """The config of an unquantised checkpoint, cleaned of fields that name code.

    Raises:
        CheckpointError: it cannot be read, or says that the weights are quantised already.
    """
    from transformers import AutoConfig

    file = source.folder / "config.json"
    try:
        config = AutoConfig.from_pretrained(source.folder, trust_remote_code=False)
    except CONFIG_ERRORS as error:
        raise config_error(source.folder, error) from error
    for part in (config, config.get_text_config()):
        stored = getattr(part, "quantization_config", None)
        if stored is not None:
            method = stored.get("quant_method") if isinstance(stored, dict) else getattr(stored, "quant_method", None)
            raise CheckpointError(
                file=file,
                reason=f"says that the model is quantised already ({method})",
                fix="start from the unquantised checkpoint",
            )
    sanitize(config)
    return config


def model_class(config: Any) -> type:
    """The class that ``architectures`` names, else what ``AutoModel`` makes of this config."""
    import transformers

    for name in getattr(config, "architectures", None) or ():
        cls: Any = getattr(transformers, name, None)
        known = isinstance(cls, type) and issubclass(cls, transformers.PreTrainedModel)
        if known and cls.config_class is type(config):
            return cls  # type: ignore[no-any-return]
    mapping = transformers.AutoModel._model_mapping
    if type(config) in mapping:
        found: Any = mapping[type(config)]
        return found[0] if isinstance(found, tuple) else found  # type: ignore[no-any-return]
    why = f"is of type {config.model_type!r}, which transformers has no model for"
    raise bad_argument("model", config.name_or_path, why, "update transformers")


def write_beside(folder: Path, source: Source, model: Any, quantization_config: Any, card: str) -> None:
    """Config, generation config, tokenizer and the like, and the model card, as ``save_pretrained`` writes them.

    Raises:
        CheckpointError: the settings are such that transformers refuses to save them.
    """
    from transformers import GenerationConfig

    config = model.config
    config.dtype = str(model.dtype).removeprefix("torch.")
    config.architectures = [type(model).__name__]
    config.quantization_config = quantization_config
    try:
        config.save_pretrained(folder)
        if model.can_generate():
            try:
                generation = GenerationConfig.from_pretrained(source.folder)
            except OSError:  # there is none; old checkpoints have these settings in config.json
                generation = GenerationConfig.from_pretrained(
                    source.folder, config_file_name="config.json", _from_model_config=True
                )
            generation.save_pretrained(folder)
    except ValueError as error:
        reason = f"its settings cannot be saved: {error}"
        raise CheckpointError(file=source.folder / "config.json", reason=reason, fix="correct them") from error
    for name in source.companions():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source.folder / name, folder / name)
    (folder / "README.md").write_text(card, encoding="utf-8")


def notes_on(plan: Plan) -> list[str]:
    """What a user of the result has to know."""
    targets = [Target(change.name, change.reason) for change in plan.quantized]
    only_here = [target.name for target in targets if not loads_there(plan.model, target)]
    if not only_here:
        return []
    return [
        f"{len(only_here)} of {len(plan.quantized)} quantised weights (experts, or layers that subclass `nn.Linear`, "
        f"such as `{only_here[0]}`) load in onegpu only; `--bitsandbytes-compatible` leaves these as they are."
    ]


def auto_name(model: Any) -> str:
    """The Auto class that loads ``model`` as this class."""
    import transformers

    names = [name for name in dir(transformers) if name.startswith("AutoModelFor")]
    for name in sorted(names, key=lambda name: (name == "AutoModelForPreTraining", name)):
        mapping = getattr(getattr(transformers, name), "_model_mapping", None)
        if mapping is not None and type(model.config) in mapping and mapping[type(model.config)] is type(model):
            return name
    return "AutoModel"
