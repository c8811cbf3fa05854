"""What several tests of training share: runs that crash, comparisons to the bit, subprocesses."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import training.loop
from training import checkpoint
from training.cli import compose_values, preflight
from training.config import EvaluateConfig, RunConfig
from training.loop import Trainer
from training.report import resolve_evaluation
from training.resolve import check_job, resolve

ROOT = Path(__file__).parents[2]
TIMES = ("train_seconds", "examples_per_second")


class Crash(BaseException):
    """What a power cut is to a process: no handler in the engine expects it."""


# A run that is stopped and goes on: what it is made of besides TINY
EVERY_5 = ("checkpoint_interval=5", "eval_interval=6", "ema_rate=0.9",
           "arch.halt_exploration_prob=0.5")  # fmt: skip


def resolved(*arguments: str):
    """A ResolvedRun, by the same way as `pretrain.py` takes."""
    overrides = preflight("cfg_pretrain", RunConfig, list(arguments), check_job)
    return resolve(compose_values("cfg_pretrain", overrides), overrides)


def resolved_evaluation(*arguments: str):
    """A ResolvedEvaluation, as `evaluate.py` makes it."""
    overrides = preflight("cfg_evaluate", EvaluateConfig, list(arguments))
    return resolve_evaluation(compose_values("cfg_evaluate", overrides))


def train(monkeypatch, *arguments: str, crash_before: int | None = None) -> Path:
    """Train; returns the run folder. With `crash_before`, that step never takes place."""
    run = resolved(*arguments)
    trainer = Trainer(run)
    if trainer.state.step == 0:  # rows halt at different steps
        trainer.state.model.q_head.bias.data.fill_(0.1)
    with monkeypatch.context() as patch:
        if crash_before is not None:
            step = training.loop.train_step

            def crashing(state, config, total_steps):
                if state.step + 1 == crash_before:
                    raise Crash
                step(state, config, total_steps)

            patch.setattr(training.loop, "train_step", crashing)
        try:
            trainer.fit()
        except Crash:
            assert crash_before is not None
    return run.run_dir


def tensors(path: Path) -> dict[str, bytes]:
    """Every tensor file of a checkpoint, byte for byte (names, dtypes, shapes and values)."""
    files = {p.name: p.read_bytes() for p in path.glob("*.safetensors")}
    assert {"model.safetensors", "optimizer.safetensors", "carry.safetensors"} <= files.keys()
    return files


def newest(run_dir: Path) -> Path:
    return checkpoint.newest(run_dir)[0]


def metrics(run_dir: Path) -> list[dict[str, object]]:
    """metrics.jsonl without the fields that tell the time."""
    lines = map(json.loads, (run_dir / "metrics.jsonl").read_text().splitlines())
    return [{k: v for k, v in line.items() if k not in TIMES} for line in lines]


def command(script: str, *arguments: str) -> list[str]:
    return [sys.executable, str(ROOT / script), *arguments]


def environment(**more: str | None) -> dict[str, str]:
    """The environment of a subprocess; None takes a variable out of it."""
    wanted = {**os.environ, "OMP_NUM_THREADS": "1", "WANDB_MODE": "disabled", **more}
    return {name: value for name, value in wanted.items() if value is not None}


def call(
    cwd: Path, script: str, *arguments: str, **more: str | None
) -> subprocess.CompletedProcess:
    """Run a script of the repository as a user would, in `cwd`."""
    return subprocess.run(
        command(script, *arguments),
        cwd=cwd, env=environment(**more), capture_output=True, text=True, timeout=300,
        stdin=subprocess.DEVNULL,
    )  # fmt: skip
