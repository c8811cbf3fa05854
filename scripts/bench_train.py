"""Time the training step of the configurations that the peers were measured on.

    python scripts/bench_train.py [CONFIG …] [--set KEY=VALUE …] [--out FILE.json]
    python scripts/bench_train.py attention --variants     # what each fusion is worth
    python scripts/bench_train.py mlp --profile FOLDER     # a trace, and the costliest kernels
    python scripts/bench_train.py mlp --cold               # start-up with empty compile caches

Every configuration is a whole training step as `pretrain.py` takes it: batch, ACT step, loss,
backward, optimizer, sparse embeddings, EMA, metrics. Data are random tokens. Step times are
medians and minima over single steps (events on a GPU). FLOPs count the matrix products of the
model and of attention, once forward without gradient, three times with; utilization is against a
bf16 product of 8192³ measured in the same run. `first` is the time from the finished state to the
end of the second step: compilation, warm-up, capture.
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import json
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from data.puzzles import DatasetInfo, PuzzleDataset, PuzzleSet
from models import kernels
from scripts.arguments import Parser, whole
from training.cli import compose_values
from training.config import RunConfig, validate
from training.device import choose_device, prepare_execution, set_determinism
from training.ranks import ALONE, Ranks
from training.resolve import ResolvedRun, World, dims_of
from training.speed import step_flops
from training.state import TrainState
from training.step import train_step

COMMON = ("data=sudoku", "experiment=plain", "grad_clip_norm=0", "optim=adamw", "data.num_aug=0")
VARIANTS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {  # name → switched off, overrides
    "all": ((), ()),
    "no fused mixer": (("mixer",), ()),
    "no fused attention": (("attention",), ()),
    "no fused SwiGLU": (("swiglu",), ()),
    "no fused residual": (("residual",), ()),
    "no fused choice of rows": (("rows",), ()),
    "no kernels": (kernels.OPERATIONS, ()),
    "no CUDA graph": ((), ("cuda_graph=off",)),
    "no compilation": ((), ("compile=off",)),
}


@dataclasses.dataclass(frozen=True)
class Setting:
    """Overrides of a configuration, and the shape of its data."""

    overrides: tuple[str, ...]
    seq_len: int
    vocab_size: int
    puzzle_ids: int = 1


SETTINGS = {
    "mlp": Setting(("arch=trm_mlp", "global_batch_size=768"), 81, 11),
    "attention": Setting(("arch=trm", "global_batch_size=768"), 81, 11),
    "maze": Setting(("arch=trm", "arch.L_cycles=4", "global_batch_size=192"), 900, 6),
    "arc": Setting(("arch=trm", "arch.L_cycles=4", "global_batch_size=192"), 900, 12, 876_406),
    "hrm": Setting(("arch=hrm", "global_batch_size=768"), 81, 11),
    "urm": Setting(("arch=urm", "global_batch_size=768"), 81, 11),
    "small": Setting(
        ("arch=trm", "arch.hidden_size=128", "arch.num_heads=4", "arch.H_cycles=2",
         "arch.L_cycles=2", "arch.puzzle_emb_len=4", "arch.puzzle_emb_ndim=512",
         "global_batch_size=64"), 16, 6,
    ),
}  # fmt: skip


def random_dataset(setting: Setting, rows: int = 4096) -> PuzzleDataset:
    """Random tokens in a dataset of the setting's shape."""
    rng = np.random.default_rng(0)
    rows = max(rows, 1)
    tokens = rng.integers(1, setting.vocab_size, (2, rows, setting.seq_len), dtype=np.uint8)
    indices = np.arange(rows + 1, dtype=np.int64)
    ids = rng.integers(0, setting.puzzle_ids, rows).astype(np.int32)
    arrays = PuzzleSet(tokens[0], tokens[1], ids, indices, indices)
    return PuzzleDataset(
        split="train", vocab_size=setting.vocab_size, seq_len=setting.seq_len,
        num_puzzle_identifiers=setting.puzzle_ids, pad_id=0, ignore_label_id=0,
        blank_identifier_id=0, fingerprint="random", augmentation=None, sets={"all": arrays},
    )  # fmt: skip


def build(
    name: str, overrides: list[str], device: torch.device, ranks: Ranks = ALONE
) -> tuple[TrainState, ResolvedRun]:
    """The training state of a configuration on random data."""
    setting = SETTINGS[name]
    overrides = [*COMMON, *setting.overrides, *overrides]
    config: RunConfig = validate(RunConfig, compose_values("cfg_pretrain", overrides))
    dataset = random_dataset(setting)
    info = DatasetInfo(
        vocab_size=dataset.vocab_size, seq_len=dataset.seq_len, pad_id=0, ignore_label_id=0,
        blank_identifier_id=0, num_puzzle_ids=setting.puzzle_ids,
        num_train_examples=dataset.rows_per_epoch, total_groups=dataset.rows_per_epoch,
        mean_puzzle_examples=1.0, test_sets={}, augmentation=None, fingerprint="random",
        source=None,
    )  # fmt: skip
    folder = Path(tempfile.gettempdir())
    world = World(ranks.rank, ranks.size)
    run = ResolvedRun(config, dims_of(info), folder, info, 10**6, world, folder, "bench", None)
    state = TrainState(run, dataset, device, ranks)
    prepare_execution(state, config)
    return state, run


def step_times(state: TrainState, run: ResolvedRun, steps: int) -> list[float]:
    """Milliseconds of single steps, by events on a GPU."""
    cuda = state.device.type == "cuda"
    times = []
    for _ in range(steps):
        if cuda:
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            train_step(state, run.config, run.total_steps)
            end.record()
            times.append((begin, end))
        else:
            start = time.perf_counter()
            train_step(state, run.config, run.total_steps)
            times.append((time.perf_counter() - start) * 1e3)
    if cuda:
        torch.cuda.synchronize()
        times = [begin.elapsed_time(end) for begin, end in times]
    return times


def product_rate(device: torch.device) -> float:
    """TFLOP/s of a bf16 product of 8192³ (of 1024³ in float32 on a CPU)."""
    size, dtype = (8192, torch.bfloat16) if device.type == "cuda" else (1024, torch.float32)
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    for _ in range(3):
        a @ b
    if device.type == "cuda":
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        for _ in range(10):
            a @ b
        end.record()
        end.synchronize()
        ms = begin.elapsed_time(end) / 10
    else:
        start = time.perf_counter()
        a @ b
        ms = (time.perf_counter() - start) * 1e3
    return 2 * size**3 / ms / 1e9


def bench(
    name: str, overrides: list[str], args: argparse.Namespace, product: float
) -> dict[str, Any]:
    """One row of the table."""
    device = choose_device(args.device)
    set_determinism(device)
    cuda = device.type == "cuda"
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    state, run = build(name, overrides, device)
    start = time.perf_counter()
    step_times(state, run, 2)
    first = time.perf_counter() - start
    step_times(state, run, args.warmup)
    wall = time.perf_counter()
    times = step_times(state, run, args.steps)
    wall = (time.perf_counter() - wall) / args.steps * 1e3
    row: dict[str, Any] = {"config": name, "overrides": overrides, "first_s": first}
    row |= {"ms": statistics.median(times), "min_ms": min(times), "wall_ms": wall}
    row["examples_per_s"] = run.config.global_batch_size / row["wall_ms"] * 1e3
    row["tflop"] = step_flops(run, device) / 1e12
    row["utilization"] = row["tflop"] / row["ms"] * 1e3 / product
    if cuda:
        row["peak_GiB"] = torch.cuda.max_memory_allocated() / 2**30
    show(row)
    if args.profile:
        profile(state, run, args.profile, name)
    return row


def profile(state: TrainState, run: ResolvedRun, folder: Path, name: str) -> None:
    """A trace of three steps in `folder`, and the ten costliest kernels on the terminal."""
    cuda = state.device.type == "cuda"
    activities = [torch.profiler.ProfilerActivity.CPU]
    if cuda:
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    with torch.profiler.profile(activities=activities) as prof:
        step_times(state, run, 3)
    folder.mkdir(parents=True, exist_ok=True)
    prof.export_chrome_trace(str(folder / f"{name}.json.gz"))
    kind = torch.autograd.DeviceType.CUDA if cuda else torch.autograd.DeviceType.CPU
    key = "self_device_time_total" if cuda else "self_cpu_time_total"
    rows = [e for e in prof.key_averages() if e.device_type == kind]
    rows.sort(key=lambda e: -getattr(e, key))
    total = sum(getattr(e, key) for e in rows)
    for e in rows[:10]:
        spent = getattr(e, key)
        print(f"  {spent / 3e3:9.3f} ms {spent / total:6.1%} {e.count / 3:7.1f} × "
              f"{spent / e.count:9.1f} µs  {e.key[:90]}")  # fmt: skip


def show(row: dict[str, Any]) -> None:
    """One line of the table."""
    print(
        f"{row['config']:10} {row['ms']:9.2f} ms (min {row['min_ms']:.2f}, wall "
        f"{row['wall_ms']:.2f}) {row['examples_per_s']:8.0f} examples/s {row['tflop']:6.2f} TFLOP "
        f"{row['utilization']:5.1%} {row.get('peak_GiB', 0):6.2f} GiB  first {row['first_s']:5.1f} "
        f"s  {row.get('variant', '')} {' '.join(row['overrides'])}",
        flush=True,
    )


def clean() -> None:
    """Nothing of one measurement is left for the next."""
    gc.collect()
    torch._dynamo.reset()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def main() -> None:
    """Run and report."""
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument("configs", nargs="*", help=f"of {', '.join(SETTINGS)}; none: all")
    parser.add_argument("--set", nargs="*", default=[], help="overrides, as of pretrain.py")
    parser.add_argument("--steps", type=whole(1), default=20)
    parser.add_argument("--warmup", type=whole(0), default=3)
    parser.add_argument("--variants", action="store_true", help="with each fusion switched off")
    parser.add_argument("--profile", type=Path, help="folder for traces")
    parser.add_argument("--cold", action="store_true", help="compile caches start empty")
    parser.add_argument("--out", type=Path, help="write the numbers as JSON")
    parser.add_argument("--device", default="auto")
    args = parser.parse_args()
    if args.cold:
        for name in ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR", "XDG_CACHE_HOME"):
            os.environ[name] = tempfile.mkdtemp()
    device = choose_device(args.device)
    rate = product_rate(device)
    name = torch.cuda.get_device_name() if device.type == "cuda" else "cpu"
    print(f"{name}, torch {torch.__version__}, product {rate:.0f} TFLOP/s")
    rows = []
    for config in args.configs or SETTINGS:
        for variant, (off, overrides) in (VARIANTS if args.variants else {"": ((), ())}).items():
            if off:
                kernels.switch_off(*off)
            rows.append(bench(config, [*args.set, *overrides], args, rate))
            rows[-1]["variant"] = variant
            if variant:
                print(f"{'':10} ↑ {variant}", flush=True)
            kernels.switch_on()
            clean()
    if args.out:
        args.out.write_text(json.dumps({"device": name, "rate": rate, "rows": rows}, indent=1))


if __name__ == "__main__":
    main()
