"""Where parameters may be cut between ranks, and who gets which part of them.

What an optimizer treats as one (a matrix of Muon, a block of Adam-mini) stays on one rank; a
parameter that holds several of them may be cut in between.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, NamedTuple

from torch import Tensor

ALIGN = 256  # bytes between the starts of two tensors, at least what kernels like


def _nothing(start: int, stop: int) -> dict[str, Any]:
    return {}


def _itself(element: int) -> int:
    return element


@dataclass(frozen=True)
class Cuts:
    """Where one parameter may be cut, and what its parts are to its optimizer.

    Elements are counted in row-major order.
    """

    points: Sequence[int] = ()  # elements before which it may be cut, ascending, 0 left out
    cost: int = 1  # elements of state for each of the parameter
    # options of the part [start, stop): one entry each of lists in the group that holds it
    options: Callable[[int, int], dict[str, Any]] = _nothing
    # of an element, its place in moments that have one number per block
    block: Callable[[int], int] = _itself
    # Where an update can be done in two halves, options of the groups that do so: the first one
    # keeps what state there is for each element, and leaves in the gradient what the second takes.
    halves: tuple[Mapping[str, Any], Mapping[str, Any]] | None = None


Divide = Callable[[Sequence[tuple[str, Tensor]], Mapping[str, Any]], list[Cuts]]


class Span(NamedTuple):
    """Elements of a parameter that one rank has."""

    rank: int
    index: int  # of the parameter
    start: int
    stop: int


def anywhere(p: Tensor) -> range:
    """Where to cut a parameter whose elements are updated one by one: what a vector unit likes."""
    step = ALIGN // p.element_size()
    return range(step, p.numel(), step)


def between(p: Tensor, sizes: Iterable[tuple[int, int]]) -> Sequence[int]:
    """Where to cut between blocks, given as (how many, elements of each), in order.

    At aligned places only, if there are any.
    """
    ends, end = [0], 0
    for count, size in sizes:
        ends += range(end + size, end + count * size + 1, size)
        end += count * size
    step = ALIGN // p.element_size()
    return [e for e in ends[1:-1] if e % step == 0] or ends[1:-1]


def share_out(sizes: Sequence[int], cuts: Sequence[Cuts], loads: list[int]) -> list[Span]:
    """What each rank has, in the order in which it is to lie in memory; adds to `loads`.

    Parameters lie in one piece. If it costs the fullest rank no more than 1 % of the average,
    everything of a rank does, too, which needs the fewest collectives.

    Args:
        sizes: elements of each parameter.
        cuts: of each parameter.
        loads: what each rank has already, in elements of state.
    """
    costs = [n * c.cost for n, c in zip(sizes, cuts, strict=True)]
    average = (sum(loads) + sum(costs)) // len(loads)
    best = None
    for found in (_side_by_side(sizes, cuts, loads, average), _largest_first(sizes, cuts, loads)):
        after = list(loads)
        for span in found:
            after[span.rank] += (span.stop - span.start) * cuts[span.index].cost
        if best is None or max(after) < max(best[1]) - average // 100:
            best = found, after
    loads[:] = best[1]
    return best[0]


def _largest_first(sizes: Sequence[int], cuts: Sequence[Cuts], loads: Sequence[int]) -> list[Span]:
    """Every part to the emptiest rank, the costliest first (Graham 1969)."""
    loads = list(loads)
    parts: list[tuple[int, int, int]] = []  # minus the cost, parameter, number in it
    ends: list[list[int]] = []
    for i, (size, some) in enumerate(zip(sizes, cuts, strict=True)):
        step = -(-len(some.points) // (16 * len(loads))) or 1  # many small ones count as a few
        ends.append([*some.points[step - 1 :: step], size])
        places = pairwise([0, *ends[i]])
        parts += [((a - b) * some.cost, i, n) for n, (a, b) in enumerate(places)]
    owners = [[0] * len(some) for some in ends]
    for cost, i, number in sorted(parts):
        rank = min(range(len(loads)), key=lambda r: (loads[r], r))
        owners[i][number] = rank
        loads[rank] -= cost
    found = []
    for i, some in enumerate(ends):
        start, turns = 0, sorted(owners[i])  # what a rank has of a parameter is in one piece
        for number, stop in enumerate(some):
            if turns[number + 1 : number + 2] != [turns[number]]:
                found.append(Span(turns[number], i, start, stop))
                start = stop
    whole = [s for s in found if s.stop - s.start == sizes[s.index]]
    return sorted(whole) + [s for s in found if s.stop - s.start < sizes[s.index]]


def _side_by_side(
    sizes: Sequence[int], cuts: Sequence[Cuts], loads: Sequence[int], average: int
) -> list[Span]:
    """What a rank has is in one piece: a parameter that is cut goes on at the next rank's start.

    By bisection of the room on each rank, as in MULTIFIT (Coffman, Garey, Johnson 1978).
    """
    low, high = average - 1, max(loads) + average * len(loads) + len(loads)
    best = _fill(sizes, cuts, loads, high)
    while high - low > max(1, low // 2000):
        middle = (low + high) // 2
        found = _fill(sizes, cuts, loads, middle)
        if found is None:
            low = middle
        else:
            best, high = found, middle
    return best


def _fill(
    sizes: Sequence[int], cuts: Sequence[Cuts], loads: Sequence[int], most: int
) -> list[Span] | None:
    """Shares of which none costs more than `most`; None where this finds none.

    A rank goes on with what the one before has begun, takes whole parameters, the costliest first,
    and begins the one of which most fits.
    """
    waiting = sorted(range(len(sizes)), key=lambda i: -sizes[i] * cuts[i].cost)
    found: list[Span] = []
    begun: Span | None = None  # what is left of it
    for rank, load in enumerate(loads):
        left = most - load
        if begun is not None:
            stop = _reach(cuts[begun.index], begun.start, begun.stop, left)
            if stop > begun.start:
                found.append(begun._replace(rank=rank, stop=stop))
                left -= (stop - begun.start) * cuts[begun.index].cost
            begun = begun._replace(start=stop) if stop < begun.stop else None
        if begun is not None:
            continue
        later = []
        for i in waiting:
            cost = sizes[i] * cuts[i].cost
            if cost <= left:
                found.append(Span(rank, i, 0, sizes[i]))
                left -= cost
            else:
                later.append(i)
        waiting = later
        reached = {i: _reach(cuts[i], 0, sizes[i], left) for i in waiting}
        i = max(waiting, key=lambda i: reached[i] * cuts[i].cost, default=None)
        if i is not None and reached[i] > 0:
            found.append(Span(rank, i, 0, reached[i]))
            begun = Span(rank, i, reached[i], sizes[i])
            waiting.remove(i)
    return None if waiting or begun is not None else found


def _reach(cuts: Cuts, start: int, stop: int, room: int) -> int:
    """How far of elements [start, stop) fits into `room`: to the end, to a cut, or not at all."""
    end = start + max(room, 0) // cuts.cost
    if end >= stop:
        return stop
    number = bisect_right(cuts.points, end)
    return max(cuts.points[number - 1], start) if number else start
