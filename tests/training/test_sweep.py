"""Multirun: one process and one run folder per job, one table of results."""

from __future__ import annotations

import csv
import itertools
import json
import subprocess
import time
from pathlib import Path

import pytest
import yaml

from tests.training.helpers import ROOT, call, command, environment, metrics, train
from training import launchers, sweep
from training.cli import compose_values, preflight
from training.config import RunConfig, validate
from training.errors import ConfigError


@pytest.fixture
def jobs_done(monkeypatch):
    """Jobs are recorded in place of run; `codes` are their exit codes, in turn."""

    class Jobs(list):
        codes: list = []  # noqa: RUF012
        finished = True

    jobs = Jobs()

    def run(command, check, env):
        jobs.append(command)
        code = jobs.codes[len(jobs) - 1] if len(jobs) <= len(jobs.codes) else 0
        overrides = dict(text.split("=", 1) for text in command[2:])
        if code == 0:
            run_dir = Path(overrides["runs_dir"]) / overrides["run_name"].strip("'")
            run_dir.mkdir(parents=True, exist_ok=True)
            summary = {
                "exact_accuracy": 0.5 + len(jobs) / 100, "step": 12, "train_seconds": 1.0,
                "steps_per_second": 12.0, "run": str(run_dir), "finished": jobs.finished,
            }  # fmt: skip
            (run_dir / "summary.json").write_text(json.dumps(summary))
        return subprocess.CompletedProcess(command, code)

    monkeypatch.setattr(sweep.subprocess, "run", run)
    return jobs


def grid(tmp_path) -> list[list[str]]:
    return [
        [f"optim={o}", f"seed={s}", f"runs_dir={tmp_path}"]
        for o in ("adam_atan2", "adamw")
        for s in (0, 1)
    ]


def results(tmp_path) -> list[dict[str, str]]:
    (path,) = tmp_path.glob("sweep-*/results.csv")
    with path.open() as file:
        return list(csv.DictReader(file))


def test_a_table_with_a_row_per_job(jobs_done, tmp_path, caplog):
    with caplog.at_level("INFO"):
        returned = sweep.run_sweep(grid(tmp_path), str(tmp_path))
    assert len(jobs_done) == len(returned) == 4
    rows = results(tmp_path)
    assert [(r["optim"], r["seed"], r["exact_accuracy"], r["exit_code"]) for r in rows] == [
        ("adam_atan2", "0", "0.51", "0"), ("adam_atan2", "1", "0.52", "0"),
        ("adamw", "0", "0.53", "0"), ("adamw", "1", "0.54", "0"),
    ]  # fmt: skip
    assert "runs_dir" not in rows[0]
    assert len({r["run"] for r in rows}) == 4 and all(Path(r["run"]).is_dir() for r in rows)
    assert "results.csv" in caplog.text and "adamw" in caplog.text


def test_a_failed_job_is_told_and_the_others_run(jobs_done, tmp_path, caplog):
    jobs_done.codes = [0, 2, 0, 0]
    with pytest.raises(SystemExit) as ended:
        sweep.run_sweep(grid(tmp_path), str(tmp_path))
    assert ended.value.code == 1 and len(jobs_done) == 4
    rows = results(tmp_path)
    assert [r["exit_code"] for r in rows] == ["0", "2", "0", "0"]
    assert rows[1]["exact_accuracy"] == "" and "1 of 4 jobs failed" in caplog.text


def test_an_interrupted_job_ends_the_sweep(jobs_done, tmp_path):
    jobs_done.finished = False
    sweep.run_sweep(grid(tmp_path), str(tmp_path))
    assert len(jobs_done) == 1 and len(results(tmp_path)) == 1


def test_names_of_folders_are_safe(jobs_done, tmp_path):
    jobs = [[f"data.box=[2,{n}]", f"runs_dir={tmp_path}"] for n in (2, 3)]
    sweep.run_sweep(jobs, str(tmp_path))
    (folder,) = tmp_path.glob("sweep-*")
    names = sorted(p.name for p in folder.iterdir() if p.is_dir())
    assert names == ["000-data.box=-2,2", "001-data.box=-2,3"]


@pytest.mark.slow
def test_a_real_multirun(tiny, tmp_path):
    arguments = [a for a in tiny("max_steps=4") if not a.startswith("runs_dir")]
    done = call(
        tmp_path, "pretrain.py", "-m", "optim=adam_atan2,adamw", "seed=0,1", *arguments
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    rows = results(tmp_path / "runs")
    assert [(r["optim"], r["seed"]) for r in rows] == [
        ("adam_atan2", "0"), ("adam_atan2", "1"), ("adamw", "0"), ("adamw", "1")
    ]  # fmt: skip
    for row in rows:
        run_dir = tmp_path / row["run"]
        summary = json.loads((run_dir / "summary.json").read_text())
        assert (run_dir / "curves.png").is_file()
        assert summary["finished"] and summary["step"] == 4 and row["exit_code"] == "0"
        assert float(row["exact_accuracy"]) == summary["exact_accuracy"]
        config = (run_dir / "config.yaml").read_text()
        assert f"name: {row['optim']}" in config and f"seed: {row['seed']}" in config
    assert len({r["run"] for r in rows}) == 4
    assert {p.name for p in tmp_path.iterdir()} == {"runs"}
    assert "results.csv" in done.stderr


@pytest.mark.slow
def test_a_real_multirun_with_a_bad_job_starts_none(tiny, tmp_path):
    done = call(tmp_path, "pretrain.py", "-m", "seed=0,1", *tiny("grad_accum=3"))
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert "grad_accum=3 does not divide" in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_finished_runs_are_skipped_and_others_resumed(jobs_done, tmp_path, caplog):
    jobs_done.codes = [0, 0, 1, 0]
    with pytest.raises(SystemExit):
        sweep.run_sweep(grid(tmp_path), str(tmp_path))
    jobs_done.clear()
    jobs_done.codes = []
    with caplog.at_level("INFO"):
        sweep.run_sweep(grid(tmp_path), str(tmp_path))
    (command,) = jobs_done
    assert "optim=adamw" in command and "seed=0" in command and command[-1] == "resume=auto"
    assert "3 of 4 runs were finished before" in caplog.text
    assert [r["exit_code"] for r in results(tmp_path)] == ["0"] * 4
    (table,) = tmp_path.glob("sweep-*/results.md")
    assert len(table.read_text().splitlines()) == 6
    assert table.with_suffix(".png").is_file()


def test_another_grid_is_another_sweep(jobs_done, tmp_path):
    sweep.run_sweep(grid(tmp_path), str(tmp_path))
    sweep.run_sweep(grid(tmp_path)[:2], str(tmp_path))
    assert len(jobs_done) == 6 and len(list(tmp_path.glob("sweep-*"))) == 2


def test_joblib_gives_each_job_its_gpus(jobs_done, tmp_path, monkeypatch):
    pytest.importorskip("joblib")
    seen = []
    monkeypatch.setattr(launchers, "run_job", lambda job, env: seen.append(env) or 0)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5,6,7")
    jobs = sweep.make_jobs(grid(tmp_path), tmp_path)
    done = list(launchers.JoblibLaunch(n_jobs=2, gpus_per_job=2)(jobs))
    assert {job.number for job, _ in done} == {0, 1, 2, 3}
    assert {env["CUDA_VISIBLE_DEVICES"] for env in seen} <= {"4,5", "6,7"}
    with pytest.raises(ConfigError, match="more GPUs than"):
        launchers.JoblibLaunch(n_jobs=2, gpus_per_job=4)._environment(1)


def test_the_wandb_sweep_names_what_there_is(monkeypatch, tiny):
    """Every call that its agent may make is a run, and the metric is one that runs log."""
    document = yaml.safe_load((ROOT / "scripts" / "wandb_sweep.yaml").read_text())
    words = document["command"]
    assert words[:3] == ["${env}", "${interpreter}", "${program}"]
    assert words[-1] == "${args_no_hyphens}" and (ROOT / document["program"]).is_file()
    choices = []
    for key, values in document["parameters"].items():
        values = values.get("values") or [values["min"], values["max"]]
        choices.append([f"{key}={value}" for value in values])
    for some in itertools.product(*choices):
        arguments = [*words[3:-1], *some, "device=cpu"]
        overrides = preflight("cfg_pretrain", RunConfig, arguments)
        config = validate(RunConfig, compose_values("cfg_pretrain", overrides))
        assert config.wandb.mode == "online" and config.eval_interval
    run = train(monkeypatch, *tiny("eval_interval=6"))
    assert any(document["metric"]["name"] in line for line in metrics(run))


@pytest.mark.parametrize("package", ["joblib", "submitit", "ray"])
def test_a_missing_package_is_named(monkeypatch, package):
    monkeypatch.setattr(launchers.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=f"hydra/launcher={package} needs the package {package}"):
        launchers.make_launch(package, {})


def test_ray_refuses_what_this_machine_does_not_have():
    launch = launchers.RayLaunch("local", cpus_per_job=2, gpus_per_job=1)
    with pytest.raises(ConfigError, match=r"gpus_per_job=1 is more than this machine's 0"):
        launch._check({"CPU": 4.0})
    launch._check({"CPU": 4.0, "GPU": 1.0})


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["joblib", "submitit", "ray"])
def test_a_sweep_killed_in_the_middle_and_restarted(tiny, tmp_path, launcher):
    """A 2 × 2 grid: what was finished is not run again; the table has four rows."""
    pytest.importorskip(launcher)
    arguments = [a for a in tiny("max_steps=40", "checkpoint_interval=10")
                 if not a.startswith("runs_dir")]  # fmt: skip
    where = ["hydra.launcher.cluster=local"] if launcher == "submitit" else []
    line = ["-m", f"hydra/launcher={launcher}", "optim=adam_atan2,adamw", "seed=0,1",
            *where, *arguments]  # fmt: skip
    process = subprocess.Popen(
        command("pretrain.py", *line), cwd=tmp_path, env=environment(),
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    deadline = time.monotonic() + 300
    while not (before := finished_at(tmp_path)) and process.poll() is None:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.kill()
    process.wait()
    assert before
    done = call(tmp_path, "pretrain.py", *line)
    assert done.returncode == 0, done.stderr[-2000:]
    rows = results(tmp_path / "runs")
    assert [(r["optim"], r["seed"], r["step"], r["exit_code"]) for r in rows] == [
        (o, s, "40", "0") for o in ("adam_atan2", "adamw") for s in ("0", "1")
    ]
    after = finished_at(tmp_path)
    assert len(after) == 4 and all(after[path] == when for path, when in before.items())


def finished_at(tmp_path) -> dict[Path, int]:
    """When each run that is finished ended."""
    return {p: p.stat().st_mtime_ns for p in tmp_path.glob("runs/sweep-*/*/summary.json")}


@pytest.mark.slow
def test_a_search_with_optuna_goes_on_where_it_was_killed(tiny, tmp_path):
    """Trials that have ended are not repeated, and the one in work is finished in its folder."""
    pytest.importorskip("optuna")
    base = [a for a in tiny("max_steps=12", "eval_interval=4") if not a.startswith("runs_dir")]
    line = ["--trials", "4", "--metric", "lm_loss", *base, "lr=tag(log, interval(1e-4, 1e-2))",
            "optim=choice(adam_atan2, adamw)"]  # fmt: skip
    folder = tmp_path / "runs" / "search-search"
    process = subprocess.Popen(command("scripts/search.py", *line), cwd=tmp_path, env=environment())
    deadline = time.monotonic() + 300
    while not list(folder.glob("*/summary.json")) and process.poll() is None:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.kill()
    process.wait()
    before = {p: p.stat().st_mtime_ns for p in folder.glob("*/summary.json")}
    done = call(tmp_path, "scripts/search.py", *line)
    assert done.returncode == 0, done.stderr[-2000:]
    with (folder / "results.csv").open() as file:
        rows = list(csv.DictReader(file))
    ended = [r for r in rows if r["state"] in ("complete", "pruned")]
    assert len(ended) == 4 and all(float(r["lr"]) > 0 for r in rows)
    assert len({r["run"] for r in ended}) == 4
    assert before and all(p.is_file() for p in before)
    assert "best:" in done.stderr


@pytest.mark.parametrize(
    "line, message",
    [
        ("lr=1e-3", "there is no range to search"),
        ("lr=interval(1e-2,1e-3)", "is empty"),
        ("arch.num_layers=choice(1,2)", "has no such key"),
        ("speed=choice(1,2)", "there is no key speed"),
    ],
)
def test_a_search_refuses(tmp_path, line, message):
    pytest.importorskip("optuna")
    done = call(tmp_path, "scripts/search.py", line)
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and message in done.stderr
    assert list(tmp_path.iterdir()) == []
