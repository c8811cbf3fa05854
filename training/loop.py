"""The training loop: steps, metrics, evaluations, checkpoints, signals; and its end."""

from __future__ import annotations

import logging
import signal
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict
from types import FrameType
from typing import Any

import torch
from tqdm import tqdm

from data import read_dataset
from training import checkpoint
from training.device import (
    choose_device,
    device_name,
    memory_advice,
    prepare_execution,
    set_determinism,
)
from training.errors import TrainingFailed
from training.evaluation import SetReport, evaluate, table
from training.logging import RunLogger, set_up_logging
from training.plot import plot_run
from training.resolve import ResolvedRun, command
from training.resume import Resume, WarmStart
from training.run_folder import describe, discard, environment, lock, write_summary
from training.speed import describe_speed
from training.state import LOSSES, METRICS, TrainState
from training.step import learning_rates, train_step

logger = logging.getLogger(__name__)


class StopSignal:
    """SIGTERM and SIGINT ask for an end after the current step; a second SIGINT is immediate."""

    def __init__(self) -> None:
        self.name: str | None = None
        self._before = {}
        for number in (signal.SIGTERM, signal.SIGINT):
            self._before[number] = signal.signal(number, self._note)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.name = signal.Signals(number).name
        signal.signal(signal.SIGINT, signal.default_int_handler)

    def restore(self) -> None:
        """Put the handlers back that were there before."""
        for number, handler in self._before.items():
            signal.signal(number, handler)


def train(run: ResolvedRun) -> dict[str, Any]:
    """Train to the end, or until a signal; returns the summary.

    Raises ConfigError on what a user can mend, TrainingFailed where it cannot go on.
    """
    with lock(run.run_dir), memory_advice(run.config):
        set_up_logging(run.run_dir / "log.txt")
        try:
            trainer = Trainer(run)
        except BaseException:
            set_up_logging()  # closes log.txt
            discard(run.run_dir, run.config)
            raise
        return trainer.fit()


class Trainer:
    """A run in progress."""

    def __init__(self, run: ResolvedRun) -> None:
        self.run, config = run, run.config
        device = choose_device(config.device, run.world.local_rank)
        set_determinism(device)
        logger.info("run folder %s", run.run_dir)
        describe(run.run_dir, config)
        self.datasets = {s: read_dataset(run.dataset_path, s) for s in ("train", "test")}
        self.state = TrainState(run, self.datasets["train"], device)
        prepare_execution(self.state, config)
        self._announce(device)
        self.best = -1.0
        self.saved_step: int | None = None
        self.started_at = 0
        self.seconds = 0.0  # spent in training steps, over all sittings
        if isinstance(run.resume, Resume):
            self.state.restore(run.resume)
            self.seconds = run.resume.index["seconds"]
            self.started_at = self.state.step
            checkpoint.tidy(run.run_dir, self.state.step)
            self.best = (checkpoint.best(run.run_dir) or {}).get("exact_accuracy", -1.0)
            if (checkpoint.folder(run.run_dir) / checkpoint.name(self.state.step)).exists():
                self.saved_step = self.state.step
        elif isinstance(run.resume, WarmStart):
            self.state.warm_start(run.resume, run.dataset_path)
        self.logger = RunLogger(run, self.state.step)
        self.intervals = 0  # logged in this sitting
        self.reports: dict[str, SetReport] = {}
        self.evaluated_step: int | None = None

    def _announce(self, device: torch.device) -> None:
        run, model = self.run, self.state.model
        parameters = sum(p.numel() for p in model.parameters())
        table_rows = model.embedding.puzzles
        embeddings = "" if table_rows is None else f" + {table_rows.numel():,} puzzle embeddings"
        logger.info("device %s", device_name(device))
        logger.info("model %s: %s parameters%s, on %s, computing in %s",
                    run.config.arch.name, f"{parameters:,}", embeddings, device,
                    str(model.embedding.dtype).removeprefix("torch."))  # fmt: skip
        logger.info("data %s: %d training puzzles, %d augmentations each; test sets %s",
                    run.dataset_path, run.info.num_train_examples, run.config.data.num_aug,
                    {k: len(s) for k, s in self.datasets["test"].sets.items()})  # fmt: skip
        logger.info("optimizers %s; %d steps of %d rows", ", ".join(self.state.optimizers),
                    run.total_steps, run.config.global_batch_size)  # fmt: skip

    # The loop

    def fit(self) -> dict[str, Any]:
        """Run the remaining steps."""
        run, config, state = self.run, self.run.config, self.state
        if state.step >= run.total_steps:
            logger.info("the run is complete: %d of %d steps", state.step, run.total_steps)
        if state.step == 0 and not isinstance(run.resume, Resume):
            self._save()  # so that there is a state to resume from the first moment on
        stop = StopSignal()
        progress = tqdm(
            total=run.total_steps, initial=state.step, desc="training", unit="step",
            mininterval=0.5 if sys.stderr.isatty() else 5.0, dynamic_ncols=True,
        )  # fmt: skip
        clock = time.perf_counter()
        try:
            while state.step < run.total_steps and stop.name is None:
                train_step(state, config, run.total_steps)
                progress.update()
                if state.step % config.log_interval == 0 or state.step == run.total_steps:
                    clock = self._log(progress, clock)
                if config.eval_interval and state.step % config.eval_interval == 0:
                    clock = self._pause(clock, self._evaluate)
                if state.step % run.checkpoint_interval == 0 and state.step < run.total_steps:
                    clock = self._pause(clock, self._save)
            self._count_time(clock)
            progress.close()
            return self._end(stop.name)
        finally:
            progress.close()
            stop.restore()

    def _count_time(self, clock: float) -> float:
        """Add what passed since `clock` to the training time; returns the clock now."""
        if self.state.device.type == "cuda":
            torch.cuda.synchronize(self.state.device)
        now = time.perf_counter()
        self.seconds += now - clock
        return now

    def _pause(self, clock: float, work: Any) -> float:
        """Do `work` outside the training time."""
        self._count_time(clock)
        work()
        return time.perf_counter()

    def _log(self, progress: tqdm, clock: float) -> float:
        """Fetch the metric sums of the last interval (the one host synchronization), log them."""
        run, config, state = self.run, self.run.config, self.state
        names = list(state.sums)
        packed = torch.stack([*(state.sums[n].double() if state.device.type != "mps" else
                                state.sums[n] for n in names), state.nonfinite])  # fmt: skip
        *values, nonfinite = packed.tolist()
        sums = dict(zip(names, values, strict=True))
        seconds, clock = self.seconds, self._count_time(clock)
        elapsed = max(self.seconds - seconds, 1e-9)
        for value in state.sums.values():
            value.zero_()
        self._check_finite(int(nonfinite))
        steps, count = max(sums["train_steps"], 1), max(sums["count"], 1)
        self.intervals += 1
        if self.intervals == 2:  # the first one compiled
            logger.info("%s", describe_speed(run, state.device, elapsed / steps))
            clock = time.perf_counter()
        rows = steps * config.global_batch_size
        metrics = {f"train/{k}": sums[k] / count for k in METRICS if k != "count"}
        metrics |= {f"train/{k}": sums[k] / rows for k in LOSSES if sums[k] or k != LOSSES[-1]}
        metrics |= {"train/count": sums["count"], "train/grad_norm": sums["grad_norm"] / steps}
        rates = learning_rates(config, state.step, run.total_steps)
        metrics |= {"train/lr": rates[config.optim.name]}
        metrics |= {"examples_per_second": rows / elapsed, "train_seconds": self.seconds}
        if state.loss_scale is not None:
            metrics |= {"loss_scale": float(state.loss_scale.scale)}
        metrics |= {"nonfinite_steps": nonfinite, "epoch": state.step * config.global_batch_size
                    / run.info.num_train_examples}  # fmt: skip
        self.logger.log(state.step, metrics)
        progress.set_postfix_str(
            f"loss {metrics['train/lm_loss']:.3f}, exact {metrics['train/exact_accuracy']:.1%}, "
            f"ACT steps {metrics['train/steps']:.1f}"
        )
        return clock

    def _check_finite(self, nonfinite: int) -> None:
        if not nonfinite or self.run.config.on_nonfinite == "skip":
            return
        steps = checkpoint.list_steps(self.run.run_dir)
        good = checkpoint.folder(self.run.run_dir) / checkpoint.name(steps[-1]) if steps else "none"
        raise TrainingFailed(
            f"the loss or a gradient became NaN or infinite before step {self.state.step}; the "
            f"last good checkpoint is {good}: resume it with a lower lr, or on_nonfinite=skip"
        )

    # Evaluation and checkpoints

    def _evaluate(self) -> None:
        run, config, state = self.run, self.run.config, self.state
        with state.ema.applied() if state.ema is not None else nullcontext():
            self.reports = evaluate(
                state.act,
                self.datasets["test"],
                config.eval,
                batch_size=config.eval.batch_size or config.global_batch_size,
                seed=config.seed,
                device=state.device,
                predictions_dir=run.run_dir if config.eval.save_predictions else None,
            )
        self.evaluated_step = state.step
        logger.info("evaluation at step %d\n%s", state.step, table(self.reports))
        values = {f"{s}/{k}": v for s, r in self.reports.items() for k, v in asdict(r).items()}
        self.logger.log(state.step, {**values, "train_seconds": self.seconds})
        score = self.score()
        if score > self.best:
            self.best = score
            self._save()
            if self.saved_step == state.step:
                self._attempt("mark the best checkpoint", checkpoint.mark_best, state.step, score)

    def score(self) -> float:
        """Exact accuracy over all test puzzles."""
        puzzles = sum(r.count for r in self.reports.values())
        right = sum(r.exact_accuracy * r.count for r in self.reports.values())
        return right / max(puzzles, 1)

    def _save(self) -> None:
        run, state = self.run, self.state
        if self.saved_step == state.step:
            return
        if run.config.on_nonfinite == "stop":
            self._check_finite(int(state.nonfinite))
        index = {
            "config": run.config.model_dump(mode="json"),
            "dims": asdict(run.dims),
            "dataset": run.info.model_dump(mode="json"),
            "run_id": run.run_id,
            "total_steps": run.total_steps,
            "rows_seen": state.step * run.config.global_batch_size,
            "seconds": self.seconds,
            "environment": {**environment(), "device": device_name(state.device)},
        }
        try:
            path = checkpoint.write(run.run_dir, state.step, state.files(), index)
        except OSError as error:
            logger.error("checkpoint at step %d could not be saved (%s); the earlier ones are "
                         "whole, training goes on", state.step, error)  # fmt: skip
            return
        self.saved_step = state.step
        self._attempt("remove old checkpoints", checkpoint.prune, run.config.keep_checkpoints)
        logger.info("saved %s (parameters, optimizer states, EMA, carry)", path)

    def _attempt(self, purpose: str, work: Callable[..., None], *arguments: Any) -> None:
        """Tidy among the checkpoints; training goes on where the disk refuses."""
        try:
            work(self.run.run_dir, *arguments)
        except OSError as error:
            logger.error("could not %s (%s); training goes on", purpose, error)

    def _end(self, signal_name: str | None) -> dict[str, Any]:
        run, state = self.run, self.state
        finished = state.step >= run.total_steps
        if finished and self.evaluated_step != state.step:
            self._evaluate()
        self._save()
        summary = {
            "run": str(run.run_dir),
            "finished": finished,
            "step": state.step,
            "train_seconds": round(self.seconds, 3),
            "steps_per_second": round(state.step / max(self.seconds, 1e-9), 4),
            "exact_accuracy": self.score() if self.reports else None,
            "sets": {name: asdict(r) for name, r in self.reports.items()},
        }
        write_summary(run.run_dir, summary)
        try:
            logger.info("curves: %s", plot_run(run.run_dir))
        except (ImportError, OSError, ValueError) as error:
            logger.warning("the curves could not be drawn (%s)", error)
        self.logger.close({k: v for k, v in summary.items() if k != "sets"})
        if signal_name is not None and not finished:
            logger.info("%s: stopped after step %d of %d, everything is saved", signal_name,
                        state.step, run.total_steps)  # fmt: skip
        else:
            logger.info("finished: %d steps in %.1f s", state.step, self.seconds)
        more = () if not finished else (f"max_steps={2 * run.total_steps}",)
        logger.info("evaluate it: python evaluate.py checkpoint=%s", run.run_dir)
        logger.info("resume it:   %s", command(f"load_checkpoint={run.run_dir}", *more))
        return summary
