"""pretrain.py with faults, for test_faults.py: `torchrun … faulty.py KEY=VALUE …`.

FAULTS in the environment is a list `KIND:RANK:COUNT,…`, one for each start by torchrun: in that
start, RANK does KIND at the COUNT-th call of WHERE (`step`, `gather`, `save`, `evaluate`).
KIND is WHERE (killed with SIGKILL), or `hang`, `bug`, `memory` in a step.
"""

from __future__ import annotations

import os
import runpy
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))
sys.argv[0] = str(ROOT / "pretrain.py")


def fail(kind: str) -> None:
    """What happens."""
    with Path("faults.txt").open("a") as file:
        file.write(f"{kind}\n")
    if kind == "hang":
        time.sleep(600)
    elif kind == "bug":
        raise ValueError("a bug")
    elif kind == "memory":
        raise MemoryError
    os.kill(os.getpid(), signal.SIGKILL)


def spoil(module: Any, name: str, kind: str, count: int) -> None:
    """Let the `count`-th call of a function fail."""
    work: Callable[..., Any] = getattr(module, name)
    calls = 0

    def spoiled(*arguments: Any, **settings: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == count:
            fail(kind)
        return work(*arguments, **settings)

    setattr(module, name, spoiled)


def main() -> None:
    """Spoil what this start is to fail in, then train."""
    start = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))
    faults = os.environ["FAULTS"].split(",")
    if start < len(faults):
        kind, rank, count = faults[start].split(":")
        if rank == os.environ["RANK"]:
            import safetensors.torch

            import training.evaluation
            import training.ranks
            import training.step

            places = {
                "gather": (training.ranks.Ranks, "collect"),
                "save": (safetensors.torch, "save_file"),
                "evaluate": (training.evaluation, "think"),
            }
            spoil(*places.get(kind, (training.step, "train_step")), kind, int(count))
    runpy.run_path(sys.argv[0], run_name="__main__")


if __name__ == "__main__":
    main()
