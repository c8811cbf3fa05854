"""Which rank has which part of which parameter."""

from __future__ import annotations

from itertools import groupby

from hypothesis import given
from hypothesis import strategies as st

from optim.cuts import Cuts, share_out


@st.composite
def parameters(draw):
    """Sizes of parameters, and where each may be cut."""
    sizes, cuts = [], []
    for _ in range(draw(st.integers(1, 8))):
        part, count = draw(st.integers(1, 500)), draw(st.sampled_from((1, 2, 3, 40)))
        sizes.append(part * count)
        cuts.append(Cuts(range(part, part * count, part), draw(st.sampled_from((1, 2)))))
    return sizes, cuts


@given(parameters(), st.lists(st.integers(0, 3000), min_size=1, max_size=6))
def test_every_element_has_one_rank_and_lies_in_order(some, loads):
    sizes, cuts = some
    before, reached = list(loads), [0] * len(sizes)
    spans = share_out(sizes, cuts, loads)
    for span in spans:
        assert span.start == reached[span.index] < span.stop
        reached[span.index] = span.stop
        assert span.stop == sizes[span.index] or span.stop in cuts[span.index].points
        before[span.rank] += (span.stop - span.start) * cuts[span.index].cost
    assert reached == sizes and before == loads
    # a parameter is finished before the next one begins: it lies in one piece
    order = [span.index for span in spans]
    assert len(list(groupby(order))) == len(sizes)
    assert len({(s.rank, s.index) for s in spans}) == len(spans)


@given(parameters(), st.integers(1, 6))
def test_the_fullest_has_no_more_than_the_average_and_the_largest_part(some, ranks):
    """Graham's bound for dealing out parts; a hundredth is given for fewer collectives."""
    sizes, cuts = some
    loads = [0] * ranks
    share_out(sizes, cuts, loads)
    total = sum(n * c.cost for n, c in zip(sizes, cuts, strict=True))
    largest = max(n * c.cost / (len(c.points) + 1) for n, c in zip(sizes, cuts, strict=True))
    coarse = max(n * c.cost / (16 * ranks) for n, c in zip(sizes, cuts, strict=True))
    assert max(loads) <= total / ranks * 1.01 + max(largest, coarse) + 1
