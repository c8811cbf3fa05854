"""Which kernels a Newton–Schulz iteration uses, by shape: measured once, pinned, never timed here.

A tile chosen by timing would change the order of sums, and with it a resumed run. The times are
from one H100; see docs/LOG.md. Needs no Triton.
"""

from __future__ import annotations

from dataclasses import dataclass

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
    overlap: bool = True  # starts while the launch before it ends (programmatic launch)
    resident: int = 1  # programs that share a multiprocessor
    start_us: float = 0.0  # of a wave of tiles: fixed, and per 1024 of the summed dimension
    slope_us: float = 1.0


@dataclass(frozen=True)
class Path:
    """How one shape is done.

    `tma`: with tensor descriptors. `gram`: the form, see ns_launch. `outer`, `inner`: blocks of
    X Xᵀ and of the products of (M, M) matrices. `update`: block of P X, None for cuBLAS. `side`:
    M is padded to a multiple of it.
    """

    tma: bool
    gram: bool
    outer: Block
    inner: Block
    update: Block | None
    side: int

    @property
    def dtype(self) -> torch.dtype:
        """Of the products."""
        return torch.float16 if self.gram else torch.bfloat16

    def padded(self, rows: int, columns: int) -> tuple[int, int]:
        """(M, K) of the buffers of a (rows, columns) matrix with rows ≤ columns."""
        return -(-rows // self.side) * self.side, -(-columns // 64) * 64


_HOPPER = (
    Block(128, 256, 64, 8, 3, persistent=True, start_us=4.0, slope_us=10.3),
    Block(128, 128, 64, 8, 4, persistent=True, start_us=2.9, slope_us=6.2),
    Block(64, 64, 64, 4, 4, resident=3, start_us=2.6, slope_us=3.9),
)
_HOPPER_UPDATE = (
    Block(128, 256, 64, 8, 3, persistent=True, start_us=4.0, slope_us=10.3),
    Block(128, 128, 64, 8, 4, persistent=True, start_us=3.0, slope_us=7.0),
    Block(64, 128, 64, 4, 4, resident=2, start_us=3.0, slope_us=7.0),
)
# Pointers: what fits the shared memory of every card from sm_75 on is small.
_CLASSIC = {
    64: Block(64, 64, 32, 4, 3, overlap=False),
    128: Block(128, 128, 32, 8, 3, overlap=False),
}
_INTERPRETER = Block(32, 32, 32, 4, 1, overlap=False)
LONG = 2  # rows of at least this many times M: the Gram form
"""Standard: 5 (3 K/M + 1) M³ units of work, Gram: 6 K/M + 14 (five iterations, one restart)."""


def _triangle(rows: int, ratio: int) -> int:
    """Tiles on and below the diagonal of `rows` tile rows, `ratio` times as wide as high."""
    return sum(i // ratio + 1 for i in range(rows))


def _time(block: Block, tiles: int, length: int, processors: int) -> float:
    waves = -(-tiles // (processors * block.resident))
    return waves * (block.start_us + block.slope_us * length / 1024)


def _best(blocks: tuple[Block, ...], tiles: dict[Block, int], length: int, n: int) -> Block:
    fitting = [block for block in blocks if block in tiles]
    return min(fitting, key=lambda block: _time(block, tiles[block], length, n))


def path_for(device: torch.device, batch: int, rows: int, columns: int) -> Path | None:
    """The path of a batch of (rows, columns) matrices, rows ≤ columns; None for plain torch."""
    side = 64 if rows <= 512 else 128
    if device.type != "cuda":
        return Path(False, False, _INTERPRETER, _INTERPRETER, None, 64)
    capability = torch.cuda.get_device_capability(device)
    if capability < (8, 0):
        return None  # no bfloat16 products
    if capability != (9, 0):
        return Path(False, False, _CLASSIC[side], _CLASSIC[side], None, side)
    processors = torch.cuda.get_device_properties(device).multi_processor_count
    return hopper_path(batch, rows, columns, processors)


def hopper_path(batch: int, rows: int, columns: int, processors: int = 132) -> Path:
    """`path_for` a card of compute capability 9.0."""
    side = 64 if rows <= 512 else 128
    size, length = -(-rows // side) * side, -(-columns // 64) * 64
    tiles = {b: batch * _triangle(size // b.bm, b.bn // b.bm) for b in _HOPPER if size % b.bm == 0}
    outer = _best(_HOPPER, tiles, length, processors)
    inner = _best(_HOPPER, tiles, size, processors)
    whole = {
        b: batch * (size // b.bm) * -(-length // b.bn) for b in _HOPPER_UPDATE if size % b.bm == 0
    }
    update = _best(_HOPPER_UPDATE, whole, size, processors)
    return Path(True, length >= LONG * size, outer, inner, update, side)
