"""Registration: one schema, the definition everywhere, a kernel on CUDA where there is one."""

from __future__ import annotations

import functools

import pytest
import torch

from onegpu import functional, kernels  # noqa: F401  (functional defines every op of bitsandbytes' functions)
from onegpu.errors import ArgumentError
from onegpu.kernels import decode_attention, gated_mlp, layer_norm, rms_norm, rotary  # noqa: F401
from onegpu.kernels.library import define
from onegpu.kernels.linear_4bit import Packed4bit, linear_4bit
from onegpu.kernels.linear_16bit import linear_16bit
from onegpu.kernels.linear_int8 import linear_int8


@functools.cache
def defined() -> None:
    """Ops of this test, defined once in a process."""

    def fake(x: torch.Tensor) -> torch.Tensor:
        return torch.empty_like(x)

    define("test_library_definition(Tensor x) -> Tensor", lambda x: x * 2, fake)
    define("test_library_kernel(Tensor x) -> Tensor", lambda x: x * 2, fake, cuda=lambda x: x * 3)


def test_the_definition_runs_where_there_is_no_kernel(device: str) -> None:
    defined()
    x = torch.arange(3.0, device=device)
    assert torch.ops.onegpu.test_library_definition(x).tolist() == [0, 2, 4]
    wanted = [0, 3, 6] if device == "cuda" else [0, 2, 4]
    assert torch.ops.onegpu.test_library_kernel(x).tolist() == wanted


def test_the_fake_gives_shapes_without_data() -> None:
    defined()
    x = torch.ones(2, 3, device="meta", dtype=torch.bfloat16)
    y = torch.ops.onegpu.test_library_kernel(x)
    assert y.is_meta and y.shape == x.shape and y.dtype == x.dtype
    torch.library.opcheck(torch.ops.onegpu.test_library_definition.default, (torch.ones(3),))


def test_a_name_is_defined_once() -> None:
    defined()
    with pytest.raises(RuntimeError, match="test_library_kernel"):
        define("test_library_kernel(Tensor x) -> Tensor", lambda x: x, lambda x: x)


def test_every_op_of_the_table_exists_for_cpu_and_cuda() -> None:
    assert set(kernels.available()) == set(kernels.OPS)
    for name, implementation in kernels.available().items():
        assert implementation
        for key in ("CPU", "CUDA", "Meta"):
            assert torch._C._dispatch_has_kernel_for_dispatch_key(f"onegpu::{name}", key), f"{name} lacks {key}"


@pytest.mark.parametrize("shape", [(1, 128), (4, 32), (2, 3, 65), ()])
def test_products_and_norms_refuse_rows_of_another_length(shape: tuple[int, ...], device: str) -> None:
    """Also where they make whole rows of the matrix's length when taken one after the other."""
    x, scales = torch.zeros(shape, dtype=torch.bfloat16, device=device), torch.ones(64, device=device)
    packed = Packed4bit(torch.zeros(2048, 1, dtype=torch.uint8, device=device), scales, 64, "nf4", (64, 64))
    weight = torch.zeros(64, 64, dtype=torch.int8, device=device)
    for product in (
        lambda: linear_4bit(x, packed),
        lambda: linear_int8(x, weight, scales),
        lambda: linear_16bit(x, weight.to(x.dtype)),
        lambda: rms_norm.rms_norm(x, scales, 1e-6),
        lambda: layer_norm.layer_norm(x, scales, None, 1e-5),
        lambda: layer_norm.layer_norm(x, None, scales, 1e-5),
    ):
        with pytest.raises(ArgumentError, match=r"x=\[.*\] has rows of another length than the weight.*64 columns"):
            product()
