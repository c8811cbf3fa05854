"""ShardedOptimizer by itself, on gloo ranks: as the whole optimizer, with a share of its state."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).with_name("sharded_cases.py")


@pytest.mark.parametrize("ranks", [2, 4])
def test_equal_to_the_whole_with_a_share_of_the_state(ranks):
    call = [sys.executable, "-m", "torch.distributed.run", "--standalone",
            f"--nproc-per-node={ranks}", str(SCRIPT)]  # fmt: skip
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(call, capture_output=True, text=True, timeout=300, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("of the state") == 4 * ranks
