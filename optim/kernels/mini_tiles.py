"""How Adam-mini's launches are cut: tiles of whole small blocks, and pieces of large ones."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from optim.partition import Segment

SMALLEST = 4  # log2 of the narrowest row of a tile
LARGE_SHAPE, UNALIGNED = 15, 16  # see `adam_mini_kernel`


class MiniTiles:
    """Tiles of tensors with the given blocks; pieces of large blocks come first.

    Args:
        segments: per tensor.
        tile: elements of a tile, a power of two of at most 2¹⁴.
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
        self, segments: Sequence[Sequence[Segment]], tile: int, device: torch.device
    ) -> None:
        small, pieces, larges = [], [], []
        n_pieces = n_larges = 0
        for t, parts in enumerate(segments):
            start = block = 0
            for s in parts:
                if s.size <= tile:
                    small.append(_small_tiles(t, start, block, s, tile))
                else:
                    rows, entries = _large_tiles(t, start, block, s, tile, n_pieces, n_larges)
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


def _small_tiles(t: int, start: int, block: int, s: Segment, tile: int) -> Tensor:
    shape = max(SMALLEST, (s.size - 1).bit_length())
    step = tile >> shape
    first = torch.arange(0, s.blocks, step)
    rows = torch.clamp(s.blocks - first, max=step)
    if s.size % 16 or start % 16:
        shape += UNALIGNED
    return _columns(t, start + first * s.size, shape, s.size, rows, block + first, -1)


def _large_tiles(
    t: int, start: int, block: int, s: Segment, tile: int, pieces: int, larges: int
) -> tuple[Tensor, Tensor]:
    each = -(-s.size // tile)
    number = torch.arange(s.blocks).repeat_interleave(each)
    inside = torch.arange(each).repeat(s.blocks) * tile
    first = start + number * s.size + inside
    width = torch.clamp(s.size - inside, max=tile)
    odd = ((first % 16 != 0) | (width % 16 != 0)).to(torch.int64)
    shape = LARGE_SHAPE + UNALIGNED * odd
    rows = _columns(t, first, shape, width, 1, block + number, larges + number)
    which = torch.arange(s.blocks)
    return rows, _columns(pieces + which * each, each, s.size, block + which)
