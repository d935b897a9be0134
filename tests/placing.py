"""Models on the meta device, ready to be placed, and invented machines."""

from __future__ import annotations

from typing import Any

import torch
import transformers
from transformers.initialization import no_init_weights

from onegpu.convert.quantized import find_targets, quantized_linear
from onegpu.formats.bitsandbytes import Settings
from onegpu.placement.device_map import Weights
from onegpu.placement.sizes import stored_sizes

GB = 10**9
TWO_GPUS: dict[int | str, int | None] = {0: 16 * GB, 1: 16 * GB, "cpu": 64 * GB}

# bigscience/bloom-3b's config.json
BLOOM_3B: dict[str, Any] = {"hidden_size": 2560, "n_layer": 30, "n_head": 32, "vocab_size": 250880}


def bloom(form: str = "fp4", double_quant: bool = False, dtype: torch.dtype = torch.float16, **shape: Any) -> Weights:
    """A BLOOM of this shape (bloom-3b's if none is given), quantised or in ``dtype``."""
    return weights(transformers.BloomConfig(**(shape or BLOOM_3B)), form, double_quant, dtype)


def weights(config: Any, form: str, double_quant: bool = False, dtype: torch.dtype = torch.float16) -> Weights:
    with torch.device("meta"), no_init_weights():
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype)
    if form in ("fp4", "nf4", "int8"):
        settings = Settings(form, double_quant)
        for target in find_targets(model, settings)[0]:
            new = quantized_linear(model.get_submodule(target.name), settings, "meta")
            model.set_submodule(target.name, new)
    return Weights(model, stored_sizes(model), form, shrinks=form not in ("fp4", "nf4"))
