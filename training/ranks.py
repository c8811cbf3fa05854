"""The processes of one evaluation, as torchrun starts them, and how they exchange results."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeVar

import torch.distributed as dist

from training.resolve import World

T = TypeVar("T")


@dataclass(frozen=True)
class Ranks:
    """This process among `size`."""

    rank: int = 0
    size: int = 1

    def gather(self, mine: T) -> list[T]:
        """What every rank has, in their order; every rank must call this. On the host."""
        if self.size == 1:
            return [mine]
        everyone: list[T | None] = [None] * self.size
        dist.all_gather_object(everyone, mine)
        return everyone


ALONE = Ranks()


@contextmanager
def joined(world: World) -> Iterator[Ranks]:
    """Join the other processes of `world` for a while (over gloo: results are small)."""
    if world.size == 1:
        yield ALONE
        return
    dist.init_process_group("gloo", rank=world.rank, world_size=world.size)
    try:
        yield Ranks(world.rank, world.size)
    finally:
        dist.destroy_process_group()
