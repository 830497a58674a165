"""kernels/reference/dropout.py: the published generator, and a mask that depends on place alone."""

import pytest
import torch

from backfuse.kernels.reference.dropout import MASK32, dropout_mask, dropout_rows_, philox

# Known answers of Philox-4x32-10 (Random123's kat_vectors): counter, key, result.
KNOWN = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((MASK32,) * 4, (MASK32,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


@pytest.mark.parametrize("counter, key, expected", KNOWN)
def test_known_answers(counter, key, expected):
    words = philox(tuple(torch.tensor([c]) for c in counter), tuple(torch.tensor([k]) for k in key))
    assert tuple(int(word) for word in words) == expected


def mask(seed=5, p=0.3, rows=(0, 40), columns=(0, 50), slices=(0, 3), site=0):
    return dropout_mask(
        torch.tensor([seed]), p, *(torch.arange(*span) for span in (rows, columns, slices)), site
    )


def test_a_part_of_the_mask_is_the_mask_of_a_part():
    whole = mask()
    for columns in [(0, 50), (1, 2), (3, 17), (4, 50), (49, 50)]:
        part = mask(rows=(7, 30), columns=columns, slices=(1, 3))
        assert torch.equal(part, whole[1:3, 7:30, slice(*columns)])


def test_seeds_sites_and_slices_are_independent():
    whole = mask()
    agreement = 0.3**2 + 0.7**2
    others = [mask(seed=6), mask(seed=5 + 2**40), mask(site=1), mask(slices=(3, 6))]
    for other in others:
        assert abs((whole == other).float().mean().item() - agreement) < 0.03


@pytest.mark.parametrize("p", [0.0, 0.1, 0.5, 0.9])
def test_rate(p):
    kept = mask(p=p, rows=(0, 500), columns=(0, 100)).float()
    n = kept.numel()
    assert abs(kept.mean().item() - (1 - p)) <= 5 * (p * (1 - p) / n) ** 0.5


def test_rows_rescale_and_do_not_depend_on_chunks():
    x = torch.randn(30, 11)
    seed = torch.tensor([2**62 + 3])
    whole = dropout_rows_(x.clone(), seed, 0.25, 0, 1)
    parts = torch.cat(
        [dropout_rows_(x[a : a + 7].clone(), seed, 0.25, a, 1) for a in range(0, 30, 7)]
    )
    assert torch.equal(whole, parts)
    torch.testing.assert_close(whole[whole != 0], (x / 0.75)[whole != 0])
    assert (whole == 0).any()
