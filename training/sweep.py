"""A multirun: one process and one run folder per job, and a table of results."""

from __future__ import annotations

import csv
import json
import logging
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hydra.core.utils import JobReturn, JobStatus

logger = logging.getLogger(__name__)


def run_sweep(jobs: list[list[str]], runs_dir: str) -> Sequence[JobReturn]:
    """Run every job of a sweep, then write and show results.csv; exits 1 if a job failed."""
    sweep_dir = Path(runs_dir) / f"sweep-{time.strftime('%Y%m%d-%H%M%S')}"
    returned, rows = [], []
    for number, overrides in enumerate(jobs):
        swept = _swept(overrides, jobs)
        label = _label(number, swept)
        logger.info("job %d of %d: %s", number + 1, len(jobs), " ".join(overrides))
        arguments = [*overrides, f"run_name='{sweep_dir.name}/{label}'"]
        finished = subprocess.run([sys.executable, sys.argv[0], *arguments], check=False)
        result = _summary(sweep_dir / label)
        rows.append({**swept, **_row(result, finished.returncode)})
        status = JobStatus.COMPLETED if finished.returncode == 0 else JobStatus.FAILED
        returned.append(JobReturn(overrides=overrides, status=status, _return_value=result))
        if finished.returncode < 0 or (result and not result["finished"]):
            logger.info("the sweep stops here: the job was interrupted")
            break
    sweep_dir.mkdir(parents=True, exist_ok=True)
    _write_csv(sweep_dir / "results.csv", rows)
    logger.info("results (%s)\n%s", sweep_dir / "results.csv", format_table(rows))
    failed = [row for row in rows if row["exit_code"]]
    if failed:
        logger.error("%d of %d jobs failed", len(failed), len(rows))
        sys.exit(1)
    return returned


def _swept(overrides: list[str], jobs: list[list[str]]) -> dict[str, str]:
    """The settings of a job that are not the same in all jobs."""
    settings = [dict(o.lstrip("+").split("=", 1) for o in job) for job in jobs]
    own = dict(o.lstrip("+").split("=", 1) for o in overrides)
    return {k: v for k, v in own.items() if any(s.get(k) != v for s in settings)}


def _label(number: int, settings: dict[str, str]) -> str:
    text = ",".join(f"{key}={value}" for key, value in settings.items())
    safe = "".join(c if c.isalnum() or c in ".,=-_" else "-" for c in text)
    return f"{number:03d}-{safe}"[:150].rstrip(".,-")


def _summary(run_dir: Path) -> dict[str, Any] | None:
    try:
        return json.loads((run_dir / "summary.json").read_text())
    except (OSError, ValueError):
        return None


def _row(result: dict[str, Any] | None, exit_code: int) -> dict[str, Any]:
    result = result or {}
    columns = ("exact_accuracy", "step", "train_seconds", "steps_per_second", "run")
    return {**{c: result.get(c) for c in columns}, "exit_code": exit_code}


def _write_csv(path: Path, rows: list[dict[str, Any]]) -> None:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=_columns(rows))
        writer.writeheader()
        writer.writerows(rows)
        file.flush()
        os.fsync(file.fileno())


def _columns(rows: list[dict[str, Any]]) -> list[str]:
    return list(dict.fromkeys(column for row in rows for column in row))


def format_table(rows: list[dict[str, Any]]) -> str:
    """Rows as an aligned text table."""
    columns = _columns(rows)
    cells = [columns, *([_cell(row.get(c)) for c in columns] for row in rows)]
    widths = [max(len(line[i]) for line in cells) for i in range(len(columns))]
    return "\n".join(
        "  ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)).rstrip() for line in cells
    )


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    return f"{value:.4g}" if isinstance(value, float) else str(value)
