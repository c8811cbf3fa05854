"""Generated training and test puzzles that share nothing a model could remember.

2×2 boxes: there are 288 solution grids; some are held out, and test puzzles come from those only.
Larger boxes: no test puzzle is symmetry-equivalent to a training puzzle (decided by a
symmetry-invariant hash, which errs by dropping), and no solution grid is in both splits.
"""

import logging
from collections.abc import Callable
from dataclasses import dataclass
from math import comb

import numpy as np

from data.errors import DataError
from data.hashing import hash32
from data.sudoku_4x4 import NUM_GRIDS, candidates_4x4
from data.sudoku_rules import FEWEST_CLUES, symmetry_hash
from data.sudoku_solver import candidates
from data.tables import PuzzleTable

logger = logging.getLogger(__name__)

_TRAIN, _TEST, _HOLDOUT = 1, 2, 3  # streams of random numbers
_BATCH = 2048  # candidates made at a time; the result does not depend on it
_PATIENCE = 10_000  # candidates without enough that qualify, before giving up
_LEAST = 10  # how many of them have to


@dataclass(frozen=True)
class GeneratorSpec:
    """What to generate; `clues` is the admitted range, `draw` the range a target is drawn from."""

    box: tuple[int, int]
    num_train: int
    num_test: int
    seed: int
    minimal: bool
    clues: tuple[int, int]
    draw: tuple[int, int]
    ratings: tuple[int, int]
    holdout_grids: int = 0  # 2×2 boxes only


def generate_splits(spec: GeneratorSpec) -> tuple[PuzzleTable, PuzzleTable]:
    """Make the training and the test puzzles: distinct, uniquely solvable, reproducible by seed.

    Raises:
        DataError: too few puzzles meet the limits on clues and rating.
    """
    train_grids = test_grids = None
    if spec.box == (2, 2):
        order = np.argsort(hash32(_HOLDOUT, spec.seed, np.arange(NUM_GRIDS)), kind="stable")
        test_grids, train_grids = np.split(order, [spec.holdout_grids])
    train = _collect(spec, "num_train", spec.num_train, _TRAIN, train_grids, None)
    if spec.box == (2, 2):
        test = _collect(spec, "num_test", spec.num_test, _TEST, test_grids, None)
    else:
        known = np.unique(_class(spec, train))
        solutions = {row.tobytes() for row in train.answers}

        def fresh(table: PuzzleTable) -> np.ndarray:
            own = np.array([row.tobytes() not in solutions for row in table.answers], bool)
            return own & ~np.isin(_class(spec, table), known)

        test = _collect(spec, "num_test", spec.num_test, _TEST, None, fresh)
    require_disjoint(train, test)
    for name, table in (("training", train), ("test", test)):
        clues = (table.questions > 0).sum(axis=1)
        logger.info(
            "%d %s puzzles: %d-%d clues, %.0f %% solved by singles, mean rating %.1f",
            len(table), name, clues.min(), clues.max(), 100 * (table.ratings == 0).mean(),
            table.ratings.mean(),
        )  # fmt: skip
    return train, test


def _class(spec: GeneratorSpec, table: PuzzleTable) -> np.ndarray:
    return symmetry_hash(table.questions, table.answers, spec.box)


def require_disjoint(train: PuzzleTable, test: PuzzleTable) -> None:
    """Assert that no solution grid is in both splits."""
    shared = {row.tobytes() for row in train.answers} & {row.tobytes() for row in test.answers}
    if shared:
        raise AssertionError(f"{len(shared)} solution grids are in both splits")


def _collect(
    spec: GeneratorSpec,
    key: str,
    count: int,
    stream: int,
    grids: np.ndarray | None,
    fresh: Callable[[PuzzleTable], np.ndarray] | None,
) -> PuzzleTable:
    """The first `count` distinct candidates of a stream that meet the limits."""
    seen: set[bytes] = set()
    parts: list[PuzzleTable] = []
    tried = recent_tried = recent_found = 0
    low, high = (0, 0) if spec.minimal else spec.draw
    while len(seen) < count:
        wanted = {"seed": spec.seed, "stream": stream, "low": low, "high": high}
        if grids is None:
            made = candidates(tried, _BATCH, box=spec.box, **wanted)
        else:
            made = candidates_4x4(tried, _BATCH, grids=grids, **wanted)
        questions, answers, ratings = made
        tried += _BATCH
        table = PuzzleTable(questions, answers, ratings)
        clues = (questions > 0).sum(axis=1)
        keep = (clues >= spec.clues[0]) & (clues <= spec.clues[1])
        keep &= (ratings >= spec.ratings[0]) & (ratings <= spec.ratings[1])
        if fresh is not None and keep.any():
            keep[keep] = fresh(table.take(keep))
        for row in np.flatnonzero(keep):
            question = questions[row].tobytes()
            keep[row] = question not in seen and len(seen) < count
            if keep[row]:
                seen.add(question)
        parts.append(table.take(keep))
        recent_tried, recent_found = recent_tried + _BATCH, recent_found + int(keep.sum())
        if recent_tried >= _PATIENCE:
            if recent_found < _LEAST and len(seen) < count:
                raise DataError(
                    f"data.{key}={count}: only {len(seen)} distinct puzzles were found in {tried} "
                    "tries; ask for fewer, or relax data.num_clues, data.minimal, data.min_rating "
                    "or data.max_rating."
                )
            recent_tried = recent_found = 0
            logger.info("%s: %d of %d puzzles", key, len(seen), count)
    return PuzzleTable(
        np.concatenate([p.questions for p in parts]),
        np.concatenate([p.answers for p in parts]),
        np.concatenate([p.ratings for p in parts]),
    )


def most_puzzles_4x4(grids: int, clues: tuple[int, int]) -> int:
    """Upper bound on the distinct puzzles of so many 4×4 grids with low..high clues."""
    return grids * sum(comb(16, k) for k in range(max(clues[0], FEWEST_CLUES[2, 2]), clues[1] + 1))
