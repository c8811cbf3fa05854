"""What a model costs to train: parameters, FLOPs, activation memory, estimated time of a step here.

    python scripts/model_info.py arch=trm_mlp
    python scripts/model_info.py arch=trm arch.L_cycles=4 global_batch_size=192 --seq-len 900
    python scripts/model_info.py arch=hrm --no-time       # nothing is measured: seconds anywhere

Memory is that of the plain path, counted without computing; compiled and fused steps keep less. The
time is put together from one update of each level, with and without gradient, measured on the
device at hand on as many rows as take half a second, in proportion to rows; it leaves out the
optimizer, and is that of the plain path unless compile=on.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from models import ModelDims, build_model
from models.cost import cost, updates_of
from models.reasoning import ReasoningModel
from scripts.arguments import Parser, whole
from training.cli import compose_values, preflight
from training.config import RunConfig, validate
from training.device import choose_device, configure_compiler, device_name
from training.errors import reported
from training.resolve import World, check

MODES = ("none", "block", "cycle", "all")


def seconds(work: Callable[[], None], device: torch.device) -> float:
    """Median of three calls, after one that warms up."""

    def once() -> float:
        start = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        elif device.type == "mps":
            torch.mps.synchronize()
        return time.perf_counter() - start

    once()
    return statistics.median(once() for _ in range(3))


def update_time(model: ReasoningModel, level: str, rows: int, grad: bool) -> float:
    """Seconds of one update of `rows` rows, with forward and backward pass if `grad`."""
    device = model.lm_head.weight.device
    length, width = model.config.prefix_len + model.dims.seq_len, model.config.hidden_size
    x = torch.randn(rows, length, width, device=device, dtype=model.embedding.dtype)
    x.requires_grad_(grad)

    def work() -> None:
        with torch.set_grad_enabled(grad):
            y = model.levels[level](x, x)
            if grad:
                y.sum().backward()

    return seconds(work, device)


def step_time(model: ReasoningModel, rows: int) -> tuple[float, int]:
    """Estimated seconds of a step of `rows` rows, and the rows that were measured."""
    level = next(iter(model.levels))
    measured = 1
    while measured < rows and update_time(model, level, measured, True) < 0.1:
        measured = min(2 * measured, rows)
    total = sum(
        count * update_time(model, name, measured, grad)
        for (name, grad), count in updates_of(model.config).items()
    )
    return total * rows / measured, measured


def report(config: RunConfig, dims: ModelDims, timed: bool) -> None:
    """Print what there is to know."""
    rows, device = config.global_batch_size, choose_device(config.device)
    arch = config.arch
    costs = {
        mode: cost(arch.model_copy(update={"grad_checkpoint": mode}), dims, rows, device)
        for mode in MODES
    }
    plain = costs["none"]
    embeddings = f" + {plain.puzzle_numbers:,} in puzzle embeddings" if plain.puzzle_numbers else ""
    print(f"model       {arch.name}: {plain.parameters:,} parameters{embeddings}")
    print(f"states      {', '.join(arch.states)}, each {rows} × {arch.prefix_len + dims.seq_len} × "
          f"{arch.hidden_size}")  # fmt: skip
    print(f"ACT step    {plain.updates + plain.grad_updates} updates, {plain.grad_updates} of them "
          f"with gradient; {arch.halt_max_steps} ACT steps at most")  # fmt: skip
    flops = plain.forward_flops, plain.gradient_flops
    print(f"FLOPs       {sum(flops) / 1e12:.3f} T per step: {flops[0] / 1e12:.3f} forward, "
          f"{flops[1] / 1e12:.3f} gradient")  # fmt: skip
    print("activations grad_checkpoint    GiB    FLOPs")
    for mode, found in costs.items():
        more = (found.forward_flops + found.gradient_flops) / sum(flops) - 1
        print(f"            {mode:<15} {found.activation_bytes / 2**30:6.2f}  {more:+7.1%}")
    if timed:
        model = build_model(arch, dims, seed=0, device=device)
        if config.compile == "on":
            configure_compiler()
            model.compile_levels()
        estimate, measured = step_time(model, rows)
        rate = sum(flops) / estimate / 1e12
        print(f"time        {estimate * 1e3:.0f} ms per step on {device_name(device)}, {rate:.2f} "
              f"TFLOP/s (measured on {measured} rows)")  # fmt: skip


def main() -> None:
    """Read the command line and report."""
    parser = Parser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seq-len", type=whole(1), default=81, help="tokens of a puzzle")
    parser.add_argument("--vocab-size", type=whole(2), default=11)
    parser.add_argument("--puzzles", type=whole(1), default=1, help="rows of the puzzle embedding")
    parser.add_argument("--no-time", action="store_true", help="measure nothing")
    options, given = parser.parse_known_args()
    overrides = preflight("cfg_pretrain", RunConfig, ["experiment=plain", *given])
    config: RunConfig = validate(RunConfig, compose_values("cfg_pretrain", overrides))
    check(config, World())
    dims = ModelDims(options.seq_len, options.vocab_size, options.puzzles)
    report(config, dims, not options.no_time)


if __name__ == "__main__":
    with reported():
        main()
