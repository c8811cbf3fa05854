"""Which rows of Sudoku CSV files are used for what: a hold-out that knows symmetries, and leaks."""

import logging
from pathlib import Path

import numpy as np

from data.errors import DataError
from data.hashing import hash32
from data.sudoku_rules import symmetry_hash
from data.tables import PuzzleTable

logger = logging.getLogger(__name__)

_SPLIT = 0x22  # stream of the hash


def hold_out(
    table: PuzzleTable, path: Path, box: tuple[int, int], fraction: float, seed: int
) -> tuple[PuzzleTable, PuzzleTable]:
    """Split off a share of the rows as a test set: (train, test), each in the order of the file.

    Symmetry-equivalent puzzles stay on one side; of 2×2 boxes, which know two classes of grids
    only, those with the same solution do.
    """
    if box == (2, 2):
        classes = np.unique(table.answers, axis=0, return_inverse=True)[1].reshape(-1)
    else:
        classes = symmetry_hash(table.questions, table.answers, box)
    _, number, sizes = np.unique(classes, return_inverse=True, return_counts=True)
    order = np.argsort(hash32(_SPLIT, seed, np.arange(len(sizes))), kind="stable")
    enough = np.searchsorted(np.cumsum(sizes[order]), fraction * len(table)) + 1
    chosen = np.zeros(len(sizes), bool)
    chosen[order[:enough]] = True
    in_test = chosen[number.reshape(-1)]
    if in_test.all():
        raise DataError(
            f"data.test_fraction={fraction} leaves nothing of {path} to train on: "
            f"it holds {len(sizes)} kind(s) of puzzles."
        )
    return table.take(~in_test), table.take(in_test)


def warn_of_equivalents(
    train: PuzzleTable, tests: dict[str, PuzzleTable], box: tuple[int, int]
) -> None:
    """Log how many test puzzles an augmentation of a training puzzle may recreate."""
    known = symmetry_hash(train.questions, train.answers, box)
    for name, test in tests.items():
        equivalent = np.isin(symmetry_hash(test.questions, test.answers, box), known)
        if equivalent.any():
            logger.warning(
                "%d of %d puzzles of the test set %s look symmetry-equivalent to training puzzles",
                equivalent.sum(), len(test), name,
            )  # fmt: skip
