"""Which rows of Sudoku CSV files are used, and for what: selection, hold-out, leaks."""

import logging
from pathlib import Path

import numpy as np

from data.errors import DataError
from data.hashing import hash32
from data.sudoku_csv import SudokuTable
from data.sudoku_rules import symmetry_hash

logger = logging.getLogger(__name__)

_SUBSAMPLE, _SPLIT = 0x21, 0x22  # streams of the hash


def hold_out(
    table: SudokuTable, path: Path, box: tuple[int, int], fraction: float, seed: int
) -> tuple[SudokuTable, SudokuTable]:
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


def refuse_shared(train: SudokuTable, train_file: Path, test: SudokuTable, test_file: Path) -> None:
    """Refuse a question that is in both files; tell how many the training file repeats."""
    # Python's hash of the rows; it differs between processes, which does not matter here.
    known, own = (
        np.fromiter((hash(row.tobytes()) for row in table.questions), np.int64, len(table))
        for table in (train, test)
    )
    repeated = len(known) - len(np.unique(known))
    if repeated:
        logger.info("%s: %d puzzles are repeated", train_file.name, repeated)
    candidates = train.take(np.isin(known, own))
    lines = {
        row.tobytes(): line
        for row, line in zip(candidates.questions, candidates.lines, strict=True)
    }
    shared = [
        (lines[row.tobytes()], line)
        for row, line in zip(test.questions, test.lines, strict=True)
        if row.tobytes() in lines
    ]
    if shared:
        raise DataError(
            f"{test_file}, line {shared[0][1]}: this puzzle is in {train_file}, line "
            f"{shared[0][0]}, too ({len(shared)} shared in all); remove them from one of the files."
        )


def select_ratings(table: SudokuTable, path: Path, limits: tuple[int, int]) -> SudokuTable:
    """Keep the puzzles with a rating from low to high."""
    low, high = limits
    kept = table.take((table.ratings >= low) & (table.ratings <= high))
    if not len(kept):
        raise DataError(
            f"{path} has no puzzle with a rating from {low} to {high}; change data.min_rating or "
            "data.max_rating."
        )
    return kept


def subsample(table: SudokuTable, path: Path, count: int, seed: int) -> SudokuTable:
    """A seeded choice of rows, in the order of the file."""
    if count > len(table):
        raise DataError(
            f"data.max_train={count} is more than the {len(table)} puzzles to choose from in "
            f"{path}; leave it out to take all."
        )
    keys = hash32(_SUBSAMPLE, seed, np.arange(len(table)))
    return table.take(np.sort(np.argsort(keys, kind="stable")[:count]))


def warn_of_equivalents(train: SudokuTable, test: SudokuTable, box: tuple[int, int]) -> None:
    """Log how many test puzzles an augmentation of a training puzzle may recreate."""
    known = symmetry_hash(train.questions, train.answers, box)
    equivalent = np.isin(symmetry_hash(test.questions, test.answers, box), known)
    if equivalent.any():
        logger.warning(
            "%d of %d test puzzles look symmetry-equivalent to training puzzles",
            equivalent.sum(), len(test),
        )  # fmt: skip
