"""Time one optimizer step of every implementation at hand, on the machine at hand.

    python scripts/bench_optim.py [--sets trm7m …] [--only REGEX] [--out FILE.json]
    python scripts/bench_optim.py --quick          # seconds, also on a CPU

Device time: a CUDA graph of several steps, replayed between two events (without a graph where an
implementation cannot be captured: marked ~). Wall: steps back to back, until the device is done.
Host: until the calls have returned. Medians. The floor is a copy that moves the bytes the rule
must move, measured in the same run.
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
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from optim import EMA, AdamATan2, AdamMini, AdamW, Muon, SparseSignSGD

Step = Callable[[], Any]
SETS = ["trm7m", "single", "sparse", "gpt350m"]
LR, MAX_NORM, RATE = 1e-4, 1.0, 0.999
HEAD = 64
MINI_BYTES = {"fp32": 20, "bf16": 16, "fp8": 14}  # per parameter that a step must move


def shapes_of(name: str) -> list[tuple[str, tuple[int, ...]]]:
    """Names and shapes of a parameter set."""
    if name == "single":
        return [("weight", (4096, 1024))]
    if name == "tiny":
        return [(f"blocks.{i}.weight", (64, 96)) for i in range(4)]
    if name == "trm7m":  # two blocks of width 512, vocabulary 12
        layer = {"qkv": (1536, 512), "out": (512, 512), "gate_up": (3072, 512), "down": (512, 1536)}
        shapes = [(f"blocks.{i}.{k}.weight", s) for i in range(2) for k, s in layer.items()]
        rest = {"tokens": (12, 512), "lm_head": (12, 512), "q_head": (2, 512), "q_head.bias": (2,)}
        return shapes + list(rest.items())
    layer = {"ln_1": (1024,), "qkv": (3072, 1024), "proj": (1024, 1024), "ln_2": (1024,)}
    layer |= {"fc": (4096, 1024), "down": (1024, 4096)}
    shapes = [(f"blocks.{i}.{k}.weight", s) for i in range(24) for k, s in layer.items()]
    return [*shapes, ("embed", (50304, 1024)), ("ln_f", (1024,))]


def heads_of(named: list[tuple[str, Tensor]]) -> int:
    """Attention heads of 64 of a model of this width."""
    return max(1, min(p.shape[-1] for _, p in named if p.ndim > 1) // HEAD)


def official_name(name: str) -> str:
    """The name by which adam-mini finds blocks of about the same kind."""
    known = {"qkv": "wq", "out": "wo", "proj": "wo", "tokens": "embed", "q_head": "output"}
    parts = name.split(".")
    for ours in ("gate_up", "down", "fc"):
        known[ours] = "mlp"
    return ".".join(known.get(part, part) for part in parts)


def make_params(name: str, device: str) -> list[tuple[str, Tensor]]:
    """Fresh parameters with a gradient each."""
    rng = torch.Generator(device).manual_seed(0)
    named = []
    for n, shape in shapes_of(name):
        p = (torch.randn(shape, device=device, generator=rng) * 0.02).requires_grad_()
        p.grad = torch.randn(shape, device=device, generator=rng) * 1e-3
        named.append((n, p))
    return named


def contenders(device: str) -> dict[str, tuple[Callable[[list[tuple[str, Tensor]]], Step], int]]:
    """Name → (from named parameters to a step, bytes per parameter the rule must move)."""
    cuda = device == "cuda"
    both = {"lr": LR, "betas": (0.9, 0.95), "weight_decay": 0.1}

    def ours(cls: type, fused: str) -> Callable[[list[tuple[str, Tensor]]], Step]:
        return lambda named: cls(named, LR, fused=fused).step

    def mini(state: str) -> Callable[[list[tuple[str, Tensor]]], Step]:
        return lambda named: (
            AdamMini(named, LR, num_heads=heads_of(named), state=state, fused="auto").step
        )

    def theirs(**kind: bool) -> Callable[[list[tuple[str, Tensor]]], Step]:
        options = {**both, **kind, "capturable": cuda}
        return lambda named: torch.optim.AdamW([p for _, p in named], **options).step

    def all_in_one(cls: type) -> Callable[[list[tuple[str, Tensor]]], Step]:
        def build(named: list[tuple[str, Tensor]]) -> Step:
            opt = cls(named, LR, fused="auto")
            ema = EMA(named, RATE).attach(opt)

            def step() -> None:
                opt.step(grad_scale=opt.clip(MAX_NORM)[1])
                ema.update()

            return step

        return build

    def peers_in_turn(named: list[tuple[str, Tensor]]) -> Step:
        params = [p for _, p in named]
        opt = torch.optim.AdamW(params, **both, fused=True, capturable=cuda)
        shadows = [p.detach().clone() for p in params]

        def step() -> None:
            torch.nn.utils.clip_grad_norm_(params, MAX_NORM, foreach=True)
            opt.step()
            with torch.no_grad():
                torch._foreach_lerp_(shadows, [p.detach() for p in params], 1 - RATE)

        return step

    table = {
        "ours AdamW": (ours(AdamW, "auto"), 28),
        "ours AdamATan2": (ours(AdamATan2, "auto"), 28),
        "ours AdamW, reference": (ours(AdamW, "off"), 28),
        "ours AdamATan2, reference": (ours(AdamATan2, "off"), 28),
        "torch AdamW, loop": (theirs(foreach=False), 28),
        "torch AdamW, foreach": (theirs(foreach=True), 28),
        "torch AdamW, fused": (theirs(fused=True), 28),
        "clip + AdamW + EMA: ours": (all_in_one(AdamW), 40),
        "clip + AdamATan2 + EMA: ours": (all_in_one(AdamATan2), 40),
        "clip + AdamW + EMA: torch": (peers_in_turn, 40),
        "ours Muon": (ours(Muon, "auto"), 20),
        **{f"ours AdamMini {s}": (mini(s), size) for s, size in MINI_BYTES.items()},
    }
    if find_spec("adam_atan2_pytorch"):
        from adam_atan2_pytorch import AdamAtan2

        table["adam-atan2-pytorch"] = (
            lambda named: AdamAtan2([p for _, p in named], lr=LR, weight_decay=0.1).step,
            28,
        )
    if find_spec("adam_mini"):
        from adam_mini import Adam_mini

        def official(named: list[tuple[str, Tensor]]) -> Step:
            heads = heads_of(named)
            named = [(official_name(n), p) for n, p in named]
            options = {"dim": heads * HEAD, "n_heads": heads, "verbose": False, **both}
            return Adam_mini(named, **options).step

        table["adam-mini, official"] = (official, 20)
    return table


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
    """SparseSignSGD: 768 ids, some twice, of 876,000 rows of 512."""
    rows, n, width = (1000, 64, 64) if args.quick else (876_000, 768, 512)
    table = torch.zeros(rows, width, device=device)
    ids = torch.randint(0, rows, (n,), device=device)
    ids[: n // 4] = ids[n // 4 : n // 4 * 2]
    grads = torch.randn(n, width, device=device)
    out = []
    for label, fused in (("ours SparseSignSGD", "auto"), ("ours SparseSignSGD, reference", "off")):
        opt = SparseSignSGD([table], LR, 0.1, fused=fused)

        def step(opt: SparseSignSGD = opt) -> None:
            opt.add_rows(table, ids, grads)
            opt.step()

        size = n * width * 12
        row: dict[str, Any] = {"set": "sparse", "optimizer": label, "MB": size / 1e6}
        if device == "cuda":
            row["device_ms"], row["graph"] = device_ms(step, 10, 15)
        row["host_ms"], row["wall_ms"] = host_and_wall_ms(step, 10, 15, device)
        row["copy_ms"] = copy_ms(size, device, 10, 15)
        row["over_copy"] = row.get("device_ms", row["wall_ms"]) / row["copy_ms"]
        out.append(row)
        show(row)
    return out


def show(row: dict[str, Any]) -> None:
    """One line of the table."""
    if "error" in row:
        print(f"{row['set']:8} {row['optimizer']:29} {row['error']}", flush=True)
        return
    mark = "" if row.get("graph", True) else "~"
    cells = [f"{mark}{row['device_ms']:.4f}" if "device_ms" in row else "-"]
    cells += [f"{row[k]:.4f}" for k in ("wall_ms", "host_ms", "copy_ms")]
    cells += [f"{row['over_copy']:.2f}", f"{row['single_ms']:.4f}" if "single_ms" in row else ""]
    print(f"{row['set']:8} {row['optimizer']:29}" + "".join(f"{c:>11}" for c in cells), flush=True)


def main() -> None:
    """Run and report."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sets", nargs="+", choices=[*SETS, "tiny"])
    parser.add_argument("--only", help="regular expression over the names")
    parser.add_argument("--out", type=Path, help="write the numbers as JSON")
    parser.add_argument("--quick", action="store_true", help="few repeats, a tiny set")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    warnings.filterwarnings("ignore", "no rule of optim.partition")
    sets = args.sets or (["tiny", "sparse"] if args.quick else SETS)
    name = torch.cuda.get_device_name() if args.device == "cuda" else platform.machine()
    print(f"{name}, torch {torch.__version__}, {torch.get_num_threads()} CPU threads; ms per step")
    heads = ("device", "wall", "host", "copy", "x copy", "single")
    print(" " * 38 + "".join(f"{h:>11}" for h in heads))
    rows = []
    for s in sets:
        rows += (
            bench_sparse(args, args.device) if s == "sparse" else bench_set(s, args, args.device)
        )
    if args.out:
        report = {"device": name, "torch": torch.__version__, "rows": rows}
        args.out.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
