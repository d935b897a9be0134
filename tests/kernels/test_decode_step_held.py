"""decode_step_held.cu, run on the CPU and on a GPU: the products of one to eight rows with 4-bit matrices."""

from __future__ import annotations

import pytest
import torch

from onegpu.kernels import decode_step as ops
from onegpu.kernels import decode_step_cuda as gpu
from onegpu.kernels.decode_step_layouts import Held
from tests.decode_structures import matrix, moved
from tests.kernels.emulated_step import DEVICES, on
from tests.kernels.test_decode_step_cuda import entered, large, outputs

# form, rows, columns, rows of the parts, what x is, sink, layout, dtype. Rows that end within a piece, matrices and
# blocks without a tile, more tiles than a ring, sums that the table has no room for, scales that are not whole fours.
CASES = [
    ("nf4", 1, 1024, (64, 64), "rms", "gated", Held(2, 4), torch.bfloat16),
    ("nf4", 1, 1280, (48, 8, 16), "rms", "store", Held(2, 4, 3), torch.bfloat16),
    ("fp4", 2, 2304, (72,), "x", "add", Held(2, 2, cluster=2), torch.float16),
    ("nf4", 1, 2816, (160,), "x", "add", Held(2, 3), torch.bfloat16),
    ("nf4", 2, 1344, (40, 24), "layer", "both", Held(2, 6, 3), torch.bfloat16),
    ("nf4", 1, 1792, (16, 16), "added", "gated", Held(2, 2, 4), torch.float16),
    ("nf4", 4, 1344, (64, 64), "rms", "gated", Held(4, 3), torch.bfloat16),
    ("nf4", 4, 1280, (64, 16, 32), "rms", "store", Held(4, 3), torch.bfloat16),
    ("nf4", 4, 2752, (160,), "x", "add", Held(4, 3, cluster=2), torch.bfloat16),
    ("nf4", 3, 1792, (64, 64), "added", "gated", Held(4, 4, cluster=2), torch.float16),
    ("fp4", 3, 512, (16,), "layer", "act", Held(4, 3), torch.bfloat16),
    ("nf4", 7, 1280, (64, 16, 32), "rms", "store", Held(8, 5, 3), torch.bfloat16),
    ("nf4", 8, 2816, (160,), "x", "add", Held(8, 6, cluster=2), torch.bfloat16),
    ("nf4", 5, 1472, (48, 32), "layer", "both", Held(8, 6), torch.bfloat16),
    ("nf4", 8, 2048, (512, 512), "rms", "gated", Held(8, 4, cluster=2), torch.bfloat16),
    ("nf4", 6, 4096, (64,), "rms", "store", Held(8, 4, cluster=4), torch.bfloat16),
]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("case", CASES, ids=range(len(CASES)))
def test_few_rows_of_four_bits(device: str, case: tuple, monkeypatch: pytest.MonkeyPatch) -> None:
    form, rows, columns, sizes, what, sink, fixed, dtype = case
    m, x = matrix(form, sizes, columns, dtype), entered(what, rows, columns, dtype)
    outs = outputs(sink, rows, sizes, dtype)
    wanted = [out.clone() for out in outs]
    ops.product(x, m, sink, wanted[0], also=wanted[1])
    place = on(device, monkeypatch)
    assert fixed.serves(rows, columns, sizes, gpu.multiprocessors(0), isinstance(x, torch.Tensor))
    got, there = [out.to(place) for out in outs], moved(x, place)
    if isinstance(there, ops.Stream) and there.to is not None:
        there.to.zero_()
    gpu.product(there, moved(m, place), sink, got[0], also=got[1], fixed=fixed)
    for ours, want in zip(got, wanted, strict=True):
        torch.testing.assert_close(ours.cpu().float(), want.float(), rtol=2e-2, atol=2e-2 * want.float().std().item())
    if isinstance(x, ops.Stream) and x.to is not None:
        torch.testing.assert_close(there.to.cpu(), x.to, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("fixed", [Held(2, 4), Held(4, 4, cluster=2)])
def test_rows_outside_of_what_fp16_holds(device: str, fixed: Held, monkeypatch: pytest.MonkeyPatch) -> None:
    """Large x, small, NaN and infinity in one row or the other; the attention's parts, one of them without keys."""
    m, rows = matrix("nf4", (48,), 1024, torch.bfloat16), fixed.rows
    generator = torch.Generator().manual_seed(0)
    base = torch.randn(rows, 1024, generator=generator).bfloat16()
    values = torch.randn(rows, 16, 3, 64, generator=generator).bfloat16()
    attended = ops.Attended(values, torch.rand(rows, 16, 3, 2, generator=generator) + 1)
    attended.sums[:, :, 1] = torch.tensor([float("-inf"), 0.0])
    place, bad, mixed = on(device, monkeypatch), [base.clone(), base.clone()], base.clone()
    bad[0][0, 700], bad[1][-1, 3] = float("nan"), float("inf")
    mixed[0], mixed[-1] = mixed[0] * 1e5, mixed[-1] * 1e-6
    for x in (mixed, *bad, attended):
        want, out = m.multiply(ops._entered(x)), torch.zeros(rows, 48, device=place)
        gpu.product(moved(x, place), moved(m, place), "add", out, fixed=fixed)
        finite, out = want.isfinite(), out.cpu()
        assert torch.equal(out.isfinite(), finite)
        for i in range(rows):  # each by its own size
            ours, wanted = out[i][finite[i]], want[i][finite[i]]
            torch.testing.assert_close(ours, wanted, rtol=2e-2, atol=2e-2 * want[i].std().nan_to_num(0).item())


@pytest.mark.gpu
@pytest.mark.parametrize("rows", [1, 2, 3, 4, 5, 8])
def test_products_give_the_same_bits_each_time(rows: int) -> None:
    """Of Llama-2-7B and Falcon-7B, in the layouts that are taken."""
    cases = [(4096, (4096,) * 3, "rms", "store"), (4096, (11008, 11008), "rms", "gated"), (11008, (4096,), "x", "add"),
             (4096, (4096,), "heads", "add"), (4544, (4672,), "layer", "store"), (4544, (4544,), "heads", "add"),
             (18176, (4544,), "x", "add")]  # fmt: skip
    for columns, sizes, what, sink in cases:
        m = moved(large("nf4", sizes, columns, False), "cuda")
        x = moved(entered(what, rows, columns, torch.bfloat16), "cuda")
        assert gpu._held(x, m, rows, 0) is not None
        out, seen = outputs(sink, rows, sizes, torch.bfloat16)[0], []
        for _ in range(20):
            got = out.cuda()
            gpu.product(x, m, sink, got)
            seen.append(got)
        y = m.multiply(ops._entered(x))
        want = ops.activation("silu", y[:, : sizes[0]]) * y[:, sizes[0] :] if sink == "gated" else y
        if sink == "add":
            want = want + out.cuda()
        assert all(torch.equal(one, seen[0]) for one in seen)
        torch.testing.assert_close(seen[0].float(), want, rtol=2e-2, atol=2e-2 * want.std().item())
