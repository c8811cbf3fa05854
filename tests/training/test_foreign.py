"""Ancestors' files on the command line: warm starts, evaluation, conversion there and back."""

from __future__ import annotations

import json
import runpy

import pytest
import torch
from safetensors.torch import load_file

from models import load_pretrained
from models.legacy import to_reference
from tests.conftest import TINY
from tests.training.helpers import ROOT, newest, resolved, resolved_evaluation, train
from training.errors import ConfigError
from training.loop import Trainer
from training.report import run_evaluation

ARCHS = ("trm", "trm_mlp", "trm_single", "trm_multi", "hrm", "urm", "transformer")


@pytest.fixture(scope="module")
def runs(tmp_path_factory, datasets_dir):
    """`runs(arch)` → the folder of a short run, trained once."""
    done = {}

    def run(arch: str):
        if arch not in done:
            folder = tmp_path_factory.mktemp(arch)
            with pytest.MonkeyPatch.context() as patch:
                done[arch] = train(
                    patch, "experiment=plain", "data=sudoku4", *TINY, f"arch={arch}",
                    "arch.halt_max_steps=3", "max_steps=6", "lr=1e-2",
                    f"datasets_dir={datasets_dir}", f"runs_dir={folder}",
                )  # fmt: skip
        return done[arch]

    return run


def save_theirs(run_dir, path, average: bool = True) -> dict[str, torch.Tensor]:
    """The newest checkpoint as a fork's training state; returns its weights under our names."""
    checkpoint = newest(run_dir)
    weights = load_file(checkpoint / "model.safetensors")
    named = {f"_orig_mod.{k}": v for k, v in to_reference(weights).items()}
    content = {"step": 6, "model_state_dict": named, "optimizer_states": []}
    if average:
        ema = load_file(checkpoint / "ema.safetensors")
        content["ema_shadow"] = {f"_orig_mod.{k}": v for k, v in to_reference(ema).items()}
    torch.save(content, path)
    return weights


def convert(monkeypatch, capsys, *arguments) -> str:
    """Run the script with these arguments, in this process; what it prints."""
    monkeypatch.setattr("sys.argv", ["convert_checkpoint.py", *map(str, arguments)])
    runpy.run_path(str(ROOT / "scripts" / "convert_checkpoint.py"), run_name="__main__")
    return capsys.readouterr().out


@pytest.mark.parametrize("average", [True, False])
@pytest.mark.parametrize("arch", ["trm_mlp", "hrm", "urm"])
def test_warm_start_from_a_training_state(runs, tiny, tmp_path, caplog, arch, average):
    caplog.set_level("INFO")
    weights = save_theirs(runs(arch), tmp_path / "state.pt", average)
    state = Trainer(resolved(*tiny("experiment=plain", "data=sudoku4", f"arch={arch}",
                                   f"load_checkpoint={tmp_path / 'state.pt'}"))).state  # fmt: skip
    own = state.model.state_dict()
    assert own.keys() == weights.keys()
    assert all(torch.equal(own[k], weights[k]) for k in weights)
    ema = load_file(newest(runs(arch)) / "ema.safetensors") if average else weights
    assert all(torch.equal(v, ema[k]) for k, v in state.ema.shadow.items())
    assert "(saved after step 6), everything else new, at step 0" in caplog.text


def test_puzzle_embeddings_of_another_dataset_keep_known_puzzles(runs, tiny, tmp_path, caplog):
    caplog.set_level("INFO")
    weights = save_theirs(runs("trm"), tmp_path / "state.pt")
    content = torch.load(tmp_path / "state.pt")
    name = "_orig_mod.model.inner.puzzle_emb.weights"
    table = torch.arange(3.0 * 32).reshape(3, 32)
    content["model_state_dict"][name] = table
    torch.save(content, tmp_path / "state.pt")
    where = ("experiment=plain", "data=sudoku4", "arch=trm")
    run = resolved(*tiny(*where, f"load_checkpoint={tmp_path / 'state.pt'}"))
    state = Trainer(run).state
    assert torch.equal(state.model.embedding.puzzles, table.mean(0, keepdim=True))
    assert "3 puzzle embeddings in" in caplog.text and "0 kept by name" in caplog.text
    (tmp_path / "identifiers.json").write_text(json.dumps(["x", "<blank>", "y"]))
    (run.dataset_path / "identifiers.json").write_text(json.dumps(["<blank>"]))
    try:
        state = Trainer(resolved(*tiny(*where, f"load_checkpoint={tmp_path / 'state.pt'}"))).state
    finally:
        (run.dataset_path / "identifiers.json").unlink()
    assert torch.equal(state.model.embedding.puzzles, table[1:2])
    assert torch.equal(state.model.lm_head.weight, weights["lm_head.weight"])


def test_puzzle_embeddings_follow_their_names(runs, tiny, tmp_path):
    """As many puzzles in another order."""
    save_theirs(runs("trm"), tmp_path / "state.pt")
    content = torch.load(tmp_path / "state.pt")
    name = "_orig_mod.model.inner.puzzle_emb.weights"
    content["model_state_dict"][name] = torch.ones(1, 32)
    torch.save(content, tmp_path / "state.pt")
    run = resolved(*tiny("experiment=plain", "data=sudoku4", "arch=trm",
                         f"load_checkpoint={tmp_path / 'state.pt'}"))  # fmt: skip
    state = Trainer(run).state
    state.model.embedding.puzzles = torch.zeros(3, 32)
    content["model_state_dict"][name] = torch.arange(3.0).unsqueeze(1).expand(3, 32)
    torch.save(content, tmp_path / "state.pt")
    (tmp_path / "identifiers.json").write_text(json.dumps(["a", "b", "c"]))
    (tmp_path / "here").mkdir()
    (tmp_path / "here" / "identifiers.json").write_text(json.dumps(["c", "a", "b"]))
    state.warm_start(run.resume, tmp_path / "here")
    assert state.model.embedding.puzzles[:, 0].tolist() == [2.0, 0.0, 1.0]


@pytest.mark.parametrize("arch", ARCHS)
def test_converted_files_evaluate_as_the_run_did(
    runs, tmp_path, arch, datasets_dir, monkeypatch, capsys
):
    """Ours → theirs → ours by the script; evaluate.py and load_pretrained agree on all of them."""
    run = runs(arch)
    theirs, ours = tmp_path / "step_6", tmp_path / "ours.safetensors"
    assert "→" in convert(monkeypatch, capsys, run, theirs)
    fields = ("arch.num_heads=2", "arch.halt_max_steps=3", "--seq-len", "16")
    assert "→" in convert(monkeypatch, capsys, theirs, ours, *fields)
    again = load_file(ours)
    expected = load_file(newest(run) / "model.safetensors")
    expected |= load_file(newest(run) / "ema.safetensors")
    assert again.keys() == expected.keys()
    assert all(torch.equal(again[k], expected[k]) for k in again)
    where = (
        "device=cpu",
        "eval.max_examples=8",
        "eval.batch_size=8",
        f"datasets_dir={datasets_dir}",
    )
    data = ("data=sudoku4", "data.num_train=60", "data.num_test=12")
    trained = json.loads((run / "summary.json").read_text())["sets"]
    report = run_evaluation(resolved_evaluation(f"checkpoint={ours}", *data, *where))
    assert report["sets"] == trained and report["step"] is None
    puzzle = torch.arange(16) % 5
    answers = [load_pretrained(p, device="cpu")(puzzle) for p in (run, newest(run), ours)]
    assert all(torch.equal(a.tokens, answers[0].tokens) for a in answers)


def test_theirs_is_evaluated_as_it_is(runs, tmp_path, datasets_dir):
    save_theirs(runs("hrm"), tmp_path / "step_6")
    data = ("data=sudoku4", "data.num_train=60", "data.num_test=12")
    few = ("device=cpu", "eval.max_examples=8", "eval.batch_size=8")
    where = (*data, *few, f"datasets_dir={datasets_dir}")
    fields = ("arch.num_heads=2", "arch.halt_max_steps=3")
    trained = json.loads((runs("hrm") / "summary.json").read_text())["sets"]
    for path in (tmp_path / "step_6", tmp_path):
        report = run_evaluation(resolved_evaluation(f"checkpoint={path}", *fields, *where))
        assert report["sets"] == trained


@pytest.mark.parametrize(
    "given, message",
    [
        ((), "data is missing: .* does not name any; give data=PRESET"),
        (("data=sudoku4", "arch=trm"), "step_6 belongs to arch=hrm"),
        (("data=sudoku4", "arch.hidden_size=64"), "arch.hidden_size: .* has 32, which cannot chan"),
        (("data=sudoku4", "arch.num_heads=7"), "num_heads=7 does not divide"),
        (("data=sudoku6",), "does not fit"),
    ],
)
def test_evaluations_of_theirs_that_cannot_be(runs, tmp_path, datasets_dir, given, message):
    save_theirs(runs("hrm"), tmp_path / "step_6")
    with pytest.raises(ConfigError, match=message):
        resolved_evaluation(f"checkpoint={tmp_path / 'step_6'}", f"datasets_dir={datasets_dir}",
                            "device=cpu", *given)  # fmt: skip


def test_more_steps_at_test_time(runs, datasets_dir, tmp_path):
    where = (f"checkpoint={runs('trm')}", "device=cpu", "eval.max_examples=8", "eval.batch_size=8",
             f"datasets_dir={datasets_dir}", f"output_dir={tmp_path}")  # fmt: skip
    report = run_evaluation(resolved_evaluation(*where, "arch.halt_max_steps=9"))
    assert all(r["steps"] == 9 for r in report["sets"].values())


@pytest.mark.parametrize(
    "arguments, message",
    [
        (("nope", "x.safetensors"), "there is no checkpoint at nope"),
        (("{theirs}", "x.pt"), "x.pt should end in .safetensors"),
        (("{theirs}", "x.safetensors", "heads=3"), "'heads=3' is not of the form arch.key=value"),
        (("{theirs}", "x.safetensors", "arch.heads=3"), "heads: Extra inputs are not permitted"),
        (("{speedrun}", "x.safetensors"), "arch.glu_norm=product, which the references' code does"),
    ],
)
def test_conversions_that_cannot_be(runs, tmp_path, arguments, message, monkeypatch, capsys):
    save_theirs(runs("hrm"), tmp_path / "step_6")
    monkeypatch.chdir(tmp_path)
    speedrun = ROOT / "docs/weights/sudoku-speedrun-seed0"
    given = [a.format(theirs=tmp_path / "step_6", speedrun=speedrun) for a in arguments]
    with pytest.raises(SystemExit, match="2"):
        convert(monkeypatch, capsys, *given)
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
    assert not (tmp_path / "x.safetensors").exists()
