"""What a sweep leaves: results.csv, results.md and results.png."""

from __future__ import annotations

import csv
import json
import logging
import os
from pathlib import Path
from typing import Any

logger = logging.getLogger(__name__)

Rows = list[dict[str, Any]]


def write_results(folder: Path, rows: Rows, runs: dict[str, Path]) -> None:
    """Write the table twice, for programs and for people, and the plot of the runs by label."""
    write_csv(folder / "results.csv", rows)
    columns = columns_of(rows)
    lines = [columns, ["---"] * len(columns), *([_cell(r.get(c)) for c in columns] for r in rows)]
    escaped = ([cell.replace("|", "\\|") for cell in line] for line in lines)
    (folder / "results.md").write_text("".join(f"| {' | '.join(line)} |\n" for line in escaped))
    try:
        plot_runs(folder / "results.png", runs)
    except (ImportError, OSError, ValueError) as error:
        logger.warning("the runs could not be drawn (%s)", error)


def write_csv(path: Path, rows: Rows) -> None:
    """A table in place of the one before, whole at any moment."""
    temporary = path.with_suffix(".writing")
    with temporary.open("w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=columns_of(rows))
        writer.writeheader()
        writer.writerows(rows)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def columns_of(rows: Rows) -> list[str]:
    """All keys, in the order in which they come."""
    return list(dict.fromkeys(column for row in rows for column in row))


def format_table(rows: Rows) -> str:
    """Rows as an aligned text table."""
    columns = columns_of(rows)
    cells = [columns, *([_cell(row.get(c)) for c in columns] for row in rows)]
    widths = [max(len(line[i]) for line in cells) for i in range(len(columns))]
    return "\n".join(
        "  ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)).rstrip() for line in cells
    )


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def plot_runs(path: Path, runs: dict[str, Path]) -> None:
    """Training loss and exact accuracy in evaluation over the steps, a line for each run."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 4 + 0.12 * len(runs)), layout="constrained")
    loss, accuracy = figure.subplots(1, 2)
    for label, run_dir in runs.items():
        lines = _metrics(run_dir)
        curve = [(m["step"], m["train/lm_loss"]) for m in lines if m.get("train/lm_loss")]
        tests = [(m["step"], _exact(m)) for m in lines if _exact(m) is not None]
        for axis, points, marker in ((loss, curve, None), (accuracy, tests, "o")):
            if points:
                axis.plot(*zip(*points, strict=True), label=label, marker=marker)
    loss.set_title("training: token loss")
    accuracy.set_title("test sets: exact accuracy")
    for axis in (loss, accuracy):
        axis.set_xlabel("step")
        axis.grid(alpha=0.3)
    handles, labels = loss.get_legend_handles_labels()
    if handles:
        figure.legend(handles, labels, loc="outside lower center", fontsize="small")
    figure.savefig(path, dpi=110)


def _metrics(run_dir: Path) -> list[dict[str, Any]]:
    try:
        return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    except (OSError, ValueError):
        return []


def _exact(metrics: dict[str, Any]) -> float | None:
    """Mean exact accuracy over the test sets of an evaluation's line."""
    ending = "/exact_accuracy"
    own = [v for k, v in metrics.items() if k.endswith(ending) and not k.startswith("train/")]
    return sum(own) / len(own) if own and None not in own else None
