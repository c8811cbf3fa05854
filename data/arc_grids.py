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


def extents(tokens: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Rows and columns (B,) of the largest rectangle of colours at the corner of canvases (B, 900).

    0 and 0 where the corner holds none.
    """
    canvas = tokens.reshape(-1, SIDE, SIDE)
    colour = (canvas >= FIRST_COLOUR) & (canvas < VOCAB_SIZE)
    # Colours from the left edge on in every row, and the largest rectangle that ends with each row.
    runs = np.where(colour.all(axis=2), SIDE, np.argmin(colour, axis=2))
    widths = np.minimum.accumulate(runs, axis=1)
    last = (widths * np.arange(1, SIDE + 1)).argmax(axis=1)
    columns = np.take_along_axis(widths, last[:, None], axis=1)[:, 0]
    return np.where(columns > 0, last + 1, 0), columns


def decode(tokens: np.ndarray, *, anywhere: bool = False) -> np.ndarray:
    """Tokens (900,) of a canvas → colours (rows, columns) uint8; tokens may be anything.

    The grid is the largest rectangle of colours at the upper left corner or, with `anywhere`, at
    the first row and column that hold a colour; an empty array if there is none.
    """
    canvas = tokens.reshape(SIDE, SIDE)
    if anywhere:
        colour = canvas >= FIRST_COLOUR
        top, left = int(colour.any(axis=1).argmax()), int(colour.any(axis=0).argmax())
        canvas = np.pad(canvas[top:, left:], ((0, top), (0, left)))
    rows, columns = (int(n[0]) for n in extents(canvas))
    return canvas[:rows, :columns].astype(np.uint8) - np.uint8(FIRST_COLOUR)


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


def permutations(ranks: np.ndarray) -> np.ndarray:
    """(B, 10) uint8: the image of every colour under the permutations of numbers `ranks` (B,)."""
    image = np.zeros((len(ranks), RENAMED + 1), np.int64)
    for place in range(1, RENAMED + 1):  # Lehmer code: how many of the colours left are smaller
        image[:, place], ranks = np.divmod(ranks, factorial(RENAMED - place))
    for place in range(RENAMED - 1, 0, -1):
        later = image[:, place + 1 :]
        later += later >= image[:, place : place + 1]
    image[:, 1:] += 1
    return image.astype(np.uint8)


def undo(
    tokens: np.ndarray, seed: int, identifiers: np.ndarray, indices: np.ndarray
) -> list[np.ndarray]:
    """The grids of the originals that augmented canvases stand for.

    Args:
        tokens: (B, 900), of which the grid at the corner is taken, as by `decode`.
        seed: of the dataset.
        identifiers: (B,) puzzle identifiers of the originals.
        indices: (B,) augmentation indices.
    """
    identifiers, indices = (np.asarray(n, np.int64) for n in (identifiers, indices))
    rows, columns = extents(tokens)
    elements = drawn_element(seed, identifiers, indices)
    colours = np.argsort(permutations(drawn_colours(seed, identifiers, indices)), axis=1)
    colours = colours.astype(np.uint8)
    return [
        turn_back(back[canvas[:r, :c] - FIRST_COLOUR], int(element))
        for canvas, r, c, element, back in zip(
            tokens.reshape(-1, SIDE, SIDE), rows, columns, elements, colours, strict=True
        )
    ]
