"""Rotary embedding: the definition is transformers' functions to the bit; the cache gets its rows and no others."""

from __future__ import annotations

import pytest
import torch

from onegpu.errors import ArgumentError
from onegpu.kernels.rotary import cost, rotary, rotary_cache_
from tests.compare import assert_close
from tests.matrices import FLOATS

OPS = torch.ops.onegpu


def made(
    device: str = "cpu", dtype: torch.dtype = torch.float32, d: int = 32, half: int = 16, b: int = 2, t: int = 5
) -> tuple[torch.Tensor, ...]:
    """q, k (views of ``[B, T, H, D]``, as models have them), cos, sin."""
    q, k = (torch.randn(b, t, h, d, device=device).to(dtype).transpose(1, 2) for h in (6, 2))
    angles = 3 * torch.randn(b, t, half, device=device)
    return q, k, angles.cos().to(dtype), angles.sin().to(dtype)


@pytest.mark.parametrize("dtype", FLOATS)
def test_the_definition_is_transformers_function(dtype: torch.dtype) -> None:
    from transformers.models.llama.modeling_llama import apply_rotary_pos_emb as llama

    q, k, cos, sin = made(dtype=dtype)
    wanted = llama(q, k, torch.cat((cos, cos), -1), torch.cat((sin, sin), -1))
    for ours, theirs in zip(rotary(q, k, cos, sin), wanted, strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("dtype", FLOATS)
def test_part_of_a_head_as_transformers_does(dtype: torch.dtype) -> None:
    from transformers.models.gpt_neox.modeling_gpt_neox import apply_rotary_pos_emb as neox

    q, k, cos, sin = made(dtype=dtype, half=4)
    wanted = neox(q, k, torch.cat((cos, cos), -1), torch.cat((sin, sin), -1))
    for ours, theirs in zip(rotary(q, k, cos, sin), wanted, strict=True):
        assert torch.equal(ours, theirs)


def test_neighbours_as_transformers_does() -> None:
    from transformers.models.gptj.modeling_gptj import apply_rotary_pos_emb as gptj

    q, k, cos, sin = made()
    for ours, x in zip(rotary(q, k, cos, sin, interleaved=True), (q, k), strict=True):
        assert torch.equal(ours, gptj(x.transpose(1, 2), sin, cos).transpose(1, 2))


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize(("d", "half"), [(64, 32), (80, 16), (20, 10), (128, 64)])
def test_value_and_gradients(device: str, interleaved: bool, dtype: torch.dtype, d: int, half: int) -> None:
    q, k, cos, sin = made(device, dtype, d, half)
    grads = [torch.randn_like(x) for x in (q, k)]

    def run(wide: torch.dtype, ours: bool) -> list[torch.Tensor]:
        leaves = [x.detach().to(wide).requires_grad_() for x in (q, k)]
        c, s = cos.to(wide), sin.to(wide)
        if ours:
            outs = rotary(*leaves, c, s, interleaved=interleaved)
        else:
            outs = tuple(by_complex(x, c, s, interleaved) for x in leaves)
        torch.autograd.backward(outs, [grad.to(wide) for grad in grads])
        return [*(out.detach() for out in outs), *(leaf.grad for leaf in leaves)]

    results = run(dtype, True), run(torch.float64, False), run(dtype, False)
    for name, *tensors in zip(("q", "k", "gradient of q", "gradient of k"), *results, strict=True):
        assert_close(*tensors, gradient="gradient" in name, what=name)


def by_complex(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, interleaved: bool) -> torch.Tensor:
    """Pairs as complex numbers, real and imaginary part summed in another order."""
    half = cos.shape[-1]
    pairs = x[..., : 2 * half]
    a, b = (pairs[..., ::2], pairs[..., 1::2]) if interleaved else pairs.split(half, -1)
    cos, sin = cos[:, None], sin[:, None]
    real, imaginary = -(b * sin) + a * cos, sin * a + cos * b
    turned = torch.stack((real, imaginary), -1).flatten(-2) if interleaved else torch.cat((real, imaginary), -1)
    return torch.cat((turned, x[..., 2 * half :]), -1)


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("kind", [torch.int32, torch.int64])
def test_the_cache_gets_its_rows_and_no_others(
    device: str, interleaved: bool, dtype: torch.dtype, kind: torch.dtype
) -> None:
    q, k, cos, sin = made(device, dtype)
    v = torch.randn(2, 2, 5, 24, device=device).to(dtype)
    k_cache = torch.randn(2, 2, 9, 32, device=device).to(dtype)
    v_cache = torch.randn(2, 9, 2, 24, device=device).to(dtype).transpose(1, 2)
    places = torch.tensor([[0, 3, 4, 8, 9], [-1, 2, 1, 0, 7]], dtype=kind, device=device)
    turned_q, turned_k = rotary(q, k, cos, sin, interleaved=interleaved)
    wanted_k, wanted_v = k_cache.clone(), v_cache.clone()
    for b in range(2):
        for t, place in enumerate(places[b].tolist()):
            if 0 <= place < 9:
                wanted_k[b, :, place], wanted_v[b, :, place] = turned_k[b, :, t], v[b, :, t]
    out = rotary_cache_(q, k, v, cos, sin, places, k_cache, v_cache, interleaved=interleaved)
    assert torch.equal(out, turned_q) and torch.equal(k_cache, wanted_k) and torch.equal(v_cache, wanted_v)


def test_one_row_of_angles_for_all_sequences(device: str) -> None:
    q, k, cos, sin = made(device)
    cos, sin = cos[:1], sin[:1]
    every = [x.expand(2, -1, -1).contiguous() for x in (cos, sin)]
    for ours, wanted in zip(rotary(q, k, cos, sin), rotary(q, k, *every), strict=True):
        assert torch.equal(ours, wanted)
    assert rotary(q[:0], k[:0], cos, sin)[0].shape == (0, 6, 5, 32)


def test_opcheck(device: str) -> None:
    q, k, cos, sin = made(device, torch.float16)
    torch.library.opcheck(OPS.rotary.default, (q, k, cos, sin, False))
    places = torch.arange(5, dtype=torch.int32, device=device).expand(2, 5).contiguous()
    caches = [torch.zeros(2, 2, 9, 32, dtype=torch.float16, device=device) for _ in range(2)]
    torch.library.opcheck(OPS.rotary_cache_.default, (q, k, k, cos, sin, places, *caches, True))


def test_what_does_not_go_together_is_an_error() -> None:
    q, k, cos, sin = made()
    for c, s in ((cos, sin[:, :2]), (cos[:, :3], sin[:, :3]), (torch.cat((cos, cos), -1),) * 2, (cos[0], sin[0])):
        with pytest.raises(ArgumentError, match="does not go with q"):
            rotary(q, k, c, s)
    cache = torch.zeros(2, 2, 9, 32)
    with pytest.raises(ArgumentError, match="places="):
        rotary_cache_(q, k, k, cos, sin, torch.zeros(5, dtype=torch.int32), cache, cache)


def test_cost_counts_what_is_read_and_written() -> None:
    assert cost(2, 3, 8, 2, 64, 2) == (2 * 6 * 10 * 64 * 2, 3 * 6 * 10 * 64)
    assert cost(2, 3, 8, 2, 64, 2, cache=True)[0] == 2 * 6 * 12 * 64 * 2
