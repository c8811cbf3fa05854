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
_MOST_ROWS = 2**31  # of an epoch: `below` draws from fewer

# Streams of the hash: one number per purpose (the augmentations use others).
_ORDER, _PUZZLE, _AUGMENTATION, _SHIFT = 0x01, 0x02, 0x03, 0x05


Words = np.ndarray | Tensor  # int64, on the host or on the device; both compute the same


class Plan(NamedTuple):
    """What some rows are, (rows,) int64 each."""

    examples: Words  # number in the split (of a text: the place of the first token)
    identifiers: Words  # puzzle identifier of the original
    indices: Words  # augmentation


class EpochOrder:
    """The order of N rows in every epoch, by hash; those in use are kept."""

    def __init__(self, rows: int, seed: int, device: torch.device | None) -> None:
        if rows >= _MOST_ROWS:
            raise DataError(f"The dataset has {rows} rows per epoch; 2^31 are too many.")
        self.rows, self.seed, self.device = rows, seed, device
        self._orders: dict[int, Words] = {}

    def __call__(self, places: Words, first: int, last: int) -> tuple[Words, Words]:
        """Numbers in the endless stream (n,), from `first` to `last` → epoch, row of the epoch."""
        epoch, position = places // self.rows, places % self.rows
        wanted = range(first // self.rows, last // self.rows + 1)
        orders = self._of(wanted)
        if len(wanted) <= 2:  # of a large dataset
            row = orders[0][position]
            if len(wanted) == 2:
                where = np.where if self.device is None else torch.where
                row = where(epoch == wanted[0], row, orders[1][position])
            return epoch, row
        join = np.concatenate if self.device is None else torch.cat
        return epoch, join(orders)[places - wanted[0] * self.rows]

    def _of(self, epochs: range) -> list[Words]:
        missing = [e for e in epochs if e not in self._orders]
        if missing:
            numbers = np.array(missing)[:, None], np.arange(self.rows)
            if self.device is None:
                keys = hash32(_ORDER, self.seed, *numbers)
                made = np.argsort(keys, axis=1, kind="stable")
            else:
                numbers = (
                    torch.arange(missing[0], missing[0] + len(missing), device=self.device),
                    torch.arange(self.rows, device=self.device),
                )
                made = hash32(_ORDER, self.seed, numbers[0][:, None], numbers[1])
                made = torch.argsort(made, dim=1, stable=True)
            self._orders |= dict(zip(missing, made, strict=True))
            for old in [e for e in self._orders if e < epochs[0] or e > epochs[-1]]:
                del self._orders[old]
        return [self._orders[e] for e in epochs]


def _plan_device(
    store: TokenStore | WindowStore, device: torch.device, plan_here: bool
) -> torch.device | None:
    """Where rows are planned: on a GPU if the tokens are there, else on the host (None)."""
    if plan_here or device.type != "cuda" or store.resident is None:
        return None
    return device


def _placed(tables: dict[str, np.ndarray], device: torch.device | None) -> dict[str, Words]:
    """Tables as int64, on the device unless that is None."""
    tables = {k: np.ascontiguousarray(v, dtype=np.int64) for k, v in tables.items()}
    if device is None:
        return tables
    return {k: torch.from_numpy(v).to(device) for k, v in tables.items()}


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
        plan_here: bool = False,
    ) -> None:
        self.dataset, self.seed, self.num_aug = dataset, seed, num_aug
        self._check_augmentation()
        sets: list[PuzzleSet] = list(dataset.sets.values())
        self.store = TokenStore(sets, dataset, device, resident_bytes)
        self.augment = None
        if num_aug != 0:
            self.augment = build_augmentation(dataset.augmentation, seed=seed, device=device)
        self.plan_device = _plan_device(self.store, device, plan_here)
        tables = _index_rows(sets)
        self.rows_per_epoch = len(tables["row_group"])  # every group, with one of its puzzles
        self.tables = _placed(tables, self.plan_device)
        self.order = EpochOrder(self.rows_per_epoch, seed, self.plan_device)

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

    def plan(self, places: Words, first: int, last: int) -> Plan:
        """What the rows at these places (n,) of the endless stream, first to last, are."""
        epoch, row = self.order(places, first, last)
        t = self.tables
        group = t["row_group"][row]
        drawn = below(hash32(_PUZZLE, self.seed, epoch, group), t["group_count"][group])
        puzzle = t["group_start"][group] + drawn
        example = t["puzzle_start"][puzzle] + t["row_offset"][row] % t["puzzle_count"][puzzle]
        index = row * 0
        if self.num_aug != 0:
            h = hash32(_AUGMENTATION, self.seed, epoch, row)
            index = below(h, self.num_aug + 1) if self.num_aug > 0 else 1 + h
        return Plan(example, t["puzzle_id"][puzzle], index)

    def fetch(self, examples: np.ndarray | None, on_device: list[Tensor]) -> tuple[Tensor, ...]:
        """Inputs and labels (n, L), labels -100 where ignored, and puzzle ids (n,), all int32.

        `on_device` holds the three parts of the plan there; where the tokens are not, the examples
        are needed on the host, too.
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
        plan_here: bool = False,
    ) -> None:
        if num_aug != 0:
            raise DataError(f"data.num_aug={num_aug}: a text has no augmentation; leave it out.")
        self.dataset, self.seed, self.length = dataset, seed, dataset.seq_len
        streams: list[TokenStream] = list(dataset.sets.values())
        self.store = WindowStore(streams, dataset, device, resident_bytes)
        sizes = np.concatenate([s.group_sizes for s in streams])  # (shards,) windows of each
        shard_of = np.repeat(np.arange(len(sizes)), sizes)  # (N,)
        self.rows_per_epoch = len(shard_of)  # as many windows as fit without overlap
        self.plan_device = _plan_device(self.store, device, plan_here)
        tables = {
            "shard_of": shard_of,
            "window": np.arange(len(shard_of)) - (np.cumsum(sizes) - sizes)[shard_of],
            "first": self.store.first,
            "slack": np.diff(self.store.first) - sizes * self.length,  # places to begin at
        }
        self.tables = _placed(tables, self.plan_device)
        self.order = EpochOrder(self.rows_per_epoch, seed, self.plan_device)

    def plan(self, places: Words, first: int, last: int) -> Plan:
        """What the rows at these places (n,) of the endless stream, first to last, are."""
        epoch, row = self.order(places, first, last)
        t = self.tables
        shard = t["shard_of"][row]
        shift = below(hash32(_SHIFT, self.seed, epoch, shard), t["slack"][shard])
        start = t["first"][shard] + shift + t["window"][row] * self.length
        return Plan(start, row * 0, row * 0)

    def fetch(self, examples: np.ndarray | None, on_device: list[Tensor]) -> tuple[Tensor, ...]:
        """As `PuzzleSource.fetch`."""
        inputs, labels = self.store.gather(examples, on_device[0])
        ids = embedding_rows(self.dataset, on_device[1], on_device[2])
        return inputs.int(), ignore(labels, self.dataset.ignore_label_id), ids


def _index_rows(sets: list[PuzzleSet]) -> dict[str, np.ndarray]:
    """Join the sets' indices: rows of an epoch → groups → puzzles → examples."""
    examples = np.cumsum([0] + [len(s) for s in sets])
    puzzles = np.cumsum([0] + [len(s.puzzle_identifiers) for s in sets])
    sizes = np.concatenate([s.group_sizes for s in sets])  # (groups,) rows of each group
    row_group = np.repeat(np.arange(len(sizes)), sizes)  # (N,)
    joined = list(zip(sets, examples, puzzles, strict=False))
    return {
        "row_group": row_group,
        "row_offset": np.arange(len(row_group)) - (np.cumsum(sizes) - sizes)[row_group],
        "group_start": np.concatenate([s.group_indices[:-1] + p for s, _, p in joined]),
        "group_count": np.concatenate([np.diff(s.group_indices) for s in sets]),
        "puzzle_start": np.concatenate([s.puzzle_indices[:-1] + e for s, e, _ in joined]),
        "puzzle_count": np.concatenate([np.diff(s.puzzle_indices) for s in sets]),
        "puzzle_id": np.concatenate([s.puzzle_identifiers for s in sets]),
    }


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
