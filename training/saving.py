"""Checkpoints written beside the training: a copy in host memory first, then a thread's work."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from training import checkpoint
from training.ranks import Ranks

if TYPE_CHECKING:
    from training.state import TrainState

logger = logging.getLogger(__name__)
# of a tensor: bytes, their dtype, the first element they are, the shape of the whole
Part = tuple[Tensor, torch.dtype, int, torch.Size]


def _host_buffer(tensor: Tensor, pinned: bool) -> Tensor:
    return torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=pinned, device="cpu")


def _bytes(tensor: Tensor) -> Tensor:
    """The same memory; not every dtype can be pickled or indexed."""
    return tensor.reshape(-1).view(torch.uint8)


def _join(everyone: list[dict[str, Part]]) -> dict[str, Tensor]:
    """Whole tensors, of all ranks' parts."""
    whole: dict[str, Tensor] = {}
    for parts in everyone:
        for name, (raw, dtype, start, shape) in parts.items():
            if name not in whole:
                whole[name] = torch.empty(shape, dtype=dtype)
            first = start * dtype.itemsize
            _bytes(whole[name])[first : first + len(raw)] = raw
    return whole


class Saver:
    """Saves one state at a time. Every rank has one; the first one writes.

    `save` costs the loop a copy into host memory (pinned beside a GPU, where the loop does not
    even wait for it). Gathering the rows of the other ranks and writing happen in a thread.
    """

    def __init__(self, run_dir: Path, ranks: Ranks, keep: int) -> None:
        self.run_dir, self.ranks, self.keep = run_dir, ranks, keep
        self.saved_step: int | None = None  # the last one on the disk; known on rank 0
        self._copies: dict[str, dict[str, Tensor]] = {}  # the same buffers for every save
        self._parts: dict[str, Part] = {}  # of the state of a sharded optimizer
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="saver")
        self._jobs: list[Future[None]] = []

    def has(self, step: int) -> bool:
        """Whether the state after `step` is on the disk; every rank must ask."""
        self.wait()
        return self.ranks.first(self.saved_step == step)

    def save(self, state: TrainState, index: dict[str, Any]) -> None:
        """Begin to save `state`, once the save before has ended; every rank must."""
        self.wait()
        self._copy(state)
        copied = None
        if state.device.type == "cuda":
            copied = torch.cuda.Event()
            copied.record()
        self._submit(self._save, state.step, index, copied, state.is_own)

    def mark_best(self, step: int, value: float, merit: float) -> None:
        """Note that the checkpoint of `step` is the best, after the save that was begun."""
        if self.ranks.rank == 0:
            self._submit(self._mark_best, step, value, merit)

    def wait(self) -> None:
        """Until everything that was begun has ended; raises what went wrong between ranks."""
        jobs, self._jobs = self._jobs, []
        for job in jobs:
            job.result()

    def close(self) -> None:
        """Let what was begun come to an end, whatever it is."""
        with contextlib.suppress(Exception):
            self.wait()
        self._thread.shutdown()

    def _submit(self, work: Callable[..., None], *arguments: Any) -> None:
        self._jobs.append(self._thread.submit(work, *arguments))

    def _copy(self, state: TrainState) -> None:
        """Copy what this rank contributes, in the order of the device's work."""
        cuda = state.device.type == "cuda"
        for stem, tensors in state.files().items():
            copies = self._copies.setdefault(stem, {})
            for name, tensor in tensors.items():
                if self.ranks.rank > 0 and not state.is_own(stem, name):
                    continue
                if name not in copies:
                    copies[name] = _host_buffer(tensor, cuda)
                copies[name].copy_(tensor.detach(), non_blocking=cuda)
        for name, piece in state.pieces().items():
            raw = _bytes(piece.tensor)
            if name not in self._parts:
                place = (piece.tensor.dtype, piece.start or 0, piece.shape)
                self._parts[name] = (_host_buffer(raw, cuda), *place)
            self._parts[name][0].copy_(raw, non_blocking=cuda)

    # In the thread

    def _save(
        self,
        step: int,
        index: dict[str, Any],
        copied: torch.cuda.Event | None,
        is_own: Callable[[str, str], bool],
    ) -> None:
        if copied is not None:
            copied.synchronize()
        files = self._copies
        if self.ranks.size > 1:
            files = {
                stem: {n: self.ranks.collect(t) if is_own(stem, n) else t for n, t in some.items()}
                for stem, some in self._copies.items()
            }
            everyone = self.ranks.collect_pieces(self._parts)
            files["optimizer"] |= _join(everyone)
        if self.ranks.rank > 0:
            return
        try:
            path = checkpoint.write(self.run_dir, step, files, index)
        except OSError as error:
            logger.error("checkpoint at step %d could not be saved (%s); the earlier ones are "
                         "whole, training goes on", step, error)  # fmt: skip
            return
        self.saved_step = step
        self._attempt("remove old checkpoints", checkpoint.prune, self.keep)
        logger.info("saved %s (parameters, optimizer states, EMA, carry)", path)

    def _mark_best(self, step: int, value: float, merit: float) -> None:
        if self.saved_step == step:
            self._attempt("mark the best checkpoint", checkpoint.mark_best, step, value, merit)

    def _attempt(self, purpose: str, work: Callable[..., None], *arguments: Any) -> None:
        """Tidy among the checkpoints; training goes on where the disk refuses."""
        try:
            work(self.run_dir, *arguments)
        except OSError as error:
            logger.error("could not %s (%s); training goes on", purpose, error)
