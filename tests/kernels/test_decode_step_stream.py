"""A decoding step's products that few_rows_stream.cu computes: which they are, run on the CPU, and on a GPU."""

from __future__ import annotations

import pytest
import torch

from onegpu.kernels import decode_step, decode_step_cuda, decode_step_stream, few_rows
from onegpu.kernels.decode_step import Attended, Matrix, Part, Stream
from onegpu.kernels.few_rows_stream import Stream as Config
from tests.compare import assert_close
from tests.kernels import emulated, machine_code
from tests.kernels.test_few_rows import four_bit, nested_of
from tests.matrices import activations
from tests.nvrtc_tools import needs_nvrtc

BEFORE_THE_LAST = 227 * 1024


def matrix(n: int, k: int, form: str, device: str, nested: bool = False, bias: bool = False) -> Matrix:
    added = activations((n,), torch.bfloat16, device, seed=5) if bias else None
    if form == "int8":
        weight = torch.randint(-128, 128, (n, k), dtype=torch.int8, generator=torch.Generator().manual_seed(1))
        part = Part(n, weight.to(device), added, torch.rand(n, device=device) / k**0.5 + 0.01)
        return Matrix(form, k, (part,))
    packed = four_bit(n, k, device, form, nested)
    return Matrix(form, k, (Part(n, packed.weight, added, packed.absmax, packed.nested_absmax, packed.offset),))


def compare(h: torch.Tensor, before: torch.Tensor, x: torch.Tensor, of: Matrix) -> None:
    reordered = x.flip(-1) @ of.dense().to(x.dtype).flip(-1).t()
    bias = 0 if of.parts[0].bias is None else of.parts[0].bias.float()
    assert_close(h - before, of.multiply(x.float()), reordered.float() + bias)


@emulated.needs_gxx
@pytest.mark.parametrize(
    ("config", "m", "n", "k", "nested"),
    [(Config(2, 4, 2, 256, 4, 2), 13, 100, 1280, False), (Config(2, 8, 1, 256, 4, 2), 16, 200, 1280, True)],
)
def test_the_product_is_added_on_the_cpu(config: Config, m: int, n: int, k: int, nested: bool) -> None:
    of, x = matrix(n, k, "nf4", "cpu", nested, bias=True), activations((m, k), torch.bfloat16)
    h = activations((m, n), torch.float32, seed=7)
    packed, y = four_bit(n, k, "cpu", "nf4", nested), h.clone()
    more = {"ADDS": 1, "STAY": 1}
    emulated.product(
        config, "4bit", x, packed.weight, n, of.parts[0].bias, packed.absmax, nested_of(packed), out=y, more=more
    )
    compare(y, h, x, of)


@needs_nvrtc
@pytest.mark.parametrize("config", decode_step_stream.CONFIGURATIONS)
def test_no_registers_spill(config: Config) -> None:
    for fmt, nested in (("4bit", 2), ("int8", 0)):
        found = few_rows.fitting(config, fmt, nested, 16, 4096, 4096, False, 132, BEFORE_THE_LAST)
        assert found is not None
        kernel = few_rows.kernel(found[0], fmt, True, False, nested, False).variant(None, ADDS=1, STAY=1)
        code = kernel.compile("sm_90a").code
        assert machine_code.stack_bytes(code) == 0
        assert machine_code.sums_copied_early(code, 8) == 0


def test_what_it_leaves_to_the_others() -> None:
    of, x = matrix(64, 128, "nf4", "cpu"), torch.zeros(16, 128, dtype=torch.bfloat16)
    assert decode_step_stream.plan(x, of, "add", 16) is None  # not on a GPU
    assert decode_step_stream.plan(Stream(x.float(), x.dtype), of, "add", 16) is None
    parts = Attended(torch.zeros(16, 1, 2, 64), torch.zeros(16, 1, 2, 2))
    assert decode_step_stream.plan(parts, of, "add", 16) is None


@pytest.mark.gpu
@pytest.mark.parametrize("form", ["nf4", "fp4", "int8", "nested"])
@pytest.mark.parametrize("n_k", [(4096, 4096), (4096, 11008), (4544, 4544), (896, 4864), (12288, 1024)])
def test_it_adds_the_product_on_a_gpu(n_k: tuple[int, int], form: str) -> None:
    """By itself, and twenty times in a graph, where each starts before the one in front has ended."""
    if torch.cuda.get_device_capability()[0] != 9:
        pytest.skip("for Hopper")
    n, k = n_k
    of = matrix(n, k, "nf4" if form == "nested" else form, "cuda", form == "nested", bias=True)
    for dtype in (torch.bfloat16, torch.float16):
        of = of._replace(parts=(of.parts[0]._replace(bias=of.parts[0].bias.to(dtype)),))
        for rows in (9, 16):
            x = activations((rows, k), dtype, "cuda")
            attended = Attended(x.view(rows, k // 64, 1, 64), torch.ones(rows, k // 64, 1, 2, device="cuda"))
            before = activations((rows, n), torch.float32, "cuda", seed=7)
            assert decode_step_stream.plan(x, of, "add", rows) is not None
            h, other, many = before.clone(), before.clone(), before.clone()
            decode_step.product(x, of, "add", h)
            decode_step.product(attended, of, "add", other)
            compare(h, before, x, of)
            assert torch.equal(h, other)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                for _ in range(20):
                    decode_step_cuda.product(x, of, "add", many)
            one_by_one = before.clone()
            for _ in range(20):
                decode_step.product(x, of, "add", one_by_one)
                torch.cuda.synchronize()
            many.copy_(before)
            graph.replay()
            assert torch.equal(many, one_by_one)
