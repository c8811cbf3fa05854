"""What saving a checkpoint beside the training costs the loop, in steps.

    python scripts/bench_saving.py [CONFIG …] [--steps N] [--set KEY=VALUE …]

CONFIG is one of bench_train.py's. In turns, N steps without a save and N steps with one in their
middle, as training/loop.py saves: the device is waited for, the state copied to the host, a thread
writes and syncs the files while the steps go on. The difference of the medians over the time of a
step is the cost. N must outlast the writing, which is checked.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from scripts.bench_train import SETTINGS, build, clean, step_times
from training.device import choose_device, set_determinism
from training.errors import reported
from training.ranks import ALONE
from training.resolve import ResolvedRun
from training.saving import Saver
from training.state import TrainState


def stretch(state: TrainState, run: ResolvedRun, saver: Saver | None, steps: int) -> list[float]:
    """Seconds of `steps` steps, with a save in the middle, and of the loop's part in that save."""
    ALONE.settle(state.device)
    start = time.perf_counter()
    step_times(state, run, steps // 2)
    blocked = time.perf_counter()
    if saver is not None:
        ALONE.settle(state.device)
        if not saver.has(state.step):
            saver.save(state, {"config": run.config.model_dump(mode="json")})
    blocked = time.perf_counter() - blocked
    step_times(state, run, steps - steps // 2)
    ALONE.settle(state.device)
    return [time.perf_counter() - start, blocked]


def bench(name: str, args: argparse.Namespace) -> None:
    """One line of the table."""
    device = choose_device(args.device)
    set_determinism(device)
    state, run = build(name, args.set, device)
    step_times(state, run, 4)
    with tempfile.TemporaryDirectory() as folder:
        saver = Saver(Path(folder), ALONE, keep=1)
        stretch(state, run, saver, 4)  # makes the buffers
        saver.wait()
        plain, saved, blocked = [], [], []
        for _ in range(args.rounds):
            plain.append(stretch(state, run, None, args.steps)[0])
            seconds, part = stretch(state, run, saver, args.steps)
            if any(not job.done() for job in saver._jobs):
                raise SystemExit(f"error: --steps {args.steps} ended before the save: raise it")
            saved.append(seconds)
            blocked.append(part)
        saver.close()
        size = sum(p.stat().st_size for p in Path(folder).rglob("*.safetensors")) / 2**20
    step = statistics.median(plain) / args.steps
    cost = statistics.median(s - p for s, p in zip(saved, plain, strict=True))
    print(f"{name:10} {device.type}: {size:.0f} MiB, a step {step * 1e3:.2f} ms, a save costs "
          f"{cost * 1e3:.2f} ms = {cost / step:.2f} steps, {statistics.median(blocked) * 1e3:.2f} "
          f"ms of them at once", flush=True)  # fmt: skip


def main() -> None:
    """Run and report."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("configs", nargs="*", metavar="CONFIG", help=f"of {', '.join(SETTINGS)}")
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--set", nargs="*", default=[], help="overrides, as of pretrain.py")
    parser.add_argument("--device", default="auto")
    args = parser.parse_args()
    for config in args.configs or ("small", "mlp"):
        if config not in SETTINGS:
            parser.error(f"{config} is none of {', '.join(SETTINGS)}")
        bench(config, args)
        clean()


if __name__ == "__main__":
    with reported():
        main()
