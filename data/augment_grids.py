"""Augmentations of picture-like grids, in torch; see data/augment.py for the rules.

An element of the dihedral group is a number 0..7 of three bits: transpose (4), then flip the rows
(2), then flip the columns (1). 0 is the identity.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from data.arc_grids import RENAMED, SIDE, drawn_colours, drawn_element
from data.augment_sudoku import digit_maps
from data.hashing import below, hash32

_DOWN, _RIGHT = 0x57, 0x58  # streams of the hash


class DihedralAugmentation:
    """Rotations and reflections of a whole grid: index k is element k (mod 8, or 4 if not square).

    No seed takes part: there are so few of them.
    """

    def __init__(self, size: tuple[int, int], *, device: torch.device) -> None:
        rows, columns = size
        cells = torch.arange(rows * columns).reshape(rows, columns)
        sources = []
        for element in range(8 if rows == columns else 4):
            grid = cells.T if element & 4 else cells
            flips = [axis for axis, bit in ((0, 2), (1, 1)) if element & bit]
            sources.append(grid.flip(flips).reshape(-1))
        self.sources = torch.stack(sources).to(device)  # (elements, cells)

    def __call__(
        self,
        inputs: Tensor,
        labels: Tensor,
        examples: Tensor,
        indices: Tensor,
        identifiers: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Turn inputs and labels (B, cells) by the elements that `indices` (B,) name."""
        source = self.sources[indices % len(self.sources)]
        return torch.gather(inputs, 1, source), torch.gather(labels, 1, source)


class ArcAugmentation:
    """Colours renamed (black kept) and grids turned, as (seed, identifier, index) decide.

    While training, the pair is also moved about on its canvas, as (seed, example, index) decide.
    Tokens and canvas are those of data/arc_grids.py.
    """

    def __init__(self, *, seed: int, translate: bool, device: torch.device) -> None:
        self.seed, self.translate = seed, translate
        table = digit_maps(RENAMED)[:, 2:]  # (9!, 9), a colour c as c + 1
        fixed = torch.tensor([[0, 1, 2]], dtype=torch.uint8).expand(len(table), 3)
        self.colours = torch.cat([fixed, table + 1], dim=1).to(device)  # (9!, 12) of tokens
        self.line = torch.arange(SIDE, device=device)
        self.strides = torch.tensor([[SIDE + 1, 1], [1, SIDE + 1]], device=device)

    def __call__(
        self,
        inputs: Tensor,
        labels: Tensor,
        examples: Tensor,
        indices: Tensor,
        identifiers: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Transform canvases (B, 900) whose grids lie in the upper left corner.

        Every pair of one (identifier, index) is turned and coloured alike.
        """
        changed = (indices != 0).long()
        element = drawn_element(self.seed, identifiers, indices)
        colours = self.colours[drawn_colours(self.seed, identifiers, indices)]
        grids = [tokens.reshape(-1, SIDE, SIDE) for tokens in (inputs, labels)]
        sizes = [_sizes(grid) for grid in grids]  # (height, width) of each, (B,)
        offsets = [torch.zeros_like(indices)] * 2
        if self.translate:
            turned = (element & 4).bool()
            height = torch.maximum(sizes[0][0], sizes[1][0])
            width = torch.maximum(sizes[0][1], sizes[1][1])
            room = (SIDE - torch.where(turned, width, height),
                    SIDE - torch.where(turned, height, width))  # fmt: skip
            offsets = [
                below(hash32(stream, self.seed, examples, indices), free + 1) * changed
                for stream, free in zip((_DOWN, _RIGHT), room, strict=True)
            ]
        return tuple(
            self._transform(grid, *size, element, offsets, colours)
            for grid, size in zip(grids, sizes, strict=True)
        )

    def _transform(
        self,
        grid: Tensor,
        height: Tensor,
        width: Tensor,
        element: Tensor,
        offsets: list[Tensor],
        colours: Tensor,
    ) -> Tensor:
        """(B, 30, 30) → (B, 900), every cell looked up at its source.

        A line (row or column) of the result comes from a line of the grid, from the line of end
        marks behind it, or from an empty one, which is added to the canvas as number 30.
        """
        turned = (element & 4).bool()
        extents = (torch.where(turned, width, height), torch.where(turned, height, width))
        lines = []
        for extent, offset, bit in zip(extents, offsets, (2, 1), strict=True):
            extent = extent[:, None]
            place = self.line - offset[:, None]  # (B, 30)
            flipped = ((element & bit) > 0)[:, None] & (place < extent)
            source = torch.where(flipped, extent - 1 - place, place)
            lines.append(torch.where((place >= 0) & (place <= extent), source, SIDE))
        strides = self.strides[turned.long()]  # (B, 2) cells between lines of either kind
        source = (lines[0] * strides[:, :1])[:, :, None] + (lines[1] * strides[:, 1:])[:, None, :]
        canvas = F.pad(grid, (0, 1, 0, 1)).reshape(len(grid), -1)
        tokens = torch.gather(canvas, 1, source.reshape(len(grid), -1))
        return torch.gather(colours, 1, tokens.long()).to(grid.dtype)


def _sizes(grids: Tensor) -> tuple[Tensor, Tensor]:
    """Heights and widths (B,) int64 of grids in the upper left corner of canvases (B, 30, 30)."""
    return (grids[:, :, 0] > 1).sum(1), (grids[:, 0, :] > 1).sum(1)
