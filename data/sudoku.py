"""Sudoku: generated, or from CSV files. Tokens: pad 0, blank 1, digit d → d + 1."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar, Literal

import numpy as np
from pydantic import field_validator, model_validator

from data.csv_config import CsvDatasetConfig, StrictBool, StrictInt
from data.puzzles import PuzzleDataset, PuzzleSet
from data.sudoku_4x4 import NUM_GRIDS
from data.sudoku_csv import read_sudoku_csv, require_unique
from data.sudoku_generate import GeneratorSpec, generate_splits, most_puzzles_4x4
from data.sudoku_rules import BOXES, FEWEST_CLUES
from data.sudoku_split import hold_out, warn_of_equivalents
from data.tables import PuzzleTable, refuse_shared, select_ratings, subsample
from data.writing import write_dataset

_BUILDER = 2  # raise it when the same configuration gives another dataset

_DEFAULT_TRAIN = {(2, 2): 20_000, (2, 3): 20_000, (3, 2): 20_000, (3, 3): 1_000}
_DEFAULT_TEST = 1_000
# Without num_clues, each puzzle's number of clues is drawn from here, as far as it can be reached.
_DEFAULT_CLUES = {(2, 2): (4, 8), (2, 3): (8, 18), (3, 2): (8, 18), (3, 3): (17, 40)}
_DEFAULT_HOLDOUT = 48


def _shown(value: object) -> object:
    """A sequence as the command line has it."""
    return list(value) if isinstance(value, tuple) else value


class SudokuConfig(CsvDatasetConfig):
    """`data=sudoku`: puzzles of CSV files where one is given, generated ones otherwise.

    Held out by `test_fraction`, puzzles that are symmetry-equivalent stay on one side. Of generated
    puzzles `min_rating` and `max_rating` select both splits; their rating is the number of guesses
    of a search that proves the solution unique; 0 means that singles are enough. By default 1,000
    test and 20,000 training puzzles are generated (1,000 for 3×3 boxes).
    """

    generator_keys: ClassVar[tuple[str, ...]] = (
        "num_train", "num_test", "num_clues", "holdout_grids", "minimal",
    )  # fmt: skip

    name: Literal["sudoku"] = "sudoku"
    box: tuple[StrictInt, StrictInt] = (3, 3)  # rows and columns of a box
    check_unique: StrictBool = True  # of CSV files: one solution each; takes a search
    # Generated
    minimal: StrictBool = False  # no clue can be spared
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
        self.check_source_keys()
        if not self.from_csv:
            self._check_generator_keys()
        return self

    def _check_generator_keys(self) -> None:
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
            ("num_train", self.generated_count, NUM_GRIDS - test),
            ("num_test", self._test_count, test),
        ):
            most = most_puzzles_4x4(grids, self.clue_range)
            if count > most:
                raise ValueError(
                    f"data.{key}={count} is more than {grids} solution grids can give ({most} at "
                    f"the very most with {low} to {high} clues)"
                )

    @property
    def clue_range(self) -> tuple[int, int]:
        """Fewest and most clues of a generated puzzle."""
        if isinstance(self.num_clues, tuple):
            return self.num_clues
        if self.num_clues is not None:
            return self.num_clues, self.num_clues
        return FEWEST_CLUES[self.box], (self.box[0] * self.box[1]) ** 2 - 1

    @property
    def generated_count(self) -> int:
        """Training puzzles to generate."""
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

    def planned_tokens(self) -> tuple[int, int]:
        """See `DatasetConfig.planned_tokens`."""
        digits = self.box[0] * self.box[1]
        return digits**2, digits + 2

    def identity(self) -> dict[str, object]:
        """As all such datasets; of generated ones with the defaults spelled out."""
        keys = super().identity()
        if not self.from_csv:
            keys |= {
                "num_train": self.generated_count,
                "num_test": self._test_count,
                "holdout_grids": self._holdout,
                "num_clues": [self.clue_range, self._clue_draw],
            }
        return {"builder": _BUILDER, **keys}

    @property
    def _clue_draw(self) -> tuple[int, int]:
        return _DEFAULT_CLUES[self.box] if self.num_clues is None else self.clue_range

    def build(self, folder: Path, fingerprint: str) -> None:
        """Write the training split (unless there is none), and the test split with its sets."""
        if self.from_csv:
            train, tests = self._read_splits()
        else:
            train, test = self._generate()
            tests = {"all": test}
        digits = self.box[0] * self.box[1]
        for split, tables in (("train", {"all": train}), ("test", tests)):
            if train is None and split == "train":
                continue
            sets = {}
            for name, table in tables.items():
                for grids in (table.questions, table.answers):
                    np.add(grids, 1, out=grids)
                sets[name] = PuzzleSet.of_single_examples(
                    table.questions, table.answers, table.ratings
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
                augmentation=self._augmentation(),
                sets=sets,
                task={"name": "sudoku", "box": list(self.box)},
            )
            write_dataset(folder, dataset, source=self.source())

    def _augmentation(self) -> dict[str, object] | None:
        return None if self.box == (2, 2) else {"name": "sudoku", "box": list(self.box)}

    def _generate(self) -> tuple[PuzzleTable, PuzzleTable]:
        return generate_splits(
            GeneratorSpec(
                box=self.box,
                num_train=self.generated_count,
                num_test=self._test_count,
                seed=self.seed,
                minimal=self.minimal,
                clues=self.clue_range,
                draw=self._clue_draw,
                ratings=self.rating_range,
                holdout_grids=self._holdout,
            )
        )

    def _read_splits(self) -> tuple[PuzzleTable | None, dict[str, PuzzleTable]]:
        """Read, validate and split the CSV files; the cheap checks of all come first."""
        files = {name: self.file("test_csv", value) for name, value in self.test_files.items()}
        tests = {name: read_sudoku_csv(path, self.box) for name, path in files.items()}
        train, train_file = None, self.train_file
        if train_file is not None:
            train = read_sudoku_csv(train_file, self.box)
            for name, path in files.items():
                refuse_shared(train, train_file, tests[name], path)
            if not files:
                train, held_out = hold_out(
                    train, train_file, self.box, self.test_fraction, self.seed
                )
                tests, files = {"all": held_out}, {"all": train_file}
            if self.min_rating is not None or self.max_rating is not None:
                train = select_ratings(train, train_file, self.rating_range)
            if self.max_train is not None:
                train = subsample(train, train_file, self.max_train, self.seed)
        if self.check_unique:
            if train is not None:
                require_unique(train_file, train, self.box)
            for name, table in tests.items():
                require_unique(files[name], table, self.box)
        if train is not None:
            warn_of_equivalents(train, tests, self.box)
        return train, tests
