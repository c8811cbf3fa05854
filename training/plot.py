"""curves.png: the run at a glance."""

from __future__ import annotations

import json
from pathlib import Path


def plot_run(run_dir: Path) -> Path:
    """Draw losses and accuracies over the steps from metrics.jsonl; returns the picture's path."""
    from matplotlib.figure import Figure

    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    figure = Figure(figsize=(10, 4), layout="constrained")
    loss, accuracy = figure.subplots(1, 2)
    keys = sorted({key for line in lines for key in line if "/" in key})
    for axis, ending in ((loss, "/lm_loss"), (accuracy, "/exact_accuracy")):
        for key in (k for k in keys if k.endswith(ending)):
            points = [(line["step"], line[key]) for line in lines if line.get(key) is not None]
            if key.startswith("train/"):
                axis.plot(*zip(*points, strict=True), label="training", alpha=0.7)
            else:
                name = f"test set {key.removesuffix(ending)}"
                axis.plot(*zip(*points, strict=True), label=name, marker="o")
        axis.set_xlabel("step")
        axis.grid(alpha=0.3)
        if axis.lines:
            axis.legend()
    loss.set_title("token loss")
    accuracy.set_title("exact accuracy")
    accuracy.set_ylim(-0.02, 1.02)
    figure.suptitle(run_dir.name)
    path = run_dir / "curves.png"
    figure.savefig(path, dpi=110)
    return path
