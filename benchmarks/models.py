"""Whole models with random weights, made on the device: the sizes decide the speed, the numbers do not."""

from __future__ import annotations

import copy
from typing import Any

# Class name of the configuration, its arguments, and those of a dry run.
SHAPES: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "Llama-2-7B": (
        "LlamaConfig",
        {"max_position_embeddings": 8192},
        {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "num_hidden_layers": 2},
    ),
    "Mistral-7B": (
        "MistralConfig",
        {"sliding_window": None, "max_position_embeddings": 8192},
        {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "num_hidden_layers": 2,
         "num_key_value_heads": 2},
    ),
    "Qwen2.5-0.5B": (
        "Qwen2Config",
        {"vocab_size": 151936, "hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 24,
         "num_attention_heads": 14, "num_key_value_heads": 2, "tie_word_embeddings": True},
        {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "num_hidden_layers": 2},
    ),
    "Falcon-7B": (
        "FalconConfig",
        {"vocab_size": 65024, "hidden_size": 4544, "num_hidden_layers": 32, "num_attention_heads": 71,
         "multi_query": True, "parallel_attn": True, "alibi": False, "bias": False},
        {"hidden_size": 64, "num_attention_heads": 4, "num_hidden_layers": 2},
    ),
    "BLOOM-7B1": (
        "BloomConfig",
        {"vocab_size": 250880, "hidden_size": 4096, "n_layer": 30, "n_head": 32},
        {"hidden_size": 64, "n_head": 4, "n_layer": 2},
    ),
}  # fmt: skip
TINY = {"vocab_size": 256, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
KINDS = ("bf16", "nf4", "int8")


def plain(shape: str, device: str, tiny: bool, dtype: str = "bfloat16") -> Any:
    """transformers' own model, its attention through sdpa where it has that, on the device; it never ends a text."""
    import torch
    import transformers

    kind, sizes, small = SHAPES[shape]
    config = getattr(transformers, kind)(**{**sizes, **({**small, **TINY} if tiny else {})})
    before = torch.get_default_dtype()
    torch.set_default_dtype(getattr(torch, dtype))
    try:
        with torch.device(device):
            attention = "eager" if kind == "BloomConfig" else "sdpa"  # BLOOM has no other
            model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation=attention)
    finally:
        torch.set_default_dtype(before)
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    return model.eval()


def ours(model: Any, kind: str) -> Any:
    """A copy of a plain model, optimised; `kind` is "bf16" or a format of `onegpu.optimize`."""
    import onegpu

    made = copy.deepcopy(model)
    onegpu.optimize(made, quantize=None if kind == "bf16" else kind)
    return made


def bitsandbytes(model: Any, kind: str) -> Any:
    """A copy of a plain model with bitsandbytes' linear layers, quantised on the GPU as its loader would on the CPU."""
    import bitsandbytes as bnb
    import torch

    made = copy.deepcopy(model)
    for name, module in list(made.named_modules()):
        # Falcon's linear is a subclass, which transformers + bitsandbytes leave as it is.
        if type(module) is not torch.nn.Linear or name == "lm_head":
            continue
        n, k, bias = module.out_features, module.in_features, module.bias is not None
        if kind == "int8":
            layer = bnb.nn.Linear8bitLt(k, n, bias, has_fp16_weights=False, threshold=6.0, device="meta")
            codes, scales, _ = bnb.functional.int8_vectorwise_quant(module.weight.data.half())
            weight = bnb.nn.Int8Params(codes, requires_grad=False, has_fp16_weights=False)
            weight.CB, weight.SCB = codes, scales
        else:
            dtype = module.weight.dtype
            layer = bnb.nn.Linear4bit(k, n, bias, compute_dtype=dtype, quant_type=kind, device="meta")
            codes, state = bnb.functional.quantize_4bit(module.weight.data, blocksize=64, quant_type=kind)
            weight = bnb.nn.Params4bit(
                codes, requires_grad=False, quant_state=state, quant_type=kind, bnb_quantized=True, module=layer
            )
        layer.weight, layer.bias = weight, module.bias
        parent, _, leaf = name.rpartition(".")
        setattr(made.get_submodule(parent), leaf, layer)
    return made


def step_cost(model: Any, batch: int, length: int) -> dict[str, int]:
    """Bytes that a decoding step must read, by what they are: ``linear`` (weights and scales) and ``attention``."""
    import torch

    seen: set[int] = set()
    total = 0
    for module in model.modules():
        if isinstance(module, torch.nn.Embedding):
            continue  # one row of it
        for tensor in (*module.parameters(False), *module.buffers(False)):
            if tensor.data_ptr() not in seen:
                seen.add(tensor.data_ptr())
                total += tensor.numel() * tensor.element_size()
    layers, _, kv_heads, width = attention_sizes(model)
    return {"linear": total, "attention": 2 * layers * kv_heads * width * 2 * batch * length}


def attention_sizes(model: Any) -> tuple[int, int, int, int]:
    """Layers, query heads, key heads and the width of a head."""
    config = model.config.get_text_config(decoder=True)
    heads = config.num_attention_heads  # BLOOM's n_head goes by this name too
    kv_heads = 1 if getattr(config, "multi_query", False) else getattr(config, "num_key_value_heads", None) or heads
    width = getattr(config, "head_dim", None) or config.hidden_size // heads
    return config.num_hidden_layers, heads, kv_heads, width


def attention_flops(model: Any, length: int) -> int:
    """Of causal attention over one prompt: two products of `length` x `length` / 2 a head."""
    layers, heads, _, width = attention_sizes(model)
    return 2 * length * length * width * heads * layers


def parameters(model: Any) -> int:
    """Number of weights that a token is multiplied with: all but the embedding table, unless it is also the head."""
    total = sum(p.numel() for p in model.parameters())
    table, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    return total if table is head else total - table.numel()
