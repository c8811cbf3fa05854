"""resume=auto: the same command line starts a run and goes on with it, as a requeue needs."""

from __future__ import annotations

import shutil

import pytest

from tests.training.helpers import metrics, newest, resolved, tensors, train
from training.errors import ConfigError
from training.resume import Resume, WarmStart
from training.run_folder import lock


def test_the_same_command_starts_and_goes_on(tiny, monkeypatch):
    line = tiny("run_name=run", "resume=auto", "checkpoint_interval=5")
    whole = train(monkeypatch, *tiny("run_name=whole", "checkpoint_interval=5"))
    run_dir = train(monkeypatch, *line, crash_before=8)
    assert resolved(*line).resume.path == newest(run_dir).resolve()
    assert train(monkeypatch, *line) == run_dir
    assert tensors(newest(whole)) == tensors(newest(run_dir))
    assert metrics(whole) == metrics(run_dir)


def test_settings_on_the_line_count_as_in_a_resume(tiny, monkeypatch):
    train(monkeypatch, *tiny("run_name=run", "resume=auto", "max_steps=3"))
    run = resolved(*tiny("run_name=run", "resume=auto", "max_steps=5"))
    assert run.total_steps == 5 and run.resume.changes == ("max_steps: 3 → 5",)
    with pytest.raises(ConfigError, match="seed=4 cannot continue"):
        resolved(*tiny("run_name=run", "resume=auto", "seed=4"))


def test_a_folder_without_a_checkpoint_is_begun_again(tiny, monkeypatch):
    line = tiny("run_name=run", "resume=auto", "max_steps=2")
    run_dir = train(monkeypatch, *line)
    shutil.rmtree(run_dir / "checkpoints")
    (run_dir / "checkpoints").mkdir()
    run = resolved(*line)
    assert run.resume is None and run.run_dir == run_dir
    with pytest.raises(ConfigError, match="exists already"):
        resolved(*tiny("run_name=run"))


def test_what_is_given_serves_until_there_is_a_checkpoint(tiny, monkeypatch):
    first = train(monkeypatch, *tiny("run_name=first", "max_steps=2"))
    weights = f"load_checkpoint={newest(first) / 'model.safetensors'}"
    line = tiny("run_name=run", "resume=auto", "max_steps=2", weights)
    assert isinstance(resolved(*line).resume, WarmStart)
    run_dir = train(monkeypatch, *line)
    found = resolved(*line).resume
    assert isinstance(found, Resume) and found.run_dir == run_dir.resolve()


def test_it_needs_a_name(tiny):
    with pytest.raises(ConfigError, match="resume=auto needs run_name"):
        resolved(*tiny("resume=auto"))


def test_a_restart_by_torchrun_goes_on_with_its_own_run_only(tiny, monkeypatch):
    """Also without resume=auto and without a name; never with another torchrun's run."""
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "one")
    run = resolved(*tiny("max_steps=3"))
    with lock(run.run_dir):
        pass
    train(monkeypatch, *tiny("run_name=other", "max_steps=3"))
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    assert resolved(*tiny("max_steps=3")).run_dir != run.run_dir  # no checkpoint: begun anew
    folder = run.run_dir / "checkpoints"
    shutil.copytree(newest(run.run_dir.with_name("other")), folder / "step_00000003")
    again = resolved(*tiny("max_steps=3"))
    assert again.resume is not None and again.run_dir == run.run_dir
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "two")
    assert resolved(*tiny("max_steps=3")).resume is None
    with pytest.raises(ConfigError, match="exists already"):
        resolved(*tiny("run_name=other", "max_steps=3"))
