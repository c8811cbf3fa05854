"""Peak memory and time of a training step with and without gradient checkpointing.

    python scripts/bench_memory.py arch=trm arch.L_cycles=4 global_batch_size=192 --seq-len 900
    python scripts/bench_memory.py arch=trm arch.hidden_size=64 global_batch_size=8 --modes none all

The whole step as in training (optimizer, average, compilation, CUDA graph as configured), on random
tokens, one mode after the other in one process. Time: median over steps, between CUDA events or by
the clock. Memory: what torch allocated at most (CUDA only). The loss is the mean over the timed
steps: equal losses mean equal training.
"""

from __future__ import annotations

import gc
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from data import PuzzleDataset
from data.puzzles import PuzzleSet
from models import ModelDims
from scripts.arguments import Parser, whole
from training.cli import compose_values, preflight
from training.config import RunConfig, validate
from training.device import choose_device, prepare_execution, set_determinism
from training.errors import reported
from training.resolve import ResolvedRun, World, check
from training.state import TrainState
from training.step import train_step

MODES = ("none", "block", "cycle", "all")


def random_dataset(dims: ModelDims) -> PuzzleDataset:
    """1,024 puzzles of random tokens."""
    rng = np.random.default_rng(0)
    tokens = rng.integers(1, dims.vocab_size, (2, 1024, dims.seq_len), dtype=np.int32)
    puzzles = PuzzleSet.of_single_examples(tokens[0], tokens[1])
    return PuzzleDataset(
        split="train", vocab_size=dims.vocab_size, seq_len=dims.seq_len, pad_id=0,
        num_puzzle_identifiers=dims.num_puzzle_ids, ignore_label_id=None, blank_identifier_id=0,
        fingerprint="", augmentation=None, sets={"all": puzzles},
    )  # fmt: skip


def build(config: RunConfig, dims: ModelDims, device: torch.device) -> TrainState:
    """A training state of `config` on random data."""
    run = ResolvedRun(config, dims, Path(), None, 10**6, World(), Path(), "", None)
    state = TrainState(run, random_dataset(dims), device)
    prepare_execution(state, config)
    return state


def timed(step: Callable[[], None], device: torch.device) -> float:
    """Milliseconds of one step."""
    if device.type != "cuda":
        start = time.perf_counter()
        step()
        return (time.perf_counter() - start) * 1e3
    events = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
    events[0].record()
    step()
    events[1].record()
    torch.cuda.synchronize(device)
    return events[0].elapsed_time(events[1])


def measure(config: RunConfig, dims: ModelDims, steps: int, device: torch.device) -> str:
    """One line of the table."""
    state = build(config, dims, device)

    def step() -> None:
        train_step(state, config, 10**6)

    if device.type == "cuda":  # the peak is that of the steps before a graph is captured
        torch.cuda.reset_peak_memory_stats(device)
    start = time.perf_counter()
    for _ in range(4):
        timed(step, device)
    warm_up = time.perf_counter() - start
    for value in state.sums.values():
        value.zero_()
    times = [timed(step, device) for _ in range(steps)]
    peak = torch.cuda.max_memory_allocated(device) / 2**30 if device.type == "cuda" else 0.0
    loss = float(state.sums["lm_loss"]) / config.global_batch_size / steps
    parameters = sum(p.numel() for p in state.model.parameters())
    return (
        f"{config.arch.grad_checkpoint:>6}  {statistics.median(times):9.1f} ms  {min(times):9.1f}"
        f"  {peak:7.2f} GiB  {parameters / 1e6:8.1f} M  {warm_up:6.1f} s  {loss:.6f}"
    )


def main() -> None:
    """Measure every mode."""
    parser = Parser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--modes", nargs="+", choices=MODES, default=MODES)
    parser.add_argument("--steps", type=whole(1), default=10)
    parser.add_argument("--seq-len", type=whole(1), default=81)
    parser.add_argument("--vocab-size", type=whole(2), default=12)
    parser.add_argument("--puzzles", type=whole(1), default=1000, help="rows of the puzzle table")
    options, given = parser.parse_known_args()
    overrides = preflight("cfg_pretrain", RunConfig, ["experiment=plain", "data.num_aug=0", *given])
    config: RunConfig = validate(RunConfig, compose_values("cfg_pretrain", overrides))
    check(config, World())
    device = choose_device(config.device)
    set_determinism(device)
    dims = ModelDims(options.seq_len, options.vocab_size, options.puzzles)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else str(device)
    print(f"{config.arch.name}, {dims}, batch {config.global_batch_size}, {name}")
    print("  kept      median        best         peak     params  warm-up      loss")
    for mode in options.modes:
        arch = config.arch.model_copy(update={"grad_checkpoint": mode})
        try:
            print(measure(config.model_copy(update={"arch": arch}), dims, options.steps, device),
                  flush=True)  # fmt: skip
        except torch.cuda.OutOfMemoryError as error:
            print(f"{mode:>6}  out of memory: {str(error).split('. ')[0]}", flush=True)
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()


if __name__ == "__main__":
    with reported():
        main()
