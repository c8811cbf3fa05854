"""What one launch works on: addresses of many tensors, and the chunks they are cut into."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


class TensorTable:
    """Columns of addresses for a fixed list of tensors, cut into chunks of `block` elements.

    A column is one role (parameter, gradient, first moment, …); tensor i has the same number of
    elements, in the same memory order, in every column. Sizes and chunks are uploaded once;
    addresses again whenever one has changed, without a host synchronization.

    Args:
        sizes: elements per tensor; an empty tensor still gets one chunk.
        block: elements per chunk.
        device: where the kernel runs.

    Attributes:
        chunk_tensor, chunk_index: (chunks,) int32: chunk c is part number `chunk_index[c]` of
            tensor `chunk_tensor[c]`.
        sizes: (tensors,) int64.
        counts: (tensors,) int32, chunks per tensor.
    """

    def __init__(self, sizes: Sequence[int], block: int, device: torch.device) -> None:
        self.device = device
        self.tensors = len(sizes)
        counts = torch.tensor([max(1, -(-n // block)) for n in sizes], dtype=torch.int64)
        owner = torch.repeat_interleave(torch.arange(self.tensors), counts)
        first = torch.cumsum(counts, 0) - counts
        index = torch.arange(int(counts.sum())) - first[owner]
        self.chunks = owner.numel()
        self.chunk_tensor = owner.to(device, torch.int32)
        self.chunk_index = index.to(device, torch.int32)
        self.sizes = torch.tensor(sizes, dtype=torch.int64).to(device)
        self.counts = counts.to(device, torch.int32)
        self._known: list[int] = []
        self._addresses: Tensor | None = None
        self._spare: Tensor | None = None  # pinned memory for a capture, in which none can be had
        self._captured: list[Tensor] = []  # what graphs read from, kept alive

    def addresses(self, flat: list[int]) -> Tensor:
        """`flat`, data pointers column after column, as an int64 tensor on the device.

        Where no pointer has changed since the last call nothing is copied. If one has changed under
        graph capture, the upload becomes part of the graph and belongs to it alone.

        Raises:
            RuntimeError: if such a capture is the first call, or a second one follows it at once.
        """
        on_cuda = self.device.type == "cuda"
        if flat == self._known and self._addresses is not None:
            if on_cuda and torch.cuda.is_current_stream_capturing():
                self._captured.append(self._addresses)  # tables are never overwritten
            return self._addresses
        if on_cuda and torch.cuda.is_current_stream_capturing():
            return self._capture(flat)
        host = torch.tensor(flat, dtype=torch.int64, pin_memory=on_cuda)
        self._addresses = host.to(self.device, non_blocking=True)
        self._known = flat
        if on_cuda and self._spare is None:
            self._spare = torch.empty(len(flat), dtype=torch.int64, pin_memory=True)
        return self._addresses

    def _capture(self, flat: list[int]) -> Tensor:
        if self._spare is None or self._spare.numel() != len(flat):
            raise RuntimeError("take one optimizer step before (each) capture of a step in a graph")
        host, self._spare = self._spare, None
        host.copy_(torch.tensor(flat, dtype=torch.int64))
        table = torch.empty_like(host, device=self.device)
        table.copy_(host, non_blocking=True)
        self._captured += [host, table]
        return table
