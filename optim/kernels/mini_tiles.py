"""How Adam-mini's launches are cut: tiles of whole small blocks, and pieces of large ones."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from optim.partition import Segment

# Shapes of tiles: k for rows up to 2^k wide, as many as make a tile; LARGE_SHAPE for a piece of a
# large block; plus UNALIGNED where starts or widths are no multiples of 16. Those move element by
# element, which takes more registers, so they are a quarter as large.
SMALLEST, LARGE_SHAPE, UNALIGNED = 4, 15, 16


class MiniTiles:
    """Tiles of tensors with the given blocks; pieces of large blocks come first.

    Args:
        segments: per tensor.
        tile: elements of a tile, a power of two of at least 64.
        widest: elements of the widest block that one program takes whole, a power of two.
        device: where the kernels run.

    Attributes:
        tiles: (programs, 7) int64: tensor, first element, shape, row width, rows, first block of
            the tensor, number of the large block or -1.
        larges: (large blocks, 4) int64: first tile, tiles, elements, block of the tensor.
        counts: (tensors,) int32, tiles per tensor; an empty tensor still gets one.
        programs, large_programs, large_blocks: numbers of rows; the first `large_programs` tiles
            are pieces of large blocks.
        shapes: the bits SHAPES of `adam_mini_kernel`.
    """

    def __init__(
        self,
        segments: Sequence[Sequence[Segment]],
        tile: int,
        widest: int,
        device: torch.device,
    ) -> None:
        small, pieces, larges = [], [], []
        n_pieces = n_larges = 0
        for t, parts in enumerate(segments):
            start = block = 0
            for s in parts:
                odd = start % 16 or s.size % 16
                if s.size <= (tile // 4 if odd else widest):
                    small.append(_small_tiles(t, start, block, s, tile, bool(odd)))
                else:
                    unit = tile // 4 if start % 16 or (s.size % 16 and s.blocks > 1) else tile
                    rows, entries = _large_tiles(t, start, block, s, unit, n_pieces, n_larges)
                    pieces.append(rows)
                    larges.append(entries)
                    n_pieces += len(rows)
                    n_larges += len(entries)
                start += s.blocks * s.size
                block += s.blocks
            if start == 0:  # nothing to move, but a step to count
                small.append(torch.tensor([[t, 0, SMALLEST + UNALIGNED, 1, 0, 0, -1]]))
        table = torch.cat([*pieces, *small])
        self.programs, self.large_programs, self.large_blocks = len(table), n_pieces, n_larges
        self.shapes = sum(1 << int(k) for k in table[:, 2].unique())
        self.tiles = table.to(device)
        entries = torch.cat(larges) if larges else torch.zeros(1, 4, dtype=torch.int64)
        self.larges = entries.to(device)
        counts = torch.bincount(table[:, 0], minlength=len(segments))
        self.counts = counts.to(device, torch.int32)


def _columns(*columns: Tensor | int) -> Tensor:
    """An int64 table of these columns, numbers repeated."""
    n = next(len(c) for c in columns if isinstance(c, Tensor))
    whole = [c if isinstance(c, Tensor) else torch.full((n,), c) for c in columns]
    return torch.stack([c.to(torch.int64) for c in whole], dim=1)


def _small_tiles(t: int, start: int, block: int, s: Segment, tile: int, odd: bool) -> Tensor:
    shape = max(SMALLEST, (s.size - 1).bit_length())
    step = max(1, (tile // 4 if odd else tile) >> shape)
    first = torch.arange(0, s.blocks, step)
    rows = torch.clamp(s.blocks - first, max=step)
    shape += UNALIGNED * odd
    return _columns(t, start + first * s.size, shape, s.size, rows, block + first, -1)


def _large_tiles(
    t: int, start: int, block: int, s: Segment, unit: int, pieces: int, larges: int
) -> tuple[Tensor, Tensor]:
    """Pieces of `unit` elements and one or two of what is left: a multiple of 16, and the rest."""
    inside = torch.arange(0, s.size, unit)
    widths = torch.clamp(s.size - inside, max=unit)
    last, rest = int(widths[-1]), int(widths[-1]) % 16
    if rest and last > rest:
        widths[-1] = last - rest
        inside = torch.cat([inside, torch.tensor([s.size - rest])])
        widths = torch.cat([widths, torch.tensor([rest])])
    each = len(inside)
    number = torch.arange(s.blocks).repeat_interleave(each)
    first = start + number * s.size + inside.repeat(s.blocks)
    width = widths.repeat(s.blocks)
    odd = ((first % 16 != 0) | (width % 16 != 0)).to(torch.int64)
    shape = LARGE_SHAPE + UNALIGNED * odd
    rows = _columns(t, first, shape, width, 1, block + number, larges + number)
    which = torch.arange(s.blocks)
    return rows, _columns(pieces + which * each, each, s.size, block + which)
