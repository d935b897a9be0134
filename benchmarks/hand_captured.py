"""The peer to beat: transformers' own forward with its static cache, one step captured by hand in a CUDA graph.

This is what a careful user can do with transformers alone: no Python between the kernels, which are as they come.
Positions, cache and the next token stay on the device, so that a replay is a whole step, argmax included.
"""

from __future__ import annotations

from typing import Any

from benchmarks import timing


class HandCaptured:
    """Greedy decoding of a fixed batch with a fixed cache.

    Args:
        model: transformers' model. batch: rows. length: of the cache.
    """

    def __init__(self, model: Any, batch: int, length: int) -> None:
        import torch
        from transformers import StaticCache

        self.model, self.length = model, length
        self.cache = StaticCache(config=model.config, max_cache_len=length)
        self.token = torch.zeros(batch, 1, dtype=torch.long, device=model.device)
        self.graph: Any = None
        # BLOOM makes its position bias from the mask, which therefore must have the cache's length.
        self.mask = torch.ones(batch, length, dtype=torch.long, device=model.device) if self._needs_mask() else None

    def _needs_mask(self) -> bool:
        return self.model.config.model_type == "bloom"

    def start(self, ids: Any) -> None:
        """A new prompt ``[batch, n]``: fills the cache and chooses the first token."""
        import torch

        with torch.inference_mode():
            self.cache.reset()
            self._forward(ids)

    def _forward(self, ids: Any) -> None:
        given = {} if self.mask is None else {"attention_mask": self.mask}
        out = self.model(input_ids=ids, past_key_values=self.cache, use_cache=True, logits_to_keep=1, **given)
        self.token.copy_(out.logits[:, -1].argmax(-1, keepdim=True))

    def capture(self, ids: Any) -> None:
        """Capture the step, after it has run twice; on a CPU steps stay as they are.

        Raises:
            RuntimeError: the model's forward cannot be captured.
        """
        import torch

        if self.model.device.type != "cuda":
            return
        self.start(ids)
        with torch.inference_mode():
            self.graph = timing.capture(lambda: self._forward(self.token))

    def step(self) -> None:
        """The next token, in `token` once the device is done."""
        import torch

        if self.graph is not None:
            self.graph.replay()
            return
        with torch.inference_mode():
            self._forward(self.token)

    def generate(self, ids: Any, count: int) -> Any:
        """``[batch, count]`` tokens, for a comparison; copies each from the device."""
        import torch

        self.start(ids)
        found = [self.token.clone()]
        for _ in range(count - 1):
            self.step()
            found.append(self.token.clone())
        return torch.cat(found, dim=1)
