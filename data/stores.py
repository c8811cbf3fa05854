"""Tokens of examples by number: on the device when small, read from memory maps otherwise."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from data.puzzles import OUTSIDE, PuzzleDataset, PuzzleSet, TokenStream

RESIDENT_BYTES = 1 << 30  # token arrays up to this size are kept on the device


def to_device(array: np.ndarray, device: torch.device) -> Tensor:
    """Copy to the device; on CUDA from pinned memory and without waiting for it."""
    tensor = torch.from_numpy(array)
    if device.type != "cuda":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)


class TokenStore:
    """Token grids of one or more sets behind one row number."""

    def __init__(
        self,
        sets: list[PuzzleSet],
        dataset: PuzzleDataset,
        device: torch.device,
        resident_bytes: int = RESIDENT_BYTES,
    ) -> None:
        self.device = device
        self.first = np.cumsum([0] + [len(s) for s in sets])  # (sets + 1,) first row of each set
        self.arrays = {"inputs": [s.inputs for s in sets], "labels": [s.labels for s in sets]}
        # uint8 holds the tokens of the grid tasks; indexing wider unsigned types is not supported.
        largest = max(dataset.vocab_size - 1, dataset.ignore_label_id or 0)
        small = largest < 256 and (dataset.ignore_label_id or 0) >= 0
        self.dtype = np.uint8 if small else np.int32
        size = 2 * int(self.first[-1]) * dataset.seq_len * np.dtype(self.dtype).itemsize
        self.resident: dict[str, Tensor] | None = None
        if size <= resident_bytes:
            self.resident = {
                key: torch.from_numpy(
                    np.concatenate([np.asarray(a, dtype=self.dtype) for a in arrays])
                ).to(device)
                for key, arrays in self.arrays.items()
            }

    def gather(self, rows: np.ndarray | None, device_rows: Tensor) -> tuple[Tensor, Tensor]:
        """Tokens of `rows` (B,): inputs, labels (B, L), raw ids.

        The rows are given on the device and, unless the tokens are there, on the host.
        """
        if self.resident is not None:
            return tuple(
                self.resident[key].index_select(0, device_rows) for key in ("inputs", "labels")
            )
        return tuple(to_device(self._read(key, rows), self.device) for key in ("inputs", "labels"))

    def _read(self, key: str, rows: np.ndarray) -> np.ndarray:
        arrays = self.arrays[key]
        which = np.searchsorted(self.first, rows, side="right") - 1
        out = np.empty((len(rows), arrays[0].shape[1]), self.dtype)
        for index in np.unique(which):
            mine = which == index
            out[mine] = arrays[index][rows[mine] - self.first[index]]
        return out


class WindowStore:
    """Windows of token streams by the place of their first token, counted over all shards."""

    def __init__(
        self,
        streams: list[TokenStream],
        dataset: PuzzleDataset,
        device: torch.device,
        resident_bytes: int = RESIDENT_BYTES,
    ) -> None:
        self.device, self.length = device, dataset.seq_len
        self.shards = [shard for stream in streams for shard in stream.shards]
        self.first = np.cumsum([0] + [len(s) for s in self.shards])  # first token of each shard
        self.pad_id = dataset.pad_id
        dtype = np.uint8 if dataset.vocab_size <= 256 else np.int32
        self.resident: Tensor | None = None
        if int(self.first[-1]) * np.dtype(dtype).itemsize <= resident_bytes:
            joined = np.concatenate([np.asarray(s, dtype=dtype) for s in self.shards])
            self.resident = torch.from_numpy(joined).to(device)
            self.ends = torch.from_numpy(self.first[1:]).to(device)
            self.offsets = torch.arange(self.length + 1, device=device)

    def gather(self, rows: np.ndarray | None, device_rows: Tensor) -> tuple[Tensor, Tensor]:
        """Tokens from places `rows` (B,) on, given as there: inputs, labels (B, L) int32.

        Beyond the end of its shard a window holds the pad token, and the label is OUTSIDE.
        """
        if self.resident is None:
            window = to_device(self._read(rows), self.device)
        else:
            place = device_rows[:, None] + self.offsets  # (B, L + 1)
            end = self.ends[torch.searchsorted(self.ends, device_rows, right=True)][:, None]
            window = self.resident[place.clamp(max=len(self.resident) - 1)].int()
            window = torch.where(place < end, window, OUTSIDE)
        inputs = window[:, :-1]
        return torch.where(inputs == OUTSIDE, self.pad_id, inputs), window[:, 1:]

    def _read(self, rows: np.ndarray) -> np.ndarray:
        out = np.full((len(rows), self.length + 1), OUTSIDE, np.int32)
        which = np.searchsorted(self.first, rows, side="right") - 1
        for line, shard, row in zip(out, which, rows, strict=True):
            begin = row - self.first[shard]
            piece = self.shards[shard][begin : begin + self.length + 1]
            line[: len(piece)] = piece
        return out
