"""One dataset as an endless stream of rows, each a pure function of its number.

Row i belongs to epoch i // N and takes place i mod N in that epoch's order. Which puzzle of its
group and which augmentation a row shows is a hash of (seed, epoch, group or row).
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from data.augment import build_augmentation
from data.errors import DataError
from data.hashing import below, hash32
from data.puzzles import PuzzleDataset, PuzzleSet, TokenStream
from data.stores import TokenStore, WindowStore

IGNORED_LABEL = -100
_CACHED_EPOCHS = 4
_MOST_ROWS = 2**31  # of an epoch: `below` draws from fewer

# Streams of the hash: one number per purpose (the augmentations use others).
_ORDER, _PUZZLE, _AUGMENTATION, _SHIFT = 0x01, 0x02, 0x03, 0x05


class Plan(NamedTuple):
    """What some rows are, (rows,) int64 each."""

    examples: np.ndarray  # number in the split (of a text: the place of the first token)
    identifiers: np.ndarray  # puzzle identifier of the original
    indices: np.ndarray  # augmentation


class EpochOrder:
    """The order of N rows in every epoch, by hash; the last few are kept."""

    def __init__(self, rows: int, seed: int) -> None:
        if rows >= _MOST_ROWS:
            raise DataError(f"The dataset has {rows} rows per epoch; 2^31 are too many.")
        self.rows, self.seed = rows, seed
        self._orders: dict[int, np.ndarray] = {}

    def __call__(self, places: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Numbers in the endless stream (n,), ascending → epoch and row of the epoch, (n,) each."""
        epoch, position = np.divmod(places, self.rows)
        row = np.empty_like(places)
        for e in np.unique(epoch):
            here = epoch == e
            row[here] = self._order(int(e))[position[here]]
        return epoch, row

    def _order(self, epoch: int) -> np.ndarray:
        if epoch not in self._orders:
            if len(self._orders) >= _CACHED_EPOCHS:
                self._orders.pop(min(self._orders))
            keys = hash32(_ORDER, self.seed, epoch, np.arange(self.rows))
            self._orders[epoch] = np.argsort(keys, kind="stable")
        return self._orders[epoch]


class PuzzleSource:
    """Rows of a dataset of puzzles: an epoch takes every group once, with one of its puzzles."""

    def __init__(
        self,
        dataset: PuzzleDataset,
        *,
        seed: int,
        num_aug: int,
        device: torch.device,
        resident_bytes: int,
    ) -> None:
        self.dataset, self.seed, self.num_aug = dataset, seed, num_aug
        self._check_augmentation()
        sets: list[PuzzleSet] = list(dataset.sets.values())
        self.store = TokenStore(sets, dataset, device, resident_bytes)
        self.augment = None
        if num_aug != 0:
            self.augment = build_augmentation(dataset.augmentation, seed=seed, device=device)
        self._index_rows(sets)
        self.order = EpochOrder(len(self.row_group), seed)

    def _check_augmentation(self) -> None:
        if self.num_aug != 0 and self.dataset.augmentation is None:
            raise DataError(
                f"data.num_aug={self.num_aug}: this dataset has no augmentation; set "
                "data.num_aug=0."
            )
        most = self.dataset.identifiers_per_puzzle - 1
        if most > 0 and not 0 <= self.num_aug <= most:
            raise DataError(
                f"data.num_aug={self.num_aug}: this dataset has identifiers for {most} "
                f"augmentations of each puzzle; use 0 to {most}."
            )

    def _index_rows(self, sets: list[PuzzleSet]) -> None:
        """Join the sets' indices: rows of an epoch → groups → puzzles → examples."""
        examples = np.cumsum([0] + [len(s) for s in sets])
        puzzles = np.cumsum([0] + [len(s.puzzle_identifiers) for s in sets])
        sizes = np.concatenate([s.group_sizes for s in sets])  # (groups,) rows of each group
        self.row_group = np.repeat(np.arange(len(sizes)), sizes)  # (N,)
        starts = np.cumsum(sizes) - sizes
        self.row_offset = np.arange(len(self.row_group)) - starts[self.row_group]  # (N,)
        joined = list(zip(sets, examples, puzzles, strict=False))
        self.group_start = np.concatenate([s.group_indices[:-1] + p for s, _, p in joined])
        self.group_count = np.concatenate([np.diff(s.group_indices) for s in sets])
        self.puzzle_start = np.concatenate([s.puzzle_indices[:-1] + e for s, e, _ in joined])
        self.puzzle_count = np.concatenate([np.diff(s.puzzle_indices) for s in sets])
        self.puzzle_id = np.concatenate([s.puzzle_identifiers for s in sets]).astype(np.int64)

    @property
    def rows_per_epoch(self) -> int:
        """N: every group once, with all examples of one of its puzzles."""
        return len(self.row_group)

    def plan(self, places: np.ndarray) -> Plan:
        """What the rows at these places of the endless stream are; (n,) ascending."""
        epoch, row = self.order(places)
        group = self.row_group[row]
        drawn = below(hash32(_PUZZLE, self.seed, epoch, group), self.group_count[group])
        puzzle = self.group_start[group] + drawn
        example = self.puzzle_start[puzzle] + self.row_offset[row] % self.puzzle_count[puzzle]
        index = np.zeros_like(row)
        if self.num_aug != 0:
            h = hash32(_AUGMENTATION, self.seed, epoch, row)
            index = below(h, self.num_aug + 1) if self.num_aug > 0 else 1 + h
        return Plan(example, self.puzzle_id[puzzle], index)

    def fetch(self, examples: np.ndarray, on_device: list[Tensor]) -> tuple[Tensor, ...]:
        """Inputs and labels (n, L), labels -100 where ignored, and puzzle ids (n,), all int32.

        `on_device` holds the three parts of the plan there; the examples are needed here, too.
        """
        example, identifier, index = on_device
        inputs, labels = self.store.gather(examples, example)
        if self.augment is not None:
            inputs, labels = self.augment(inputs, labels, example, index, identifier)
        ids = embedding_rows(self.dataset, identifier, index)
        return inputs.int(), ignore(labels, self.dataset.ignore_label_id), ids


class TextSource:
    """Windows of a text: in every epoch they tile each shard from another place on."""

    def __init__(
        self,
        dataset: PuzzleDataset,
        *,
        seed: int,
        num_aug: int,
        device: torch.device,
        resident_bytes: int,
    ) -> None:
        if num_aug != 0:
            raise DataError(f"data.num_aug={num_aug}: a text has no augmentation; leave it out.")
        self.dataset, self.seed, self.length = dataset, seed, dataset.seq_len
        streams: list[TokenStream] = list(dataset.sets.values())
        self.store = WindowStore(streams, dataset, device, resident_bytes)
        sizes = np.concatenate([s.group_sizes for s in streams])  # (shards,) windows of each
        self.shard_of = np.repeat(np.arange(len(sizes)), sizes)  # (N,)
        self.window = np.arange(len(self.shard_of)) - (np.cumsum(sizes) - sizes)[self.shard_of]
        tokens = np.diff(self.store.first)
        self.slack = tokens - sizes * self.length  # (shards,) places that an epoch can begin at
        self.order = EpochOrder(len(self.shard_of), seed)

    @property
    def rows_per_epoch(self) -> int:
        """N: as many windows as fit without overlap."""
        return len(self.shard_of)

    def plan(self, places: np.ndarray) -> Plan:
        """What the rows at these places of the endless stream are; (n,) ascending."""
        epoch, row = self.order(places)
        shard = self.shard_of[row]
        shift = below(hash32(_SHIFT, self.seed, epoch, shard), self.slack[shard])
        start = self.store.first[shard] + shift + self.window[row] * self.length
        zeros = np.zeros_like(row)
        return Plan(start, zeros, zeros)

    def fetch(self, examples: np.ndarray, on_device: list[Tensor]) -> tuple[Tensor, ...]:
        """As `PuzzleSource.fetch`."""
        inputs, labels = self.store.gather(examples, on_device[0])
        ids = embedding_rows(self.dataset, on_device[1], on_device[2])
        return inputs.int(), ignore(labels, self.dataset.ignore_label_id), ids


Source = PuzzleSource | TextSource


def make_source(dataset: PuzzleDataset, **settings: object) -> Source:
    """The source that fits the dataset's sets."""
    is_text = isinstance(next(iter(dataset.sets.values())), TokenStream)
    return (TextSource if is_text else PuzzleSource)(dataset, **settings)


def embedding_rows(dataset: PuzzleDataset, identifiers: Tensor, indices: Tensor) -> Tensor:
    """Rows (n,) int32 of the puzzle embedding, for original identifiers and augmentations."""
    if dataset.identifiers_per_puzzle > 1:
        identifiers = identifiers + indices
    return (identifiers + dataset.first_identifier).int()


def ignore(labels: Tensor, ignore_label_id: int | None) -> Tensor:
    """Raw labels (B, L) → int32 with -100 where the label is the ignored one."""
    labels = labels.int()
    if ignore_label_id is None:
        return labels
    return labels.masked_fill(labels == ignore_label_id, IGNORED_LABEL)
