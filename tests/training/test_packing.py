"""A run that goes on from a packed state: what is exact, what is rounded, what begins anew."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from optim import OPTIMIZERS
from tests.conftest import TINY
from tests.training.helpers import ROOT, newest, resolved, resolved_evaluation, train
from training import checkpoint, packing
from training.errors import ConfigError
from training.loop import Trainer


@pytest.fixture(scope="module", params=sorted(OPTIMIZERS))
def stopped(request, tmp_path_factory, datasets_dir) -> Path:
    runs = tmp_path_factory.mktemp("runs")
    with pytest.MonkeyPatch.context() as patch:
        return train(patch, *TINY, f"optim={request.param}", f"runs_dir={runs}",
                     f"datasets_dir={datasets_dir}", "run_name=whole", "max_steps=12",
                     "checkpoint_interval=5", crash_before=7)  # fmt: skip


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a.double() - b.double()).norm() / b.double().norm().clamp(min=1e-30))


@pytest.mark.parametrize(("rounded", "bound"), [("bf16", 2.0**-8), ("fp8", 0.07)])
def test_parameters_are_exact_and_the_rest_is_rounded(stopped, tmp_path, rounded, bound):
    folder, file = newest(stopped), tmp_path / "state.safetensors"
    packing.pack(folder, file, rounded)
    before = {stem: checkpoint.read_tensors(folder, stem) for stem in packing.STEMS}
    after = {stem: packing.read_tensors(file, stem) for stem in packing.STEMS}
    assert packing.is_packed(file) and not packing.is_packed(folder / "model.safetensors")
    for stem in packing.STEMS:
        assert before[stem].keys() == after[stem].keys()
    for name, value in before["model"].items():
        assert torch.equal(after["model"][name], value)
    rounded_ones = 0
    for name, value in before["optimizer"].items():
        assert relative(after["optimizer"][name], value) <= bound, name
        rounded_ones += not torch.equal(after["optimizer"][name].to(value.dtype), value)
    assert rounded_ones
    for name, value in before["ema"].items():
        moved = (value - before["model"][name]).norm()  # what is rounded is the difference
        assert (after["ema"][name] - value).norm() <= bound * moved + 1e-7 * value.norm()


def test_a_run_goes_on_from_it(stopped, tmp_path, datasets_dir, caplog):
    caplog.set_level("INFO")
    file = tmp_path / "state.safetensors"
    packing.pack(newest(stopped), file)
    seconds = checkpoint.read_index(newest(stopped))["seconds"]
    run = resolved(f"load_checkpoint={file}", f"runs_dir={tmp_path}", "run_name=later",
                   f"datasets_dir={datasets_dir}")  # fmt: skip
    assert run.run_dir == tmp_path / "later" and run.total_steps == 12
    trainer = Trainer(run)
    assert "rounded to bf16, the carry is new" in caplog.text
    state = trainer.state
    assert state.step == 5 and int(state.step_counter) == 5
    assert trainer.seconds == seconds > 0  # the clock is additive
    assert state.carry.halted.all() and not state.carry.steps.any()
    summary = trainer.fit()
    assert summary["finished"] and summary["train_seconds"] > seconds
    again = checkpoint.read_index(newest(run.run_dir))
    assert again["step"] == 12 and again["config"]["optim"] == run.config.optim.model_dump(
        mode="json"
    )


def test_what_is_wrong_is_said(stopped, tmp_path, datasets_dir):
    file = tmp_path / "state.safetensors"
    packing.pack(newest(stopped), file)
    with pytest.raises(ConfigError, match="is a packed state, to go on with"):
        resolved_evaluation(f"checkpoint={file}", f"datasets_dir={datasets_dir}")
    tensors = load_file(file)
    next(t for t in tensors.values() if t.numel() > 100).view(-1)[7] += 1
    from safetensors import safe_open

    with safe_open(file, "pt") as opened:
        save_file(tensors, file, metadata=opened.metadata())
    with pytest.raises(ConfigError, match="damaged"):
        resolved(f"load_checkpoint={file}", f"runs_dir={tmp_path}")


def test_the_script_keeps_the_limit(stopped, tmp_path):
    def call(*arguments: str) -> subprocess.CompletedProcess:
        script = [sys.executable, str(ROOT / "scripts/pack_state.py"), str(stopped)]
        return subprocess.run([*script, *arguments], capture_output=True, text=True, timeout=120)

    file = tmp_path / "state.safetensors"
    done = call(str(file))
    assert done.returncode == 0 and "step 5" in done.stdout, done.stderr
    file.unlink()
    refused = call(str(file), "--limit-mib", "0.01")
    assert refused.returncode != 0 and "use --rounded fp8" in refused.stderr
    assert not file.exists() and "Traceback" not in refused.stderr
