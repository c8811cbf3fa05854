"""Time one optimizer step of every implementation at hand, on the machine at hand.

    python scripts/bench_optim.py [--sets trm7m …] [--only REGEX] [--out FILE.json] [--plot FILE]
    python scripts/bench_optim.py --quick          # seconds, also on a CPU

Device time: a CUDA graph of several steps, replayed between two events (without a graph where an
implementation cannot be captured: marked ~). Wall: steps back to back, until the device is done.
Host: until the calls have returned. Medians. The floor is a copy that moves the bytes the rule
must move, measured in the same run. state: bytes per parameter that the optimizer keeps; peak: of
the memory, in MiB. The set "transformer" trains a small Transformer for 1,000 steps instead.
"""

from __future__ import annotations

import argparse
import gc
import json
import platform
import re
import statistics
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from optim import SparseSignSGD
from scripts.arguments import Parser
from scripts.optimizers_at_hand import LR, Step, contenders, make_params, shapes_of

SETS = ["trm7m", "single", "sparse", "gpt350m", "transformer"]


def device_ms(step: Step, steps: int, repeats: int) -> tuple[float, bool]:
    """Milliseconds of a step on the GPU, and whether it ran as a graph."""
    for _ in range(3):
        step()
    torch.cuda.synchronize()
    captured = True
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            for _ in range(steps):
                step()
        run = graph.replay
    except Exception:
        torch.cuda.synchronize()
        captured = False

        def run() -> None:
            for _ in range(steps):
                step()

    run()
    times = []
    for _ in range(repeats):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        run()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) / steps)
    return statistics.median(times), captured


def host_and_wall_ms(step: Step, steps: int, repeats: int, device: str) -> tuple[float, float]:
    """Milliseconds of a step until the calls return, and until the device is done."""
    sync = torch.cuda.synchronize if device == "cuda" else lambda: None
    host, wall = [], []
    step()
    for _ in range(repeats):
        sync()
        begin = time.perf_counter()
        for _ in range(steps):
            step()
        returned = time.perf_counter()
        sync()
        host.append((returned - begin) / steps * 1e3)
        wall.append((time.perf_counter() - begin) / steps * 1e3)
    return statistics.median(host), statistics.median(wall)


def single_protocol_ms(named: list[tuple[str, Tensor]], step: Step, n: int, device: str) -> float:
    """Mean of n × [gradient clone, step, synchronize], by the host's clock."""
    grads = [p.grad for _, p in named]
    begin = time.perf_counter()
    for _ in range(n):
        for (_, p), g in zip(named, grads, strict=True):
            p.grad = g.clone()
        step()
        if device == "cuda":
            torch.cuda.synchronize()
    return (time.perf_counter() - begin) / n * 1e3


def copy_ms(size: int, device: str, steps: int, repeats: int) -> float:
    """Milliseconds of a copy that moves `size` bytes (half read, half written)."""
    source = torch.empty(size // 8, device=device).normal_()
    target = torch.empty_like(source)
    copy = lambda: target.copy_(source)  # noqa: E731
    if device == "cuda":
        return device_ms(copy, steps, repeats)[0]
    return host_and_wall_ms(copy, steps, repeats, device)[1]


def bench_set(name: str, args: argparse.Namespace, device: str) -> list[dict[str, Any]]:
    """One row per contender."""
    count = sum(torch.Size(s).numel() for _, s in shapes_of(name))
    steps, repeats = (3, 7) if name == "gpt350m" else (10, 15)
    if args.quick:
        steps, repeats = 2, 3
    rows = []
    floors: dict[int, float] = {}
    for label, (build, each) in contenders(device).items():
        if args.only and not re.search(args.only, label):
            continue
        size = each * count
        if size not in floors:
            floors[size] = copy_ms(size, device, steps, repeats)
        named = make_params(name, device)
        row: dict[str, Any] = {"set": name, "optimizer": label, "MB": size / 1e6}
        try:
            if device == "cuda":
                torch.cuda.reset_peak_memory_stats()
            step = build(named)
            if device == "cuda":
                row["device_ms"], row["graph"] = device_ms(step, steps, repeats)
            row["host_ms"], row["wall_ms"] = host_and_wall_ms(step, steps, repeats, device)
            if name == "single":
                n = 10 if args.quick or device == "cpu" else 200
                row["single_ms"] = single_protocol_ms(named, step, n, device)
            best = row.get("device_ms", row["wall_ms"])
            row |= {"copy_ms": floors[size], "over_copy": best / floors[size]}
            row["state_bytes"] = state_bytes(step, count)
            if device == "cuda":
                row["peak_MiB"] = torch.cuda.max_memory_allocated() / 2**20
        except Exception as error:  # one that fails here must not hide the others
            row["error"] = f"{type(error).__name__}: {error}".splitlines()[0][:200]
        rows.append(row)
        show(row)
        named = step = None  # memory of one does not count for the next
        gc.collect()
    return rows


def bench_sparse(args: argparse.Namespace, device: str) -> list[dict[str, Any]]:
    """SparseSignSGD: 768 ids, some twice, of 876,000 rows of 512; on a GPU also of 10⁷ rows."""
    n, width = (64, 64) if args.quick else (768, 512)
    sizes = [1000] if args.quick else [876_000, *([10_000_000] if device == "cuda" else [])]
    labels = {"ours SparseSignSGD": "auto", "ours SparseSignSGD, reference": "off"}
    out = []
    for rows in sizes:
        table = torch.zeros(rows, width, device=device)
        ids = torch.randint(0, rows, (n,), device=device)
        ids[: n // 4] = ids[n // 4 : n // 4 * 2]
        grads = torch.randn(n, width, device=device)
        for label, fused in labels.items():
            if args.only and not re.search(args.only, label):
                continue
            opt = SparseSignSGD([table], LR, 0.1, fused=fused)

            def step(
                opt: SparseSignSGD = opt, table: Tensor = table, ids: Tensor = ids,
                grads: Tensor = grads,
            ) -> None:  # fmt: skip
                opt.add_rows(table, ids, grads)
                opt.step()

            size = n * width * 12
            row: dict[str, Any] = {"set": "sparse", "optimizer": label, "MB": size / 1e6}
            row["rows"] = rows
            if rows != sizes[0]:
                row["optimizer"] += f", {rows:.0e} rows"
            if device == "cuda":
                row["device_ms"], row["graph"] = device_ms(step, 10, 15)
            row["host_ms"], row["wall_ms"] = host_and_wall_ms(step, 10, 15, device)
            row["copy_ms"] = copy_ms(size, device, 10, 15)
            row["over_copy"] = row.get("device_ms", row["wall_ms"]) / row["copy_ms"]
            out.append(row)
            show(row)
        table = opt = step = None  # 20 GB, before the next one
        gc.collect()
    return out


def state_bytes(step: Step, count: int) -> float:
    """Bytes per parameter that an optimizer keeps; NaN where it is not known."""
    optimizer = getattr(step, "__self__", None) or getattr(step, "optimizer", None)
    if optimizer is None:
        return float("nan")
    kept = [t for state in optimizer.state.values() for t in state.values()]
    return sum(t.numel() * t.element_size() for t in kept if isinstance(t, Tensor)) / count


def bench_transformer(args: argparse.Namespace, device: str) -> list[dict[str, Any]]:
    """Seconds and peak memory of a small training with every optimizer."""
    from scripts import bench_transformer as task

    steps = 5 if args.quick else 1000
    data, rows = task.batches(steps, device), []
    for label, factory in task.contenders().items():
        if args.only and not re.search(args.only, label):
            continue
        seconds, peak, loss = task.train(factory, data, device)
        rows.append({"set": "transformer", "optimizer": label, "seconds": seconds})
        rows[-1] |= {"peak_MB": peak, "loss": loss}
        print(
            f"transformer {label:26} {seconds:8.2f} s {peak:8.0f} MB  loss {loss:.3f}", flush=True
        )
    return rows


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    """Bars of the time of a step over that of the copy, one panel per set."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    sets = [*dict.fromkeys(row["set"] for row in rows if "over_copy" in row)]
    figure, axes = pyplot.subplots(len(sets), squeeze=False, figsize=(8, 3 * len(sets)))
    for name, panel in zip(sets, axes[:, 0], strict=True):
        some = [row for row in rows if row["set"] == name and "over_copy" in row]
        panel.barh([row["optimizer"] for row in some], [row["over_copy"] for row in some])
        panel.invert_yaxis()
        panel.set_xscale("log")
        panel.set_title(f"{name}: time over that of a copy")
    figure.tight_layout()
    figure.savefig(path)


def show(row: dict[str, Any]) -> None:
    """One line of the table."""
    if "error" in row:
        print(f"{row['set']:8} {row['optimizer']:29} {row['error']}", flush=True)
        return
    mark = "" if row.get("graph", True) else "~"
    cells = [f"{mark}{row['device_ms']:.4f}" if "device_ms" in row else "-"]
    cells += [f"{row[k]:.4f}" for k in ("wall_ms", "host_ms", "copy_ms")]
    cells += [f"{row['over_copy']:.2f}", f"{row['single_ms']:.4f}" if "single_ms" in row else "-"]
    cells += [f"{row[k]:.1f}" if k in row else "-" for k in ("state_bytes", "peak_MiB")]
    print(f"{row['set']:8} {row['optimizer']:29}" + "".join(f"{c:>11}" for c in cells), flush=True)


def main() -> None:
    """Run and report."""
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument("--sets", nargs="+", choices=[*SETS, "tiny"])
    parser.add_argument("--only", help="regular expression over the names")
    parser.add_argument("--out", type=Path, help="write the numbers as JSON")
    parser.add_argument("--plot", type=Path, help="draw the times into this file")
    parser.add_argument("--quick", action="store_true", help="few repeats, a tiny set")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    warnings.filterwarnings("ignore", "no rule of optim.partition")
    sets = args.sets or (["tiny", "sparse"] if args.quick else SETS)
    name = torch.cuda.get_device_name() if args.device == "cuda" else platform.machine()
    print(f"{name}, torch {torch.__version__}, {torch.get_num_threads()} CPU threads; ms per step")
    heads = ("device", "wall", "host", "copy", "x copy", "single", "state", "peak")
    print(" " * 38 + "".join(f"{h:>11}" for h in heads))
    rows = []
    special = {"sparse": bench_sparse, "transformer": bench_transformer}
    for s in sets:
        rows += special[s](args, args.device) if s in special else bench_set(s, args, args.device)
    if args.plot:
        plot(rows, args.plot)
    if args.out:
        report = {"device": name, "torch": torch.__version__, "rows": rows}
        args.out.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
