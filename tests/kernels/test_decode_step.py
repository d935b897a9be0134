"""The ops of a decoding step: kernels, emulated and on a GPU, against the definitions; those against torch."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from onegpu.kernels import decode_step as ops
from onegpu.kernels import decode_step_cuda as gpu
from tests.compare import assert_close, assert_same_nonfinite
from tests.decode_structures import matrix, moved
from tests.kernels.emulated_step import DEVICES, on

DTYPES = [torch.bfloat16, torch.float16]
FORMS = ["16bit", "int8", "nf4", "nested"]
# form, rows, and columns or the activation
NORMS = [("16bit", 1, 192), ("16bit", 8, 128), ("int8", 3, 448), ("nf4", 1, 192), ("fp4", 8, 128),
         ("nested", 3, 448), ("16bit", 16, 128), ("nf4", 11, 192), ("int8", 13, 128)]  # fmt: skip
GATED = [("16bit", 2, "silu"), ("int8", 5, "gelu_tanh"), ("nf4", 1, "gelu"), ("nested", 2, "silu"),
         ("16bit", 9, "silu"), ("nf4", 16, "silu")]  # fmt: skip


def made(form: str, rows: tuple[int, ...], columns: int, dtype: torch.dtype) -> ops.Matrix:
    return matrix("nf4" if form == "nested" else form, rows, columns, dtype, nested=form == "nested")


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def reordered(x: torch.Tensor, m: ops.Matrix, dtype: torch.dtype) -> torch.Tensor:
    """x W^T + b by torch in `dtype`."""
    bias = torch.cat([part.bias for part in m.parts])
    return x.to(dtype).flip(-1) @ m.dense().to(dtype).flip(-1).t() + bias


def check(y: torch.Tensor, reference: torch.Tensor, other: torch.Tensor, what: str) -> None:
    assert_close(y.cpu().to(other.dtype), reference, other, what=what)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("case", NORMS, ids=str)
def test_products_of_a_norm(device: str, case: tuple[str, int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    form, rows, columns = case
    dtype = DTYPES[rows % 2]
    m, h = made(form, (48, 16, 16), columns, dtype), random(rows, columns)
    norm = ops.Norm("rms", (random(columns) * 0.1 + 1).to(dtype), 1e-5)
    x = norm(h)
    reference = m.multiply(x)
    place = on(device, monkeypatch)
    out = torch.full((rows, m.rows), float("nan"), device=place)
    ops.product(ops.Stream(h.to(place), dtype, moved(norm, place)), moved(m, place), "store", out)
    check(out, reference, reordered(x, m, dtype), f"{form} {dtype}")


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("case", GATED, ids=str)
def test_gated_products(device: str, case: tuple[str, int, str], monkeypatch: pytest.MonkeyPatch) -> None:
    form, rows, act = case
    dtype = DTYPES[rows % 2]
    m, h = made(form, (37, 37), 128, dtype), random(rows, 128)
    norm = ops.Norm("rms", (random(128) * 0.1 + 1).to(dtype), 1e-5)
    if form in ("nf4", "fp4", "nested"):
        m = made(form, (36, 36), 128, dtype)
    x = norm(h)
    gate, up = m.multiply(x).chunk(2, -1)
    other_gate, other_up = reordered(x, m, dtype).chunk(2, -1)
    place = on(device, monkeypatch)
    out = torch.full((rows, m.rows // 2), float("nan"), dtype=dtype, device=place)
    ops.product(ops.Stream(h.to(place), dtype, moved(norm, place)), moved(m, place), "gated", out, act=act)
    check(out, ops.activation(act, gate) * up, ops.activation(act, other_gate) * other_up, f"{form} {act}")


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("form", FORMS)
def test_products_that_are_added(device: str, form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    m, x, h = made(form, (70,), 448, torch.bfloat16), random(4, 448).bfloat16(), random(4, 70)
    x[0] *= 1e5  # past what fp16 holds
    x[2, 7], x[3, 9] = float("nan"), float("inf")
    reference = h + m.multiply(x.float())
    other = h.bfloat16() + reordered(x, m, torch.bfloat16)
    place = on(device, monkeypatch)
    out = h.to(place)
    ops.product(x.to(place), moved(m, place), "add", out)
    for row in range(2):
        check(out[row], reference[row], other[row], f"{form}, row {row}")
    assert_same_nonfinite(out.cpu()[2:], reference[2:])


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("splits", [1, 3, 8])
def test_the_attentions_parts_are_put_together(device: str, splits: int, monkeypatch: pytest.MonkeyPatch) -> None:
    m, h = matrix("16bit", (64,), 128, torch.bfloat16), random(2, 64)
    sums = torch.stack([random(2, 2, splits) * 3, random(2, 2, splits).abs() + 0.1], -1)
    if splits > 1:
        sums[:, :, 1] = torch.tensor([float("-inf"), 0.0])  # a part without keys
    parts = ops.Attended(random(2, 2, splits, 64, seed=1).bfloat16(), sums)
    x = ops.combine(parts)
    reference, other = h + m.multiply(x), h.bfloat16() + reordered(x, m, torch.bfloat16)
    place = on(device, monkeypatch)
    out = h.to(place)
    ops.product(moved(parts, place), moved(m, place), "add", out)
    check(out, reference, other, f"{splits} parts")


# heads (query, kv, size), length of the cache, position, first positions, window, rotated, norms (of all heads: "all")
ATTENTION = [
    ((2, 2, 64), 256, 100, None, None, 64, False),
    ((8, 2, 128), 256, 200, [0, 37], None, 128, True),
    ((6, 2, 96), 64, 150, [0, 120], 64, 48, False),  # the window is a ring
    ((2, 2, 64), 128, 0, None, None, 0, False),
    ((8, 1, 32), 256, 100, None, 40, 32, False),
    ((2, 2, 32), 64, 64, None, 64, 32, False),
    ((2, 1, 64), 256, 100, [100, 2**30], None, 64, True),  # rows that see nothing but themselves
    ((6, 2, 80), 64, 150, [0, 120], 64, 20, "all", {"clip": 0.7, "one": 1.0}),
    (
        (9, 1, 72),
        256,
        101,
        [0, 30],
        None,
        0,
        False,
        {"cap": 1.5, "slopes": True, "grouped": True},
    ),  # two chunks of heads
    ((2, 2, 256), 128, 90, None, 40, 256, False, {"grouped": True}),
]

LAYOUTS = {"one head a block": {"groups": 1}, "two": {"groups": 2}}


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("case", ATTENTION, ids=range(len(ATTENTION)))
def test_attention(device: str, case: tuple, layout: str, monkeypatch: pytest.MonkeyPatch) -> None:
    (query, kv, size), length, position, first, window, rotated, norms, *more = case
    rows, dtype = len(first or [0]), DTYPES[position % 2]
    inv_freq = 100.0 ** (-torch.arange(0, rotated, 2) / rotated) if rotated else None
    heads = ops.Heads(query, kv, size, size**-0.5, window, inv_freq, 1.1)
    if norms:
        of = (query * size, kv * size) if norms == "all" else (size, size)
        heads = heads._replace(q_gain=random(of[0]).to(dtype), k_gain=random(of[1], seed=1).to(dtype), eps=1e-6)
    if more:
        slopes = torch.linspace(0.02, 0.3, query) if more[0].get("slopes") else None
        heads = heads._replace(**{**more[0], "slopes": slopes})
    qkv, at = random(rows, heads.width), torch.tensor([position])
    begin = None if first is None else torch.tensor(first, dtype=torch.int32)
    turn = torch.full((rows, 1), position) - (0 if begin is None else begin.clamp(max=position).long()[:, None])
    keys, values = (random(rows, kv, length, size, seed=s).to(dtype) for s in (2, 3))
    k, v = keys.clone(), values.clone()
    wanted = ops.Attended(torch.empty(rows, query, 1, size), torch.empty(rows, query, 1, 2))
    exact = [t.float() for t in (k, v)]
    ops.attend(qkv, heads, *exact, at, turn, begin, wanted)
    ago = (position % length - torch.arange(length)) % length
    starts = torch.zeros(rows, dtype=torch.int64) if begin is None else begin.long()
    hidden = ~((ago <= position - starts[:, None]) & (ago < (window or length)) | (ago == 0))
    for t in (k, v):  # what a row must not read
        t.masked_fill_(hidden[:, None, :, None], float("nan"))
    place = on(device, monkeypatch)
    k, v = k.to(place), v.to(place)
    got = ops.Attended(
        torch.full((rows, query, 3, size), float("nan"), dtype=dtype, device=place),
        torch.full((rows, query, 3, 2), float("nan"), device=place),
    )
    arguments = qkv.to(place), moved(heads, place), k, v, at.to(place), turn.to(place), moved(begin, place), got
    gpu.attend(*arguments, **LAYOUTS[layout])
    monkeypatch.undo()
    reference = wanted.values[:, :, 0].flatten(1)
    slot = position % length
    rounded = ops.Attended(torch.empty(rows, query, 1, size, dtype=dtype), torch.empty(rows, query, 1, 2))
    again = [keys.clone(), values.clone()]
    ops.attend(qkv.to(dtype).float(), heads, *again, at, turn, begin, rounded)
    check(ops.combine(moved(got, "cpu")), reference, rounded.values[:, :, 0].flatten(1), "values")
    for new, old, want in ((k, keys, exact[0]), (v, values, exact[1])):
        torch.testing.assert_close(new.cpu()[:, :, slot].float(), want[:, :, slot], rtol=2**-7, atol=1e-6)
        rest = [j for j in range(length) if j != slot]
        kept = ~hidden[:, None, rest, None].expand_as(old[:, :, rest])
        assert torch.equal(new.cpu()[:, :, rest][kept], old[:, :, rest][kept])


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_rounded_alibi(device: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whole numbers, whose sums are exact in any order: so the same scores are rounded."""
    rows, query, size, length, position = 2, 4, 64, 512, 401
    begin = torch.tensor([0, 37], dtype=torch.int32)
    slopes = torch.tensor([0.84, 0.25, 0.07, 0.5])
    heads = ops.Heads(query, query, size, 1 / 8, slopes=slopes, rounded=True)
    qkv = random(rows, heads.width).mul(2).round()
    keys, values = (random(rows, query, length, size, seed=s).mul(2).round().to(dtype) for s in (2, 3))
    k, v, q = keys.float(), values.float(), qkv.view(rows, 3, query, size)
    k[:, :, position], v[:, :, position] = q[:, 1], q[:, 2]
    place = torch.arange(length) - begin[:, None]
    scores = torch.einsum("rhd,rhjd->rhj", q[:, 0], k) / 8 + (slopes[:, None] * place[:, None]).to(dtype).float()
    seen = (place >= 0) & (torch.arange(length) <= position)
    weights = scores.to(dtype).float().masked_fill(~seen[:, None], float("-inf")).softmax(-1)
    want = torch.einsum("rhj,rhjd->rhd", weights, v).flatten(1)
    there = on(device, monkeypatch)
    out = ops.Attended(
        torch.empty(rows, query, 3, size, dtype=dtype, device=there), torch.empty(rows, query, 3, 2, device=there)
    )
    at, turn = torch.tensor([position], device=there), torch.zeros(rows, 1, dtype=torch.int64, device=there)
    arguments = qkv.to(there), moved(heads, there), keys.to(there), values.to(there), at, turn, begin.to(there), out
    ops.attend(*arguments)
    monkeypatch.undo()
    check(ops.combine(moved(out, "cpu")), want, want.to(dtype), "values")


# form, rows, how the stream comes to be and what the norms are
STREAMS = [
    ("16bit", 3, "added", "layer", "rms"), ("nf4", 2, "added", "rms", "layer"), ("int8", 1, "behind", "layer", None),
    ("nf4", 1, "behind", "layer", "layer"), ("16bit", 8, None, None, None), ("nf4", 4, None, None, None),
]  # fmt: skip


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("case", STREAMS, ids=str)
def test_what_a_product_reads_of_the_stream(device: str, case: tuple, monkeypatch: pytest.MonkeyPatch) -> None:
    form, rows, how, outer_kind, kind = case
    dtype, columns = DTYPES[rows % 2], 448
    m, h, y = made(form, (48,), columns, dtype), random(rows, columns) + 5.0, random(rows, columns, seed=1) * 3 - 2

    def norm(which: str | None, seed: int) -> ops.Norm | None:
        if which is None:
            return None
        gain, bias = (random(columns, seed=seed + i).mul(0.3).to(dtype) for i in range(2))
        return ops.Norm(which, gain, 1e-5, None if which == "rms" else bias, one=1.0)

    inner, outer = norm(kind, 3), norm(outer_kind, 5)
    stream = ops.Stream(h, dtype, inner, y if how == "added" else None, outer)
    s = h if outer is None else outer(h) if how == "behind" else h + outer(y)
    x = s if inner is None else inner(s)
    place = on(device, monkeypatch)
    kept = torch.full((rows, columns), float("nan"), device=place)
    out = torch.full((rows, m.rows), float("nan"), device=place)
    there = moved(stream, place)
    ops.product(there._replace(to=kept if outer is not None else None), moved(m, place), "store", out, cap=2.0)
    want = 2.0 * torch.tanh(m.multiply(x) / 2.0)
    check(out, want, 2.0 * torch.tanh(reordered(x, m, dtype).float() / 2.0).to(dtype), f"{form} {how}")
    assert torch.equal(there.h.cpu(), h)
    if outer is not None:
        torch.testing.assert_close(kept.cpu(), s, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    ("form", "rows", "act"), [("16bit", 2, "relu"), ("int8", 1, "gelu"), ("nested", 3, "gelu_tanh")]
)
def test_products_without_a_gate(device: str, form: str, rows: int, act: str, monkeypatch: pytest.MonkeyPatch) -> None:
    dtype = DTYPES[rows % 2]
    m, x = made(form, (36, 52), 128, dtype), random(rows, 128).to(dtype)
    first, second = m.multiply(x.float()).split([36, 52], -1)
    want, other = ops.activation(act, second), reordered(x, m, dtype)
    place = on(device, monkeypatch)
    one = torch.full((rows, 36), float("nan"), device=place)
    two, alone = (torch.full((rows, 52), float("nan"), dtype=dtype, device=place) for _ in range(2))
    ops.product(x.to(place), moved(m, place), "both", one, act=act, also=two)
    ops.product(x.to(place), moved(m._replace(parts=m.parts[1:]), place), "act", alone, act=act)
    check(one, first, other[:, :36], f"{form}, stored")
    check(two, want, ops.activation(act, other[:, 36:]), f"{form}, {act}")
    check(alone, want, ops.activation(act, other[:, 36:]), f"{form}, {act}, alone")


# rows, N, K, what x is, sink; the second has more strips than there are blocks, and more chunks than a warp holds
TRANSPOSED = [(1, 64, 128, "layer", "store"), (3, 160, 1088, "tensor", "add"), (16, 64, 128, "attended", "act"),
              (10, 96, 768, "added", "act")]  # fmt: skip


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("case", TRANSPOSED, ids=str)
def test_products_of_weights_stored_by_columns(device: str, case: tuple, monkeypatch: pytest.MonkeyPatch) -> None:
    rows, n, columns, what, sink = case
    dtype = DTYPES[rows % 2]
    m, h = matrix("transposed", (n,), columns, dtype), random(rows, columns) + 2.0
    norm = ops.Norm("layer", random(columns, seed=1).to(dtype), 1e-5, random(columns, seed=2).to(dtype))
    sums = torch.stack([random(rows, columns // 64, 2), random(rows, columns // 64, 2, seed=1).abs() + 0.1], -1)
    x: ops.Stream | ops.Attended | torch.Tensor = {
        "layer": ops.Stream(h, dtype, norm),
        "tensor": h.to(dtype),
        "attended": ops.Attended(random(rows, columns // 64, 2, 64).to(dtype), sums),
        "added": ops.Stream(h, dtype, norm, random(rows, columns, seed=3), norm, torch.zeros(rows, columns)),
    }[what]
    before = random(rows, n, seed=4) if sink == "add" else torch.full((rows, n), float("nan"))
    entered = ops._entered(x)
    y, other = m.multiply(entered), reordered(entered, m, dtype)
    if sink == "act":
        before, y, other = before.to(dtype), ops.activation("gelu_tanh", y), ops.activation("gelu_tanh", other)
    elif sink == "add":
        y, other = before + y, before.to(dtype) + other
    place = on(device, monkeypatch)
    out = before.to(place)
    ops.product(moved(x, place), moved(m, place), sink, out, act="gelu_tanh")
    check(out, y, other, f"{what} {sink}")


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("kind", "width"), [(None, 300), ("rms", 300), ("layer", 304), (None, 4104)])
def test_embedding_with_places_and_a_norm(
    device: str, kind: str | None, width: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    table, spots, gain, bias = (random(*shape).bfloat16() for shape in ((10, width), (7, width), (width,), (width,)))
    norm = None if kind is None else ops.Norm(kind, gain, 1e-5, bias if kind == "layer" else None, 0.5)
    place, position = on(device, monkeypatch), torch.tensor([[4], [0]])
    h, alone = torch.empty(2, width, device=place), torch.empty(2, width, device=place)
    places = ops.Places(spots.to(place), position.to(place), 2)
    ops.embed(torch.tensor([9, 0], device=place), table.to(place), h, 3.0, places, moved(norm, place))
    ops.embed(torch.tensor([9, 0], device=place), None, alone, places=places)
    want = table[[9, 0]].float() * 3.0 + spots[[6, 2]].float()
    torch.testing.assert_close(h.cpu(), want if norm is None else norm(want), rtol=1e-5, atol=1e-5)
    assert torch.equal(alone.cpu(), spots[[6, 2]].float())


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("width", [300, 304])
def test_embedding(device: str, width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    table = random(10, width).bfloat16()
    place = on(device, monkeypatch)
    h = torch.empty(2, width, device=place)
    ops.embed(torch.tensor([9, 0], device=place), table.to(place), h)
    assert torch.equal(h.cpu(), table[[9, 0]].float())
    ops.embed(torch.tensor([10, 1], device=place), table.to(place), h)  # not in the table
    assert h[0].isnan().all()
    assert not h[1].isnan().any()


def test_the_definition_of_attention_is_torchs() -> None:
    heads = ops.Heads(4, 2, 32, 32**-0.5)
    qkv, keys, values = random(2, heads.width), random(2, 2, 20, 32, seed=1), random(2, 2, 20, 32, seed=2)
    out = ops.Attended(torch.empty(2, 4, 1, 32), torch.empty(2, 4, 1, 2))
    ops.attend(qkv, heads, keys, values, torch.tensor([11]), torch.tensor([11]), torch.tensor([0, 5]), out)
    seen = torch.stack([torch.arange(12) >= start for start in (0, 5)])[:, None, None]
    q = qkv[:, :128].view(2, 4, 1, 32)
    want = F.scaled_dot_product_attention(q, keys[:, :, :12], values[:, :, :12], seen, enable_gqa=True)
    torch.testing.assert_close(ops.combine(out), want.flatten(1))


def test_cost_counts_weights_and_scales_once() -> None:
    assert ops.cost(matrix("nf4", (64, 32), 128, torch.bfloat16), 2) == (96 * 64 + 96 * 2 * 4, 2 * 2 * 96 * 128)
    assert ops.cost(matrix("int8", (64,), 128, torch.bfloat16), 1) == (64 * 128 + 64 * 4, 2 * 64 * 128)
