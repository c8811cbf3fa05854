"""Bad input: one sentence that names the key or file, exit code 2, at once, and nothing written."""

from __future__ import annotations

import json
import os
import pickle
import re
import shutil
import sys
import time
from pathlib import Path

import pytest

from data import DataError
from tests.conftest import TINY
from tests.training.bad_lines import EVALUATE, PRETRAIN
from tests.training.helpers import ROOT, call, resolved, resolved_evaluation, train
from training.errors import ConfigError, reported


@pytest.fixture(scope="module")
def prepared(tmp_path_factory, datasets_dir) -> Path:
    """The files that the table speaks of, and `good`, a finished run of two steps."""
    place = tmp_path_factory.mktemp("place")
    header = "source,question,answer,rating\n"
    (place / "file").write_text("some text, long enough to be no header\n")
    (place / "empty.csv").write_text("")
    (place / "ok.csv").write_text(header)
    (place / "wrong.csv").write_text(f"{header}s,{'1' * 81},{'1' * 81},0\n")
    (place / "columns.csv").write_text("a,b\n1,2\n")
    (place / "bytes.csv").write_bytes(bytes(range(256)))
    (place / "bytes.safetensors").write_bytes(bytes(range(256)))
    (place / "dir").mkdir()
    (place / "set" / "train").mkdir(parents=True)
    (place / "set" / "test").mkdir()
    (place / "set" / "train" / "dataset.json").write_text("{}")
    (place / "emptyrun" / "checkpoints").mkdir(parents=True)
    (place / "step_00000007").mkdir()
    (place / "foreign.safetensors").write_bytes(safetensors({"a": 2}))
    (place / "cut.safetensors").write_bytes(safetensors({"lm_head.weight": 9})[:-4])
    (place / "list.pt").write_bytes(pickle.dumps([1, 2]))
    (place / "evil.pt").write_bytes(pickle.dumps(os.system, 2))
    (place / "evil_second.pt").write_bytes(pickle.dumps(1, 2) + pickle.dumps(os.system, 2))
    with pytest.MonkeyPatch.context() as patch:
        train(patch, *TINY, "max_steps=2", f"datasets_dir={datasets_dir}", f"runs_dir={place}",
              "run_name=good")  # fmt: skip
    shutil.copytree(place / "good", place / "damagedrun")
    for index in place.glob("damagedrun/checkpoints/*/index.json"):
        values = json.loads(index.read_text())
        index.write_text(json.dumps({**values, "files": []}))
    return place


def safetensors(sizes: dict[str, int]) -> bytes:
    """A file of float32 vectors of zeros."""
    header, end = {}, 0
    for name, size in sizes.items():
        header[name] = {
            "dtype": "F32",
            "shape": [size],
            "data_offsets": [end, end := end + 4 * size],
        }
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + bytes(end)


@pytest.fixture
def place(prepared, monkeypatch) -> Path:
    """It is the working directory; whatever is written there fails the test."""
    monkeypatch.chdir(prepared)
    before = listing(prepared)
    yield prepared
    new = listing(prepared).keys() - before.keys()
    for path in new:  # for the tests that follow
        shutil.rmtree(path, ignore_errors=True)
    assert not new
    assert listing(prepared) == before


def listing(place: Path) -> dict[Path, int]:
    return {p: p.stat().st_mtime_ns for p in place.rglob("*") if p.is_file() or p.is_dir()}


def split(line: str) -> list[str]:
    return line.split(" ") if not line.startswith("lr=${") else [line]


def refusal(run, line: str, capsys) -> str:
    """The sentence with which `run` ends, as a user sees it."""
    with pytest.raises(SystemExit) as ended, reported():
        run(*split(line))
    assert ended.value.code == 2
    output = capsys.readouterr()
    assert output.out == ""
    return output.err


def assert_a_sentence(text: str, message: str) -> None:
    assert text.count("\n") == 1 and text.endswith("\n"), text
    assert ": error: " in text and len(text) < 1400
    assert re.search(message, text), text
    for noise in ("Traceback", "object at 0x", "Error(", "pydantic", "omegaconf", "<class"):
        assert noise not in text


@pytest.mark.parametrize("line, message", PRETRAIN, ids=[line[:60] for line, _ in PRETRAIN])
def test_pretrain_refuses(place, capsys, line, message):
    assert_a_sentence(refusal(resolved, line, capsys), message)


@pytest.mark.parametrize("line, message", EVALUATE, ids=[line[:60] for line, _ in EVALUATE])
def test_evaluate_refuses(place, capsys, line, message):
    assert_a_sentence(refusal(resolved_evaluation, line, capsys), message)


@pytest.mark.parametrize(
    "name, value, message",
    [
        ("WORLD_SIZE", "3", r"WORLD_SIZE=3"),
        ("WORLD_SIZE", "0", r"WORLD_SIZE=0"),
        ("WORLD_SIZE", "x", r"WORLD_SIZE=x"),
        ("WORLD_SIZE", "²", r"WORLD_SIZE=²"),
        ("WORLD_SIZE", "", r"WORLD_SIZE= "),
        ("RANK", "5", r"RANK=5"),
        ("RANK", "-1", r"RANK=-1"),
        ("LOCAL_RANK", "a", r"LOCAL_RANK=a"),
    ],
)
def test_environment_variables_are_checked(place, capsys, monkeypatch, name, value, message):
    monkeypatch.setenv(name, value)
    assert_a_sentence(refusal(resolved, "experiment=smoke", capsys), message)


@pytest.mark.skipif(os.name == "nt" or os.geteuid() == 0, reason="root may write everywhere")
@pytest.mark.parametrize("key", ["runs_dir", "datasets_dir"])
def test_a_folder_without_rights_is_named(tmp_path, monkeypatch, capsys, key):
    monkeypatch.chdir(tmp_path)
    locked = tmp_path / "locked"
    locked.mkdir(mode=0o500)
    assert_a_sentence(refusal(resolved, f"experiment=smoke {key}=locked/x", capsys), r"locked")


def test_a_failed_dataset_leaves_no_run_folder(place, capsys):
    refusal(resolved, "data=sudoku data.train_csv=wrong.csv data.test_fraction=0.5", capsys)
    assert not (place / "runs").exists() and not (place / "datasets").exists()


def test_weights_that_do_not_fit_leave_no_run_folder(prepared, monkeypatch, tiny, tmp_path):
    """Their shapes show only when the model is there."""
    from training.loop import train as train_run

    weights = prepared / "good" / "checkpoints" / "step_00000002" / "model.safetensors"
    run = resolved(*tiny("arch.hidden_size=16", f"load_checkpoint={weights}"))
    assert run.run_dir.exists()
    with pytest.raises(ConfigError, match=r"has shape .* there and .* here"):
        train_run(run)
    assert not run.run_dir.exists() and not run.run_dir.parent.exists()


def test_data_errors_are_reported_like_the_others(capsys):
    with pytest.raises(SystemExit) as ended, reported():
        raise DataError("x.csv:\n  is   wrong.")
    assert ended.value.code == 2
    assert capsys.readouterr().err == f"{Path(sys.argv[0]).name}: error: x.csv: is wrong.\n"


def test_other_errors_keep_their_traceback():
    with pytest.raises(ZeroDivisionError), reported():
        1 / 0  # noqa: B018
    with pytest.raises(FileNotFoundError), reported():
        Path("there is no such file").read_text()


def test_a_full_disk_is_said_in_one_sentence(capsys):
    import errno

    with pytest.raises(SystemExit) as ended, reported():
        raise OSError(errno.ENOSPC, "No space left on device", "runs/a/summary.json")
    assert ended.value.code == 1
    assert "runs/a/summary.json: No space left on device" in capsys.readouterr().err


PROCESSES = (
    ("pretrain.py", "lrr=3", r"did you mean lr\?"),
    ("pretrain.py", "-m seed=0,1 lr=abc", r'lr="abc"'),
    ("pretrain.py", "global_batch_size=7 grad_accum=2", r"grad_accum=2"),
    ("pretrain.py", "data=sudoku data.train_csv=wrong.csv data.test_fraction=0.5", r"wrong\.csv"),
    ("pretrain.py", "load_checkpoint=good arch.hidden_size=64", r"arch\.hidden_size=64"),
    ("evaluate.py", "checkpoint=nope", r"no checkpoint at nope"),
)
SPY = """
import atexit, sys
heavy = ("torch", "wandb")
atexit.register(lambda: sys.stdout.write(" ".join(m for m in heavy if m in sys.modules)))
"""


@pytest.mark.parametrize("script, line, message", PROCESSES, ids=[p[1][:40] for p in PROCESSES])
def test_as_a_process(place, tmp_path, script, line, message):
    (tmp_path / "sitecustomize.py").write_text(SPY)
    started = time.monotonic()
    done = call(place, script, *line.split(), PYTHONPATH=str(tmp_path))
    assert time.monotonic() - started < 10  # on a busy machine; 1.5 s on an idle one
    assert done.returncode == 2
    assert done.stdout == "", "torch or wandb was imported"
    assert_a_sentence(done.stderr, message)
    assert done.stderr.startswith(f"{script}: error: ")


def test_the_spy_does_see_torch(tmp_path):
    import subprocess

    (tmp_path / "sitecustomize.py").write_text(SPY)
    seen = subprocess.run(
        [sys.executable, "-c", "import sys; sys.modules['torch'] = sys"],
        env={**os.environ, "PYTHONPATH": str(tmp_path)}, capture_output=True, text=True, cwd=ROOT,
    )  # fmt: skip
    assert seen.stdout == "torch"
