"""The speedrun's tools: sittings, the whole script, and the curve of test-time compute."""

from __future__ import annotations

import csv
import gzip
import json
import os
import shutil
import subprocess
import sys
from itertools import product
from pathlib import Path

import pytest

from data.sudoku_generate import GeneratorSpec, generate_splits
from tests.conftest import TINY
from tests.training.helpers import ROOT, newest, resolved, train
from training import checkpoint
from training.errors import ConfigError

SMALL = ("arch.hidden_size=64", "arch.puzzle_emb_ndim=64", "arch.H_cycles=1", "arch.L_cycles=1",
         "arch.halt_max_steps=2", "global_batch_size=8", "max_steps=9", "log_interval=3",
         "eval_interval=100", "checkpoint_interval=100", "device=cpu")  # fmt: skip


def test_a_sitting_ends_where_it_was_told_to(tmp_path, datasets_dir, monkeypatch):
    where = f"runs_dir={tmp_path}", f"datasets_dir={datasets_dir}"
    run_dir = train(monkeypatch, *TINY, *where, "run_name=a", "stop_at=5")
    assert checkpoint.list_steps(run_dir)[-1] == 5
    assert json.loads((run_dir / "summary.json").read_text())["finished"] is False
    again = train(monkeypatch, f"load_checkpoint={run_dir}", *where)  # to the end: not inherited
    whole = train(monkeypatch, *TINY, *where, "run_name=b")
    for name in ("model", "optimizer", "ema"):
        ours, theirs = (newest(d) / f"{name}.safetensors" for d in (again, whole))
        assert ours.read_bytes() == theirs.read_bytes()
    with pytest.raises(ConfigError, match="stop_at"):
        resolved(*TINY, *where, "stop_at=0")


@pytest.fixture(scope="module")
def puzzles(tmp_path_factory) -> tuple[Path, Path]:
    """Two small files of 9×9 Sudoku."""
    folder = tmp_path_factory.mktemp("csv")
    spec = GeneratorSpec((3, 3), 12, 6, seed=1, minimal=False, clues=(30, 50), draw=(30, 50),
                         ratings=(0, 1000))  # fmt: skip
    paths = []
    for name, table in zip(("train", "test"), generate_splits(spec), strict=True):
        path = folder / f"{name}.csv.gz"
        with gzip.open(path, "wt", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(["source", "question", "answer", "rating"])
            for q, a in zip(table.questions, table.answers, strict=True):
                text = "".join(str(d) if d else "." for d in q)
                writer.writerow(["made", text, "".join(map(str, a)), 0])
        paths.append(path)
    return paths[0], paths[1]


@pytest.fixture
def house(tmp_path) -> Path:
    """A copy of the code, whose runs/ and datasets/ belong to the test."""
    copy = tmp_path / "house"
    copy.mkdir()
    for name in ("config", "data", "hydra_plugins", "models", "optim", "scripts", "training"):
        shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pretrain.py", "evaluate.py"):
        shutil.copy(ROOT / name, copy / name)
    return copy


@pytest.mark.slow
def test_the_script_trains_in_sittings_and_evaluates(house, puzzles):
    given = ["--train", str(puzzles[0]), "--test", str(puzzles[1]), "--name", "s", "--cut", "4"]
    script = ["bash", str(house / "scripts/reproduce_sudoku_speedrun.sh"), *given, *SMALL]

    def call(*more: str) -> str:
        environment = {**os.environ, "PYTHON": sys.executable}
        done = subprocess.run([*script, *more], capture_output=True, text=True, timeout=400,
                              env=environment)  # fmt: skip
        assert done.returncode == 0, done.stderr[-3000:]
        return done.stdout + done.stderr

    first = call("--sitting", "--no-thinking")
    assert "step 4" in first and "to go on" in first
    shutil.rmtree(house / "runs/s-1")  # nothing but the packed state goes on
    second = call()
    assert "sitting 1: done" in second and "the carry is new" in second
    summary = json.loads((house / "runs/s-2/summary.json").read_text())
    assert summary["finished"] and summary["step"] == 9
    report = json.loads((house / "runs/s-2/evaluation-s.json").read_text())
    assert report["sets"]["all"]["count"] == 6 and report["step"] == 9
    figure = f"{report['sets']['all']['exact_accuracy']:.4%} of 6 puzzles"
    told = (house / "runs/s-2/report.md").read_text()
    assert figure in told and "began after step 4 from a packed state" in told
    rows = list(csv.DictReader((house / "runs/s-2/thinking-curve.csv").open()))
    assert {(r["depth"], r["confidence"], r["agree"]) for r in rows} == set(
        product(("16", "64"), ("0.99",), ("1", "2", "3"))
    )
    for row in rows:
        assert float(row["ACT_steps"]) <= int(row["depth"]) * int(row["breadth"]) + 1e-9
        assert float(row["TFLOP"]) > 0 and float(row["seconds"]) > 0
    assert (house / "runs/s-2/thinking-curve.png").stat().st_size > 1000


def test_the_script_refuses_what_it_does_not_know(house):
    script = ["bash", str(house / "scripts/reproduce_sudoku_speedrun.sh")]
    environment = {**os.environ, "PYTHON": sys.executable}
    for arguments, message in (
        (["--trane", "x"], "there is no option --trane"),
        (["--train", "x"], "give both --train and --test"),
        (["--cut", "4,x"], "should be steps"),
        (["--seed"], "--seed needs a value"),
    ):
        done = subprocess.run([*script, *arguments], capture_output=True, text=True,
                              timeout=60, env=environment)  # fmt: skip
        assert done.returncode == 2 and message in done.stderr, done.stderr
