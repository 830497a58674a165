"""`BlockSpec`: what a transformer block is, as data.

    mid = x   + [residual dropout][post-norm] Wo attention(rope(qk_norm(Wqkv [pre-norm] x)))
    z   = mid + [residual dropout][post-norm] Wdown(act(Wgate n) * (Wup n)),   n = [pre-norm] mid

The original transformer's norms stand on the sums instead: `mid = norm(x + ...)`. With a parallel
residual both halves read x: `n = [pre-norm] x`.

What a half adds may be multiplied by `residual_multiplier`.

Every family is a choice of the fields below; none is a subclass. Sizes have Hugging Face's names,
and so have the parameters: a Hugging Face layer's `state_dict` loads as it is.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, fields, replace
from functools import cached_property
from typing import Any, Literal, get_args

from backfuse.kernels.reference.activation import ACTIVATIONS
from backfuse.kernels.reference.fp8 import scale_count
from backfuse.kernels.reference.norm import NormSpec
from backfuse.kernels.reference.qk_rope import QKSpec

from .errors import nearest

Norm = Literal["rmsnorm", "layernorm"]
NormPosition = Literal["pre", "post", "both", "after_residual"]
QKNorm = Literal["head", "full"]
RopeLayout = Literal["half", "interleaved"]

#: Default of the fields that are resolved from others on construction.
_UNSET: Any = None

#: Hugging Face's names of activation functions, and ours.
HIDDEN_ACTS = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_tanh": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "relu": "relu",
    "relu2": "relu2",
}


#: Half -> the factors of a layer scale, by Hugging Face's names.
LAYER_SCALE = {"attn": "layer_scale1.lambda1", "ffn": "layer_scale2.lambda1"}

#: Fields that are either on or off.
FLAGS = (
    "norm_bias", "norm_round_first", "gated", "qkv_bias", "o_bias", "up_bias", "down_bias",
    "causal", "attention_sinks", "stacked_qkv", "qkv_per_head", "stacked_gate_up",
    "parallel_residual", "shared_norm", "conv1d", "layer_scale",
)  # fmt: skip


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def choose(name: str, value: Any, options: Any) -> None:
    """Raise a ValueError unless `value` is one of `options`, with the nearest one suggested."""
    if value in options:
        return
    expected = ", ".join(map(repr, options))
    raise ValueError(f"{name} is {value!r}, expected one of {expected}{nearest(value, options)}")


@dataclass(frozen=True)
class BlockSpec:
    """The shape of one transformer block. The defaults are Llama's.

    Attributes:
        hidden_size: width of the residual stream, h.
        intermediate_size: width of the FFN, f.
        num_attention_heads: query heads.
        num_key_value_heads: key and value heads, a divisor of the query heads; None: as many.
        head_dim: channels a head; None: `hidden_size / num_attention_heads`.
        v_head_dim: channels a head of v and of the attention's output; None: `head_dim`.
        norm: `"rmsnorm"` or `"layernorm"`.
        norm_eps: added to the mean square or variance.
        norm_bias: whether norms have a bias; None: LayerNorm does, RMSNorm does not.
        norm_offset: added to the norm's weight (Gemma: 1).
        norm_round_first: whether the normalised value is rounded to the input's dtype before it
            meets the weight (Llama) or after (Gemma, OLMo 2, LayerNorm); None: by the norm.
        norm_position: `"pre"`: before each half; `"post"`: on each half's output, before the
            residual is added (OLMo 2); `"both"` (Gemma 2); `"after_residual"`: on the sum of each
            half's output and the residual (the original transformer, BERT).
        parallel_residual: whether the FFN reads the block's input, as the attention does, and not
            the attention's result (GPT-NeoX).
        shared_norm: with a parallel residual: whether one norm stands before both halves (GPT-J).
        hidden_act: `silu`, `gelu` (erf), `gelu_tanh`, `relu`, `relu2`; Hugging Face's names too.
        gated: whether the FFN has a gate (SwiGLU, GeGLU).
        qkv_bias: whether q, k and v have biases; o_bias, up_bias (gate and up), down_bias likewise.
        o_bias: see qkv_bias.
        up_bias: see qkv_bias.
        down_bias: see qkv_bias.
        qk_norm: RMSNorm on q and k: `"head"` (each head, Qwen 3), `"full"` (the whole projection,
            OLMo 2) or None.
        rope: layout of the rotary embedding, `"half"`, `"interleaved"`, or None for none.
        rope_theta: its base, for calls without `position_embeddings`; None: those must be given
            (scaled variants).
        rotary_dim: channels of a head that rotate; None: all.
        causal: whether a token sees only itself and those before it.
        sliding_window: a token sees keys less than this far away; None: all.
        attn_logit_softcapping: scores become `cap * tanh(score / cap)`; None: they stay.
        attention_scale: factor on the scores; None: `head_dim ** -0.5`.
        residual_multiplier: factor on what each half adds to the residual (Granite).
        layer_scale: whether each half's output has a learnt factor a channel (DINOv2): the
            parameters `layer_scale1.lambda1` and `layer_scale2.lambda1`.
        attention_sinks: whether each query head has a learnt logit that takes part in its softmax
            and in nothing else (GPT-OSS): the parameter `self_attn.sinks`.
        attention_dropout: probability of dropping a softmax weight, in training.
        residual_dropout: probability of dropping an element of a half's output, in training.
        activation_dropout: probability of dropping an element of the FFN's activated hidden, in
            training (`torch.nn.TransformerEncoderLayer`).
        stacked_qkv: one `self_attn.qkv_proj` instead of three projections: q, k, v.
        qkv_per_head: whether its rows go by key heads, each with its query heads, itself and its
            value head (GPT-NeoX), and not all q first.
        stacked_gate_up: one `mlp.gate_up_proj` instead of two.
        conv1d: whether the projections' weights are `[in, out]` (GPT-2's `Conv1D`), and not
            `[out, in]`.

    Raises:
        ValueError: for sizes that do not divide and values that are not known.
    """

    hidden_size: int
    intermediate_size: int
    num_attention_heads: int
    num_key_value_heads: int = _UNSET
    head_dim: int = _UNSET
    v_head_dim: int = _UNSET
    norm: Norm = "rmsnorm"
    norm_eps: float = 1e-6
    norm_bias: bool = _UNSET
    norm_offset: float = 0.0
    norm_round_first: bool = _UNSET
    norm_position: NormPosition = "pre"
    parallel_residual: bool = False
    shared_norm: bool = False
    hidden_act: str = "silu"
    gated: bool = True
    qkv_bias: bool = False
    o_bias: bool = False
    up_bias: bool = False
    down_bias: bool = False
    qk_norm: QKNorm | None = None
    rope: RopeLayout | None = "half"
    rope_theta: float | None = 10000.0
    rotary_dim: int = _UNSET
    causal: bool = True
    sliding_window: int | None = None
    attn_logit_softcapping: float | None = None
    attention_scale: float = _UNSET
    attention_sinks: bool = False
    residual_multiplier: float = 1.0
    layer_scale: bool = False
    attention_dropout: float = 0.0
    residual_dropout: float = 0.0
    activation_dropout: float = 0.0
    stacked_qkv: bool = False
    qkv_per_head: bool = False
    stacked_gate_up: bool = False
    conv1d: bool = False

    def __post_init__(self) -> None:
        sizes = ("hidden_size", "intermediate_size", "num_attention_heads")
        optional = (
            "num_key_value_heads", "head_dim", "v_head_dim", "rotary_dim", "sliding_window"
        )  # fmt: skip
        for name in sizes + optional:
            value = getattr(self, name)
            if value is None and name in optional:
                continue
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"{name} is {value!r}, expected a positive integer")
        choose("norm", self.norm, ("rmsnorm", "layernorm"))
        choose("norm_position", self.norm_position, get_args(NormPosition))
        choose("qk_norm", self.qk_norm, (None, "head", "full"))
        choose("rope", self.rope, (None, "half", "interleaved"))
        choose("hidden_act", self.hidden_act, tuple(HIDDEN_ACTS))
        self._resolve("hidden_act", HIDDEN_ACTS[self.hidden_act])
        assert self.hidden_act in ACTIVATIONS
        if self.num_key_value_heads is None:
            self._resolve("num_key_value_heads", self.num_attention_heads)
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"num_key_value_heads is {self.num_key_value_heads}, expected a divisor of "
                f"num_attention_heads ({self.num_attention_heads})"
            )
        if self.head_dim is None:
            if self.hidden_size % self.num_attention_heads:
                raise ValueError(
                    f"hidden_size is {self.hidden_size}, expected a multiple of "
                    f"num_attention_heads ({self.num_attention_heads}), or give head_dim"
                )
            self._resolve("head_dim", self.hidden_size // self.num_attention_heads)
        if self.v_head_dim is None:
            self._resolve("v_head_dim", self.head_dim)
        if self.rotary_dim is None:
            if self.rope and self.head_dim % 2:
                raise ValueError(
                    f"head_dim is {self.head_dim}, expected an even number: rotary embeddings turn "
                    "pairs of channels; or give rotary_dim"
                )
            self._resolve("rotary_dim", self.head_dim)
        if self.rope and (self.rotary_dim % 2 or self.rotary_dim > self.head_dim):
            raise ValueError(
                f"rotary_dim is {self.rotary_dim}, expected an even number of at most "
                f"head_dim ({self.head_dim})"
            )
        for name in ("norm_eps", "attn_logit_softcapping", "rope_theta", "attention_scale"):
            value = getattr(self, name)
            if value is None and name != "norm_eps":
                continue
            if not _is_number(value) or not value > 0:
                raise ValueError(f"{name} is {value!r}, expected a positive number")
        for name in ("attention_dropout", "residual_dropout", "activation_dropout"):
            value = getattr(self, name)
            if not _is_number(value) or not 0.0 <= value < 1.0:
                raise ValueError(f"{name} is {value!r}, expected 0 <= p < 1")
        for name in ("norm_offset", "residual_multiplier"):
            if not _is_number(getattr(self, name)):
                raise ValueError(f"{name} is {getattr(self, name)!r}, expected a number")
        if self.norm_bias is None:
            self._resolve("norm_bias", self.norm == "layernorm")
        if self.norm_round_first is None:
            self._resolve("norm_round_first", self.norm == "rmsnorm")
        if self.attention_scale is None:
            self._resolve("attention_scale", self.head_dim**-0.5)
        for name in FLAGS:
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"{name} is {getattr(self, name)!r}, expected True or False")
        if self.stacked_gate_up and not self.gated:
            raise ValueError("stacked_gate_up is True, expected False for an FFN without a gate")
        if self.qkv_per_head and not self.stacked_qkv:
            raise ValueError("qkv_per_head is True, expected False without stacked_qkv")
        if self.layer_scale and self.post_norm:
            raise ValueError(
                f"layer_scale is True, expected False with norm_position {self.norm_position!r}: "
                "a norm there has a factor a channel already"
            )
        if self.qkv_per_head and self.conv1d:
            raise ValueError("conv1d is True, expected False with qkv_per_head: rows go by heads")
        if self.parallel_residual and self.norm_after_residual:
            raise ValueError(
                "norm_position is 'after_residual', expected another one with parallel_residual: "
                "there is no sum between the halves"
            )
        if self.shared_norm and not (self.parallel_residual and self.pre_norm):
            raise ValueError(
                "shared_norm is True, expected False without parallel_residual or a norm before "
                "the halves: they read different things"
            )
        for name in ("text", "there", "_attention_parameters", "_ffn_parameters"):
            getattr(self, name)  # torch.compile cannot trace the lock of a cached property

    def _resolve(self, name: str, value: Any) -> None:
        object.__setattr__(self, name, value)
        derived: frozenset[str] = getattr(self, "_derived", frozenset())
        object.__setattr__(self, "_derived", derived | {name})

    def replace(self, **changes: Any) -> BlockSpec:
        """The same spec with some fields changed, and those derived from others derived anew.

        `dataclasses.replace` would carry the derived values (`head_dim`, `rotary_dim`,
        `attention_scale`, ...) over as if they had been given.
        """
        return BlockSpec(**{**self.given, **changes})

    @property
    def given(self) -> dict[str, Any]:
        """The fields from which the others were derived: `BlockSpec(**given)` is the same spec."""
        derived: frozenset[str] = getattr(self, "_derived", frozenset()) - {"hidden_act"}
        return {f.name: getattr(self, f.name) for f in fields(self) if f.name not in derived}

    @cached_property
    def text(self) -> str:
        """The spec in JSON: `BlockSpec(**json.loads(text))` is the same one."""
        return json.dumps(self.given)

    @cached_property
    def there(self) -> frozenset[str]:
        """Names of the fields that are neither 0, False nor None.

        For code that torch.compile traces: of a number it reads it makes a symbol.
        """
        return frozenset(f.name for f in fields(self) if getattr(self, f.name))

    @classmethod
    def from_config(cls, config: Any, layer_idx: int = 0) -> BlockSpec:
        """The spec of one decoder layer of a Hugging Face model.

        Args:
            config: a `transformers` configuration.
            layer_idx: which layer, for models whose layers differ (sliding and full attention).

        Raises:
            TypeError: for a layer_idx that is no integer.
            ValueError: for a family or a setting that a block cannot represent, saying which.
        """
        from .adapters.hf_config import spec_fields

        return cls(**spec_fields(config, layer_idx))

    @cached_property
    def q_size(self) -> int:
        """Width of all query heads."""
        return self.num_attention_heads * self.head_dim

    @cached_property
    def kv_size(self) -> int:
        """Width of all key heads."""
        return self.num_key_value_heads * self.head_dim

    @cached_property
    def v_size(self) -> int:
        """Width of all value heads."""
        return self.num_key_value_heads * self.v_head_dim

    @cached_property
    def qkv_size(self) -> int:
        """Width of q, k and v side by side."""
        return self.q_size + self.kv_size + self.v_size

    @cached_property
    def attn_out_size(self) -> int:
        """Width of the attention's output."""
        return self.num_attention_heads * self.v_head_dim

    @cached_property
    def preact_size(self) -> int:
        """Width of the FFN's pre-activation: gate and up, or up alone."""
        return self.intermediate_size * (2 if self.gated else 1)

    @cached_property
    def preact_scales(self) -> int:
        """Scales of a token whose pre-activation is kept in eight bits."""
        return scale_count(self.intermediate_size) * (2 if self.gated else 1)

    @cached_property
    def pre_norm(self) -> bool:
        """Whether a norm stands before each half."""
        return self.norm_position in ("pre", "both")

    @cached_property
    def post_norm(self) -> bool:
        """Whether a norm stands at the end of each half, before or after the residual is added."""
        return self.norm_position != "pre"

    @cached_property
    def norm_after_residual(self) -> bool:
        """Whether that norm reads the sum with the residual."""
        return self.norm_position == "after_residual"

    def __hash__(self) -> int:
        return self._hash

    @cached_property
    def _hash(self) -> int:
        return hash(tuple(getattr(self, f.name) for f in fields(self)))

    @cached_property
    def norm_spec(self) -> NormSpec:
        """How this block's norms compute."""
        return NormSpec(self.norm, self.norm_eps, self.norm_offset, bool(self.norm_round_first))

    @cached_property
    def qk_spec(self) -> QKSpec:
        """What is done to q and k before the attention: qk-norm is an RMSNorm in any family."""
        norm = replace(self.norm_spec, kind="rmsnorm")
        return QKSpec(
            self.q_size, self.kv_size, self.head_dim, self.rope or "half", self.qk_norm, norm,
            self.v_head_dim,
        )  # fmt: skip

    @cached_property
    def norm_names(self) -> dict[str, str]:
        """Role of each norm -> Hugging Face's name for it."""
        if self.shared_norm:
            pre = {"attn_norm": "input_layernorm", "ffn_norm": "input_layernorm"}
        elif self.norm_position == "pre":
            pre = {"attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm"}
        else:
            pre = {"attn_norm": "input_layernorm", "ffn_norm": "pre_feedforward_layernorm"}
        if self.norm_position == "pre":
            return pre
        post = {
            "attn_post_norm": "post_attention_layernorm",
            "ffn_post_norm": "post_feedforward_layernorm",
        }
        if not self.pre_norm:
            return post
        return {**pre, **post}

    def _norm_shapes(self, half: str) -> dict[str, tuple[int, ...]]:
        shapes: dict[str, tuple[int, ...]] = {}
        for role, name in self.norm_names.items():
            if role.startswith(half):
                shapes[f"{name}.weight"] = (self.hidden_size,)
                if self.norm_bias:
                    shapes[f"{name}.bias"] = (self.hidden_size,)
        return shapes

    def _projection(self, inputs: int, outputs: int) -> tuple[int, int]:
        """Shape of a projection's weight."""
        return (inputs, outputs) if self.conv1d else (outputs, inputs)

    def attention_parameters(self) -> dict[str, tuple[int, ...]]:
        """Name and shape of every parameter of the attention half."""
        return dict(self._attention_parameters)

    @cached_property
    def _attention_parameters(self) -> dict[str, tuple[int, ...]]:
        h, q, kv = self.hidden_size, self.q_size, self.kv_size
        shapes = self._norm_shapes("attn")
        if self.stacked_qkv:
            outs = {"qkv": self.qkv_size}
        else:
            outs = {"q": q, "k": kv, "v": self.v_size}
        for name, out in outs.items():
            shapes[f"self_attn.{name}_proj.weight"] = self._projection(h, out)
            if self.qkv_bias:
                shapes[f"self_attn.{name}_proj.bias"] = (out,)
        shapes["self_attn.o_proj.weight"] = self._projection(self.attn_out_size, h)
        if self.o_bias:
            shapes["self_attn.o_proj.bias"] = (h,)
        if self.qk_norm:
            shapes["self_attn.q_norm.weight"] = (self.head_dim if self.qk_norm == "head" else q,)
            shapes["self_attn.k_norm.weight"] = (self.head_dim if self.qk_norm == "head" else kv,)
        if self.attention_sinks:
            shapes["self_attn.sinks"] = (self.num_attention_heads,)
        if self.layer_scale:
            shapes[LAYER_SCALE["attn"]] = (h,)
        return shapes

    def ffn_parameters(self) -> dict[str, tuple[int, ...]]:
        """Name and shape of every parameter of the FFN half."""
        return dict(self._ffn_parameters)

    @cached_property
    def _ffn_parameters(self) -> dict[str, tuple[int, ...]]:
        h, f = self.hidden_size, self.intermediate_size
        shapes = self._norm_shapes("ffn")
        if self.stacked_gate_up:
            outs = {"gate_up": 2 * f}
        else:
            outs = {"gate": f, "up": f} if self.gated else {"up": f}
        for name, out in outs.items():
            shapes[f"mlp.{name}_proj.weight"] = self._projection(h, out)
            if self.up_bias:
                shapes[f"mlp.{name}_proj.bias"] = (out,)
        shapes["mlp.down_proj.weight"] = self._projection(f, h)
        if self.down_bias:
            shapes["mlp.down_proj.bias"] = (h,)
        if self.layer_scale:
            shapes[LAYER_SCALE["ffn"]] = (h,)
        return shapes

    def parameters(self) -> dict[str, tuple[int, ...]]:
        """Name and shape of every parameter of the block."""
        return {**self.attention_parameters(), **self.ffn_parameters()}


def check_spec(spec: object) -> BlockSpec:
    """The spec; a TypeError unless it is a `BlockSpec`."""
    if not isinstance(spec, BlockSpec):
        raise TypeError(f"spec is {spec!r}, expected a BlockSpec")
    return spec
