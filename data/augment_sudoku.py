"""The symmetries of Sudoku, executed in torch; see data/augment.py for the rules."""

from itertools import permutations, product

import torch
from torch import Tensor

from data.hashing import below, hash32

# Streams of the hash for digits, rows, columns and transposition: independent draws.
_STREAMS = (0x51, 0x52, 0x53, 0x54)


def _line_permutations(groups: int, size: int) -> Tensor:
    """Every order of `groups` bands of `size` rows each, with every order within each band.

    Returns (groups!·size!^groups, groups·size) int64: source line of every line; first: identity.
    """
    bands = list(permutations(range(groups)))
    inner = list(product(permutations(range(size)), repeat=groups))
    return torch.tensor(
        [
            [band * size + line for band, order in zip(order_of_bands, orders, strict=True)
             for line in order]
            for order_of_bands in bands
            for orders in inner
        ]
    )  # fmt: skip


def digit_maps(digits: int) -> Tensor:
    """Token maps of all digit permutations, pad 0 and blank 1 fixed: (digits!, digits + 2) uint8.

    Lexicographic order, so that the first is the identity; built from the maps of one digit fewer.
    """
    table = torch.zeros(1, 0, dtype=torch.uint8)
    for n in range(1, digits + 1):  # choose the first image, then shift the rest around it
        first = torch.arange(n, dtype=torch.uint8).repeat_interleave(len(table))[:, None]
        rest = table.repeat(n, 1)
        table = torch.cat([first, rest + (rest >= first)], dim=1)
    fixed = torch.tensor([[0, 1]], dtype=torch.uint8).expand(len(table), 2)
    return torch.cat([fixed, table + 2], dim=1)


class SudokuAugmentation:
    """Digits renamed, bands, stacks, rows and columns permuted, transposed if the box is square.

    One draw is uniform over the whole symmetry group (9×9: 9!·2·6^8 elements). Tokens: pad 0,
    blank 1, digit d → d + 1; pads and blanks keep their token and move with the grid.
    """

    def __init__(self, box: tuple[int, int], *, seed: int, device: torch.device) -> None:
        r, c = box
        self.seed = seed
        self.size = r * c
        self.square = r == c
        # Source row of each row and source column of each column; rows times n, as cell offsets.
        self.rows = (_line_permutations(c, r) * self.size).to(device)  # (c!·r!^c, n)
        self.columns = _line_permutations(r, c).to(device)  # (r!·c!^r, n)
        self.digits = digit_maps(self.size).to(device)  # (n!, n + 2)
        counts = [len(self.digits), len(self.rows), len(self.columns), 2]
        self.counts = torch.tensor(counts, device=device)[:, None]  # (4, 1)
        self.streams = torch.tensor(_STREAMS, device=device)[:, None]  # (4, 1)

    def __call__(
        self,
        inputs: Tensor,
        labels: Tensor,
        examples: Tensor,
        indices: Tensor,
        identifiers: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Transform token grids.

        Args:
            inputs: (B, n²) integer tokens below n + 2.
            labels: (B, n²) likewise, of the same dtype.
            examples: (B,) int64, which example of the split a row is.
            indices: (B,) int64, which augmentation of it; 0 leaves the row as it is.
            identifiers: not used here.
        """
        source, digits = self._draw(examples, indices)

        def transform(tokens: Tensor) -> Tensor:
            moved = torch.gather(tokens, 1, source)
            return torch.gather(digits, 1, moved.long()).to(tokens.dtype)

        return transform(inputs), transform(labels)

    def invert(self, tokens: Tensor, examples: Tensor, indices: Tensor) -> Tensor:
        """The grids (B, n²) of which these are the augmentations: undoes `__call__`."""
        source, digits = self._draw(examples, indices)
        back = torch.gather(digits.argsort(1), 1, tokens.long()).to(tokens.dtype)
        return torch.empty_like(tokens).scatter_(1, source, back)

    def _draw(self, examples: Tensor, indices: Tensor) -> tuple[Tensor, Tensor]:
        """Source cell of every cell (B, n²) and new token of every token (B, n + 2)."""
        n = self.size
        drawn = below(hash32(self.streams, self.seed, examples, indices), self.counts)  # (4, B)
        digit, row, column, flip = drawn * (indices != 0)  # number 0 of each table: the identity
        rows, columns = self.rows[row], self.columns[column]  # (B, n)
        if self.square:  # new[i, j] = old[row(j), column(i)]
            flip = flip.bool()[:, None]
            rows, columns = torch.where(flip, columns, rows), torch.where(flip, rows, columns)
        source = (rows[:, :, None] + columns[:, None, :]).reshape(-1, n * n)
        return source, self.digits[digit]
