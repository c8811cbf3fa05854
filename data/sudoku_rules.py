"""What is true of every Sudoku: units, valid grids, symmetries. Vectorized NumPy, no search.

A Sudoku of box (r, c) has n = r·c digits, boxes of r rows and c columns, c bands of r rows and
r stacks of c columns. Grids are (puzzles, n²) uint8 in row-major order, 0 being a blank.
"""

from functools import lru_cache
from itertools import combinations

import numpy as np

_CHUNK_ROWS = 8192  # puzzles that are coloured at once; bounds the memory

BOXES = ((2, 2), (2, 3), (3, 2), (3, 3))
# The fewest clues with which a puzzle can have one solution (9×9: McGuire et al. 2012).
FEWEST_CLUES = {(2, 2): 4, (2, 3): 8, (3, 2): 8, (3, 3): 17}


@lru_cache
def units(box: tuple[int, int]) -> np.ndarray:
    """Cells of every unit: (3n, n) int64; n rows, then n columns, then n boxes."""
    r, c = box
    n = r * c
    cells = np.arange(n * n).reshape(n, n)
    boxes = cells.reshape(c, r, r, c).transpose(0, 2, 1, 3).reshape(n, n)
    return np.concatenate([cells, cells.T, boxes])


def is_solution(grids: np.ndarray, box: tuple[int, int]) -> np.ndarray:
    """(puzzles,) bool: does every unit hold every digit once?"""
    n = box[0] * box[1]
    in_range = (grids >= 1).all(axis=1) & (grids <= n).all(axis=1)
    bits = np.left_shift(np.int16(1), np.minimum(grids, n).astype(np.int16))
    full = (1 << (n + 1)) - 2
    valid = in_range
    for unit in units(box):
        valid = valid & (np.bitwise_or.reduce(bits[:, unit], axis=1) == full)
    return valid


def has_swap(questions: np.ndarray, answers: np.ndarray, box: tuple[int, int]) -> np.ndarray:
    """(puzzles,) bool: can two digits change places somewhere without touching a clue?

    Where they can, the puzzle has a second solution. This needs no search and finds the common
    ambiguities, not all. For each pair of digits, the rows are joined whose cells of the two share
    a column or a box; exchanging the digits in a joined set of rows keeps every unit valid.
    """
    n = box[0] * box[1]
    count = len(questions)
    grid_rows = np.arange(n)
    place = np.argsort(answers.reshape(count, n, n), axis=2, kind="stable")  # column of each digit
    row_of = np.argsort(place, axis=1, kind="stable")  # (puzzles, column, digit) its row
    box_of = (grid_rows[None, :, None] // box[0]) * box[0] + place // box[1]
    row_in_box = np.argsort(box_of, axis=1, kind="stable")  # (puzzles, box, digit) its row
    clue = np.take_along_axis(questions.reshape(count, n, n) > 0, place, axis=2)
    found = np.zeros(count, bool)
    for a, b in combinations(range(n), 2):
        joined = [
            np.take_along_axis(where[:, :, other], at[:, :, one], axis=1)
            for where, at in ((row_of, place), (row_in_box, box_of))
            for one, other in ((a, b), (b, a))
        ]
        held = clue[:, :, a] | clue[:, :, b]  # rows with a clue of the two, and what is joined
        for _ in range(n // 2):
            for link in joined:
                held = held | np.take_along_axis(held, link, axis=1)
        found |= ~held.all(axis=1)
    return found


def _mix(x: np.ndarray) -> np.ndarray:
    """The finalizer of splitmix64, a bijection of uint64 (arithmetic wraps)."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def symmetry_hash(questions: np.ndarray, answers: np.ndarray, box: tuple[int, int]) -> np.ndarray:
    """Hash that equals for symmetry-equivalent puzzles: (puzzles,) uint64.

    Symmetries are renaming digits, permuting bands, stacks, rows in a band and columns in a stack,
    and transposing when the box is square. Cells are coloured by "is it a clue" and refined, as in
    the Weisfeiler-Leman test, by the colours of their digit, box, row, band, column and stack.
    Equal hashes do not prove equivalence: whoever drops puzzles with equal hashes drops a few too
    many and never one too few. `answers` must be valid solutions.
    """
    out = np.empty(len(questions), np.uint64)
    for start in range(0, len(questions), _CHUNK_ROWS):
        rows = slice(start, start + _CHUNK_ROWS)
        out[rows] = _refine(questions[rows], answers[rows], box)
    return out


def _refine(questions: np.ndarray, answers: np.ndarray, box: tuple[int, int]) -> np.ndarray:
    """`symmetry_hash` of a few thousand puzzles at once."""
    r, c = box
    n, count = r * c, len(questions)
    by_digit = np.argsort(answers, axis=1, kind="stable")  # (puzzles, n²), n cells of each digit
    box_of = np.empty(n * n, np.int64)
    box_of[units(box)[2 * n :]] = np.arange(n)[:, None]
    odd = [np.uint64(k) for k in (0x9E3779B97F4A7C15, 0xC2B2AE3D27D4EB4F, 0x165667B19E3779F9)]

    colour = _mix((questions > 0).astype(np.uint64) + np.uint64(1))  # (puzzles, n²)
    for _ in range(4):
        grid = colour.reshape(count, n, n)
        lines = []
        for axis, size in ((2, r), (1, c)):  # rows in bands of r, columns in stacks of c
            line = _mix(grid.sum(axis=axis, dtype=np.uint64))  # (puzzles, n)
            group = line.reshape(count, n // size, size).sum(axis=2, dtype=np.uint64)
            lines.append(_mix(line * odd[0] + _mix(np.repeat(group, size, axis=1))))
        if r != c:  # rows and columns differ in kind
            lines[1] = lines[1] * odd[1]
        crossing = _mix(lines[0])[:, :, None] + _mix(lines[1])[:, None, :]
        digits = np.take_along_axis(colour, by_digit, axis=1).reshape(count, n, n)
        same_digit = np.empty_like(colour)
        np.put_along_axis(
            same_digit, by_digit, np.repeat(digits.sum(axis=2, dtype=np.uint64), n, axis=1), axis=1
        )
        boxes = colour[:, units(box)[2 * n :]].sum(axis=2, dtype=np.uint64)  # (puzzles, n)
        colour = _mix(
            _mix(colour)
            + crossing.reshape(count, n * n) * odd[0]
            + _mix(same_digit) * odd[1]
            + _mix(boxes)[:, box_of] * odd[2]
        )
    return _mix(colour.sum(axis=1, dtype=np.uint64))
