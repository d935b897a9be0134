"""Where two ways to compute one 16-bit model part: whether the tokens that differ were as good as equal."""

from __future__ import annotations

import math
from typing import Any

_ROWS = 4  # of a batch, at most: each takes three forwards


def first_difference(plain: Any, ids: Any, ours: Any, theirs: Any) -> dict[str, Any] | None:
    """What the plain model thinks of the first tokens that differ, in the row where it is least undecided.

    Args:
        plain: the peer's model. ids: int64 [B, n], the prompts. ours, theirs: int64 [B, m], what was made of them.

    Returns:
        None if all is equal; else ``gap``: the logit of their token less that of ours; ``bf16_steps``: the same in
        steps of a bfloat16 number of that size; ``own_noise``: by how much the plain model's logits at this place
        differ at most when it computes them in one piece or with a cache; ``rank``: of our token among theirs (0: the
        best); ``near_tie``: the gap is no more than two logits can move against each other by such noise.
    """
    found = [_row(plain, ids[row : row + 1], ours[row], theirs[row]) for row in range(min(len(ids), _ROWS))]
    return max((one for one in found if one is not None), key=lambda one: float(one["gap"]), default=None)


def _row(plain: Any, ids: Any, ours: Any, theirs: Any) -> dict[str, Any] | None:
    import torch

    differs = (ours != theirs).nonzero()
    if not len(differs):
        return None
    at = int(differs[0])
    text = torch.cat([ids, theirs[None, :at]], dim=1)
    with torch.inference_mode():
        whole = plain(input_ids=text, use_cache=False, logits_to_keep=1).logits[0, -1].float()
        past = plain(input_ids=text[:, :-1], use_cache=True, logits_to_keep=1).past_key_values
        stepped = plain(input_ids=text[:, -1:], past_key_values=past, use_cache=True).logits[0, -1].float()
    our, their = whole[ours[at]], whole[theirs[at]]
    gap, noise = float(their - our), float((whole - stepped).abs().max())
    step = 2.0 ** (math.floor(math.log2(max(float(their.abs()), 1e-30))) - 7)
    return {
        "at": at,
        "gap": round(gap, 4),
        "bf16_steps": round(gap / step, 2),
        "own_noise": round(noise, 4),
        "rank": int((whole > our).sum()),
        "near_tie": gap <= 2 * noise + step,
    }
