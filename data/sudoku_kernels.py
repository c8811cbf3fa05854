"""Compiled search over Sudoku grids. Imports numba: load it through `data.sudoku_solver` only.

Sets of digits are bit masks (digit d is bit d). `unit_of` is (n², 3) int64: the row, column and box
of each cell, numbered 0..3n-1; `bits` is (2^(n+1),) int64: how many bits an index has.

Compilation takes longer than most searches, so the code is short before it is fast: one function,
no helper that numba would type and optimize again in every caller.
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
def search(puzzle, unit_of, bits, limit, ban_cell, shuffle, solution):  # noqa: ANN001, ANN201
    """Count solutions up to `limit`, depth first; the last one found is written to `solution`.

    Naked singles (a cell with one candidate) and hidden singles (a digit with one place in a unit)
    are filled until none is left; then digits are tried in the cell with the fewest candidates.

    `puzzle` (n²,) uint8, 0 blank. `ban_cell` ≥ 0 forbids that blank cell the digit that `solution`
    holds there on entry. `shuffle` 0 tries digits in ascending order, any other number (uint64) in
    a random one. Returns (solutions, guesses): a guess is one digit tried in one cell.
    """
    cells, units = len(puzzle), unit_of[-1, 2] + 1
    full = (1 << (units // 3 + 1)) - 2
    value = np.zeros((cells, cells), np.int64)  # [level, cell]: the digit's bit, 0 blank
    used = np.zeros((cells, units), np.int64)  # [level, unit]: digits that it holds
    guess_cell = np.zeros(cells, np.int64)  # what is being tried at each level …
    guess_left = np.zeros(cells, np.int64)  # … and the digits still to try there
    once = np.zeros(units, np.int64)
    twice = np.zeros(units, np.int64)
    ban = 0
    if ban_cell >= 0:
        ban = 1 << np.int64(solution[ban_cell])
    for cell in range(cells):
        value[0, cell] = (1 << np.int64(puzzle[cell])) & full
        for k in range(3):
            unit = unit_of[cell, k]
            if used[0, unit] & value[0, cell]:
                return 0, 0
            used[0, unit] |= value[0, cell]
    level = found = guesses = 0
    while True:
        progress, dead, best, fewest = True, False, -1, 99
        while progress and not dead:
            progress, best, fewest = False, -1, 99
            for unit in range(units):
                once[unit] = used[level, unit]
                twice[unit] = used[level, unit]
            # First pass: how many places every digit has. Second pass: fill.
            for i in range(2 * cells):
                cell = i % cells
                if value[level, cell] != 0:
                    continue
                mask, hidden = full, 0
                if cell == ban_cell:
                    mask &= ~ban
                for k in range(3):
                    mask &= ~used[level, unit_of[cell, k]]
                for k in range(3):
                    unit = unit_of[cell, k]
                    if i < cells:
                        twice[unit] |= once[unit] & mask
                        once[unit] |= mask
                    else:
                        dead |= once[unit] != full
                        hidden |= mask & ~twice[unit]
                if mask == 0:
                    dead = True
                    break
                if i < cells:
                    continue
                if bits[mask] == 1:
                    hidden = mask
                if hidden:
                    hidden &= -hidden
                    value[level, cell] = hidden
                    for k in range(3):
                        used[level, unit_of[cell, k]] |= hidden
                    progress = True
                elif bits[mask] < fewest:
                    best, fewest, guess_left[level] = cell, bits[mask], mask
        if dead or best == -1:
            if not dead:
                found += 1
                for cell in range(cells):
                    solution[cell] = bits[value[level, cell] - 1]
            level -= 1
            while level >= 0 and guess_left[level] == 0:
                level -= 1
            if level < 0 or found >= limit:
                return found, guesses
        else:
            guess_cell[level] = best
        # Try the next digit of this level on the next one.
        mask = guess_left[level]
        if shuffle != 0:  # those from a random digit on come first
            shuffle = shuffle * np.uint64(6364136223846793005) + np.uint64(1442695040888963407)
            above = mask & (full << np.int64((shuffle >> np.uint64(33)) % np.uint64(units // 3)))
            if above:
                mask = above
        mask &= -mask
        guess_left[level] &= ~mask
        for cell in range(cells):
            value[level + 1, cell] = value[level, cell]
        for unit in range(units):
            used[level + 1, unit] = used[level, unit]
        cell = guess_cell[level]
        level += 1
        value[level, cell] = mask
        for k in range(3):
            used[level, unit_of[cell, k]] |= mask
        guesses += 1


@_compile
def rate(puzzles, unit_of, bits, limit, counts, ratings, solutions):  # noqa: ANN001, ANN201
    """`search` for every row: solutions up to `limit`, and the guesses that it took."""
    for i in range(len(puzzles)):
        counts[i], ratings[i] = search(
            puzzles[i], unit_of, bits, limit, -1, np.uint64(0), solutions[i]
        )


@_compile
def generate(orders, targets, shuffles, unit_of, bits, questions, answers, ratings):  # noqa: ANN001, ANN201
    """Make one puzzle per row: a random solution, then clues removed while it stays the only one.

    `orders` (puzzles, n²) is the order in which clues are tried, `targets` (puzzles,) the number of
    clues to stop at, `shuffles` (puzzles,) uint64, not 0, decides the solution.
    """
    cells = questions.shape[1]
    solution = np.zeros(cells, np.uint8)
    for i in range(len(questions)):
        clues = cells
        # Step -1 makes the solution, steps 0.. try to remove a clue, the last one rates. They
        # share one call, because numba compiles `search` into every place that calls it.
        for step in range(-1, cells + 1):
            cell, limit, shuffle = -1, 1, np.uint64(0)
            if step == -1:
                shuffle = shuffles[i]
                questions[i, :] = 0
            elif step == cells:
                limit = 2
            elif clues > targets[i]:
                cell = orders[i, step]
                questions[i, cell] = 0
                solution[cell] = answers[i, cell]
            else:
                continue
            found, ratings[i] = search(questions[i], unit_of, bits, limit, cell, shuffle, solution)
            if step == -1:
                for k in range(cells):
                    answers[i, k] = solution[k]
                    questions[i, k] = solution[k]
            elif cell >= 0:
                if found:
                    questions[i, cell] = answers[i, cell]
                else:
                    clues -= 1
