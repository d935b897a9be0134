"""Reads a decoder model as what a fused step needs, or declines. See `onegpu.engine.fused_step`."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from onegpu.engine.fingerprint import runs_python
from onegpu.kernels import decode_step as ops
from onegpu.kernels.decode_step import Heads, Matrix, Part
from onegpu.nn import Linear4bit, Linear8bitLt


class Declined(Exception):
    """A model has no fused step; the message says why. Never reaches the user: its own forward then runs."""


@dataclass(frozen=True)
class Layer:
    """Weights of a layer; gate_up has two parts."""

    attention_gain: torch.Tensor
    attention_eps: float
    qkv: Matrix
    heads: Heads
    out: Matrix
    mlp_gain: torch.Tensor
    mlp_eps: float
    gate_up: Matrix
    act: str
    down: Matrix


@dataclass(frozen=True)
class Structure:
    """Weights of a model. width: of the residual stream. inner: of the MLP."""

    embedding: torch.Tensor
    layers: tuple[Layer, ...]
    gain: torch.Tensor
    eps: float
    head: Matrix

    @property
    def width(self) -> int:
        return self.embedding.shape[1]

    @property
    def inner(self) -> int:
        return self.layers[0].down.columns

    @property
    def device(self) -> torch.device:
        return self.embedding.device

    @property
    def dtype(self) -> torch.dtype:
        return self.embedding.dtype

    def matrices(self) -> Iterator[Matrix]:
        """All of them."""
        for layer in self.layers:
            yield from (layer.qkv, layer.out, layer.gate_up, layer.down)
        yield self.head

    def made(self) -> list[torch.Tensor]:
        """What nobody else may hold: read as the kernels take it, from a model that has it in another dtype."""
        return [layer.heads.inv_freq for layer in self.layers if layer.heads.inv_freq is not None]


# Numbers and switches that the modules of such a model may hold; anything else there may change what forward does.
_KNOWN = frozenset(
    {
        "training", "config", "hidden_size", "layer_idx", "head_dim", "num_key_value_groups", "num_key_value_heads",
        "num_heads", "num_attention_heads", "scaling", "attention_dropout", "is_causal", "sliding_window", "layer_type",
        "use_rope", "intermediate_size", "act_fn", "activation_fn", "variance_epsilon", "padding_idx", "vocab_size",
        "gradient_checkpointing", "has_sliding_layers", "attention_type", "block_size", "rope_theta",
        "max_position_embeddings", "rotary_fn", "is_quantized", "is_loaded_in_4bit", "is_loaded_in_8bit",
    }
)  # fmt: skip
# Factors that some models apply outside of any module.
_FACTORS = {
    "logits_scaling": 1.0, "logit_scale": 1.0, "residual_multiplier": 1.0, "embedding_multiplier": 1.0,
    "attention_multiplier": None, "clip_qkv": None, "final_logit_softcapping": None, "attn_logit_softcapping": None,
    "lm_head_multiplier": 1.0, "scale_emb": 1.0, "alibi": False,
}  # fmt: skip


def read(model: Any) -> Structure:
    """The structure of a model.

    Raises:
        Declined: with the reason.
    """
    if model.training:
        raise Declined("the model is in training mode")
    if (reason := runs_python(model)) is not None:
        raise Declined(reason)
    trunk: Any = getattr(model, "model", None)
    if trunk is None:
        raise Declined("no decoder under the name `model`")
    _children(model, {"model", "lm_head"})
    _children(trunk, {"embed_tokens", "layers", "norm", "rotary_emb"})
    _factors(model.config)
    embedding = trunk.embed_tokens
    if type(embedding) is not nn.Embedding or embedding.max_norm is not None:
        raise Declined("an embedding of another kind")
    table = embedding.weight.detach()
    if not table.is_contiguous() or table.is_meta:
        raise Declined("an embedding that is not in memory in one piece")
    reader = _Reader(table, trunk.rotary_emb, model.config)
    layers = tuple(reader.layer(module) for module in trunk.layers.children())
    plain: dict[str, Any] = {"window": None, "inv_freq": None, "q_gain": None, "k_gain": None}
    if len({(layer.heads._replace(**plain), layer.down.columns) for layer in layers}) != 1:
        raise Declined("layers of several sizes")
    if len(layers) != model.config.num_hidden_layers:
        raise Declined("another number of layers than the configuration says")
    gain, eps = reader.norm(trunk.norm)
    return Structure(table, layers, gain, eps, reader.matrix(model.lm_head))


class _Reader:
    """Reads the layers of one model."""

    def __init__(self, table: torch.Tensor, rotary: Any, config: Any) -> None:
        self.table, self.config = table, config
        self._acts: dict[type, str] = {}
        inv_freq = getattr(rotary, "inv_freq", None)
        if not isinstance(inv_freq, torch.Tensor) or getattr(rotary, "rope_type", "default") in ("dynamic", "longrope"):
            raise Declined("a rotary embedding that changes with the length, or of another form")
        self.inv_freq = inv_freq.detach().float()
        self.rope_scale = float(getattr(rotary, "attention_scaling", 1.0))
        self._rotates: set[str] = set()

    def layer(self, module: Any) -> Layer:
        """Of one decoder layer."""
        dropouts = {name for name, child in module.named_children() if type(child) is nn.Dropout}
        _children(module, {"self_attn", "mlp", "input_layernorm", "post_attention_layernorm"} | dropouts)
        attention, mlp = module.self_attn, module.mlp
        attention_gain, attention_eps = self.norm(module.input_layernorm)
        mlp_gain, mlp_eps = self.norm(module.post_attention_layernorm)
        qkv, heads = self._attention(attention)
        gate_up, act = self._mlp(mlp)
        out, down = self.matrix(attention.o_proj), self.matrix(mlp.down_proj)
        if out.columns != heads.query * heads.size or not out.rows == down.rows == qkv.columns == self.table.shape[1]:
            raise Declined("projections whose sizes do not fit each other")
        return Layer(attention_gain, attention_eps, qkv, heads, out, mlp_gain, mlp_eps, gate_up, act, down)

    def norm(self, module: Any) -> tuple[torch.Tensor, float]:
        """Gain and epsilon of an RMSNorm; what it computes for a few values decides that it is one."""
        _children(module, set())
        gain, eps = getattr(module, "weight", None), getattr(module, "variance_epsilon", getattr(module, "eps", None))
        if not isinstance(gain, torch.Tensor) or not isinstance(eps, float) or len(list(module.parameters())) != 1:
            raise Declined(f"{type(module).__name__}, a norm of another form")
        gain = self._tensor(gain)
        probe = torch.linspace(-2.0, 3.0, gain.numel(), device=gain.device).to(gain.dtype)
        with torch.no_grad():
            got, want = module(probe[None])[0].float(), ops.rms_norm(probe, gain, eps)
        if not _close(got, want, gain.dtype):
            raise Declined(f"{type(module).__name__}, a norm of another form")
        return gain, eps

    def matrix(self, *modules: Any) -> Matrix:
        """Linears below one another."""
        read = [self._linear(module) for module in modules]
        if len({(m.format, m.columns, m.blocksize, m.parts[0].nested is None) for m in read}) != 1:
            raise Declined("projections of several formats, which run as one product")
        return read[0]._replace(parts=tuple(part for m in read for part in m.parts))

    def _linear(self, module: Any) -> Matrix:
        _children(module, set())
        rows, columns = getattr(module, "out_features", 0), getattr(module, "in_features", 0)
        bias = None if getattr(module, "bias", None) is None else self._tensor(module.bias)
        if type(module) is nn.Linear:
            return Matrix("16bit", columns, (Part(rows, self._tensor(module.weight), bias),))
        if isinstance(module, Linear8bitLt):
            if (
                module.weight.dtype != torch.int8
                or module.SCB is None
                or module.exact
                or module.SCB.device.type == "cpu"
            ):
                raise Declined("an int8 layer that is not quantised, or is to be computed exactly (as on a CPU)")
            codes = self._tensor(module.weight, torch.int8)
            return Matrix("int8", columns, (Part(rows, codes, bias, self._tensor(module.SCB, torch.float32)),))
        if isinstance(module, Linear4bit):
            if module.compute_dtype not in (None, torch.float32, self.table.dtype):
                raise Declined(f"a 4-bit layer that computes in {module.compute_dtype}")
            if module.quant_state is None:
                raise Declined("a 4-bit layer that is not quantised")
            packed = module.packed()
            if packed.nested_blocksize != 256 or (packed.nested_code is not None and packed.nested_absmax is None):
                raise Declined("scales quantised in another way")
            weight = self._tensor(packed.weight.view(torch.uint8), torch.uint8)
            part = Part(rows, weight, bias, packed.absmax, packed.nested_absmax, packed.offset)
            return Matrix(packed.quant_type, columns, (part,), packed.blocksize)
        raise Declined(f"{type(module).__name__} where a linear layer is expected")

    def _tensor(self, tensor: torch.Tensor, dtype: torch.dtype | None = None) -> torch.Tensor:
        """As the kernels take it: of the model's dtype (or `dtype`), on its device, in one piece."""
        tensor = tensor.detach()
        if type(tensor) is not torch.Tensor:
            tensor = tensor.as_subclass(torch.Tensor)
        if tensor.device != self.table.device or tensor.is_meta:
            raise Declined("weights on several devices")
        if tensor.dtype != (dtype or self.table.dtype):
            raise Declined("weights of several dtypes")
        if not tensor.is_contiguous():
            raise Declined("a weight that is not in memory in one piece")
        return tensor

    def _attention(self, module: Any) -> tuple[Matrix, Heads]:
        norms = {"q_norm", "k_norm"} & dict(module.named_children()).keys()
        fused = "qkv_proj" in dict(module.named_children())
        _children(module, norms | {"o_proj"} | ({"qkv_proj"} if fused else {"q_proj", "k_proj", "v_proj"}))
        size = module.head_dim
        if len(norms) == 1 or not isinstance(size, int):
            raise Declined("attention of another form")
        if fused:
            qkv = self.matrix(module.qkv_proj)
            kv = self.config.num_key_value_heads
            query = qkv.rows // size - 2 * kv
        else:
            qkv = self.matrix(module.q_proj, module.k_proj, module.v_proj)
            query, kv = (part.rows // size for part in qkv.parts[:2])
        if (query + 2 * kv) * size != qkv.rows or kv < 1 or query % kv or query // kv != module.num_key_value_groups:
            raise Declined("attention of another form")
        heads = Heads(query, kv, size, float(module.scaling), self._window(module))
        if norms:
            (q_gain, eps), (k_gain, k_eps) = self.norm(module.q_norm), self.norm(module.k_norm)
            if eps != k_eps or q_gain.numel() != size or k_gain.numel() != size:
                raise Declined("norms over all heads at once")
            heads = heads._replace(q_gain=q_gain, k_gain=k_gain, eps=eps)
        if getattr(module, "use_rope", True):
            self._check_rotation(module, size)
            heads = heads._replace(inv_freq=self.inv_freq, rope_scale=self.rope_scale)
        return qkv, heads

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

    def _check_rotation(self, module: Any, size: int) -> None:
        """The function that the attention's source calls turns halves, not neighbours; asked once per source."""
        home = type(module).__module__
        if home in self._rotates:
            return
        turn = getattr(sys.modules[home], "apply_rotary_pos_emb", None)
        if turn is None or 2 * self.inv_freq.numel() > size:
            raise Declined("a rotary embedding of another form")
        x = torch.linspace(-1.0, 1.0, size).view(1, 1, 1, size)
        angle = torch.linspace(0.1, 3.0, self.inv_freq.numel()).repeat(2).view(1, 1, -1)
        q, k = turn(x, 2.0 * x, angle.cos(), angle.sin())
        want = ops.rotate(x, angle.cos(), angle.sin())
        if not (torch.allclose(q, want, atol=1e-6) and torch.allclose(k, 2.0 * want, atol=1e-6)):
            raise Declined("a rotary embedding of another form")
        self._rotates.add(home)

    def _mlp(self, module: Any) -> tuple[Matrix, str]:
        fused = "gate_up_proj" in dict(module.named_children())
        act = getattr(module, "act_fn", getattr(module, "activation_fn", None))
        known = {"down_proj"} | ({"gate_up_proj"} if fused else {"gate_proj", "up_proj"})
        _children(module, known | {name for name, child in module.named_children() if child is act})
        if act is None:
            raise Declined("an MLP without an activation")
        if fused:
            both = self.matrix(module.gate_up_proj)
            gate_up = both._replace(parts=_halves(both))
        else:
            gate_up = self.matrix(module.gate_proj, module.up_proj)
        if gate_up.parts[0].rows != gate_up.parts[1].rows or gate_up.rows != 2 * module.down_proj.in_features:
            raise Declined("an MLP of another form")
        return gate_up, self._activation(act)

    def _activation(self, act: Any) -> str:
        if type(act) not in self._acts:
            probe = torch.linspace(-6.0, 6.0, 97)
            with torch.no_grad():
                got = act(probe)
            found = [n for n in ops.ACTIVATIONS if torch.allclose(got, ops.activation(n, probe), atol=2e-6)]
            if not found:
                raise Declined(f"the activation {type(act).__name__}")
            self._acts[type(act)] = found[0]
        return self._acts[type(act)]


def _halves(matrix: Matrix) -> tuple[Part, Part]:
    """Gate and up of one stored matrix: views."""
    (part,) = matrix.parts
    if part.nested is not None:
        raise Declined("gate and up in one matrix with quantised scales")

    def half(tensor: torch.Tensor | None, index: int) -> torch.Tensor | None:
        return None if tensor is None else tensor.chunk(2)[index]

    gate, up = (
        Part(part.rows // 2, part.weight.chunk(2)[index], half(part.bias, index), half(part.scales, index))
        for index in range(2)
    )
    return gate, up


def _children(module: nn.Module, names: set[str]) -> None:
    """A module has these children and holds nothing unknown."""
    found = {name for name, _ in module.named_children()}
    if found != names:
        raise Declined(f"{type(module).__name__} is made of {', '.join(sorted(found)) or 'nothing'}")
    if names:
        numbers = {
            name for name, value in vars(module).items()
            if not name.startswith("_") and isinstance(value, (bool, int, float)) and name not in _KNOWN
        }  # fmt: skip
        if numbers:
            raise Declined(f"{type(module).__name__} has {', '.join(sorted(numbers))}")


def _factors(config: Any) -> None:
    for name, neutral in _FACTORS.items():
        if getattr(config, name, neutral) not in (neutral, None):
            raise Declined(f"the configuration has {name}")


def _close(got: torch.Tensor, want: torch.Tensor, dtype: torch.dtype) -> bool:
    tolerance = {torch.float32: 1e-5, torch.float16: 4e-3}.get(dtype, 3e-2)
    return got.shape == want.shape and bool((got - want).abs().max() <= tolerance * want.abs().max())
