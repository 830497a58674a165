"""Every operation in plain PyTorch, forward and hand-written backward.

This is the path that runs on a CPU, and the oracle every kernel is held against. A backward here
never calls autograd: it is the formula, so that a reader can compare it with the kernel's.
"""

from .activation import activation_forward
from .attention import attention_backward, attention_forward, needs_delta
from .ffn import ffn_dact, ffn_recompute_dact, ffn_up
from .linear import accumulate_outer
from .norm import norm_apply, norm_backward, norm_forward
from .qk_rope import attention_delta, qk_rope_backward, qk_rope_forward

__all__ = [
    "accumulate_outer",
    "activation_forward",
    "attention_backward",
    "attention_delta",
    "attention_forward",
    "ffn_dact",
    "ffn_recompute_dact",
    "ffn_up",
    "needs_delta",
    "norm_apply",
    "norm_backward",
    "norm_forward",
    "qk_rope_backward",
    "qk_rope_forward",
]
