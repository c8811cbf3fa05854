"""Mazes: find the shortest path. Generated, or from CSV files. Tokens: data/maze_rules.py."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Annotated, ClassVar, Literal

import numpy as np
from pydantic import Field, model_validator

from data.csv_config import CsvDatasetConfig, StrictBool, StrictInt
from data.errors import DataError
from data.hashing import hash32
from data.maze_generate import MazeSpec, canonical, generate_mazes
from data.maze_rules import CHARACTERS, GOAL, PATH, START, VOCAB_SIZE, WALL, path_lengths
from data.puzzles import PuzzleDataset, PuzzleSet
from data.tables import (
    PuzzleTable,
    TextRows,
    read_table,
    refuse_rows,
    refuse_shared,
    select_ratings,
    subsample,
)
from data.writing import write_dataset

logger = logging.getLogger(__name__)

_BUILDER = 1  # raise it when the same configuration gives another dataset
_SPLIT = 0x64  # stream of the hash
_DEFAULT_COUNT = 1_000
_PUBLISHED_PATH, _PUBLISHED_CELLS = 109, 900
_CHUNK = 4096

Share = Annotated[float, Field(ge=0, lt=1)]


class MazeConfig(CsvDatasetConfig):
    """`data=maze`: mazes of CSV files where one is given, generated ones otherwise.

    The rating is the number of cells of the shortest path, start and goal included. Augmentations
    are the eight rotations and reflections (four for mazes that are not square), so `num_aug` is at
    most 7; a path stays a shortest path, though not always the one that the search behind the
    labels would find first. With `symmetry_ids` the puzzle embedding tells which search it is: of a
    turned maze that of the symmetry, of a test maze that of the maze as it is.
    """

    generator_keys: ClassVar[tuple[str, ...]] = ("num_train", "num_test", "min_path")

    name: Literal["maze"] = "maze"
    size: tuple[StrictInt, StrictInt] = (30, 30)  # rows and columns
    check_paths: StrictBool = True  # of CSV files: every label is a shortest path
    symmetry_ids: StrictBool = False  # each rotation and reflection has its own puzzle embedding
    # Generated
    walls: tuple[Share, Share] = (0.3, 0.5)  # range that a maze's chance of a wall is drawn from
    min_path: StrictInt | None = None  # moves; default 109 of 30×30 cells, in proportion otherwise

    @model_validator(mode="after")
    def _keys_fit_together(self) -> MazeConfig:
        rows, columns = self.size
        if not (2 <= rows <= 200 and 2 <= columns <= 200):
            raise ValueError(f"data.size={list(self.size)} must be two numbers from 2 to 200")
        most = 7 if rows == columns else 3
        if self.num_aug > most:
            raise ValueError(
                f"data.num_aug={self.num_aug} must be at most {most} (or -1): there are "
                f"{most + 1} rotations and reflections of {rows}×{columns} cells, the maze as it "
                "is among them"
            )
        if self.symmetry_ids and self.num_aug != most:
            raise ValueError(
                f"data.symmetry_ids=true needs data.num_aug={most}, all rotations and reflections, "
                f"not {self.num_aug}"
            )
        if self.walls[0] > self.walls[1]:
            raise ValueError(f"data.walls={list(self.walls)} must have the lower end first")
        self.check_source_keys()
        if self.from_csv:
            return self
        if self.min_rating is not None or self.max_rating is not None:
            raise ValueError(
                "data.min_rating and data.max_rating are for CSV files; use data.min_path for "
                "generated mazes"
            )
        if not 1 <= self._min_path < rows * columns:
            raise ValueError(
                f"data.min_path={self.min_path} must be within 1 to {rows * columns - 1} moves "
                f"for data.size={list(self.size)}"
            )
        return self

    @property
    def _min_path(self) -> int:
        if self.min_path is not None:
            return self.min_path
        return max(1, round(_PUBLISHED_PATH * self.size[0] * self.size[1] / _PUBLISHED_CELLS))

    @property
    def generated_count(self) -> int:
        """Training puzzles to generate."""
        return self.num_train or _DEFAULT_COUNT

    def label(self) -> str:
        """Such as maze-30x30."""
        return f"maze-{self.size[0]}x{self.size[1]}"

    def planned_tokens(self) -> tuple[int, int]:
        """See `DatasetConfig.planned_tokens`."""
        return self.size[0] * self.size[1], VOCAB_SIZE

    def identity(self) -> dict[str, object]:
        """As all such datasets; of generated ones with the defaults spelled out."""
        keys = super().identity()
        if not self.symmetry_ids:  # datasets that were built before there was such a key stay valid
            del keys["symmetry_ids"]
        if not self.from_csv:
            keys |= {
                "num_train": self.generated_count,
                "num_test": self.num_test or _DEFAULT_COUNT,
                "min_path": self._min_path,
            }
        return {"builder": _BUILDER, **keys}

    def build(self, folder: Path, fingerprint: str) -> None:
        """Write the training split (unless there is none), and the test split with its sets."""
        if self.from_csv:
            train, tests = self._read_splits()
        else:
            spec = MazeSpec(
                size=self.size,
                num_train=self.generated_count,
                num_test=self.num_test or _DEFAULT_COUNT,
                seed=self.seed,
                walls=self.walls,
                min_path=self._min_path,
            )
            train, test = generate_mazes(spec)
            tests = {"all": test}
        rows, columns = self.size
        identifiers = self.num_aug + 1 if self.symmetry_ids else 1
        dihedral = {"name": "dihedral", "size": [rows, columns]}
        for split, tables in (("train", {"all": train}), ("test", tests)):
            if train is None and split == "train":
                continue
            each = {"identifiers": identifiers} if split == "train" and identifiers > 1 else {}
            dataset = PuzzleDataset(
                split=split,
                vocab_size=VOCAB_SIZE,
                seq_len=rows * columns,
                num_puzzle_identifiers=identifiers,
                pad_id=0,
                ignore_label_id=0,
                blank_identifier_id=0,
                fingerprint=fingerprint,
                augmentation={**dihedral, **each},
                sets={
                    name: PuzzleSet.of_single_examples(t.questions, t.answers, t.ratings)
                    for name, t in tables.items()
                },
                task={"name": "maze", "size": [rows, columns]},
            )
            write_dataset(folder, dataset, source=self.source())

    def _read_splits(self) -> tuple[PuzzleTable | None, dict[str, PuzzleTable]]:
        """Read, validate and split the CSV files."""
        files = {name: self.file("test_csv", value) for name, value in self.test_files.items()}
        tests = {name: self._read(path) for name, path in files.items()}
        train_file = self.train_file
        if train_file is None:
            return None, tests
        train = self._read(train_file)
        for name, path in files.items():
            refuse_shared(train, train_file, tests[name], path)
        if not files:
            train, held_out = self._hold_out(train, train_file)
            tests = {"all": held_out}
        if self.min_rating is not None or self.max_rating is not None:
            train = select_ratings(train, train_file, self.rating_range)
        if self.max_train is not None:
            train = subsample(train, train_file, self.max_train, self.seed)
        known = {canonical(question, self.size) for question in train.questions}
        for name, test in tests.items():
            turned = sum(canonical(question, self.size) in known for question in test.questions)
            if turned:
                logger.warning("%d of %d mazes of the test set %s are rotations or reflections of "
                               "training mazes", turned, len(test), name)  # fmt: skip
        return train, tests

    def _hold_out(self, table: PuzzleTable, path: Path) -> tuple[PuzzleTable, PuzzleTable]:
        """Split off a share of the rows; rotations and reflections of a maze stay together."""
        names: dict[bytes, int] = {}
        kind = np.array([names.setdefault(canonical(q, self.size), len(names))
                         for q in table.questions])  # fmt: skip
        order = np.argsort(hash32(_SPLIT, self.seed, np.arange(len(names))), kind="stable")
        sizes = np.bincount(kind, minlength=len(names))[order]
        enough = np.searchsorted(np.cumsum(sizes), self.test_fraction * len(table)) + 1
        in_test = np.isin(kind, order[:enough])
        if in_test.all():
            raise DataError(
                f"data.test_fraction={self.test_fraction} leaves nothing of {path} to train on: "
                f"it holds {len(names)} kind(s) of mazes."
            )
        return table.take(~in_test), table.take(in_test)

    def _read(self, path: Path) -> PuzzleTable:
        """Read and validate a whole file."""
        rows, columns = self.size
        token = np.zeros(256, np.uint8)
        token[np.frombuffer(CHARACTERS.encode(), np.uint8)] = np.arange(1, VOCAB_SIZE)

        def grids(text: TextRows, name: str, allowed: str) -> np.ndarray:
            codes = text.grids(name, rows * columns, f"data.size={list(self.size)}")
            tokens = token[codes]
            last = PATH if name == "answer" else GOAL
            text.refuse_cells(name, (tokens == 0) | (tokens > last), allowed)
            return tokens

        def parse(text: TextRows) -> PuzzleTable:
            questions = grids(text, "question", "# (wall), a blank (free), S and G")
            answers = grids(text, "answer", "# (wall), a blank (free), S, G and o (path)")
            for name, what in ((START, "start S"), (GOAL, "goal G")):
                count = (questions == name).sum(axis=1)
                text.refuse(count != 1, f"the question must have one {what}")
            moved = ((answers == PATH) & (questions == WALL)).any(axis=1)
            text.refuse(moved, "the path of the answer runs through a wall of the question")
            same = (answers == questions) | (answers == PATH)
            text.refuse(~same.all(axis=1), "the answer shows another maze than the question")
            return PuzzleTable(questions, answers, text.ratings(), text.lines)

        table = read_table(path, parse)
        if self.check_paths:
            self._require_shortest(path, table)
        return table

    def _require_shortest(self, path: Path, table: PuzzleTable) -> None:
        for start in range(0, len(table), _CHUNK):
            part = table.take(slice(start, start + _CHUNK))
            moves, best = path_lengths(part.questions, part.answers, self.size)
            refuse_rows(path, part.lines, best < 0, "there is no way from S to G")
            hint = "(data.check_paths=false admits such)"
            refuse_rows(path, part.lines, moves == 0,
                        f"the o of the answer are not one way from S to G {hint}")  # fmt: skip
            refuse_rows(path, part.lines, moves != best,
                        f"the path of the answer is not a shortest one {hint}")  # fmt: skip
