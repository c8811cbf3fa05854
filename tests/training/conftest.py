"""What makes the tests of training quick: each command line is composed once, nothing is drawn."""

from __future__ import annotations

import functools

import pytest

import tests.training.helpers
import training.cli
import training.loop


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
