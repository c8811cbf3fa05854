"""Time Newton–Schulz beside plain torch, and compare their errors, on the machine at hand.

    python scripts/bench_newton_schulz.py [--shapes 1024x1024 24x1024x1024 …] [--out FILE.json]
    python scripts/bench_newton_schulz.py --quick     # seconds, also on a CPU

Five iterations of bfloat16 matrices. "plain" is what is usually written (five operations per
iteration), "addmm" the same with torch's fused forms, "ours" `optim.newton_schulz`. Called: as a
call returns, back to back. Graph: replays of a CUDA graph. Medians. Errors: against float64 of the
same iteration, relative Frobenius norm.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from optim import newton_schulz

SHAPES = ["1024x1024", "2048x2048", "4096x4096", "8192x8192", "4096x1024", "24x1024x1024"]
A, B, C = 3.4445, -4.7750, 2.0315
Iteration = Callable[[Tensor], Tensor]


def plain(matrix: Tensor) -> Tensor:
    """The iteration as it is usually written."""
    wide = matrix.shape[-2] <= matrix.shape[-1]
    x = matrix if wide else matrix.mT
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(5):
        gram = x @ x.mT
        poly = B * gram + C * gram @ gram
        x = A * x + poly @ x
    return x if wide else x.mT


def addmm(matrix: Tensor) -> Tensor:
    """The same with torch.baddbmm."""
    return newton_schulz(matrix, fused="off")


def contenders() -> dict[str, Iteration]:
    """Name → iteration."""
    return {"plain torch": plain, "torch addmm": addmm, "ours": newton_schulz}


def matrix_of(shape: str, device: str, seed: int = 0) -> Tensor:
    """A normally distributed batch of the shape "24x1024x1024"."""
    rng = torch.Generator(device).manual_seed(seed)
    sizes = [int(n) for n in shape.split("x")]
    matrix = torch.randn(sizes, device=device, generator=rng)
    return matrix.bfloat16() if device == "cuda" else matrix


def called_ms(run: Callable[[], Any], repeats: int, calls: int, device: str) -> float:
    """Milliseconds of a call, of several in a row."""
    sync = torch.cuda.synchronize if device == "cuda" else lambda: None
    run()
    times = []
    for _ in range(repeats):
        sync()
        begin = time.perf_counter()
        for _ in range(calls):
            run()
        sync()
        times.append((time.perf_counter() - begin) / calls * 1e3)
    return statistics.median(times)


def graph_ms(run: Callable[[], Any], repeats: int, calls: int) -> float:
    """Milliseconds of a call inside a replayed graph of several."""
    run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(calls):
            run()
    graph.replay()
    times = []
    for _ in range(repeats):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) / calls)
    return statistics.median(times)


def error(run: Iteration, matrix: Tensor) -> float:
    """Relative error of an iteration against float64."""
    want = newton_schulz(matrix.double())
    return float((run(matrix).double() - want).norm() / want.norm())


def bench_shape(shape: str, args: argparse.Namespace) -> list[dict[str, Any]]:
    """One row per contender."""
    device, matrix = args.device, matrix_of(shape, args.device)
    rows = min(matrix.shape[-2:])
    heavy = matrix.numel() * rows * 20 > 5e11
    calls, repeats = (2, 5) if heavy or args.quick else (10, 9)
    out = []
    for label, run in contenders().items():
        row: dict[str, Any] = {"shape": shape, "iteration": label}
        try:
            row["called_ms"] = called_ms(lambda run=run: run(matrix), repeats, calls, device)
            if device == "cuda":
                row["graph_ms"] = graph_ms(lambda run=run: run(matrix), repeats, calls)
            if rows <= args.largest_error:
                row["error"] = error(run, matrix)
        except Exception as failure:  # one that fails here must not hide the others
            row["failure"] = f"{type(failure).__name__}: {failure}".splitlines()[0][:200]
        out.append(row)
    base = out[0]
    for row in out:
        for kind in ("called_ms", "graph_ms"):
            if kind in row and kind in base:
                row[f"{kind}_gain"] = base[kind] / row[kind]
        show(row)
    return out


def show(row: dict[str, Any]) -> None:
    """One line of the table."""
    if "failure" in row:
        print(f"{row['shape']:14} {row['iteration']:12} {row['failure']}", flush=True)
        return
    cells = []
    for kind in ("called_ms", "graph_ms"):
        cells.append(f"{row[kind]:.4f}" if kind in row else "-")
        cells.append(f"{row.get(kind + '_gain', 0):.2f}x" if kind in row else "-")
    cells.append(f"{row['error']:.2e}" if "error" in row else "-")
    print(
        f"{row['shape']:14} {row['iteration']:12}" + "".join(f"{c:>11}" for c in cells), flush=True
    )


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    """Bars of the times of every shape, each as a share of plain torch's."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    kind = "graph_ms" if any("graph_ms" in row for row in rows) else "called_ms"
    shapes, labels = ([*dict.fromkeys(row[k] for row in rows)] for k in ("shape", "iteration"))
    figure, axes = pyplot.subplots(figsize=(1.5 * len(shapes) + 2, 4))
    for i, label in enumerate(labels):
        own = {row["shape"]: row.get(f"{kind}_gain") for row in rows if row["iteration"] == label}
        heights = [1.0 / own[s] if own.get(s) else 0.0 for s in shapes]
        axes.bar([k + 0.27 * i for k in range(len(shapes))], heights, 0.25, label=label)
    axes.set_xticks([k + 0.27 for k in range(len(shapes))], shapes, rotation=20)
    axes.set_ylabel("time over plain torch's")
    axes.legend()
    figure.tight_layout()
    figure.savefig(path)


def main() -> None:
    """Run and report."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shapes", nargs="+", metavar="[BATCHx]ROWSxCOLUMNS")
    parser.add_argument("--out", type=Path, help="write the numbers as JSON")
    parser.add_argument("--plot", type=Path, help="draw the times into this file")
    parser.add_argument("--quick", action="store_true", help="few repeats, small shapes")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument(
        "--largest-error", type=int, default=8192, help="no float64 beyond this many rows"
    )
    args = parser.parse_args()
    small = ["128x128", "128x320", "4x96x96"]
    shapes = args.shapes or (small if args.quick else SHAPES)
    name = torch.cuda.get_device_name() if args.device == "cuda" else platform.machine()
    print(f"{name}, torch {torch.__version__}; milliseconds, and gain over plain torch")
    heads = ("called", "", "graph", "", "error")
    print(" " * 27 + "".join(f"{h:>11}" for h in heads))
    rows = [row for shape in shapes for row in bench_shape(shape, args)]
    if args.out:
        report = {"device": name, "torch": torch.__version__, "rows": rows}
        args.out.write_text(json.dumps(report, indent=1) + "\n")
    if args.plot:
        plot(rows, args.plot)


if __name__ == "__main__":
    main()
