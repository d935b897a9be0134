"""More architectures for :mod:`tests.tiny`, for the tests that go through many of them (``tests/contract``).

They are no part of ``MODEL_TYPES``: every test that runs through those would run through all of these.
"""

from __future__ import annotations

from typing import Any

_DECODER: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 112,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 256,
    "initializer_range": 0.2,
}
_GROUPED = {**_DECODER, "num_key_value_heads": 2}
_NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
_ENCODER = {**_DECODER, **_NO_DROPOUT}
_VISION = {**_ENCODER, "image_size": 32, "patch_size": 8, "num_labels": 7}
_SEQ2SEQ: dict[str, Any] = {
    "d_model": 64,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 112,
    "decoder_ffn_dim": 112,
    "dropout": 0.0,
    "attention_dropout": 0.0,
    "activation_dropout": 0.0,
    "init_std": 0.2,
    "decoder_start_token_id": 0,
    "forced_eos_token_id": None,
}
_TOWER = {**_DECODER, "image_size": 32, "patch_size": 8, "projection_dim": 64}

# name -> (config class, model class, config arguments)
MORE: dict[str, tuple[str, str, dict[str, Any]]] = {
    "qwen2_moe": (
        "Qwen2MoeConfig",
        "Qwen2MoeForCausalLM",
        {
            **_GROUPED,
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 32,
            "shared_expert_intermediate_size": 48,
        },
    ),
    "qwen3": ("Qwen3Config", "Qwen3ForCausalLM", {**_GROUPED, "head_dim": 24}),
    "gemma": ("GemmaConfig", "GemmaForCausalLM", {**_GROUPED, "num_key_value_heads": 1, "head_dim": 24}),
    "gemma2": ("Gemma2Config", "Gemma2ForCausalLM", {**_GROUPED, "head_dim": 24, "sliding_window": 16}),
    "phi": ("PhiConfig", "PhiForCausalLM", {**_DECODER, "resid_pdrop": 0.0, "embd_pdrop": 0.0}),
    "phi3": (
        "Phi3Config",
        "Phi3ForCausalLM",
        {**_GROUPED, "sliding_window": 7, "original_max_position_embeddings": 256},
    ),
    "olmo": ("OlmoConfig", "OlmoForCausalLM", _DECODER),
    "olmo2": ("Olmo2Config", "Olmo2ForCausalLM", _GROUPED),
    "smollm3": ("SmolLM3Config", "SmolLM3ForCausalLM", {**_GROUPED, "no_rope_layers": [1, 0]}),
    "stablelm": ("StableLmConfig", "StableLmForCausalLM", {**_GROUPED, "partial_rotary_factor": 0.25}),
    "starcoder2": (
        "Starcoder2Config",
        "Starcoder2ForCausalLM",
        {**_GROUPED, "residual_dropout": 0.0, "embedding_dropout": 0.0, "sliding_window": 9},
    ),
    "gpt_neox": ("GPTNeoXConfig", "GPTNeoXForCausalLM", {**_DECODER, "hidden_dropout": 0.0, "attention_dropout": 0.0}),
    "gpt_bigcode": (
        "GPTBigCodeConfig",
        "GPTBigCodeForCausalLM",
        {
            "n_embd": 64,
            "n_layer": 2,
            "n_head": 4,
            "n_positions": 256,
            "initializer_range": 0.2,
            "resid_pdrop": 0.0,
            "embd_pdrop": 0.0,
            "attn_pdrop": 0.0,
        },
    ),
    "cohere": ("CohereConfig", "CohereForCausalLM", {**_GROUPED, "logit_scale": 1.0}),
    "glm": ("GlmConfig", "GlmForCausalLM", {**_GROUPED, "head_dim": 16}),
    "granite": ("GraniteConfig", "GraniteForCausalLM", {**_GROUPED, "attention_multiplier": 0.2}),
    "deepseek_v3": (
        "DeepseekV3Config",
        "DeepseekV3ForCausalLM",
        {
            **_DECODER,
            "num_key_value_heads": 4,
            "moe_intermediate_size": 32,
            "n_routed_experts": 4,
            "num_experts_per_tok": 2,
            "n_group": 2,
            "topk_group": 1,
            "first_k_dense_replace": 1,
            "kv_lora_rank": 16,
            "q_lora_rank": 24,
            "qk_rope_head_dim": 8,
            "qk_nope_head_dim": 16,
            "v_head_dim": 20,
        },
    ),
    "gpt_oss": (
        "GptOssConfig",
        "GptOssForCausalLM",
        {**_GROUPED, "head_dim": 16, "num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 16},
    ),
    "gptj": (
        "GPTJConfig",
        "GPTJForCausalLM",
        {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 256, "rotary_dim": 8, "initializer_range": 0.2},
    ),
    "codegen": (
        "CodeGenConfig",
        "CodeGenForCausalLM",
        {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 256, "rotary_dim": 8, "initializer_range": 0.2},
    ),
    "mpt": ("MptConfig", "MptForCausalLM", {"d_model": 64, "n_heads": 4, "n_layers": 2, "max_seq_len": 256}),
    "roberta": ("RobertaConfig", "RobertaForMaskedLM", {**_ENCODER, "pad_token_id": 0}),
    "distilbert": (
        "DistilBertConfig",
        "DistilBertForMaskedLM",
        {
            "dim": 64,
            "hidden_dim": 112,
            "n_layers": 2,
            "n_heads": 4,
            "max_position_embeddings": 256,
            "initializer_range": 0.2,
            "dropout": 0.0,
            "attention_dropout": 0.0,
        },
    ),
    "electra": ("ElectraConfig", "ElectraForMaskedLM", {**_ENCODER, "embedding_size": 48}),
    "albert": ("AlbertConfig", "AlbertForMaskedLM", {**_ENCODER, "embedding_size": 48}),
    "modernbert": (
        "ModernBertConfig",
        "ModernBertForMaskedLM",
        {
            **_DECODER,
            "local_attention": 8,
            "cls_token_id": 1,
            "sep_token_id": 2,
            "num_hidden_layers": 3,
            "initializer_cutoff_factor": 2.0,
        },
    ),
    "vit": ("ViTConfig", "ViTForImageClassification", _VISION),
    "dinov2": ("Dinov2Config", "Dinov2ForImageClassification", _VISION),
    "clip": (
        "CLIPConfig",
        "CLIPModel",
        {
            "text_config": {**_TOWER, "vocab_size": 128, "bos_token_id": 1, "eos_token_id": 2},
            "vision_config": _TOWER,
            "projection_dim": 64,
        },
    ),
    "siglip": (
        "SiglipConfig",
        "SiglipModel",
        {
            "text_config": {**_DECODER, "vocab_size": 128, "bos_token_id": 1, "eos_token_id": 2},
            "vision_config": {**_DECODER, "image_size": 32, "patch_size": 8},
        },
    ),
    "whisper": (
        "WhisperConfig",
        "WhisperForConditionalGeneration",
        {**_SEQ2SEQ, "num_mel_bins": 8, "max_source_positions": 32, "max_target_positions": 64},
    ),
    "wav2vec2": (
        "Wav2Vec2Config",
        "Wav2Vec2ForCTC",
        {
            **_DECODER,
            "conv_dim": [32, 32],
            "conv_stride": [5, 4],
            "conv_kernel": [10, 8],
            "num_feat_extract_layers": 2,
            "num_conv_pos_embeddings": 8,
            "num_conv_pos_embedding_groups": 4,
            "feat_extract_norm": "layer",
            "hidden_dropout": 0.0,
            "attention_dropout": 0.0,
            "feat_proj_dropout": 0.0,
            "activation_dropout": 0.0,
            "final_dropout": 0.0,
            "layerdrop": 0.0,
        },
    ),
    "bart": ("BartConfig", "BartForConditionalGeneration", {**_SEQ2SEQ, "max_position_embeddings": 256}),
    "marian": ("MarianConfig", "MarianMTModel", {**_SEQ2SEQ, "max_position_embeddings": 256}),
}
