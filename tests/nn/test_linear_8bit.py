"""`Linear8bitLt` and `Int8Params` as modules: when they quantise, what casts, copies, files and moves do to them."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable

import pytest
import torch
from torch import nn

from onegpu import functional as F
from onegpu.nn import Int8Params, Linear8bitLt
from onegpu.nn.linear_8bit import check_int8
from tests.compare import assert_close
from tests.matrices import FLOATS, activations, weights
from tests.oracle import Oracle

Entries = dict[str, torch.Tensor]
OUTPUT_STEP = 0.02  # of the largest output: LLM.int8() rounds weights and activations to 1/254 of their row's largest


def make(device: str | None = "cpu", seed: int = 0, dtype: torch.dtype = torch.float32, **kwargs) -> Linear8bitLt:
    """66 inputs, 40 outputs; not quantised where ``device`` is None."""
    layer = Linear8bitLt(66, 40, **{"has_fp16_weights": False, "threshold": 6.0, **kwargs})
    w = weights((40, 66), torch.float32, seed=seed).clamp(-0.3, 0.3)
    layer.load_state_dict({"weight": w, "bias": torch.linspace(-1, 1, 40)}, strict=False)
    return layer.to(dtype) if device is None else layer.to(dtype).to(device)


def assert_same_layer(one: Linear8bitLt, other: Linear8bitLt) -> None:
    mine, theirs = one.state_dict(), other.state_dict()
    assert list(mine) == list(theirs)
    for name, tensor in mine.items():
        assert tensor.dtype == theirs[name].dtype and torch.equal(tensor.cpu(), theirs[name].cpu()), name
    x = activations((3, 66), torch.float32).to(one.weight.device)
    assert torch.equal(one(x).cpu(), other(x.to(other.weight.device)).cpu())


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(66,), (5, 66), (2, 3, 66), (2, 1, 3, 66), (0, 66)])
def test_forward_and_gradient(device: str, shape: tuple[int, ...], bias: bool, dtype: torch.dtype) -> None:
    layer = make(device, dtype=dtype, bias=bias)
    w = layer.dequantize()
    x = activations(shape, dtype, device).requires_grad_()
    y = layer(x)
    wanted = nn.functional.linear(x.float(), w, layer.bias.float() if bias else None).detach()
    assert y.dtype == dtype and y.shape == (*shape[:-1], 40)
    if y.numel():  # the exact comparison is that of the op, in tests/kernels/test_linear_int8.py
        assert (y - wanted).abs().max() <= OUTPUT_STEP * wanted.abs().max()
    grad = activations(tuple(y.shape), dtype, device, seed=6)
    y.backward(grad)
    assert_close(x.grad, grad.float() @ w, grad.flip(-1) @ w.to(dtype).flip(0), gradient=True)
    assert layer.weight.grad is None and (not bias or layer.bias.grad is not None)


@pytest.mark.parametrize("threshold", [0.0, 6.0])
def test_state_dict_is_bitsandbytes_and_its_loads(bitsandbytes: Oracle, device: str, threshold: float) -> None:
    layer = make(device, dtype=torch.bfloat16, threshold=threshold)
    layer.exact = True
    x = activations((5, 66), torch.float16)
    theirs = bitsandbytes.run(
        """
        layer = bnb.nn.Linear8bitLt(66, 40, has_fp16_weights=False, threshold=threshold)
        layer.load_state_dict({"weight": weight, "bias": bias})
        layer = layer.to(torch.bfloat16).to(device)
        state = bnb.MatmulLtState()
        state.CB, state.SCB = layer.weight.CB, layer.weight.SCB
        state.threshold, state.has_fp16_weights = threshold, False
        y = bnb.autograd._functions.MatMul8bitLt.apply(x.to(device), layer.weight.CB, None, layer.bias.half(), state)
        result = {"state": {name: t.cpu() for name, t in layer.state_dict().items()}, "y": y.detach().cpu()}
        """,
        weight=weights((40, 66), torch.float32).clamp(-0.3, 0.3),
        bias=torch.linspace(-1, 1, 40),
        threshold=threshold,
        device=device,
        x=x,
    )
    ours = layer.state_dict()
    assert set(ours) == set(theirs["state"]) == {"weight", "bias", "SCB", "weight_format"}
    for name, tensor in ours.items():
        assert tensor.dtype == theirs["state"][name].dtype and torch.equal(tensor.cpu(), theirs["state"][name]), name
    loaded = Linear8bitLt(66, 40, has_fp16_weights=False, threshold=threshold).to(torch.bfloat16).to(device)
    loaded.exact = True
    loaded.load_state_dict(theirs["state"])
    assert_same_layer(layer, loaded)
    error = (loaded(x.to(device)).cpu().float() - theirs["y"].float()).abs().max()
    assert error <= 1e-3 * theirs["y"].abs().max()


MOVES: dict[str, Callable[[nn.Module], nn.Module]] = {
    "to(device)": lambda m: m.to("cpu"),
    "cpu()": lambda m: m.cpu(),
    "to(device, dtype)": lambda m: m.to("cpu", torch.float16),
    "of a parent": lambda m: nn.Sequential(m).to("cpu")[0],
    "of the weight": lambda m: (m.weight.to("cpu"), m)[1],
}


@pytest.mark.parametrize("move", MOVES)
def test_the_first_move_quantises_and_nothing_before_it(move: str) -> None:
    layer = make(None)
    w = layer.weight.data.clone()
    for cast in (layer.half, layer.float, lambda: layer.to(torch.bfloat16)):
        cast()
        assert layer.weight.is_floating_point() and layer.SCB is None and isinstance(layer.weight, Int8Params)
        with pytest.raises(RuntimeError, match="move it to a device"):
            layer(torch.ones(1, 66))
    layer = MOVES[move](make(None).half())
    codes, maxima, _ = F.int8_vectorwise_quant(w.half())
    assert layer.weight.dtype == torch.int8 and layer.bias.dtype == torch.float16
    assert torch.equal(layer.weight.data, codes) and torch.equal(layer.state_dict()["SCB"], maxima)
    assert layer.weight.CB is not None and layer.SCB is not None and not layer.weight.requires_grad
    assert layer(torch.ones(1, 66)).shape == (1, 40)


def test_a_cast_after_it_reaches_the_bias_only(device: str) -> None:
    layer = make(device)
    codes, maxima = layer.weight.data.clone(), layer.SCB.clone()
    for cast in (lambda m: m.half(), lambda m: m.to(torch.bfloat16), lambda m: m.to(device, torch.float16)):
        cast(layer)
        assert layer.bias.dtype in (torch.float16, torch.bfloat16)
        assert torch.equal(layer.weight.data, codes) and layer.SCB.dtype == torch.float32
        assert torch.equal(layer.SCB, maxima) and layer.weight.SCB is layer.SCB


@pytest.mark.gpu
def test_a_move_between_devices_keeps_every_bit() -> None:
    layer = make()
    layer.exact = True
    there = copy.deepcopy(layer).cuda()
    assert all(t.device.type == "cuda" for t in (*there.parameters(), *there.buffers()))
    assert_same_layer(layer, copy.deepcopy(there).cpu())


@pytest.mark.parametrize("copier", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deepcopy", "pickle"])
def test_copies_are_independent(device: str, copier: Callable[..., Linear8bitLt]) -> None:
    layer = make(device)
    other = copier(layer)
    assert type(other.weight) is Int8Params
    assert_same_layer(layer, other)
    codes, maxima = layer.weight.data.clone(), layer.SCB.clone()
    other.weight.data.zero_()
    other.SCB.zero_()
    assert torch.equal(layer.weight.data, codes) and torch.equal(layer.SCB, maxima)
    float_copy = copier(make(None))
    assert float_copy.weight.is_floating_point() and float_copy.to(device).weight.dtype == torch.int8


def test_a_float_weight_learns_and_is_quantised_anew(device: str) -> None:
    """``has_fp16_weights``, bitsandbytes' default: the float matrix stays, also when moved."""
    layer = Linear8bitLt(66, 40).to(device)
    parameter = layer.weight
    assert layer.weight.is_floating_point() and layer.weight.requires_grad and layer.SCB is None
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    x, target = activations((32, 66), torch.float32, device) / 5, activations((32, 40), torch.float32, device, 2)
    losses = []
    for _ in range(20):
        loss = (layer(x) - target).square().mean()
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[-1] < 0.9 * losses[0]
    layer.to(torch.bfloat16)
    assert layer.weight is parameter and parameter.dtype == torch.bfloat16 and parameter.grad.dtype == torch.bfloat16
    assert set(layer.state_dict()) == {"weight", "bias"}
    assert torch.equal(layer.dequantize(torch.float32), parameter.detach().float())


def test_parameters_buffers_and_state() -> None:
    for layer in (make(None), make(), make().half(), copy.deepcopy(make())):
        assert [name for name, _ in layer.named_parameters()] == ["weight", "bias"]
    layer = make()
    assert [name for name, _ in layer.named_buffers()] == ["SCB"]
    assert layer.nbytes() == {"weight": 40 * 66, "scales": 160, "bias": 160}
    assert layer.state.SCB is layer.SCB and layer.state.threshold == 6.0 and not layer.state.has_fp16_weights
    assert torch.equal(layer.state.CB, layer.weight.data) and make(None).state.CB is None


def test_a_weight_can_be_assigned_as_peft_does_on_merge(device: str) -> None:
    layer = make(device)
    w = weights((40, 66), torch.float32, seed=9)
    fresh = Linear8bitLt(66, 40, has_fp16_weights=False, threshold=6.0)
    fresh.load_state_dict({"weight": w, "bias": layer.bias.detach().cpu()})
    fresh = fresh.to(device)
    layer.weight = Int8Params(w.clone(), requires_grad=False, has_fp16_weights=False).to(device)
    assert_same_layer(layer, fresh)
    other = make(device)
    other.weight = Int8Params(w.clone(), requires_grad=False, has_fp16_weights=False)
    other.weight.to(device)  # in place: the maxima of the old codes must not be used for the new ones
    assert_same_layer(other, fresh)
    other.weight = nn.Parameter(other.weight.data, requires_grad=False)
    assert isinstance(other.weight, Int8Params)
    assert_same_layer(other, fresh)


def test_meta_and_to_empty(device: str) -> None:
    layer = make(device)
    empty = copy.deepcopy(layer).to("meta")
    y = empty(torch.ones(5, 66, device="meta"))
    assert y.is_meta and y.shape == (5, 40)
    empty = empty.to_empty(device=device)
    assert empty.weight.dtype == torch.int8 and empty.SCB.dtype == torch.float32 and empty.SCB.device.type == device
    empty.load_state_dict(layer.state_dict())
    assert_same_layer(layer, empty)


TARGETS: dict[str, Callable[[], Linear8bitLt]] = {
    "float": lambda: make(None, seed=1),
    "quantised": lambda: make(seed=1),
    "learning": lambda: make(None, seed=1, has_fp16_weights=True),
}


@pytest.mark.parametrize("target", TARGETS)
def test_entries_load_as_copies(target: str) -> None:
    source, module = make(), TARGETS[target]()
    result = module.load_state_dict(source.state_dict())
    assert not result.missing_keys and not result.unexpected_keys
    assert_same_layer(source, module)
    source.weight.data.zero_()
    source.SCB.zero_()
    assert module.weight.count_nonzero() > 0 and module.SCB.count_nonzero() > 0


@pytest.mark.parametrize("quantised", [False, True])
def test_entries_load_into_meta(device: str, quantised: bool) -> None:
    source = make(device)
    module = (make(seed=1) if quantised else make(None, seed=1)).to("meta")
    module.load_state_dict(source.state_dict(), assign=True)
    assert_same_layer(source, module)


FAULTS: dict[str, tuple[Callable[[Entries], object], str]] = {
    "col32": (lambda e: e.update(weight_format=torch.tensor(1, dtype=torch.uint8)), r"weight_format=1 \(col32\)"),
    "turing": (lambda e: e.update(weight_format=torch.tensor(2, dtype=torch.uint8)), r"weight_format=2 \(col_turing"),
    "ampere": (lambda e: e.update(weight_format=torch.tensor(3, dtype=torch.uint8)), r"weight_format=3 \(col_ampere"),
    "unknown": (lambda e: e.update(weight_format=torch.tensor(7, dtype=torch.uint8)), r"weight_format=7 \(unknown"),
    "short scales": (lambda e: e.update(SCB=e["SCB"][:-1]), r"SCB is torch.float32 \(39,\)"),
    "half scales": (lambda e: e.update(SCB=e["SCB"].half()), "SCB is torch.float16"),
    "NaN scale": (lambda e: e["SCB"].fill_(float("nan")), "SCB holds NaN"),
    "infinite scale": (lambda e: e["SCB"].fill_(float("inf")), "SCB holds NaN or infinity"),
    "reshaped": (lambda e: e.update(weight=e["weight"].t()), r"weight has shape \(66, 40\)"),
    "float codes": (lambda e: e.update(weight=e["weight"].half()), "weight has dtype torch.float16"),
    "no scales": (lambda e: e.pop("SCB"), "int8 codes without SCB"),
}


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("target", TARGETS)
def test_a_broken_entry_is_an_error_that_names_it(fault: str, target: str) -> None:
    break_it, message = FAULTS[fault]
    entries = {name: tensor.clone() for name, tensor in make().state_dict().items()}
    break_it(entries)
    parent = nn.Sequential(TARGETS[target]())
    with pytest.raises(RuntimeError, match=rf"0\.weight: .*{message}"):
        parent.load_state_dict({f"0.{name}": tensor for name, tensor in entries.items()})


def test_a_float_weight_for_a_quantised_module_is_an_error() -> None:
    for strict in (True, False):
        with pytest.raises(RuntimeError, match="this layer is quantised"):
            make().load_state_dict(make(None).state_dict(), strict=strict)


def test_check_int8_passes_what_fits() -> None:
    codes, maxima = torch.ones(4, 8, dtype=torch.int8), torch.ones(4)
    for layout in (None, 0, torch.tensor(0, dtype=torch.uint8)):
        assert check_int8(codes, maxima, layout, (4, 8)) is None
    assert check_int8(codes.to("meta"), maxima.to("meta"), None, (4, 8)) is None
    with pytest.raises(ValueError, match="weight has shape"):
        check_int8(codes, maxima, 0, (8, 4))


def test_bad_arguments_are_named() -> None:
    with pytest.raises(ValueError, match=r"threshold=-1 .*6\.0"):
        Linear8bitLt(66, 40, threshold=-1)


def test_training_on_a_cpu_rounds_no_activation() -> None:
    layer, x = make(), activations((5, 66), torch.float32)
    wanted = torch.nn.functional.linear(x, layer.dequantize(), layer.bias)
    assert torch.equal(layer.train()(x), wanted) and not torch.equal(layer.eval()(x), wanted)
    layer.exact = True
    assert torch.equal(layer.train()(x), layer.eval()(x))
