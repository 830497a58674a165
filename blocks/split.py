"""What of a block is split over ranks, along which dimension, and what cannot be."""

from __future__ import annotations

from torch import Tensor

from .lora import Adapters, drops
from .spec import BlockSpec, check_spec

#: Fields that have to be so: what stands behind the sum over ranks, or crosses heads, is not split.
EXPECTED = {
    "norm_position": "pre", "stacked_qkv": False, "stacked_gate_up": False, "o_bias": False,
    "down_bias": False, "attention_dropout": 0.0, "residual_dropout": 0.0,
    "activation_dropout": 0.0, "residual_multiplier": 1.0, "parallel_residual": False,
    "layer_scale": False, "conv1d": False,
}  # fmt: skip

#: Projections that are split -> the dimension of their weights; other parameters are on every rank.
SPLIT = {
    **dict.fromkeys(("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj"), 0),
    **dict.fromkeys(("o_proj", "down_proj"), 1),
}


def local_spec(spec: BlockSpec, ranks: int) -> BlockSpec:
    """What one of some ranks has of a block: its heads, and its part of the FFN.

    Raises:
        TypeError: for a spec that is none.
        ValueError: for sizes that do not divide, or a block that cannot be split, naming the field.
    """
    check_spec(spec)
    if ranks == 1:
        return spec
    for name, expected in EXPECTED.items():
        if getattr(spec, name) != expected:
            raise ValueError(
                f"{name} is {getattr(spec, name)!r}, expected {expected!r} of a block that is "
                "split over ranks"
            )
    if spec.qk_norm == "full":
        raise ValueError("qk_norm is 'full', expected 'head' or None: 'full' is over all heads")
    sizes = ("num_attention_heads", "num_key_value_heads", "intermediate_size")
    for name in sizes:
        if getattr(spec, name) % ranks:
            raise ValueError(
                f"{name} is {getattr(spec, name)}, expected a multiple of {ranks}, the ranks it is "
                "split over"
            )
    divided = {name: getattr(spec, name) // ranks for name in sizes}
    return spec.replace(**divided, head_dim=spec.head_dim)


def dimension_of(name: str) -> int | None:
    """Along which dimension a parameter is split; None: it is on every rank."""
    if name.endswith(".sinks"):
        return 0
    _, projection, kind, *_ = [*name.split("."), ""]
    dimension = SPLIT.get(projection)
    if (dimension, kind) in ((0, "lora_A"), (1, "lora_B")):  # of what every rank reads, or gives
        return None
    return dimension


def is_split(parameter: Tensor) -> bool:
    """Whether a parameter is a DTensor, told without the import, which takes a while."""
    return hasattr(parameter, "device_mesh")


def check_adapters(adapters: Adapters) -> None:
    """Raise a ValueError for adapters that cannot be split."""
    if drops(adapters):
        raise ValueError(
            f"{adapters[0][0]} has an adapter that drops out, expected lora_dropout 0 in a block "
            "that is split over ranks: each would draw for itself"
        )
    for name, several in adapters:
        if SPLIT[name.split(".")[1]] == 1 and any(lora.use_bias for lora in several):
            raise ValueError(
                f"{name} has an adapter with a bias, expected none behind the sum over ranks"
            )
