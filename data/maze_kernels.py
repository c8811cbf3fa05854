"""Compiled search in mazes. Imports numba: load it through `data.maze_rules` only.

A maze is (cells,) bool walls in row-major order. `steps` orders the neighbours of a cell: the
published labels of Maze-30x30-Hard are breadth-first paths with neighbours in the order down,
left, right, up, the first parent kept.
"""

from collections.abc import Callable

import numba
import numpy as np


def _compile(function: Callable) -> Callable:
    """njit without the GIL, cached on the disk where a place for it can be written."""
    try:
        return numba.njit(nogil=True, cache=True)(function)
    except RuntimeError:  # no writable cache folder
        return numba.njit(nogil=True)(function)


@_compile
def neighbours(rows, columns):  # noqa: ANN001, ANN201
    """(cells, 4) int32: the cell below, left, right and above each, -1 outside."""
    out = np.full((rows * columns, 4), -1, np.int32)
    for cell in range(rows * columns):
        row, column = cell // columns, cell % columns
        if row + 1 < rows:
            out[cell, 0] = cell + columns
        if column > 0:
            out[cell, 1] = cell - 1
        if column + 1 < columns:
            out[cell, 2] = cell + 1
        if row > 0:
            out[cell, 3] = cell - columns
    return out


@_compile
def distances(walls, around, start, distance, parent, queue):  # noqa: ANN001, ANN201
    """Breadth-first from `start`: fills distance (-1: unreachable), parent and queue.

    Returns how many cells were reached; the last one in `queue` is a farthest one.
    """
    distance[:] = -1
    distance[start], parent[start], queue[0] = 0, -1, start
    head, tail = 0, 1
    while head < tail:
        cell = queue[head]
        head += 1
        for k in range(4):
            there = around[cell, k]
            if there >= 0 and distance[there] < 0 and not walls[there]:
                distance[there] = distance[cell] + 1
                parent[there] = cell
                queue[tail] = there
                tail += 1
    return tail


@_compile
def label(walls, around, starts, goals, paths, lengths):  # noqa: ANN001, ANN201
    """Mark the shortest path of every maze between start and goal, both excluded.

    walls (mazes, cells) bool; starts, goals (mazes,) int64; fills paths (mazes, cells) bool and
    lengths (mazes,) int32, in moves: -1 where the goal cannot be reached.
    """
    cells = walls.shape[1]
    distance, parent, queue = (
        np.empty(cells, np.int32), np.empty(cells, np.int32), np.empty(cells, np.int32),
    )  # fmt: skip
    for maze in range(len(walls)):
        distances(walls[maze], around, starts[maze], distance, parent, queue)
        lengths[maze] = distance[goals[maze]]
        if lengths[maze] > 0:
            cell = parent[goals[maze]]
            while cell != starts[maze]:
                paths[maze, cell] = True
                cell = parent[cell]


_STEP = np.uint64(0x9E3779B97F4A7C15)


@_compile
def mixed(x):  # noqa: ANN001, ANN201
    """The finalizer of splitmix64: 64 random bits of a counter that advances by `_STEP`."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


@_compile
def fraction(x):  # noqa: ANN001, ANN201
    """A counter as a random number in [0, 1)."""
    return np.float64(mixed(x) >> np.uint64(11)) * (1.0 / 9007199254740992.0)


@_compile
def candidates(seeds, around, low, high, least, walls, starts, goals, shares):  # noqa: ANN001, ANN201
    """Random mazes, one per seed, with the share of their start-goal pairs that are far apart.

    A share of walls is drawn from low..high, then every cell on its own; a start and a goal are
    drawn from the pairs of free cells that are at least `least` moves apart. `shares` is the part
    of all pairs that these are; 0 where there is none, and then nothing else is set.
    """
    cells = len(around)
    distance, parent, queue = (
        np.empty(cells, np.int32), np.empty(cells, np.int32), np.empty(cells, np.int32),
    )  # fmt: skip
    center_distance = np.empty(cells, np.int32)
    far = np.zeros(cells, np.int64)  # goals that are far enough from each start
    open_cells = np.zeros(cells + 1, np.int64)
    for number in range(len(seeds)):
        counter = seeds[number]
        wall = walls[number]
        share = low + (high - low) * fraction(counter)
        free = 0
        limit = np.uint64(share * 4294967296.0)
        bits = np.uint64(0)
        for cell in range(cells):  # each number gives two cells 32 bits each
            if cell & 1:
                bits = bits >> np.uint64(32)
            else:
                counter += _STEP
                bits = mixed(counter)
            wall[cell] = (bits & np.uint64(0xFFFFFFFF)) < limit
            open_cells[free] = cell  # without a branch, which would be mispredicted half the time
            free += not wall[cell]
        shares[number] = 0.0
        if free < 2:
            continue
        # Only cells that reach far enough are worth a search of their own. For every component:
        # ends a, b of a long path, then c in its middle; d(s, t) ≤ d(s, c) + ecc(c) for all s, t.
        far[:] = -1
        pairs = 0
        for index in range(free):
            first = open_cells[index]
            if far[first] >= 0:
                continue
            size = distances(wall, around, first, distance, parent, queue)
            for k in range(size):
                far[queue[k]] = 0
            if size <= least:
                continue
            a = queue[size - 1]
            distances(wall, around, a, distance, parent, queue)
            b = queue[size - 1]
            for _ in range(distance[b] // 2):
                b = parent[b]
            distances(wall, around, b, center_distance, parent, queue)
            reach = center_distance[queue[size - 1]]
            if 2 * reach < least:
                continue
            for k in range(free):
                start = open_cells[k]
                if center_distance[start] >= 0 and center_distance[start] + reach >= least:
                    reached = distances(wall, around, start, distance, parent, queue)
                    for q in range(reached - 1, -1, -1):
                        if distance[queue[q]] < least:
                            break
                        far[start] += 1
                    pairs += far[start]
        if pairs == 0:
            continue
        shares[number] = pairs / (free * (free - 1.0))
        left = np.int64(fraction(counter + _STEP) * pairs)
        for k in range(free):
            start = open_cells[k]
            if left < far[start]:
                size = distances(wall, around, start, distance, parent, queue)
                # The goals in row-major order, so that the choice does not depend on the search.
                for cell in range(cells):
                    if distance[cell] >= least:
                        if left == 0:
                            starts[number], goals[number] = start, cell
                            break
                        left -= 1
                break
            left -= far[start]
