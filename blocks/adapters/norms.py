"""What a norm computes, found by asking it: rounding, offset and eps are in no attribute's name."""

from __future__ import annotations

import copy
import itertools

import torch
from torch import Tensor, nn

from backfuse.kernels.reference.norm import NormSpec, norm_forward

#: Attributes that may hold a norm's eps.
EPS = ("variance_epsilon", "eps", "epsilon", "norm_eps")


def is_norm(module: nn.Module) -> bool:
    """Whether a module has a norm's parameters: one vector, or two."""
    own = dict(module.named_parameters())
    return "weight" in own and own.keys() <= {"weight", "bias"} and own["weight"].dim() == 1


def _computed(x: Tensor, module: nn.Module, spec: NormSpec) -> Tensor:
    statistics = torch.empty(spec.statistics, len(x), dtype=torch.float32)
    bias = getattr(module, "bias", None)
    assert isinstance(module.weight, Tensor)
    return norm_forward(x, module.weight, bias, spec, statistics, x.dtype)


def norm_spec(module: nn.Module) -> NormSpec | None:
    """How a norm computes, or None if it does so in no way that is known.

    Args:
        module: a norm of a stand-in: on the CPU, in fp32, its parameters random.
    """
    eps = next((getattr(module, name) for name in EPS if hasattr(module, name)), None)
    if not isinstance(eps, float):
        return None
    width = sum(p.numel() for n, p in module.named_parameters() if n == "weight")
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(8, width, generator=generator) + 0.5
    x[4:] *= eps**0.5  # where eps is as large as what it is added to
    with torch.no_grad():
        y = module(x[None])[0]
        for kind, offset in itertools.product(("rmsnorm", "layernorm"), (0.0, 1.0)):
            spec = NormSpec(kind, eps, offset, False)
            if torch.allclose(_computed(x, module, spec), y, rtol=1e-4, atol=1e-5):
                break
        else:
            return None
        low = copy.deepcopy(module).to(torch.bfloat16)
        x = x[:4].to(torch.bfloat16)
        y = low(x[None])[0].float()
        rounded = [NormSpec(kind, eps, offset, first) for first in (False, True)]
        return min(rounded, key=lambda spec: (_computed(x, low, spec).float() - y).norm().item())
