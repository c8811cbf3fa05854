"""The hash is the same for ints, NumPy and torch, and its draws are uniform and independent."""

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from data.hashing import below, hash32, mix32

words = st.lists(st.integers(0, 2**63 - 1), min_size=1, max_size=4)


@given(stream=st.integers(0, 255), words=words)
def test_one_hash_for_ints_numpy_and_torch(stream, words):
    expected = hash32(stream, *words)
    assert 0 <= expected < 2**32
    assert hash32(stream, *[np.array([w]) for w in words]).item() == expected
    assert hash32(stream, *[torch.tensor([w]) for w in words]).item() == expected
    assert hash32(torch.tensor([stream]), *words).item() == expected


def test_mixing_is_a_bijection_and_avalanches():
    x = np.arange(1 << 16, dtype=np.int64) * 65521 % 2**32
    mixed = mix32(x)
    assert len(np.unique(mixed)) == len(x)
    for bit in range(32):
        flipped = mixed ^ mix32(x ^ (1 << bit))
        rates = [((flipped >> k) & 1).mean() for k in range(32)]
        assert min(rates) > 0.45 and max(rates) < 0.55


def test_draws_are_uniform_over_small_and_large_bounds():
    for bound in (2, 7, 1001):
        draws = below(hash32(3, 5, np.arange(200_000)), bound)
        counts = np.bincount(draws, minlength=bound)
        chi2 = ((counts - counts.mean()) ** 2 / counts.mean()).sum()
        assert chi2 < bound + 5 * np.sqrt(2 * bound)


def test_neighbouring_counters_and_streams_are_uncorrelated():
    n = np.arange(100_000)
    a, b, c = (hash32(1, 0, n), hash32(1, 1, n), hash32(2, 0, n))
    for x, y in ((a, b), (a, c), (a[1:], a[:-1])):
        assert abs(np.corrcoef(x, y)[0, 1]) < 0.02
