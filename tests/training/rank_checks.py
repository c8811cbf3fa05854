"""What test_ranks.py and test_ranks_gpu.py both check: several ranks against one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.training.helpers import metrics, newest, tensors
from tests.training.rank_cases import together

EXACT = ("arch.forward_dtype=float64", "arch.halt_max_steps=3", "arch.halt_exploration_prob=0.5",
         "max_steps=20", "grad_clip_norm=0.5")  # fmt: skip
FIT = ("arch.forward_dtype=float64", "arch.halt_max_steps=3", "arch.halt_exploration_prob=0.5",
       "max_steps=12", "checkpoint_interval=5", "log_interval=4")  # fmt: skip
# Puzzle identifiers that repeat in a batch and across ranks: 3 on all of four.
REPEATED = [3, 3, 5, 3, 7, 3, 3, 5]
Result = dict[str, Any]


def check_equal_to_one(one: Result, many: Sequence[Result]) -> None:
    """Losses of 20 steps to 1e-9, parameters of all ranks to the bit, and of one rank to 1e-9."""
    for step, (a, b) in enumerate(zip(many[0]["losses"], one["losses"], strict=True), 1):
        assert abs(a - b) <= 1e-9 * max(1.0, abs(b)), f"step {step}: {a} and {b}"
    assert len({r["digest"] for r in many}) == 1
    assert many[0]["halted"] == one["halted"]
    assert many[0]["grad_norm"] == pytest.approx(one["grad_norm"], rel=1e-9)
    for name, tensor in one["model"].items():
        assert torch.allclose(many[0]["model"][name], tensor, rtol=1e-9, atol=1e-11), name


def shuffled(run: Any, count: int = 4) -> list[dict[str, Any]]:
    """Arguments of `steps` for a run on one rank: as it is, then with its rows permuted."""
    shuffles = [torch.Generator().manual_seed(seed) for seed in range(count)]
    orders = [torch.randperm(8, generator=shuffle).tolist() for shuffle in shuffles]
    return [{"run": run}, *({"run": run, "order": order} for order in orders)]


def check_float32(one: Sequence[Result], many: Sequence[Result]) -> None:
    """Within 3 times the spread that permuting the rows gives on one rank (`shuffled`)."""
    straight, *permuted = (r["losses"] for r in one)
    spread = max(abs(a - b) for p in permuted for a, b in zip(p, straight, strict=True))
    assert 0 < spread < 0.1
    worst = max(abs(a - b) for a, b in zip(many[0]["losses"], straight, strict=True))
    assert worst <= 3 * spread, f"{worst} beside a spread of {spread}"
    assert len({r["digest"] for r in many}) == 1


def check_round_trip(
    resolve_run: Callable[..., Any],
    place: Path,
    recipe: Sequence[str],
    most: int,
    fewer: Sequence[int],
) -> None:
    """Saved on `most` ranks, resumed on each of `fewer` in turn, at last on `most` again.

    As one sitting on one rank, to 1e-9; on `most` throughout, to the bit.
    """
    given = [text for text in recipe if text.startswith(("device=", "arch."))]
    run = resolve_run(*recipe, "run_name=whole")
    whole, folder = run.run_dir, run.run_dir.parent
    parts, same, undisturbed = (folder / name for name in ("parts", "same", "undisturbed"))
    first = [("fit", {"run": resolve_run(*recipe, "run_name=parts"), "stop_in": 4}),
             ("fit", {"run": resolve_run(*recipe, "run_name=same"), "stop_in": 6}),
             ("fit", {"run": resolve_run(*recipe, "run_name=undisturbed")})]  # fmt: skip
    with ThreadPoolExecutor(1) as beside:
        alone = beside.submit(together, 1, [("fit", {"run": run})], place / "one")
        for results in together(most, first, place / "first"):  # told one step later to the others
            assert [r["step"] for r in results] == [5, 7, 12]
        alone.result()
    go_on = (f"load_checkpoint={parts}", *given)
    step = 5
    for size in fewer:
        job = ("fit", {"run": resolve_run(*go_on), "stop_in": step + 1})
        results = together(size, [job], place / f"on-{size}")
        step += 1 if size == 1 else 2
        assert [r[0]["step"] for r in results] == [step] * size
    last = [go_on, (f"load_checkpoint={same}", *given)]
    together(most, [("fit", {"run": resolve_run(*start)}) for start in last], place / "last")
    assert tensors(newest(undisturbed)) == tensors(newest(same))
    assert metrics(undisturbed) == metrics(same)
    for theirs in (metrics(parts), metrics(undisturbed)):
        for ours, one in zip(theirs, metrics(whole), strict=True):
            assert ours == pytest.approx(one, rel=1e-9, abs=1e-12)
    for stem in ("model", "ema", "optimizer", "carry"):
        one, many = (load_file(newest(r) / f"{stem}.safetensors") for r in (whole, parts))
        assert {k for k in one if "/groups/" not in k} == {k for k in many if "/groups/" not in k}
        for name, tensor in one.items():
            if not name.startswith("sums.") and name in many:  # those are one per rank
                assert torch.allclose(many[name].double(), tensor.double(), rtol=1e-9), name
