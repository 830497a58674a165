"""What an operator of `ops.py` is told besides its tensors and sizes: a text, and back.

A graph that holds the text can be stored, and be read by another process: it names nothing that
lives in this one. The same text is read once.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any

import torch

from backfuse.kernels.reference.fp8 import DTYPE as FP8
from backfuse.kernels.reference.norm import accumulate_dtype

from .call import Call, Inputs
from .context import Context
from .function import HalfJob, Job
from .inputs import plain_call, with_attention
from .keep import INPUT, half_needs, half_reads
from .lora import LoRA, adapter_parameters
from .policy import Policy
from .run import Layer, RunJob, Tree
from .spec import BlockSpec

#: What an operator runs: a run of blocks, or one half.
KINDS = ("block", "attention", "ffn")

#: The halves' names in `HalfJob`.
HALVES = {"attention": "attn", "ffn": "ffn"}


# The functions that write are traced by torch.compile: they are f-strings over constants.


def _adapter_text(lora: LoRA) -> str:
    bias = "true" if lora.use_bias else "false"
    return f'[{lora.rank}, {lora.scale}, {lora.dropout}, {bias}, "{lora.name}"]'


def _layer_text(layer: Layer | HalfJob) -> str:
    policy = layer.policy
    flags = "".join(["1" if name in layer.wanted else "0" for name in (INPUT, *layer.names)])
    adapters = [
        f'["{name}", [{", ".join([_adapter_text(lora) for lora in several])}]]'
        for name, several in layer.adapters
    ]
    actions = (
        f"x={policy.x}, qkv={policy.qkv}, attn_out={policy.attn_out}, mid={policy.mid}, "
        f"preact={policy.preact}"
    )
    return f'["{actions}", "{flags}", [{", ".join(adapters)}]]'


def _tree_text(tree: Tree) -> str:
    return (
        f"[{', '.join([_tree_text(part) for part in tree])}]"
        if isinstance(tree, tuple)
        else (f"{tree}")
    )


def kind_of(job: Job) -> str:
    """One of `KINDS`."""
    if isinstance(job, HalfJob):
        return "attention" if job.half == "attn" else "ffn"
    return "block"


def write(job: Job) -> str:
    """The text for a job: JSON."""
    call = job.call
    if isinstance(job, HalfJob):
        layers, tree = _layer_text(job), "0"
    else:
        assert isinstance(job, RunJob)
        texts = [_layer_text(one) for one in job.layers]
        layers, tree = ", ".join(texts), _tree_text(job.tree)
    autocast = f'"{str(call.compute_dtype)[6:]}"' if call.autocast else "null"
    context = "null"
    if call.context is not None:
        context = f'["{call.context.group}", {call.context.rank}, {call.context.size}]'
    return (
        f'{{"kind": "{kind_of(job)}", "spec": {call.spec.text}, "layers": [{layers}], '
        f'"tree": {tree}, "autocast": {autocast}, '
        f'"chunk_size": {call.chunk_size}, "impl": "{call.impl}", '
        f'"ffn_strategy": "{call.ffn_strategy}", '
        f'"dropout": {"true" if call.dropout else "false"}, "context": {context}}}'
    )


def _tree(part: Any) -> Tree:
    return tuple(map(_tree, part)) if isinstance(part, list) else part


@dataclass(frozen=True, eq=False)
class Told:
    """A text, read.

    Attributes:
        kind: one of `KINDS`.
        spec: the block.
        layers: the run's layers; a half's has that half's names.
        tree: see `RunJob`.
        autocast: autocast's dtype, or None where it is off.
        chunk_size: tokens a chunk.
        impl: see `TransformerBlock`.
        ffn_strategy: see `TransformerBlock`.
        dropout: whether it is active.
        context: the ranks that share every sequence's tokens, or None.
    """

    kind: str
    spec: BlockSpec
    layers: tuple[Layer, ...]
    tree: Tree
    autocast: torch.dtype | None
    chunk_size: int
    impl: str
    ffn_strategy: str
    dropout: bool
    context: Context | None

    def job(self, x: torch.Tensor, inputs: Inputs, batch_size: int, max_seqlen: int | None) -> Job:
        """The job.

        Args:
            x: `[tokens, h]`.
            inputs: the call's side inputs.
            batch_size: sequences.
            max_seqlen: see `TransformerBlock.forward`.
        """
        attention = self.kind != "ffn"
        call = plain_call(
            self.spec, batch_size, len(x) // batch_size, x.dtype, self.autocast, x.device,
            self.chunk_size, self.impl, self.ffn_strategy, self.dropout, max_seqlen,
            any(layer.policy.lossy for layer in self.layers), attention, None, self.context,
        )  # fmt: skip
        return self._job(with_attention(call, inputs, x.device) if attention else call)

    def _job(self, call: Call) -> Job:
        if self.kind == "block":
            return RunJob(call, self.layers, self.tree)
        [layer] = self.layers
        half = HALVES[self.kind]
        return HalfJob(call, half, layer.names, layer.wanted, layer.policy, layer.adapters)

    @cached_property
    def wants_input(self) -> bool:
        """Whether the gradient of x is wanted."""
        return INPUT in self.layers[0].wanted

    @cached_property
    def wanted(self) -> list[bool]:
        """Of each weight, whether its gradient is wanted."""
        return [name in layer.wanted for layer in self.layers for name in layer.names]

    @cached_property
    def keeps(self) -> list[str]:
        """Names of what the forward pass keeps, besides x."""
        return [name for name in self._all_kept if name != self.input_name]

    @cached_property
    def keeps_input(self) -> bool:
        """Whether it keeps x."""
        return self.input_name in self._all_kept

    @cached_property
    def input_name(self) -> str:
        """The name x is kept under."""
        return {"block": "0.x", "attention": "x", "ffn": "mid"}[self.kind]

    @cached_property
    def _all_kept(self) -> list[str]:
        if self.kind == "block":
            return RunJob.kept_names(self.spec, self.layers)
        [layer] = self.layers
        half, wanted = HALVES[self.kind], layer.wanted
        needs = half_needs(self.spec, half, wanted, INPUT in wanted)
        return sorted(half_reads(self.spec, half, layer.policy, needs).kept)

    def layout(
        self, name: str, tokens: int, batch_size: int, dtype: torch.dtype
    ) -> tuple[tuple[int, ...], torch.dtype]:
        """Shape and dtype of a kept tensor.

        Args:
            name: one of `keeps`.
            tokens: rows of x; may be a symbol.
            batch_size: sequences; may be a symbol.
            dtype: of x.
        """
        spec, compute = self.spec, self.autocast or dtype
        index, _, own = name.rpartition(".")
        lossy = self.layers[int(index or 0)].policy.lossy
        branch = dtype if spec.norm_after_residual else compute
        high, statistics = accumulate_dtype(compute), spec.norm_spec.statistics
        if own == "lse":
            ranks = self.context.size if self.context else 1
            heads = spec.num_attention_heads // ranks
            return (batch_size, heads, tokens // batch_size * ranks), high
        if own.endswith("_post_norm_stats"):
            return (statistics, tokens), high
        if own.endswith("_stats"):
            return (statistics, tokens), accumulate_dtype(dtype)
        width, kind = {
            "qkv": (spec.qkv_size, compute),
            "attn_out": (spec.attn_out_size, compute),
            "mid": (spec.hidden_size, dtype),
            "preact": (spec.preact_size, FP8 if lossy else compute),
            "preact_scales": (spec.preact_scales, torch.float32),
            "attn_branch": (spec.hidden_size, branch),
            "ffn_branch": (spec.hidden_size, branch),
        }[own]
        return (tokens, width), kind


@lru_cache(maxsize=4096)
def read(text: str) -> Told:
    """What `write` wrote."""
    told = json.loads(text)
    spec = BlockSpec(**told["spec"])
    shapes = {
        "block": spec.parameters,
        "attention": spec.attention_parameters,
        "ffn": spec.ffn_parameters,
    }[told["kind"]]()
    layers = []
    for actions, flags, given in told["layers"]:
        adapters = tuple((name, tuple(LoRA(*one) for one in several)) for name, several in given)
        names = (*shapes, *adapter_parameters(spec, adapters))
        wanted = [name for name, flag in zip((INPUT, *names), flags, strict=True) if flag == "1"]
        policy = Policy.parse(actions)
        if policy.offloads:
            raise ValueError(
                f"policy is {policy}, expected one that offloads nothing: under torch.compile, and "
                "in a selective checkpoint, what a block keeps is an operator's output, whose "
                "place is the device. Run offloading blocks outside of both"
            )
        layers.append(Layer(policy, names, frozenset(wanted), adapters))
    autocast = told["autocast"] and getattr(torch, told["autocast"])
    return Told(
        told["kind"], spec, tuple(layers), _tree(told["tree"]), autocast,
        told["chunk_size"], told["impl"], told["ffn_strategy"], told["dropout"],
        told["context"] and Context(*told["context"]),
    )  # fmt: skip
