"""Where a run's numbers and words go: metrics.jsonl always, wandb on request, log.txt, the bar."""

from __future__ import annotations

import json
import logging
import math
import os
import sys
from pathlib import Path
from typing import Any, Protocol

from tqdm import tqdm

from training.resolve import ResolvedRun

logger = logging.getLogger(__name__)


class _BarHandler(logging.Handler):
    """Messages above the progress bar, not through it."""

    def emit(self, record: logging.LogRecord) -> None:
        tqdm.write(self.format(record), file=sys.stderr)


def set_up_logging(log_file: Path | None = None, level: int = logging.INFO) -> None:
    """Messages from `level` up to stderr and, with a time, to `log_file`."""
    root = logging.getLogger()
    root.handlers.clear()
    root.setLevel(level)
    bar = _BarHandler()
    bar.setFormatter(logging.Formatter("%(message)s"))
    root.addHandler(bar)
    logging.captureWarnings(True)
    logging.getLogger("matplotlib").setLevel(logging.WARNING)
    if log_file is not None:
        file = logging.FileHandler(log_file, encoding="utf-8")
        file.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
        root.addHandler(file)


class Sink(Protocol):
    """What the engine needs of a logger."""

    def log(self, step: int, values: dict[str, Any]) -> None:
        """Record `values` at `step`."""

    def close(self, summary: dict[str, Any]) -> None:
        """Finish, with the run's result."""


class JsonlSink:
    """metrics.jsonl: one JSON object per line. Lines after the resumed step are set aside."""

    def __init__(self, path: Path, start_step: int) -> None:
        self.known: set[frozenset[str]] = set()
        self.start_step = start_step
        if path.exists():
            lines = path.read_text().splitlines(keepends=True)
            kept = [line for line in lines if _step_of(line) <= start_step]
            self.known = {_what(json.loads(line)) for line in kept if _step_of(line) == start_step}
            if len(kept) < len(lines):
                aside = path.with_name("metrics.superseded.jsonl")
                with aside.open("a") as file:
                    file.writelines(line for line in lines if line not in kept)
                temporary = path.with_suffix(".writing")
                temporary.write_text("".join(kept))
                temporary.replace(path)
        self.file = path.open("a", buffering=1)

    def log(self, step: int, values: dict[str, Any]) -> None:
        """Append one line; what is not finite becomes null.

        What is there already is not repeated: a complete run, resumed, is evaluated once more.
        """
        if step == self.start_step and _what({"step": step, **values}) in self.known:
            return
        finite = {
            k: None if isinstance(v, float) and not math.isfinite(v) else v
            for k, v in values.items()
        }
        self.file.write(json.dumps({"step": step, **finite}) + "\n")

    def close(self, summary: dict[str, Any]) -> None:
        """Close the file."""
        self.file.close()


def _what(values: dict[str, Any]) -> frozenset[str]:
    """What kind of line it is: its keys."""
    return frozenset(values)


def _step_of(line: str) -> float:
    """The step of a line; infinite for one that a kill cut short."""
    try:
        return json.loads(line)["step"] if line.endswith("\n") else float("inf")
    except (ValueError, KeyError, TypeError):
        return float("inf")


class WandbSink:
    """Weights & Biases; a run goes on without it whenever it fails."""

    def __init__(self, run: ResolvedRun) -> None:
        self.run = None
        try:
            import wandb
        except ImportError:
            logger.warning("wandb is not installed; metrics.jsonl holds everything")
            return
        settings, mode = run.config.wandb, run.config.wandb.mode
        if mode == "online" and not _has_wandb_key():
            logger.warning(
                "wandb: no account is set up on this machine (`wandb login`), so the run is "
                "logged offline"
            )
            mode = "offline"
        for attempt in dict.fromkeys((mode, "offline")):
            try:
                self.run = wandb.init(
                    project=settings.project,
                    entity=settings.entity,
                    group=settings.group,
                    tags=list(settings.tags),
                    name=run.run_dir.name,
                    id=run.run_id,
                    dir=str(run.run_dir),
                    resume="allow",
                    mode=attempt,
                    config=run.config.model_dump(mode="json"),
                    settings=wandb.Settings(init_timeout=30, silent=True),
                )
                break
            except Exception as error:  # whatever ails it, the run matters more
                logger.warning("wandb %s failed (%s)", attempt, error)

    def log(self, step: int, values: dict[str, Any]) -> None:
        """Send `values`."""
        if self.run is None:
            return
        try:
            self.run.log(values, step=step)
        except Exception as error:
            logger.warning("wandb failed at step %d (%s); training goes on without", step, error)
            self.run = None

    def close(self, summary: dict[str, Any]) -> None:
        """Finish the run."""
        if self.run is None:
            return
        try:
            self.run.summary.update(summary)
            self.run.finish()
        except Exception as error:
            logger.warning("wandb could not finish the run (%s)", error)


def _has_wandb_key() -> bool:
    if os.environ.get("WANDB_API_KEY"):
        return True
    netrc = Path(os.environ.get("NETRC", Path.home() / ".netrc"))
    try:
        return "wandb" in netrc.read_text()
    except OSError:
        return False


class RunLogger:
    """All sinks of a run."""

    def __init__(self, run: ResolvedRun, start_step: int) -> None:
        self.sinks: list[Sink] = [JsonlSink(run.run_dir / "metrics.jsonl", start_step)]
        if run.config.wandb.mode != "disabled":
            self.sinks.append(WandbSink(run))

    def log(self, step: int, values: dict[str, Any]) -> None:
        """Record `values` at `step` everywhere."""
        for sink in self.sinks:
            try:
                sink.log(step, values)
            except OSError as error:
                logger.error("step %d could not be logged (%s); training goes on", step, error)

    def close(self, summary: dict[str, Any]) -> None:
        """Finish everywhere."""
        for sink in self.sinks:
            sink.close(summary)
