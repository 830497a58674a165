"""Which of a block's activations are kept for the backward pass, and what becomes of the others.

Five activations cost a GEMM to rebuild; a policy gives each an action:

    x          block input                     rebuilt by the block before it, in a segment
    qkv        QKV projection                  rebuilt from x
    attn_out   attention output and its LSE    rebuilt by the flash forward
    mid        residual between the halves     rebuilt by the output projection
    preact     FFN pre-activation              rebuilt from mid

Everything else (normed inputs, roped q and k, softmax, the activated hidden) is never kept.

`offload` keeps the activation in host memory, or in files (see `offload.py`).
`fp8` keeps `preact` in eight bits (see `kernels/reference/fp8.py`). It is the one action that
changes gradients, never the loss; no named policy has it: who writes it allows it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from functools import cached_property

from .errors import nearest

ACTIVATION_NAMES = ("x", "qkv", "attn_out", "mid", "preact")
ACTIONS = ("keep", "recompute", "offload", "fp8")

#: Activations that may be kept in eight bits.
FP8_NAMES = ("preact",)


@dataclass(frozen=True, repr=False)
class Policy:
    """One action for each of the five activations: `keep`, `recompute`, `offload` or `fp8`.

    Raises:
        ValueError: for an unknown action.
    """

    x: str = "keep"
    qkv: str = "keep"
    attn_out: str = "keep"
    mid: str = "keep"
    preact: str = "keep"

    def __post_init__(self) -> None:
        for name in ACTIVATION_NAMES:
            action = getattr(self, name)
            if action not in ACTIONS:
                raise ValueError(
                    f"the action of {name} is {action!r}, expected one of {', '.join(ACTIONS)}"
                    + nearest(action, ACTIONS)
                )
        for name in ("offloads", "lossy", "_obstacle"):  # torch.compile cannot trace their lock
            getattr(self, name)

    @classmethod
    def parse(cls, value: PolicyLike) -> Policy:
        """A policy from what a user writes.

        Args:
            value: a policy; a name (`"selective"`, or an alias such as `"nothing_saveable"`); a
                mapping from activations to actions, the others being kept; or the same as text,
                `"preact=recompute, qkv=recompute"`.

        Raises:
            TypeError: for something else.
            ValueError: for an unknown name, with the nearest known one, or a name given twice.
        """
        if isinstance(value, Policy):
            return value
        if isinstance(value, str) and value in NAMED_POLICIES:
            return NAMED_POLICIES[value]
        if isinstance(value, Mapping):
            for name in value:
                if name not in ACTIVATION_NAMES:
                    raise ValueError(
                        f"policy names the activation {name!r}, expected one of "
                        f"{', '.join(ACTIVATION_NAMES)}" + nearest(name, ACTIVATION_NAMES)
                    )
            return cls(**value)
        if not isinstance(value, str):
            raise TypeError(
                f"policy is a {type(value).__name__}, expected a name, a mapping from activations "
                "to actions, or a Policy"
            )
        if "=" in value:
            actions: dict[str, str] = {}
            for part in value.split(","):
                name, _, action = map(str.strip, part.partition("="))
                if name in actions:
                    raise ValueError(
                        f"policy is {value!r}, expected one action an activation: {name} has two"
                    )
                actions[name] = action
            return cls.parse(actions)
        known = {**NAMED_POLICIES, **{alias: NAMED_POLICIES[n] for alias, n in ALIASES.items()}}
        if value not in known:
            raise ValueError(
                f"policy is {value!r}, expected one of {', '.join(NAMED_POLICIES)} (or an alias: "
                f"{', '.join(ALIASES)})" + nearest(value, known)
            )
        return known[value]

    def check_available(self) -> None:
        """Raise a ValueError if an action of this policy does not exist."""
        if self._obstacle is not None:
            raise ValueError(self._obstacle)

    @cached_property
    def _obstacle(self) -> str | None:
        for name in ACTIVATION_NAMES:
            action = getattr(self, name)
            if action == "fp8" and name not in FP8_NAMES:
                return (
                    f"the action of {name} is 'fp8', expected another one: only "
                    f"{', '.join(FP8_NAMES)} can be kept in eight bits"
                )
        return None

    def keeps(self, name: str) -> bool:
        """Whether backward finds the activation as it was: on the device, or brought back to it."""
        return getattr(self, name) in ("keep", "offload")

    @cached_property
    def offloads(self) -> bool:
        """Whether something is kept elsewhere than on the device."""
        return any(getattr(self, name) == "offload" for name in ACTIVATION_NAMES)

    @cached_property
    def lossy(self) -> bool:
        """Whether gradients differ from those of `keep`: something is kept in eight bits."""
        return any(getattr(self, name) == "fp8" for name in FP8_NAMES)

    def with_x(self, action: str) -> Policy:
        """The same policy with another action for `x`."""
        return replace(self, x=action)

    def __repr__(self) -> str:
        name = next((n for n, policy in NAMED_POLICIES.items() if policy == self), None)
        groups = {
            action: [f.name for f in fields(self) if getattr(self, f.name) == action]
            for action in ACTIONS
        }
        told = "; ".join(f"{a} {', '.join(names)}" for a, names in groups.items() if names)
        return f"Policy({name}: {told})" if name else f"Policy({told})"


PolicyLike = Policy | str | Mapping[str, str]

#: Everything is kept.
KEEP = Policy()

#: The policies that have a name, from most to least memory.
NAMED_POLICIES: dict[str, Policy] = {
    "keep": KEEP,
    "selective": Policy(preact="recompute"),
    "lean": Policy(qkv="recompute", mid="recompute", preact="recompute"),
    "full": Policy(qkv="recompute", attn_out="recompute", mid="recompute", preact="recompute"),
    "offload": Policy(
        x="offload", qkv="recompute", attn_out="offload", mid="recompute", preact="recompute"
    ),
}

#: Names of others for the same thing: JAX's, and Hugging Face's.
ALIASES = {
    "everything_saveable": "keep",
    "dots_saveable": "keep",
    "nothing_saveable": "full",
    "activation_checkpointing": "full",
    "gradient_checkpointing": "full",
}
