"""Accuracy against test-time compute: a sweep over depth, breadth and how the answer is chosen.

    python scripts/thinking_curve.py --depth 16 64 --breadth 1 2 4 8 16 --select halt vote \\
        [--confidence 0.5 0.9] [--agree 1 2] [--out curves/NAME] checkpoint=docs/weights/NAME \\
        data.test_csv=test.csv.gz eval.augment=true

Other arguments are those of evaluate.py: what the trajectories of a puzzle differ by
(`eval.augment`, `eval.random_init`, `eval.noise`), on which data. Each depth and confidence is run
once, at the largest breadth; the smaller ones are parts of it. With --confidence rows end where the
halting head is so sure, and their puzzle costs nothing more as soon as --agree of them share an
answer; without it every trajectory takes all steps. OUT.csv has a line for each point, with the
cost of a puzzle in ACT steps, TFLOP and seconds (those of the whole run, shared out by ACT steps);
OUT.png shows accuracy over TFLOP.
"""

from __future__ import annotations

import argparse
import csv
import sys
from itertools import product
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from training.cli import compose_values, preflight
from training.config import EvaluateConfig
from training.errors import ConfigError, reported
from training.logging import set_up_logging
from training.report import Loaded, load, resolve_evaluation

SELECTIONS = ("halt", "convergence", "vote")
_MARKERS = {"halt": "^", "convergence": "v", "vote": "o"}
Row = dict[str, Any]


def options_of(argv: list[str]) -> tuple[argparse.Namespace, list[str]]:
    """The sweep's own options, and the arguments for the evaluation."""
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").splitlines()[0], allow_abbrev=False
    )
    parser.add_argument("--depth", type=int, nargs="+", required=True)
    parser.add_argument("--breadth", type=int, nargs="+", default=[1])
    parser.add_argument("--select", nargs="+", choices=SELECTIONS, default=["halt"])
    parser.add_argument("--confidence", type=float, nargs="+", default=[])
    parser.add_argument("--agree", type=int, nargs="+", default=[1])
    parser.add_argument("--out", type=Path, default=Path("thinking"))
    return parser.parse_known_args(argv)


def resolve_at(  # noqa: ANN201
    overrides: list[str], depth: int, breadth: int, confidence: float | None, agree: int
):
    """The evaluation at one depth, confidence and agreement, with the largest breadth."""
    more = [f"eval.depth={depth}", f"eval.breadth={breadth}"]
    if confidence is not None:
        more += ["eval.early_halt=true", f"eval.confidence={confidence}"]
    if agree > 1:
        more += [f"eval.agree={agree}", "eval.select=vote"]
    arguments = preflight("cfg_evaluate", EvaluateConfig, [*overrides, *more])
    return resolve_evaluation(compose_values("cfg_evaluate", arguments))


def points(loaded: Loaded, config: Any, options: argparse.Namespace, tflop: float) -> list[Row]:
    """Every breadth and selection of one run."""
    from training.thinking import explore

    rows = []
    for name, found, seconds in explore(loaded.act, loaded.dataset, config, **loaded.how):
        total = found.steps.sum()
        for breadth in sorted(set(options.breadth)):
            steps = found.steps[:, :breadth].sum()
            for select in options.select if breadth > 1 else options.select[:1]:
                rows.append({
                    "set": name,
                    "puzzles": len(found.steps),
                    "depth": config.depth,
                    "breadth": breadth,
                    "select": select if breadth > 1 else "",
                    "confidence": config.confidence if config.early_halt else "",
                    "agree": config.agree if config.early_halt else "",
                    "exact_accuracy": round(found.accuracy(breadth, select), 6),
                    "ACT_steps": round(float(steps) / len(found.steps), 3),
                    "TFLOP": round(float(steps) / len(found.steps) * tflop, 6),
                    "seconds": round(seconds * float(steps / total) / len(found.steps), 7),
                })  # fmt: skip
    return rows


def draw(rows: list[Row], path: Path) -> None:
    """Accuracy over compute, a line for each set, depth, selection, confidence and agreement."""
    from matplotlib import colormaps
    from matplotlib.figure import Figure
    from matplotlib.ticker import StrMethodFormatter

    figure = Figure(figsize=(8, 5), layout="constrained")
    axis = figure.subplots()
    lines: dict[tuple[Any, ...], list[tuple[float, float]]] = {}
    for row in rows:
        if row["select"]:
            key = row["set"], row["depth"], row["select"], row["confidence"], row["agree"]
            lines.setdefault(key, []).append((row["TFLOP"], row["exact_accuracy"]))
    for number, ((name, depth, select, confidence, agree), some) in enumerate(lines.items()):
        ends = f", halts at {confidence}" if confidence else ""
        ends += f", {agree} agree" if confidence and agree > 1 else ""
        label = f"{name}: depth {depth}, {select}{ends}"
        look = {"marker": _MARKERS[select], "color": colormaps["tab20"](number % 20)}
        axis.plot(*zip(*sorted(some), strict=True), label=label, **look)
    single = [(r["TFLOP"], r["exact_accuracy"]) for r in rows if not r["select"]]
    axis.plot(*zip(*sorted(single), strict=True), "ks--", label="one trajectory, by depth")
    axis.set_xscale("log")
    axis.xaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    if max(r["TFLOP"] for r in rows) < 10 * min(r["TFLOP"] for r in rows):
        axis.xaxis.set_minor_formatter(StrMethodFormatter("{x:.2g}"))
    axis.set_xlabel("TFLOP a puzzle")
    axis.set_ylabel("exact accuracy")
    axis.grid(alpha=0.3)
    axis.legend(fontsize="small")
    figure.savefig(path, dpi=110)


def main(argv: list[str]) -> None:
    """Sweep, and write the table and the picture."""
    options, overrides = options_of(argv)
    if min(*options.depth, *options.breadth, *options.agree) < 1:
        raise ConfigError("--depth, --breadth and --agree should be 1 or more")
    if options.agree != [1] and not options.confidence:
        raise ConfigError("--agree needs --confidence")
    if 1 not in options.breadth:
        options.breadth.append(1)
    grid = product(options.depth, options.confidence or [None], options.agree)
    jobs = [resolve_at(overrides, d, max(options.breadth), c, a) for d, c, a in grid]
    table, picture = (options.out.with_name(options.out.name + end) for end in (".csv", ".png"))
    options.out.parent.mkdir(parents=True, exist_ok=True)
    set_up_logging()
    from models.cost import cost

    loaded = load(jobs[0])
    arch = jobs[0].trained.arch.model_copy(update={"chains": 1})  # those are of training
    step = cost(arch, jobs[0].dims, 1, loaded.how["device"])
    rows = []
    for job in jobs:
        new = points(loaded, job.config.eval, options, step.forward_flops / 1e12)
        rows += new
        for row in new:
            print(" ".join(f"{k}={v}" for k, v in row.items() if v != ""))
        with table.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, fieldnames=list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
    draw(rows, picture)
    print(f"written to {table} and {picture.name}")


if __name__ == "__main__":
    with reported():
        main(sys.argv[1:])
