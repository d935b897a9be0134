"""From options to a model in memory, in an order that finds mistakes before anything large is read."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

from onegpu.cli.options import ModelOptions
from onegpu.errors import CheckpointError, OneGPUError


@dataclass
class Prepared:
    """What is known of a model before its weights are read: enough to check a prompt."""

    path: str
    config: Any
    tokenizer: Any
    arguments: dict[str, Any]


def prepare(options: ModelOptions, progress: bool = True) -> Prepared:
    """Checks the options, finds the model (a GGUF file is expanded here) and reads its config and tokenizer.

    Raises:
        ArgumentError, CheckpointError: what the user can mend.
    """
    import onegpu
    from onegpu.arguments import check_path, translate
    from onegpu.formats.gguf import is_gguf, materialize

    arguments = options.arguments()
    translate(dict(arguments))  # raises for devices and types that do not exist
    path = options.model
    if is_gguf(path, options.gguf_file):
        place = materialize(path, gguf_file=options.gguf_file, cache_dir=options.cache_dir, progress=progress)
        path = str(place)
    check_path(path)
    trust = options.trust_remote_code
    config = _read(path, "configuration", lambda: onegpu.AutoConfig.from_pretrained(path, trust_remote_code=trust))
    tokenizer = _read(path, "tokenizer", lambda: onegpu.AutoTokenizer.from_pretrained(path, trust_remote_code=trust))
    return Prepared(path, config, tokenizer, arguments)


def load(prepared: Prepared) -> tuple[Any, float]:
    """The model, in eval mode, and the seconds that loading took."""
    import onegpu

    start = time.perf_counter()
    seq2seq = getattr(prepared.config, "is_encoder_decoder", False)
    auto = onegpu.AutoModelForSeq2SeqLM if seq2seq else onegpu.AutoModelForCausalLM
    model = auto.from_pretrained(prepared.path, **prepared.arguments)
    return model, time.perf_counter() - start


def _read(path: str, what: str, reader: Any) -> Any:
    try:
        return reader()
    except OneGPUError:
        raise
    except (OSError, ValueError, KeyError, TypeError, ImportError) as error:
        reason = f"its {what} cannot be read: {error}"
        fix = "Pass a model's folder, its name on the hub, or a .gguf file"
        raise CheckpointError(file=path, reason=reason, fix=fix) from error
