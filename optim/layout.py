"""From the groups of an optimizer to what one rank of a sharded one updates."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from optim.cuts import Cuts, Divide
from optim.homes import even_out
from optim.shards import Bucket, Local, by_kind, chunks, cut_anywhere, cut_between

Group = dict[str, Any]
Parts = list[tuple[Bucket, Local]]


@dataclass
class Layout:
    """What is where, and the groups of this rank's share."""

    buckets: list[Bucket]
    leads: list[Group] = field(default_factory=list)  # the first halves of updates
    shares: list[Group] = field(default_factory=list)  # second halves, and all other updates
    source: dict[Tensor, int] = field(default_factory=dict)  # of a part, the number of its group
    # options that the groups of shares have to themselves
    unshared: set[str] = field(default_factory=lambda: {"params", "param_names"})

    def add(self, number: int, group: Group, buckets: Sequence[Bucket]) -> None:
        """Add what this rank has of group `number`, whose parameters are in `buckets`."""
        local, leads, follows = (
            [(b, part) for b in buckets for part in getattr(b, which)]
            for which in ("local", "leads", "follows")
        )
        if local:
            self.shares.append(self._group(number, group, local, {}))
        for parts, groups, half in ((leads, self.leads, 0), (follows, self.shares, 1)):
            if parts:
                bucket, part = parts[0]
                options = bucket.cuts[part.index].halves[half]
                groups.append(self._group(number, group, parts, options))

    def _group(self, number: int, group: Group, parts: Parts, options: Mapping[str, Any]) -> Group:
        """A group of parts of the parameters of `group`."""
        names = group.get("param_names") or [""] * len(group["params"])
        named = dict(zip(map(id, group["params"]), names, strict=True))
        own = {k: v for k, v in group.items() if k not in self.unshared}
        local: list[tuple[str, Tensor]] = []
        for bucket, part in parts:
            name = "" if part.index is None else named[id(bucket.members[part.index])]
            local.append((name, part.tensor))
            self.source[part.tensor] = number
            if part.index is not None:
                cuts = bucket.cuts[part.index]
                for key, value in cuts.options(part.start, part.stop).items():
                    own.setdefault(key, []).append(value)
        named_all = all(name for name, _ in local)
        return {**own, **options, "params": local if named_all else [part for _, part in local]}


def lay_out(
    groups: Sequence[Group], *, cut: bool, divide: Divide | None, rank: int, world: int
) -> Layout:
    """Make parameters and gradients views of flat buffers; see `ShardedOptimizer`.

    Raises:
        ValueError: for a parameter that is not contiguous.
    """
    loads = [0] * world
    found = [_buckets(group, cut, divide, rank, loads) for group in groups]
    layout = Layout([bucket for some in found for bucket in some])
    places = [place for i, b in enumerate(layout.buckets) for place in b.movable(i)]
    moved = even_out(places, loads)
    for number, bucket in enumerate(layout.buckets):
        bucket.move(place for place in moved if place.bucket == number)
        bucket.take()
        for cuts, p in zip(bucket.cuts or (), bucket.members, strict=False):
            layout.unshared |= cuts.options(0, p.numel()).keys()
    for number, (group, buckets) in enumerate(zip(groups, found, strict=True)):
        layout.add(number, group, buckets)
    return layout


def _buckets(
    group: Group, cut: bool, divide: Divide | None, rank: int, loads: list[int]
) -> list[Bucket]:
    """Where the parameters of a group lie; adds to `loads`, the state of each rank."""
    names = group.get("param_names") or [""] * len(group["params"])
    named = dict(zip(map(id, group["params"]), names, strict=True))
    options = {k: v for k, v in group.items() if k != "params"}
    found = []
    for members in by_kind(group["params"]):
        if cut:  # the last ones first: their gradients are there first
            found += [cut_anywhere(c, rank, len(loads)) for c in chunks(members[::-1])]
            continue
        cuts = [Cuts()] * len(members)
        if divide is not None:
            cuts = divide([(named[id(p)], p) for p in members], options)
        found.append(cut_between(members, cuts, rank, loads))
    return found
