"""Checkpoints on disk: whole or not there, checked, pruned; a full disk stops no run."""

from __future__ import annotations

import errno
import json
import resource
import signal
from pathlib import Path

import pytest
import safetensors.torch
import torch
from safetensors.torch import load_file, save_file

from scripts.compare_checkpoints import differences
from tests.training.helpers import newest, resolved, tensors, train
from training import checkpoint
from training.errors import ConfigError, TrainingFailed
from training.resume import find_checkpoint

DIMS = {"seq_len": 16, "vocab_size": 6, "num_puzzle_ids": 1}
INDEX = {
    "config": {},
    "dims": DIMS,
    "dataset": {**DIMS, "fingerprint": "f"},
    "run_id": "x",
    "seconds": 0.0,
}


def write(run_dir: Path, step: int, value: float = 0.0) -> Path:
    files = {"model": {"w": torch.full((64,), value)}, "ema": {"w": torch.full((64,), value)}}
    return checkpoint.write(run_dir, step, {**files, "optimizer": {}, "carry": {}}, INDEX)


def names(run_dir: Path) -> list[str]:
    return sorted(p.name for p in (run_dir / "checkpoints").iterdir())


def test_what_is_written_is_read(tmp_path):
    path = write(tmp_path, 3, 1.5)
    index = checkpoint.read_index(path)
    assert path.name == "step_00000003" and index["step"] == 3 and index["format"] == 1
    stems = "model", "ema", "optimizer", "carry"
    assert set(index["files"]) == {f"{stem}.safetensors" for stem in stems}
    assert torch.equal(checkpoint.read_tensors(path, "ema")["w"], torch.full((64,), 1.5))
    assert checkpoint.read_tensors(path, "optimizer") == {}
    assert names(tmp_path) == ["step_00000003"]


def test_the_same_step_again_replaces(tmp_path):
    write(tmp_path, 3, 1.0)
    path = write(tmp_path, 3, 2.0)
    assert checkpoint.read_tensors(path, "model")["w"][0] == 2.0
    assert names(tmp_path) == ["step_00000003"]


def fail_in_save(monkeypatch) -> None:
    def full(tensors, path):
        Path(path).write_bytes(b"half")
        raise safetensors.SafetensorError("Error while serializing: No space left on device")

    monkeypatch.setattr(safetensors.torch, "save_file", full)


def fail_in_sync(monkeypatch) -> None:
    def full(path):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(checkpoint, "sync", full)


def fail_in_rename(monkeypatch) -> None:
    def full(self, target):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(Path, "rename", full)


@pytest.mark.parametrize("fail", [fail_in_save, fail_in_sync, fail_in_rename])
def test_a_failed_write_leaves_the_earlier_ones_and_no_remains(tmp_path, monkeypatch, fail):
    before = tensors_of(write(tmp_path, 3, 1.0))
    with monkeypatch.context() as patch:
        fail(patch)
        with pytest.raises(OSError):
            write(tmp_path, 6, 2.0)
    assert names(tmp_path) == ["step_00000003"]
    path, _ = checkpoint.newest(tmp_path)
    assert tensors_of(path) == before


def tensors_of(path: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in path.iterdir()}


@pytest.mark.parametrize("fail", [fail_in_save, fail_in_sync, fail_in_rename])
def test_a_run_goes_on_where_the_disk_refuses(tiny, monkeypatch, caplog, fail):
    """The 2nd checkpoint cannot be written; the run ends as if nothing had happened."""
    whole = train(monkeypatch, *tiny("run_name=whole", "checkpoint_interval=5"))
    real, calls = checkpoint.write, []

    def write_with_one_failure(run_dir, step, files, index):
        calls.append(step)
        if step != 5:
            return real(run_dir, step, files, index)
        with monkeypatch.context() as patch:
            fail(patch)
            return real(run_dir, step, files, index)

    monkeypatch.setattr(checkpoint, "write", write_with_one_failure)
    part = train(monkeypatch, *tiny("run_name=part", "checkpoint_interval=5"))
    assert calls == [0, 5, 10, 12]
    assert "checkpoint at step 5 could not be saved" in caplog.text
    assert "the earlier ones are whole, training goes on" in caplog.text
    assert not list((part / "checkpoints").glob(".*"))
    assert tensors(newest(whole)) == tensors(newest(part))


@pytest.mark.parametrize("stop", [(), ("stop_at=8",)], ids=["end", "sitting"])
def test_an_end_that_cannot_be_saved_is_no_end(tiny, tmp_path, monkeypatch, stop):
    """The run says so, counts as unfinished, and goes on from its last whole checkpoint."""
    whole = train(monkeypatch, *tiny("run_name=whole", "checkpoint_interval=5"))
    real = checkpoint.write

    def write_until_full(run_dir, step, files, index):
        if step > 5:
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(run_dir, step, files, index)

    part = tmp_path / "runs" / "part"
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "write", write_until_full)
        with pytest.raises(
            TrainingFailed, match=r"step \d+ could not be saved .* load_checkpoint="
        ):
            train(monkeypatch, *tiny("run_name=part", "checkpoint_interval=5", *stop))
    assert json.loads((part / "summary.json").read_text())["finished"] is False
    train(monkeypatch, f"load_checkpoint={part}")
    assert tensors(newest(whole)) == tensors(newest(part))
    assert json.loads((part / "summary.json").read_text())["finished"] is True


def test_a_limit_of_file_size_like_a_full_disk(tmp_path):
    """No simulation: the system itself cuts the write short."""
    before = tensors_of(write(tmp_path, 3))
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (200, limits[1]))
    try:
        with pytest.raises(OSError):
            write(tmp_path, 6)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert names(tmp_path) == ["step_00000003"]
    assert tensors_of(checkpoint.newest(tmp_path)[0]) == before


def test_pruning_keeps_the_newest_and_the_best(tmp_path):
    for step in (0, 5, 10, 15, 20):
        write(tmp_path, step)
    checkpoint.mark_best(tmp_path, 5, 0.75)
    checkpoint.prune(tmp_path, 2)
    assert checkpoint.list_steps(tmp_path) == [5, 15, 20]
    assert checkpoint.best(tmp_path) == {"step": 5, "exact_accuracy": 0.75}
    assert not list((tmp_path / "checkpoints").glob(".*"))
    checkpoint.mark_best(tmp_path, 20, 0.8)
    checkpoint.prune(tmp_path, 1)
    assert checkpoint.list_steps(tmp_path) == [20]


def test_a_run_keeps_the_newest_k_and_the_best(tiny, monkeypatch):
    run_dir = train(
        monkeypatch, *tiny("checkpoint_interval=2", "eval_interval=4", "keep_checkpoints=3")
    )
    best = checkpoint.best(run_dir)
    assert checkpoint.list_steps(run_dir) == sorted({best["step"], 8, 10, 12})
    assert best["step"] in (4, 8, 12)
    evaluations = {
        line["step"]: line["all/exact_accuracy"]
        for line in map(json.loads, (run_dir / "metrics.jsonl").read_text().splitlines())
        if "all/exact_accuracy" in line
    }
    assert evaluations[best["step"]] == best["exact_accuracy"] == max(evaluations.values())


def test_remains_of_a_kill_are_swept_when_the_run_goes_on(tiny, monkeypatch):
    run_dir = train(monkeypatch, *tiny("checkpoint_interval=5"), crash_before=8)
    parent = run_dir / "checkpoints"
    for name in (
        ".writing-step_00000010-99",
        ".removing-step_00000000",
        ".replaced-step_00000005-9",
    ):
        (parent / name).mkdir()
        (parent / name / "model.safetensors").write_bytes(b"half")
    assert checkpoint.list_steps(run_dir) == [0, 5]
    train(monkeypatch, f"load_checkpoint={run_dir}")
    assert not list(parent.glob(".*"))


def test_nothing_is_pickled(tiny, monkeypatch):
    run_dir = train(monkeypatch, *tiny("max_steps=2"))
    files = {p.suffix for p in newest(run_dir).iterdir()}
    assert files == {".safetensors", ".json"}
    for path in run_dir.rglob("*"):
        assert not path.is_file() or path.read_bytes()[:1] != b"\x80", path


@pytest.mark.parametrize("missing", ["config", "dims", "dataset", "run_id", "seconds", "files"])
def test_an_index_that_lacks_something_is_damaged(tmp_path, missing):
    path = write(tmp_path, 3)
    index = json.loads((path / "index.json").read_text())
    del index["checksum"], index[missing]
    text = json.dumps({**index, "checksum": checkpoint._index_checksum(index)})
    (path / "index.json").write_text(text)
    with pytest.raises(checkpoint.DamagedCheckpoint, match=missing):
        checkpoint.read_index(path)


@pytest.mark.parametrize("text", ["", "[]", "null", "3", '"x"', "{", '{"checksum": 3}', "\x00"])
def test_an_index_that_is_no_index(tmp_path, text):
    path = write(tmp_path, 3)
    (path / "index.json").write_text(text)
    with pytest.raises(checkpoint.DamagedCheckpoint, match=r"index\.json"):
        checkpoint.read_index(path)


def test_the_comparison_sees_one_bit_and_one_counter(tiny, monkeypatch, tmp_path):
    a = train(monkeypatch, *tiny("run_name=a", "max_steps=3"))
    b = train(monkeypatch, *tiny("run_name=b", "max_steps=3"))
    found = [find_checkpoint(str(newest(run)), tmp_path) for run in (a, b)]
    assert differences(*found) == []
    file = found[1].path / "carry.safetensors"
    loaded = load_file(file)
    loaded["state.z_L"].view(-1).view(torch.uint8)[5] ^= 1
    save_file(loaded, file)
    assert len(differences(*found)) == 1
    assert differences(*found)[0].startswith("carry: state.z_L differs")
    with pytest.raises(ConfigError, match=r"carry\.safetensors is damaged"):
        find_checkpoint(str(found[1].path), tmp_path)
    found[1].index["step"] += 1
    assert differences(*found)[0] == "step: 3 and 4"


def test_a_run_is_a_function_of_its_seed(tiny, monkeypatch):
    runs = [
        train(monkeypatch, *tiny(f"run_name=r{n}", "max_steps=3", f"seed={seed}"))
        for n, seed in enumerate((0, 0, 1))
    ]
    states = [tensors(newest(run)) for run in runs]
    assert states[0] == states[1] and states[0] != states[2]


def test_a_nan_stops_the_run_with_the_last_good_checkpoint_named(tiny, monkeypatch):
    from training.errors import TrainingFailed
    from training.loop import Trainer

    run = resolved(*tiny("checkpoint_interval=5"))
    trainer = Trainer(run)
    hook = trainer.state.model.register_forward_hook(
        lambda m, i, out: (
            out._replace(logits=out.logits * float("nan")) if trainer.state.step >= 7 else out
        )
    )
    with pytest.raises(TrainingFailed, match=r"last good checkpoint is .*step_00000005"):
        trainer.fit()
    hook.remove()
    assert checkpoint.list_steps(run.run_dir) == [0, 5]


def test_a_nan_before_any_checkpoint_is_said_too(tiny, monkeypatch):
    from training.errors import TrainingFailed
    from training.loop import Trainer

    part = train(monkeypatch, *tiny("checkpoint_interval=5", "run_name=part"), crash_before=8)
    run = resolved(f"load_checkpoint={part}", "run_name=fork", "log_interval=1")
    trainer = Trainer(run)
    trainer.state.model.register_forward_hook(
        lambda m, i, out: out._replace(logits=out.logits * float("nan"))
    )
    with pytest.raises(TrainingFailed, match=r"last good checkpoint is none"):
        trainer.fit()
