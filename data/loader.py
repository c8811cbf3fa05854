"""Batches as pure functions of (dataset, seed, step): nothing to save, nothing to restore.

Training is one endless stream of rows; of a mixture, rows of its parts in a fixed pattern. Ranks
take slices of the same global batch, so the stream does not depend on their number.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from data.augment import build_augmentation
from data.errors import DataError
from data.hashing import hash32
from data.puzzles import Part, PuzzleDataset, TokenStream
from data.sources import IGNORED_LABEL, Words, embedding_rows, ignore, make_source
from data.stores import RESIDENT_BYTES, TokenStore, WindowStore, to_device

_SUBSET, _MIXTURE, _VOTES = 0x04, 0x06, 0x07  # streams of the hash
# Tokens of inputs in batches that are made together: much on a GPU, what fits a cache on a CPU.
_BLOCK_TOKENS = {"cuda": 1 << 22, "cpu": 1 << 18}
_PATTERN = 4096  # rows after which the pattern of a mixture comes again


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


def mixture_pattern(weights: list[float], seed: int) -> np.ndarray:
    """(4096,) which part each row of a mixture comes from: shares as the weights, order by hash.

    Every part has one row at least.
    """
    wanted = np.asarray(weights) / np.sum(weights) * _PATTERN
    counts = np.maximum(1, np.floor(wanted).astype(int))
    while (missing := _PATTERN - counts.sum()) != 0:  # the largest remainders, one row each
        counts[np.argmax((wanted - counts) * np.sign(missing))] += np.sign(missing)
    order = np.argsort(hash32(_MIXTURE, seed, np.arange(_PATTERN)), kind="stable")
    return np.repeat(np.arange(len(counts)), counts)[np.argsort(order)]


class TrainLoader:
    """`batch(step)` for every step ≥ 0, on this rank; see the module's docstring.

    Args:
        dataset: a split that `read_dataset` returned.
        global_batch_size: rows of all ranks together; any size, larger than the dataset too.
        seed: decides order, puzzles and augmentations.
        num_aug: 0 none; N: augmentation index from 0..N, 0 the identity; -1: endless. The parts of
            a mixture have their own.
        rank, world_size: which slice of each batch is ours.
        device: where the batches live.
        resident_bytes: datasets up to this size are kept on the device.
        block_tokens: batches of neighbouring steps are made together, up to so many tokens, and
            handed out one by one: a small batch costs as much time as a large one.
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
        resident_bytes: int = RESIDENT_BYTES,
        block_tokens: int | None = None,
    ) -> None:
        self.global_batch_size = global_batch_size
        self.local = local_slice(global_batch_size, rank, world_size)
        self.device = torch.device(device)
        parts = dataset.parts or (Part(dataset, 1.0, num_aug),)
        self.sources = [
            make_source(
                part.dataset,
                seed=seed,
                num_aug=part.num_aug,
                device=self.device,
                resident_bytes=resident_bytes // len(parts),
                plan_here=len(parts) > 1,
            )
            for part in parts
        ]
        if block_tokens is None:
            block_tokens = _BLOCK_TOKENS.get(self.device.type, 0)
        rows = self.local.stop - self.local.start
        self.block_steps = max(1, block_tokens // (rows * dataset.seq_len))
        self._block: tuple[int, dict[str, Tensor]] | None = None  # its number, its rows
        self.pattern = mixture_pattern([part.weight for part in parts], seed)
        counts = np.bincount(self.pattern, minlength=len(parts))
        self.counts = counts  # (parts,) rows of each in a pattern
        place = np.arange(_PATTERN)[np.argsort(self.pattern, kind="stable")]
        self.before = np.empty(_PATTERN, np.int64)  # rows of the same part earlier in the pattern
        self.before[place] = np.concatenate([np.arange(n) for n in counts])

    @property
    def rows_per_epoch(self) -> int:
        """Rows of one pass over everything."""
        return sum(source.rows_per_epoch for source in self.sources)

    def plan(self, step: int) -> np.ndarray:
        """What this rank's rows of `step` are.

        (4, B/W) int64: example, puzzle identifier of the original, augmentation, part.
        """
        plan, part = self._plan(step, 1)
        if isinstance(plan[0], Tensor):
            plan = [p.cpu().numpy() for p in plan]
        return np.stack([*plan, part if part is not None else np.zeros_like(plan[0])])

    def _plan(self, step: int, steps: int) -> tuple[list[Words], np.ndarray | None]:
        """The plan of some steps' rows, (steps·B/W,) each, and the parts they are of."""
        first = step * self.global_batch_size + self.local.start
        last = (step + steps - 1) * self.global_batch_size + self.local.stop - 1
        source = self.sources[0]
        if len(self.sources) == 1:
            if source.plan_device is None:
                place = self._places(np.arange(step, step + steps), np.arange)
            else:
                arange = partial(torch.arange, device=source.plan_device)
                place = self._places(arange(step, step + steps), arange)
            return list(source.plan(place, first, last)), None
        place = self._places(np.arange(step, step + steps), np.arange)
        cycle, row = np.divmod(place, _PATTERN)
        part = self.pattern[row]
        place = cycle * self.counts[part] + self.before[row]  # in the part's own stream
        out = np.empty((3, len(part)), np.int64)
        for number, source in enumerate(self.sources):
            mine = part == number
            if mine.any():
                inside = place[mine]
                out[:, mine] = source.plan(inside, int(inside[0]), int(inside[-1]))
        return list(out), part

    def _places(self, steps: Words, arange: Callable[[int, int], Words]) -> Words:
        """Numbers in the endless stream of this rank's rows of `steps`."""
        rows = arange(self.local.start, self.local.stop)
        return (steps[:, None] * self.global_batch_size + rows).reshape(-1)

    def batch(self, step: int) -> dict[str, Tensor]:
        """`inputs`, `labels` (B/W, L) int32, labels -100 where ignored; `puzzle_ids` (B/W,) int32.

        A pure function of the loader's arguments and `step`; does not wait for the device. The
        tensors may be views of one another's storage: read them only.
        """
        number, place = divmod(step, self.block_steps)
        if self._block is None or self._block[0] != number:
            plan, part = self._plan(number * self.block_steps, self.block_steps)
            self._block = number, self._fetch(plan, part)
        rows = self.local.stop - self.local.start
        return {k: v[place * rows : (place + 1) * rows] for k, v in self._block[1].items()}

    def _fetch(self, plan: list[Words], part: np.ndarray | None) -> dict[str, Tensor]:
        """The rows of a plan."""
        names = ("inputs", "labels", "puzzle_ids")
        if part is None:
            if isinstance(plan[0], Tensor):
                fetched = self.sources[0].fetch(None, plan)
            else:
                on_device = to_device(np.stack(plan), self.device)
                fetched = self.sources[0].fetch(plan[0], list(on_device))
            return dict(zip(names, fetched, strict=True))
        order = np.argsort(part, kind="stable")  # rows of one part side by side
        sorted_plan = np.stack([*plan, np.argsort(order)])
        sorted_plan[:3] = sorted_plan[:3, order]
        *on_device, back = to_device(sorted_plan, self.device)
        fetched, first = [], 0
        for source, count in zip(self.sources, np.bincount(part), strict=False):
            rows = slice(first, first + count)
            if count:
                fetched.append(source.fetch(sorted_plan[0, rows], [t[rows] for t in on_device]))
            first += count
        return {
            name: torch.cat(pieces).index_select(0, back)
            for name, pieces in zip(names, zip(*fetched, strict=True), strict=True)
        }

    def close(self) -> None:
        """Nothing to give back; loaders with worker processes have something."""


class EvalLoader:
    """One pass over a set in its own order, in batches of one shape; iterate as often as you like.

    The last batch is filled with rows of padding: pad tokens, every label -100, the blank puzzle
    identifier. Every rank has the same number of batches.

    Args:
        dataset: a split that `read_dataset` returned.
        set_name: one of `dataset.sets`.
        batch_size: rows of all ranks together.
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
        self.batch_size = batch_size
        self.local = local_slice(batch_size, rank, world_size)
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
