"""A training loader whose batches are made ahead by worker processes.

`batch(step)` gives what `TrainLoader.batch(step)` gives, for any number of workers: a batch is a
pure function of the step, so it does not matter who makes it. Workers open the dataset again by
its path, so that memory maps are their own; on CUDA the batches come through pinned memory.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from dataclasses import replace
from itertools import count
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from data.format import read_dataset
from data.loader import TrainLoader, local_slice
from data.puzzles import PuzzleDataset
from data.stores import RESIDENT_BYTES

_CPU = torch.device("cpu")
_PREFETCH = 4  # batches that each worker is ahead


class _Batches(Dataset):
    """step → batch, on the CPU. What is sent to a worker is the path, not the data."""

    def __init__(self, dataset: PuzzleDataset, settings: dict[str, Any]) -> None:
        self.dataset, self.settings = dataset, settings
        self.loader: TrainLoader | None = None

    def __getstate__(self) -> dict[str, Any]:
        dataset = self.dataset
        if dataset.path is not None:
            dataset = replace(dataset, sets={}, parts=())
        return {"dataset": dataset, "settings": self.settings, "loader": None}

    def __getitem__(self, step: int) -> dict[str, Tensor]:
        if self.loader is None:
            dataset = self.dataset
            if dataset.path is not None:
                dataset = read_dataset(dataset.path, dataset.split, verify=False)
            self.loader = TrainLoader(dataset, device=_CPU, **self.settings)
        return self.loader.batch(step)


class _Steps(Sampler):
    """first, first + 1, … without end."""

    def __init__(self, first: int) -> None:
        self.first = first

    def __iter__(self) -> Iterator[int]:
        return count(self.first)


class WorkerLoader:
    """`batch(step)` from worker processes; made for steps in order, right for any.

    Args:
        num_workers: processes, 1 at least.
        All others are those of `TrainLoader`.
    """

    def __init__(
        self,
        dataset: PuzzleDataset,
        *,
        num_workers: int,
        global_batch_size: int,
        rank: int = 0,
        world_size: int = 1,
        device: torch.device,
        resident_bytes: int = RESIDENT_BYTES,
        **settings: Any,
    ) -> None:
        self.num_workers, self.device = num_workers, torch.device(device)
        self.local = local_slice(global_batch_size, rank, world_size)
        settings |= {"global_batch_size": global_batch_size, "rank": rank}
        settings |= {"world_size": world_size, "resident_bytes": resident_bytes}
        settings["block_tokens"] = 0  # neighbouring steps are made by different workers
        self.batches = _Batches(dataset, settings)
        self.next_step: int | None = None
        self.iterator: Iterator[dict[str, Tensor]] | None = None

    def batch(self, step: int) -> dict[str, Tensor]:
        """As `TrainLoader.batch`; another step than the next one starts the workers anew."""
        if self.iterator is None or step != self.next_step:
            self.close()
            with warnings.catch_warnings():  # more workers than cores are allowed
                warnings.filterwarnings("ignore", message="This DataLoader will create")
                loader = DataLoader(
                    self.batches,
                    batch_size=None,
                    sampler=_Steps(step),
                    num_workers=self.num_workers,
                    prefetch_factor=_PREFETCH,
                    pin_memory=self.device.type == "cuda",
                    generator=torch.Generator(),  # the global one is left alone
                )
                self.iterator = iter(loader)
        self.next_step = step + 1
        batch = next(self.iterator)
        if self.device.type == "cpu":
            return batch
        return {k: v.to(self.device, non_blocking=True) for k, v in batch.items()}

    def close(self) -> None:
        """End the workers."""
        self.iterator = None


def make_train_loader(
    dataset: PuzzleDataset, *, num_workers: int = 0, **settings: Any
) -> TrainLoader | WorkerLoader:
    """A loader in this process (on the device when the data are small), or with workers."""
    if num_workers == 0:
        return TrainLoader(dataset, **settings)
    return WorkerLoader(dataset, num_workers=num_workers, **settings)
