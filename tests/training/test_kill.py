"""Kills at random moments, signals: every run ends as if nothing had happened.

`kill -9` cannot be caught, so these runs are processes of their own. Several kills hit the same
run; half of all are aimed at a moment in which a checkpoint is being written.
"""

from __future__ import annotations

import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.conftest import TINY
from tests.training.helpers import ROOT, command, environment, metrics, newest, tensors
from training import checkpoint

STEPS, INTERVAL = 60, 7  # 60 puzzles in batches of 8: a checkpoint in mid-epoch
RECIPE = (
    *(text for text in TINY if not text.startswith("max_steps")),
    f"max_steps={STEPS}", f"checkpoint_interval={INTERVAL}", "eval_interval=20",
    "arch.halt_exploration_prob=0.5", "ema_rate=0.9", "keep_checkpoints=3",
)  # fmt: skip
COMBINATIONS = [(a, o) for a in ("trm", "trm_mlp") for o in ("adam_atan2", "adamw")]
KILLS = {"anywhere": 8, "writing": 5}  # of each combination: 52 in all, 20 of them while writing
# A process that sleeps a little in every step and in every file of a checkpoint is killed in the
# middle of either; it computes the same.
SLOWED = """
import sys, time
sys.argv[0] = {script!r}
sys.path.insert(0, {root!r})
import safetensors.torch as st
import training.step, runpy
save, step = st.save_file, training.step.train_step
def save_slowly(tensors, path):
    time.sleep({pause}); save(tensors, path); time.sleep({pause})
def step_slowly(*arguments):
    time.sleep({pause}); step(*arguments)
st.save_file, training.step.train_step = save_slowly, step_slowly
runpy.run_path({script!r}, run_name="__main__")
"""


def start(cwd: Path, *arguments: str, pause: float = 0.0) -> subprocess.Popen:
    """`python pretrain.py …` in `cwd`; with `pause` seconds in each step and each file saved."""
    call = command("pretrain.py", *arguments)
    if pause:
        code = SLOWED.format(script=str(ROOT / "pretrain.py"), root=str(ROOT), pause=pause)
        call = [sys.executable, "-c", code, *arguments]
    return subprocess.Popen(
        call, cwd=cwd, env=environment(), stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def finish(process: subprocess.Popen) -> str:
    _, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors
    return errors


def wait_for(process: subprocess.Popen, condition, seconds: float = 120.0) -> bool:
    """Poll until `condition()`; False if the process ends first."""
    deadline = time.monotonic() + seconds
    while process.poll() is None:
        if condition():
            return True
        assert time.monotonic() < deadline, "the run does not come to the point"
        time.sleep(0.0005)
    return False


def wait_for_log(process: subprocess.Popen, run_dir: Path) -> bool:
    """Until the run has begun to speak."""
    log = run_dir / "log.txt"
    size = log.stat().st_size if log.exists() else 0
    return wait_for(process, lambda: log.exists() and log.stat().st_size > size)


def wait_for_writing(process: subprocess.Popen, run_dir: Path, skip: int) -> bool:
    """Until a checkpoint is being written: after `skip` whole new ones."""
    before = max(steps_of(run_dir), default=-1)

    def now() -> bool:
        new = [step for step in steps_of(run_dir) if step > before]
        return len(new) >= skip and bool(writing(run_dir))

    return wait_for_log(process, run_dir) and wait_for(process, now)


def writing(run_dir: Path) -> list[Path]:
    return list((run_dir / "checkpoints").glob(".writing-step_*"))


def steps_of(run_dir: Path) -> list[int]:
    return checkpoint.list_steps(run_dir)


def compare(a: Path, b: Path) -> subprocess.CompletedProcess:
    return subprocess.run(
        command("scripts/compare_checkpoints.py", str(a), str(b)),
        env=environment(), capture_output=True, text=True, timeout=120,
    )  # fmt: skip


def begun_or_fresh(run_dir: Path, recipe: tuple[str, ...]) -> tuple[str, ...]:
    """How a user goes on: resume, if there is anything to resume."""
    if steps_of(run_dir):
        return (f"load_checkpoint=runs/{run_dir.name}",)
    shutil.rmtree(run_dir, ignore_errors=True)  # killed before its first checkpoint
    return (*recipe, "runs_dir=runs", f"run_name={run_dir.name}")


@pytest.mark.slow
@pytest.mark.parametrize("arch, optim", COMBINATIONS)
def test_kill_9_at_random_moments(tmp_path, arch, optim):
    recipe = (*RECIPE, f"arch={arch}", f"optim={optim}")
    finish(start(tmp_path, *recipe, "runs_dir=runs", "run_name=whole"))
    whole = tmp_path / "runs" / "whole"
    moments = random.Random(f"{arch} {optim}")
    plan = [kind for kind, count in KILLS.items() for _ in range(count)]
    moments.shuffle(plan)
    killed = {"anywhere": 0, "writing": 0}
    runs, number = [], 0
    while plan:
        if not runs or steps_of(runs[-1])[-1:] == [STEPS]:  # that one is through: another one
            number += 1
            runs.append(tmp_path / "runs" / f"killed-{number}")
        run_dir, kind = runs[-1], plan.pop()
        process = start(tmp_path, *begun_or_fresh(run_dir, recipe), pause=0.03)
        if kind == "writing":
            reached = wait_for_writing(process, run_dir, skip=moments.randrange(3))
            time.sleep(moments.uniform(0, 0.15))
        else:
            reached = wait_for_log(process, run_dir)
            time.sleep(moments.uniform(0, 4.0))
        process.send_signal(signal.SIGKILL)
        _, errors = process.communicate(timeout=60)
        if process.returncode != -signal.SIGKILL or not reached:
            assert process.returncode in (0, -signal.SIGKILL), errors
            plan.append(kind)  # it was through before the kill came
            continue
        if kind == "writing" and not writing(run_dir):
            kind = "anywhere"  # the folder had its name already
            plan.append("writing")
        killed[kind] += 1
        for step in steps_of(run_dir):  # whatever the moment: whole checkpoints only
            checkpoint.read_index(run_dir / "checkpoints" / checkpoint.name(step))
    assert killed["writing"] == KILLS["writing"] and killed["anywhere"] >= KILLS["anywhere"]
    for run_dir in runs:
        finish(start(tmp_path, *begun_or_fresh(run_dir, recipe)))
        result = compare(whole, run_dir)
        assert result.returncode == 0 and result.stdout.startswith("identical"), result.stdout
        assert tensors(newest(whole)) == tensors(newest(run_dir))
        assert metrics(whole) == metrics(run_dir)
        assert not writing(run_dir)
    print(f"{arch} {optim}: {killed} kills of {len(runs)} runs")


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    """The run that no signal stops."""
    place = tmp_path_factory.mktemp("whole")
    finish(start(place, *RECIPE, "runs_dir=runs", "run_name=whole"))
    return place / "runs" / "whole"


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_says_how_to_resume_and_resumes_exactly(whole, tmp_path, number):
    run_dir = tmp_path / "runs" / "stopped"
    process = start(tmp_path, *RECIPE, "runs_dir=runs", "run_name=stopped", pause=0.03)
    assert wait_for(process, lambda: INTERVAL in steps_of(run_dir))
    time.sleep(0.3)
    process.send_signal(number)
    text = finish(process)
    step = steps_of(run_dir)[-1]
    assert INTERVAL <= step < STEPS
    assert f"{number.name}: stopped after step {step} of {STEPS}, everything is saved" in text
    assert "python pretrain.py load_checkpoint=runs/stopped" in text
    assert "Traceback" not in text
    finish(start(tmp_path, "load_checkpoint=runs/stopped"))
    assert tensors(newest(whole)) == tensors(newest(run_dir))
    assert metrics(whole) == metrics(run_dir)


@pytest.mark.slow
def test_a_second_interrupt_is_immediate_and_costs_no_whole_checkpoint(tmp_path):
    run_dir = tmp_path / "runs" / "stopped"
    process = start(tmp_path, *RECIPE, "runs_dir=runs", "run_name=stopped", pause=1.0)
    assert wait_for(process, lambda: steps_of(run_dir))
    time.sleep(1.5)
    process.send_signal(signal.SIGINT)
    time.sleep(0.2)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130 and "Traceback" not in errors
    assert errors.rstrip().endswith("error: interrupted")
    checkpoint.newest(run_dir)


@pytest.mark.slow
def test_two_processes_never_train_in_one_folder(tmp_path):
    run_dir = tmp_path / "runs" / "one"
    first = start(tmp_path, *RECIPE, "runs_dir=runs", "run_name=one", pause=0.3)
    assert wait_for(first, lambda: steps_of(run_dir))
    second = start(tmp_path, f"load_checkpoint={run_dir}")
    _, errors = second.communicate(timeout=120)
    assert second.returncode == 2 and "another process is training in" in errors
    first.send_signal(signal.SIGTERM)
    finish(first)
