"""A small model of each structure that the fused step serves, of sizes that its kernels take."""

from __future__ import annotations

from typing import Any

import torch
import transformers

from tests.tiny import CONTEXT, PAD, VOCAB_SIZE

_LLAMA = {"hidden_size": 128, "intermediate_size": 192, "num_attention_heads": 2, "num_key_value_heads": 1}
_WINDOWS = {"sliding_window": 16, "layer_types": ["sliding_attention", "full_attention"]}
_FALCON = {"bias": False, "num_attention_heads": 4, "hidden_size": 256}
_OPT = {"hidden_size": 128, "ffn_dim": 192, "num_attention_heads": 2, "word_embed_proj_dim": 128}
_NEOX = {"hidden_size": 320, "intermediate_size": 384, "num_attention_heads": 4}

# name -> (config class, model class, config arguments)
_RECIPES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "llama": ("Llama", "LlamaForCausalLM", _LLAMA),
    "mistral": ("Mistral", "MistralForCausalLM", {**_LLAMA, "sliding_window": 16}),
    "gemma": ("Gemma", "GemmaForCausalLM", {**_LLAMA, "head_dim": 256}),
    "gemma2": (
        "Gemma2",
        "Gemma2ForCausalLM",
        {
            **_LLAMA, **_WINDOWS, "head_dim": 256, "query_pre_attn_scalar": 100, "attn_logit_softcapping": 2.0,
            "final_logit_softcapping": 5.0, "attn_implementation": "eager",  # sdpa ignores the cap
        },
    ),
    "gemma3": ("Gemma3Text", "Gemma3ForCausalLM", {**_LLAMA, **_WINDOWS, "head_dim": 128}),
    "olmo": ("Olmo", "OlmoForCausalLM", {**_LLAMA, "clip_qkv": 0.5}),
    "olmo2": (
        "Olmo2",
        "Olmo2ForCausalLM",
        {**_LLAMA, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64},
    ),
    "falcon-7b": ("Falcon", "FalconForCausalLM", {**_FALCON, "hidden_size": 576, "num_attention_heads": 9}),
    "falcon-40b": ("Falcon", "FalconForCausalLM", {**_FALCON, "new_decoder_architecture": True, "num_kv_heads": 2}),
    "falcon-rw": (
        "Falcon",
        "FalconForCausalLM",
        {**_FALCON, "bias": True, "alibi": True, "multi_query": False, "parallel_attn": False},
    ),
    "gpt_neox": ("GPTNeoX", "GPTNeoXForCausalLM", _NEOX),
    "gpt_neox, sequential": ("GPTNeoX", "GPTNeoXForCausalLM", {**_NEOX, "use_parallel_residual": False}),
    "phi": ("Phi", "PhiForCausalLM", {**_LLAMA, "partial_rotary_factor": 0.5}),
    "stablelm": ("StableLm", "StableLmForCausalLM", {**_LLAMA, "hidden_size": 192, "partial_rotary_factor": 0.25}),
    "starcoder2": ("Starcoder2", "Starcoder2ForCausalLM", _LLAMA),
    "opt": ("OPT", "OPTForCausalLM", _OPT),
    "opt-350m": ("OPT", "OPTForCausalLM", {**_OPT, "do_layer_norm_before": False, "word_embed_proj_dim": 64}),
    "bloom": ("Bloom", "BloomForCausalLM", {"hidden_size": 128, "n_head": 2, "n_layer": 2}),
    "gpt2": ("GPT2", "GPT2LMHeadModel", {"n_embd": 128, "n_head": 2, "n_layer": 2, "n_positions": CONTEXT}),
}  # fmt: skip
STRUCTURES = tuple(_RECIPES)


def decoder(name: str) -> Any:
    """Random, in eval mode and float32, that never stops by itself; gains and biases are random too."""
    config_name, model_name, changed = _RECIPES[name]
    common = {"vocab_size": VOCAB_SIZE, "pad_token_id": PAD, "bos_token_id": 1, "eos_token_id": 2}
    if config_name not in ("Bloom", "GPT2"):
        common |= {"num_hidden_layers": 2, "max_position_embeddings": CONTEXT}
    range_ = "init_std" if config_name == "OPT" else "initializer_range"
    config = getattr(transformers, f"{config_name}Config")(**{**common, range_: 0.1, **changed})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = getattr(transformers, model_name)(config)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.dim() == 1:
                    parameter.add_(0.1 * torch.randn_like(parameter))
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = PAD
    return model.eval()
