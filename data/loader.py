"""Batches as pure functions of (dataset, seed, step): nothing to save, nothing to restore.

Training is one endless stream of rows; of a mixture, rows of its parts in a fixed pattern. Ranks
take slices of the same global batch, so the stream does not depend on their number.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

import numpy as np
import torch
from torch import Tensor

from data.errors import DataError
from data.hashing import hash32
from data.puzzles import Part, PuzzleDataset
from data.sources import Words, make_source
from data.stores import RESIDENT_BYTES, to_device

_MIXTURE = 0x06  # stream of the hash
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


@contextmanager
def one_thread(device: torch.device) -> Iterator[None]:
    """Keep torch to one thread on a CPU: on a busy machine several wait for each other, and a
    batch takes up to a hundred times longer; on an idle one they gain a quarter.
    """
    threads = torch.get_num_threads()
    if device.type != "cpu" or threads == 1:
        yield
        return
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


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
            with one_thread(self.device):
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
