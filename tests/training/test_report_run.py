"""The log of a run in several sittings, as Markdown and picture."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from scripts.report_run import read_lines, set_names, table, warm_up
from tests.training.helpers import ROOT, environment, newest, train
from training import packing
from training.errors import ConfigError


def line(step: int, seconds: float, rate: float, **more: float) -> dict[str, float]:
    return {"step": step, "train_seconds": seconds, "examples_per_second": rate,
            "train/lm_loss": 1.0, "train/exact_accuracy": 0.5, "train/count": 8.0,
            "train/steps": 2.0, "train/grad_norm": 0.1, **more}  # fmt: skip


def write(folder: Path, lines: list[dict[str, float]]) -> Path:
    folder.mkdir()
    (folder / "metrics.jsonl").write_text("".join(json.dumps(x) + "\n" for x in lines))
    return folder


def test_sittings_are_joined(tmp_path):
    a = write(tmp_path / "a", [line(s, s, 8.0) for s in (2, 4, 6)])
    test = {"step": 6, "train_seconds": 5.5, "all/exact_accuracy": 0.25,
            "all/rating_1-2/exact_accuracy": 0.75}  # fmt: skip
    b = write(tmp_path / "b", [line(6, 5.0, 8.0), test, line(8, 7.0, 8.0)])
    lines = read_lines([a, b])
    assert [x["step"] for x in lines] == [2, 4, 6, 8]
    assert lines[2]["train_seconds"] == 5.5  # the second sitting's
    assert set_names(lines) == ["all"]
    rows = table(lines, 2).splitlines()
    assert [r.split(" | ")[0] for r in rows[2:]] == ["| 2", "| 6", "| 8"]
    assert "25.00%" in rows[3]
    with pytest.raises(ConfigError, match=r"metrics\.jsonl"):
        read_lines([tmp_path])


def test_compilation_is_told_apart():
    """A step of 8 rows takes 1 s; the first two intervals of both sittings took longer."""
    first = [line(2, 7.0, 8 / 3.5), line(4, 10.0, 8 / 1.5), *(line(s, s + 6, 8.0) for s in (6, 8))]
    second = [line(10, 20.0, 8 / 3.0), *(line(s, s + 10.0, 8.0) for s in (12, 14, 16))]
    assert warm_up([first, second], 8) == pytest.approx(2 * 2.5 + 2 * 0.5 + 2 * 2.0)
    assert warm_up([[]], 8) == 0


def test_two_sittings_make_one_report(tiny, monkeypatch, tmp_path):
    common = ("eval_interval=6", "log_interval=2")
    first = train(monkeypatch, *tiny(*common, "run_name=a-1", "stop_at=6"))
    packing.pack(newest(first), tmp_path / "state.safetensors")
    second = train(monkeypatch, f"load_checkpoint={tmp_path / 'state.safetensors'}",
                   "run_name=a-2")  # fmt: skip
    (second / "log.txt").write_text(
        "INFO   step 6, parameters\nINFO   a packed state: rounded to bf16\n"
    )
    report = tmp_path / "evaluation.json"
    report.write_text(json.dumps({"sets": {"all": {"exact_accuracy": 0.25, "count": 8}}}))

    def call(*more) -> subprocess.CompletedProcess:
        script = [sys.executable, str(ROOT / "scripts/report_run.py"), str(first), str(second)]
        return subprocess.run(
            [*script, "--out", str(tmp_path / "out"), *map(str, more)],
            env=environment(), capture_output=True, text=True, timeout=120,
        )  # fmt: skip

    done = call("--evaluation", report)
    assert done.returncode == 0, done.stderr
    text = (tmp_path / "out.md").read_text()
    assert "25.0000% of 8 puzzles" in text and "| sittings | 2 |" in text and "| seed | 0 |" in text
    assert "A sitting began after step 6 from a packed state: rounded to bf16." in text
    assert [r.split(" | ")[0] for r in text.splitlines() if r.startswith(("| 1", "| 6"))] == [
        "| 6", "| 10", "| 12"]  # fmt: skip
    assert str(tmp_path) not in text and (tmp_path / "out.png").stat().st_size > 1000
    report.write_text("{}")
    refused = call("--evaluation", report)
    assert refused.returncode != 0 and "no report of evaluate.py" in refused.stderr
