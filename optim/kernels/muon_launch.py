"""From a group of matrices to Muon's launches: pieces, batches of equal shapes, their buffers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from optim.kernels.launch import DTYPES
from optim.kernels.launcher import Kernel
from optim.kernels.muon import (
    FIELDS,
    SIDE,
    apply_kernel,
    gather_kernel,
    momentum_kernel,
)
from optim.kernels.ns_launch import GAIN, Coefficients, iterate, working_memory
from optim.kernels.ns_table import Path, path_for
from optim.kernels.table import TensorTable, addresses_of
from optim.kernels.tiles import tile_for

_momentum, _gather, _apply = (Kernel(k) for k in (momentum_kernel, gather_kernel, apply_kernel))


@dataclass(frozen=True)
class Options:
    """Numbers of a step; see `optim.muon.muon_update`."""

    momentum: float
    nesterov: bool
    weight_decay: float
    coefficients: Coefficients
    safety: float
    ema_take: float  # one minus the rate of the EMA


@dataclass
class Batch:
    """Pieces of one shape, up to transposition: where their buffers are (bytes)."""

    path: Path
    shape: tuple[int, int, int]
    x_start: int
    out_start: int


@dataclass
class Piece:
    """A matrix that is orthogonalized on its own."""

    param: int
    skip: int  # elements of the parameter before it
    rows: int
    columns: int


def supported(p: Tensor, pieces: int) -> bool:
    """Whether the kernels take this parameter."""
    if p.ndim != 2 or p.dtype not in DTYPES or not p.is_contiguous() or p.numel() == 0:
        return False
    rows, columns = p.shape[0] // pieces, p.shape[1]
    return path_for(p.device, 1, min(rows, columns), max(rows, columns)) is not None


class MuonLaunch:
    """The launches of parameters of one dtype on one device.

    Args:
        params: as `supported` says.
        states: per parameter `momentum_buffer` (float32) and `step` (0-dim float32), which keep
            their addresses. Without the first one the gradient (float32) is what is orthogonalized,
            where the options are a momentum of 0 and no `nesterov`.
        pieces: per parameter.
        sizes: per parameter, what an orthogonalized piece is multiplied by, beside the rate.
        shadows: per parameter its float32 EMA, or none.
    """

    def __init__(
        self,
        params: Sequence[Tensor],
        states: Sequence[Mapping[str, Tensor]],
        pieces: Sequence[int],
        sizes: Sequence[float],
        shadows: Sequence[Tensor] | None = None,
    ) -> None:
        self.params, self.shadows = list(params), list(shadows or ())
        self.kept = [(state.get("momentum_buffer"), state["step"]) for state in states]
        self.pieces = [
            Piece(i, k * p.numel() // n, p.shape[0] // n, p.shape[1])
            for i, (p, n) in enumerate(zip(params, pieces, strict=True))
            for k in range(n)
        ]
        device = self.device = self.params[0].device
        self.wide = device.type != "cuda"
        self.block = tile_for(device).block
        numels = [piece.rows * piece.columns for piece in self.pieces]
        self.table = TensorTable(numels, self.block, device)
        self.partials = torch.zeros(self.table.chunks, dtype=torch.float32, device=device)
        self.sizes = torch.tensor([sizes[p.param] for p in self.pieces]).to(device)
        self._lay_out(numels)
        self.options: Options | None = None
        self.pointers: tuple[int, ...] = ()
        self.flat: tuple[int, ...] = ()
        self.aligned = False

    def _lay_out(self, numels: list[int]) -> None:
        """Batches, the place of every piece in the buffers, and the tiles that fill and read it."""
        members: dict[tuple[int, int], list[int]] = {}
        for i, piece in enumerate(self.pieces):
            key = min(piece.rows, piece.columns), max(piece.rows, piece.columns)
            members.setdefault(key, []).append(i)
        n = len(self.pieces)
        offsets = torch.zeros(2, n, dtype=torch.int64)
        shapes = torch.zeros(n, FIELDS, dtype=torch.int32)
        first = torch.tensor([0, *(max(1, -(-k // self.block)) for k in numels)]).cumsum(0)
        self.batches, self.bytes, tiles = [], 0, []
        each = self.each = 4 if self.wide else 2
        for key, rows in members.items():
            path = path_for(self.device, len(rows), *key)
            size, length = path.padded(*key)
            bytes_each = size * length * each
            batch = Batch(path, (len(rows), size, length), self.bytes, 0)
            batch.out_start = self.bytes + len(rows) * bytes_each
            self.bytes = batch.out_start + len(rows) * bytes_each
            self.batches.append(batch)
            for k, i in enumerate(rows):
                piece = self.pieces[i]
                tall = piece.rows > piece.columns
                fields = (piece.rows, piece.columns, tall, length, path.gram, int(first[i]))
                shapes[i] = torch.tensor(fields, dtype=torch.int32)
                offsets[0, i] = batch.x_start + k * bytes_each
                offsets[1, i] = batch.out_start + k * bytes_each
                down, across = (length, size) if tall else (size, length)
                tiles += [(i, r, c) for r in range(down // SIDE) for c in range(across // SIDE)]
        self.shapes, self.offsets = shapes.to(self.device), offsets.to(self.device)
        piece, row, column = torch.tensor(tiles, dtype=torch.int32).T.contiguous().to(self.device)
        self.tiles = (piece, row, column)

    def run(
        self,
        grads: Sequence[Tensor],
        options: Options,
        lr: Tensor,
        grad_scale: Tensor | None,
        found_inf: Tensor | None,
    ) -> None:
        """Update everything in place; see `AdamLaunch.run`."""
        self.options = options
        self.repeat(addresses_of(self.params) + addresses_of(grads), lr, grad_scale, found_inf)

    def repeat(
        self,
        pointers: tuple[int, ...],
        lr: Tensor,
        grad_scale: Tensor | None,
        found_inf: Tensor | None,
    ) -> None:
        """`run` with the options of the last time; `pointers` of all parameters, then gradients."""
        if pointers != self.pointers:
            self._set_pointers(pointers)
        addresses, o, n = self.table.addresses(self.flat), self.options, len(self.pieces)
        scale, found = (lr if t is None else t for t in (grad_scale, found_inf))
        steps = len(o.coefficients)
        needs = [working_memory(b.path, b.shape, steps) * self.each for b in self.batches]
        buffers = torch.empty(self.bytes + max(needs), dtype=torch.uint8, device=self.device)
        dtype = DTYPES[self.params[0].dtype]
        has_scale, has_found = grad_scale is not None, found_inf is not None
        common = {"DTYPE": dtype, "ALIGNED": self.aligned}
        _momentum(
            (self.table.chunks,),
            self.device,
            (
                *(addresses, scale, found, self.table.chunk_tensor, self.table.chunk_index),
                *(self.table.sizes, self.partials, n, o.momentum),
            ),
            {"HAS_SCALE": has_scale, "HAS_FOUND": has_found, "NESTEROV": o.nesterov}
            | common
            | {"BLOCK": self.block},
            num_warps=8,
        )
        tiles, grid = {"FIELDS": FIELDS, "SIDE": SIDE}, (self.tiles[0].numel(),)
        _gather(
            grid,
            self.device,
            (
                *(addresses, scale, buffers, *self.tiles, self.shapes, self.offsets),
                *(self.table.counts, self.partials, n, o.momentum, o.safety),
            ),
            {"HAS_SCALE": has_scale, "NESTEROV": o.nesterov, "DTYPE": dtype, "WIDE": self.wide}
            | {"ALIGNED": self.aligned, "GAIN": GAIN, **tiles},
            num_warps=4,
        )
        work = buffers[self.bytes :]  # one batch after the other
        for batch in self.batches:
            x = self._view(buffers, batch.x_start, batch, batch.path.dtype)
            out = self._view(buffers, batch.out_start, batch, torch.bfloat16)
            iterate(x, out, o.coefficients, batch.path, work.view(x.dtype))
        _apply(
            grid,
            self.device,
            (
                *(addresses, lr, found, buffers, *self.tiles, self.shapes, self.offsets),
                *(self.sizes, n, o.weight_decay, o.ema_take),
            ),
            {"HAS_FOUND": has_found, "HAS_EMA": bool(self.shadows), "DTYPE": dtype}
            | {"WIDE": self.wide, "ALIGNED": self.aligned, **tiles},
            num_warps=4,
        )

    def _view(self, buffers: Tensor, start: int, batch: Batch, dtype: torch.dtype) -> Tensor:
        dtype = torch.float32 if self.wide else dtype
        count, size, length = batch.shape
        stop = start + count * size * length * dtype.itemsize
        return buffers[start:stop].view(dtype).view(count, size, length)

    def _set_pointers(self, pointers: tuple[int, ...]) -> None:
        """From addresses of parameters to columns of addresses of pieces."""
        n, item = len(self.params), self.params[0].element_size()
        columns: list[list[int]] = [[], [], [], [], []]
        for piece in self.pieces:
            i, skip = piece.param, piece.skip
            momentum, step = self.kept[i]
            columns[0].append(pointers[n + i] + skip * item)
            alone = momentum is None  # 0 * g + g
            columns[1].append((pointers[n + i] if alone else momentum.data_ptr()) + skip * 4)
            columns[2].append(pointers[i] + skip * item)
            columns[3].append(step.data_ptr() if skip == 0 else 0)
            columns[4].append(self.shadows[i].data_ptr() + skip * 4 if self.shadows else 0)
        self.pointers = pointers
        self.flat = tuple(x for column in columns for x in column)
        moved = [x for k, column in enumerate(columns) if k != 3 for x in column]
        lengths = [piece.columns for piece in self.pieces]
        self.aligned = not any(x % 16 for x in moved + lengths)
