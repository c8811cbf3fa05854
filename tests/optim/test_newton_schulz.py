"""The kernels of Newton–Schulz and Muon without a GPU, and the table that chooses among them."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from optim.kernels.ns_table import hopper_path, path_for

ROOT = Path(__file__).parents[2]


FEW = "zero or (any_shape and polar) or (every_path and 4) or options0"


@pytest.mark.parametrize("some", [FEW, pytest.param(f"not ({FEW})", marks=pytest.mark.slow)])
def test_cases_in_the_interpreter(some):
    """In a process of its own: Triton decides at import whether to interpret."""
    pytest.importorskip("triton")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
    done = subprocess.run(
        [*command, "-k", some, "tests/optim/ns_cases.py"],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    assert "passed" in done.stdout


@pytest.mark.parametrize("batch", [1, 3, 24, 200])
@pytest.mark.parametrize("rows", [1, 64, 100, 192, 512, 513, 1000, 1024, 3000, 4096, 8192])
@pytest.mark.parametrize("ratio", [1, 1.5, 4, 20])
def test_blocks_fit_every_shape(batch, rows, ratio):
    columns = int(rows * ratio)
    path = hopper_path(batch, rows, columns)
    size, length = path.padded(rows, columns)
    assert size >= rows and length >= columns and length % 64 == 0 and size % path.side == 0
    for block in (path.outer, path.inner, path.pair):
        assert size % block.bm == 0 and block.bn in (block.bm, 2 * block.bm)
    assert path.update is None or size % path.update.bm == 0
    assert path.gram == (length >= 2 * size)
    assert path == hopper_path(batch, rows, columns)


def test_the_cpu_has_the_interpreter_alone():
    path = path_for(torch.device("cpu"), 1, 40, 72)
    assert not path.tma and not path.gram and path.padded(40, 72) == (64, 128)
