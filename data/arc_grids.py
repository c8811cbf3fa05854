"""ARC grids as tokens on a canvas of 30 × 30, and back. NumPy only.

Tokens: pad 0, end mark 1, colour c → c + 2. A grid lies in the upper left corner; the row below it
and the column to its right hold end marks, where there is room (as in the HRM and TRM papers'
code). Labels that are not known are all pad.
"""

from math import factorial

import numpy as np

from data.hashing import Words, below, hash32

SIDE = 30
SEQ_LEN = SIDE * SIDE
END, FIRST_COLOUR, VOCAB_SIZE = 1, 2, 12
RENAMED = 9  # colours that an augmentation renames: all but black, which is colour 0
# Streams of the hash: independent draws.
_ELEMENT, _COLOURS = 0x55, 0x56


def encode(grid: np.ndarray) -> np.ndarray:
    """Colours (rows, columns) → tokens (900,) uint8."""
    rows, columns = grid.shape
    canvas = np.zeros((SIDE, SIDE), np.uint8)
    canvas[:rows, :columns] = grid + FIRST_COLOUR
    if rows < SIDE:
        canvas[rows, :columns] = END
    if columns < SIDE:
        canvas[:rows, columns] = END
    return canvas.reshape(-1)


def decode(tokens: np.ndarray, *, anywhere: bool = False) -> np.ndarray:
    """Tokens (900,) of a canvas → colours (rows, columns) uint8; tokens may be anything.

    The grid is the largest rectangle of colours at the upper left corner or, with `anywhere`, at
    the first row and column that hold a colour; an empty array if there is none.
    """
    canvas = tokens.reshape(SIDE, SIDE)
    colour = (canvas >= FIRST_COLOUR) & (canvas < VOCAB_SIZE)
    top = left = 0
    if anywhere and colour.any():
        top, left = int(colour.any(axis=1).argmax()), int(colour.any(axis=0).argmax())
    part = colour[top:, left:]
    # Colours from the left edge on in every row, and the largest rectangle that ends with each row.
    runs = np.where(part.all(axis=1), part.shape[1], np.argmin(part, axis=1))
    widths = np.minimum.accumulate(runs)
    rows = int((widths * np.arange(1, len(widths) + 1)).argmax()) + 1
    columns = int(widths[rows - 1])
    if columns == 0:
        return np.zeros((0, 0), np.uint8)
    part = canvas[top : top + rows, left : left + columns]
    return part.astype(np.uint8) - np.uint8(FIRST_COLOUR)


def turn(grid: np.ndarray, element: int) -> np.ndarray:
    """Apply a dihedral element (see data/augment_grids.py) to a grid (rows, columns)."""
    grid = grid.T if element & 4 else grid
    return grid[:: -1 if element & 2 else 1, :: -1 if element & 1 else 1]


def turn_back(grid: np.ndarray, element: int) -> np.ndarray:
    """The inverse of `turn`."""
    grid = grid[:: -1 if element & 2 else 1, :: -1 if element & 1 else 1]
    return grid.T if element & 4 else grid


# A seed, a puzzle identifier and an augmentation index decide how a pair is changed. The functions
# take Python numbers, NumPy arrays or torch tensors, like the hash.


def drawn_element(seed: int, identifier: Words, index: Words) -> Words:
    """Dihedral element 0..7 of a puzzle's augmentation; index 0 has none (element 0)."""
    return below(hash32(_ELEMENT, seed, identifier, index), 8) * (index != 0)


def drawn_colours(seed: int, identifier: Words, index: Words) -> Words:
    """Which of the 9! permutations of the colours 1..9, in lexicographic order; index 0: none."""
    return below(hash32(_COLOURS, seed, identifier, index), factorial(RENAMED)) * (index != 0)


def permutation(rank: int) -> np.ndarray:
    """(10,) uint8: the image of every colour under permutation number `rank`."""
    left, image = list(range(1, RENAMED + 1)), [0]
    for n in range(RENAMED - 1, -1, -1):
        which, rank = divmod(rank, factorial(n))
        image.append(left.pop(which))
    return np.array(image, np.uint8)


def undo(grid: np.ndarray, seed: int, identifier: int, index: int) -> np.ndarray:
    """The grid (rows, columns) of the original that an augmented grid stands for."""
    grid = turn_back(grid, int(drawn_element(seed, identifier, index)))
    image = permutation(int(drawn_colours(seed, identifier, index)))
    return np.argsort(image).astype(np.uint8)[grid]
