"""Which kernels a Newton–Schulz iteration uses, by shape: measured once, pinned, never timed here.

A tile chosen by timing would change the order of sums, and with it a resumed run. The times are
from one H100; see docs/LOG.md. Needs no Triton.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch


@dataclass(frozen=True)
class Block:
    """Sizes of a product's programs, and what one takes."""

    bm: int
    bn: int
    bk: int
    warps: int
    stages: int
    persistent: bool = False  # one program per multiprocessor, which goes from tile to tile
    resident: int = 1  # programs that share a multiprocessor
    start_us: float = 0.0  # of a wave of programs: fixed, and per 1024 of the summed dimension
    slope_us: float = 1.0


@dataclass(frozen=True)
class Path:
    """How one shape is done.

    `tma`: with tensor descriptors. `gram`: the form, see ns_launch. `outer`, `inner`, `pair`:
    blocks of X Xᵀ, of (M, M) products, and of those where there are two per input. `update`: block
    of P X, None for cuBLAS. `side`: M is padded to a multiple of it.
    """

    tma: bool
    gram: bool
    outer: Block
    inner: Block
    pair: Block
    update: Block | None
    side: int

    @property
    def dtype(self) -> torch.dtype:
        """Of the products."""
        return torch.float16 if self.gram else torch.bfloat16

    def padded(self, rows: int, columns: int) -> tuple[int, int]:
        """(M, K) of the buffers of a (rows, columns) matrix with rows ≤ columns."""
        return -(-rows // self.side) * self.side, -(-columns // 64) * 64


# In order of preference. The times are fits to 1024² to 8192² and 24 × 1024².
_HOPPER = (
    Block(64, 64, 128, 4, 3, resident=2, start_us=2.8, slope_us=5.3),
    Block(128, 128, 64, 8, 4, persistent=True, start_us=2.8, slope_us=6.2),
    Block(128, 256, 64, 8, 3, persistent=True, start_us=4.5, slope_us=10.4),
    Block(128, 256, 64, 8, 3, start_us=5.2, slope_us=10.2),
)
_HOPPER_UPDATE = (
    Block(64, 128, 64, 4, 4, start_us=2.8, slope_us=4.2),
    Block(128, 128, 64, 8, 4, persistent=True, start_us=3.0, slope_us=6.2),
    Block(128, 256, 64, 8, 3, persistent=True, start_us=4.0, slope_us=10.7),
)
# Pointers, for cards without tensor descriptors: 48 KiB of shared memory at most.
_CLASSIC = {64: Block(64, 64, 32, 4, 3), 128: Block(128, 128, 32, 8, 3)}
_INTERPRETER = Block(32, 32, 32, 4, 1)
# Rows of at least this many times M take the Gram form. In units of M³, five iterations are
# 15 K/M + 5 of work in the standard form and 6 K/M + 14 in the other.
LONG = 2


def _triangle(rows: int, ratio: int) -> int:
    """Tiles on and below the diagonal of `rows` tile rows, `ratio` times as wide as high."""
    return sum(i // ratio + 1 for i in range(rows))


def _time(block: Block, tiles: int, length: int, processors: int) -> float:
    waves = -(-tiles // (processors * block.resident))
    return waves * (block.start_us + block.slope_us * length / 1024)


def _best(tiles: dict[Block, int], length: int, processors: int) -> Block:
    """The quickest for sums over `length`, given how many tiles each has to do."""
    return min(tiles, key=lambda block: _time(block, tiles[block], length, processors))


def path_for(device: torch.device, batch: int, rows: int, columns: int) -> Path | None:
    """The path of a batch of (rows, columns) matrices, rows ≤ columns; None for plain torch."""
    side = 64 if rows <= 512 else 128
    if device.type != "cuda":
        return Path(False, False, *(_INTERPRETER,) * 3, None, 64)
    capability = torch.cuda.get_device_capability(device)
    if capability < (8, 0):
        return None  # no bfloat16 products
    if capability != (9, 0):
        return Path(False, False, *(_CLASSIC[side],) * 3, None, side)
    processors = torch.cuda.get_device_properties(device).multi_processor_count
    return hopper_path(batch, rows, columns, processors)


@lru_cache(maxsize=1024)
def hopper_path(batch: int, rows: int, columns: int, processors: int = 132) -> Path:
    """`path_for` a card of compute capability 9.0."""
    side = 64 if rows <= 512 else 128
    size, length = -(-rows // side) * side, -(-columns // 64) * 64
    tiles = {
        block: batch * _triangle(size // block.bm, block.bn // block.bm)
        for block in _HOPPER
        if size % block.bm == 0
    }
    whole = {
        block: batch * (size // block.bm) * -(-length // block.bn)
        for block in _HOPPER_UPDATE
        if size % block.bm == 0
    }
    return Path(
        tma=True,
        gram=length >= LONG * size,
        outer=_best(tiles, length, processors),
        inner=_best(tiles, size, processors),
        pair=_best({block: 2 * n for block, n in tiles.items()}, size, processors),
        update=_best(whole, size, processors),
        side=side,
    )
