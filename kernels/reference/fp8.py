"""Pre-activations in eight bits: e4m3 with one scale for every 128 columns of a row.

    scale = max |x| over the tile / 448        stored = round(x / scale)        x' = stored * scale

| kept | recomputed | GEMMs |
|---|---|---|
| 1 byte an element, 4 bytes a tile | x', within 2^-4 of itself where it is above 2^-14 of the
tile's largest value | none |

Gate and up are tiled apart, so that a tile never spans both; the last tile of each may be narrower.
A tile of zeros has the scale 1. Source: Micikevicius et al. 2022 (FP8 formats); tiles of 1 x 128
as in DeepSeek-V3 (2024).
"""

import torch
from torch import Tensor
from torch.nn import functional as F

#: Columns that share a scale.
TILE = 128
DTYPE = torch.float8_e4m3fn
#: The largest number of e4m3.
LARGEST = 448.0


def scale_count(width: int) -> int:
    """Scales of one row of a gate or an up of that width."""
    return -(-width // TILE)


def _tiles(x: Tensor, halves: int) -> Tensor:
    """`[rows, width]` as `[rows, halves, tiles, TILE]` in fp32, padded with zeros."""
    x = x.float().unflatten(-1, (halves, -1))
    return F.pad(x, (0, -x.shape[-1] % TILE)).unflatten(-1, (-1, TILE))


def quantize(x: Tensor, halves: int, stored: Tensor, scales: Tensor) -> None:
    """Write x in eight bits.

    Args:
        x: `[rows, width]`, any floating dtype, finite.
        halves: 2 for gate and up side by side, else 1.
        stored: `[rows, width]`, e4m3, written.
        scales: `[rows, halves * scale_count(width / halves)]`, fp32, written.
    """
    tiles = _tiles(x, halves)
    largest = tiles.abs().amax(-1)
    scale = torch.where(largest > 0, largest / LARGEST, 1.0)
    scales.copy_(scale.flatten(1))
    values = (tiles / scale.unsqueeze(-1)).clamp_(-LARGEST, LARGEST).flatten(2)
    stored.copy_(values[..., : x.shape[-1] // halves].flatten(1))


def dequantize(stored: Tensor, scales: Tensor, halves: int, out: Tensor) -> Tensor:
    """Write what the eight bits stand for into `out`, `[rows, width]`; returned."""
    tiles = _tiles(stored, halves) * scales.unflatten(-1, (halves, -1, 1))
    return out.copy_(tiles.flatten(2)[..., : stored.shape[-1] // halves].flatten(1))
