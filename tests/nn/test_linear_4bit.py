"""`Linear4bit` as a module: when it quantises, what casts, copies, files and moves do to it."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable

import pytest
import torch
from torch import nn

from onegpu.nn import Linear4bit, LinearFP4, LinearNF4, Params4bit
from tests.compare import assert_close
from tests.matrices import FLOATS, activations, weights
from tests.oracle import Oracle


def make(
    device: str = "cpu", nested: bool = True, storage: torch.dtype = torch.uint8, dtype=torch.float32, **kwargs
) -> Linear4bit:
    """66 inputs, 40 outputs: blocks cross rows, and the last one is short."""
    options = {"quant_type": "nf4", "compress_statistics": nested, "quant_storage": storage, **kwargs}
    layer = Linear4bit(66, 40, **options)
    layer.load_state_dict({"weight": weights((40, 66), torch.float32), "bias": torch.linspace(-1, 1, 40)}, strict=False)
    return layer.to(dtype).to(device)


def assert_same_layer(one: Linear4bit, other: Linear4bit) -> None:
    """The same bytes in every entry of the state dict, and the same output."""
    mine, theirs = one.state_dict(), other.state_dict()
    assert list(mine) == list(theirs)
    for name, tensor in mine.items():
        assert tensor.dtype == theirs[name].dtype, name
        assert torch.equal(tensor.cpu().view(torch.uint8), theirs[name].cpu().view(torch.uint8)), name
    x = activations((3, 66), torch.float32).to(one.weight.device)
    assert torch.equal(one(x).cpu(), other(x.to(other.weight.device)).cpu())


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(66,), (5, 66), (2, 3, 66), (2, 1, 3, 66), (0, 66)])
def test_forward_and_gradient(device: str, shape: tuple[int, ...], bias: bool, dtype: torch.dtype) -> None:
    layer = make(device, dtype=dtype, bias=bias)
    w = layer.dequantize(torch.float32)
    x = activations(shape, dtype, device).requires_grad_()
    y = layer(x)
    b = layer.bias if bias else torch.zeros(40, dtype=dtype, device=device)
    assert y.dtype == dtype and y.shape == (*shape[:-1], 40)
    low = w.to(dtype)
    assert_close(y.detach(), (x.float() @ w.t() + b.float()).detach(), (x.flip(-1) @ low.flip(-1).t() + b).detach())
    grad = activations(tuple(y.shape), dtype, device, seed=6)
    y.backward(grad)
    assert_close(x.grad, grad.float() @ w, grad.flip(-1) @ low.flip(0), gradient=True)
    assert layer.weight.grad is None and (not bias or layer.bias.grad is not None)


@pytest.mark.parametrize("compute", [None, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("dtype", FLOATS)
def test_compute_dtype_is_inside_only(device: str, dtype: torch.dtype, compute: torch.dtype | None) -> None:
    layer = make(device, compute_dtype=compute)
    x = activations((5, 66), dtype, device)
    inside = dtype if compute in (None, torch.float32) else compute
    a, w, b = x.to(inside), layer.dequantize(), layer.bias.detach().to(inside)
    wanted = nn.functional.linear(a.float(), w, b.float())
    reordered = (b + a.flip(1) @ w.to(inside).flip(1).t()).to(dtype)
    assert_close(layer(x).detach(), wanted, reordered)


def test_autocast_and_meta_give_the_dtype_and_shape_of_nn_linear(device: str) -> None:
    layer, plain = make(device), nn.Linear(66, 40, device=device)
    x = activations((5, 66), torch.float32, device)
    with torch.autocast(device, dtype=torch.bfloat16):
        assert layer(x).dtype == plain(x).dtype == torch.bfloat16
    y = make().to("meta")(x.to("meta"))
    assert y.is_meta and y.shape == (5, 40) and y.dtype == torch.float32


def test_the_output_can_be_modified_in_place_while_learning(device: str) -> None:
    layer = make(device)
    x = activations((2, 5, 66), torch.float32, device).requires_grad_()
    out = layer(x)
    out += 1
    out.sum().backward()
    assert torch.isfinite(x.grad).all() and x.grad.count_nonzero() > 0


MOVES: dict[str, Callable[[nn.Module], nn.Module]] = {
    "to(device)": lambda m: m.to("cpu"),
    "cpu()": lambda m: m.cpu(),
    "to(device, dtype)": lambda m: m.to("cpu", torch.float16),
    "of a parent": lambda m: nn.Sequential(m).to("cpu")[0],
}


@pytest.mark.parametrize("move", MOVES)
def test_the_first_move_quantises_and_nothing_before_it(move: str) -> None:
    layer = Linear4bit(66, 40, quant_type="nf4")
    for cast in (layer.half, layer.float, lambda: layer.to(torch.bfloat16), lambda: layer.to("meta")):
        cast()
        assert not layer.weight.bnb_quantized and layer.weight.shape == (40, 66) and layer.quant_state is None
        with pytest.raises(RuntimeError, match="move it to a device"):
            layer(torch.ones(1, 66))
    layer = Linear4bit(66, 40, quant_type="nf4").half()
    assert layer.weight.dtype == torch.float16
    layer = MOVES[move](layer)
    assert layer.weight.bnb_quantized and layer.weight.dtype == torch.uint8
    assert layer.quant_state.dtype == torch.float16 and layer.bias.dtype == torch.float16


@pytest.mark.gpu
def test_a_move_between_devices_keeps_every_bit() -> None:
    layer = make()
    there = copy.deepcopy(layer).cuda()
    assert all(t.device.type == "cuda" for t in (*there.parameters(), *there.buffers()))
    back = copy.deepcopy(there).cpu()
    assert_same_layer(layer, back)


@pytest.mark.parametrize("storage", [torch.uint8, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("nested", [False, True])
def test_a_cast_after_it_reaches_the_bias_only(device: str, nested: bool, storage: torch.dtype) -> None:
    layer = make(device, nested, storage)
    before = {name: tensor.clone() for name, tensor in layer.state_dict().items()}
    for cast in (lambda m: m.half(), lambda m: m.to(torch.bfloat16), lambda m: m.to(device, torch.float16)):
        cast(layer)
        assert layer.bias.dtype in (torch.float16, torch.bfloat16) and layer.weight.dtype == storage
        for name, tensor in layer.state_dict().items():
            if name != "bias":
                assert tensor.dtype == before[name].dtype, name
                assert torch.equal(tensor.view(torch.uint8), before[name].view(torch.uint8)), name
    assert layer(activations((2, 66), torch.float16, device)).dtype == torch.float16


@pytest.mark.parametrize("storage", [torch.uint8, torch.bfloat16])
@pytest.mark.parametrize("copier", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deepcopy", "pickle"])
def test_copies_are_independent(device: str, copier: Callable[..., Linear4bit], storage: torch.dtype) -> None:
    layer = make(device, storage=storage)
    other = copier(layer)
    assert type(other) is Linear4bit and other.weight.quant_state is not layer.weight.quant_state
    assert_same_layer(layer, other)
    entries = {name: tensor.clone() for name, tensor in layer.state_dict().items()}
    for tensor in (*other.parameters(), *other.buffers()):
        tensor.data.zero_()
    assert all(torch.equal(t, entries[n]) for n, t in layer.state_dict().items() if not t.is_floating_point())
    assert layer(torch.ones(1, 66, device=device)).abs().sum() > 0
    assert other(torch.ones(1, 66, device=device)).abs().sum() == 0, "the copy's own scales are not what it uses"


def test_parameters_and_buffers_are_weight_bias_and_scales() -> None:
    for layer in (Linear4bit(66, 40), make(), make().half(), copy.deepcopy(make())):
        assert [name for name, _ in layer.named_parameters()] == ["weight", "bias"]
    layer = make()
    assert [name for name, _ in layer.named_buffers()] == ["absmax", "nested_absmax", "nested_offset"]
    assert [name for name, _ in make(nested=False).named_buffers()] == ["absmax"]
    assert layer.nbytes() == {"weight": 1320, "scales": 42 + 4 + 4, "bias": 160, "expanded": 0}
    assert make(nested=False).nbytes()["scales"] == 42 * 4


def test_meta_and_to_empty(device: str) -> None:
    layer = make(device)
    entries = layer.state_dict()
    empty = copy.deepcopy(layer).to("meta").to_empty(device=device)
    assert empty.weight.bnb_quantized and empty.weight.device.type == empty.absmax.device.type == device
    assert empty.weight.shape == layer.weight.shape and empty.absmax.shape == layer.absmax.shape
    empty.load_state_dict(entries)
    assert_same_layer(layer, empty)


def test_a_weight_can_be_assigned_as_peft_does_on_merge(device: str) -> None:
    layer, other = make(device), weights((40, 66), torch.float32, seed=9)
    old = layer.weight
    kwargs = {key: value for key, value in old.__dict__.items() if not key.startswith("_")}
    kwargs["bnb_quantized"], kwargs["requires_grad"] = False, False
    kwargs.pop("data", None)
    layer.weight = Params4bit(other, **kwargs).to(device)
    fresh = LinearNF4(66, 40)
    fresh.load_state_dict({"weight": other, "bias": layer.bias.detach().cpu()})
    assert_same_layer(layer, fresh.to(device))
    layer.weight = nn.Parameter(
        old.data, requires_grad=False
    )  # tools that lose the class: the bytes stay what they are
    assert isinstance(layer.weight, Params4bit) and layer.weight.bnb_quantized
    with pytest.raises(ValueError, match="weight=None"):
        layer.weight = None


def test_a_weight_quantised_in_place_is_found(device: str) -> None:
    layer = LinearFP4(66, 40)
    layer.load_state_dict({"weight": weights((40, 66), torch.float32), "bias": torch.linspace(-1, 1, 40)})
    layer.weight.to(device)
    layer.bias.data = layer.bias.data.to(device)
    assert_same_layer(layer, make(device, quant_type="fp4"))


def test_a_weight_expanded_on_the_cpu_gives_the_same_and_is_counted() -> None:
    layer = make()
    x = activations((3, 66), torch.float32)
    wanted = layer(x)
    layer.expand_on_cpu = True
    assert torch.equal(layer(x), wanted) and layer.expanded is None, "not while gradients may be asked for"
    with torch.no_grad():
        assert_close(layer(x), wanted.detach(), wanted.detach())
        assert layer.nbytes()["expanded"] == 40 * 66 * 4 and "expanded" not in layer.state_dict()
        assert layer(x.bfloat16()).dtype == torch.bfloat16 and layer.nbytes()["expanded"] == 40 * 66 * 2
        layer.weight = make(nested=False).weight
        assert layer.expanded is None


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("storage", [torch.uint8, torch.bfloat16])
def test_state_dict_is_bitsandbytes_and_each_loads_the_other(
    bitsandbytes: Oracle, device: str, kind: str, nested: bool, storage: torch.dtype
) -> None:
    layer = make(device, nested, storage, torch.bfloat16, quant_type=kind)
    theirs = bitsandbytes.run(
        """
        layer = bnb.nn.Linear4bit(66, 40, quant_type=kind, compress_statistics=nested, quant_storage=storage)
        layer.load_state_dict({"weight": weight, "bias": bias})
        layer = layer.to(torch.bfloat16).to(device)
        result = {name: tensor.cpu() for name, tensor in layer.state_dict().items()}
        """,
        weight=weights((40, 66), torch.float32),
        bias=torch.linspace(-1, 1, 40),
        kind=kind,
        nested=nested,
        storage=storage,
        device=device,
    )
    ours = layer.state_dict()
    assert set(ours) == set(theirs)
    for name, tensor in ours.items():
        assert tensor.dtype == theirs[name].dtype and tensor.shape == theirs[name].shape, name
        assert torch.equal(tensor.cpu().reshape(-1).view(torch.uint8), theirs[name].reshape(-1).view(torch.uint8)), name
    loaded = Linear4bit(66, 40, quant_type=kind, quant_storage=storage).to(device)
    loaded.load_state_dict(theirs)
    assert_same_layer(layer.to(torch.float32), loaded.to(torch.float32))


def test_a_weight_that_lost_its_state_gets_it_back_at_the_next_forward(device: str) -> None:
    layer = LinearNF4(64, 24).to(device)
    x = torch.ones(1, 64, device=device)
    wanted, state = layer(x), layer.weight.quant_state
    layer.weight.quant_state = None
    assert torch.equal(layer(x), wanted) and layer.weight.quant_state == state


@pytest.mark.parametrize("nested", [False, True])
def test_the_forward_is_one_graph(device: str, nested: bool) -> None:
    """No C++ compiler needed: Inductor's own cases are among bitsandbytes' tests (`benchmarks.bnb_suite --compile`)."""
    layer, x = make(device, nested), activations((3, 66), torch.float32, device)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        assert torch.equal(compiled(x), layer(x))
