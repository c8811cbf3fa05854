"""Datasets of one question and one answer a row: from CSV files where given, else generated."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, ClassVar

from pydantic import Field, field_validator

from data.config import DatasetConfig, Seed, file_sha256, require_file
from data.errors import DataError
from data.hub import is_cached
from data.tables import SUFFIXES, check_header

UNLIMITED = 2**31 - 1

Count = Annotated[int, Field(strict=True, ge=1, le=10_000_000)]
Rating = Annotated[int, Field(strict=True, ge=0, le=UNLIMITED)]
StrictInt = Annotated[int, Field(strict=True)]
StrictBool = Annotated[bool, Field(strict=True)]
CsvPath = Annotated[str, Field(min_length=1)]


class CsvDatasetConfig(DatasetConfig):
    """Keys and checks that Sudoku and Maze share.

    `test_csv` alone is a dataset for evaluation; several test sets are given by name, as in
    `data.test_csv={dev:a.csv,hard:b.csv}`. A CSV training file needs a test set: `test_csv`, or
    `test_fraction` to hold out a share of the rows. `min_rating` and `max_rating` select training
    puzzles of a CSV file (a test file is taken as it is). A path may be `hf:OWNER/NAME/FILE`.
    """

    generator_keys: ClassVar[tuple[str, ...]] = ("num_train", "num_test")

    seed: Seed = 0
    min_rating: Rating | None = None
    max_rating: Rating | None = None
    # From CSV
    train_csv: CsvPath | None = None
    test_csv: CsvPath | dict[str, CsvPath] | None = None
    test_fraction: Annotated[float, Field(strict=True, gt=0, lt=1)] | None = None
    max_train: Count | None = None  # a seeded subsample of the training rows
    # Generated
    num_train: Count | None = None
    num_test: Count | None = None

    @field_validator("test_csv", mode="before")
    @classmethod
    def _files_by_name(cls, given: object) -> object:
        files = given if isinstance(given, dict) else {"all": given}
        for name, path in files.items():
            if given is not None and not (isinstance(path, str) and path):
                raise ValueError(
                    "data.test_csv must be the path of a file, or files by name as in "
                    "{dev:a.csv,hard:b.csv}"
                )
            if not re.fullmatch(r"[A-Za-z0-9][\w.\-]*", str(name)):
                raise ValueError(
                    f"data.test_csv names a test set {str(name)!r}; a name is letters, digits and "
                    "any of _ . -"
                )
        if not files:
            raise ValueError("data.test_csv={} names no file; leave it out")
        return given

    @property
    def from_csv(self) -> bool:
        """Whether any puzzles come from files."""
        return self.train_csv is not None or self.test_csv is not None

    @property
    def rating_range(self) -> tuple[int, int]:
        """Lowest and highest admitted rating."""
        high = UNLIMITED if self.max_rating is None else self.max_rating
        return self.min_rating or 0, high

    def check_source_keys(self) -> None:
        """Raise ValueError where keys of files and of the generator contradict each other."""
        if self.rating_range[0] > self.rating_range[1]:
            raise ValueError(
                f"data.min_rating={self.min_rating} must not exceed "
                f"data.max_rating={self.max_rating}"
            )
        if not self.from_csv:
            for key in ("test_fraction", "max_train"):
                if getattr(self, key) is not None:
                    raise ValueError(f"data.{key} needs data.train_csv; give that, too")
            return
        given = "data.train_csv" if self.train_csv else "data.test_csv"
        for key in self.generator_keys:
            if getattr(self, key) not in (None, False):
                other = "data.max_train" if key == "num_train" else "only one of the two"
                raise ValueError(
                    f"data.{key} is for generated puzzles and {given} is given; use {other}"
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

    @property
    def generated_count(self) -> int:
        """Training puzzles to generate."""
        raise NotImplementedError

    def planned_examples(self) -> int | None:
        """As many as are generated or drawn; 0 for a test file alone."""
        if not self.from_csv:
            return self.generated_count
        return 0 if self.train_csv is None else self.max_train

    def test_only(self) -> CsvDatasetConfig:
        """Where there is a test file: that file alone, whatever the training puzzles were."""
        if self.test_csv is None:
            return self
        training = ("train_csv", "test_fraction", "max_train", "min_rating", "max_rating")
        return self.model_copy(update=dict.fromkeys(training))

    @property
    def test_files(self) -> dict[str, str]:
        """Test files as given, by the name of their set."""
        if self.test_csv is None:
            return {}
        return self.test_csv if isinstance(self.test_csv, dict) else {"all": self.test_csv}

    def _given(self) -> list[tuple[str, str]]:
        """(key, path as given) of every file."""
        train = [("train_csv", self.train_csv)] if self.train_csv else []
        if not isinstance(self.test_csv, dict):
            return train + [("test_csv", path) for path in self.test_files.values()]
        return train + [(f"test_csv.{name}", path) for name, path in self.test_files.items()]

    def file(self, key: str, value: str) -> Path:
        """The file given for a key, downloaded if it lies on the hub."""
        return require_file(key, value, SUFFIXES)

    @property
    def train_file(self) -> Path | None:
        """The training file, if there is one."""
        return self.file("train_csv", self.train_csv) if self.train_csv else None

    def check(self) -> None:
        """Check that the CSV files are there and begin as they should; downloads nothing."""
        for key, value in self._given():
            if not is_cached(key, value):
                continue
            path = self.file(key, value)
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
        return keys | {key: file_sha256(self.file(key, value)) for key, value in self._given()}

    def source(self) -> str:
        """Where the puzzles come from, for people."""
        if not self.from_csv:
            return "generated"
        return " and ".join(Path(value).name for _, value in self._given())
