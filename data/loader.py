"""Batches as pure functions of (dataset, seed, step): nothing to save, nothing to restore.

Training is one endless stream of rows: row i belongs to epoch i // N and takes place i mod N in
that epoch's order. Which puzzle of its group and which augmentation a row shows is a hash of
(seed, epoch, group or row). Ranks take slices of the same global batch, so the stream does not
depend on their number.
"""

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from data.augment import build_augmentation
from data.errors import DataError
from data.hashing import below, hash32
from data.puzzles import PuzzleDataset, PuzzleSet

IGNORED_LABEL = -100
_RESIDENT_BYTES = 1 << 30  # token arrays up to this size are kept on the device
_CACHED_EPOCHS = 4

# Streams of the hash: one number per purpose (the augmentations use others).
_ORDER, _PUZZLE, _AUGMENTATION, _SUBSET = 0x01, 0x02, 0x03, 0x04


class TokenStore:
    """Token grids of one or more sets behind one row number; on the device when small."""

    def __init__(
        self,
        sets: list[PuzzleSet],
        dataset: PuzzleDataset,
        device: torch.device,
        resident_bytes: int = _RESIDENT_BYTES,
    ) -> None:
        self.device = device
        self.first = np.cumsum([0] + [len(s) for s in sets])  # (sets + 1,) first row of each set
        self.arrays = {"inputs": [s.inputs for s in sets], "labels": [s.labels for s in sets]}
        # uint8 holds the tokens of the grid tasks; indexing wider unsigned types is not supported.
        largest = max(dataset.vocab_size - 1, dataset.ignore_label_id or 0)
        small = largest < 256 and (dataset.ignore_label_id or 0) >= 0
        self.dtype = np.uint8 if small else np.int32
        size = 2 * int(self.first[-1]) * dataset.seq_len * np.dtype(self.dtype).itemsize
        self.resident: dict[str, Tensor] | None = None
        if size <= resident_bytes:
            self.resident = {
                key: torch.from_numpy(
                    np.concatenate([np.asarray(a, dtype=self.dtype) for a in arrays])
                ).to(device)
                for key, arrays in self.arrays.items()
            }

    def gather(self, rows: np.ndarray, device_rows: Tensor) -> tuple[Tensor, Tensor]:
        """Tokens of `rows` (B,), which are given on both sides: inputs, labels (B, L), raw ids."""
        if self.resident is not None:
            return tuple(
                self.resident[key].index_select(0, device_rows) for key in ("inputs", "labels")
            )
        return tuple(to_device(self._read(key, rows), self.device) for key in ("inputs", "labels"))

    def _read(self, key: str, rows: np.ndarray) -> np.ndarray:
        arrays = self.arrays[key]
        which = np.searchsorted(self.first, rows, side="right") - 1
        out = np.empty((len(rows), arrays[0].shape[1]), self.dtype)
        for index in np.unique(which):
            mine = which == index
            out[mine] = arrays[index][rows[mine] - self.first[index]]
        return out


def to_device(array: np.ndarray, device: torch.device) -> Tensor:
    """Copy to the device; on CUDA from pinned memory and without waiting for it."""
    tensor = torch.from_numpy(array)
    if device.type != "cuda":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)


def local_slice(global_batch_size: int, rank: int, world_size: int) -> slice:
    """Rows of a global batch that belong to `rank`.

    Raises:
        DataError: the batch does not divide by the number of ranks.
    """
    if global_batch_size < 1 or global_batch_size % world_size:
        raise DataError(
            f"global_batch_size={global_batch_size} must be a positive multiple of the number of "
            f"ranks ({world_size})."
        )
    size = global_batch_size // world_size
    return slice(rank * size, (rank + 1) * size)


def puzzle_of_examples(arrays: PuzzleSet) -> np.ndarray:
    """(examples,) puzzle number of every example."""
    return np.repeat(np.arange(len(arrays.puzzle_identifiers)), np.diff(arrays.puzzle_indices))


class TrainLoader:
    """`batch(step)` for every step ≥ 0, on this rank; see the module's docstring.

    Args:
        dataset: a split that `read_dataset` returned.
        global_batch_size: rows of all ranks together; any size, larger than the dataset too.
        seed: decides order, puzzles and augmentations.
        num_aug: 0 none; N: augmentation index from 0..N, 0 the identity; -1: endless.
        rank, world_size: which slice of each batch is ours.
        device: where the batches live.
        resident_bytes: datasets up to this size are kept on the device.
    """

    def __init__(
        self,
        dataset: PuzzleDataset,
        *,
        global_batch_size: int,
        seed: int,
        num_aug: int = 0,
        rank: int = 0,
        world_size: int = 1,
        device: torch.device,
        resident_bytes: int = _RESIDENT_BYTES,
    ) -> None:
        if num_aug != 0 and dataset.augmentation is None:
            raise DataError(
                f"data.num_aug={num_aug}: this dataset has no augmentation; set data.num_aug=0."
            )
        self.global_batch_size, self.seed, self.num_aug = global_batch_size, seed, num_aug
        self.local = local_slice(global_batch_size, rank, world_size)
        self.device = torch.device(device)
        sets = list(dataset.sets.values())
        self.store = TokenStore(sets, dataset, self.device, resident_bytes)
        self.ignore_label_id = dataset.ignore_label_id
        self.augment = None
        if num_aug != 0:
            self.augment = build_augmentation(dataset.augmentation, seed=seed, device=self.device)
        self._index_rows(sets)
        self._orders: dict[int, np.ndarray] = {}

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

    def _order(self, epoch: int) -> np.ndarray:
        """(N,) the rows in the order of this epoch; cached, as batches come in order."""
        if epoch not in self._orders:
            if len(self._orders) >= _CACHED_EPOCHS:
                self._orders.pop(min(self._orders))
            keys = hash32(_ORDER, self.seed, epoch, np.arange(self.rows_per_epoch))
            self._orders[epoch] = np.argsort(keys, kind="stable")
        return self._orders[epoch]

    def plan(self, step: int) -> np.ndarray:
        """What this rank's rows of `step` are: (3, B/W) int64 example, puzzle id, augmentation."""
        place = step * self.global_batch_size + np.arange(self.local.start, self.local.stop)
        epoch, position = np.divmod(place, self.rows_per_epoch)
        row = np.empty_like(place)
        for e in range(int(epoch[0]), int(epoch[-1]) + 1):
            here = epoch == e
            row[here] = self._order(e)[position[here]]
        group = self.row_group[row]
        drawn = below(hash32(_PUZZLE, self.seed, epoch, group), self.group_count[group])
        puzzle = self.group_start[group] + drawn
        example = self.puzzle_start[puzzle] + self.row_offset[row] % self.puzzle_count[puzzle]
        index = np.zeros_like(row)
        if self.num_aug != 0:
            h = hash32(_AUGMENTATION, self.seed, epoch, row)
            index = below(h, self.num_aug + 1) if self.num_aug > 0 else 1 + h
        return np.stack([example, self.puzzle_id[puzzle], index])

    def batch(self, step: int) -> dict[str, Tensor]:
        """`inputs`, `labels` (B/W, L) int32, labels -100 where ignored; `puzzle_ids` (B/W,) int32.

        A pure function of the loader's arguments and `step`; does not wait for the device.
        """
        plan = self.plan(step)
        example, puzzle_ids, index = to_device(plan, self.device)
        inputs, labels = self.store.gather(plan[0], example)
        if self.augment is not None:
            inputs, labels = self.augment(inputs, labels, example, index)
        return {
            "inputs": inputs.int(),
            "labels": ignore(labels, self.ignore_label_id),
            "puzzle_ids": puzzle_ids.int(),
        }


def ignore(labels: Tensor, ignore_label_id: int | None) -> Tensor:
    """Raw labels (B, L) → int32 with -100 where the label is the ignored one."""
    labels = labels.int()
    if ignore_label_id is None:
        return labels
    return labels.masked_fill(labels == ignore_label_id, IGNORED_LABEL)


class EvalLoader:
    """One pass over a set in its own order, in batches of one shape; iterate as often as you like.

    The last batch is filled with rows of padding: pad tokens, every label -100, the blank puzzle
    identifier. Every rank has the same number of batches.

    Args:
        dataset: a split that `read_dataset` returned.
        set_name: one of `dataset.sets`.
        batch_size: rows of all ranks together.
        max_examples: evaluate a seeded subset of this size, in the set's order; None: all.
        seed: decides the subset.
    """

    def __init__(
        self,
        dataset: PuzzleDataset,
        *,
        set_name: str,
        batch_size: int,
        rank: int = 0,
        world_size: int = 1,
        device: torch.device,
        max_examples: int | None = None,
        seed: int = 0,
        resident_bytes: int = _RESIDENT_BYTES,
    ) -> None:
        if set_name not in dataset.sets:
            raise DataError(f"There is no set {set_name!r}; the dataset has {list(dataset.sets)}.")
        if max_examples is not None and max_examples < 1:
            raise DataError(f"max_examples={max_examples} must be at least 1.")
        arrays = dataset.sets[set_name]
        self.dataset, self.arrays = dataset, arrays
        self.batch_size = batch_size
        self.local = local_slice(batch_size, rank, world_size)
        self.device = torch.device(device)
        self.store = TokenStore([arrays], dataset, self.device, resident_bytes)
        self.puzzle_id = arrays.puzzle_identifiers[puzzle_of_examples(arrays)].astype(np.int64)
        self.indices = np.arange(len(arrays))  # examples of the set, in the order of evaluation
        if max_examples is not None and max_examples < len(arrays):
            keys = hash32(_SUBSET, seed, self.indices)
            self.indices = np.sort(np.argsort(keys, kind="stable")[:max_examples])

    def __len__(self) -> int:
        """Number of batches."""
        return -(-len(self.indices) // self.batch_size)

    def batch_indices(self, number: int) -> np.ndarray:
        """(B/W,) which example of the set each row of a batch is on this rank; -1: padding."""
        out = np.full(self.batch_size, -1, np.int64)
        chosen = self.indices[number * self.batch_size : (number + 1) * self.batch_size]
        out[: len(chosen)] = chosen
        return out[self.local]

    def batch(self, number: int) -> dict[str, Tensor]:
        """The batch of this rank, as `TrainLoader.batch` returns it."""
        example = self.batch_indices(number)
        padding = example < 0
        rows = np.where(padding, 0, example)
        ids = np.where(padding, self.dataset.blank_identifier_id, self.puzzle_id[rows])
        device_rows, puzzle_ids, padded = to_device(np.stack([rows, ids, padding]), self.device)
        inputs, labels = self.store.gather(rows, device_rows)
        padded = padded.bool()[:, None]
        return {
            "inputs": inputs.int().masked_fill(padded, self.dataset.pad_id),
            "labels": ignore(labels, self.dataset.ignore_label_id).masked_fill(
                padded, IGNORED_LABEL
            ),
            "puzzle_ids": puzzle_ids.int(),
        }

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        return (self.batch(number) for number in range(len(self)))
