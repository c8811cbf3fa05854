"""What happens to one rank, and how all of them end: under torchrun, gloo on the CPU."""

from __future__ import annotations

import random
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import TINY
from tests.training.helpers import ROOT, environment, metrics, newest, tensors
from training import checkpoint

FAULTY = Path(__file__).with_name("faulty.py")
RECIPE = (
    *(text for text in TINY if not text.startswith("max_steps")), "max_steps=40",
    "checkpoint_interval=7", "eval_interval=20", "arch.halt_exploration_prob=0.5", "ema_rate=0.9",
    "keep_checkpoints=3",
)  # fmt: skip
KILLS = ("step", "gather", "save", "evaluate")


def torchrun(
    place: Path, ranks: int, *arguments: str, faults: str = "", restarts: int = 0
) -> subprocess.CompletedProcess:
    """A run under torchrun in `place`."""
    script = FAULTY if faults else ROOT / "pretrain.py"
    call = [
        sys.executable, "-m", "torch.distributed.run", "--standalone",
        f"--nproc-per-node={ranks}", f"--max-restarts={restarts}", str(script), *arguments,
    ]  # fmt: skip
    return subprocess.run(
        call, cwd=place, env=environment(FAULTS=faults), capture_output=True, text=True,
        timeout=900, stdin=subprocess.DEVNULL,
    )  # fmt: skip


def said(errors: str) -> list[str]:
    """What the program says itself, without torchrun's own report."""
    return re.findall(r"pretrain\.py: error.*", errors)


@pytest.mark.slow
@pytest.mark.parametrize(
    "settings", ["optim.sharded=false", "optim.sharded=true", "optim=muon optim.sharded=true"]
)
def test_ten_kills_of_one_of_four_ranks(tmp_path, settings):
    """In steps, while gathering, saving and evaluating: the end is that of an undisturbed run."""
    recipe = (*RECIPE, *settings.split())
    whole = torchrun(tmp_path, 4, *recipe, "run_name=whole")
    assert whole.returncode == 0, whole.stderr[-3000:]
    moments = random.Random(7)
    kinds = [*KILLS, *KILLS, "step", "step"]
    moments.shuffle(kinds)
    plan = []
    for kind in kinds:
        rank = 0 if kind == "save" else moments.randrange(4)  # only the first one writes
        count = 1 if kind == "evaluate" else moments.randrange(1, 9)
        plan.append(f"{kind}:{rank}:{count}")
    done = torchrun(tmp_path, 4, *recipe, "run_name=killed", faults=",".join(plan), restarts=10)
    assert done.returncode == 0, done.stderr[-3000:]
    assert (tmp_path / "faults.txt").read_text().split() == kinds
    runs = [tmp_path / "runs" / name for name in ("whole", "killed")]
    assert tensors(newest(runs[0])) == tensors(newest(runs[1]))
    assert metrics(runs[0]) == metrics(runs[1])
    assert not list((runs[1] / "checkpoints").glob(".*"))


@pytest.mark.slow
@pytest.mark.parametrize(
    "kind, message",
    [
        ("memory", "rank 1: the memory is full"),
        ("hang", "waited longer than comm_timeout=20 seconds"),
        ("step", "lost the connection to another"),
    ],
)
def test_one_message_and_a_whole_checkpoint(tmp_path, kind, message):
    done = torchrun(
        tmp_path, 2, *RECIPE, "run_name=run", "comm_timeout=20", faults=f"{kind}:1:10"
    )  # fmt: skip
    assert done.returncode != 0
    lines = said(done.stderr)
    assert len(lines) <= 1  # torchrun may end the others before they speak
    assert (lines and message in lines[0]) or kind == "step", done.stderr[-3000:]
    path, index = checkpoint.newest(tmp_path / "runs" / "run")
    assert index["step"] == 7 and path.is_dir()


@pytest.mark.slow
def test_a_wrong_configuration_is_said_once(tmp_path):
    done = torchrun(tmp_path, 2, *RECIPE, "global_batch_size=7")
    assert done.returncode != 0
    (line,) = said(done.stderr)
    assert "global_batch_size=7 is not divisible by the 2 ranks" in line
    assert not (tmp_path / "runs").exists()
