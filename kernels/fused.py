"""Every operation as Triton kernels: the functions of `kernels.reference`, by the same names."""

from .activation import activation_forward
from .attention_core import attention_backward, attention_forward, needs_delta
from .attention_delta import attention_delta
from .ffn_dact import ffn_dact
from .ffn_recompute import ffn_recompute_dact
from .ffn_up import ffn_up
from .norm import norm_apply, norm_backward, norm_forward
from .qk_rope import qk_rope_backward, qk_rope_forward
from .weight_grad import accumulate_outer

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
