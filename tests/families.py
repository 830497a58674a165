"""Small specs of every kind, and the comparisons that several test files share."""

import itertools

import torch

from backfuse import BlockSpec, TransformerBlock
from backfuse.blocks.policy import ACTIVATION_NAMES

FAMILIES = {
    "llama": BlockSpec(32, 48, 4, 2),
    "qwen3": BlockSpec(32, 48, 4, 2, head_dim=12, qk_norm="head"),
    "gpt2": BlockSpec(
        32, 64, 4, norm="layernorm", norm_eps=1e-5, hidden_act="gelu_new", gated=False,
        qkv_bias=True, o_bias=True, up_bias=True, down_bias=True, rope=None,
        attention_dropout=0.1, residual_dropout=0.2, stacked_qkv=True, conv1d=True,
    ),
    "gemma2": BlockSpec(
        32, 48, 4, 1, norm_position="both", norm_offset=1.0, norm_round_first=False,
        hidden_act="gelu_pytorch_tanh", attn_logit_softcapping=5.0, sliding_window=7,
        attention_scale=0.3,
    ),
    "olmo2": BlockSpec(
        32, 48, 4, norm_position="post", norm_round_first=False, qk_norm="full",
    ),
    "phi3": BlockSpec(
        32, 48, 4, 2, stacked_qkv=True, stacked_gate_up=True, rotary_dim=4, residual_dropout=0.1,
        activation_dropout=0.2, up_bias=True,
    ),
    "relu2": BlockSpec(
        32, 64, 2, hidden_act="relu2", gated=False, rope="interleaved", causal=False,
        sliding_window=5,
    ),
    "geglu-layernorm-post": BlockSpec(
        32, 48, 4, 2, norm="layernorm", norm_position="both", hidden_act="gelu", up_bias=True,
    ),
    "bert": BlockSpec(
        32, 48, 4, norm="layernorm", norm_position="after_residual", norm_eps=1e-12,
        hidden_act="gelu", gated=False, rope=None, causal=False, qkv_bias=True, o_bias=True,
        up_bias=True, down_bias=True, attention_dropout=0.1, residual_dropout=0.1,
        residual_multiplier=-1.5, activation_dropout=0.1,
    ),
    "neox": BlockSpec(
        32, 48, 4, norm="layernorm", parallel_residual=True, hidden_act="gelu", gated=False,
        qkv_bias=True, o_bias=True, up_bias=True, down_bias=True, rotary_dim=4, stacked_qkv=True,
        qkv_per_head=True, residual_dropout=0.1,
    ),
    "shared-norm-and-layer-scale": BlockSpec(
        32, 48, 4, 2, norm="layernorm", norm_bias=False, parallel_residual=True, shared_norm=True,
        rope="interleaved", layer_scale=True, down_bias=True, residual_multiplier=0.7,
        residual_dropout=0.1,
    ),
    "odd-sizes": BlockSpec(30, 45, 3, 1, head_dim=10, qkv_bias=True, residual_multiplier=0.22),
    "sinks-and-wide-values": BlockSpec(
        32, 48, 4, 2, v_head_dim=20, attention_sinks=True, sliding_window=9, qkv_bias=True,
        stacked_qkv=True,
    ),
}  # fmt: skip

#: All sixteen ways to keep or recompute the four activations of a block.
POLICIES = [
    dict(zip(ACTIVATION_NAMES[1:], actions, strict=True))
    for actions in itertools.product(("keep", "recompute"), repeat=4)
]

#: The same with preact in eight bits: not lossless.
FP8_POLICIES = [{**policy, "preact": "fp8"} for policy in POLICIES if policy["preact"] == "keep"]

#: Which of a block's parameters are frozen, and whether its input needs a gradient.
FROZEN = {
    "nothing": lambda name: False,
    "everything": lambda name: True,
    "attention": lambda name: name.startswith("self_attn"),
    "ffn": lambda name: name.startswith("mlp"),
    "projections": lambda name: "_proj.weight" in name,
    "all-but-down": lambda name: not name.startswith("mlp.down_proj"),
    "all-but-o": lambda name: not name.startswith("self_attn.o_proj"),
    "all-but-norms": lambda name: "norm" not in name,
    "all-but-last-norm": lambda name: not name.startswith("post_feedforward"),
    "all-but-biases": lambda name: not name.endswith("bias"),
}


def make_block(spec, policy="keep", *, dtype=torch.float32, chunk_size=64, frozen="nothing"):
    """A block with random weights everywhere, norms and biases included."""
    torch.manual_seed(0)
    block = TransformerBlock(spec, policy, dtype=torch.float64, chunk_size=chunk_size)
    with torch.no_grad():
        for parameter in block.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    for name, parameter in block.named_parameters():
        parameter.requires_grad_(not FROZEN[frozen](name))
    return block.to(dtype)


def make_input(spec, *, batch_size=2, seq_len=70, dtype=torch.float32, requires_grad=True):
    """A block's input and the gradient of its output."""
    generator = torch.Generator().manual_seed(1)
    shape = (batch_size, seq_len, spec.hidden_size)
    x = torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)
    grad = torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)
    return x.requires_grad_(requires_grad), grad


def results(module, x, grad, **inputs):
    """Output and every gradient of one training step, None where there is none."""
    module.zero_grad(set_to_none=True)
    x.grad = None
    torch.manual_seed(2)  # what drops out
    y = module(x, **inputs)
    if y.requires_grad:
        y.backward(grad)
    return [y.detach(), x.grad, *(p.grad for p in module.parameters())]


def same_bits(a, b):
    """Whether two lists of tensors (or None) are equal bit by bit."""
    return len(a) == len(b) and all(
        (p is None and q is None) or (p is not None and q is not None and torch.equal(p, q))
        for p, q in zip(a, b, strict=True)
    )


def held_bytes(function, exclude=()):
    """What `function()` leaves held for backward, by unique storage, and its result.

    Args:
        function: runs a forward pass.
        exclude: tensors whose storages do not count.
    """
    storages = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = function()
    for tensor in exclude:
        storages.pop(tensor.untyped_storage().data_ptr(), None)
    return sum(storages.values()), result


def error(value, exact):
    """Largest absolute difference, in fp64."""
    return (value.double() - exact.double()).abs().max().item()


def assert_as_good_as(name, ours, plain, exact, eps, scale=0.0):
    """Our error against the exact result is at most twice plain PyTorch's, plus a rounding.

    Args:
        name: what is compared, for the message.
        ours: our result, low precision.
        plain: plain PyTorch's, in the same precision.
        exact: the fp64 result.
        eps: machine epsilon of that precision.
        scale: size of the terms the result is a difference of, where that is larger.
    """
    bound = 2 * error(plain, exact) + eps * max(exact.abs().max().item(), scale)
    assert error(ours, exact) <= bound, (
        f"{name}: error {error(ours, exact):.3e}, expected at most {bound:.3e} "
        f"(plain PyTorch: {error(plain, exact):.3e})"
    )
