"""What serves which inputs, as far as it shows without a GPU; the kernels' own answers stand in test_attention.py."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from onegpu.errors import ArgumentError
from onegpu.kernels import attention_dispatch as dispatch
from onegpu.kernels.attention_definition import Options, backward, forward
from tests.compare import assert_close
from tests.kernels.test_attention import inputs, plain
from tests.triton_tools import needs_triton


@pytest.mark.parametrize("case", ["contiguous", "turned", "odd base", "odd rows", "head dim apart"])
def test_rows_begin_on_16_bytes(case: str) -> None:
    x = torch.randn(2, 6, 4, 8)
    given, kept = {
        "contiguous": (x, True),
        "turned": (x.transpose(1, 2), True),
        "odd base": (torch.randn(x.numel() + 1)[1:].view(x.shape), False),
        "odd rows": (torch.randn(2, 6, 4, 12)[..., :8], False),
        "head dim apart": (torch.randn(2, 6, 8, 4).transpose(2, 3), False),
    }[case]
    read = dispatch.readable(given)
    assert (read is given) is kept and torch.equal(read, given)
    assert read.data_ptr() % 16 == 0 and all(stride % 8 == 0 for stride in read.stride()[:-1])


def test_padding_the_head_dim_changes_nothing() -> None:
    q, k, v = torch.randn(1, 5, 2, 12), torch.randn(1, 7, 2, 12), torch.randn(1, 7, 2, 20)
    # a negative scale: with "auto", no kernel takes it, and what was padded for kernels reaches the definition
    options = Options(-(12**-0.5), right=0)
    out, lse = dispatch.forward_cuda(q, k, v, *options)
    expected, expected_lse = forward(q, k, v, *options)
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(lse, expected_lse)
    assert out.is_contiguous()
    grad = torch.randn_like(out)
    made = dispatch.backward_cuda(grad, None, q, k, v, out, lse, True, *options)
    for x, y in zip(made, backward(grad, None, q, k, v, out, lse, True, *options), strict=True):
        torch.testing.assert_close(x, y)


@needs_triton
def test_what_serves(monkeypatch: pytest.MonkeyPatch) -> None:
    from onegpu.kernels import attention_hopper

    monkeypatch.setattr(attention_hopper, "_is_hopper", lambda device: True)

    def serves(
        *shape: int, name: str = "auto", backward: bool = False, dtype: Any = torch.bfloat16, **other: Any
    ) -> str:
        x = torch.empty(shape, dtype=dtype)
        deterministic = other.pop("deterministic", False)
        options = Options(1.0, **{"right": 0} | other, implementation=name)
        return dispatch.implementation(x, x, x, options, backward, deterministic)

    big = 64, 512, 32, 64
    assert serves(*big) == serves(32, 512, 32, 64, right=-1) == serves(4, 4096, 21, 192) == "cudnn"
    assert serves(16, 512, 32, 128) == serves(4, 4096, 64, 64) == serves(4, 4096, 64, 64, right=-1) == "hopper"
    assert serves(16, 1024, 32, 64) == serves(16, 1024, 32, 128, right=-1) == "hopper"
    assert serves(32, 512, 32, 128, right=-1) == "cudnn"
    assert serves(4, 4096, 21, 192, right=-1) == serves(4, 4096, 21, 192, right=-1, backward=True) == "cudnn"
    assert serves(*big, left=100) == serves(*big, right=3) == "hopper"
    assert serves(4, 512, 32, 128) == serves(16, 500, 32, 128) == serves(4, 4096, 32, 128) == "hopper"
    assert serves(1, 64, 2, 16) == serves(1, 64, 2, 64, dtype=torch.float32) == "portable"
    assert serves(1, 64, 2, 264) == "definition"
    assert serves(*big, name="hopper") == "hopper" and serves(*big, name="portable") == "portable"
    assert serves(1, 64, 2, 192, backward=True) == "portable" and serves(*big, backward=True) == "hopper"
    assert serves(*big, backward=True, deterministic=True) == "hopper"
    assert serves(*big, name="cudnn", backward=True, deterministic=True) == "portable"
    assert serves(*big, name="cudnn", left=100, backward=True) == "portable"
    wide = 4, 4096, 16, 256
    assert serves(*wide, backward=True) == "cudnn" and serves(*wide, backward=True, left=9) == "portable"
    assert serves(*wide, backward=True, right=-1) == serves(32, 512, 21, 192, backward=True) == "cudnn"
    q, kv = torch.empty(wide, dtype=torch.bfloat16), torch.empty(4, 4096, 2, 256, dtype=torch.bfloat16)
    grouped = [dispatch.implementation(q, kv, kv, Options(1.0, right=0), backward) for backward in (False, True)]
    assert grouped == ["hopper", "cudnn"]
    with pytest.raises(ArgumentError, match="implementation"):
        dispatch.implementation(q, kv, kv, Options(1.0, right=0, implementation="cudnn"))
    assert serves(*wide, backward=True, deterministic=True) == "portable"
    assert serves(1, 64, 2, 256, backward=True) == "portable" and serves(*wide) == "hopper"
    assert serves(1, 64, 2, 256, backward=True, name="cudnn") == "cudnn"
    monkeypatch.setattr(torch.backends.cuda, "cudnn_sdp_enabled", lambda: False)
    assert serves(*big) == "hopper"
    with pytest.raises(ArgumentError, match="implementation"):
        serves(1, 64, 2, 64, name="hopper", dtype=torch.float32)


def test_what_cannot_be_read_is_copied_and_settled_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tensors whose copy has the layout of others, forward and backward, take what was settled for those."""
    settled: list[str] = []

    def settle(name: str, real: Any) -> Any:
        def count(*args: Any) -> Any:
            settled.append(name)
            return real(*args)

        return count

    monkeypatch.setattr(dispatch, "forward", settle("forward", forward))
    monkeypatch.setattr(dispatch, "backward", settle("backward", backward))
    q, k, v = (torch.randn(2, 5, 4, 8) for _ in range(3))
    apart = torch.stack((q, q), -1)[..., 0]  # head dim not side by side
    options = Options(-0.3, right=0)
    out, lse = dispatch.forward_cuda(apart, k, v, *options)
    torch.testing.assert_close(out, forward(q, k, v, *options)[0])
    assert not out.isnan().any()
    upstream = torch.ones(()).expand_as(out)
    made = dispatch.backward_cuda(upstream, None, apart, k, v, out, lse, True, *options)
    expected = backward(torch.ones_like(out), None, q, k, v, out, lse, True, *options)
    for x, y in zip(made, expected, strict=True):
        torch.testing.assert_close(x, y)
    assert settled == ["forward", "backward"]
    odd = torch.randn(1, 5, 2, 12)  # of the definition, rows may begin anywhere
    torch.testing.assert_close(
        dispatch.forward_cuda(odd, odd, odd, *Options(1.0, implementation="definition"))[0],
        forward(odd, odd, odd, *Options(1.0))[0],
    )


def test_a_layout_is_all_but_addresses() -> None:
    def key(x: torch.Tensor, *rest: Any) -> Any:
        return dispatch._key((x, x, x), tuple(Options(*rest)))

    x, ends = torch.empty(4, 8, 2, 64), torch.zeros(3, dtype=torch.int32)
    assert key(x, 1.0) == key(torch.empty_like(x), 1.0)
    others = [key(x, 2.0), key(x, 1.0, -1, 0), key(x.bfloat16(), 1.0), key(x.transpose(0, 1), 1.0)]
    others += [key(x, 1.0, -1, -1, None, None, ends, ends), key(x, 1.0, -1, -1, ends, ends)]
    assert len({key(x, 1.0), *others}) == 7


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("d", "causal", "heads_kv"),
    [(64, True, 4), (192, True, 4), (192, False, 2), (256, True, 4), (256, False, 4), (256, True, 1)],
)
def test_gradients_by_cudnn_through_our_log_sum_exp(d: int, causal: bool, heads_kv: int) -> None:
    """As they come where `CUDNN` names a backward and no forward, and it the other way round."""
    if torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("dispatched to on Hopper only")
    q, k, v = inputs(512, 512, 4, heads_kv, d, d, device="cuda", dtype=torch.bfloat16)
    options = (d**-0.5, -1, 0 if causal else -1, None, None, None, None, 512, 512)
    upstream = torch.randn_like(q)
    dtypes = torch.float64, torch.bfloat16
    wide, other = ([x.detach().to(dtype).requires_grad_() for x in (q, k, v)] for dtype in dtypes)
    expected = torch.autograd.grad(plain(*wide, causal=causal), wide, upstream.double())
    allowed = torch.autograd.grad(plain(*other, causal=causal), other, upstream)
    for first, second in (("hopper", "cudnn"), ("cudnn", "auto"))[: 1 + (heads_kv == 4)]:
        out, lse = torch.ops.onegpu.attention_forward(q, k, v, *options, first)
        got = torch.ops.onegpu.attention_backward(upstream, None, q, k, v, out, lse, False, *options, second)
        for name, x, y, z in zip(("dq", "dk", "dv"), got, expected, allowed, strict=True):
            assert x.is_contiguous()
            assert_close(x, y, z, what=f"{first}, {second}, {name}")
