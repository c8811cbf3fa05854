"""Whose state is kept by another rank, and what a rank then has of a bucket."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from optim import Muon
from optim.homes import STEP, Place, even_out
from optim.layout import lay_out


@st.composite
def shares(draw):
    """Places of several ranks, side by side, and loads that include them and something else."""
    loads = draw(st.lists(st.integers(0, 3000), min_size=1, max_size=6))
    places, end = [], 0
    for member in range(draw(st.integers(1, 8))):
        owners = draw(st.permutations(range(len(loads))))[: draw(st.integers(1, 3))]
        for rank in owners:
            start, end = end, end + draw(st.integers(1, 5000))
            places.append(Place(rank, 0, member, start, end))
            loads[rank] += end - start
    return places, loads


@given(shares())
def test_what_moves_is_part_of_a_place_and_in_one_piece(some):
    places, loads = some
    average, after = -(-sum(loads) // len(loads)), list(loads)
    moved = even_out(places, loads)
    for part in moved:
        (place,) = (p for p in places if p.start <= part.start < part.stop <= p.stop)
        assert place.member == part.member and place.rank != part.rank
        assert loads[place.rank] > average + average // 100  # who gives had too much
        after[place.rank] -= part.stop - part.start
        after[part.rank] += part.stop - part.start
    keepers = [(p.rank, p.member) for p in (*places, *moved)]
    assert len(set(keepers)) == len(keepers)
    ends = sorted((p.start, p.stop) for p in moved)
    assert all(a[1] <= b[0] for a, b in pairwise(ends))
    assert all(now <= max(before, average) for before, now in zip(loads, after, strict=True))


@given(st.lists(st.integers(1, 9), min_size=1, max_size=9), st.integers(1, 9))
def test_whole_matrices_become_equal_shares(sizes, ranks):
    """Whoever has them; steps are not cut."""
    places, loads, end = [], [0] * ranks, 0
    for member, size in enumerate(sizes):
        start, end = end, end + 6400 * size
        places.append(Place(member % min(ranks, 3), 0, member, start, end))
        loads[member % min(ranks, 3)] += end - start
    for part in even_out(places, loads):
        loads[places[part.member].rank] -= part.stop - part.start
        loads[part.rank] += part.stop - part.start
    assert max(loads) <= sum(loads) / ranks * 1.01 + STEP * ranks


def three_of(dtype, rank):
    """The layout of three equal matrices and a bias for two ranks."""
    params = [torch.randn(size).to(dtype) for size in ((96, 65), (96, 65), (96, 65), (7,))]
    names = ["up.weight", "down.weight", "out.weight", "up.bias"]
    group = {"params": params, "param_names": names, "lr": 0.1}
    return lay_out([group], cut=False, divide=Muon.divide, rank=rank, world=2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_halves_of_all_ranks_are_the_whole(dtype):
    reached, leads = [], []
    for rank in range(2):
        layout = three_of(dtype, rank)
        (bucket,) = layout.buckets
        assert [home.start for home in bucket.homes[1:]] == [h.stop for h in bucket.homes[:-1]]
        assert (bucket.homes[0].start, bucket.homes[-1].stop) == (0, bucket.size)
        for part in bucket.leads:
            member = bucket.members[part.index]
            assert torch.equal(part.tensor.flatten(), member.flatten()[part.start : part.stop])
            leads.append((part.index, part.start, part.stop))
        for part in bucket.follows:
            member = bucket.members[part.index]
            assert part.tensor.shape == member.shape
            assert part.tensor.data_ptr() == member.data_ptr()
            assert part.tensor.grad.data_ptr() == member.grad.data_ptr()
            reached.append(part.index)
        kinds = [g["kind"] for g in (*layout.leads, *layout.shares) if "kind" in g]
        assert kinds == ["momentum", "orthogonal"]
    assert len(reached) == 3 == len(set(reached))
    for index in reached:
        parts = sorted(part for part in leads if part[0] == index)
        assert parts[0][1] == 0 and parts[-1][2] == 96 * 65
        assert all(a[2] == b[1] for a, b in pairwise(parts))


def test_half_precision_gradients_are_not_handed_on():
    """They could not hold what is made of them and a float32 momentum."""
    for rank in range(2):
        layout = three_of(torch.bfloat16, rank)
        assert not any(bucket.moved for bucket in layout.buckets) and not layout.leads
