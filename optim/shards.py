"""How a sharded optimizer lays its tensors out: flat buffers with a region for each rank."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TypeVar

import torch
from torch import Tensor

T = TypeVar("T", bound=Tensor)  # such as a parameter

_BYTES = 8 << 20  # of a bucket: large enough for the bandwidth, small enough to begin early
_ALIGN = 256  # bytes between the starts of two tensors, at least what kernels like


@dataclass
class Bucket:
    """Tensors side by side in flat buffers, which consist of a region for each rank, in order."""

    members: list[Tensor]
    starts: list[int]  # first element of each
    owners: list[int] | None  # the rank that has each; None: they are cut anywhere
    regions: list[int]  # elements of each rank's; all equal where tensors are cut
    params: Tensor  # (sum(regions),); the members become views of it
    grads: Tensor  # likewise; their gradients become views of it
    mine: Tensor  # (regions[rank],) sums of the gradients of this rank's region
    rank: int
    slots: list[Tensor] = field(default_factory=list)  # the gradient of each member
    # what is updated here, views with gradients; each with the member that it is the whole of
    local: list[tuple[Tensor, Tensor | None]] = field(default_factory=list)

    def start(self, rank: int) -> int:
        """First element of a rank's region."""
        return sum(self.regions[:rank])

    @torch.no_grad()
    def take(self) -> None:
        """Make the members and their gradients views of the buffers.

        Raises:
            ValueError: for a member that is not contiguous; then nothing has changed.
        """
        for p in self.members:
            if not p.is_contiguous():
                raise ValueError(f"a parameter of shape {tuple(p.shape)} is not contiguous")
        for p, start in zip(self.members, self.starts, strict=True):
            place, slot = (t[start : start + p.numel()] for t in (self.params, self.grads))
            place.copy_(p.reshape(-1))
            p.data = place.view(p.shape)
            self.slots.append(slot.view(p.shape))
            p.grad = self.slots[-1]
        self.local = self._local(self.rank)

    def _local(self, rank: int) -> list[tuple[Tensor, Tensor | None]]:
        low = self.start(rank)
        if self.owners is None:
            end = self.starts[-1] + self.members[-1].numel()
            size = min(self.regions[rank], end - low)
            places = [(low, size, (size,), None)] if size > 0 else []
        else:
            every = zip(self.members, self.starts, self.owners, strict=True)
            places = [(s, p.numel(), p.shape, p) for p, s, owner in every if owner == rank]
        found = []
        for start, size, shape, member in places:
            part = self.params[start : start + size].view(shape)
            part.grad = self.mine[start - low : start - low + size].view(shape)
            found.append((part, member))
        return found

    def mend(self, index: int) -> None:
        """Take a member's gradient back where someone else has made or removed it."""
        p, slot = self.members[index], self.slots[index]
        if p.grad is None:
            slot.zero_()
        elif p.grad.data_ptr() != slot.data_ptr():
            slot.copy_(p.grad.detach())
        else:
            return
        p.grad = slot


def cut_anywhere(members: list[Tensor], rank: int, world: int) -> Bucket:
    """A bucket of equal regions; a tensor may lie in several."""
    rooms = [room(p) for p in members]
    region = _round(-(-sum(rooms) // world), members[0].element_size())
    starts = [sum(rooms[:i]) for i in range(len(rooms))]
    params, grads = _buffers(members[0], region * world)
    # reduce-scatter wants a place of its own for what it brings
    mine = torch.zeros_like(grads[:region])
    return Bucket(members, starts, None, [region] * world, params, grads, mine, rank)


def whole_tensors(members: list[Tensor], rank: int, world: int, loads: list[int]) -> Bucket:
    """A bucket in which each tensor belongs to one rank: the largest first, to the emptiest.

    `loads` counts what each rank has, over several buckets.
    """
    rooms = [room(p) for p in members]
    owners = [0] * len(rooms)
    for i in sorted(range(len(rooms)), key=lambda i: -rooms[i]):
        owners[i] = min(range(world), key=lambda r: (loads[r], r))
        loads[owners[i]] += rooms[i]
    inside, regions = [0] * len(rooms), [0] * world
    for i, (owner, size) in enumerate(zip(owners, rooms, strict=True)):
        inside[i] = regions[owner]
        regions[owner] += size
    starts = [sum(regions[:o]) + s for o, s in zip(owners, inside, strict=True)]
    params, grads = _buffers(members[0], sum(regions))
    low = sum(regions[:rank])
    mine = grads[low : low + regions[rank]]  # what is reduced to a rank stays where it is
    return Bucket(members, starts, owners, regions, params, grads, mine, rank)


def by_kind(params: Sequence[T]) -> list[list[T]]:
    """Groups of one dtype and device, in order."""
    kinds: dict[tuple[torch.dtype, torch.device], list[T]] = {}
    for p in params:
        kinds.setdefault((p.dtype, p.device), []).append(p)
    return list(kinds.values())


def chunks(params: Sequence[T]) -> list[list[T]]:
    """Neighbours, in groups of about `_BYTES`."""
    groups: list[list[T]] = [[]]
    size = 0
    for p in params:
        if size >= _BYTES:
            groups.append([])
            size = 0
        groups[-1].append(p)
        size += room(p) * p.element_size()
    return [group for group in groups if group]


def _buffers(like: Tensor, size: int) -> tuple[Tensor, Tensor]:
    params = torch.zeros(size, dtype=like.dtype, device=like.device)
    return params, torch.zeros_like(params)


def _round(elements: int, element_size: int) -> int:
    step = _ALIGN // element_size
    return -(-elements // step) * step


def room(p: Tensor) -> int:
    """Elements that a tensor takes, with what aligns the next one."""
    return _round(p.numel(), p.element_size())
