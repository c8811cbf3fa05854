"""The training loop: steps, metrics, evaluations, checkpoints, signals; and its end."""

from __future__ import annotations

import logging
import math
import sys
import time
from contextlib import nullcontext
from dataclasses import asdict, replace
from typing import Any

import torch
import torch.distributed as dist
from tqdm import tqdm

from data import read_dataset
from training import checkpoint
from training.act_steps import ACTSteps
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
from training.ranks import ALONE, Ranks, joined, meet
from training.resolve import ResolvedRun, World, command
from training.resume import Resume, WarmStart
from training.run_folder import describe, discard, environment, lock, write_summary
from training.saving import Saver
from training.signals import StopSignal
from training.speed import announce_speed
from training.state import LOSSES, METRICS, SAME_ON_ALL, TrainState
from training.step import learning_rates, train_step

logger = logging.getLogger(__name__)


def train(run: ResolvedRun) -> dict[str, Any]:
    """Train to the end, or until a signal; returns the summary. On rank 0, or the only one.

    Raises ConfigError on what a user can mend, TrainingFailed where it cannot go on.
    """
    with lock(run.run_dir):
        set_up_logging(run.run_dir / "log.txt")
        store = meet(run.world, run)[0] if run.world.size > 1 else None
        return _train(run, store)


def follow(world: World) -> None:
    """Train as one of the other ranks: what rank 0 has decided and prepared."""
    store, run = meet(world)
    set_up_logging(level=logging.ERROR)
    _train(replace(run, world=world), store)


def _train(run: ResolvedRun, store: dist.Store | None) -> dict[str, Any]:
    with memory_advice(run.config), joined(run.world, store, run.config.comm_timeout) as ranks:
        try:
            trainer = Trainer(run, ranks)
        except BaseException:
            if ranks.rank == 0:
                set_up_logging()  # closes log.txt
                discard(run.run_dir, run.config)
            raise
        return trainer.fit()


class Trainer:
    """A run in progress, on one of its ranks; the first one does all writing."""

    def __init__(self, run: ResolvedRun, ranks: Ranks = ALONE) -> None:
        self.run, config = run, run.config
        self.ranks, self.leads = ranks, ranks.rank == 0
        device = choose_device(config.device, run.world.local_rank)
        set_determinism(device)
        logger.info("run folder %s", run.run_dir)
        if self.leads:
            describe(run.run_dir, config)
        self.datasets = {s: read_dataset(run.dataset_path, s) for s in ("train", "test")}
        self.state = TrainState(run, self.datasets["train"], device, ranks)
        graphed = config.cuda_graph == "auto" and ranks.size == 1
        self.eval_steps = ACTSteps(self.state.act, device, graphed=graphed)
        self.saver = Saver(run.run_dir, ranks, config.keep_checkpoints)
        prepare_execution(self.state, config)
        self._announce(device)
        self.best = -math.inf
        self.started_at = 0
        self.seconds = 0.0  # spent in training steps, over all sittings
        if isinstance(run.resume, Resume):
            self.state.restore(run.resume)
            self.seconds = run.resume.index["seconds"]
            self.started_at = self.state.step
            if self.leads:
                self._tidy()
            self.best = ranks.first(self.best)
        elif isinstance(run.resume, WarmStart):
            self.state.warm_start(run.resume, run.dataset_path)
        self.logger = RunLogger(run, self.state.step) if self.leads else None
        self.intervals = 0  # logged in this sitting
        self.reports: dict[str, SetReport] = {}
        self.evaluated_step: int | None = None

    def _tidy(self) -> None:
        """What a run folder needs before its run goes on."""
        run, step = self.run, self.state.step
        checkpoint.tidy(run.run_dir, step)
        best = checkpoint.best(run.run_dir) or {}
        self.best = best.get("merit", best.get("exact_accuracy", -math.inf))
        if (checkpoint.folder(run.run_dir) / checkpoint.name(step)).exists():
            self.saver.saved_step = step

    def _announce(self, device: torch.device) -> None:
        run, model = self.run, self.state.model
        parameters = sum(p.numel() for p in model.parameters())
        table_rows = model.embedding.puzzles
        embeddings = "" if table_rows is None else f" + {table_rows.numel():,} puzzle embeddings"
        among = f" and {self.ranks.size - 1} more" if self.ranks.size > 1 else ""
        logger.info("device %s%s", device_name(device), among)
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
        last = min(run.total_steps, config.stop_at or run.total_steps)
        stop = StopSignal(self.ranks)
        progress = tqdm(
            total=run.total_steps, initial=state.step, desc="training", unit="step",
            mininterval=0.5 if sys.stderr.isatty() else 5.0, dynamic_ncols=True,
            disable=not self.leads,
        )  # fmt: skip
        clock = time.perf_counter()
        try:
            while state.step < last and not stop.agreed():
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
            stop.settle()
            return self._end(stop.name)
        finally:
            progress.close()
            stop.restore()
            self.saver.close()
            state.loader.close()
            state.graph = None  # NCCL does not end while a graph holds one of its collectives

    def _count_time(self, clock: float) -> float:
        """Add what passed since `clock` to the training time; returns the clock now."""
        self.ranks.settle(self.state.device)
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
        sums = self._fetch_sums()
        nonfinite = sums.pop("nonfinite")
        seconds, clock = self.seconds, self._count_time(clock)
        elapsed = max(self.seconds - seconds, 1e-9)
        for value in state.sums.values():
            value.zero_()
        self._check_finite(int(nonfinite))
        if self.logger is None:
            return clock
        steps, count = max(sums["train_steps"], 1), max(sums["count"], 1)
        self.intervals += 1
        if self.intervals == 2:  # the first one compiled
            announce_speed(run, state.device, elapsed / steps)
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

    def _fetch_sums(self) -> dict[str, float]:
        """The metric sums over all ranks, and the number of steps that were held back."""
        state = self.state
        names = [n for n in state.sums if n not in SAME_ON_ALL]
        wide = torch.float32 if state.device.type == "mps" else torch.float64
        sums = self.ranks.sum(torch.stack([state.sums[n].to(wide) for n in names]))
        same = [state.sums[n].to(wide) for n in SAME_ON_ALL] + [state.nonfinite.to(wide)]
        values = torch.cat([sums, torch.stack(same)])
        self.ranks.settle(state.device)
        values = values.tolist()
        return dict(zip([*names, *SAME_ON_ALL, "nonfinite"], values, strict=True))

    def _check_finite(self, nonfinite: int) -> None:
        if not nonfinite or self.run.config.on_nonfinite == "skip":
            return
        self.saver.wait()
        steps = self.ranks.first(checkpoint.list_steps(self.run.run_dir))
        good = checkpoint.folder(self.run.run_dir) / checkpoint.name(steps[-1]) if steps else "none"
        raise TrainingFailed(
            f"the loss or a gradient became NaN or infinite before step {self.state.step}; the "
            f"last good checkpoint is {good}: resume it with a lower lr, or on_nonfinite=skip"
        )

    # Evaluation and checkpoints

    def _evaluate(self) -> None:
        run, config, state = self.run, self.run.config, self.state
        began = time.perf_counter()
        with state.ema.applied() if state.ema is not None else nullcontext():
            self.reports = evaluate(
                state.act,
                self.datasets["test"],
                config.eval,
                batch_size=config.eval.batch_size or config.global_batch_size,
                seed=config.seed,
                device=state.device,
                output_dir=run.run_dir,
                ranks=self.ranks,
                steps=self.eval_steps,
            )
        self.evaluated_step = state.step
        seconds = time.perf_counter() - began
        logger.info("evaluation at step %d, in %.3g s\n%s", state.step, seconds,
                    table(self.reports))  # fmt: skip
        values = {f"{s}/{k}": v for s, r in self.reports.items() for k, v in r.values().items()}
        if self.logger is not None:
            self.logger.log(state.step, {**values, "train_seconds": self.seconds})
        if self.merit() > self.best:
            self.best = self.merit()
            self._save()
            self.saver.mark_best(state.step, self.score(), self.best)

    def score(self) -> float:
        """Exact accuracy over all test puzzles."""
        puzzles = sum(r.count for r in self.reports.values())
        right = sum(r.exact_accuracy * r.count for r in self.reports.values())
        return right / max(puzzles, 1)

    def merit(self) -> float:
        """What the best checkpoint is chosen by: the task's own measure, or exact accuracy."""
        own = [r.merit for r in self.reports.values() if r.merit is not None]
        return sum(own) / len(own) if own else self.score()

    def _save(self) -> None:
        """Begin to save the state, unless it is; the loop goes on meanwhile."""
        run, state = self.run, self.state
        if self.saver.has(state.step):
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
        self.saver.save(state, index)

    def _end(self, signal_name: str | None) -> dict[str, Any]:
        run, state = self.run, self.state
        if state.step >= run.total_steps and self.evaluated_step != state.step:
            self._evaluate()
        self._save()
        saved = self.saver.has(state.step)
        summary = {
            "run": str(run.run_dir),
            "finished": saved and state.step >= run.total_steps,
            "step": state.step,
            "train_seconds": round(self.seconds, 3),
            "steps_per_second": round(state.step / max(self.seconds, 1e-9), 4),
            "exact_accuracy": self.score() if self.reports else None,
            "sets": {name: r.values() for name, r in self.reports.items()},
        }
        if self.leads:
            self._conclude(summary, signal_name, saved)
        if not saved:
            self.ranks.first(None)  # torchrun ends all when one does: the first one is done now
            raise TrainingFailed(
                f"the state after step {state.step} could not be saved (see above); make room, "
                f"then {command(f'load_checkpoint={run.run_dir}')} goes on from the newest one"
            )
        return summary

    def _conclude(self, summary: dict[str, Any], signal_name: str | None, saved: bool) -> None:
        """Leave the result in the run folder, and tell what can be done with what is saved."""
        run, state, finished = self.run, self.state, summary["finished"]
        write_summary(run.run_dir, summary)
        try:
            logger.info("curves: %s", plot_run(run.run_dir))
        except (ImportError, OSError, ValueError) as error:
            logger.warning("the curves could not be drawn (%s)", error)
        if self.logger is not None:
            self.logger.close({k: v for k, v in summary.items() if k != "sets"})
        if not saved:
            return
        if not finished:
            logger.info("%s: stopped after step %d of %d, everything is saved",
                        signal_name or "stop_at", state.step, run.total_steps)  # fmt: skip
        else:
            logger.info("finished: %d steps in %.1f s", state.step, self.seconds)
        more = () if not finished else (f"max_steps={2 * run.total_steps}",)
        logger.info("evaluate it: python evaluate.py checkpoint=%s", run.run_dir)
        logger.info("resume it:   %s", command(f"load_checkpoint={run.run_dir}", *more))
