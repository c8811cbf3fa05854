"""Every architecture preset trains, evaluates, checkpoints and resumes exactly, on the CPU."""

from __future__ import annotations

import json
import runpy

import pytest
from safetensors.torch import load_file

from models import ARCHITECTURES
from tests.training.helpers import ROOT, metrics, newest, resolved_evaluation, tensors, train
from training.cli import choices
from training.report import run_evaluation

SMALL = ("experiment=plain", "data=sudoku4", "checkpoint_interval=3", "max_steps=8",
         "arch.halt_max_steps=3", "arch.halt_exploration_prob=0.5", "ema_rate=0.9")  # fmt: skip
LAYERS = {"hrm": ("H_layers", "L_layers"), "transformer": ("H_layers",), "urm": ("num_layers",)}


def small(arch: str) -> tuple[str, ...]:
    """Overrides that make an architecture of any preset small: two blocks, few cycles."""
    layers = [f"arch.{name}=2" for name in LAYERS.get(arch, ("L_layers",))]
    cycles = [] if arch == "transformer" else ["arch.H_cycles=2", "arch.L_cycles=2"]
    return (*SMALL, f"arch={arch}", *layers, *cycles)


@pytest.mark.parametrize("grad_checkpoint", ["none", "cycle", "all"])
@pytest.mark.parametrize("arch", choices("arch"))
def test_trains_evaluates_and_resumes_exactly(
    arch, grad_checkpoint, tiny, monkeypatch, tmp_path, datasets_dir
):
    given = (*small(arch), f"arch.grad_checkpoint={grad_checkpoint}")
    if grad_checkpoint == "all" and arch != "transformer":
        given += ("arch.H_grad_cycles=2",)
    whole = train(monkeypatch, *tiny(*given, "run_name=whole"))
    stopped = train(monkeypatch, *tiny(*given, "run_name=stopped"), crash_before=6)
    before = load_file(newest(stopped) / "model.safetensors")
    train(monkeypatch, f"load_checkpoint={stopped}")
    assert tensors(newest(whole)) == tensors(newest(stopped))
    assert metrics(whole)[-1] == metrics(stopped)[-1]
    after = load_file(newest(whole) / "model.safetensors")
    moved = {k for k in after if "init" not in k and (after[k] != before[k]).any()}
    assert moved == {k for k in after if "init" not in k}
    where = (f"checkpoint={whole}", f"datasets_dir={datasets_dir}", f"output_dir={tmp_path}")
    report = run_evaluation(resolved_evaluation(*where, "device=cpu", "eval.max_examples=8"))
    trained = json.loads((whole / "summary.json").read_text())["sets"]
    assert report["sets"] == trained


@pytest.mark.parametrize("arch", choices("arch"))
def test_q_continue_can_be_learned(arch, tiny, monkeypatch):
    run = train(monkeypatch, *tiny(*small(arch), "arch.no_act_continue=false"))
    logged = [line for line in metrics(run) if "train/q_continue_loss" in line]
    assert logged and all(line["train/q_continue_loss"] > 0 for line in logged)


@pytest.mark.parametrize("arch", [a for a in choices("arch") if a != "transformer"])
def test_a_curriculum_resumes_exactly_and_ends_with_all_cycles(arch, tiny, monkeypatch):
    curriculum = "arch.curriculum=[[0.3,1,1],[0.7,1,2]]"
    whole = train(monkeypatch, *tiny(*small(arch), curriculum, "run_name=whole"))
    stopped = train(monkeypatch, *tiny(*small(arch), curriculum), crash_before=6)
    train(monkeypatch, f"load_checkpoint={stopped}")
    assert tensors(newest(whole)) == tensors(newest(stopped))
    plain = train(monkeypatch, *tiny(*small(arch), "run_name=plain"))
    assert tensors(newest(whole)) != tensors(newest(plain))


def test_an_experiment_can_be_run_with_an_architecture_that_lacks_its_keys(tiny, monkeypatch):
    run = train(monkeypatch, *tiny("experiment=quickstart", "arch=transformer", "arch.H_layers=1"))
    assert (run / "summary.json").exists()


def test_architectures_are_short_and_have_presets():
    table = {config.__module__ for config in ARCHITECTURES.values()}
    for module in table:
        file = ROOT / f"{module.replace('.', '/')}.py"
        assert len(file.read_text().splitlines()) <= 80, file
    assert set(ARCHITECTURES) <= set(choices("arch"))


def test_the_memory_benchmark_trains_alike_in_every_mode(monkeypatch, capsys):
    tiny = ["arch.hidden_size=32", "arch.num_heads=2", "arch.H_cycles=2", "arch.L_cycles=2",
            "global_batch_size=4", "device=cpu", "--seq-len", "16", "--steps", "1"]  # fmt: skip
    monkeypatch.setattr("sys.argv", ["bench_memory.py", "arch=trm", *tiny])
    runpy.run_path(str(ROOT / "scripts" / "bench_memory.py"), run_name="__main__")
    lines = [line.split() for line in capsys.readouterr().out.splitlines()[2:]]
    assert [line[0] for line in lines] == ["none", "block", "cycle", "all"]
    assert len({line[-1] for line in lines}) == 1 and float(lines[0][-1]) > 0
