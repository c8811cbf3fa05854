"""The processes of one run, as torchrun starts them: how they meet, exchange, and end together."""

from __future__ import annotations

import contextlib
import logging
import os
import pickle
import re
import secrets
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from training.errors import ConfigError, TrainingFailed
from training.resolve import World

T = TypeVar("T")
logger = logging.getLogger(__name__)

_PATIENCE = timedelta(days=1)  # of the other ranks while the first one builds a dataset
_ARRIVAL = 1800.0  # seconds in which all ranks have to come, once the first one is ready
_POLL = 0.0005  # seconds between two looks at a device
_GRACE = 2.0  # seconds in which the rank that failed may say why, before others say they lost it
# torch 2.13 gives it a new name
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
# How the errors of torch.distributed sound: those of gloo have no class of their own.
_LOSS = re.compile(
    r"gloo|nccl|connection (was )?(closed|reset|refused)|broken pipe|pair closure|store", re.I
)
_LATE = re.compile(r"time[d\- ]*out", re.I)


class Ranks:
    """This process among `size`.

    Tensors on the run's device go through the default group (NCCL on CUDA, gloo elsewhere). What
    the host wants goes through groups of its own, so that nothing waits for a device: `control`
    for the loop, `saving` for the thread that writes checkpoints.
    """

    def __init__(self, rank: int = 0, size: int = 1, timeout: timedelta | None = None) -> None:
        self.rank, self.size, self.timeout = rank, size, timeout
        self.control = self.saving = None
        self.on_device = False  # whether collectives of CUDA tensors stay there (NCCL)
        if size > 1:
            self.on_device = "nccl" in dist.get_backend_config()
            self.control = dist.new_group(backend="gloo", timeout=timeout)
            self.saving = dist.new_group(backend="gloo", timeout=timeout)

    # On the host

    def gather(self, mine: T) -> list[T]:
        """What every rank has, in their order; every rank must call this."""
        if self.size == 1:
            return [mine]
        everyone: list[T | None] = [None] * self.size
        dist.all_gather_object(everyone, mine, group=self.control)
        return everyone

    def first(self, mine: T) -> T:
        """What rank 0 has; every rank must call this."""
        if self.size == 1:
            return mine
        box = [mine]
        dist.broadcast_object_list(box, src=0, group=self.control)
        return box[0]

    def largest(self, number: int) -> Callable[[], int]:
        """Begin to find the largest of all ranks' numbers; call the result to get it."""
        if self.size == 1:
            return lambda: number
        value = torch.tensor([number])
        work = dist.all_reduce(value, dist.ReduceOp.MAX, group=self.control, async_op=True)

        def result() -> int:
            work.wait()
            return int(value)

        return result

    def collect(self, mine: Tensor) -> Tensor | None:
        """The rows (dim 0) of all ranks' CPU tensors on rank 0, None elsewhere.

        Through the group `saving`; a 0-dim tensor is one row.
        """
        if self.size == 1:
            return mine
        mine = mine.reshape(-1) if mine.ndim == 0 else mine
        raw = mine.contiguous().view(-1).view(torch.uint8)  # gloo knows few dtypes
        pieces = [torch.empty_like(raw) for _ in range(self.size)] if self.rank == 0 else None
        dist.gather(raw, pieces, dst=0, group=self.saving)
        if pieces is None:
            return None
        return torch.cat(pieces).view(mine.dtype).view(-1, *mine.shape[1:])

    def collect_pieces(self, mine: T) -> list[T]:
        """What every rank has on rank 0, [] elsewhere; through the group `saving`."""
        everyone: list[T | None] | None = [None] * self.size if self.rank == 0 else None
        dist.gather_object(mine, everyone, dst=0, group=self.saving)
        return everyone or []

    # On the device

    def settle(self, device: torch.device) -> None:
        """Wait until `device` has done its work, on every rank; all must call this.

        A collective whose partner is gone never ends on a GPU, so the host does not block on it:
        the ranks ask each other, and who is lost or late is noticed there.
        """
        if device.type != "cuda":
            return
        if self.size == 1:
            torch.cuda.synchronize(device)
            return
        done = torch.cuda.Event()
        done.record(torch.cuda.current_stream(device))
        began = time.monotonic()
        while self.largest(int(not done.query()))():
            if self.timeout is not None and time.monotonic() - began > self.timeout.total_seconds():
                raise dist.DistBackendError("timed out: the device's work does not end")
            time.sleep(_POLL)

    def sum(self, tensor: Tensor) -> Tensor:
        """Add up `tensor` over all ranks, in place; returns it."""
        if self.size > 1:
            dist.all_reduce(tensor)
        return tensor

    def rows(self, mine: Tensor) -> Tensor:
        """The rows (dim 0, equally many each) of all ranks, in their order."""
        if self.size == 1:
            return mine
        out = mine.new_empty(mine.shape[0] * self.size, *mine.shape[1:])
        _all_gather(out, mine.contiguous())
        return out


ALONE = Ranks()


def meet(world: World, plan: Any = None) -> tuple[dist.Store, Any]:
    """The store that all ranks share, and the plan that rank 0 brought there.

    torchrun keeps its store when it restarts the processes, so what is in it may be of a sitting
    that has ended: the ranks greet each other first, and agree on a name for what is new.
    """
    try:
        rendezvous = dist.rendezvous("env://", world.rank, world.size, timeout=_PATIENCE)
        store, _, _ = next(iter(rendezvous))
        if world.rank == 0:
            sitting = _receive(store, world.size)
            store = dist.PrefixStore(sitting, store)
            store.set("plan", pickle.dumps(plan))
            return store, plan
        sitting = _greet(store, world.rank)
        store = dist.PrefixStore(sitting, store)
        store.wait(["plan"], _PATIENCE)
        return store, pickle.loads(store.get("plan"))  # of our own rank 0
    except (RuntimeError, ValueError) as error:
        place = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
        reason = str(error).splitlines()[0]
        raise ConfigError(
            f"rank {world.rank} of {world.size} cannot meet the others at "
            f"MASTER_ADDR:MASTER_PORT={place} ({reason}); start all of them, with torchrun"
        ) from None


def _greet(store: dist.Store, rank: int) -> str:
    """Tell rank 0 that we are here; returns the name of this sitting."""
    greeting = secrets.token_hex(8)
    store.set(f"greeting/{rank}", greeting)
    store.wait([f"answer/{greeting}"], _PATIENCE)
    sitting = store.get(f"answer/{greeting}").decode()
    store.set(f"{sitting}/here/{rank}", "")
    return sitting


def _receive(store: dist.Store, size: int) -> str:
    """Answer every greeting, old ones too, until all ranks have heard the name of this sitting."""
    sitting = secrets.token_hex(8)
    answered: dict[int, bytes] = {}
    waiting = set(range(1, size))
    deadline = time.monotonic() + _ARRIVAL
    while waiting:
        for rank in sorted(waiting):
            if store.check([f"{sitting}/here/{rank}"]):
                waiting.remove(rank)
            elif store.check([f"greeting/{rank}"]):
                greeting = store.get(f"greeting/{rank}")
                if answered.get(rank) != greeting:
                    answered[rank] = greeting
                    store.set(f"answer/{greeting.decode()}", sitting)
        if time.monotonic() > deadline:
            raise RuntimeError(f"ranks {sorted(waiting)} did not come within {_ARRIVAL:g} s")
        time.sleep(0.01)
    return sitting


@contextmanager
def joined(
    world: World, store: dist.Store | None = None, seconds: float = 600.0
) -> Iterator[Ranks]:
    """Join the other processes of `world` for a while.

    `seconds`: how long a collective may take. Where one rank fails, it says why, and all end: the
    others with a SystemExit, or, if it was killed and says nothing, one of them with
    TrainingFailed.
    """
    if world.size == 1:
        yield ALONE
        return
    if store is None:
        store, _ = meet(world)
    timeout = timedelta(seconds=seconds)
    cuda = torch.cuda.is_available() and dist.is_nccl_available()
    try:
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if cuda else "gloo",
            store=dist.PrefixStore("ranks", store),
            rank=world.rank,
            world_size=world.size,
            timeout=timeout,
        )
        ranks = Ranks(world.rank, world.size, timeout)
        yield ranks
        dist.barrier(group=ranks.control)  # one that leaves early disturbs the others' end
        dist.destroy_process_group()
    except BaseException as error:
        ended = _Ending(store, world, seconds).of(error)
        if cuda:
            _abort()
        if ended is error:
            raise
        raise ended from None


def _abort() -> None:
    """Let go of collectives whose partner is gone, which would keep the process from ending."""
    abort = getattr(dist.distributed_c10d, "_abort_process_group", None)
    if abort is not None:
        with contextlib.suppress(RuntimeError, ValueError):
            abort()


class _Ending:
    """Why a run of several ranks ends, said once."""

    def __init__(self, store: dist.Store, world: World, seconds: float) -> None:
        self.store, self.world, self.seconds = store, world, seconds

    def of(self, error: BaseException) -> BaseException:
        """What this rank ends with, given what happened to it."""
        lost = isinstance(error, dist.DistError) or (
            isinstance(error, RuntimeError)
            and not isinstance(error, torch.cuda.OutOfMemoryError)
            and _LOSS.search(str(error)) is not None
        )
        if not lost:
            return error if self._is_first("failed") else SystemExit(self._exit_code(error))
        deadline = time.monotonic() + _GRACE
        while time.monotonic() < deadline:
            if self._is_said("failed"):
                return SystemExit(TrainingFailed.exit_code)
            time.sleep(0.05)
        if not self._is_first("lost"):
            return SystemExit(TrainingFailed.exit_code)
        rank, size = self.world.rank, self.world.size
        if _LATE.search(str(error)):
            return TrainingFailed(
                f"rank {rank} of {size} waited longer than comm_timeout={self.seconds:g} seconds "
                "for the others: one hangs, or is slower than that; resume from the newest "
                "checkpoint, or raise comm_timeout"
            )
        return TrainingFailed(
            f"rank {rank} of {size} lost the connection to another, which was killed or crashed; "
            "resume from the newest checkpoint (torchrun --max-restarts does so by itself)"
        )

    @staticmethod
    def _exit_code(error: BaseException) -> int:
        code = error.code if isinstance(error, SystemExit) else getattr(error, "exit_code", 1)
        return code if isinstance(code, int) else 1

    def _is_first(self, key: str) -> bool:
        """Whether no rank has said this before; true, too, where the store is gone."""
        with contextlib.suppress(RuntimeError):
            return self.store.add(key, 1) == 1
        return True

    def _is_said(self, key: str) -> bool:
        with contextlib.suppress(RuntimeError):
            return self.store.check([key])
        return False
