"""Whose state is kept by another rank than the one that updates the parameter, so that all keep
equally much."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

STEP = 64  # elements: of float32 what aligns a part


class Place(NamedTuple):
    """Elements side by side in memory whose state, one number for each, may be kept anywhere."""

    rank: int  # that keeps it
    bucket: int
    member: int  # of the bucket: the parameter they belong to
    start: int
    stop: int


def even_out(places: Sequence[Place], loads: Sequence[int]) -> list[Place]:
    """The parts of `places` that are to be kept by another rank, which is theirs in the answer.

    Who keeps over 1 % more than the average gives the ends of its largest places to the emptiest
    ranks. What a rank keeps of a parameter is in one piece.

    Args:
        places: what may be moved, and where it is.
        loads: elements of state that each rank keeps, these included.
    """
    loads = list(loads)
    average = -(-sum(loads) // len(loads))
    most = average + average // 100
    keepers = {place[:3] for place in places}
    moved = []
    for place in sorted(places, key=lambda p: (p.start - p.stop, p)):
        stop = place.stop
        while loads[place.rank] > most and stop > place.start:
            free = [r for r in range(len(loads)) if (r, *place[1:3]) not in keepers]
            taker = min(free, key=lambda r: (loads[r], r), default=place.rank)
            size = min(loads[place.rank] - average, average - loads[taker])
            start = max(place.start, -((size - stop) // STEP) * STEP)
            if start >= stop:
                break
            moved.append(place._replace(rank=taker, start=start, stop=stop))
            keepers.add(moved[-1][:3])
            loads[place.rank] -= stop - start
            loads[taker] += stop - start
            stop = start
    return moved
