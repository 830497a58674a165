"""A device on which blocks were timed: what their parts take there, as multiples of arithmetic.

`planner/profile.py` measures the multiples, `costs.py` multiplies by them. Multiples, unlike
seconds, serve sizes and frozen weights other than those that were measured.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields

from .devices import Device
from .policy import Policy
from .spec import BlockSpec

#: Activations that a backward pass can rebuild, and those that are rebuilt on the way to them.
OWNERS = {
    "qkv": "qkv",
    "attn_norm": "qkv",
    "attn_out": "attn_out",
    "mid": "mid",
    "attn_post_norm": "mid",
    "preact": "preact",
    "ffn_norm": "preact",
    "down": "preact",
}

#: The five activations but `x`, which a layer before rebuilds.
REBUILT = ("qkv", "attn_out", "mid", "preact")


def owner(name: str) -> str:
    """The activation for whose sake a part of the phase `recompute` runs."""
    return OWNERS[name.partition("_lora_")[0]]


@dataclass(frozen=True)
class Factors:
    """Seconds that parts of one block took, divided by those of arithmetic.

    Attributes:
        batch_size: sequences that were measured.
        seq_len: tokens of each.
        forward: of the forward pass.
        backward: of the gradients, and of what `keep` rebuilds beside them.
        qkv: of rebuilding it; so the three after it.
        attn_out: see qkv.
        mid: see qkv.
        preact: see qkv.

    Raises:
        ValueError: for a factor that is negative or no number.
    """

    batch_size: int
    seq_len: int
    forward: float = 1.0
    backward: float = 1.0
    qkv: float = 1.0
    attn_out: float = 1.0
    mid: float = 1.0
    preact: float = 1.0

    def __post_init__(self) -> None:
        for name in ("forward", "backward", *REBUILT):
            value = getattr(self, name)
            if not isinstance(value, int | float) or not 0 <= value < math.inf:
                raise ValueError(f"the factor {name} is {value!r}, expected a number of at least 0")

    def of(self, phase: str, name: str, policy: Policy) -> float:
        """The factor of a part under a policy (see `costs.Part`)."""
        if phase == "recompute" and not policy.keeps(owner(name)):
            return getattr(self, owner(name))
        return self.forward if phase == "forward" else self.backward


@dataclass(frozen=True)
class ProfiledDevice(Device):
    """A device, and the factors of each block that was timed on it.

    Attributes:
        blocks: spec and factors of each.
    """

    blocks: tuple[tuple[BlockSpec, Factors], ...] = ()

    def factors(self, spec: BlockSpec) -> Factors:
        """Those of a block.

        Raises:
            ValueError: for a block that was not timed.
        """
        for known, factors in self.blocks:
            if known == spec:
                return factors
        raise ValueError(
            f"device is a profile of {self.name} without a block like {spec}, expected one that "
            "was made with it: plan(..., profile=True)"
        )

    @property
    def table_row(self) -> Device:
        """The device as arithmetic sees it."""
        return Device(**{field.name: getattr(self, field.name) for field in fields(Device)})
