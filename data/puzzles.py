"""A dataset in memory: arrays of token grids in puzzles and groups, and what a run asks of it."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import BaseModel, ConfigDict


class DatasetInfo(BaseModel):
    """What a run needs to know of a dataset before its tokens are read; `model_dump` is JSON."""

    model_config = ConfigDict(frozen=True)

    vocab_size: int
    seq_len: int
    pad_id: int
    ignore_label_id: int | None
    blank_identifier_id: int
    num_puzzle_ids: int
    num_train_examples: int  # rows of one epoch
    total_groups: int
    mean_puzzle_examples: float
    test_sets: dict[str, int]  # name → examples
    augmentation: dict[str, Any] | None
    fingerprint: str
    source: str | None
    task: dict[str, Any] | None = None  # what the tokens are, which decides the scoring


@dataclass(frozen=True)
class PuzzleSet:
    """Arrays of one set; see data/format.py for their meaning."""

    inputs: np.ndarray  # (examples, seq_len) integers
    labels: np.ndarray  # (examples, seq_len) integers
    puzzle_identifiers: np.ndarray  # (puzzles,)
    puzzle_indices: np.ndarray  # (puzzles + 1,)
    group_indices: np.ndarray  # (groups + 1,)
    ratings: np.ndarray | None = None  # (examples,) int32

    def __len__(self) -> int:
        return len(self.inputs)

    @property
    def group_sizes(self) -> np.ndarray:
        """(groups,) examples that one epoch takes of each group: those of its largest puzzle."""
        examples = np.diff(self.puzzle_indices)
        return np.maximum.reduceat(examples, self.group_indices[:-1])

    @classmethod
    def of_single_examples(
        cls, inputs: np.ndarray, labels: np.ndarray, ratings: np.ndarray | None = None
    ) -> "PuzzleSet":
        """A set in which every example is a puzzle and a group of its own, with identifier 0."""
        count = len(inputs)
        indices = np.arange(count + 1, dtype=np.int64)
        return cls(inputs, labels, np.zeros(count, np.int32), indices, indices, ratings)


@dataclass(frozen=True)
class PuzzleDataset:
    """One split ("train" or "test") of a dataset, as NumPy arrays (memory mapped when large)."""

    split: str
    vocab_size: int
    seq_len: int
    num_puzzle_identifiers: int
    pad_id: int
    ignore_label_id: int | None
    blank_identifier_id: int
    fingerprint: str
    augmentation: dict[str, Any] | None
    sets: dict[str, PuzzleSet]
    task: dict[str, Any] | None = None
    path: Path | None = None  # where it was read from

    @property
    def rows_per_epoch(self) -> int:
        """Examples of one pass: every group once, with one of its puzzles."""
        return int(sum(s.group_sizes.sum() for s in self.sets.values()))
