"""Dropout from a counter: the mask is a function of where an element stands, never a state.

Philox-4x32-10 (Salmon et al. 2011) turns a 64-bit key and a 128-bit counter into four 32-bit
words. Here the key is the seed of one call of one block, and the counter says which element:

    counter = (column // 4, row, slice, site)    word = column % 4    kept if word >= p * 2^32

`site` tells the dropouts of a block apart, `slice` the heads of a batch. The same element gets
the same word on every device, in every chunking, forward and backward: so nothing is stashed,
and a rebuilt activation is masked as the first one was.

The comparison is on integers, so the decision cannot round differently on two devices. PyTorch
has no unsigned 32-bit arithmetic to speak of: the words live in int64.
"""

import torch
from torch import Tensor

MASK32 = 0xFFFFFFFF
MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
WEYL = (0x9E3779B9, 0xBB67AE85)


def philox(
    counter: tuple[Tensor, Tensor, Tensor, Tensor], key: tuple[Tensor, Tensor], rounds: int = 10
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Philox-4x32: four words for every counter.

    Args:
        counter: four int64 tensors that broadcast, each holding values below 2^32.
        key: two int64 tensors that broadcast with them, values below 2^32.
        rounds: 10 in the published generator.

    Returns:
        Four int64 tensors of values below 2^32.
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(rounds):
        product0, product1 = c0 * MULTIPLIERS[0], c2 * MULTIPLIERS[1]
        c0, c1, c2, c3 = (
            ((product1 >> 32) & MASK32) ^ c1 ^ k0,
            product1 & MASK32,
            ((product0 >> 32) & MASK32) ^ c3 ^ k1,
            product0 & MASK32,
        )
        k0, k1 = (k0 + WEYL[0]) & MASK32, (k1 + WEYL[1]) & MASK32
    return c0, c1, c2, c3


def dropout_mask(
    seed: Tensor,
    p: float,
    rows: Tensor,
    columns: Tensor,
    slices: Tensor,
    site: int,
) -> Tensor:
    """Which elements stay.

    Args:
        seed: int64, one element, any device.
        p: probability of dropping, in [0, 1).
        rows: int64 `[rows]`, the elements' row numbers, below 2^32.
        columns: int64 `[columns]`, consecutive column numbers, below 2^34.
        slices: int64 `[slices]`, below 2^32.
        site: small integer, which dropout this is.

    Returns:
        bool `[slices, rows, columns]`: True where the element stays.
    """
    first = columns[:1] // 4
    groups = (
        torch.arange((len(columns) + 6) // 4, device=seed.device, dtype=torch.int64) + first
    )  # one group more than needed where the columns do not start on a group
    key = (seed & MASK32, (seed >> 32) & MASK32)
    counter = (
        groups.view(1, 1, -1),
        rows.view(1, -1, 1),
        slices.view(-1, 1, 1),
        torch.full((1, 1, 1), site, device=seed.device, dtype=torch.int64),
    )
    words = torch.stack(philox(counter, key), -1).flatten(-2)  # [slices, rows, 4 groups]
    words = words.index_select(-1, columns - 4 * first)
    return words >= int(p * 2**32)


def dropout_rows_(x: Tensor, seed: Tensor, p: float, first_row: int, site: int) -> Tensor:
    """Drop and rescale in place; its own gradient, since the map is diagonal.

    Args:
        x: `[rows, width]`, rows `first_row ...` of the whole tensor.
        seed: int64, one element.
        p: probability of dropping.
        first_row: number of x's first row.
        site: which dropout this is.

    Returns:
        x.
    """
    rows = torch.arange(first_row, first_row + x.shape[0], device=x.device)
    columns = torch.arange(x.shape[1], device=x.device)
    mask = dropout_mask(seed, p, rows, columns, columns[:1] * 0, site)[0]
    return x.mul_(mask).mul_(1.0 / (1.0 - p))


def draw_seed(like: Tensor, layers: int) -> Tensor:
    """Seeds for dropout, int64 `[layers]`, on the device of `like`.

    Drawn from PyTorch's generator: torch.manual_seed and an outer checkpoint's RNG state govern
    it, and a CUDA graph draws anew at each replay.
    """
    return torch.randint(2**63 - 1, (layers,), device=like.device, dtype=torch.int64)
