"""The ways people run AdamATan2 today, side by side: speed, memory, convergence, differences.

    python scripts/compare_adam_atan2.py [--quick] [--out FILE.json]

1. "AdamW as AdamATan2": what the forks of HRM and TRM fall back to where the CUDA extension does
   not build. 2. The rule as a plain PyTorch loop. 3. The package adam-atan2-pytorch (another form
   and other defaults: `a` = 1.27, second beta 0.99, no decay; here with the same betas and decay).
   4. The CUDA original `adam-atan2`, where it is installed. 5. Ours.
"""

from __future__ import annotations

import argparse
import gc
import json
import math
import statistics
import sys
import time
from collections.abc import Callable, Iterable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from optim import AdamATan2

BETAS, DECAY = (0.9, 0.95), 0.1
CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
Factory = Callable[[Iterable[Tensor], float], torch.optim.Optimizer]


class PlainAdamATan2(torch.optim.Optimizer):
    """The rule of the CUDA original as most people write it: a loop over tensors."""

    def __init__(self, params: Iterable[Tensor], lr: float) -> None:
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self) -> None:
        """One update."""
        for group in self.param_groups:
            for p in group["params"]:
                state = self.state[p]
                if not state:
                    state.update(t=0, m=torch.zeros_like(p), v=torch.zeros_like(p))
                state["t"] += 1
                m, v, lr = state["m"], state["v"], group["lr"]
                m.mul_(BETAS[0]).add_(p.grad, alpha=1 - BETAS[0])
                v.mul_(BETAS[1]).addcmul_(p.grad, p.grad, value=1 - BETAS[1])
                c1, c2 = (1 - b ** state["t"] for b in BETAS)
                p.mul_(1 - lr * DECAY).add_(torch.atan2(m, (v / c2).sqrt_()), alpha=-lr / c1)


def ways() -> dict[str, Factory]:
    """Name → from parameters and a learning rate to an optimizer."""
    common: dict[str, Any] = {"betas": BETAS, "weight_decay": DECAY}
    table: dict[str, Factory] = {
        "AdamW as AdamATan2": lambda ps, lr: torch.optim.AdamW(ps, lr, **common),
        "plain PyTorch loop": PlainAdamATan2,
    }
    if find_spec("adam_atan2_pytorch"):
        from adam_atan2_pytorch import AdamAtan2

        table["adam-atan2-pytorch"] = lambda ps, lr: AdamAtan2(ps, lr, **common)
    if find_spec("adam_atan2"):
        try:
            from adam_atan2 import AdamATan2 as Original

            table["adam-atan2 (CUDA)"] = lambda ps, lr: Original(ps, lr=lr, **common)
        except ImportError as error:
            print(f"adam-atan2 (CUDA) is installed but does not import: {error}")
    table["ours, outside"] = lambda ps, lr: AdamATan2(ps, lr, BETAS, DECAY, fused="auto")
    table["ours, inside, a=1.27"] = lambda ps, lr: AdamATan2(
        ps, lr, BETAS, DECAY, a=1.27, bias_correction="inside", fused="auto"
    )
    return table


def synchronize() -> None:
    """Wait for the device."""
    if CUDA:
        torch.cuda.synchronize()


def speed_and_memory(make: Factory, quick: bool) -> dict[str, float]:
    """Milliseconds of a step, back to back; state bytes per parameter; peak MB of a step."""
    rng = torch.Generator(DEVICE).manual_seed(0)
    width = 256 if quick else 512
    shapes = [(3 * width, width), (width, width), (6 * width, width), (width, 3 * width)] * 2
    params = [torch.randn(s, device=DEVICE, generator=rng).requires_grad_() for s in shapes]
    for p in params:
        p.grad = torch.randn(p.shape, device=DEVICE, generator=rng)
    optimizer = make(params, 1e-4)
    optimizer.step()
    synchronize()
    if CUDA:
        torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated() if CUDA else 0
    times = []
    for _ in range(5 if quick else 15):
        synchronize()
        begin = time.perf_counter()
        for _ in range(3):
            optimizer.step()
        synchronize()
        times.append((time.perf_counter() - begin) / 3 * 1e3)
    peak = (torch.cuda.max_memory_allocated() - before) / 1e6 if CUDA else math.nan
    count = sum(p.numel() for p in params)
    tensors = [t for s in optimizer.state.values() for t in s.values() if isinstance(t, Tensor)]
    size = sum(t.numel() * t.element_size() for t in tensors) / count
    return {"ms": statistics.median(times), "state B/param": size, "step's peak MB": peak}


def differences(make: Factory, steps: int) -> dict[str, float]:
    """From the CUDA original's rule in float64, with the same gradients, in learning rates."""
    lr = 1e-3
    rng = torch.Generator().manual_seed(0)
    start = torch.randn(64, 64, generator=rng)
    p, q = start.to(DEVICE, copy=True), start.double()
    p, q = p.requires_grad_(), q.requires_grad_()
    optimizer, exact = make([p], lr), PlainAdamATan2([q], lr)
    found = {}
    for t in range(1, steps + 1):
        g = torch.randn(64, 64, generator=rng)
        p.grad, q.grad = g.to(DEVICE), g.double()
        optimizer.step()
        exact.step()
        if t in (1, steps):
            gap = (p.detach().cpu().double() - q.detach()).abs()
            found[f"after {t}"] = float(gap.max()) / lr
    return found


def task(make: Factory, lr: float, scale: float, steps: int, seed: int) -> float:
    """Held-out accuracy on labels of a random teacher; the loss is multiplied by `scale`.

    A small loss scale stands for gradients near AdamW's epsilon: deep recursion, large batches.
    """
    rng = torch.Generator().manual_seed(seed)
    teacher = nn.Sequential(nn.Linear(20, 30), nn.Tanh(), nn.Linear(30, 8))
    student = nn.Sequential(
        nn.Linear(20, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 8)
    )
    with torch.no_grad():
        for net, gain in ((teacher, 2.0), (student, 1.4)):
            for p in net.parameters():
                width = p.shape[-1] if p.ndim > 1 else math.inf
                p.copy_(torch.randn(p.shape, generator=rng) * gain / math.sqrt(width))
    teacher, student = teacher.to(DEVICE), student.to(DEVICE)
    optimizer = make(list(student.parameters()), lr)
    for t in range(steps):
        for group in optimizer.param_groups:  # cosine to 0
            group["lr"] = lr * 0.5 * (1 + math.cos(math.pi * t / steps))
        x = torch.randn(128, 20, generator=rng).to(DEVICE)
        with torch.no_grad():
            y = teacher(x).argmax(dim=1)
        (scale * F.cross_entropy(student(x), y)).backward()
        optimizer.step()
        optimizer.zero_grad()
    with torch.no_grad():
        x = torch.randn(4000, 20, generator=rng).to(DEVICE)
        return float((student(x).argmax(dim=1) == teacher(x).argmax(dim=1)).float().mean())


def show(title: str, rows: dict[str, dict[str, float]], form: str) -> None:
    """A table: names down, columns across."""
    columns = list(next(iter(rows.values())))
    print(f"\n{title}\n{'':24}" + "".join(f"{c:>16}" for c in columns))
    for name, row in rows.items():
        print(f"{name:24}" + "".join(f"{format(row[c], form):>16}" for c in columns), flush=True)


def main() -> None:
    """Run and report."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="seconds instead of minutes")
    parser.add_argument("--out", type=Path, help="write the numbers as JSON")
    args = parser.parse_args()
    table = ways()
    where = torch.cuda.get_device_name() if CUDA else f"CPU, {torch.get_num_threads()} threads"
    print(f"{where}, torch {torch.__version__}")
    for name in ("adam_atan2_pytorch", "adam_atan2"):
        if not find_spec(name):
            print(f"{name} is not installed and is left out")

    speed = {}
    for name, make in table.items():
        speed[name] = speed_and_memory(make, args.quick)
        gc.collect()
    size = "1.6" if args.quick else "6.3"
    show(f"A step over {size} M parameters in 8 tensors", speed, ".3f")

    steps = 20 if args.quick else 100
    apart = {name: differences(make, steps) for name, make in table.items()}
    show("Largest distance from the original's rule in float64, in learning rates", apart, ".2e")

    rates = (1e-3,) if args.quick else (3e-4, 1e-3, 3e-3, 1e-2)
    scales = (1.0, 1e-9) if args.quick else (1.0, 1e-6, 1e-8, 1e-9)
    seeds, steps = (1, 100) if args.quick else (3, 600)
    learned = {}
    for name, make in table.items():
        row = {}
        for scale in scales:
            means = [
                statistics.mean(task(make, lr, scale, steps, s) for s in range(seeds))
                for lr in rates
            ]
            best = max(range(len(rates)), key=lambda i: means[i])
            row[f"loss × {scale:g}"] = means[best]
            row[f"at lr, {scale:g}"] = rates[best]
        learned[name] = row
    title = f"Held-out accuracy after {steps} steps, best of {len(rates)} learning rates"
    show(f"{title}, mean of {seeds} seeds", learned, ".4g")
    if args.out:
        report = {"device": where, "torch": torch.__version__, "speed": speed}
        report |= {"differences": apart, "task": learned}
        args.out.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
