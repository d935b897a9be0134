"""Tiny random checkpoints of many architectures, with a tokenizer, for tests that need a real directory to load.

Each one is a genuine `save_pretrained` directory: two layers, hidden size 64, a vocabulary of 128, and head counts that
differ between query, key/value and architecture, so that a mixed-up dimension fails instead of passing by luck.
Biases and norm weights are random too (transformers starts them at 0 and 1, where a dropped bias would not show).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers

from tests.tiny_more import MORE

VOCAB_SIZE = 128
CONTEXT = 256
PAD, BOS, EOS, UNK = range(4)

_CHAT_TEMPLATE = (
    "{% for message in messages %}[{{ message['role'] }}] {{ message['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}[assistant] {% endif %}"
)

_IDS: dict[str, Any] = {"pad_token_id": PAD, "bos_token_id": BOS, "eos_token_id": EOS}
_LLAMA_LIKE: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 112,
    "num_hidden_layers": 2,
    "max_position_embeddings": CONTEXT,
    "initializer_range": 0.2,
}
_FALCON: dict[str, Any] = {
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "max_position_embeddings": CONTEXT,
    "initializer_range": 0.2,
    "hidden_dropout": 0.0,
    "attention_dropout": 0.0,
}

# name -> (config class, model class, config arguments)
_RECIPES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "llama": (
        "LlamaConfig",
        "LlamaForCausalLM",
        {**_LLAMA_LIKE, "num_attention_heads": 4, "num_key_value_heads": 2},
    ),
    "mistral": (
        "MistralConfig",
        "MistralForCausalLM",
        {**_LLAMA_LIKE, "num_attention_heads": 8, "num_key_value_heads": 2, "sliding_window": 32},
    ),
    "qwen2": (
        "Qwen2Config",
        "Qwen2ForCausalLM",
        {**_LLAMA_LIKE, "num_attention_heads": 4, "num_key_value_heads": 1, "tie_word_embeddings": True},
    ),
    "gemma3_text": (
        "Gemma3TextConfig",
        "Gemma3ForCausalLM",
        {
            **_LLAMA_LIKE,
            "num_attention_heads": 4,
            "num_key_value_heads": 1,
            "head_dim": 32,
            "query_pre_attn_scalar": 32,
            "sliding_window": 16,
            "layer_types": ["sliding_attention", "full_attention"],
        },
    ),
    "mixtral": (
        "MixtralConfig",
        "MixtralForCausalLM",
        {
            **_LLAMA_LIKE,
            "num_attention_heads": 8,
            "num_key_value_heads": 4,
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
        },
    ),
    # falcon-7b: one key/value head, rotary, attention and MLP in parallel
    "falcon_old": (
        "FalconConfig",
        "FalconForCausalLM",
        {**_FALCON, "num_attention_heads": 4, "multi_query": True, "parallel_attn": True, "bias": False},
    ),
    # falcon-40b: grouped key/value heads, two layer norms
    "falcon_new": (
        "FalconConfig",
        "FalconForCausalLM",
        {**_FALCON, "num_attention_heads": 8, "num_kv_heads": 4, "new_decoder_architecture": True, "bias": False},
    ),
    # falcon-rw-1b: ALiBi, biases, sequential blocks, as many key/value heads as query heads
    "falcon_alibi": (
        "FalconConfig",
        "FalconForCausalLM",
        {
            **_FALCON,
            "num_attention_heads": 4,
            "alibi": True,
            "multi_query": False,
            "parallel_attn": False,
            "bias": True,
        },
    ),
    "bloom": (
        "BloomConfig",
        "BloomForCausalLM",
        {
            "hidden_size": 64,
            "n_layer": 2,
            "n_head": 4,
            "initializer_range": 0.2,
            "hidden_dropout": 0.0,
            "attention_dropout": 0.0,
        },
    ),
    "opt": (
        "OPTConfig",
        "OPTForCausalLM",
        {
            "hidden_size": 64,
            "word_embed_proj_dim": 64,
            "ffn_dim": 112,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "max_position_embeddings": CONTEXT,
            "init_std": 0.2,
            "dropout": 0.0,
        },
    ),
    "gpt2": (
        "GPT2Config",
        "GPT2LMHeadModel",
        {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": CONTEXT, "initializer_range": 0.2},
    ),
    "t5": (
        "T5Config",
        "T5ForConditionalGeneration",
        {
            "d_model": 64,
            "d_kv": 16,
            "d_ff": 112,
            "num_layers": 2,
            "num_decoder_layers": 2,
            "num_heads": 4,
            "relative_attention_num_buckets": 8,
            "decoder_start_token_id": PAD,
            "dropout_rate": 0.0,
            "initializer_factor": 2.0,
        },
    ),
    "bert": (
        "BertConfig",
        "BertForMaskedLM",
        {**_LLAMA_LIKE, "num_attention_heads": 4},
    ),
}

# With a tied head and a loud embedding a random model repeats its last token for ever, and a test of generation then
# proves nothing; these are quietened until the blocks have their say.
_EMBEDDING_GAIN = {"gemma3_text": 0.1, "t5": 0.1, "bloom": 0.2, "falcon_alibi": 0.5}

MODEL_TYPES: tuple[str, ...] = tuple(_RECIPES)
CAUSAL_TYPES: tuple[str, ...] = tuple(name for name in MODEL_TYPES if name not in ("t5", "bert"))

AUTO_CLASS: dict[str, str] = {name: "AutoModelForCausalLM" for name in CAUSAL_TYPES} | {
    "t5": "AutoModelForSeq2SeqLM",
    "bert": "AutoModelForMaskedLM",
}


def tiny_vocabulary() -> list[str]:
    """The 128 tokens, in id order: four special ones, then single bytes in the byte-level alphabet's spelling."""
    readable = [0x20, 0x0A, 0x09, *range(0x21, 0x7F)]  # ASCII
    latin = [0xC3, *range(0xA0, 0xC0)]  # two of these make one accented letter, so streamed UTF-8 can be incomplete
    # The byte-level alphabet spells printable bytes as themselves and the others as U+0100 + their rank.
    spelled = {byte: chr(byte) for byte in [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]}
    hidden = [byte for byte in range(256) if byte not in spelled]
    spelled |= {byte: chr(0x100 + rank) for rank, byte in enumerate(hidden)}
    tokens = ["<pad>", "<s>", "</s>", "<unk>", *(spelled[byte] for byte in [*readable, *latin])]
    return tokens[:VOCAB_SIZE]


def tiny_tokenizer(context: int = CONTEXT) -> transformers.PreTrainedTokenizerFast:
    """A byte-level tokenizer without merges: n ASCII characters are n tokens. It pads left and has a chat template.

    Byte-level, because AutoTokenizer rebuilds the tokenizer of some model types (Qwen2) with those rules whatever the
    file says.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    vocabulary = {token: index for index, token in enumerate(tiny_vocabulary())}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        padding_side="left",
        model_max_length=context,
        model_input_names=["input_ids", "attention_mask"],
        clean_up_tokenization_spaces=False,
    )
    fast.chat_template = _CHAT_TEMPLATE
    return fast


def _recipe(model_type: str) -> tuple[str, str, dict[str, Any]]:
    return _RECIPES[model_type] if model_type in _RECIPES else MORE[model_type]


def tiny_config(model_type: str, **overrides: Any) -> transformers.PreTrainedConfig:
    """The configuration of `model_type` (a name of MODEL_TYPES or MORE); `overrides` replace single fields."""
    config_class, _, arguments = _recipe(model_type)
    arguments = {"vocab_size": VOCAB_SIZE, **_IDS, **arguments, **overrides}
    config: transformers.PreTrainedConfig = getattr(transformers, config_class)(**arguments)
    return config


def tiny_model(
    model_type: str, *, dtype: torch.dtype = torch.float32, seed: int = 0, **overrides: Any
) -> transformers.PreTrainedModel:
    """A random model of `model_type` in eval mode; the same seed gives the same weights."""
    config = tiny_config(model_type, **overrides)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model: transformers.PreTrainedModel = getattr(transformers, _recipe(model_type)[1])(config)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if parameter.dim() == 1:
                    parameter.add_(0.1 * torch.randn_like(parameter))
                if "embed" in name or "shared" in name:
                    parameter.mul_(_EMBEDDING_GAIN.get(model_type, 1.0))
    if model.can_generate():
        # A random model that happens to emit </s> would end early; tests want the length they ask for.
        model.generation_config.eos_token_id = None
        model.generation_config.pad_token_id = PAD
    return model.to(dtype).eval()


def tiny_model_dir(
    tmp_path: Path,
    model_type: str,
    *,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    tokenizer: bool = True,
    **overrides: Any,
) -> Path:
    """Write a tiny random checkpoint of `model_type` below `tmp_path` and return its directory.

    The directory holds config, generation config, safetensors weights in `dtype` and (unless `tokenizer=False`) the
    character tokenizer. `overrides` are configuration fields, for example `vocab_size=256`.
    """
    directory = Path(tmp_path) / f"tiny-{model_type}"
    tiny_model(model_type, dtype=dtype, seed=seed, **overrides).save_pretrained(directory)
    if tokenizer:
        tiny_tokenizer().save_pretrained(directory)
    return directory
