"""A dataset in memory: arrays of token grids in puzzles and groups, and what a run asks of it."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import BaseModel, ConfigDict

OUTSIDE = -1  # label of what lies beyond the end of a text; the ignored label of texts


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
    causal: bool = False  # whether the labels are the inputs to come


@dataclass(frozen=True, eq=False)
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
    def num_puzzles(self) -> int:
        """Puzzles, each with one or more examples."""
        return len(self.puzzle_identifiers)

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


@dataclass(frozen=True, eq=False)
class TokenStream:
    """A text: its windows of `seq_len` tokens are the examples, labelled by the tokens that follow.

    Evaluation takes every token once: windows from the beginning of each shard on, the last one
    filled up. An epoch of training takes as many windows as fit, from a place that changes.
    """

    shards: tuple[np.ndarray, ...]  # (tokens,) uint16 each, memory mapped
    seq_len: int

    def __len__(self) -> int:
        return int(sum(-(-(len(s) - 1) // self.seq_len) for s in self.shards))

    @property
    def group_sizes(self) -> np.ndarray:
        """(shards,) windows that one epoch takes of each shard."""
        return np.array([(len(s) - 1) // self.seq_len for s in self.shards])

    @property
    def num_puzzles(self) -> int:
        """Every window is a puzzle."""
        return len(self)

    @property
    def ratings(self) -> None:
        """Windows have no difficulty."""
        return None


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
    sets: dict[str, PuzzleSet | TokenStream]
    task: dict[str, Any] | None = None
    path: Path | None = None  # where it was read from
    # Of a mixture: what it consists of. Of a part: its place in the mixture.
    parts: tuple["Part", ...] = ()
    first_identifier: int = 0  # added to puzzle identifiers

    @property
    def rows_per_epoch(self) -> int:
        """Examples of one pass: every group once, with one of its puzzles."""
        return int(sum(s.group_sizes.sum() for s in self.sets.values()))

    @property
    def identifiers_per_puzzle(self) -> int:
        """1, or how many augmentations have an identifier of their own, the original included."""
        return int((self.augmentation or {}).get("identifiers", 1))

    def part_of(self, set_name: str) -> "PuzzleDataset":
        """The dataset that a set belongs to: this one, or a part of the mixture."""
        return next(
            (p.dataset for p in self.parts if self.sets[set_name] in p.dataset.sets.values()), self
        )


@dataclass(frozen=True)
class Part:
    """One dataset of a mixture."""

    dataset: PuzzleDataset
    weight: float
    num_aug: int
