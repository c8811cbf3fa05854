"""Published weights: small parts, checksums, and the same evaluation each time."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from models import ModelError, load_pretrained, published
from tests.conftest import TINY
from tests.training.helpers import ROOT, newest, resolved, resolved_evaluation, train
from training.report import run_evaluation


@pytest.fixture(scope="module")
def trained(tmp_path_factory, datasets_dir) -> Path:
    runs = tmp_path_factory.mktemp("runs")
    with pytest.MonkeyPatch.context() as patch:
        return train(patch, *TINY, f"runs_dir={runs}", f"datasets_dir={datasets_dir}",
                     "run_name=whole", "max_steps=6", "ema_rate=0.5")  # fmt: skip


def publish(trained: Path, into: Path, name: str, *arguments: str) -> subprocess.CompletedProcess:
    script = [sys.executable, str(ROOT / "scripts/publish_weights.py"), str(trained), name]
    return subprocess.run([*script, "--into", str(into), *arguments],
                          capture_output=True, text=True, timeout=120)  # fmt: skip


@pytest.fixture(scope="module")
def folder(trained, tmp_path_factory) -> Path:
    into = tmp_path_factory.mktemp("weights")
    done = publish(trained, into, "small", "--note", "exact_accuracy=0.5")
    assert done.returncode == 0, done.stderr
    return into / "small"


def test_parts_are_small_and_make_the_whole(tmp_path, monkeypatch):
    monkeypatch.setattr(published, "PART_BYTES", 1000)
    tensors = {"a": torch.randn(30, 20), "b": torch.arange(7), "c": torch.randn(900).bfloat16()}
    published.write(tmp_path / "w", tensors, {"config": {}, "dims": {}, "step": 3})
    sizes = [p.stat().st_size for p in (tmp_path / "w").glob("weights.*")]
    assert len(sizes) > 3 and max(sizes) == 1000
    back = published.read(tmp_path / "w")
    assert back.keys() == tensors.keys()
    assert all(torch.equal(back[k], v) and back[k].dtype == v.dtype for k, v in tensors.items())


def test_no_part_is_larger_than_two_mebibytes():
    assert published.PART_BYTES <= 2 * 2**20


def test_weights_are_the_averages_in_bfloat16(trained, folder):
    theirs = load_pretrained(newest(trained), device="cpu").model.state_dict()
    ours = published.read(folder)
    assert theirs.keys() == ours.keys()
    for name, value in theirs.items():
        buffer = "_init" in name or "puzzles" in name
        assert torch.equal(ours[name], value if buffer else value.bfloat16()), name
    assert {t.dtype for n, t in ours.items() if "blocks" in n} == {torch.bfloat16}


def test_it_evaluates_to_the_same_each_time(trained, folder, tmp_path, datasets_dir):
    reports = []
    for turn in ("one", "two"):
        job = resolved_evaluation(f"checkpoint={folder}", f"datasets_dir={datasets_dir}",
                                  f"output_dir={tmp_path / turn}")  # fmt: skip
        reports.append(run_evaluation(job))
    assert reports[0]["sets"] == reports[1]["sets"] and reports[0]["step"] == 6
    plain = run_evaluation(
        resolved_evaluation(f"checkpoint={trained}", f"datasets_dir={datasets_dir}",
                            f"output_dir={tmp_path}")
    )  # fmt: skip
    assert reports[0]["sets"]["all"]["count"] == plain["sets"]["all"]["count"]
    assert abs(reports[0]["sets"]["all"]["lm_loss"] - plain["sets"]["all"]["lm_loss"]) < 0.05


def test_a_new_run_starts_from_them(folder, tmp_path, datasets_dir):
    from training.loop import Trainer

    run = resolved(*TINY, f"load_checkpoint={folder}", f"runs_dir={tmp_path}",
                   f"datasets_dir={datasets_dir}")  # fmt: skip
    state = Trainer(run).state
    ours = published.read(folder)
    for name, value in state.model.state_dict().items():
        assert torch.equal(value, ours[name].to(value.dtype))


def test_the_index_tells_what_it_is_and_nothing_of_the_machine(trained, folder):
    text = (folder / "index.json").read_text()
    index = json.loads(text)
    assert index["notes"] == {"exact_accuracy": "0.5"} and index["step"] == 6
    assert index["config"]["arch"]["name"] and index["seconds"] > 0
    assert str(trained.parent) not in text and "runs_dir" not in text
    solver = load_pretrained(folder, device="cpu")
    assert solver.model.dims.seq_len == index["dims"]["seq_len"]


def test_damage_and_bad_calls_are_said(trained, folder, tmp_path):
    assert "exists already" in publish(trained, folder.parent, "small").stderr
    assert "plain name" in publish(trained, tmp_path, "a/b").stderr
    copy = tmp_path / "copy"
    copy.mkdir()
    for path in folder.iterdir():
        (copy / path.name).write_bytes(path.read_bytes())
    part = copy / "weights.000"
    part.write_bytes(part.read_bytes()[:-1] + b"\x01")
    with pytest.raises(ModelError, match=r"weights\.000 is damaged"):
        published.read(copy)
    part.unlink()
    with pytest.raises(ModelError, match=r"weights\.000 cannot be read"):
        load_pretrained(copy)
