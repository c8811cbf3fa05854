"""A multirun: one process and one run folder per job, and a table of results.

The sweep's folder is named after its jobs: the same command line finds it again, skips the runs
that are finished and goes on with the others. How jobs are started, one after another, several at
a time or on a cluster, is the launchers' business (hydra_plugins/).
"""

from __future__ import annotations

import hashlib
import json
import logging
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hydra.core.utils import JobReturn, JobStatus

from training.results import format_table, write_results
from training.run_folder import is_locked

logger = logging.getLogger(__name__)

_POLL = 1.0  # seconds


@dataclass(frozen=True)
class Job:
    """One run of a sweep."""

    number: int
    overrides: tuple[str, ...]
    swept: tuple[tuple[str, str], ...]  # the settings that are not the same in all jobs
    sweep_dir: Path
    script: str

    @property
    def label(self) -> str:
        """The name of its run folder."""
        text = ",".join(f"{key}={value}" for key, value in self.swept)
        safe = "".join(c if c.isalnum() or c in ".,=-_" else "-" for c in text)
        return f"{self.number:03d}-{safe}"[:150].rstrip(".,-")

    @property
    def run_dir(self) -> Path:
        """Its run folder."""
        return self.sweep_dir / self.label

    @property
    def command(self) -> list[str]:
        """How it is started, and started again."""
        name = f"run_name='{self.sweep_dir.name}/{self.label}'"
        return [sys.executable, self.script, *self.overrides, name, "resume=auto"]

    def result(self) -> dict[str, Any] | None:
        """The run's summary, where it has come to one."""
        try:
            return json.loads((self.run_dir / "summary.json").read_text())
        except (OSError, ValueError):
            return None

    @property
    def is_finished(self) -> bool:
        """Whether the run has come to its end."""
        return bool((self.result() or {}).get("finished"))


# Starts jobs somehow; yields each with its exit code when it has ended.
Launch = Callable[[list[Job]], Iterator[tuple[Job, int]]]


def run_job(job: Job, env: dict[str, str] | None = None) -> int:
    """Run a job in a process of its own; its exit code.

    A process of an interrupted sweep may still be training in the run folder: it comes first.
    """
    while is_locked(job.run_dir):
        time.sleep(_POLL)
    if job.is_finished:
        return 0
    return subprocess.run(job.command, check=False, env=env).returncode


def one_after_another(jobs: list[Job]) -> Iterator[tuple[Job, int]]:
    """The plain way to launch."""
    for job in jobs:
        logger.info("job %d: %s", job.number, " ".join(job.overrides))
        yield job, run_job(job)


def run_sweep(
    overrides: list[list[str]], runs_dir: str, launch: Launch = one_after_another
) -> Sequence[JobReturn]:
    """Run every job of a sweep that is not finished, keep the table; exits 1 if a job failed."""
    jobs = make_jobs(overrides, Path(runs_dir))
    codes = {job: 0 for job in jobs if job.is_finished}
    if codes:
        logger.info("%d of %d runs were finished before (to run them again, delete %s)",
                    len(codes), len(jobs), jobs[0].sweep_dir)  # fmt: skip
    rows: list[dict[str, Any]] = []
    for job, code in launch([job for job in jobs if job not in codes]):
        codes[job] = code
        rows = _keep_table(jobs, codes)
        result = job.result()
        if code < 0 or (result and not result["finished"]):
            logger.info("the sweep stops here: the job was interrupted; the same command line "
                        "goes on with it")  # fmt: skip
            break
    rows = rows or _keep_table(jobs, codes)
    folder = jobs[0].sweep_dir
    logger.info("results (%s, .md, .png)\n%s", folder / "results.csv", format_table(rows))
    failed = [code for code in codes.values() if code]
    if failed:
        logger.error("%d of %d jobs failed", len(failed), len(codes))
        sys.exit(1)
    return [
        JobReturn(
            overrides=list(job.overrides), status=JobStatus.COMPLETED, _return_value=job.result()
        )
        for job in jobs
        if job in codes
    ]


def make_jobs(overrides: list[list[str]], runs_dir: Path) -> list[Job]:
    """The jobs of a sweep, in its folder."""
    settings = [dict(o.lstrip("+").split("=", 1) for o in job) for job in overrides]
    name = hashlib.sha256(json.dumps(overrides).encode()).hexdigest()[:10]
    jobs = []
    for number, (job, own) in enumerate(zip(overrides, settings, strict=True)):
        swept = [(k, v) for k, v in own.items() if any(s.get(k) != v for s in settings)]
        folder = runs_dir / f"sweep-{name}"
        jobs.append(Job(number, tuple(job), tuple(swept), folder, sys.argv[0]))
    return jobs


def _keep_table(jobs: list[Job], codes: dict[Job, int]) -> list[dict[str, Any]]:
    """Write the table of what has ended so far; returns its rows."""
    ended = [job for job in jobs if job in codes]
    rows = [{**dict(job.swept), **_row(job.result(), codes[job])} for job in ended]
    folder = jobs[0].sweep_dir
    folder.mkdir(parents=True, exist_ok=True)
    write_results(folder, rows, {job.label: job.run_dir for job in ended})
    return rows


def _row(result: dict[str, Any] | None, exit_code: int) -> dict[str, Any]:
    result = result or {}
    columns = ("exact_accuracy", "step", "train_seconds", "steps_per_second", "run")
    return {**{c: result.get(c) for c in columns}, "exit_code": exit_code}
