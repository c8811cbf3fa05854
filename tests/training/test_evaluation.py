"""Evaluation: padding counts nowhere, EMA is borrowed without a trace, one code path for both."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from data import read_dataset
from tests.training.helpers import newest, resolved, resolved_evaluation, train
from training.config import EvalConfig
from training.errors import ConfigError
from training.evaluation import evaluate, table
from training.loop import Trainer
from training.report import run_evaluation

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def trained(tmp_path_factory, datasets_dir) -> Path:
    from tests.conftest import TINY

    keys = [k for k in TINY if not k.startswith("eval.max_examples")]
    with pytest.MonkeyPatch.context() as patch:
        return train(
            patch, *keys, f"datasets_dir={datasets_dir}", "eval.save_predictions=true",
            f"runs_dir={tmp_path_factory.mktemp('runs')}", "run_name=a", "eval_interval=6",
            "ema_rate=0.9",
        )  # fmt: skip


@pytest.fixture
def state(trained):
    return Trainer(resolved(f"load_checkpoint={trained}")).state


@pytest.fixture
def test_set(trained):
    return read_dataset(resolved(f"load_checkpoint={trained}").dataset_path, "test")


def reports(state, dataset, batch_size, seed=0, **config):
    return evaluate(
        state.act, dataset, EvalConfig(**config), batch_size=batch_size, seed=seed, device=CPU
    )


def run(*arguments: str) -> dict:
    return run_evaluation(resolved_evaluation(*arguments))


def test_padding_counts_nowhere(state, test_set):
    """12 puzzles in batches that divide them, that do not, and that are larger than all."""
    whole = reports(state, test_set, 12)["all"].values()
    assert whole["count"] == 12 and 0 < whole["accuracy"] < 1
    for batch_size in (1, 5, 7, 8, 50):
        other = reports(state, test_set, batch_size)["all"].values()
        for key, value in whole.items():
            assert other[key] == pytest.approx(value, rel=1e-5, abs=1e-7), (key, batch_size)


def test_the_numbers_are_those_of_a_plain_computation(state, test_set):
    from models import IGNORE_LABEL
    from training.evaluation import think

    report = reports(state, test_set, 5)["all"]
    arrays = test_set.sets["all"]
    labels = torch.from_numpy(np.asarray(arrays.labels)).int()
    labels[labels == test_set.ignore_label_id] = IGNORE_LABEL
    batch = {
        "inputs": torch.from_numpy(np.asarray(arrays.inputs)).int(),
        "labels": labels,
        "puzzle_ids": torch.zeros(12, dtype=torch.int32),
    }
    state.act.eval()
    _, output = think(state.act, batch)
    right = output.logits.argmax(-1) == labels
    assert report.accuracy == pytest.approx(right.float().mean().item())
    assert report.exact_accuracy == pytest.approx(right.all(-1).float().mean().item())
    halted_rightly = (output.q_halt >= 0) == right.all(-1)
    assert report.q_halt_accuracy == pytest.approx(halted_rightly.float().mean().item())
    assert report.steps == state.model.config.halt_max_steps


def test_max_examples_is_a_seeded_subset(state, test_set):
    subset = reports(state, test_set, 4, max_examples=7)["all"]
    assert subset.count == 7
    assert reports(state, test_set, 4, max_examples=7)["all"].values() == subset.values()
    assert reports(state, test_set, 4, max_examples=100)["all"].count == 12
    others = {reports(state, test_set, 4, seed=s, max_examples=7)["all"].lm_loss for s in range(5)}
    assert len(others) > 1


def test_ema_is_borrowed_without_a_trace(trained):
    trainer = Trainer(resolved(f"load_checkpoint={trained}", "run_name=fork"))
    state = trainer.state
    parameters = {n: (p, p.data_ptr(), p.detach().clone()) for n, p in
                  state.model.named_parameters()}  # fmt: skip
    shadows = {n: t.clone() for n, t in state.ema.shadow.items()}
    assert any(not torch.equal(shadows[n], p[2]) for n, p in parameters.items())
    seen = []
    hook = state.model.register_forward_hook(
        lambda m, i, o: seen.append(all(torch.equal(dict(m.named_parameters())[n], shadows[n])
                                        for n in shadows)))  # fmt: skip
    trainer._evaluate()
    hook.remove()
    assert seen and all(seen), "the evaluation ran on other weights than the average"
    assert state.act.training
    for name, (parameter, pointer, value) in parameters.items():
        assert dict(state.model.named_parameters())[name] is parameter
        assert parameter.data_ptr() == pointer and torch.equal(parameter, value)
        assert torch.equal(state.ema.shadow[name], shadows[name])


def test_an_evaluation_leaves_the_training_as_it_is(tiny, monkeypatch):
    from tests.training.helpers import tensors

    often = train(monkeypatch, *tiny("run_name=often", "eval_interval=1"))
    rarely = train(monkeypatch, *tiny("run_name=rarely"))
    assert tensors(newest(often)) == tensors(newest(rarely))


def test_evaluate_gives_the_numbers_of_the_evaluation_in_training(trained, tmp_path):
    summary = json.loads((trained / "summary.json").read_text())
    report = run(f"checkpoint={trained}", f"output_dir={tmp_path}")
    assert report["sets"] == summary["sets"] and report["step"] == 12
    written = json.loads((tmp_path / "evaluation-step_00000012.json").read_text())
    assert written == report
    other = run(f"checkpoint={trained}", f"output_dir={tmp_path}", "weights=model")
    assert other["sets"] != report["sets"]


def test_a_checkpoint_of_any_step_can_be_evaluated(trained, tmp_path):
    lines = map(json.loads, (trained / "metrics.jsonl").read_text().splitlines())
    at_6 = next(line for line in lines if line["step"] == 6 and "all/count" in line)
    path = trained / "checkpoints" / "step_00000006"
    report = run(f"checkpoint={path}", f"output_dir={tmp_path}")
    assert report["step"] == 6
    assert {f"all/{k}": v for k, v in report["sets"]["all"].items()}.items() <= at_6.items()


def test_which_best(trained, tmp_path):
    best = json.loads((trained / "checkpoints" / "best.json").read_text())
    report = run(f"checkpoint={trained}", "which=best", f"output_dir={tmp_path}")
    assert report["step"] == best["step"]
    assert report["sets"]["all"]["exact_accuracy"] == best["exact_accuracy"]


def test_predictions_join_back(trained, tmp_path, test_set):
    report = run(
        f"checkpoint={trained}", f"output_dir={tmp_path}", "eval.save_predictions=true",
        "eval.batch_size=5",
    )["sets"]["all"]  # fmt: skip
    saved = np.load(tmp_path / "predictions-all.npz", allow_pickle=False)
    assert saved["indices"].tolist() == list(range(12))
    arrays = test_set.sets["all"]
    assert (saved["inputs"] == arrays.inputs[saved["indices"]]).all()
    assert (saved["labels"] == arrays.labels[saved["indices"]]).all()
    right = saved["predictions"] == saved["labels"]
    assert right.mean() == pytest.approx(report["accuracy"])
    assert right.all(-1).mean() == pytest.approx(report["exact_accuracy"])
    assert saved["q_halt"].shape == (12,) and (trained / "predictions-all.npz").exists()


def test_predictions_of_a_subset_name_their_examples(trained, tmp_path, test_set):
    run(
        f"checkpoint={trained}", f"output_dir={tmp_path}", "eval.save_predictions=true",
        "eval.batch_size=4", "eval.max_examples=6",
    )  # fmt: skip
    saved = np.load(tmp_path / "predictions-all.npz", allow_pickle=False)
    assert len(saved["indices"]) == len(set(saved["indices"].tolist())) == 6
    assert (saved["inputs"] == test_set.sets["all"].inputs[saved["indices"]]).all()


def test_other_data_of_the_same_kind(trained, tmp_path):
    report = run(f"checkpoint={trained}", f"output_dir={tmp_path}", "data.num_test=20",
                 f"datasets_dir={tmp_path / 'sets'}")  # fmt: skip
    assert report["sets"]["all"]["count"] == 20


def test_other_data_of_another_size_are_refused(trained, tmp_path):
    with pytest.raises(ConfigError, match=r"36 tokens of a vocabulary of 8, the model 16 of 6"):
        run(f"checkpoint={trained}", "data=sudoku6", "data.num_train=3", "data.num_test=3",
            f"datasets_dir={tmp_path / 'sets'}")  # fmt: skip


def test_a_damaged_checkpoint_is_not_evaluated(trained, tmp_path):
    import shutil

    copy = Path(shutil.copytree(newest(trained), tmp_path / "copy"))
    with (copy / "ema.safetensors").open("r+b") as file:
        file.seek(-3, 2)
        file.write(b"\xff")
    with pytest.raises(ConfigError, match=r"ema\.safetensors is damaged"):
        run(f"checkpoint={copy}")


def test_the_table_is_aligned(state, test_set):
    lines = table(reports(state, test_set, 12)).splitlines()
    assert len(lines) == 3 and len(lines[0]) == len(lines[1])
    assert lines[1].split()[:2] == ["all", "12"]
    assert lines[2].startswith("all: violations ")
