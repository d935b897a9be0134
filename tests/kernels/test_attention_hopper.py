"""What the Hopper attention takes, and its descriptors; that it is right is shown in test_attention.py."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import pytest
import torch

from onegpu.kernels.attention import attention
from tests.triton_tools import needs_triton


@needs_triton
def test_descriptors_see_any_strides() -> None:
    from onegpu.kernels.attention_hopper import descriptor

    x = torch.zeros(3, 4, 50, 96, dtype=torch.float16).transpose(1, 2)  # memory: batch, head, row
    made = descriptor(x, 64)
    assert (made.shape, made.strides) == ([3, 4, 50, 96], [19200, 4800, 96, 1])
    assert made.block_shape == [1, 1, 64, 128] and made.base is x
    packed = descriptor(torch.zeros(70, 2, 64, dtype=torch.float16), 128)
    assert (packed.shape, packed.strides, packed.block_shape) == ([1, 2, 70, 64], [8, 64, 128, 1], [1, 1, 128, 64])


@needs_triton
@pytest.mark.parametrize("case", ["turned", "sliced", "odd base", "short rows", "stride 0", "one row"])
def test_what_tma_takes(case: str) -> None:
    from onegpu.kernels.attention_hopper import _for_tma

    x = torch.zeros(2, 6, 4, 64, dtype=torch.bfloat16)
    tensor, taken = {
        "turned": (x.transpose(1, 2), True),
        "sliced": (x[:, :, 1:3], True),
        "odd base": (torch.zeros(x.numel() + 1, dtype=x.dtype)[1:].view(x.shape), False),
        "short rows": (torch.zeros(2, 6, 4, 60, dtype=x.dtype), False),
        "stride 0": (x[:, :1].expand(2, 6, 4, 64), False),
        "one row": (torch.zeros(1, 1, 1, 64, dtype=x.dtype).as_strided((1, 1, 1, 64), (3, 3, 3, 1)), True),
    }[case]
    assert _for_tma(tensor) is taken


@needs_triton
def test_serves_nothing_elsewhere() -> None:
    from onegpu.kernels.attention_hopper import boxed, serves

    assert [boxed(d) for d in (33, 64, 72, 128, 160, 256)] == [64, 64, 128, 128, 256, 256]
    assert not serves(*(torch.zeros(1, 8, 2, 64) for _ in range(3)))


@needs_triton
def test_short_sequences_are_dealt_out() -> None:
    from onegpu.kernels.attention_hopper import _dense

    def dense(*given: Any, memory_bound: bool = False) -> Any:
        return _dense(*given, 132, memory_bound)

    dealt = {"DRAW": False}
    assert dense(64, True, True, 2, 512) == (dealt | {"ROTATE": 1}, 66)
    assert dense(128, False, True, 4, 512) == (dealt | {"ROTATE": 0}, 512)
    for whole in (True, False):  # more than 256 and up to 512 queries
        for wide, n_m in ((64, 4), (128, 4), (128, 3)):
            assert dense(wide, True, whole, n_m, 512) == (dealt | {"ROTATE": 1}, 16)
            assert dense(wide, True, whole, n_m, 512, memory_bound=True) == ({}, 16)
    assert dense(128, True, True, 1, 512) == (dealt | {"ROTATE": 0}, 512)
    assert dense(64, False, True, 4, 64) == (dealt | {"ROTATE": 0}, 64)
    assert dense(128, True, True, 8, 64) == ({}, 16)
    assert dense(64, True, True, 8, 64) == ({"ST": 4}, 16)
    ahead = {"AHEAD": True, "HALF": 0}  # of head dim 64, for rows of as many blocks of keys as make up for it
    assert dense(64, True, True, 31, 8) == ({"ST": 3}, 8)
    assert dense(64, True, True, 32, 8) == dense(64, False, True, 9, 8) == ({"ST": 3} | ahead, 8)
    assert dense(64, False, True, 8, 64) == ({"ST": 4} | ahead, 16)
    assert dense(256, True, True, 4, 8) == dense(128, True, False, 2, 8) == ({}, 8)  # not measured


ENDS = torch.tensor([0, 100, 300], dtype=torch.int32)
ROWS = torch.tensor([[0, 150], [10, 100]], dtype=torch.int32)


@needs_triton
@pytest.mark.parametrize("how", ["dense", "one block", "padded", "padded keys", "packed", "another head dim of v"])
def test_a_forward_is_launched_with_what_its_kernel_was_bound_to(how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Other tensors of the same layout, in the same order, and those that the variant does not read left out."""
    from onegpu.kernels import attention_hopper as hopper

    bound: list[list[Any]] = []
    launched: list[tuple[torch.Tensor, ...]] = []

    def bind(kernel: Any, grid: Any, *args: Any, **constants: Any) -> Any:
        bound.append([getattr(x, "base", x) for x in args if hasattr(x, "base") or isinstance(x, torch.Tensor)])
        return lambda *given: launched.append(given)

    monkeypatch.setattr(hopper, "triton_bind", bind)
    monkeypatch.setattr(hopper, "processors", lambda device: 4)
    counter = torch.zeros(1, dtype=torch.int32)
    monkeypatch.setattr(hopper, "_counter", lambda device: counter)
    heads, d_v = 1 if how == "one block" else 8, 96 if how == "another head dim of v" else 64
    shape = (300,) if how == "packed" else (2, 150)

    def tensors() -> list[torch.Tensor]:
        return [torch.zeros(*shape, heads, d, dtype=torch.bfloat16) for d in (64, 64, d_v)]

    q_rows = {"padded": ROWS, "packed": ENDS}.get(how)
    k_rows = ROWS if how == "padded keys" else q_rows
    told = (None, None, q_rows, k_rows) if how == "packed" else (q_rows, k_rows, None, None)
    forward = hopper.forward(*tensors(), 0.1, -1, 0, *told, 200)
    given = tensors()
    out, lse = forward(*given, q_rows, k_rows)
    assert out.shape == (*shape, heads, d_v) and out.is_contiguous() and out.dtype == torch.bfloat16
    assert lse.shape == ((heads, 300) if how == "packed" else (2, heads, 150)) and lse.is_contiguous()
    assert lse.dtype == torch.float32
    written = [out, out] if how in ("padded", "packed") else [out]
    rows = [x for x in (q_rows, k_rows) if x is not None]
    expected = [*given, *written, lse, *rows, *([] if how == "one block" else [counter])]
    assert len(launched[0]) == len(expected) and all(x is y for x, y in zip(launched[0], expected, strict=True))
    assert [(x.shape, x.dtype) for x in bound[0]] == [(x.shape, x.dtype) for x in launched[0]]


@needs_triton
@pytest.mark.parametrize(("left", "right", "heads"), [(-1, 0, 3), (100, 0, 16), (700, 100, 4), (100, -1, 3)])
def test_as_many_heads_at_once_as_have_their_keys_in_the_cache(
    left: int, right: int, heads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    from onegpu.kernels import attention_hopper as hopper

    sections: list[int] = []
    names = [x.name for x in hopper.attention_sm90.forward_kernel.params]
    monkeypatch.setattr(hopper, "triton_bind", lambda kernel, grid, *x, **_: sections.append(x[names.index("section")]))
    monkeypatch.setattr(hopper, "processors", lambda device: 4)
    monkeypatch.setattr(hopper, "_counter", lambda device: torch.zeros(1, dtype=torch.int32))
    monkeypatch.setattr(hopper, "_L2_BYTES", 3 * 1500 * 256)  # keys and values of three heads
    x = torch.zeros(2, 1500, 8, 64, dtype=torch.bfloat16)
    hopper.forward(x, x, x, 0.1, left, right, None, None, None, None, 1500)
    assert sections == [heads]


def constants_of(
    monkeypatch: pytest.MonkeyPatch, s_q: int, s_k: int, heads: int, d: int, *sides: int, wide_memory: bool = False
) -> dict[str, Any]:
    """What a dense forward is compiled for, with as many multiprocessors as an H100 has, and which kernel it is."""
    from onegpu.kernels import attention_hopper as hopper

    made: dict[str, Any] = {}

    def bind(kernel: Any, grid: Any, *args: Any, **constants: Any) -> None:
        boxes = [x.block_shape for x in args if hasattr(x, "block_shape")]
        made.update(constants, kernel=kernel.__name__, boxes=boxes, kinds=list(map(type, args)))

    monkeypatch.setattr(hopper, "triton_bind", bind)
    monkeypatch.setattr(hopper, "processors", lambda device: 132)
    monkeypatch.setattr(hopper, "_wide_memory", lambda device: wide_memory)
    monkeypatch.setattr(hopper, "_counter", lambda device: torch.zeros(1, dtype=torch.int32))
    q, k = torch.zeros(1, s_q, heads, d).bfloat16(), torch.zeros(1, s_k, heads, d).bfloat16()
    hopper.forward(q, k, k, 0.1, *sides, None, None, None, None, s_q)
    return made


@needs_triton
@pytest.mark.parametrize("d", [64, 128, 256])
def test_a_short_prompt_and_a_single_query_share_a_kernel(d: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The one for few tiles, whatever the prompt's length and with or without a diagonal."""
    prompt = constants_of(monkeypatch, 300, 300, 32, d, -1, 0)
    assert prompt["kernel"] == "few_kernel" and prompt["num_warps"] == 4 and not prompt["LEFT"]
    assert all(constants_of(monkeypatch, 1, n, 32, d, -1, -1) == prompt for n in (1, 64, 128, 129, 193, 301, 5000))
    assert all(constants_of(monkeypatch, n, n, 32, d, -1, right) == prompt for n in (3, 128, 512) for right in (0, -1))
    assert constants_of(monkeypatch, 128, 5000, 32, d, -1, 0) == prompt
    assert constants_of(monkeypatch, 300, 300, 32, d, 100, 0)["LEFT"]
    for s_q, heads in ((513, 32), (1025, 1)):  # more tiles than run at once, or long for their number
        assert constants_of(monkeypatch, s_q, s_q, heads, d, -1, 0)["kernel"] == "forward_kernel"
    assert not constants_of(monkeypatch, 2048, 2048, 8, d, -1, 0)["HALF"]  # where each block has one tile


@needs_triton
@pytest.mark.parametrize(
    ("lengths", "left", "right", "half"),
    [
        ((1024, 1024), -1, 0, 1),
        ((1000, 1000), -1, 0, 1),
        ((1024, 1024), 100, 0, 1),
        ((448, 1024), -1, 0, 2),
        ((1024, 448), -1, 0, 2),
        ((1024, 1152), -1, 0, 1),
        ((1000, 1024), -1, 0, 0),  # the diagonal cuts two blocks of some rows
        ((1024, 1024), -1, 64, 0),  # or ends past the last key
        ((1024, 1024), -1, -1, 0),
    ],
)
def test_who_sees_half_of_the_block_on_the_diagonal(
    lengths: tuple[int, int], left: int, right: int, half: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = constants_of(monkeypatch, *lengths, 48, 128, left, right)
    assert made["HALF"] == half and not made["AHEAD"]


@needs_triton
@pytest.mark.parametrize(
    ("queries", "keys", "head_dim", "wide", "draws"),
    [
        *((512, 512, 72, False, False), (500, 500, 72, False, False), (512, 576, 72, False, True)),
        *((512, 512, 128, False, True), (512, 512, 128, True, False)),
    ],
)
def test_tiles_of_up_to_512_queries_are_dealt_out(
    queries: int, keys: int, head_dim: int, wide: bool, draws: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """But where an H100's memory is what they wait for."""
    made = constants_of(monkeypatch, queries, keys, 200, head_dim, -1, 0, wide_memory=wide)
    assert (made["DRAW"], made["ROTATE"]) == (draws, int(not draws)) and made["HALF"]


@needs_triton
def test_a_counter_is_of_one_call(monkeypatch: pytest.MonkeyPatch) -> None:
    from onegpu.kernels import attention_hopper as hopper

    stream, capturing = 1, False
    monkeypatch.setattr(hopper, "_sheets", defaultdict(list))
    monkeypatch.setattr(hopper, "SHEET", 3)
    monkeypatch.setattr(hopper, "_zeros", lambda size, device: torch.zeros(size, dtype=torch.int32))
    monkeypatch.setattr(hopper, "current_device", lambda: 0)
    monkeypatch.setattr(hopper, "raw_stream", lambda device: stream)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: capturing)
    made = []
    for stream, capturing in ((1, False), (1, True), (2, False), (1, False)):  # noqa: B007
        made += [hopper._counter(device) for device in (0, 0, 0, 0, 1)]
    assert not any(x[0] for x in made) and not any(x.data_ptr() % 16 for x in made)
    assert len({x.data_ptr() for x in made}) == len(made)
    assert {at: len(sheet) for at, sheet in hopper._sheets.items()} == {(0, 1): 1, (0, 2): 2}


@pytest.mark.gpu
def test_calls_on_two_streams(monkeypatch: pytest.MonkeyPatch) -> None:
    """On two streams at once, whatever is masked, with more tiles than blocks; and the answers stay what they were."""
    if torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("Hopper's")
    from onegpu.kernels import attention_hopper as hopper

    monkeypatch.setattr(hopper, "_sheets", defaultdict(list))
    monkeypatch.setattr(hopper, "SHEET", 3)  # so that sheets are made while kernels run
    tensors = [torch.randn(4, 1061, 16, 128, device="cuda", dtype=torch.bfloat16) for _ in range(3)]
    rows = torch.tensor([[0, 1061], [5, 300], [0, 0], [1000, 61]], dtype=torch.int32, device="cuda")
    ends = torch.tensor([0, 700, 701, 701, 4244], dtype=torch.int32, device="cuda")
    padded, packed = {"q_range": rows, "k_range": rows}, {"cu_seqlens_q": ends, "cu_seqlens_k": ends}
    upstream = torch.randn_like(tensors[0])

    def once(mask: dict[str, Any]) -> list[torch.Tensor]:
        given = [x.flatten(0, 1) if mask is packed else x for x in tensors]
        given = [x.detach().requires_grad_() for x in given]
        out = attention(*given, causal=True, **mask)  # type: ignore[arg-type]
        assert isinstance(out, torch.Tensor)
        return [out, *torch.autograd.grad(out, given, upstream.view_as(out))[1:]]  # dQ differs in its last bits

    masks: list[dict[str, Any]] = [{}, padded, packed, {"window": (200, -1)}]
    expected = [once(mask) for mask in masks]
    torch.cuda.synchronize()
    streams = torch.cuda.Stream(), torch.cuda.Stream()
    for _ in range(10):
        for i in range(len(masks)):
            got = []
            for j, stream in enumerate(streams):
                with torch.cuda.stream(stream):
                    got.append(((i + j) % len(masks), once(masks[(i + j) % len(masks)])))
            torch.cuda.synchronize()
            for at, made in got:
                assert all(map(torch.equal, made, expected[at]))
    assert len(hopper._sheets) >= 3
