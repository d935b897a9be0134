"""The kernel whose clusters share a head's keys: what it serves, on a CPU behind the emulator, its machine code."""

from __future__ import annotations

import shutil
from typing import Any

import pytest
import torch

from onegpu.kernels import decode_attention_cuda as gpu
from onegpu.kernels.decode_attention import _empty, decode_attention
from tests.compare import assert_close
from tests.kernels import emulated_step, machine_code
from tests.kernels.test_decode_attention import by_key, inputs
from tests.nvrtc_tools import needs_nvrtc

BF16, FP16 = torch.bfloat16, torch.float16


@pytest.mark.parametrize(
    ("heads", "rows", "d", "keys", "blocks"),
    [
        (32, 1, 128, 4096, 2),
        (32, 1, 128, 512, 2),
        (8, 4, 128, 4096, 8),
        (32, 1, 128, 4097, 0),  # half of the SMs would read for too long
        (8, 4, 128, 32768, 8),
        (8, 4, 128, 32769, 0),
        (16, 2, 128, 4096, 6),
        (16, 2, 128, 12289, 0),
        (24, 1, 128, 4096, 4),
        (2, 4, 128, 8192, 8),
        (2, 4, 128, 8193, 0),  # 16 blocks
        (128, 4, 128, 4096, 0),  # a block for each head fills the GPU
        (66, 1, 128, 1000, 2),
        (67, 1, 128, 1000, 0),
        (2, 8, 256, 300, 2),  # so that each has keys
        (2, 8, 256, 100, 0),
        (8, 9, 128, 512, 0),
        (8, 1, 100, 512, 0),  # rows do not begin at multiples of 16 bytes
        (8, 1, 264, 512, 0),
        (8, 1, 128, 0, 0),
        (0, 1, 128, 512, 0),
    ],
)
def test_blocks_of_a_cluster(heads: int, rows: int, d: int, keys: int, blocks: int) -> None:
    assert gpu.blocks(heads, rows, d, d, keys, 132) == blocks
    assert gpu.blocks(heads, rows, d, d + 8, keys, 132) == gpu.blocks(heads, rows, d, d, keys, 0) == 0
    shared = gpu._shared(8, min(d, 256), min(rows, 8))
    assert shared <= 232448


CASES: dict[str, tuple[int, torch.dtype, dict[str, Any]]] = {
    "one row": (2, BF16, {"h": 3, "h_kv": 3, "d": 128, "room": 300, "lengths": (300, 170)}),
    "a group": (3, FP16, {"h": 8, "h_kv": 2, "d": 128, "room": 200, "lengths": (200, 33)}),
    "two queries": (8, BF16, {"h": 8, "h_kv": 2, "t": 2, "room": 140, "lengths": (140, 1)}),
    "all": (4, BF16, {"t": 2, "d": 128, "room": 550, "lengths": (550, 80), "first": (3, 40), "window": 350,
                      "softcap": 20.0, "alibi": True, "scale": 0.3}),
    "left padding": (2, FP16, {"d": 96, "room": 150, "lengths": (150, 80), "first": (70, 79)}),
    "wide": (2, BF16, {"h": 8, "h_kv": 1, "d": 256, "room": 100, "lengths": (100, 64)}),
    "odd width": (5, FP16, {"h": 2, "h_kv": 1, "d": 72, "room": 90, "lengths": (90, 17)}),
    "window": (3, FP16, {"d": 128, "room": 300, "lengths": (300, 20), "window": 64, "t": 3}),
    "nothing seen": (2, BF16, {"h": 2, "h_kv": 2, "room": 40, "lengths": (0, 9), "first": (0, 9), "t": 2}),
    "tokens first": (2, BF16, {"h": 2, "h_kv": 2, "t": 8, "d": 128, "room": 70, "lengths": (70, 8),
                               "tokens_first": True}),
}  # fmt: skip


class _Emulated:
    def __init__(self, constants: dict[str, int] | None = None) -> None:
        self.constants = constants or {}

    def variant(self, name: None, **constants: int) -> _Emulated:
        return _Emulated(constants)

    def __call__(
        self, grid: tuple[int], block: int, shared: int, *args: Any, pdl: bool, cluster: tuple[int, ...]
    ) -> None:
        launch = (*grid, block, cluster[0], shared)
        emulated_step.run(SOURCE._source, "decode", SOURCE.arguments, tuple(self.constants.items()), launch, args)


SOURCE = gpu._source()


@pytest.mark.parametrize("case", CASES)
def test_agrees_with_attention_key_by_key(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if shutil.which("g++") is None:
        pytest.skip("the emulator is compiled with g++")
    blocks, dtype, shape = CASES[case]
    monkeypatch.setattr(gpu, "_source", _Emulated)
    monkeypatch.setattr(gpu, "_kernel", gpu._kernel.__wrapped__)
    monkeypatch.setattr(gpu, "_multiprocessors", lambda _: 132)
    monkeypatch.setattr(gpu, "blocks", lambda *_: blocks)
    torch.manual_seed(0)
    (q, k, v, length), options = inputs(dtype=dtype, **shape)
    out = torch.full_like(_empty(q, q.shape[-1]), float("nan"))
    scale = options.get("scale", q.shape[-1] ** -0.5)
    rest = (scale, options.get("window", 0), options.get("softcap", 0.0), options["slopes"], out)
    assert gpu.decode(q, k, v, length, options["first"], *rest)
    reference = by_key(q.double(), k.double(), v.double(), length, **options)
    assert_close(out, reference, by_key(q, k, v, length, **options))
    again = out.clone()
    assert gpu.decode(q, k, v, length, options["first"], *rest) and torch.equal(out, again)


def test_what_another_kernel_must_serve(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "_multiprocessors", lambda _: 132)
    q, length = torch.zeros(1, 8, 1, 64, dtype=BF16), torch.ones(1, dtype=torch.int32)
    memory = torch.zeros(8 * 600 * 72 + 1, dtype=BF16)
    k = memory[: 8 * 600 * 64].view(1, 8, 600, 64)
    odd = memory[1 : 1 + 8 * 600 * 64].view(1, 8, 600, 64)  # does not begin at a multiple of 16 bytes
    skewed = memory[: 8 * 600 * 68].view(1, 8, 600, 68)[..., :64]  # nor do its rows
    by_columns = memory[: 8 * 600 * 64].view(1, 8, 64, 600).mT
    cases = [(q.float(), k.float(), k.float()), (q, odd, k), (q, k, skewed), (q, by_columns, k)]
    for q_, k_, v_ in cases:
        assert not gpu.decode(q_, k_, v_, length, None, 0.1, 0, 0.0, None, q_)
    monkeypatch.setattr(gpu, "_multiprocessors", lambda _: 0)  # not Hopper
    assert not gpu.decode(q, k, k, length, None, 0.1, 0, 0.0, None, q)


def test_a_cpu_has_no_multiprocessors() -> None:
    assert gpu._multiprocessors(-1) == 0


@needs_nvrtc
@pytest.mark.parametrize(
    ("blocks", "d", "t", "group", "masks"),
    [(2, 128, 1, 1, False), (8, 128, 1, 4, False), (8, 128, 2, 4, True), (2, 256, 1, 8, True), (3, 72, 8, 1, True)],
)
def test_no_registers_spill_and_nothing_is_read_before_the_wait(
    blocks: int, d: int, t: int, group: int, masks: bool
) -> None:
    code = gpu._kernel(blocks, not masks, d, t, group, masks, masks, masks, masks).compile("sm_90a").code
    assert machine_code.stack_bytes(code) == 0
    assert machine_code.reads_before_the_wait(code) == 0
    assert machine_code.copies_with_a_uniform_base(code) == 0


@pytest.mark.gpu
@pytest.mark.parametrize("case", CASES)
def test_on_a_gpu(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also with a cluster of another size than is chosen."""
    blocks, dtype, shape = CASES[case]
    monkeypatch.setattr(gpu, "blocks", lambda *_: blocks)
    served = []
    decode = gpu.decode
    monkeypatch.setattr(gpu, "decode", lambda *args: served.append(decode(*args)) or served[-1])
    arguments, options = inputs("cuda", dtype, **shape)
    out = decode_attention(*arguments, **options)
    *tensors, length = arguments
    reference = by_key(*(x.double() for x in tensors), length, **options)
    assert_close(out, reference, by_key(*arguments, **options))
    assert all(torch.equal(out, decode_attention(*arguments, **options)) for _ in range(50))
    assert served == [torch.cuda.get_device_capability()[0] == 9] * 51
