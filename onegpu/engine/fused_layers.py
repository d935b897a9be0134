"""Reads the layers of a decoder as what a fused step takes: attention, MLP, and the order in which norms stand there.

The order is asked of the layer's own code: its forward runs with small functions in the place of its children, and the
result says which of the orders below it is.
"""

from __future__ import annotations

import copy
import inspect
import itertools
import sys
from collections.abc import Callable, Hashable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import nn

from onegpu.engine.fused_modules import Declined, Modules, children, mentions, unknown
from onegpu.kernels import decode_step as ops
from onegpu.kernels.decode_step import Heads, Matrix, Norm, Part
from onegpu.nn.stand_in import settings

SEQUENTIAL, PARALLEL, BEHIND = "sequential", "parallel", "behind"
_ATTENTIONS = {"self_attn", "self_attention", "attention", "attn"}
_OUTPUTS = {"o_proj", "out_proj", "dense", "c_proj"}
_PLAIN = (("dense_h_to_4h", "dense_4h_to_h"), ("c_fc", "c_proj"), ("fc1", "fc2"))
_FUNCTIONS = ("act_fn", "activation_fn", "act", "gelu_impl")


@dataclass(frozen=True)
class Layer:
    """Weights of a layer, and how they stand to each other.

    order: SEQUENTIAL, h += n1(attention(n0(h))), then h += n3(mlp(n2(h))); PARALLEL, h += attention(n0(h)) +
    mlp(n2(h)); BEHIND, h = n1(h + attention(h)), then h = n3(h + mlp(h)); norms n0 to n3, each may be None.
    up: gate and up if gated, as two parts, else one part.
    """

    order: str
    norms: tuple[Norm | None, Norm | None, Norm | None, Norm | None]
    qkv: Matrix
    heads: Heads
    out: Matrix
    up: Matrix
    gated: bool
    act: str
    down: Matrix

    @property
    def both(self) -> Matrix | None:
        """qkv and up as one product, where they read the same."""
        one, two = self.qkv, self.up
        alike = one._replace(parts=()) == two._replace(parts=()) and len(one.parts) == len(two.parts) == 1
        alike = alike and (one.parts[0].nested is None) == (two.parts[0].nested is None)
        same = self.order == PARALLEL and self.norms[0] is self.norms[2] and not self.gated
        return one._replace(parts=one.parts + two.parts) if alike and same and not one.transposed else None


class Order(NamedTuple):
    """As in `Layer`; the norms by their names."""

    kind: str
    norms: tuple[str | None, str | None, str | None, str | None]


def order_of(module: Any, attention: str, mlp: tuple[str, ...], norms: list[str]) -> Order:
    """In which order a layer calls its children: one of those in `Layer`, or it is declined."""
    stubs = {name: _Stub(i, name == attention) for i, name in enumerate([attention, *mlp, *norms])}
    small = copy.copy(module)
    small.__dict__ = {key: value for key, value in module.__dict__.items() if key not in ("forward", "_hf_hook")}
    small._parameters = {}
    small._modules = {name: stubs.get(name, nn.Identity()) for name in module._modules}
    small.training = False
    parameters = list(inspect.signature(type(module).forward).parameters.values())[2:]
    needed = {p.name: None for p in parameters if p.default is p.empty and p.kind is p.POSITIONAL_OR_KEYWORD}
    x = torch.linspace(-1.0, 1.5, 12).view(1, 3, 4)
    try:
        with torch.no_grad():
            got = type(small).forward(small, x.clone(), **needed)
    except (TypeError, ValueError, AttributeError, RuntimeError, LookupError) as error:
        raise Declined(f"{type(module).__name__}, which does not run without its parts: {error}") from error
    got = got[0] if isinstance(got, tuple) else got

    def feed(x: torch.Tensor) -> torch.Tensor:
        for name in mlp:
            x = stubs[name].of(x)
        return x

    for order in _orders(norms):
        functions = [(lambda x: x) if name is None else stubs[name].of for name in order.norms]
        want = _run(order.kind, functions, stubs[attention].of, feed, x)
        if isinstance(got, torch.Tensor) and got.shape == want.shape and torch.allclose(got, want, atol=1e-5):
            return order
    raise Declined(f"{type(module).__name__} calls its parts in another order")


def _orders(norms: list[str]) -> Iterator[Order]:
    for slots in itertools.permutations(range(4), len(norms)):
        placed: list[str | None] = [None] * 4
        for slot, name in zip(slots, norms, strict=True):
            placed[slot] = name
        yield Order(SEQUENTIAL, tuple(placed))  # type: ignore[arg-type]
    for names in itertools.permutations(norms):
        if len(names) == 1:
            yield Order(PARALLEL, (names[0], None, names[0], None))
        if len(names) == 2:
            yield Order(PARALLEL, (names[0], None, names[1], None))
            yield Order(BEHIND, (None, names[0], None, names[1]))


Function = Callable[[torch.Tensor], torch.Tensor]


def _run(kind: str, norms: list[Function], attention: Function, mlp: Function, h: torch.Tensor) -> torch.Tensor:
    if kind == PARALLEL:
        return h + attention(norms[0](h)) + mlp(norms[2](h))
    if kind == BEHIND:
        h = norms[1](h + attention(h))
        return norms[3](h + mlp(h))
    h = h + norms[1](attention(norms[0](h)))
    return h + norms[3](mlp(norms[2](h)))


class _Stub(nn.Module):
    """A function of its own, which adds the residual that some layers leave to their parts."""

    def __init__(self, index: int, attends: bool) -> None:
        super().__init__()
        self.index, self.attends = index, attends

    def of(self, x: torch.Tensor) -> torch.Tensor:
        """The function itself."""
        return torch.sin(x * (0.6 + 0.17 * self.index) + torch.linspace(0.1, 0.9, 4) * (1 + self.index)) * 1.3

    def forward(self, *args: Any, **named: Any) -> Any:
        """Of the first tensor; the second one, if there is one, is the residual."""
        given = [t for t in (*args, named.get("hidden_states"), named.get("residual")) if isinstance(t, torch.Tensor)]
        out = sum(given[1:], self.of(given[0]))
        return (out, None) if self.attends else out


class Layers:
    """Reads the layers of one model."""

    def __init__(self, modules: Modules, rotary: Any, config: Any) -> None:
        self.modules, self.rotary, self.config = modules, rotary, config
        self._rotates: set[str] = set()
        self._orders: dict[Hashable, Order] = {}
        self._frequencies: dict[str, tuple[torch.Tensor, float]] = {}

    def layer(self, module: Any) -> Layer:
        """Of one decoder layer."""
        parts = children(module)
        attentions = _ATTENTIONS & parts.keys()
        mlp = ("mlp",) if "mlp" in parts else ("fc1", "activation_fn", "fc2")
        if len(attentions) != 1 or not parts.keys() >= set(mlp):
            raise unknown(module, parts)
        (attention,) = attentions
        norms = {name: self.modules.norm(part) for name, part in parts.items() if name not in {attention, *mlp}}
        if len(norms) > 4:
            raise unknown(module, parts)
        key = settings(module), *parts
        if key not in self._orders:  # layers that differ in tensors alone run in the same order
            self._orders[key] = order_of(module, attention, mlp, list(norms))
        order = self._orders[key]
        qkv, heads, out = self._attention(parts[attention])
        own = parts.get("mlp", module)
        inside = {name: parts[name] for name in mlp} if own is module else children(own)
        up, gated, act, down = self._mlp(own, inside)
        width = self.config.hidden_size
        if out.columns != heads.query * heads.size or not out.rows == down.rows == qkv.columns == up.columns == width:
            raise Declined("projections whose sizes do not fit each other")
        if up.rows != (1 + gated) * down.columns or any(
            norm.gain is not None and len(norm.gain) != width for norm in norms.values()
        ):
            raise Declined("an MLP or a norm of another size")
        named = tuple(None if name is None else norms[name] for name in order.norms)
        return Layer(order.kind, named, qkv, heads, out, up, gated, act, down)  # type: ignore[arg-type]

    def _attention(self, module: Any) -> tuple[Matrix, Heads, Matrix]:
        parts = children(module)
        norms, outs = {"q_norm", "k_norm"} & parts.keys(), _OUTPUTS & parts.keys()
        rest, size = parts.keys() - norms - outs, getattr(module, "head_dim", getattr(module, "head_size", None))
        if len(outs) != 1 or len(norms) == 1 or not isinstance(size, int):
            raise unknown(module, parts)
        if rest == {"q_proj", "k_proj", "v_proj"}:
            qkv = self.modules.matrix(*(parts[name] for name in ("q_proj", "k_proj", "v_proj")))
            query, kv = (part.rows // size for part in qkv.parts[:2])
        elif len(rest) == 1 and rest <= {"qkv_proj", "query_key_value", "c_attn"}:
            qkv, query = self.modules.matrix(parts[next(iter(rest))]), self.config.num_attention_heads
            kv = getattr(module, "num_kv_heads", getattr(self.config, "num_key_value_heads", None) or query)
        else:
            raise unknown(module, parts)
        if (query + 2 * kv) * size != qkv.rows or kv < 1 or query % kv:
            raise Declined("attention of another form")
        if query // kv != getattr(module, "num_key_value_groups", query // kv):
            raise Declined("attention of another form")
        scale = getattr(module, "scaling", getattr(module, "inv_norm_factor", None))
        if not isinstance(scale, float) or (getattr(module, "slow_but_exact", False) and module.pretraining_tp > 1):
            raise Declined("attention of another form")
        heads = Heads(query, kv, size, scale, self._window(module), grouped="query_key_value" in rest)
        if norms:
            heads = self._head_norms(heads, self.modules.norm(module.q_norm), self.modules.norm(module.k_norm))
        heads = self._cut(heads, module)
        return qkv, self._placed(heads, module), self.modules.matrix(parts[next(iter(outs))])

    def _head_norms(self, heads: Heads, q: Norm, k: Norm) -> Heads:
        if q.gain is None or k.gain is None:
            raise Declined("norms of queries and keys of another form")
        each = (heads.size, heads.size), (heads.query * heads.size, heads.kv * heads.size)
        if q.kind != "rms" or k.kind != "rms" or q[2:] != k[2:] or (len(q.gain), len(k.gain)) not in each:
            raise Declined("norms of queries and keys of another form")
        return heads._replace(q_gain=q.gain, k_gain=k.gain, eps=q.eps, one=q.one)

    def _cut(self, heads: Heads, module: Any) -> Heads:
        """Caps and clips, which are functions outside of any module."""
        cap, clip = (float(getattr(self.config, name, None) or 0.0) for name in ("attn_logit_softcapping", "clip_qkv"))
        for value, name in ((cap, "attn_logit_softcapping"), (clip, "clip_qkv")):
            if value and not mentions(module, name):
                raise Declined(f"the configuration has {name}")
        if getattr(self.config, "_attn_implementation", None) == "sdpa":
            cap = 0.0  # transformers 5.17 lets Gemma 2 take that function, which ignores it
        return heads._replace(cap=cap, clip=clip)

    def _placed(self, heads: Heads, module: Any) -> Heads:
        """With what makes attention depend on positions."""
        home = sys.modules[type(module).__module__]
        if "alibi" in inspect.signature(type(module).forward).parameters and getattr(self.config, "alibi", True):
            build = getattr(home, "build_alibi_tensor", None)
            if build is None or heads.kv != heads.query:
                raise Declined("positions of another form")
            steps, coarse = (
                build(torch.ones(1, 300, dtype=torch.int64), heads.query, dtype).view(heads.query, 300)
                for dtype in (torch.float32, torch.bfloat16)
            )
            slopes = steps[:, 1] - steps[:, 0]
            scaled = getattr(module, "beta", 1.0) == heads.scale  # Falcon's, which it adds to scores in float32
            rounded = not scaled and torch.equal((slopes[:, None] * torch.arange(300)).bfloat16(), coarse)
            slopes = slopes * heads.scale if scaled else slopes
            return heads._replace(slopes=slopes.to(self.modules.table.device), rounded=rounded)
        turns = getattr(home, "apply_rotary_pos_emb", None)
        if self.rotary is None:
            if turns is not None or hasattr(module, "rotary_ndims"):
                raise Declined("a rotary embedding of another form")
            return heads
        if not getattr(module, "use_rope", True):
            return heads
        inv_freq, scale = self._rotation(getattr(module, "layer_type", None))
        self._check_rotation(home.__name__, turns, inv_freq, heads.size)
        return heads._replace(inv_freq=inv_freq, rope_scale=scale)

    def _rotation(self, kind: str | None) -> tuple[torch.Tensor, float]:
        """Frequencies, and what sines and cosines are multiplied by, of a kind of layers."""
        prefix = f"{kind}_" if hasattr(self.rotary, f"{kind}_inv_freq") else ""
        if prefix not in self._frequencies:
            named = getattr(self.rotary, "rope_type", "default")
            inv_freq = getattr(self.rotary, f"{prefix}inv_freq", None)
            changing = (named.get(kind) if isinstance(named, dict) else named) in ("dynamic", "longrope")
            if not isinstance(inv_freq, torch.Tensor) or changing:
                raise Declined("a rotary embedding that changes with the length, or of another form")
            scale = float(getattr(self.rotary, f"{prefix}attention_scaling", 1.0))
            self._frequencies[prefix] = inv_freq.detach().float(), scale
        return self._frequencies[prefix]

    def _check_rotation(self, home: str, turn: Any, inv_freq: torch.Tensor, size: int) -> None:
        """The function that the attention's source calls turns halves, not neighbours; asked once per source."""
        turned = 2 * inv_freq.numel()
        if turn is None or turned > size:
            raise Declined("a rotary embedding of another form")
        if home in self._rotates:
            return
        angle = torch.linspace(0.1, 3.0, turned // 2).repeat(2).view(1, 1, -1)
        for width in (size, turned):  # some pass only what turns
            x = torch.linspace(-1.0, 1.0, width).view(1, 1, 1, width)
            want = ops.rotate(x, angle.cos(), angle.sin())
            try:
                q, k = turn(x, 2.0 * x, angle.cos(), angle.sin())
            except RuntimeError:
                continue  # the widths do not fit
            if q.shape == want.shape and torch.allclose(q, want, atol=1e-6) and torch.allclose(k, 2 * want, atol=1e-6):
                self._rotates.add(home)
                return
        raise Declined("a rotary embedding of another form")

    def _window(self, module: Any) -> int | None:
        if hasattr(module, "sliding_window"):
            window = module.sliding_window
        else:
            window = getattr(self.config, "sliding_window", None)
            kinds = getattr(self.config, "layer_types", None)
            if kinds is not None and kinds[module.layer_idx] != "sliding_attention":
                window = None
        if window is not None and not isinstance(window, int):
            raise Declined("a sliding window of another form")
        return window

    def _mlp(self, module: Any, parts: dict[str, nn.Module]) -> tuple[Matrix, bool, str, Matrix]:
        function = next((found for name in _FUNCTIONS if (found := getattr(module, name, None)) is not None), None)
        if function is None:
            raise Declined("an MLP without an activation")
        act, names = self.modules.activation(function), {name for name, part in parts.items() if part is not function}
        for one, two in _PLAIN:
            if names == {one, two}:
                return self.modules.matrix(parts[one]), False, act, self.modules.matrix(parts[two])
        if names == {"gate_up_proj", "down_proj"}:
            both = self.modules.matrix(module.gate_up_proj)
            up = both._replace(parts=_halves(both))
        elif names == {"gate_proj", "up_proj", "down_proj"}:
            up = self.modules.matrix(module.gate_proj, module.up_proj)
        else:
            raise unknown(module, parts)
        if up.parts[0].rows != up.parts[1].rows:
            raise Declined("an MLP of another form")
        return up, True, act, self.modules.matrix(module.down_proj)


def _halves(matrix: Matrix) -> tuple[Part, Part]:
    """Gate and up of one stored matrix: views."""
    (part,) = matrix.parts
    if part.nested is not None or matrix.transposed:
        raise Declined("gate and up in one matrix that is transposed or has quantised scales")

    def half(tensor: torch.Tensor | None, index: int) -> torch.Tensor | None:
        return None if tensor is None else tensor.chunk(2)[index]

    gate, up = (
        Part(part.rows // 2, part.weight.chunk(2)[index], half(part.bias, index), half(part.scales, index))
        for index in range(2)
    )
    return gate, up
