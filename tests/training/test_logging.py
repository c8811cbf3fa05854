"""metrics.jsonl, wandb without account or network, the run folder."""

from __future__ import annotations

import json
import math

import pytest
import yaml

from tests.training.helpers import call, resolved, train
from training import checkpoint
from training.logging import JsonlSink, RunLogger, WandbSink
from training.plot import plot_run
from training.run_folder import lock

TRAIN_KEYS = {
    "step", "train/accuracy", "train/exact_accuracy", "train/q_halt_accuracy", "train/steps",
    "train/lm_loss", "train/q_halt_loss", "train/count", "train/grad_norm", "train/lr",
    "examples_per_second", "train_seconds", "nonfinite_steps", "epoch",
}  # fmt: skip
SET_KEYS = {"count", "accuracy", "exact_accuracy", "q_halt_accuracy", "steps", "lm_loss",
            "q_halt_loss", "violations", "valid"}  # fmt: skip


def read(run_dir) -> list[dict]:
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def test_metrics_jsonl(tiny, monkeypatch):
    run_dir = train(monkeypatch, *tiny("eval_interval=6", "lr=0.002", "lr_min_ratio=1.0"))
    lines = read(run_dir)
    training = [line for line in lines if "train/lm_loss" in line]
    evaluations = [line for line in lines if "all/count" in line]
    assert [line["step"] for line in training] == [4, 8, 12]
    assert [line["step"] for line in evaluations] == [6, 12]
    assert [line["step"] for line in lines] == sorted(line["step"] for line in lines)
    for line in training:
        assert line.keys() == TRAIN_KEYS
        assert 0 < line["train/lm_loss"] < 10 and line["train/grad_norm"] > 0
        assert 0 <= line["train/exact_accuracy"] <= line["train/accuracy"] <= 1
        assert 1 <= line["train/steps"] <= 4 and line["nonfinite_steps"] == 0
        assert line["examples_per_second"] > 0
        assert line["epoch"] == pytest.approx(line["step"] * 8 / 60)
        assert line["train/lr"] == pytest.approx(0.002 * min(1, line["step"] / 4))
    for line in evaluations:
        assert line.keys() == {"step", "train_seconds", *(f"all/{k}" for k in SET_KEYS)}
        assert line["all/count"] == 8 and line["all/steps"] == 4


def test_sums_are_averages_over_the_interval(tiny, monkeypatch):
    """Logging every step, averaged by hand, gives what logging every 4 steps says."""
    fine = read(train(monkeypatch, *tiny("log_interval=1", "run_name=fine")))
    coarse = read(train(monkeypatch, *tiny("log_interval=4", "run_name=coarse")))
    single = {x["step"]: x for x in fine if "train/lm_loss" in x}
    for line in (x for x in coarse if "train/lm_loss" in x):
        steps = [single[s] for s in range(line["step"] - 3, line["step"] + 1)]
        for key in ("train/lm_loss", "train/grad_norm", "train/q_halt_loss"):
            assert line[key] == pytest.approx(sum(s[key] for s in steps) / 4, rel=1e-5)
        assert line["train/count"] == sum(s["train/count"] for s in steps)
        weighted = sum(s["train/accuracy"] * s["train/count"] for s in steps)
        assert line["train/accuracy"] == pytest.approx(
            weighted / max(line["train/count"], 1), rel=1e-5
        )


def test_lines_after_the_resumed_step_are_set_aside(tmp_path):
    path = tmp_path / "metrics.jsonl"
    sink = JsonlSink(path, 0)
    for step in (2, 4, 6):
        sink.log(step, {"loss": 1.0 / step})
    sink.close({})
    with path.open("a") as file:
        file.write('{"step": 7, "loss"')  # a kill in the middle of a line
    again = JsonlSink(path, 4)
    again.log(4, {"loss": 99.0})  # known already
    again.log(4, {"all/count": 3})
    again.log(6, {"loss": 0.5})
    again.close({})
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert lines == [
        {"step": 2, "loss": 0.5}, {"step": 4, "loss": 0.25}, {"step": 4, "all/count": 3},
        {"step": 6, "loss": 0.5},
    ]  # fmt: skip
    aside = (tmp_path / "metrics.superseded.jsonl").read_text()
    assert aside.startswith('{"step": 6') and aside.endswith('{"step": 7, "loss"')


def test_what_is_not_finite_is_null(tmp_path):
    sink = JsonlSink(tmp_path / "metrics.jsonl", 0)
    sink.log(1, {"a": math.nan, "b": math.inf, "c": 1.5, "d": 3, "e": None})
    sink.close({})
    line = json.loads((tmp_path / "metrics.jsonl").read_text(), parse_constant=pytest.fail)
    assert line == {"step": 1, "a": None, "b": None, "c": 1.5, "d": 3, "e": None}


def test_a_full_disk_stops_no_run(tiny, monkeypatch, caplog):
    import errno

    def full(self, step, values):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(JsonlSink, "log", full)
    run_dir = train(monkeypatch, *tiny())
    assert checkpoint.list_steps(run_dir)[-1] == 12
    assert "step 4 could not be logged" in caplog.text


def test_the_run_folder_explains_itself(tiny, monkeypatch):
    run_dir = train(monkeypatch, *tiny("run_name=me"))
    files = {p.name for p in run_dir.iterdir()}
    assert {"README.md", "config.yaml", "environment.json", "metrics.jsonl", "summary.json",
            "checkpoints"} <= files  # fmt: skip
    config = yaml.safe_load((run_dir / "config.yaml").read_text())
    assert config["arch"]["hidden_size"] == 32 and config["max_steps"] == 12
    environment = json.loads((run_dir / "environment.json").read_text())
    assert environment["packages"]["torch"] and environment["python"] and environment["code"]
    summary = json.loads((run_dir / "summary.json").read_text())
    assert summary["finished"] and summary["step"] == 12
    assert summary["sets"]["all"]["count"] == 8 and 0 <= summary["exact_accuracy"] <= 1
    readme = (run_dir / "README.md").read_text()
    assert f"load_checkpoint={run_dir}" in readme and f"checkpoint={run_dir}" in readme
    plot_run(run_dir)  # a run does so at its end, but not in these tests
    assert (run_dir / "curves.png").read_bytes()[:4] == b"\x89PNG"


def test_two_runs_in_one_folder(tiny):
    run = resolved(*tiny())
    from training.errors import ConfigError

    with lock(run.run_dir):
        with pytest.raises(ConfigError, match=r"another process is training in"), lock(run.run_dir):
            pass
    with lock(run.run_dir):
        pass


# ------------------------------------------------------------------------------------------ wandb


class FakeRun:
    """Takes what wandb's run takes; `fail` says what happens then."""

    def __init__(self, fail: Exception | None = None) -> None:
        self.lines, self.summary, self.finished, self.fail = [], {}, False, fail

    def log(self, values, step):
        if self.fail:
            raise self.fail
        self.lines.append((step, values))

    def finish(self):
        self.finished = True


@pytest.fixture
def calls(monkeypatch, tmp_path):
    """wandb.init is recorded; `calls.answers[mode]` is what it returns or raises."""
    import wandb

    class Calls(list):
        answers: dict = {}  # noqa: RUF012

    calls = Calls()
    calls.answers = {}

    def init(**how):
        calls.append(how)
        answer = calls.answers.get(how["mode"], FakeRun())
        if isinstance(answer, Exception):
            raise answer
        return answer

    monkeypatch.setattr(wandb, "init", init)
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "no netrc"))
    return calls


def test_online_without_an_account_falls_back_to_offline(tiny, calls, caplog):
    sink = WandbSink(resolved(*tiny("wandb.mode=online")))
    assert [c["mode"] for c in calls] == ["offline"] and sink.run is not None
    assert "no account" in caplog.text and "offline" in caplog.text


def test_online_without_a_network_falls_back_to_offline(tiny, calls, caplog, monkeypatch):
    import wandb

    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    calls.answers = {"online": wandb.errors.CommError("no network")}
    sink = WandbSink(resolved(*tiny("wandb.mode=online")))
    assert [c["mode"] for c in calls] == ["online", "offline"] and sink.run is not None
    assert "no network" in caplog.text


def test_a_run_goes_on_where_wandb_fails_altogether(tiny, calls, caplog, monkeypatch):
    import wandb

    calls.answers = {"offline": wandb.errors.UsageError("broken")}
    run_dir = train(monkeypatch, *tiny("wandb.mode=offline"))
    assert checkpoint.list_steps(run_dir)[-1] == 12 and len(read(run_dir)) == 4
    assert "broken" in caplog.text


def test_a_run_goes_on_where_wandb_breaks_later(tiny, calls, caplog, monkeypatch):
    import wandb

    calls.answers = {"offline": FakeRun(fail=wandb.errors.CommError("gone"))}
    run_dir = train(monkeypatch, *tiny("wandb.mode=offline"))
    assert checkpoint.list_steps(run_dir)[-1] == 12
    assert "gone" in caplog.text


def test_the_same_run_id_after_a_resume(tiny, calls, monkeypatch):
    part = train(
        monkeypatch, *tiny("wandb.mode=offline", "checkpoint_interval=5", "wandb.tags=[a,b]"),
        crash_before=7,
    )  # fmt: skip
    fake = calls.answers["offline"] = FakeRun()
    train(monkeypatch, f"load_checkpoint={part}")
    assert calls[0]["id"] == calls[1]["id"] and calls[1]["resume"] == "allow"
    assert calls[0]["tags"] == ["a", "b"] and calls[0]["config"]["arch"]["hidden_size"] == 32
    assert [step for step, _ in fake.lines] == [8, 12, 12]
    assert fake.finished and fake.summary["step"] == 12


def test_every_sink_is_closed(tiny, calls):
    fake = calls.answers["offline"] = FakeRun()
    logger = RunLogger(resolved(*tiny("wandb.mode=offline")), 0)
    logger.close({"step": 3})
    assert fake.finished and logger.sinks[0].file.closed


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["offline", "online"])
def test_the_real_wandb_without_account_and_prompt(tiny, tmp_path, mode):
    done = call(
        tmp_path, "pretrain.py", *tiny(f"wandb.mode={mode}", "run_name=w", "max_steps=4"),
        WANDB_MODE=None, WANDB_API_KEY=None, NETRC=str(tmp_path / "none"), HOME=str(tmp_path),
    )  # fmt: skip
    assert done.returncode == 0 and "Traceback" not in done.stderr, done.stderr[-2000:]
    assert list((tmp_path / "runs" / "w" / "wandb").glob("offline-run-*"))
    assert ("no account" in done.stderr) == (mode == "online")
    assert "(1) Create a W&B account" not in done.stdout + done.stderr
