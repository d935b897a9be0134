"""A tiny random llama as a GGUF file, written with llama.cpp's own Python writer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from tests.tiny import BOS, CONTEXT, EOS, PAD, UNK, VOCAB_SIZE, tiny_vocabulary

HIDDEN, HEADS, KV_HEADS, MLP, LAYERS = 64, 4, 2, 128, 2
EOT = VOCAB_SIZE - 1


def tiny_gguf_tensors(seed: int = 0) -> dict[str, np.ndarray]:
    """GGUF names to float32 arrays in torch's order of dimensions."""
    random = np.random.default_rng(seed)
    head = HIDDEN // HEADS
    shapes = {"token_embd": (VOCAB_SIZE, HIDDEN), "output": (VOCAB_SIZE, HIDDEN), "output_norm": (HIDDEN,)}
    for layer in range(LAYERS):
        shapes |= {
            f"blk.{layer}.attn_norm": (HIDDEN,),
            f"blk.{layer}.attn_q": (HEADS * head, HIDDEN),
            f"blk.{layer}.attn_k": (KV_HEADS * head, HIDDEN),
            f"blk.{layer}.attn_v": (KV_HEADS * head, HIDDEN),
            f"blk.{layer}.attn_output": (HIDDEN, HEADS * head),
            f"blk.{layer}.ffn_norm": (HIDDEN,),
            f"blk.{layer}.ffn_gate": (MLP, HIDDEN),
            f"blk.{layer}.ffn_up": (MLP, HIDDEN),
            f"blk.{layer}.ffn_down": (HIDDEN, MLP),
        }
    return {
        f"{name}.weight": (random.standard_normal(shape) * 0.2 + (len(shape) == 1)).astype(np.float32)
        for name, shape in shapes.items()
    }


def write_tiny_gguf(
    path: Path,
    *,
    storage: str = "F32",
    tensors: dict[str, np.ndarray] | None = None,
    architecture: str = "llama",
    tokenizer: bool = True,
    **metadata: Any,
) -> Path:
    """Writes the model to `path`; matrices in `storage` ("F32", "F16", "Q8_0"), vectors in F32.

    `metadata` replaces llama's figures, for example `block_count=3`.
    """
    import gguf

    figures = {
        "block_count": LAYERS,
        "context_length": CONTEXT,
        "embedding_length": HIDDEN,
        "feed_forward_length": MLP,
        "attention.head_count": HEADS,
        "attention.head_count_kv": KV_HEADS,
        "vocab_size": VOCAB_SIZE,
    }
    writer = gguf.GGUFWriter(str(path), architecture)
    for name, value in (figures | metadata).items():
        writer.add_uint32(f"{architecture}.{name}", value)
    writer.add_float32(f"{architecture}.attention.layer_norm_rms_epsilon", 1e-5)
    writer.add_float32(f"{architecture}.rope.freq_base", 10000.0)
    if tokenizer:
        tokens = tiny_vocabulary()
        tokens[EOT - 1 :] = ["cd", "ab"]  # two merges: transformers 5.17 takes a list of one for a string
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre("default")
        writer.add_token_list(tokens)
        writer.add_token_types([3 if index in (PAD, BOS, EOS, UNK) else 1 for index in range(VOCAB_SIZE)])
        writer.add_token_merges(["a b", "c d"])
        writer.add_bos_token_id(BOS)
        writer.add_eos_token_id(EOS)
        writer.add_unk_token_id(UNK)
        writer.add_pad_token_id(PAD)
        writer.add_eot_token_id(EOT)
        writer.add_chat_template("{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}")
    for name, array in (tiny_gguf_tensors() if tensors is None else tensors).items():
        if storage == "F32" or array.ndim == 1:
            writer.add_tensor(name, array)
        elif storage == "F16":
            writer.add_tensor(name, array.astype(np.float16))
        else:
            kind = gguf.GGMLQuantizationType[storage]
            writer.add_tensor(name, gguf.quantize(array, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
