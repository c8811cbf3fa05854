"""Batches of one set for evaluation."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from data.augment import build_augmentation
from data.errors import DataError
from data.hashing import hash32
from data.loader import local_slice, one_thread
from data.puzzles import PuzzleDataset, TokenStream
from data.sources import IGNORED_LABEL, embedding_rows, ignore
from data.stores import RESIDENT_BYTES, TokenStore, WindowStore, to_device

_SUBSET, _VOTES = 0x04, 0x07  # streams of the hash


class EvalLoader:
    """One pass over a set in its own order, in batches of one shape; iterate as often as you like.

    The rows are spread evenly over as few batches as they need. What is missing in the last one is
    filled with rows of padding: pad tokens, every label -100, the blank puzzle identifier. Every
    rank has the same number of batches.

    Args:
        dataset: a split that `read_dataset` returned.
        set_name: one of `dataset.sets`.
        batch_size: rows of all ranks together, at most.
        max_examples: evaluate a seeded subset of so many rows, in the set's order; None: all.
        seed: decides the subset.
        num_aug: rows of each example beside the original: augmentations that have a puzzle
            identifier of their own; None: all of them.
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
        num_aug: int | None = None,
        resident_bytes: int = RESIDENT_BYTES,
    ) -> None:
        if set_name not in dataset.sets:
            raise DataError(f"There is no set {set_name!r}; the dataset has {list(dataset.sets)}.")
        if max_examples is not None and max_examples < 1:
            raise DataError(f"max_examples={max_examples} must be at least 1.")
        arrays = dataset.sets[set_name]
        self.dataset, self.arrays = dataset.part_of(set_name), arrays
        self.device = torch.device(device)
        args = ([arrays], self.dataset, self.device, resident_bytes)
        if isinstance(arrays, TokenStream):
            self.store: Any = WindowStore(*args)
            self.rows = np.concatenate([
                first + np.arange(0, len(shard) - 1, arrays.seq_len)
                for first, shard in zip(self.store.first[:-1], arrays.shards, strict=True)
            ])  # fmt: skip
            self.puzzle_id = np.zeros(len(arrays), np.int64)
        else:
            self.store = TokenStore(*args)
            self.rows = np.arange(len(arrays))
            examples = np.diff(arrays.puzzle_indices)
            self.puzzle_id = np.repeat(arrays.puzzle_identifiers, examples).astype(np.int64)
        most = self.dataset.identifiers_per_puzzle - 1
        self.num_aug = most if num_aug is None else min(num_aug, most)
        self.augment = None
        if self.num_aug > 0:
            self.augment = build_augmentation(
                self.dataset.augmentation, seed=seed, device=self.device, training=False
            )
        # Rows in the order of evaluation: example of the set, and augmentation of it.
        self.indices, self.augmentations = self._choose(len(arrays), max_examples, seed)
        rows = len(self.indices)
        each = -(-rows // max(-(-rows // batch_size), 1))  # of as few batches as there can be
        self.batch_size = min(-(-each // world_size) * world_size, batch_size)
        self.local = local_slice(self.batch_size, rank, world_size)

    def _choose(
        self, examples: int, max_examples: int | None, seed: int
    ) -> tuple[np.ndarray, np.ndarray]:
        """All rows, or a subset that is spread evenly over the examples, originals first."""
        each = self.num_aug + 1
        count = examples * each
        if max_examples is None or max_examples >= count:
            number = np.arange(count)
            return number // each, number % each
        keys = hash32(_SUBSET, seed, np.arange(examples))
        if max_examples <= examples:
            chosen = np.sort(np.argsort(keys, kind="stable")[:max_examples])
            return chosen, np.zeros_like(chosen)
        index = np.tile(np.arange(each), (examples, 1))
        votes = hash32(_VOTES, seed, np.arange(examples)[:, None], index[:, 1:])
        index[:, 1:] = 1 + np.argsort(votes, axis=1, kind="stable")
        share, left = divmod(max_examples, examples)
        counts = np.full(examples, share)
        counts[np.argsort(keys, kind="stable")[:left]] += 1
        taken = np.arange(each) < counts[:, None]
        example = np.repeat(np.arange(examples), counts)
        order = np.lexsort((index[taken], example))
        return example, index[taken][order]

    def __len__(self) -> int:
        """Number of batches."""
        return -(-len(self.indices) // self.batch_size)

    def _rows_of(self, number: int, of: np.ndarray) -> np.ndarray:
        out = np.full(self.batch_size, -1, np.int64)
        chosen = of[number * self.batch_size : (number + 1) * self.batch_size]
        out[: len(chosen)] = chosen
        return out[self.local]

    def batch_indices(self, number: int) -> np.ndarray:
        """(B/W,) which example of the set each row of a batch is on this rank; -1: padding."""
        return self._rows_of(number, self.indices)

    def batch_augmentations(self, number: int) -> np.ndarray:
        """(B/W,) which augmentation of its example each row is; -1: padding."""
        return self._rows_of(number, self.augmentations)

    def batch(self, number: int) -> dict[str, Tensor]:
        """The batch of this rank, as `TrainLoader.batch` returns it."""
        with one_thread(self.device):
            return self._batch(number)

    def _batch(self, number: int) -> dict[str, Tensor]:
        dataset, example = self.dataset, self.batch_indices(number)
        padding = example < 0
        example = np.where(padding, 0, example)
        rows = self.rows[example]
        index = np.where(padding, 0, self.batch_augmentations(number))
        ids = np.where(padding, dataset.blank_identifier_id, self.puzzle_id[example])
        plan = np.stack([rows, ids, index, padding])
        device_rows, identifiers, indices, padded = to_device(plan, self.device)
        inputs, labels = self.store.gather(rows, device_rows)
        if self.augment is not None:
            inputs, labels = self.augment(inputs, labels, device_rows, indices, identifiers)
        padded = padded.bool()[:, None]
        return {
            "inputs": inputs.int().masked_fill(padded, dataset.pad_id),
            "labels": ignore(labels, dataset.ignore_label_id).masked_fill(padded, IGNORED_LABEL),
            "puzzle_ids": embedding_rows(dataset, identifiers, indices),
        }

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        return (self.batch(number) for number in range(len(self)))
