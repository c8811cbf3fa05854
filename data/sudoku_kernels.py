"""Compiled search over Sudoku grids. Imports numba: load it through `data.sudoku_solver` only.

Candidates are bit masks (digit d is bit d). `search` walks one depth-first tree: it fills naked and
hidden singles until none is left, then guesses a digit in the cell with the fewest candidates.
`puzzle` is (n²,) uint8, 0 blank; `units` (3n, n) int64; `unit_of` (n², 3) int64: row, column, box.
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
def random_below(state, bound):  # noqa: ANN001, ANN201
    """Integer in [0, bound) from splitmix64; `state` is (1,) uint64 and advances."""
    state[0] += np.uint64(0x9E3779B97F4A7C15)
    z = state[0]
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    z = (z ^ (z >> np.uint64(31))) >> np.uint64(32)
    return np.int64((z * np.uint64(bound)) >> np.uint64(32))


@_compile
def _fill_singles(value, used, unit_of, units, trail, filled, ban_cell, ban_mask):  # noqa: ANN001
    """Fill naked and hidden singles until none is left.

    Returns (filled, cell, mask): cell -2 on a contradiction, -1 when the grid is full, otherwise
    the first cell with the fewest candidates, which are `mask`.
    """
    n = units.shape[1]
    full = (1 << (n + 1)) - 2
    while True:
        progress, best, fewest, best_mask = False, -1, 99, 0
        for cell in range(n * n):  # naked singles: a cell with one candidate
            if value[cell] != 0:
                continue
            a, b, c = unit_of[cell, 0], unit_of[cell, 1], unit_of[cell, 2]
            mask = full & ~(used[a] | used[b] | used[c])
            if cell == ban_cell:
                mask &= ban_mask
            if mask == 0:
                return filled, -2, 0
            if mask & (mask - 1) == 0:
                value[cell] = mask
                used[a] |= mask
                used[b] |= mask
                used[c] |= mask
                trail[filled] = cell
                filled += 1
                progress = True
            else:
                count, rest = 0, mask
                while rest:
                    rest &= rest - 1
                    count += 1
                if count < fewest:
                    best, fewest, best_mask = cell, count, mask
        if progress:
            continue
        if best == -1:
            return filled, -1, 0
        for unit in range(3 * n):  # hidden singles: a digit with one place in a unit
            once, twice = used[unit], 0
            for k in range(n):
                cell = units[unit, k]
                if value[cell] == 0:
                    a, b, c = unit_of[cell, 0], unit_of[cell, 1], unit_of[cell, 2]
                    mask = full & ~(used[a] | used[b] | used[c])
                    if cell == ban_cell:
                        mask &= ban_mask
                    twice |= once & mask
                    once |= mask
            if once != full:
                return filled, -2, 0
            hidden = once & ~twice & ~used[unit]
            if hidden == 0:
                continue
            for k in range(n):
                cell = units[unit, k]
                if value[cell] != 0:
                    continue
                a, b, c = unit_of[cell, 0], unit_of[cell, 1], unit_of[cell, 2]
                mask = hidden & ~(used[a] | used[b] | used[c])
                if cell == ban_cell:
                    mask &= ban_mask
                mask &= -mask
                if mask:
                    value[cell] = mask
                    used[a] |= mask
                    used[b] |= mask
                    used[c] |= mask
                    trail[filled] = cell
                    filled += 1
                    progress = True
        if not progress:
            return filled, best, best_mask


@_compile
def search(puzzle, unit_of, units, limit, ban_cell, state, shuffle, solution):  # noqa: ANN001, ANN201
    """Count solutions up to `limit`; the last one found is written to `solution`.

    `ban_cell` ≥ 0 forbids that (blank) cell the digit that `solution` holds there on entry.
    With `shuffle`, guesses are drawn by `state` instead of tried in ascending order.
    Returns (solutions, guesses): a guess is one digit tried in a cell with several candidates.
    """
    n = units.shape[1]
    cells = n * n
    value = np.zeros(cells, np.int64)  # the digit's bit, 0 blank
    used = np.zeros(3 * n, np.int64)  # digits that each unit holds
    trail = np.empty(cells, np.int64)  # cells in the order in which they were filled
    guess_cell = np.empty(cells, np.int64)
    guess_mask = np.empty(cells, np.int64)  # digits still to try there
    guess_filled = np.empty(cells, np.int64)  # length of the trail before the guess
    for cell in range(cells):
        if puzzle[cell] != 0:
            bit = 1 << np.int64(puzzle[cell])
            for k in range(3):
                if used[unit_of[cell, k]] & bit:
                    return 0, 0
                used[unit_of[cell, k]] |= bit
            value[cell] = bit
    ban_mask = np.int64(-1)
    if ban_cell >= 0:
        ban_mask = ~(1 << np.int64(solution[ban_cell]))
    filled, depth, found, guesses = 0, 0, 0, 0
    while True:
        filled, cell, mask = _fill_singles(
            value, used, unit_of, units, trail, filled, ban_cell, ban_mask
        )
        if cell >= 0:
            guess_cell[depth], guess_mask[depth], guess_filled[depth] = cell, mask, filled
            depth += 1
        else:
            if cell == -1:
                found += 1
                for k in range(cells):
                    digit = 0
                    while value[k] >> digit > 1:
                        digit += 1
                    solution[k] = digit
                if found >= limit:
                    return found, guesses
            while depth > 0 and guess_mask[depth - 1] == 0:
                depth -= 1
            if depth == 0:
                return found, guesses
        # Undo what followed the last open guess, and try its next digit.
        top = depth - 1
        while filled > guess_filled[top]:
            filled -= 1
            cell = trail[filled]
            for k in range(3):
                used[unit_of[cell, k]] &= ~value[cell]
            value[cell] = 0
        mask = guess_mask[top]
        bit = mask & -mask
        if shuffle:
            count = 0
            while mask:
                mask &= mask - 1
                count += 1
            mask = guess_mask[top]
            for _ in range(random_below(state, count)):
                mask &= mask - 1
            bit = mask & -mask
        guess_mask[top] &= ~bit
        cell = guess_cell[top]
        value[cell] = bit
        for k in range(3):
            used[unit_of[cell, k]] |= bit
        trail[filled] = cell
        filled += 1
        guesses += 1


@_compile
def rate(puzzles, unit_of, units, limit, counts, ratings, solutions):  # noqa: ANN001, ANN201
    """`search` for every row: solutions up to `limit`, and the guesses that it took."""
    state = np.zeros(1, np.uint64)
    for i in range(len(puzzles)):
        counts[i], ratings[i] = search(
            puzzles[i], unit_of, units, limit, -1, state, False, solutions[i]
        )


@_compile
def generate(seed, stream, first, low, high, unit_of, units, questions, answers, ratings):  # noqa: ANN001, ANN201
    """Make candidates first, first + 1, …, each a pure function of (seed, stream, its number).

    Clues are removed from a random solution in random order while it stays the only one, down to
    a number drawn from low..high, or until no clue can go.
    """
    cells = questions.shape[1]
    state = np.zeros(1, np.uint64)
    order = np.arange(cells)
    solution = np.empty(cells, np.uint8)
    for i in range(len(questions)):
        state[0] = np.uint64(seed)
        for word in (stream, first + i):
            random_below(state, 1)
            state[0] ^= np.uint64(word) * np.uint64(0xD6E8FEB86659FD93)
        question = questions[i]
        question[:] = 0
        clues, target = cells, low + random_below(state, high - low + 1)
        # Step -1 makes the solution, steps 0.. try to remove a clue, the last one rates. They
        # share one call, because numba compiles `search` into every place that calls it.
        for step in range(-1, cells + 1):
            rating, making = step == cells, step == -1
            cell = -1
            if not (rating or making):
                if clues <= target:
                    continue
                cell = order[step]
                question[cell] = 0
                solution[cell] = answers[i, cell]
            found, guesses = search(
                question, unit_of, units, 2 if rating else 1, cell, state, making, solution
            )
            if making:
                answers[i] = solution
                question[:] = solution
                for k in range(cells):
                    order[k] = k
                for k in range(cells - 1, 0, -1):
                    j = random_below(state, k + 1)
                    order[k], order[j] = order[j], order[k]
            elif rating:
                ratings[i] = guesses
            elif found > 0:
                question[cell] = answers[i, cell]
            else:
                clues -= 1
