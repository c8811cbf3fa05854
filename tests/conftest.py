"""What all tests share: one thread (two of them fight on a busy machine), and a tiny run."""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("WANDB_MODE", "disabled")

from pathlib import Path

import pytest

TINY = (
    "arch.hidden_size=32",
    "arch.num_heads=2",
    "arch.puzzle_emb_ndim=32",
    "arch.expansion=1.0",
    "global_batch_size=8",
    "max_steps=12",
    "lr_warmup_steps=4",
    "log_interval=4",
    "eval.max_examples=8",
    "eval.batch_size=8",
    "data.num_train=60",
    "data.num_test=12",
    "device=cpu",
)


@pytest.fixture(scope="session")
def datasets_dir(tmp_path_factory) -> Path:
    """Datasets built once for all tests."""
    return tmp_path_factory.mktemp("datasets")


@pytest.fixture
def tiny(datasets_dir, tmp_path):
    """`tiny("key=value", …)` → the overrides of a run that takes about a second."""

    def overrides(*more: str) -> list[str]:
        keys = {text.partition("=")[0] for text in more}
        base = [text for text in TINY if text.partition("=")[0] not in keys]
        return [
            *base,
            f"datasets_dir={datasets_dir}",
            f"runs_dir={tmp_path / 'runs'}",
            *more,
        ]

    return overrides


@pytest.fixture
def resolve_run(tiny):
    """`resolve_run("key=value", …)` → a ResolvedRun, as `pretrain.py` makes it."""
    from training.cli import compose_values
    from training.resolve import resolve

    def resolved(*more: str):
        overrides = tiny(*more)
        return resolve(compose_values("cfg_pretrain", overrides), overrides)

    return resolved
