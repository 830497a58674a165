"""Which tensors the backward pass of a block needs, and which of them are kept.

One answer, asked twice: by the forward pass, to know what to save, and by the memory model, to
know what that costs. A tensor is kept if its policy says so *and* a gradient that is wanted reads
it: what only a frozen weight's gradient would read is neither kept nor computed. The answers are
remembered: a training step asks the same questions each time.

Kept tensors and their shapes, for `n` tokens:

    x                 [n, h]        block input, in the residual's dtype
    qkv               [n, q + 2kv]  in the compute dtype
    attn_out          [n, q]        with lse: fp32, one a head and token
    mid               [n, h]        in the residual's dtype; with a parallel residual nobody reads
                                    it again, and no policy keeps it: the FFN reads x
    attn_branch       [n, h]        with a post-norm, in place of mid: the output projection
                                    before that norm, or what a norm after the residual reads:
                                    its sum with x, in the residual's dtype; mid is rebuilt from
                                    it without a GEMM
    preact            [n, 2f or f]  in e4m3 if the action is fp8
    preact_scales     [n, tiles]    with a preact in e4m3: fp32, one a 1 x 128 tile
    ffn_branch        [n, h]        with a post-norm, beside preact: the down projection before
                                    that norm, or its sum with mid
    <norm>_stats      [1 or 2, n]   rstd (and mean) of each norm that is read again, fp32
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import NamedTuple

from .policy import Policy
from .spec import LAYER_SCALE, BlockSpec

#: The name under which the input of a block, or of a half, is listed among what needs a gradient.
INPUT = "hidden_states"


@dataclass(frozen=True)
class Needs:
    """What the backward pass of one half has to give.

    Attributes:
        input: the gradient of the half's input.
        norm: gradients of the pre-norm's parameters.
        projections: gradients of the weights that read the normed input, adapters' included.
        inner: any gradient on the far side of the half's activation: of the input, the pre-norm,
            the first projections (weights or biases), qk-norm.
        out: gradients that read the output projection's input: of its weight, of its adapters, or
            of a layer scale, which is computed from the weight's.
        branch: `inner`, or anything of the output projection or a layer scale.
        post: gradients of the post-norm's parameters.
    """

    input: bool
    norm: bool
    projections: bool
    inner: bool
    out: bool
    branch: bool
    post: bool

    @property
    def anything(self) -> bool:
        """Whether the half has any gradient to give."""
        return self.branch or self.post


@cache
def half_needs(spec: BlockSpec, half: str, wanted: frozenset[str], need_input: bool) -> Needs:
    """What one half's backward has to give.

    Args:
        spec: the block.
        half: `"attn"` or `"ffn"`.
        wanted: names of the parameters whose gradient is wanted.
        need_input: whether the gradient of the half's input is wanted.
    """
    shapes = spec.attention_parameters() if half == "attn" else spec.ffn_parameters()
    names = {n for n in wanted if n in shapes or f"{n.split('.lora_')[0]}.weight" in shapes}
    pre, post = (spec.norm_names.get(f"{half}_{role}", "-") for role in ("norm", "post_norm"))
    out_name = "self_attn.o_proj" if half == "attn" else "mlp.down_proj"
    norm = any(name.startswith(f"{pre}.") for name in names)
    post_norm = any(name.startswith(f"{post}.") for name in names)
    out = {name for name in names if name.startswith(out_name)}
    scale = LAYER_SCALE[half] in names
    first = {name for name in names if name.startswith(("self_attn.", "mlp."))} - out
    inner = need_input or norm or bool(first)
    return Needs(
        input=need_input,
        norm=norm,
        projections=any("_proj." in name and name.endswith(".weight") for name in first),
        inner=inner,
        out=scale or any(name.endswith(".weight") for name in out),
        branch=scale or inner or bool(out),
        post=post_norm,
    )


@cache
def block_needs(spec: BlockSpec, wanted: frozenset[str]) -> tuple[Needs, Needs]:
    """What the backward passes of both halves have to give: the attention's, the FFN's.

    Args:
        spec: the block.
        wanted: names of what wants a gradient, `INPUT` for the block's input.
    """
    need_input = INPUT in wanted
    attn = half_needs(spec, "attn", wanted, need_input)
    if not spec.parallel_residual:
        need_input = attn.anything
    return attn, half_needs(spec, "ffn", wanted, need_input)


#: Kept tensors that may be offloaded -> the activation whose action says so. LSE, the norms'
#: statistics and the scales of eight bits are small, and stay.
OFFLOADED_WITH = {
    "x": "x",
    "qkv": "qkv",
    "attn_out": "attn_out",
    "mid": "mid",
    "attn_branch": "mid",
    "preact": "preact",
    "ffn_branch": "preact",
}


@cache
def offloaded(policy: Policy, kept: frozenset[str]) -> frozenset[str]:
    """Names of those kept tensors that are kept elsewhere than on the device."""
    if not policy.offloads:
        return frozenset()
    return frozenset(
        name
        for name, activation in OFFLOADED_WITH.items()
        if name in kept and getattr(policy, activation) == "offload"
    )


class Reads(NamedTuple):
    """What a backward pass reads, by where it comes from.

    Attributes:
        kept: names of kept tensors.
        rebuilt: names of the activations that it rebuilds, each at the cost of a GEMM or more.
    """

    kept: frozenset[str]
    rebuilt: frozenset[str]


@cache
def ffn_reads(spec: BlockSpec, policy: Policy, needs: Needs) -> Reads:
    """What the FFN half's backward reads; the half's input is named `mid` and counts as kept."""
    read: set[str] = set()
    if needs.inner or needs.out:
        read.add("preact")
    if spec.post_norm and needs.anything:
        read.add("ffn_branch")
    kept: set[str] = set()
    rebuilt: set[str] = set()
    if policy.keeps("preact"):
        kept = read
    elif policy.preact == "fp8":
        kept = read | ({"preact_scales"} if "preact" in read else set())
    elif read:
        rebuilt = read | {"preact"}
    normed = needs.projections or bool(rebuilt)
    if normed or (spec.pre_norm and (needs.input or needs.norm)):
        kept = kept | {"mid"} | ({"ffn_norm_stats"} if spec.pre_norm else set())
    if "ffn_branch" in read:
        kept = kept | {"ffn_post_norm_stats"}
    return Reads(frozenset(kept), frozenset(rebuilt))


@cache
def attention_reads(spec: BlockSpec, policy: Policy, needs: Needs, read_mid: bool) -> Reads:
    """What the attention half's backward reads, `mid` included where the FFN half reads it.

    Args:
        spec: the block.
        policy: what it keeps.
        needs: what this half has to give.
        read_mid: whether the FFN half behind it reads `mid` again.
    """
    kept: set[str] = set()
    rebuilt: set[str] = set()

    def read(name: str, action_of: str) -> bool:
        """Note that a tensor is read; whether it must be rebuilt."""
        (kept if policy.keeps(action_of) else rebuilt).add(name)
        return name in rebuilt

    rebuild_middle = False
    if read_mid or (spec.post_norm and needs.anything):
        rebuild_middle = read("attn_branch" if spec.post_norm else "mid", "mid")
        if spec.post_norm:
            kept.add("attn_post_norm_stats")
    rebuild_out = False
    if needs.inner or needs.out or rebuild_middle:
        rebuild_out = read("attn_out", "attn_out")
        if needs.inner and not rebuild_out:
            kept.add("lse")
    rebuild_qkv = False
    if needs.inner or rebuild_out:
        rebuild_qkv = read("qkv", "qkv")
    normed = needs.projections or rebuild_qkv
    normed_backward = spec.pre_norm and (needs.input or needs.norm)
    if spec.norm_after_residual:
        residual = rebuild_middle
    else:
        residual = read_mid and (rebuild_middle or spec.post_norm)
    if normed or normed_backward or residual:
        kept.add("x")
    if spec.pre_norm and (normed or normed_backward):
        kept.add("attn_norm_stats")
    return Reads(frozenset(kept), frozenset(rebuilt))


def half_reads(spec: BlockSpec, half: str, policy: Policy, needs: Needs) -> Reads:
    """What the backward pass of one half alone reads; the FFN half's input is named `mid`."""
    if half == "ffn":
        return ffn_reads(spec, policy, needs)
    return attention_reads(spec, policy, needs, read_mid=False)


@cache
def block_reads(spec: BlockSpec, policy: Policy, wanted: frozenset[str]) -> Reads:
    """Everything that one block's backward pass reads.

    Args:
        spec: the block.
        policy: what it keeps. `x` counts as kept: dropping it is its segment's business.
        wanted: names that need a gradient: parameters, and `INPUT` for the block's input.
    """
    attn_needs, ffn_needs = block_needs(spec, wanted)
    ffn = ffn_reads(spec, policy, ffn_needs)
    read = "mid" in ffn.kept
    attn = attention_reads(spec, policy, attn_needs, read and not spec.parallel_residual)
    of_ffn = ffn.kept - {"mid"}
    if read and spec.parallel_residual:
        of_ffn |= {"x"}
    return Reads(of_ffn | attn.kept, ffn.rebuilt | attn.rebuilt)
