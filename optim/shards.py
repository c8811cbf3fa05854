"""How a sharded optimizer lays its tensors out: flat buffers with a region for each rank."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

from optim.cuts import ALIGN, Cuts, share_out
from optim.homes import Place

T = TypeVar("T", bound=Tensor)  # such as a parameter

_BYTES = 8 << 20  # of a bucket: large enough for the bandwidth, small enough to begin early


class Piece(NamedTuple):
    """A part of an optimizer's state that this rank keeps."""

    param: Tensor  # whose state it is
    moment: str
    tensor: Tensor  # this rank's part, in place
    start: int | None  # its first element in the flattened moment; None: the whole
    shape: torch.Size  # of the whole moment


class Local(NamedTuple):
    """What one rank updates as one tensor."""

    tensor: Tensor  # a view of the bucket's parameters, with its gradient
    index: int | None  # the member it is (a part of); None: it runs over several, anywhere
    start: int  # its first element in that member
    stop: int


class Run(NamedTuple):
    """Elements of a bucket that one rank has."""

    rank: int
    start: int
    stop: int


@dataclass
class Bucket:
    """Tensors side by side in flat buffers, every element of which belongs to a rank.

    After `move`, what `cuts` have as `halves` is done in two: the rank where the state of an
    element is at home leads, the rank that the element belongs to follows.
    """

    members: list[Tensor]
    starts: list[int]  # first element of each
    cuts: list[Cuts] | None  # where each may be cut; None: anywhere, each rank has one equal run
    runs: list[Run]  # from the first to the last element
    size: int
    rank: int
    moved: list[Run] = field(default_factory=list)  # at home elsewhere, there
    homes: list[Run] = field(init=False)  # where gradients are reduced; `runs`, but for `moved`
    params: Tensor = field(init=False)  # the members become views of it
    grads: Tensor = field(init=False)  # likewise; their gradients become views of it
    mine: list[Tensor] = field(default_factory=list)  # sums of the gradients at home on this rank
    slots: list[Tensor] = field(default_factory=list)  # the gradient of each member
    local: list[Local] = field(default_factory=list)  # updated in one go
    leads: list[Local] = field(default_factory=list)
    follows: list[Local] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.homes = self.runs

    @property
    def own(self) -> list[Run]:
        """This rank's runs."""
        return [run for run in self.runs if run.rank == self.rank]

    def halved(self, index: int) -> bool:
        """Whether a member is updated in two halves."""
        return bool(self.moved and self.cuts[index].halves)

    def movable(self, number: int) -> Iterable[Place]:
        """Elements whose state may be at home anywhere; of this bucket, which is `number`."""
        for i, (p, start) in enumerate(zip(self.members, self.starts, strict=True)):
            for run in self.runs if self.cuts and self.cuts[i].halves else ():
                a, b = max(run.start, start), min(run.stop, start + room(p))
                if a < b:
                    yield Place(run.rank, number, i, a, b)

    def move(self, places: Iterable[Place]) -> None:
        """Let the state of these elements be at home there; before `take`."""
        self.moved = sorted((Run(p.rank, p.start, p.stop) for p in places), key=lambda r: r.start)
        self.homes, waiting = [], list(self.moved)
        for run in self.runs:
            start = run.start
            while waiting and waiting[0].start < run.stop:
                away = waiting.pop(0)
                self.homes += [run._replace(start=start, stop=away.start), away]
                start = away.stop
            self.homes.append(run._replace(start=start))
        self.homes = [home for home in self.homes if home.start < home.stop]

    @torch.no_grad()
    def take(self) -> None:
        """Make the members and their gradients views of the buffers.

        Raises:
            ValueError: for a member that is not contiguous; then nothing has changed.
        """
        for p in self.members:
            if not p.is_contiguous():
                raise ValueError(f"a parameter of shape {tuple(p.shape)} is not contiguous")
        like = self.members[0]
        self.params = torch.zeros(self.size, dtype=like.dtype, device=like.device)
        self.grads = torch.zeros_like(self.params)
        for p, start in zip(self.members, self.starts, strict=True):
            place, slot = (t[start : start + p.numel()] for t in (self.params, self.grads))
            place.copy_(p.reshape(-1))
            p.data = place.view(p.shape)
            self.slots.append(slot.view(p.shape))
            p.grad = self.slots[-1]
        # What is reduced to a rank stays where it is; reduce-scatter wants a place of its own.
        homes = [home for home in self.homes if home.rank == self.rank]
        self.mine = [self.grads[home.start : home.stop] for home in homes]
        if self.cuts is None:
            self.mine = [torch.zeros_like(mine) for mine in self.mine]
            self.local = self._anywhere(self.own[0], self.mine[0])
            return
        parts = [part for run in self.own for part in self._parts(run)]
        self.local = [part for part in parts if not self.halved(part.index)]
        self.follows = [part for part in parts if self.halved(part.index)]
        parts = [part for home in homes for part in self._parts(home)]
        self.leads = [part for part in parts if self.halved(part.index)]

    def _anywhere(self, run: Run, sums: Tensor) -> list[Local]:
        """What this rank updates as one, of the members that lie in its run."""
        size = min(run.stop, self.starts[-1] + self.members[-1].numel()) - run.start
        if size <= 0:
            return []
        part = self.params[run.start : run.start + size]
        part.grad = sums[:size]
        return [Local(part, None, 0, size)]

    def _parts(self, run: Run) -> Iterable[Local]:
        """The members, or parts of them, in one of this rank's runs."""
        for i, (p, start) in enumerate(zip(self.members, self.starts, strict=True)):
            a, b = max(run.start, start), min(run.stop, start + p.numel())
            if a < b:
                shape = _part_shape(p, a - start, b - start)
                part = self.params[a:b].view(shape)
                part.grad = self.grads[a:b].view(shape)
                yield Local(part, i, a - start, b - start)

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

    def pieces(self, part: Local, moment: str, value: Tensor) -> list[Piece]:
        """What `value`, a tensor of the state of `part`, is to the members."""
        if part.index is not None:
            return [self._piece(part, moment, value)]
        low = self.own[0].start
        found = []
        for p, start in zip(self.members, self.starts, strict=True):
            a, b = max(low, start), min(low + part.stop, start + p.numel())
            if a < b and value.ndim == 0:  # one count of steps, of all that run into this rank's
                found.append(Piece(p, moment, value, None, value.shape))
            elif a < b:
                found.append(Piece(p, moment, value[a - low : b - low], a - start, p.shape))
        return found

    def _piece(self, part: Local, moment: str, value: Tensor) -> Piece:
        p, cuts = self.members[part.index], self.cuts[part.index]
        if value.ndim == 0 or part.tensor.numel() == p.numel():
            return Piece(p, moment, value, None, value.shape)
        if value.shape == part.tensor.shape:
            return Piece(p, moment, value, part.start, p.shape)
        whole = torch.Size([cuts.block(p.numel())])
        return Piece(p, moment, value, cuts.block(part.start), whole)


def _part_shape(p: Tensor, start: int, stop: int) -> Sequence[int]:
    """The shape of a part: whole rows where it consists of them, else flat."""
    if stop - start == p.numel():
        return p.shape
    row = p.numel() // p.shape[0]
    return (-1,) if start % row or stop % row else (-1, *p.shape[1:])


def cut_anywhere(members: list[Tensor], rank: int, world: int) -> Bucket:
    """A bucket of one run for each rank, equally long; a tensor may lie in several."""
    rooms = [room(p) for p in members]
    size = _round(-(-sum(rooms) // world), members[0].element_size())
    starts = [sum(rooms[:i]) for i in range(len(rooms))]
    runs = [Run(r, r * size, (r + 1) * size) for r in range(world)]
    return Bucket(members, starts, None, runs, size * world, rank)


def cut_between(members: list[Tensor], cuts: list[Cuts], rank: int, loads: list[int]) -> Bucket:
    """A bucket whose runs end between tensors or where these may be cut.

    `loads` counts the state that each rank has, over several buckets.
    """
    order: list[int] = []
    starts: list[int] = []
    runs: list[Run] = []
    end = 0  # of the members laid out
    for span in share_out([p.numel() for p in members], cuts, loads):
        if span.start == 0:
            order.append(span.index)
            starts.append(end)
            end += room(members[span.index])
        cut = span.stop < members[span.index].numel()
        stop = starts[-1] + span.stop if cut else end
        if runs and runs[-1].rank == span.rank:
            runs[-1] = runs[-1]._replace(stop=stop)
        else:
            runs.append(Run(span.rank, runs[-1].stop if runs else 0, stop))
    ordered = [[some[i] for i in order] for some in (members, cuts)]
    return Bucket(ordered[0], starts, ordered[1], runs, end, rank)


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


def _round(elements: int, element_size: int) -> int:
    step = ALIGN // element_size
    return -(-elements // step) * step


def room(p: Tensor) -> int:
    """Elements that a tensor takes, with what aligns the next one."""
    return _round(p.numel(), p.element_size())
