"""Tile sizes of the attention kernels, by architecture and head dim, as data: see `configs.py`.

`block_m` are queries, `block_n` keys, `block_k` the head dim (a power of two): a head takes the
first configuration that is as wide as it is, or wider, and fits.
"""

from __future__ import annotations

import functools

from .configs import SHARED_MEMORY, Config, table_of

#: Kernel -> architecture -> configurations.
CONFIGS: dict[str, dict[str, tuple[Config, ...]]] = {
    "attention_forward": {
        "sm_80": (Config(128, 64, 64, 4, 3), Config(128, 64, 128, 8, 2), Config(64, 32, 128, 4, 2),
                  Config(64, 32, 256, 8, 1), Config(32, 32, 256, 8, 1)),
        "sm_89": (Config(128, 64, 64, 4, 2), Config(64, 64, 128, 4, 2), Config(64, 32, 128, 4, 1),
                  Config(32, 32, 256, 4, 1), Config(16, 16, 256, 4, 1)),
        "sm_90": (Config(128, 128, 64, 8, 2), Config(128, 128, 128, 8, 2),
                  Config(128, 64, 256, 8, 2)),
        "sm_100": (Config(128, 128, 64, 8, 2), Config(128, 128, 128, 8, 2),
                   Config(128, 64, 256, 8, 2)),
        "gfx942": (Config(128, 64, 64, 4, 1), Config(64, 64, 128, 4, 1), Config(32, 32, 128, 4, 1),
                   Config(32, 32, 256, 4, 1), Config(16, 16, 256, 4, 1)),
        "interpreter": (Config(32, 32, 256, 4, 1),),
    },
    "attention_dkdv": {
        "sm_80": (Config(64, 64, 64, 4, 2), Config(64, 64, 128, 8, 2), Config(32, 32, 128, 4, 1),
                  Config(32, 32, 256, 8, 1), Config(16, 16, 256, 4, 1)),
        "sm_89": (Config(64, 64, 64, 4, 2), Config(32, 64, 128, 4, 1), Config(32, 32, 128, 4, 1),
                  Config(16, 32, 256, 4, 1), Config(16, 16, 256, 4, 1)),
        "sm_90": (Config(64, 128, 64, 8, 2), Config(64, 128, 128, 8, 2),
                  Config(32, 64, 256, 8, 2)),
        "sm_100": (Config(64, 128, 64, 8, 2), Config(64, 128, 128, 8, 2),
                   Config(32, 64, 256, 8, 2)),
        "gfx942": (Config(64, 64, 64, 4, 1), Config(32, 64, 128, 4, 1), Config(16, 32, 128, 4, 1),
                   Config(16, 32, 256, 4, 1), Config(16, 16, 256, 4, 1)),
        "interpreter": (Config(32, 32, 256, 4, 1),),
    },
    "attention_dq": {
        "sm_80": (Config(64, 64, 64, 4, 2), Config(64, 64, 128, 4, 2), Config(32, 32, 128, 4, 1),
                  Config(32, 32, 256, 4, 1), Config(16, 16, 256, 4, 1)),
        "sm_89": (Config(64, 64, 64, 4, 2), Config(64, 32, 128, 4, 1), Config(32, 32, 128, 4, 1),
                  Config(32, 16, 256, 4, 1), Config(16, 16, 256, 4, 1)),
        "sm_90": (Config(128, 128, 64, 8, 2), Config(128, 64, 128, 8, 2),
                  Config(64, 32, 256, 8, 2)),
        "sm_100": (Config(128, 128, 64, 8, 2), Config(128, 64, 128, 8, 2),
                   Config(128, 32, 256, 8, 2)),
        "gfx942": (Config(64, 64, 64, 4, 1), Config(64, 32, 128, 4, 1), Config(32, 32, 128, 4, 1),
                   Config(32, 16, 256, 4, 1), Config(16, 16, 256, 4, 1)),
        "interpreter": (Config(32, 32, 256, 4, 1),),
    },
}  # fmt: skip


#: Those that come first where a softcap, dropout or packed sequences ask for more registers: with
#: the larger tiles above, their loops spill.
HEAVY: dict[str, dict[str, tuple[Config, ...]]] = {
    "attention_forward": {
        "sm_80": (Config(128, 32, 128, 8, 2),),
        "sm_90": (Config(128, 64, 128, 8, 2),),
    },
    "attention_dkdv": {
        "sm_90": (Config(32, 64, 128, 8, 2),),
        "sm_100": (Config(32, 64, 128, 8, 2),),
    },
}


def shared_bytes(kernel: str, config: Config, itemsize: int) -> int:
    """Bytes of shared memory of the tiles that stay, and of those in flight."""
    stays, flies = {
        "attention_forward": (config.block_m, 2 * config.block_n),
        "attention_dkdv": (2 * config.block_n, 2 * config.block_m),
        "attention_dq": (2 * config.block_m, 2 * config.block_n),
    }[kernel]
    return (stays + flies * config.num_stages) * config.block_k * itemsize


@functools.cache
def choose(kernel: str, name: str, itemsize: int, block_d: int, heavy: bool = False) -> Config:
    """The configuration a kernel runs with.

    Args:
        kernel: a key of `CONFIGS`.
        name: the architecture (see `configs.architecture`).
        itemsize: bytes of an element.
        block_d: the head dim, rounded up to a power of two.
        heavy: whether there is a softcap, dropout, or packed sequences.

    Raises:
        ValueError: if none fits.
    """
    name = table_of(name, itemsize)
    first = HEAVY.get(kernel, {}).get(name, ()) if heavy else ()
    for config in (*first, *CONFIGS[kernel][name]):
        fits = shared_bytes(kernel, config, itemsize) <= SHARED_MEMORY[name]
        if config.block_k >= block_d and fits:
            return config
    raise ValueError(
        f"no configuration of {kernel} fits {name} with heads of {block_d} elements of {itemsize} "
        "bytes"
    )
