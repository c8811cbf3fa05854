"""What makes the tests of training quick: each command line is composed once, nothing is drawn."""

from __future__ import annotations

import functools
import shutil
from pathlib import Path

import pytest
import torch

import tests.training.helpers
import training.cli
import training.loop
from data import read_dataset
from models import ACT, build_model
from tests.conftest import TINY
from tests.training.helpers import EVERY_5, train


@pytest.fixture(scope="session", autouse=True)
def quick():
    """Composing takes longer than training here, and a program composes twice."""
    compose = training.cli.compose_values
    cached = functools.cache(lambda name, overrides: compose(name, list(overrides)))
    with pytest.MonkeyPatch.context() as patch:
        for module in (training.cli, tests.training.helpers):
            patch.setattr(module, "compose_values", lambda name, o: cached(name, tuple(o)))
        patch.setattr(training.loop, "plot_run", lambda run_dir: run_dir / "curves.png")
        yield


@pytest.fixture
def solver(resolve_run):
    """A small untrained model whose halting differs from row to row, and its test data."""
    run = resolve_run("arch.halt_max_steps=5")
    model = build_model(run.config.arch, run.dims, seed=1, device=torch.device("cpu"))
    torch.manual_seed(0)
    with torch.no_grad():
        model.q_head.weight.normal_(std=0.5)
        model.q_head.bias.zero_()
    return ACT(model).eval(), read_dataset(run.dataset_path, "test")


def once(runs: Path, datasets_dir: Path, run_name: str, **how) -> Path:
    with pytest.MonkeyPatch.context() as patch:
        return train(
            patch, *TINY, f"datasets_dir={datasets_dir}", f"runs_dir={runs}",
            f"run_name={run_name}", *EVERY_5, **how,
        )  # fmt: skip


@pytest.fixture(scope="session")
def stopped(tmp_path_factory, datasets_dir) -> Path:
    """A run of 12 steps that crashed in step 12, with checkpoints at 5, 6 (the best) and 10."""
    return once(tmp_path_factory.mktemp("stopped"), datasets_dir, "stopped", crash_before=12)


@pytest.fixture(scope="session")
def whole(tmp_path_factory, datasets_dir) -> Path:
    """The same run, never stopped."""
    return once(tmp_path_factory.mktemp("whole"), datasets_dir, "whole")


@pytest.fixture
def run_dir(stopped, tmp_path) -> Path:
    """A copy of it."""
    return Path(shutil.copytree(stopped, tmp_path / "runs" / "stopped"))
