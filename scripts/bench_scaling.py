"""How the training step scales over the ranks of one host, and what its communication costs.

    torchrun --standalone --nproc-per-node N scripts/bench_scaling.py [CASE …] [--out FILE.json]
    python scripts/bench_scaling.py                     # one rank: the step that others scale from

A CASE is CONFIG:weak:ROWS (rows on each rank) or CONFIG:strong:ROWS (rows in all), CONFIG one of
those of bench_train.py; each is run with plain data parallelism and with a sharded optimizer. In
turns, so that the clocks of the cards treat them alike, every rank times

    alone    the step of one process, all ranks at once, none knowing of the others
    step     the step of N ranks
    silent   the same with every collective left out: the arithmetic of a rank, nothing else

and, from a list of the step's collectives, these by themselves (`comm`). Reported are medians, of
the slowest rank (`alone`: the mean over ranks). exposed = step - silent, which includes waiting for
the slowest rank; hidden = comm - exposed. Efficiency: weak alone / step, strong alone / (N step).
NCCL on GPUs, gloo elsewhere.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import optim.sharded
import training.ranks
from scripts.bench_train import SETTINGS, build, clean, step_times
from training.device import choose_device, set_determinism
from training.errors import reported
from training.graph import EAGER_CALLS, GraphedWork
from training.ranks import ALONE, Ranks, joined
from training.resolve import ResolvedRun, World
from training.state import TrainState

CASES = ("maze:weak:192", "maze:strong:768", "mlp:strong:768")
MICRO = {"maze": 192, "arc": 192}  # rows at once; more are accumulated, as one card would have to
MODES = {"plain": "optim.sharded=false", "sharded": "optim.sharded=true"}
_ALONE: dict[str, Callable[[Tensor, int], dist.Work]] = {
    "all_reduce": lambda t, _: dist.all_reduce(t, async_op=True),
    "all_gather": lambda t, _: training.ranks._all_gather(_whole(t), t, async_op=True),
    "reduce_scatter": lambda t, _: optim.sharded._reduce_scatter(t, _whole(t), async_op=True),
    "reduce": lambda t, root: dist.reduce(t, root, async_op=True),
    "broadcast": lambda t, root: dist.broadcast(t, root, async_op=True),
}


class Call(NamedTuple):
    """A collective of a step: what a rank contributes (or receives, of reduce_scatter)."""

    kind: str
    numel: int
    dtype: torch.dtype
    root: int = 0


class Ended:
    """Stands in for a collective that has ended."""

    def wait(self) -> bool:
        """Nothing to wait for."""
        return True


@contextmanager
def left_out(calls: list[Call]) -> Iterator[None]:
    """Inside, the collectives of a step do nothing but note themselves in `calls`."""

    def all_reduce(tensor: Tensor, *_: Any, **__: Any) -> Ended:
        calls.append(Call("all_reduce", tensor.numel(), tensor.dtype))
        return Ended()

    def all_gather(out: Tensor, mine: Tensor, **_: Any) -> Ended:
        calls.append(Call("all_gather", mine.numel(), mine.dtype))
        if out.untyped_storage().data_ptr() != mine.untyped_storage().data_ptr():
            out.view(-1, *mine.shape).copy_(mine.expand(out.numel() // mine.numel(), *mine.shape))
        return Ended()

    def reduce_scatter(mine: Tensor, _: Tensor, **__: Any) -> Ended:
        calls.append(Call("reduce_scatter", mine.numel(), mine.dtype))
        return Ended()

    def rooted(kind: str) -> Callable[..., Ended]:
        def collective(tensor: Tensor, root: int, **_: Any) -> Ended:
            calls.append(Call(kind, tensor.numel(), tensor.dtype, root))
            return Ended()

        return collective

    places = [(dist, "all_reduce", all_reduce), (dist, "reduce", rooted("reduce")),
              (dist, "broadcast", rooted("broadcast")),
              (training.ranks, "_all_gather", all_gather),
              (optim.sharded, "_all_gather", all_gather),
              (optim.sharded, "_reduce_scatter", reduce_scatter)]  # fmt: skip
    before = [getattr(module, name) for module, name, _ in places]
    try:
        for module, name, stand_in in places:
            setattr(module, name, stand_in)
        yield
    finally:
        for (module, name, _), own in zip(places, before, strict=True):
            setattr(module, name, own)


class Contender:
    """A training state whose steps are timed, with its collectives or without."""

    def __init__(self, state: TrainState, run: ResolvedRun, silent: bool) -> None:
        self.state, self.run, self.silent = state, run, silent
        self.calls: list[Call] = []
        self.one_step: list[Call] = []
        self.times: list[float] = []
        self.graph = None
        if state.graph is not None:
            self.graph = GraphedWork(state.device)
            state.graph = self.graph

    def advance(self, steps: int) -> list[float]:
        """Milliseconds of `steps` steps."""
        self.state.graph = self.graph
        if not self.silent:
            return step_times(self.state, self.run, steps)
        self.calls.clear()
        with left_out(self.calls):
            return step_times(self.state, self.run, steps)

    def warm_up(self, before: Contender | None) -> None:
        """Compile and capture; of a silent one, `one_step` are then the collectives of a step.

        The graph's memory is that of the one `before`: no two run at once, and five of them would
        not fit the card.
        """
        if before is not None and before.graph is not None:
            self.graph.pool = before.graph.pool
        self.advance(1)
        self.one_step = list(self.calls)
        self.advance(EAGER_CALLS + 1)


def communication(calls: list[Call], device: torch.device, repeats: int) -> list[float]:
    """Milliseconds of a step's collectives by themselves, as fast as they can follow each other."""
    tensors = [torch.zeros(c.numel, dtype=c.dtype, device=device) for c in calls]

    def run() -> None:
        works = [_ALONE[c.kind](t, c.root) for c, t in zip(calls, tensors, strict=True)]
        for work in works:
            work.wait()

    return timed(run, device, repeats)


def _whole(mine: Tensor) -> Tensor:
    """Room for what all ranks contribute."""
    return mine.new_empty(mine.numel() * dist.get_world_size())


def timed(work: Callable[[], None], device: torch.device, repeats: int) -> list[float]:
    """Milliseconds of single calls; replayed from a CUDA graph on a GPU."""
    if device.type != "cuda":
        times = []
        for _ in range(repeats):
            start = time.perf_counter()
            work()
            times.append((time.perf_counter() - start) * 1e3)
        return times
    graph = GraphedWork(device)
    events = []
    for _ in range(EAGER_CALLS + 1):
        graph.run("", work)
    for _ in range(repeats):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        graph.run("", work)
        end.record()
        events.append((begin, end))
    torch.cuda.synchronize()
    return [begin.elapsed_time(end) for begin, end in events]


def state_bytes(state: TrainState) -> int:
    """What this rank keeps of the moments of the weights."""
    if state.sharded is not None:
        return sum(p.tensor.nbytes for p in state.sharded.pieces())
    name = next(n for n in state.optimizers if n != "sparse_signsgd")
    moments = state.optimizers[name].state.values()
    return sum(t.nbytes for some in moments for t in some.values())


def contend(case: str, args: argparse.Namespace, device: torch.device, ranks: Ranks) -> list[dict]:
    """The rows of one case, one for each mode; equal on all ranks."""
    config, scaling, rows = case.split(":")
    local = int(rows) if scaling == "weak" else int(rows) // ranks.size

    def overrides(mode: str, batch: int, here: int) -> list[str]:
        accum = -(-here // MICRO.get(config, here))
        return [MODES[mode], f"global_batch_size={batch}", f"grad_accum={accum}", *args.set]

    first = build(config, overrides("plain", int(rows), int(rows)), device, ALONE)
    contenders = {"alone": Contender(*first, silent=False)}
    for mode in args.modes if ranks.size > 1 else ():
        together = build(config, overrides(mode, local * ranks.size, local), device, ranks)
        contenders[mode] = Contender(*together, silent=False)
        contenders[f"{mode} silent"] = Contender(*together, silent=True)
    before = None
    for contender in contenders.values():
        contender.warm_up(before)
        before = contender
    for _ in range(args.rounds):
        for contender in contenders.values():
            ranks.gather(None)
            contender.advance(1)
            contender.times += contender.advance(args.steps)
    medians = {name: statistics.median(c.times) for name, c in contenders.items()}
    everyone = ranks.gather(medians)
    alone = [m["alone"] for m in everyone]
    base = {"case": case, "ranks": ranks.size, "alone_ms": statistics.mean(alone),
            "alone_of_each": alone}  # fmt: skip
    if ranks.size == 1:
        return [{**base, "state_MiB": state_bytes(first[0]) / 2**20}]
    found = []
    for mode in args.modes:
        step = max(m[mode] for m in everyone)
        silent = max(m[f"{mode} silent"] for m in everyone)
        calls = contenders[f"{mode} silent"].one_step
        comm = max(ranks.gather(statistics.median(communication(calls, device, 10))))
        exposed = step - silent
        found.append({
            **base, "mode": mode, "step_ms": step, "silent_ms": silent, "comm_ms": comm,
            "exposed_ms": exposed, "hidden_ms": max(comm - max(exposed, 0.0), 0.0),
            "efficiency": base["alone_ms"] / step / (1 if scaling == "weak" else ranks.size),
            "collectives": len(calls),
            "MiB": sum(c.numel * c.dtype.itemsize for c in calls) / 2**20,
            "state_MiB": max(ranks.gather(state_bytes(contenders[mode].state))) / 2**20,
        })  # fmt: skip
    return found


def show(row: dict[str, Any]) -> None:
    """One line of the table."""
    line = f"{row['case']:18} {row['ranks']:2} ranks {row.get('mode', ''):8} "
    line += f"alone {row['alone_ms']:9.3f}"
    if row["ranks"] > 1:
        line += (
            f"  step {row['step_ms']:9.3f}  silent {row['silent_ms']:9.3f}  comm "
            f"{row['comm_ms']:7.3f}  exposed {row['exposed_ms']:7.3f}  hidden "
            f"{row['hidden_ms']:7.3f} ms  efficiency {row['efficiency']:6.1%}  "
            f"{row['collectives']} collectives, {row['MiB']:.1f} MiB"
        )
    print(f"{line}  state {row['state_MiB']:.2f} MiB", flush=True)


def parse() -> argparse.Namespace:
    """The command line, checked."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("cases", nargs="*", metavar="CASE", help=f"none: {' '.join(CASES)}")
    parser.add_argument("--modes", nargs="+", choices=MODES, default=list(MODES))
    parser.add_argument("--steps", type=int, default=10, help="timed in each round")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--set", nargs="*", default=[], help="overrides, as of pretrain.py")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--out", type=Path, help="write the numbers as JSON")
    args = parser.parse_args()
    args.cases = args.cases or list(CASES)
    size = World.from_environment().size
    for case in args.cases:
        parts = case.split(":")
        good = len(parts) == 3 and parts[0] in SETTINGS and parts[1] in ("weak", "strong")
        if not (good and parts[2].isdecimal() and int(parts[2]) > 0):
            parser.error(f"{case}: a case is CONFIG:weak:ROWS or CONFIG:strong:ROWS, CONFIG one "
                         f"of {', '.join(SETTINGS)}")  # fmt: skip
        if parts[1] == "strong" and int(parts[2]) % size:
            parser.error(f"{case}: {parts[2]} rows cannot be shared out to {size} ranks")
    return args


def main() -> None:
    """Run and report."""
    args = parse()
    world = World.from_environment()
    device = choose_device(args.device, world.local_rank)
    set_determinism(device)
    with joined(world) as ranks:
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
        backend = "–" if ranks.size == 1 else "nccl" if device.type == "cuda" else "gloo"
        if ranks.rank == 0:
            print(f"{ranks.size} × {name}, {backend}, torch {torch.__version__}")
        rows = []
        for case in args.cases:
            found = contend(case, args, device, ranks)
            rows += found
            clean()
            for row in found if ranks.rank == 0 else ():
                show(row)
        if args.out and ranks.rank == 0:
            document = {
                "device": name,
                "backend": backend,
                "torch": torch.__version__,
                "rows": rows,
            }
            args.out.write_text(json.dumps(document, indent=1))


if __name__ == "__main__":
    with reported():
        main()
