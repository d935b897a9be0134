"""`linear_16bit`: torch's product, with gradients where asked for; on a GPU a kernel where it is faster."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from onegpu.kernels import few_rows
from onegpu.kernels.linear_16bit import cost, linear_16bit, ours_is_faster
from tests.compare import assert_close
from tests.matrices import activations

OPS = torch.ops.onegpu


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("n_k", [(113, 203), (65, 96), (1003, 4160), (515, 11008)])
def test_forward(device: str, n_k: tuple[int, int], dtype: torch.dtype) -> None:
    n, k = n_k
    w, bias = activations((n, k), dtype, device, seed=4) * 0.05, activations((n,), dtype, device, seed=5)
    for m in (1, 2, 3, 5, 8, 9):
        x = activations((m, k), dtype, device)
        y = linear_16bit(x, w, bias)
        reference = F.linear(x.float(), w.float(), bias.float())
        assert_close(y, reference, x.flip(-1) @ w.flip(-1).t() + bias, what=f"M {m}")
        assert torch.equal(y, linear_16bit(x, w, bias)), "differs from run to run"


@pytest.mark.gpu
@pytest.mark.parametrize("n_k", [(1003, 4160), (515, 11008)])
def test_the_kernel_where_cublas_is_taken_instead(n_k: tuple[int, int]) -> None:
    n, k = n_k
    w, x = activations((n, k), torch.bfloat16, "cuda", seed=4) * 0.05, activations((8, k), torch.bfloat16, "cuda")
    for m in (5, 6, 8):
        y = few_rows.launch("16bit", x[:m], w, n, None)
        assert y is not None
        assert_close(y, F.linear(x[:m].float(), w.float()), x[:m].flip(-1) @ w.flip(-1).t(), what=f"M {m}")


def test_cublas_serves_what_it_is_faster_at() -> None:
    qkv, o, gate_up, down = (12288, 4096), (4096, 4096), (22016, 4096), (4096, 11008)
    for m in range(1, 5):
        assert all(ours_is_faster(m, *size) for size in (qkv, o, gate_up, down))
        assert ours_is_faster(m, 896, 4864) and not ours_is_faster(m, 9728, 896)
    assert [ours_is_faster(8, *size) for size in (qkv, o, gate_up, down)] == [False, False, True, False]


def test_leading_dimensions_gradients_and_no_rows(device: str) -> None:
    w = activations((32, 64), torch.bfloat16, device, seed=4).requires_grad_()
    x = activations((2, 3, 64), torch.bfloat16, device)
    y = linear_16bit(x, w)
    y.sum().backward()
    assert y.shape == (2, 3, 32) and w.grad is not None
    with torch.no_grad():
        assert linear_16bit(x, w).shape == (2, 3, 32) and linear_16bit(x[:0], w).shape == (0, 3, 32)


def test_opcheck_and_cost(device: str) -> None:
    w, x = activations((32, 64), torch.float16, device, seed=4), activations((2, 3, 64), torch.float16, device)
    torch.library.opcheck(OPS.linear_16bit.default, (x, w, None))
    assert cost(m=2, n=3, k=5, itemsize=2) == ((15 + 16) * 2, 60)
