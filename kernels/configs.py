"""Tile sizes of the GEMM kernels, by architecture, as data.

The first configuration of a list that fits is used: fits means its operands' pipeline in shared
memory, its accumulators in registers. None depends on the number of tokens, so that a new length
compiles nothing and rounds nothing differently. `backfuse bench static` compiles all of them and
says what came of it (registers, spills, serialised tensor-core instructions).

Kernels that have to agree bit by bit on the order of their sums (a pre-activation in the forward
pass and its rebuild) sum over BLOCK_K in order, in fp32.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch

from .launch import Layout


@dataclass(frozen=True)
class Config:
    """One configuration of a GEMM kernel.

    Attributes:
        block_m: rows of a tile.
        block_n: columns of a tile.
        block_k: depth of a step of the loop.
        num_warps: warps of a program.
        num_stages: steps in flight.
        group_m: rows of tiles that run together, for L2.
        split: column parts the epilogue works on one after another, to spare registers.
    """

    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int
    group_m: int = 8
    split: int = 1


#: Bytes of shared memory a program can have.
SHARED_MEMORY = {
    "sm_80": 163 * 1024,
    "sm_89": 99 * 1024,
    "sm_90": 227 * 1024,
    "sm_100": 227 * 1024,
    "gfx942": 64 * 1024,
    "interpreter": 1 << 30,
}

#: Architectures whose kernels load through tensor descriptors; the interpreter, to test them.
DESCRIPTORS = ("sm_90", "sm_100", "interpreter")

#: fp32 accumulators a thread can hold: beyond these, the loop spills.
ACCUMULATORS = {"ffn_up": 128, "ffn_dact": 128, "ffn_recompute": 192, "weight_grad": 128}

#: Kernel -> architecture -> configurations, the default first.
CONFIGS: dict[str, dict[str, tuple[Config, ...]]] = {
    "ffn_up": {
        "sm_80": (Config(128, 64, 64, 8, 3), Config(128, 64, 32, 8, 3), Config(64, 64, 32, 4, 3),
                  Config(64, 128, 32, 8, 3)),
        "sm_89": (Config(128, 64, 32, 8, 3), Config(64, 128, 32, 8, 3), Config(64, 64, 32, 4, 3),
                  Config(64, 64, 16, 4, 2), Config(64, 128, 16, 8, 2)),
        "sm_90": (Config(128, 128, 64, 8, 4, split=2), Config(128, 128, 64, 8, 3, split=2),
                  Config(128, 64, 64, 8, 4), Config(128, 64, 32, 8, 3), Config(64, 64, 32, 4, 3)),
        "sm_100": (Config(128, 128, 64, 8, 4, split=2), Config(128, 64, 64, 8, 4),
                   Config(64, 64, 32, 4, 3)),
        "gfx942": (Config(128, 128, 32, 8, 2), Config(128, 64, 32, 4, 2), Config(64, 64, 16, 4, 2),
                   Config(64, 128, 16, 8, 2)),
        "interpreter": (Config(64, 128, 64, 4, 1, split=2),),
    },
    "ffn_dact": {
        "sm_80": (Config(128, 128, 32, 8, 3, split=2), Config(128, 64, 32, 4, 4, split=2),
                  Config(64, 64, 32, 4, 3)),
        "sm_89": (Config(128, 64, 32, 4, 3, split=2), Config(64, 128, 32, 4, 3, split=2),
                  Config(64, 64, 32, 4, 3), Config(64, 64, 16, 4, 2),
                  Config(64, 128, 16, 8, 2, split=2)),
        "sm_90": (Config(128, 256, 64, 8, 4, split=4), Config(128, 128, 64, 8, 4, split=2),
                  Config(128, 128, 64, 8, 3, split=2), Config(128, 64, 32, 4, 3, split=2),
                  Config(64, 64, 32, 4, 3)),
        "sm_100": (Config(128, 256, 64, 8, 4, split=4), Config(128, 128, 64, 8, 4, split=2),
                   Config(64, 64, 32, 4, 3)),
        "gfx942": (Config(128, 128, 32, 8, 2, split=2), Config(128, 64, 32, 4, 2, split=2),
                   Config(64, 64, 16, 4, 2), Config(64, 128, 16, 8, 2, split=2)),
        "interpreter": (Config(64, 128, 64, 4, 1, split=2),),
    },
    "ffn_recompute": {
        "sm_80": (Config(128, 64, 32, 8, 3), Config(64, 64, 32, 4, 3)),
        "sm_89": (Config(64, 64, 32, 4, 3), Config(64, 64, 16, 4, 2)),
        "sm_90": (Config(128, 128, 64, 8, 3, split=4), Config(128, 64, 64, 8, 3, split=2),
                  Config(64, 64, 32, 4, 3)),
        "sm_100": (Config(128, 128, 64, 8, 3, split=4), Config(64, 64, 32, 4, 3)),
        "gfx942": (Config(128, 64, 32, 8, 2), Config(64, 64, 32, 4, 2), Config(64, 64, 16, 4, 2)),
        "interpreter": (Config(64, 128, 64, 4, 1, split=2),),
    },
    "weight_grad": {
        "sm_80": (Config(128, 128, 32, 8, 3, split=2), Config(64, 64, 32, 4, 3)),
        "sm_89": (Config(128, 64, 32, 4, 3, split=2), Config(64, 64, 32, 4, 3),
                  Config(64, 64, 16, 4, 2)),
        "sm_90": (Config(128, 256, 64, 8, 4, split=2), Config(128, 128, 64, 8, 4, split=2),
                  Config(64, 64, 32, 4, 3)),
        "sm_100": (Config(128, 256, 64, 8, 4, split=2), Config(128, 128, 64, 8, 3, split=2),
                   Config(64, 64, 32, 4, 3)),
        "gfx942": (Config(128, 128, 32, 8, 2, split=2), Config(64, 64, 32, 4, 2),
                   Config(64, 64, 16, 4, 2)),
        "interpreter": (Config(64, 64, 128, 4, 1, split=2),),
    },
}  # fmt: skip


#: For operands whose rows begin anywhere, on NVIDIA: a load of them takes many registers, and the
#: larger tiles spill in their loops.
UNALIGNED = Config(64, 64, 32, 8, 3)


def shared_bytes(kernel: str, config: Config, itemsize: int, gated: bool = True) -> int:
    """Bytes of shared memory that a kernel's pipeline takes.

    The compiler takes up to 96 more for barriers (sm_90, sm_100), or less: it keeps one stage fewer
    where loads pass through registers (sm_80, gfx942).

    Args:
        kernel: a key of `CONFIGS`.
        config: its configuration.
        itemsize: bytes of an operand's element.
        gated: whether the FFN has a gate, and its kernel a second weight.
    """
    columns = config.block_n
    if gated and kernel in ("ffn_up", "ffn_recompute"):
        columns *= 2
    return (config.block_m + columns) * config.block_k * itemsize * config.num_stages


def accumulators(kernel: str, config: Config, gated: bool = True) -> int:
    """fp32 accumulators of a thread."""
    count = {"ffn_up": 1 + gated, "ffn_recompute": 2 + gated}.get(kernel, 1)
    return count * config.block_m * config.block_n // (32 * config.num_warps)


def fits(kernel: str, config: Config, architecture: str, itemsize: int, gated: bool = True) -> bool:
    """Whether a configuration can run: what it needs, against what the architecture has."""
    return (
        shared_bytes(kernel, config, itemsize, gated) <= SHARED_MEMORY[architecture]
        and accumulators(kernel, config, gated) <= ACCUMULATORS[kernel]
    )


@functools.cache
def architecture(device: torch.device) -> str:
    """The key of the tables for a device.

    Raises:
        ValueError: for a GPU that Triton's tensor-core kernels cannot run on.
    """
    if device.type != "cuda":
        return "interpreter"
    if torch.version.hip:
        return "gfx942"
    major, minor = torch.cuda.get_device_capability(device)
    if major < 8:
        raise ValueError(
            f"the device is of compute capability {major}.{minor}, expected at least 8.0; "
            "use impl='reference'"
        )
    if major in (9, 10):
        return "sm_90" if major == 9 else "sm_100"
    return "sm_80" if (major, minor) == (8, 0) else "sm_89"


def table_of(name: str, itemsize: int) -> str:
    """The architecture whose configurations one uses for elements of that size.

    fp32 is multiplied without tensor cores: on sm_90 and sm_100 every tile that is loaded through
    a descriptor spills then, and sm_80's, loaded through pointers, do not.
    """
    return "sm_80" if itemsize == 4 and name in ("sm_90", "sm_100") else name


def uses_descriptors(x: torch.Tensor | Layout) -> bool:
    """Whether kernels load x through descriptors: where the hardware has them, and to test them."""
    return table_of(architecture(x.device), x.dtype.itemsize) in DESCRIPTORS


@functools.cache
def choose(
    kernel: str,
    name: str,
    itemsize: int,
    gated: bool = True,
    block_n: int | None = None,
    aligned: bool = True,
) -> Config:
    """The configuration a kernel runs with.

    Args:
        kernel: a key of `CONFIGS`.
        name: the architecture (see `architecture`).
        itemsize: bytes of an operand's element.
        gated: whether the FFN has a gate.
        block_n: what `block_n` has to be; None for anything.
        aligned: whether a descriptor could describe the operands (see `launch.describable`).

    Raises:
        ValueError: if none fits.
    """
    name = table_of(name, itemsize)
    if not aligned and name.startswith("sm_") and block_n is None:
        return UNALIGNED
    for config in CONFIGS[kernel][name]:
        wide = block_n in (None, config.block_n)
        if wide and fits(kernel, config, name, itemsize, gated):
            return config
    raise ValueError(
        f"no configuration of {kernel} fits {name} with elements of {itemsize} bytes"
        + (f" and {block_n} columns a tile" if block_n else "")
    )
