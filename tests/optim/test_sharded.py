"""ShardedOptimizer by itself: as the whole optimizer, with a share of its state."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

SCRIPT = Path(__file__).with_name("sharded_cases.py")


CASES = [
    ("cpu", 2),
    pytest.param("cpu", 4, marks=pytest.mark.slow),
    pytest.param(
        "cuda", 2, marks=[
            pytest.mark.gpu,
            pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices"),
        ],
    ),
]  # fmt: skip


@pytest.mark.parametrize("device, ranks", CASES)
def test_equal_to_the_whole_with_a_share_of_the_state(device, ranks):
    call = [sys.executable, "-m", "torch.distributed.run", "--standalone",
            f"--nproc-per-node={ranks}", str(SCRIPT), device]  # fmt: skip
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(call, capture_output=True, text=True, timeout=300, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("of the state") == 5 * ranks
