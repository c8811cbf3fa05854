"""Solving, rating and generating Sudokus in compiled code (numba, loaded on first use).

Work is split over threads; every puzzle is a pure function of its own number, so the number of
threads never shows in a result.
"""

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache

import numpy as np

from data.hashing import below, hash32
from data.sudoku_rules import units

# Streams of the hash.
_SOLUTION_HIGH, _SOLUTION_LOW, _TARGET, _ORDER = 0x41, 0x42, 0x43, 0x44


@lru_cache
def _tables(box: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
    """What the kernels need: unit numbers of each cell (n², 3), and bit counts (2^(n+1),)."""
    cells_of = units(box)
    n = cells_of.shape[1]
    unit_of = np.empty((n * n, 3), np.int64)
    for unit, cells in enumerate(cells_of):
        unit_of[cells, unit // n] = unit
    return unit_of, np.array([i.bit_count() for i in range(2 ** (n + 1))], np.int64)


def _in_threads(count: int, work: Callable[[slice], None]) -> None:
    """Call `work` for slices that cover range(count); exceptions come through."""
    threads = max(1, min(8, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity")
                         else os.cpu_count() or 1))  # fmt: skip
    step = max(1, -(-count // (4 * threads)))
    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(work, [slice(i, min(i + step, count)) for i in range(0, count, step)]))


def solve(
    questions: np.ndarray, box: tuple[int, int], *, limit: int = 2
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Search every puzzle for up to `limit` solutions.

    Args:
        questions: (puzzles, n²) uint8, 0 blank.
        box: rows and columns of a box.
        limit: how many solutions to look for; 2 tells whether there is one only.

    Returns:
        solutions found, at most `limit` (puzzles,) int32; guesses that the search took, which is
        the difficulty rating (puzzles,) int32: 0 means that singles are enough; the last solution
        found (puzzles, n²) uint8, zeros where there is none.
    """
    from data import sudoku_kernels

    unit_of, bits = _tables(box)
    questions = np.ascontiguousarray(questions, dtype=np.uint8)
    counts, ratings = np.zeros(len(questions), np.int32), np.zeros(len(questions), np.int32)
    solutions = np.zeros_like(questions)

    def work(part: slice) -> None:
        sudoku_kernels.rate(
            questions[part], unit_of, bits, limit, counts[part], ratings[part], solutions[part]
        )

    _in_threads(len(questions), work)
    return counts, ratings, solutions


def candidates(
    first: int,
    count: int,
    *,
    box: tuple[int, int],
    seed: int,
    stream: int,
    low: int,
    high: int,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Uniquely solvable puzzles number first..first+count-1 of an endless reproducible sequence.

    Clues are removed from a random solution in random order while it stays the only one, until a
    number of clues drawn from low..high is reached or no clue can be spared; low = high = 0 gives
    minimal puzzles.

    Returns:
        questions, answers (count, n²) uint8; ratings (count,) int32, as `solve` gives them.
    """
    from data import sudoku_kernels

    unit_of, bits = _tables(box)
    cells = len(unit_of)
    number = np.arange(first, first + count)
    keys = hash32(_ORDER, seed, stream, number[:, None], np.arange(cells))
    orders = np.argsort(keys, axis=1, kind="stable")
    targets = low + below(hash32(_TARGET, seed, stream, number), high - low + 1)
    high_word, low_word = (
        hash32(s, seed, stream, number).astype(np.uint64) for s in (_SOLUTION_HIGH, _SOLUTION_LOW)
    )
    shuffles = (high_word << np.uint64(32)) | low_word | np.uint64(1)
    questions, answers = np.zeros((2, count, cells), np.uint8)
    ratings = np.zeros(count, np.int32)

    def work(part: slice) -> None:
        sudoku_kernels.generate(
            orders[part], targets[part], shuffles[part], unit_of, bits,
            questions[part], answers[part], ratings[part],
        )  # fmt: skip

    _in_threads(count, work)
    return questions, answers, ratings
