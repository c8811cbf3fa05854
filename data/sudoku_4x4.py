"""The 4×4 Sudoku (2×2 boxes) is small enough to know completely: no search, no compilation.

It has 288 solution grids, so the solutions of a puzzle are those grids that agree with its clues.
All of its uniquely solvable puzzles (13,579,680) can be solved by naked and hidden singles alone,
so their rating, the number of guesses, is 0.
"""

from functools import lru_cache
from itertools import permutations

import numpy as np

from data.hashing import below, hash32
from data.sudoku_rules import is_solution

NUM_GRIDS = 288
_CELLS = 16
# Streams of the hash.
_GRID, _TARGET, _ORDER = 0x31, 0x32, 0x33


@lru_cache
def grids_4x4() -> np.ndarray:
    """All 288 solution grids in lexicographic order: (288, 16) uint8."""
    rows = np.array(list(permutations(range(1, 5))), np.uint8)  # (24, 4)
    grids = rows[:, None, :]
    for _ in range(3):
        above, below_it = np.repeat(grids, 24, axis=0), np.tile(rows, (len(grids), 1))
        grids = np.concatenate([above, below_it[:, None, :]], axis=1)
        ordered = np.sort(grids, axis=1)  # keep what has no digit twice in a column yet
        grids = grids[(ordered[:, 1:] != ordered[:, :-1]).all(axis=(1, 2))]
    grids = grids.reshape(-1, _CELLS)
    return grids[is_solution(grids, (2, 2))]


@lru_cache
def _differences() -> np.ndarray:
    """(288, 288) int32: bit c of [i, j] is set where grids i and j differ in cell c."""
    grids = grids_4x4()
    differ = grids[:, None, :] != grids[None, :, :]
    return (differ.astype(np.int32) << np.arange(_CELLS, dtype=np.int32)).sum(
        axis=2, dtype=np.int32
    )


def candidates_4x4(
    first: int, count: int, *, seed: int, stream: int, low: int, high: int, grids: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """As `data.sudoku_solver.candidates`, with the solutions drawn from some of the grids.

    `grids` (k,) are row numbers of `grids_4x4`.
    """
    number = np.arange(first, first + count)
    grid = grids[below(hash32(_GRID, seed, stream, number), len(grids))]  # (count,)
    target = low + below(hash32(_TARGET, seed, stream, number), high - low + 1)
    keys = hash32(_ORDER, seed, stream, number[:, None], np.arange(_CELLS))
    order = np.argsort(keys, axis=1, kind="stable")  # (count, 16)
    differ = _differences()[grid]  # (count, 288)
    clues = np.full(count, (1 << _CELLS) - 1, np.int32)  # bit c: cell c is a clue
    left = np.full(count, _CELLS)
    for step in range(_CELLS):
        fewer = clues & ~(np.int32(1) << order[:, step].astype(np.int32))
        # Unique: every grid but the solution differs from it in a clue.
        unique = ((differ & fewer[:, None]) == 0).sum(axis=1) == 1
        remove = unique & (left > target)
        clues = np.where(remove, fewer, clues)
        left -= remove
    answers = grids_4x4()[grid]
    is_clue = (clues[:, None] >> np.arange(_CELLS)) & 1
    return answers * is_clue.astype(np.uint8), answers, np.zeros(count, np.int32)
