"""Sudoku: generated, or from CSV files. Tokens: pad 0, blank 1, digit d → d + 1."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import numpy as np
from pydantic import Field, field_validator, model_validator

from data.config import DatasetConfig, Seed, file_sha256, require_file
from data.errors import DataError
from data.format import write_dataset
from data.puzzles import PuzzleDataset, PuzzleSet
from data.sudoku_4x4 import NUM_GRIDS
from data.sudoku_csv import SUFFIXES, SudokuTable, check_header, read_sudoku_csv, require_unique
from data.sudoku_generate import GeneratorSpec, generate_splits, most_puzzles_4x4
from data.sudoku_rules import BOXES, FEWEST_CLUES
from data.sudoku_split import (
    hold_out,
    refuse_shared,
    select_ratings,
    subsample,
    warn_of_equivalents,
)

_BUILDER = 1  # raise it when the same configuration gives another dataset
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


def _shown(value: object) -> object:
    """A sequence as the command line has it."""
    return list(value) if isinstance(value, tuple) else value


class SudokuConfig(DatasetConfig):
    """`data=sudoku`: puzzles of CSV files where one is given, generated ones otherwise.

    `test_csv` alone is a dataset for evaluation. A CSV training file needs a test set: `test_csv`,
    or `test_fraction` to hold out a share of the rows (puzzles that are symmetry-equivalent stay
    on one side). `min_rating` and `max_rating` select training puzzles of a CSV file (a test file
    is taken as it is), and training and test puzzles of the generator. The rating of generated
    puzzles is the number of guesses of a search that proves the solution unique; 0 means that
    singles are enough.
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

    @field_validator("box", mode="before")
    @classmethod
    def _known_box(cls, box: object) -> object:
        if not isinstance(box, (list, tuple)) or tuple(box) not in BOXES:
            choices = ", ".join(str(list(b)) for b in BOXES)
            raise ValueError(f"data.box={_shown(box)} must be one of {choices}")
        return box

    @field_validator("num_clues", mode="before")
    @classmethod
    def _number_or_range(cls, clues: object) -> object:
        numbers = clues if isinstance(clues, (list, tuple)) and len(clues) == 2 else [clues]
        if clues is not None and any(type(number) is not int for number in numbers):
            raise ValueError(
                f"data.num_clues={_shown(clues)} must be a whole number, or two of them: "
                "[fewest, most]"
            )
        return clues

    @model_validator(mode="after")
    def _keys_fit_together(self) -> SudokuConfig:
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
        if self.train_csv is None and self.test_csv is None:
            self._check_generator_keys()
        else:
            self._check_csv_keys()
        return self

    def _check_csv_keys(self) -> None:
        given = "data.train_csv" if self.train_csv else "data.test_csv"
        for key in ("num_train", "num_test", "num_clues", "holdout_grids"):
            if getattr(self, key) is not None:
                raise ValueError(
                    f"data.{key} is for generated puzzles and {given} is given; "
                    f"use {'data.max_train' if key == 'num_train' else 'only one of the two'}"
                )
        if self.minimal:
            raise ValueError(
                f"data.minimal is for generated puzzles and {given} is given; "
                "use only one of the two"
            )
        if self.train_csv is None:
            for key in ("test_fraction", "max_train", "min_rating", "max_rating"):
                if getattr(self, key) is not None:
                    raise ValueError(f"data.{key} needs data.train_csv; give that, too")
            return
        if (self.test_csv is None) == (self.test_fraction is None):
            state = "alone" if self.test_csv is None else "with both"
            raise ValueError(
                f"data.train_csv is given {state}; give either data.test_csv, or "
                "data.test_fraction (such as 0.1) to hold out a share of the training file"
            )

    def _check_generator_keys(self) -> None:
        for key in ("test_fraction", "max_train"):
            if getattr(self, key) is not None:
                raise ValueError(f"data.{key} needs data.train_csv; give that, too")
        fewest, cells = FEWEST_CLUES[self.box], (self.box[0] * self.box[1]) ** 2
        low, high = self.clue_range
        if not fewest <= low <= high < cells:
            raise ValueError(
                f"data.num_clues={_shown(self.num_clues)} must lie, lower end first, "
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

    def test_only(self) -> SudokuConfig:
        """Where there is a test file: that file alone, whatever the training puzzles were."""
        if self.test_csv is None:
            return self
        training = ("train_csv", "test_fraction", "max_train", "min_rating", "max_rating")
        return self.model_copy(update=dict.fromkeys(training))

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
        if not (self.train_csv or self.test_csv):
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
        """Write the training (unless there is none) and the test split, as one set `all` each."""
        if not (self.train_csv or self.test_csv):
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
            if table is None:
                continue
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

    def _read_splits(self) -> tuple[SudokuTable | None, SudokuTable]:
        """Read, validate and split the CSV files; the cheap checks of both come first."""
        files = self._files()
        if self.train_csv is None:
            test = read_sudoku_csv(files["test_csv"], self.box)
            if self.check_unique:
                require_unique(files["test_csv"], test, self.box)
            return None, test
        train_file, test_file = files["train_csv"], files.get("test_csv")
        train = read_sudoku_csv(train_file, self.box)
        if test_file is None:
            train, test = hold_out(train, train_file, self.box, self.test_fraction, self.seed)
        else:
            test = read_sudoku_csv(test_file, self.box)
            refuse_shared(train, train_file, test, test_file)
        if self.min_rating is not None or self.max_rating is not None:
            train = select_ratings(train, train_file, self.rating_range)
        if self.max_train is not None:
            train = subsample(train, train_file, self.max_train, self.seed)
        if self.check_unique:
            require_unique(train_file, train, self.box)
            require_unique(test_file or train_file, test, self.box)
        warn_of_equivalents(train, test, self.box)
        return train, test
