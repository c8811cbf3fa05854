"""The log of a run as Markdown and picture: how it went, with what, on what, and what it gave.

    python scripts/report_run.py runs/NAME-1 runs/NAME-2 --weights docs/weights/NAME \\
        --evaluation runs/NAME-2/evaluation-NAME.json --out docs/NAME

A run in several sittings is given as its folders in their order. Written are OUT.md and OUT.png.
The clock leaves out what the first two log intervals of a sitting took beyond the usual pace, which
is compilation and warm-up; it is stated beside.
"""

from __future__ import annotations

import argparse
import itertools
import json
import re
import statistics
import sys
from pathlib import Path
from typing import Any

import yaml

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from models import published
from scripts.publish_weights import portable
from training.errors import ConfigError, reported

_BOUNDARY = "a packed state: "  # as the log says it, after a line with the step
_COLUMNS = (
    ("train/lm_loss", "train loss", "{:.3f}"), ("train/exact_accuracy", "train exact", "{:.1%}"),
    ("train/steps", "ACT steps", "{:.1f}"), ("train/grad_norm", "grad norm", "{:.2f}"),
)  # fmt: skip


def read_sitting(folder: Path) -> list[dict[str, Any]]:
    """The lines of one folder's metrics.jsonl."""
    try:
        return list(map(json.loads, (folder / "metrics.jsonl").read_text().splitlines()))
    except (OSError, ValueError):
        raise ConfigError(f"{folder} has no readable metrics.jsonl; give run folders") from None


def read_lines(folders: list[Path]) -> list[dict[str, Any]]:
    """metrics.jsonl of all sittings, one line a step: what a later sitting did again replaces."""
    lines: dict[int, dict[str, Any]] = {}
    for folder in folders:
        own = read_sitting(folder)
        first = min((line["step"] for line in own), default=0)
        lines = {step: line for step, line in lines.items() if step < first}
        for line in own:
            lines[line["step"]] = lines.get(line["step"], {}) | line
    if not lines:
        raise ConfigError(f"{folders[-1]} has logged nothing yet")
    return [lines[step] for step in sorted(lines)]


def set_names(lines: list[dict[str, Any]]) -> list[str]:
    """Names of the test sets, without their parts by difficulty."""
    keys = {k.removesuffix("/exact_accuracy") for line in lines for k in line
            if k.endswith("/exact_accuracy")} - {"train"}  # fmt: skip
    return sorted(k for k in keys if "/" not in k)


def parts_of(lines: list[dict[str, Any]]) -> str:
    """The last exact accuracies of parts of the test sets, as a sentence."""
    last: dict[str, Any] = {}
    for line in lines:
        last = (
            line if any(k.endswith("/exact_accuracy") and k.count("/") > 1 for k in line) else last
        )
    parts = [f"{k.removesuffix('/exact_accuracy')} {v:.1%}" for k, v in last.items()
             if k.endswith("/exact_accuracy") and k.count("/") > 1]  # fmt: skip
    return f"\nBy difficulty, at step {last['step']}: {', '.join(parts)}.\n" if parts else ""


def warm_up(sittings: list[list[dict[str, Any]]], rows: int) -> float:
    """Seconds that the first two intervals of every sitting took beyond the median interval's pace.

    That is compilation, capture and the first touch of memory; a step of `rows` rows.
    """
    spent, before = 0.0, 0
    for lines in sittings:
        trained = [line for line in lines if line.get("examples_per_second")]
        paces = [rows / line["examples_per_second"] for line in trained]
        steady = statistics.median(paces[2:] or paces) if paces else 0.0
        for line, pace in list(zip(trained, paces, strict=True))[:2]:
            spent += max(0.0, (line["step"] - before) * (pace - steady))
            before = line["step"]
        before = trained[-1]["step"] if trained else before
    return spent


def table(lines: list[dict[str, Any]], rows: int) -> str:
    """About `rows` lines of training, and every line that holds an evaluation."""
    sets = set_names(lines)
    head = ["step", "s", *(title for _, title, _ in _COLUMNS), *(f"{s}: exact" for s in sets)]
    shown = [f"| {' | '.join(head)} |", "|" + "---|" * len(head)]
    every = -(-len(lines) // rows)
    for number, line in enumerate(lines):
        evaluated = any(f"{s}/exact_accuracy" in line for s in sets)
        if number % every and not evaluated and number != len(lines) - 1:
            continue
        cells = [f"{line['step']}", f"{line['train_seconds']:.0f}"]
        for key, _, form in _COLUMNS:
            known = line.get(key) is not None and (line["train/count"] or "loss" in key
                                                   or "norm" in key)  # fmt: skip
            cells.append(form.format(line[key]) if known else "")
        for s in sets:
            value = line.get(f"{s}/exact_accuracy")
            cells.append("" if value is None else f"{value:.2%}")
        shown.append(f"| {' | '.join(cells)} |")
    return "\n".join(shown)


def plot(lines: list[dict[str, Any]], path: Path) -> None:
    """Accuracies and loss over the seconds of training."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4), layout="constrained")
    loss, accuracy = figure.subplots(1, 2)
    curves = [(loss, "train/lm_loss", "training"), (accuracy, "train/exact_accuracy", "training")]
    curves += [(accuracy, f"{s}/exact_accuracy", f"test set {s}") for s in set_names(lines)]
    for axis, key, label in curves:
        some = [(x["train_seconds"], x[key]) for x in lines if x.get(key) is not None
                and (x.get("train/count") or "train/exact" not in key)]  # fmt: skip
        if some:
            marker = "" if key.startswith("train/") else "o"
            axis.plot(*zip(*some, strict=True), label=label, marker=marker, markersize=3)
    for axis, title in ((loss, "token loss"), (accuracy, "exact accuracy")):
        axis.set_title(title)
        axis.set_xlabel("seconds of training")
        axis.grid(alpha=0.3)
        axis.legend()
    figure.savefig(path, dpi=110)


def report(
    folders: list[Path], weights: Path | None, evaluations: list[Path], title: str, rows: int
) -> str:
    """The Markdown text."""
    lines = read_lines(folders)
    config = portable(yaml.safe_load((folders[-1] / "config.yaml").read_text()))
    environment = json.loads((folders[-1] / "environment.json").read_text())
    extra = warm_up([read_sitting(folder) for folder in folders], config["global_batch_size"])
    facts = [
        ("steps", f"{lines[-1]['step']:,} of {config['global_batch_size']} rows"),
        ("sittings", len(folders)),
        ("seconds of training", f"{lines[-1]['train_seconds'] - extra:.1f}"),
        ("seconds of compilation and warm-up, beside", f"{extra:.1f}"),
        ("seed", config["seed"]),
        ("commit", environment["code"]),
        ("torch", environment["packages"]["torch"]),
    ]
    if weights is not None:
        index = published.read_index(weights)
        facts.append(("card", index.get("environment", {}).get("device", "unknown")))
        facts.append(("SHA-256 of the published weights", f"`{index['sha256']}`"))
    stated = "".join(map(_stated, evaluations))
    text = f"# {title}\n\n| what | value |\n|---|---|\n"
    text += "".join(f"| {what} | {value} |\n" for what, value in facts) + stated
    text += parts_of(lines)
    for folder in folders:
        for before, line in itertools.pairwise(_log(folder)):
            if _BOUNDARY in line:
                step = re.search(r"step (\d+)", before)
                text += f"\nA sitting began after step {step[1] if step else 'unknown'} from "
                text += f"{_BOUNDARY}{line.partition(_BOUNDARY)[2]}.\n"
    text += f"\n{table(lines, rows)}\n\n![curves]({title}.png)\n\n```yaml\n"
    return text + yaml.safe_dump(config, sort_keys=False) + "```\n"


def _stated(path: Path) -> str:
    """What a report of evaluate.py says."""
    try:
        sets = json.loads(path.read_text())["sets"]
        return "".join(
            f"\n{path.stem}, set {name}: {values['exact_accuracy']:.4%} of {values['count']:,} "
            "puzzles exact.\n"
            for name, values in sets.items()
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        raise ConfigError(f"{path} is no report of evaluate.py") from None


def _log(folder: Path) -> list[str]:
    path = folder / "log.txt"
    return path.read_text().splitlines() if path.is_file() else []


def main() -> None:
    """Write OUT.md and OUT.png."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folders", type=Path, nargs="+", help="run folders, in their order")
    parser.add_argument("--weights", type=Path, help="folder of the published weights")
    parser.add_argument("--evaluation", type=Path, action="append", default=[], metavar="JSON")
    parser.add_argument("--rows", type=int, default=20, help="lines of training in the table")
    parser.add_argument("--out", type=Path, required=True, help="without suffix")
    options = parser.parse_args()
    folders = [f for f in options.folders if (f / "metrics.jsonl").is_file()] or options.folders
    for name in ("config.yaml", "environment.json"):
        if not (folders[-1] / name).is_file():
            raise ConfigError(f"{folders[-1]} has no {name}; a run folder of pretrain.py has")
    text = report(
        folders, options.weights, options.evaluation, options.out.name, max(options.rows, 1)
    )
    options.out.with_suffix(".md").write_text(text)
    plot(read_lines(folders), options.out.with_suffix(".png"))
    print(f"written to {options.out.with_suffix('.md')} and .png")


if __name__ == "__main__":
    with reported():
        main()
