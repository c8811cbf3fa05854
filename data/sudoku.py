"""Sudoku: generated, or from CSV files. Tokens: pad 0, blank 1, digit d → d + 1."""

import logging
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
from pydantic import Field, field_validator, model_validator

from data.config import DatasetConfig, Seed, file_sha256, require_file
from data.errors import DataError
from data.format import write_dataset
from data.hashing import hash32
from data.puzzles import PuzzleDataset, PuzzleSet
from data.sudoku_4x4 import NUM_GRIDS
from data.sudoku_csv import SUFFIXES, SudokuTable, check_header, read_sudoku_csv, require_unique
from data.sudoku_generate import GeneratorSpec, generate_splits, most_puzzles_4x4
from data.sudoku_rules import BOXES, FEWEST_CLUES, symmetry_hash

logger = logging.getLogger(__name__)

_BUILDER = 1  # raise it when the same configuration gives another dataset
_SUBSAMPLE, _SPLIT = 0x21, 0x22  # streams of the hash
_UNLIMITED = 2**31 - 1

_DEFAULT_TRAIN = {(2, 2): 20_000, (2, 3): 20_000, (3, 2): 20_000, (3, 3): 1_000}
_DEFAULT_TEST = 1_000
# Without num_clues, each puzzle's number of clues is drawn from here, as far as it can be reached.
_DEFAULT_CLUES = {(2, 2): (4, 8), (2, 3): (8, 18), (3, 2): (8, 18), (3, 3): (17, 40)}
_DEFAULT_HOLDOUT = 48

Count = Annotated[int, Field(strict=True, ge=1, le=10_000_000)]
Rating = Annotated[int, Field(strict=True, ge=0, le=_UNLIMITED)]
StrictInt = Annotated[int, Field(strict=True)]
CsvPath = Annotated[str, Field(min_length=1)]


class SudokuConfig(DatasetConfig):
    """`data=sudoku`: puzzles of CSV files where `train_csv` is given, generated ones otherwise.

    A CSV training file needs a test set: `test_csv`, or `test_fraction` to hold out a share of the
    rows (puzzles that are symmetry-equivalent stay on one side). `min_rating` and `max_rating`
    select training puzzles of a CSV file (a test file is taken as it is), and training and test
    puzzles of the generator. The rating of generated puzzles is the number of guesses of a search
    that proves the solution unique; 0 means that singles are enough.
    """

    name: Literal["sudoku"] = "sudoku"
    box: tuple[StrictInt, StrictInt] = (3, 3)  # rows and columns of a box
    seed: Seed = 0
    min_rating: Rating | None = None
    max_rating: Rating | None = None
    # From CSV
    train_csv: CsvPath | None = None
    test_csv: CsvPath | None = None
    test_fraction: Annotated[float, Field(strict=True, gt=0, lt=1)] | None = None
    max_train: Count | None = None  # a seeded subsample of the training rows
    check_unique: Annotated[bool, Field(strict=True)] = True  # one solution each; takes a search
    # Generated
    num_train: Count | None = None  # default 20,000, or 1,000 for 3×3 boxes
    num_test: Count | None = None  # default 1,000
    minimal: Annotated[bool, Field(strict=True)] = False  # no clue can be spared
    num_clues: StrictInt | tuple[StrictInt, StrictInt] | None = None  # exactly, or from..to
    holdout_grids: StrictInt | None = None  # 2×2 boxes: solution grids for the test; default 48

    @field_validator("box")
    @classmethod
    def _known_box(cls, box: tuple[int, int]) -> tuple[int, int]:
        if box not in BOXES:
            raise ValueError(
                f"data.box={list(box)} must be one of {', '.join(str(list(b)) for b in BOXES)}"
            )
        return box

    @model_validator(mode="after")
    def _keys_fit_together(self) -> "SudokuConfig":
        if self.num_aug != 0 and self.box == (2, 2):
            raise ValueError(
                f"data.num_aug={self.num_aug} must be 0 for data.box=[2,2]: the 288 solution "
                "grids fall into two symmetry classes, so augmenting recreates the held-out ones"
            )
        if self.rating_range[0] > self.rating_range[1]:
            raise ValueError(
                f"data.min_rating={self.min_rating} must not exceed "
                f"data.max_rating={self.max_rating}"
            )
        if self.train_csv is None:
            self._check_generator_keys()
        else:
            self._check_csv_keys()
        return self

    def _check_csv_keys(self) -> None:
        for key in ("num_train", "num_test", "num_clues", "holdout_grids"):
            if getattr(self, key) is not None:
                raise ValueError(
                    f"data.{key} is for generated puzzles and data.train_csv is given; "
                    f"use {'data.max_train' if key == 'num_train' else 'only one of the two'}"
                )
        if self.minimal:
            raise ValueError(
                "data.minimal is for generated puzzles and data.train_csv is given; "
                "use only one of the two"
            )
        if (self.test_csv is None) == (self.test_fraction is None):
            state = "alone" if self.test_csv is None else "with both"
            raise ValueError(
                f"data.train_csv is given {state}; give either data.test_csv, or "
                "data.test_fraction (such as 0.1) to hold out a share of the training file"
            )

    def _check_generator_keys(self) -> None:
        for key in ("test_csv", "test_fraction", "max_train"):
            if getattr(self, key) is not None:
                raise ValueError(f"data.{key} needs data.train_csv; give that, too")
        fewest, cells = FEWEST_CLUES[self.box], (self.box[0] * self.box[1]) ** 2
        low, high = self.clue_range
        if not fewest <= low <= high < cells:
            raise ValueError(
                f"data.num_clues={self.num_clues} must be a number, or a range from low to high, "
                f"within {fewest} to {cells - 1} for data.box={list(self.box)}"
            )
        if self.box != (2, 2):
            if self.holdout_grids is not None:
                raise ValueError("data.holdout_grids is for data.box=[2,2] only; leave it out")
            return
        if self.rating_range[0] > 0:
            raise ValueError(
                f"data.min_rating={self.min_rating} must be 0 for data.box=[2,2]: "
                "every 4×4 puzzle can be solved without a guess"
            )
        test = self._holdout
        if not 1 <= test < NUM_GRIDS:
            raise ValueError(
                f"data.holdout_grids={test} must be within 1 to {NUM_GRIDS - 1}: "
                f"4×4 has {NUM_GRIDS} solution grids"
            )
        for key, count, grids in (
            ("num_train", self._train_count, NUM_GRIDS - test),
            ("num_test", self._test_count, test),
        ):
            most = most_puzzles_4x4(grids, self.clue_range)
            if count > most:
                raise ValueError(
                    f"data.{key}={count} is more than {grids} solution grids can give ({most} at "
                    f"the very most with {low} to {high} clues)"
                )

    @property
    def rating_range(self) -> tuple[int, int]:
        """Lowest and highest admitted rating."""
        high = _UNLIMITED if self.max_rating is None else self.max_rating
        return self.min_rating or 0, high

    @property
    def clue_range(self) -> tuple[int, int]:
        """Fewest and most clues of a generated puzzle."""
        if isinstance(self.num_clues, tuple):
            return self.num_clues
        if self.num_clues is not None:
            return self.num_clues, self.num_clues
        return FEWEST_CLUES[self.box], (self.box[0] * self.box[1]) ** 2 - 1

    @property
    def _train_count(self) -> int:
        return self.num_train or _DEFAULT_TRAIN[self.box]

    @property
    def _test_count(self) -> int:
        return self.num_test or _DEFAULT_TEST

    @property
    def _holdout(self) -> int:
        if self.box != (2, 2):
            return 0
        return _DEFAULT_HOLDOUT if self.holdout_grids is None else self.holdout_grids

    def label(self) -> str:
        """Such as sudoku-9x9."""
        n = self.box[0] * self.box[1]
        return f"sudoku-{n}x{n}"

    def _files(self) -> dict[str, Path]:
        given = {"train_csv": self.train_csv, "test_csv": self.test_csv}
        return {key: require_file(key, value, SUFFIXES) for key, value in given.items() if value}

    def check(self) -> None:
        """Check that the CSV files are there and begin as they should."""
        for key, path in self._files().items():
            has_ratings = check_header(path)
            limited = self.min_rating is not None or self.max_rating is not None
            if key == "train_csv" and limited and not has_ratings:
                raise DataError(
                    f"data.min_rating and data.max_rating need a rating column, and {path} has "
                    "none; leave them out."
                )

    def identity(self) -> dict[str, object]:
        """All keys but `num_aug` (nothing augmented is stored); files by their contents."""
        keys = self.model_dump(mode="json", exclude={"num_aug", "train_csv", "test_csv"})
        if self.train_csv is None:
            keys |= {
                "num_train": self._train_count,
                "num_test": self._test_count,
                "holdout_grids": self._holdout,
                "num_clues": [self.clue_range, self._clue_draw],
            }
        files = {key: file_sha256(path) for key, path in self._files().items()}
        return {"builder": _BUILDER, **keys, **files}

    @property
    def _clue_draw(self) -> tuple[int, int]:
        return _DEFAULT_CLUES[self.box] if self.num_clues is None else self.clue_range

    def build(self, folder: Path, fingerprint: str) -> None:
        """Write the training and the test split, each as one set named `all`."""
        if self.train_csv is None:
            source = "generated"
            train, test = generate_splits(
                GeneratorSpec(
                    box=self.box,
                    num_train=self._train_count,
                    num_test=self._test_count,
                    seed=self.seed,
                    minimal=self.minimal,
                    clues=self.clue_range,
                    draw=self._clue_draw,
                    ratings=self.rating_range,
                    holdout_grids=self._holdout,
                )
            )
        else:
            source = " and ".join(path.name for path in self._files().values())
            train, test = self._read_splits()
        augmentation = None if self.box == (2, 2) else {"name": "sudoku", "box": list(self.box)}
        digits = self.box[0] * self.box[1]
        for split, table in (("train", train), ("test", test)):
            arrays = PuzzleSet.of_single_examples(
                table.questions + np.uint8(1), table.answers + np.uint8(1), table.ratings
            )
            dataset = PuzzleDataset(
                split=split,
                vocab_size=digits + 2,
                seq_len=digits * digits,
                num_puzzle_identifiers=1,
                pad_id=0,
                ignore_label_id=0,
                blank_identifier_id=0,
                fingerprint=fingerprint,
                augmentation=augmentation,
                sets={"all": arrays},
            )
            write_dataset(folder, dataset, source=source)

    def _read_splits(self) -> tuple[SudokuTable, SudokuTable]:
        """Read, validate and split the CSV files; the cheap checks of both come first."""
        files = self._files()
        tables = {key: read_sudoku_csv(path, self.box) for key, path in files.items()}
        train, test = tables["train_csv"], tables.get("test_csv")
        if test is None:
            train, test = self._hold_out(train)
        _refuse_overlap(files, train, test)
        train = self._select(files["train_csv"], train)
        if self.check_unique:
            require_unique(files["train_csv"], train, self.box)
            require_unique(files.get("test_csv", files["train_csv"]), test, self.box)
        known = symmetry_hash(train.questions, train.answers, self.box)
        equivalent = np.isin(symmetry_hash(test.questions, test.answers, self.box), known)
        if equivalent.any():
            logger.warning(
                "%d of %d test puzzles look symmetry-equivalent to training puzzles",
                equivalent.sum(), len(test),
            )  # fmt: skip
        return train, test

    def _hold_out(self, table: SudokuTable) -> tuple[SudokuTable, SudokuTable]:
        """Split off `test_fraction` of the rows; equivalent puzzles stay together."""
        classes = symmetry_hash(table.questions, table.answers, self.box)
        if self.box == (2, 2):  # by solution grid
            classes = np.unique(table.answers, axis=0, return_inverse=True)[1].reshape(-1)
        _, number, sizes = np.unique(classes, return_inverse=True, return_counts=True)
        order = np.argsort(hash32(_SPLIT, self.seed, np.arange(len(sizes))), kind="stable")
        enough = np.searchsorted(np.cumsum(sizes[order]), self.test_fraction * len(table)) + 1
        held_out = np.zeros(len(sizes), bool)
        held_out[order[:enough]] = True
        in_test = held_out[number.reshape(-1)]
        if in_test.all():
            raise DataError(
                f"data.test_fraction={self.test_fraction} leaves nothing to train on: "
                f"{self.train_csv} holds {len(sizes)} kinds of puzzles."
            )
        return table.take(~in_test), table.take(in_test)

    def _select(self, path: Path, train: SudokuTable) -> SudokuTable:
        """Apply the limits on the rating, and take the seeded subsample."""
        low, high = self.rating_range
        if train.ratings is not None and (self.min_rating, self.max_rating) != (None, None):
            train = train.take((train.ratings >= low) & (train.ratings <= high))
            if not len(train):
                raise DataError(
                    f"{path} has no puzzle with a rating from {low} to {high}; change "
                    "data.min_rating or data.max_rating."
                )
        if self.max_train is not None and self.max_train > len(train):
            raise DataError(
                f"data.max_train={self.max_train} is more than the {len(train)} puzzles of {path}; "
                "leave it out to take all."
            )
        if self.max_train is not None:
            keys = hash32(_SUBSAMPLE, self.seed, np.arange(len(train)))
            train = train.take(np.sort(np.argsort(keys, kind="stable")[: self.max_train]))
        return train


def _refuse_overlap(files: dict[str, Path], train: SudokuTable, test: SudokuTable) -> None:
    """Refuse a question that is in both splits; count the repeated ones of the training split."""
    lines = {q.tobytes(): i for q, i in zip(train.questions, train.lines, strict=True)}
    if len(lines) < len(train):
        logger.info("%d puzzles of the training file are repeated", len(train) - len(lines))
    shared = [
        (lines[q.tobytes()], i)
        for q, i in zip(test.questions, test.lines, strict=True)
        if q.tobytes() in lines
    ]
    if shared:
        raise DataError(
            f"{files['test_csv']}, line {shared[0][1]}: this puzzle is in {files['train_csv']}, "
            f"line {shared[0][0]}, too ({len(shared)} shared in all); remove them from one of the "
            "files."
        )
