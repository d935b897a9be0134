"""What can be said about a prompt before any weight is loaded: it is not empty, and it fits the model's context."""

from __future__ import annotations

from typing import Any

from onegpu.errors import bad_argument


def context_length(config: Any) -> int | None:
    """Positions the model was built for; None if its positions have no end (ALiBi, relative ones) or it does not say.

    Args:
        config: a transformers configuration; for a multimodal model its text part counts.
    """
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    if getattr(text, "alibi", False) or text.model_type in ("bloom", "t5", "mt5", "umt5"):
        return None
    limit = getattr(text, "max_position_embeddings", None)
    return limit if isinstance(limit, int) and limit > 0 else None


def room_for(config: Any, prompt_tokens: int) -> int | None:
    """New tokens that fit behind a prompt of `prompt_tokens`; None if the model's context has no end."""
    limit = context_length(config)
    if limit is None:
        return None
    # An encoder-decoder counts the answer separately: the prompt is the encoder's.
    return limit if getattr(config, "is_encoder_decoder", False) else max(0, limit - prompt_tokens)


def check_prompt(prompt_tokens: int, config: Any, max_new_tokens: int | None = None) -> None:
    """Raises unless a prompt can be answered by the model of `config`.

    Args:
        prompt_tokens: length of the prompt, as tokenised for this model.
        config: the model's configuration.
        max_new_tokens: length of the answer asked for; None checks the prompt alone.

    Raises:
        ArgumentError: the prompt is empty; it is longer than the model's context, or leaves no room for one token;
            prompt and answer together are longer than the context.
    """
    if prompt_tokens < 1:
        raise bad_argument("prompt", "", "is empty: there is nothing to continue", "Pass some text")
    limit, room = context_length(config), room_for(config, prompt_tokens)
    if limit is None or room is None:
        return
    if prompt_tokens > limit or room < 1:
        raise bad_argument(
            "prompt",
            f"{prompt_tokens} tokens",
            f"does not fit the model's context of {limit} tokens with one token to come",
            f"Shorten it to {limit - 1} tokens, or use a model with a longer context",
        )
    if max_new_tokens is not None and max_new_tokens > room:
        raise bad_argument(
            "max_new_tokens",
            max_new_tokens,
            f"is too much behind a prompt of {prompt_tokens} tokens: the model's context is {limit} tokens",
            f"Use at most {room}, or shorten the prompt",
        )
