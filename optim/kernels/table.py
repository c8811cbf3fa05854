"""What one launch works on: addresses of many tensors, and the chunks they are cut into."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from operator import is_
from weakref import ReferenceType

import torch
from torch import Tensor

RECENT = 8  # tables of addresses kept
SPARES = 4  # captures in a row with new addresses


def addresses_of(tensors: Iterable[Tensor]) -> tuple[int, ...]:
    """Their data pointers.

    Raises:
        TypeError, RuntimeError: if one is None or has no storage of its own.
    """
    return tuple(map(Tensor.data_ptr, tensors))


def same_objects(tensors: Sequence[Tensor | None], seen: Sequence[ReferenceType[Tensor]]) -> bool:
    """Whether these are, one by one, the very tensors seen before."""
    return len(tensors) == len(seen) and all(map(is_, tensors, [r() for r in seen]))


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
        self._known: tuple[int, ...] = ()
        self._addresses: Tensor | None = None
        # By pointers, the latest last: gradients that are born again every step come back at few
        # addresses.
        self._recent: dict[tuple[int, ...], Tensor] = {}
        self._spares: list[Tensor] = []  # pinned memory for captures, in which none can be had
        self._captured: list[Tensor] = []  # what graphs read from, kept alive

    def addresses(self, flat: tuple[int, ...]) -> Tensor:
        """`flat`, data pointers column after column, as an int64 tensor on the device.

        Only what is not among the last few tables is uploaded. If pointers are new under graph
        capture, the upload becomes part of the graph and belongs to it alone.

        Raises:
            RuntimeError: if such a capture is the first call, or the fifth one in a row.
        """
        capturing = self.device.type == "cuda" and torch.cuda.is_current_stream_capturing()
        if flat is not self._known and flat != self._known:
            table = self._recent.pop(flat, None)
            if table is None:
                if capturing:
                    return self._capture(flat)
                table = self._upload(flat)
            self._recent[flat] = table
            if len(self._recent) > RECENT:
                del self._recent[next(iter(self._recent))]
            self._known, self._addresses = flat, table
        if capturing:
            self._captured.append(self._addresses)  # tables are never overwritten
        return self._addresses

    def _upload(self, flat: tuple[int, ...]) -> Tensor:
        on_cuda = self.device.type == "cuda"
        host = torch.tensor(flat, dtype=torch.int64, pin_memory=on_cuda)
        if on_cuda and len(self._spares) < SPARES:
            shape = (SPARES - len(self._spares), len(flat))
            self._spares += torch.empty(shape, dtype=torch.int64, pin_memory=True).unbind()
        return host.to(self.device, non_blocking=True)

    def _capture(self, flat: tuple[int, ...]) -> Tensor:
        if not self._spares or self._spares[-1].numel() != len(flat):
            raise RuntimeError("take one optimizer step before capturing steps in graphs")
        host = self._spares.pop()
        host.copy_(torch.tensor(flat, dtype=torch.int64))
        table = torch.empty_like(host, device=self.device)
        table.copy_(host, non_blocking=True)
        self._captured += [host, table]
        return table
