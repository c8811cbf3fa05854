"""Training in float16: the scale adapts, clipping sees unscaled gradients, resume is exact."""

from __future__ import annotations

import pytest
import torch

from tests.training.helpers import metrics, newest, tensors, train
from training.loss_scale import LossScale
from training.state import TrainState
from training.step import train_step

HALF = ("arch.forward_dtype=float16", "arch.H_cycles=2", "arch.L_cycles=2", "ema_rate=0.9")


def build(run) -> TrainState:
    from data import read_dataset

    return TrainState(run, read_dataset(run.dataset_path, "train"), torch.device("cpu"))


def snapshot(state) -> dict[str, torch.Tensor]:
    return {k: v.clone() for k, v in state.model.state_dict().items()}


def test_the_scale_is_halved_and_doubled():
    scale = LossScale(torch.device("cpu"))
    yes, no = torch.tensor(True), torch.tensor(False)
    assert not scale.update(yes) and scale.scale == 2**15
    for _ in range(999):
        scale.update(no)
    assert scale.scale == 2**15
    scale.update(no)
    assert scale.scale == 2**16 and scale.good_steps == 0
    for _ in range(16):
        assert not scale.update(yes)
    assert scale.scale == 1 and scale.update(yes) and scale.scale == 1


@pytest.mark.parametrize("clip", [0.0, 0.05])
def test_scaled_gradients_are_unscaled_before_clipping(resolve_run, clip):
    """A step with the scale is the step without it: the weights move alike."""
    run = resolve_run("arch.H_cycles=1", "arch.L_cycles=1", f"grad_clip_norm={clip}",
                      "optim=adamw", "optim.eps=1.0", "lr_warmup_steps=0", "lr=0.1")  # fmt: skip
    plain, scaled = build(run), build(run)
    scaled.loss_scale = LossScale(torch.device("cpu"))
    for state in (plain, scaled):
        for _ in range(3):
            train_step(state, run.config, run.total_steps)
    assert torch.allclose(plain.sums["grad_norm"], scaled.sums["grad_norm"], rtol=1e-5)
    for name, expected in snapshot(plain).items():
        assert torch.allclose(scaled.model.state_dict()[name], expected, atol=1e-6), name


def test_an_overflow_lowers_the_scale_and_changes_nothing_else(resolve_run):
    run = resolve_run(*HALF)
    state = build(run)
    state.loss_scale.scale.fill_(2.0**24)  # times gradients of about 1: far beyond float16
    state.model.lm_head.weight.data.mul_(50)
    before = snapshot(state)
    train_step(state, run.config, run.total_steps)
    assert state.loss_scale.scale == 2**23 and state.nonfinite == 0
    assert all(torch.equal(v, before[k]) for k, v in snapshot(state).items())
    for _ in range(23):
        train_step(state, run.config, run.total_steps)
    assert state.nonfinite == 0
    assert any(not torch.equal(v, before[k]) for k, v in snapshot(state).items())


def test_what_no_scale_can_help_is_counted(resolve_run):
    run = resolve_run(*HALF, "on_nonfinite=skip")
    state = build(run)
    state.model.lm_head.weight.data.fill_(float("nan"))
    for _ in range(18):
        train_step(state, run.config, run.total_steps)
    assert state.loss_scale.scale == 1 and state.nonfinite == 2


def test_float16_learns_and_resumes_exactly(tiny, monkeypatch):
    common = (*HALF, "checkpoint_interval=5", "max_steps=40", "lr=3e-3")
    whole = train(monkeypatch, *tiny(*common, "run_name=whole"))
    stopped = train(monkeypatch, *tiny(*common, "run_name=stopped"), crash_before=27)
    train(monkeypatch, f"load_checkpoint={stopped}")
    assert tensors(newest(whole)) == tensors(newest(stopped))
    losses = [line["train/lm_loss"] for line in metrics(whole) if "train/lm_loss" in line]
    assert losses[-1] < losses[0]
