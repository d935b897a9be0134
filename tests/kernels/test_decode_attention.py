"""Decode attention: the definition against attention key by key, and on a GPU the kernels against the definition."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as torch_functional

from onegpu.errors import ArgumentError
from onegpu.kernels.decode_attention import cost, decode_attention, splits
from tests.compare import assert_close

OP = torch.ops.onegpu.decode_attention.default


def inputs(
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
    *,
    h: int = 4,
    h_kv: int = 2,
    t: int = 1,
    d: int = 64,
    d_v: int | None = None,
    room: int = 48,
    lengths: tuple[int, ...] = (48, 17),
    first: tuple[int, ...] | None = None,
    alibi: bool = False,
    tokens_first: bool = False,
    **options: Any,
) -> tuple[tuple[torch.Tensor, ...], dict[str, Any]]:
    """Arguments of ``decode_attention``; what lies past the lengths in the cache, or before ``first``, is NaN."""

    def cache(width: int) -> torch.Tensor:
        shape = (len(lengths), room, h_kv, width) if tokens_first else (len(lengths), h_kv, room, width)
        values = torch.randn(shape, device=device).to(dtype)
        values = values.transpose(1, 2) if tokens_first else values
        for i, length in enumerate(lengths):
            values[i, :, length:] = float("nan")
            values[i, :, : first[i] if first else 0] = float("nan")
        return values

    q = torch.randn(len(lengths), h, t, d, device=device).to(dtype)
    k, v = cache(d), cache(d_v or d)
    length = torch.tensor(lengths, dtype=torch.int32, device=device)
    starts = torch.tensor(first, dtype=torch.int32, device=device) if first else None
    slopes = torch.rand(h, device=device) / 4 if alibi else None
    return (q, k, v, length), {"first": starts, "slopes": slopes, **options}


def by_key(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    length: torch.Tensor,
    *,
    first: torch.Tensor | None = None,
    slopes: torch.Tensor | None = None,
    window: int = 0,
    softcap: float = 0.0,
    scale: float | None = None,
) -> torch.Tensor:
    """The same, one query and head at a time over the keys that it sees, in the dtype of q."""
    b, h, t, d = q.shape
    out = q.new_zeros(b, h, t, v.shape[-1])
    for i in range(b):
        n = int(length[i])
        for j in range(t):
            at = n - t + j
            begin = max(int(first[i]) if first is not None else 0, at + 1 - window if window else 0)
            if begin > at:
                continue
            for head in range(h):
                kv = head * k.shape[1] // h
                keys, values = k[i, kv, begin : at + 1], v[i, kv, begin : at + 1]
                scores = (q[i, head, j] * (d**-0.5 if scale is None else scale)) @ keys.T
                if softcap:
                    scores = softcap * torch.tanh(scores / softcap)
                if slopes is not None:
                    distance = torch.arange(begin, at + 1, device=q.device) - at
                    scores = scores + (slopes[head] * distance).to(scores.dtype)
                out[i, head, j] = torch_functional.softmax(scores, -1) @ values
    return out


def check(arguments: tuple[torch.Tensor, ...], options: dict[str, Any], what: str = "") -> torch.Tensor:
    """Within the rule of ``compare``; returns the result."""
    out = decode_attention(*arguments, **options)
    *tensors, length = arguments
    reference = by_key(*(x.double() for x in tensors), length, **options)
    assert_close(out, reference, by_key(*arguments, **options), what=what)
    return out


CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "one head each": {"h": 8, "h_kv": 8, "tokens_first": True},
    "one key head": {"h_kv": 1, "t": 3},
    "eight queries": {"t": 8, "lengths": (8, 40)},
    "fewer keys than queries": {"t": 4, "lengths": (2, 1)},
    "left padding": {"first": (5, 16), "t": 2},
    "window": {"window": 7, "t": 3},
    "window past the length": {"window": 100},
    "softcap": {"softcap": 2.5},
    "alibi": {"alibi": True, "t": 2},
    "all": {"alibi": True, "t": 2, "first": (3, 1), "window": 11, "softcap": 20.0, "scale": 0.3},
    "other value width": {"d": 80, "d_v": 48},
    "odd width": {"d": 59, "d_v": 59, "room": 63, "lengths": (63, 1)},
}


@pytest.mark.parametrize("case", CASES)
def test_agrees_with_attention_key_by_key(device: str, case: str) -> None:
    check(*inputs(device, **{"h": 24, "h_kv": 8, **CASES[case]}))  # many heads: the largest of few errors scatters


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_in_16_bits(device: str, dtype: torch.dtype) -> None:
    check(*inputs(device, dtype, t=2, h=6, d=72))


@pytest.mark.parametrize("case", ["plain", "all"])
def test_opcheck(device: str, case: str) -> None:
    (q, k, v, length), options = inputs(device, **CASES[case])
    k, v = k.nan_to_num(), v.nan_to_num()  # opcheck compares without equal_nan
    scale, window, softcap = options.get("scale", 0.1), options.get("window", 0), options.get("softcap", 0.0)
    torch.library.opcheck(OP, (q, k, v, length, options["first"], scale, window, softcap, options["slopes"]))


def test_a_query_that_sees_nothing_gets_zeros(device: str) -> None:
    out = decode_attention(*(made := inputs(device, lengths=(0, 9), first=(0, 9), t=2))[0], **made[1])
    assert out.count_nonzero() == 0 and out.isfinite().all()
    (q, k, v, length), _ = inputs(device)
    assert decode_attention(q, k[:, :, :0], v[:, :, :0], length).count_nonzero() == 0
    assert decode_attention(q[:0], k[:0], v[:0], length[:0]).shape == (0, 4, 1, 64)


def test_a_length_past_the_cache_counts_as_the_cache(device: str) -> None:
    (q, k, v, length), _ = inputs(device, lengths=(48, 48))
    assert torch.equal(decode_attention(q, k, v, length), decode_attention(q, k, v, length + 5))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_nan_and_infinity_stay_visible(device: str, value: float) -> None:
    for which in range(3):
        arguments, _ = inputs(device)
        arguments[which][1, 1, 0] = value
        out = decode_attention(*arguments)
        heads = [1] if which == 0 else [2, 3]  # of the query, or those that share the key head
        assert out[0].isfinite().all() and not out[1, heads].isfinite().any(-1).any()
        assert out[1, [i for i in range(4) if i not in heads]].isfinite().all()


def test_memory_has_heads_beside_each_other(device: str) -> None:
    (q, k, v, length), _ = inputs(device, t=3, d_v=32)
    out = decode_attention(q, k, v, length)
    assert out.shape == (2, 4, 3, 32) and out.transpose(1, 2).is_contiguous()


@pytest.mark.parametrize(
    ("change", "names"),
    [
        (lambda q, k, v: (q.repeat(1, 1, 9, 1), k, v), "9 queries"),
        (lambda q, k, v: (q[:, :, :0], k, v), "0 queries"),
        (lambda q, k, v: (q[:, :3], k, v), "does not go with"),
        (lambda q, k, v: (q, k[..., :32], v), "does not go with"),
        (lambda q, k, v: (q, k, v[:, :, 1:]), "does not go with"),
        (lambda q, k, v: (q, k.half(), v), "is not the dtype"),
    ],
)
def test_what_does_not_go_together_is_an_error(change: Any, names: str) -> None:
    (q, k, v, length), _ = inputs()
    with pytest.raises(ArgumentError, match=names):
        decode_attention(*change(q, k, v), length)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"length": torch.tensor([3, 4])}, r"^length=.* is torch.int64 \[2\], not a whole number .* pass int32 \[2\]"),
        ({"length": torch.tensor([3], dtype=torch.int32)}, r"^length=.*not a whole number for each sequence"),
        ({"length": None}, r"^length=None is no tensor. pass int32 \[2\]"),
        ({"first": [0, 1]}, r"^first=\[0, 1\] is no tensor"),
        ({"first": torch.zeros(2)}, r"^first=.*not a whole number for each sequence"),
        ({"slopes": torch.ones(3)}, r"^slopes=\[3\] is not one slope for each query head. pass float32 \[4\]"),
        ({"implementation": "mine"}, r"^implementation='mine' is not known"),
        ({"window": -2}, "^window=-2 is no number of keys. pass 0 for no limit"),
    ],
)
def test_bad_options_are_named(options: dict[str, Any], says: str) -> None:
    q, k = torch.randn(2, 4, 1, 16), torch.randn(2, 2, 6, 16)
    with pytest.raises(ArgumentError, match=says):
        decode_attention(q, k, k, **{"length": torch.tensor([3, 4], dtype=torch.int32)} | options)


def test_splits_fill_the_gpu_and_no_more() -> None:
    assert splits(8, 32768, 132) == 16  # a program for each SM
    assert splits(32, 4096, 132) == 4
    assert splits(70, 4096, 132) == 3  # two for each: 70 of 132 would leave half of it idle
    assert splits(120, 4096, 132) == splits(128, 4096, 132) == 1
    assert splits(8, 300, 132) == 3  # none has fewer than 128 keys
    assert splits(1000, 4096, 132) == 1
    assert splits(1000, 32768, 132) == 4  # a long sequence is not left to one program
    assert splits(1, 0, 132) == 1


def test_cost_counts_keys_values_queries_and_output() -> None:
    assert cost(b=2, h=8, h_kv=2, t=1, keys=100, d=64, d_v=32, itemsize=2) == (
        2 * (2 * 2 * 100 * 96 + 2 * 8 * 96),
        2 * 2 * 8 * 100 * 96,
    )


@pytest.mark.gpu
@pytest.mark.parametrize("implementation", ["auto", "portable"])
@pytest.mark.parametrize("d", [64, 72, 80, 96, 112, 128, 192, 256])
@pytest.mark.parametrize(
    ("dtype", "t", "h", "h_kv"),
    [(torch.float16, 1, 8, 2), (torch.bfloat16, 3, 4, 4), (torch.bfloat16, 8, 71, 1), (torch.float32, 2, 4, 1)],
)
def test_on_a_gpu(dtype: torch.dtype, t: int, d: int, h: int, h_kv: int, implementation: str) -> None:
    arguments, options = inputs(
        "cuda", dtype, h=h, h_kv=h_kv, t=t, d=d, room=1100, lengths=(1100, 513), first=(0, 40), tokens_first=d == 96
    )
    options["implementation"] = implementation
    out = decode_attention(*arguments, **options)
    *tensors, length = arguments
    reference = OP(*(x.cpu().double() for x in tensors), length.cpu(), options["first"].cpu(), d**-0.5, 0, 0.0, None)
    assert_close(out.cpu(), reference, _by_torch(*arguments, options["first"]).cpu())
    assert torch.equal(out, decode_attention(*arguments, **options))


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("b", "h", "h_kv", "d", "keys"),
    [
        (1, 32, 8, 128, 32768),  # many parts
        (1, 32, 32, 128, 4096),
        (16, 32, 8, 128, 4096),  # one part
        (1, 32, 8, 128, 4096),  # clusters
        (1, 32, 32, 128, 512),
        (4, 71, 1, 64, 4096),  # several tiles
    ],
)
@pytest.mark.parametrize("implementation", ["auto", "portable"])
def test_benchmarked_shapes_on_a_gpu(b: int, h: int, h_kv: int, d: int, keys: int, implementation: str) -> None:
    lengths = tuple(keys - 5 * i for i in range(b))
    arguments, _ = inputs("cuda", torch.bfloat16, h=h, h_kv=h_kv, d=d, room=keys, lengths=lengths)
    *tensors, length = arguments
    reference = OP(*(x.double() for x in tensors), length, None, d**-0.5, 0, 0.0, None)
    out = decode_attention(*arguments, implementation=implementation)
    assert_close(out, reference, _by_torch(*arguments, torch.zeros_like(length)))


def _by_torch(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, length: torch.Tensor, first: torch.Tensor
) -> torch.Tensor:
    """torch's own attention, sequence by sequence, in the dtype of q."""
    out = torch.empty(*q.shape[:3], v.shape[-1], dtype=q.dtype, device=q.device)
    for i, (begin, end) in enumerate(zip(first.tolist(), length.tolist(), strict=True)):
        keys, values = (x[i, :, begin:end].repeat_interleave(q.shape[1] // x.shape[1], 0) for x in (k, v))
        mask = torch.ones(q.shape[2], end - begin, dtype=torch.bool, device=q.device).tril(end - begin - q.shape[2])
        out[i] = torch_functional.scaled_dot_product_attention(q[i], keys, values, mask)
    return out


@pytest.mark.gpu
def test_one_graph_serves_every_length() -> None:
    (q, k, v, length), _ = inputs("cuda", torch.float16, room=4096, lengths=(4096, 4096), d=128)
    decode_attention(q, k, v, length)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = decode_attention(q, k, v, length)
    for lengths in ((4096, 1), (77, 2000), (0, 129)):
        length.copy_(torch.tensor(lengths))
        graph.replay()
        assert torch.equal(out, decode_attention(q, k, v, length)), lengths


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("b", "h", "h_kv", "d", "keys"),
    [(1, 32, 8, 128, 32768), (1, 32, 32, 128, 512), (4, 71, 1, 64, 4096), (1, 8, 8, 128, 100), (16, 32, 8, 128, 1024)],
)
def test_a_chain_of_calls_that_start_early(b: int, h: int, h_kv: int, d: int, keys: int) -> None:
    """Each call's queries are the output of the one before, in memory that was poisoned."""
    lengths = tuple(max(1, keys - 37 * i) for i in range(b))
    (q, k, v, length), _ = inputs("cuda", torch.bfloat16, room=keys, lengths=lengths, h=h, h_kv=h_kv, d=d)
    k, v = k.nan_to_num(), v.nan_to_num()
    wanted = [q]
    for _ in range(12):
        wanted.append(decode_attention(wanted[-1], k, v, length, scale=1.0))
        torch.cuda.synchronize()
    graph, start = torch.cuda.CUDAGraph(), q.clone()
    with torch.cuda.graph(graph):
        made = [start]
        for _ in range(12):
            made.append(decode_attention(made[-1], k, v, length, scale=1.0))
    for _ in range(20):
        for out in made[1:]:
            out.fill_(float("nan"))
        graph.replay()
        assert all(torch.equal(out, want) for out, want in zip(made, wanted, strict=True))


@pytest.mark.gpu
def test_offset_and_expanded_tensors() -> None:
    (q, k, v, length), _ = inputs("cuda", torch.float16, d=64, room=300, lengths=(300, 200))
    k, v = k.nan_to_num(), v.nan_to_num()
    wanted = decode_attention(q, k, v, length, implementation="portable")
    shifted = [torch.empty(x.numel() + 1, dtype=x.dtype, device="cuda")[1:].view(x.shape).copy_(x) for x in (q, k, v)]
    assert torch.equal(decode_attention(*shifted, length), wanted)
    wanted = decode_attention(q, k, v, length)
    one = decode_attention(q, k[:1].expand_as(k), v[:1].expand_as(v), length)
    assert torch.equal(one[0], wanted[0])
