"""decode_step_bulk.cu, run on the CPU and on a GPU: the products of one row with int8 matrices."""

from __future__ import annotations

import pytest
import torch

from onegpu.kernels import decode_step as ops
from onegpu.kernels import decode_step_cuda as gpu
from onegpu.kernels.decode_step_layouts import WHOLE, Bulk
from tests.decode_structures import matrix, moved
from tests.kernels.emulated_step import DEVICES, on
from tests.kernels.test_decode_step_cuda import entered, large, outputs

# columns, rows of the parts, what x is, sink, layout, dtype. Rows that end within a piece and within a section, blocks
# that end within a tile, tiles of several matrices, fewer tiles than a ring and more.
ONE_ROW = [
    (1024, (64, 64), "rms", "gated", Bulk(4, 2), torch.bfloat16),
    (2112, (47, 9, 17), "rms", "store", Bulk(6, 3, 128, 2), torch.bfloat16),
    (2304, (73,), "x", "add", Bulk(3, 2), torch.bfloat16),
    (2304, (73,), "x", "add", Bulk(2, 2, 256), torch.float16),
    (512, (41, 23), "layer", "both", Bulk(3, 2), torch.bfloat16),
    (1792, (15, 15), "added", "gated", Bulk(2, 8, 128, 2), torch.float16),
]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("case", ONE_ROW, ids=range(len(ONE_ROW)))
def test_one_row_of_int8(device: str, case: tuple, monkeypatch: pytest.MonkeyPatch) -> None:
    columns, sizes, what, sink, fixed, dtype = case
    m, x, outs = matrix("int8", sizes, columns, dtype), entered(what, 1, columns, dtype), outputs(sink, 1, sizes, dtype)
    wanted = [out.clone() for out in outs]
    ops.product(x, m, sink, wanted[0], also=wanted[1])
    place = on(device, monkeypatch)
    assert fixed.shared(columns, sum(sizes), gpu.multiprocessors(0), what == "x") <= WHOLE
    got, there = [out.to(place) for out in outs], moved(x, place)
    if isinstance(there, ops.Stream) and there.to is not None:
        there.to.zero_()
    gpu.product(there, moved(m, place), sink, got[0], also=got[1], fixed=fixed)
    for ours, want in zip(got, wanted, strict=True):
        torch.testing.assert_close(ours.cpu().float(), want.float(), rtol=2e-2, atol=2e-2 * want.float().std().item())
    if isinstance(x, ops.Stream) and x.to is not None:
        torch.testing.assert_close(there.to.cpu(), x.to, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("device", DEVICES)
def test_one_row_of_int8_outside_of_what_fp16_holds(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Large and small x, both in one row, NaN and infinity; the attention's parts, one of them without keys."""
    m, fixed = matrix("int8", (48,), 1024, torch.bfloat16), Bulk(4, 2)
    base = torch.randn(1, 1024, generator=torch.Generator().manual_seed(0)).bfloat16()
    attended = ops.Attended(base.view(1, 4, 4, 64)[:, :, :3].contiguous(), torch.rand(1, 4, 3, 2) + 1)
    attended.sums[:, :, 1] = torch.tensor([float("-inf"), 0.0])
    narrow = matrix("int8", (48,), 256, torch.bfloat16, seed=2)
    place, bad, wide = on(device, monkeypatch), [base.clone(), base.clone()], base.clone()
    bad[0][0, 700], bad[1][0, 3], wide[0, 5] = float("nan"), float("inf"), 3e4
    for x, w in ((base * 1e5, m), (base * 1e-6, m), (wide, m), (bad[0], m), (bad[1], m), (attended, narrow)):
        want, out = w.multiply(ops._entered(x)), torch.zeros(1, 48, device=place)
        gpu.product(moved(x, place), moved(w, place), "add", out, fixed=fixed)
        finite, out = want.isfinite(), out.cpu()
        assert torch.equal(out.isfinite(), finite)
        atol = 1e-5 * want.std().nan_to_num(0).item() + 1e-2 * (x is attended)  # the parts' sum is rounded to bf16
        torch.testing.assert_close(out[finite], want[finite], rtol=1e-5, atol=atol)


@pytest.mark.gpu
def test_one_row_of_int8_gives_the_same_bits_each_time() -> None:
    """Of Llama-2-7B, in the layouts that are taken: 4096 columns and 11008."""
    cases = [(4096, (4096,) * 3, "rms", "store"), (4096, (11008, 11008), "rms", "gated"), (4096, (4096,), "x", "add"),
             (4096, (4096,), "heads", "add"), (11008, (4096,), "x", "add")]  # fmt: skip
    for columns, sizes, what, sink in cases:
        m = moved(large("int8", sizes, columns, False), "cuda")
        x, (out, _) = moved(entered(what, 1, columns, torch.bfloat16), "cuda"), outputs(sink, 1, sizes, torch.bfloat16)
        assert gpu._bulk(x, m, out.cuda()) is not None
        seen = []
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
