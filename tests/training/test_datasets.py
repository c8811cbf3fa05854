"""Every kind of dataset in a run: causal text, mazes, ARC, mixtures; workers; several ranks."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from data import ArcConfig, DataError, read_dataset
from tests.data.conftest import arc_set, write_kaggle
from tests.training.helpers import (
    ROOT,
    environment,
    newest,
    resolved,
    resolved_evaluation,
    tensors,
    train,
)
from training.errors import ConfigError
from training.report import run_evaluation

MODEL = (
    "arch=trm",
    "arch.hidden_size=32",
    "arch.num_heads=2",
    "arch.expansion=1.0",
    "arch.halt_max_steps=2",
    "global_batch_size=8",
    "max_steps=8",
    "lr_warmup_steps=2",
    "log_interval=4",
    "eval_interval=4",
    "eval.batch_size=8",
    "device=cpu",
)


@pytest.fixture
def run(tmp_path):
    """`run("key=value", …)` → the overrides of a tiny run in a folder of its own."""

    def overrides(*more: str) -> list[str]:
        return [*MODEL, f"datasets_dir={tmp_path / 'sets'}", f"runs_dir={tmp_path / 'runs'}", *more]

    return overrides


@pytest.fixture
def text(tmp_path) -> tuple[str, ...]:
    (tmp_path / "a.txt").write_bytes(b"all work and no play makes jack a dull boy. " * 60)
    return (
        "data=text",
        f"data.files=[{tmp_path / 'a.txt'}]",
        "data.seq_len=24",
        "arch.causal=true",
    )


def summary(run_dir: Path) -> dict:
    return json.loads((run_dir / "summary.json").read_text())


def test_text_needs_a_causal_model(run, text, tmp_path):
    with pytest.raises(ConfigError, match=r"arch\.causal=false: the labels of data=text"):
        resolved(*run(*text[:-1]))
    assert not (tmp_path / "sets").exists()
    built = resolved(*run(*text, "run_name=built")).dataset_path
    with pytest.raises(ConfigError, match=r"arch\.causal=false: the labels of data=folder"):
        resolved(*run("data=folder", f"data.path={built}"))


def test_text_trains_and_resumes_exactly(run, text, monkeypatch):
    whole = train(monkeypatch, *run(*text, "run_name=whole", "checkpoint_interval=3"))
    bits = summary(whole)["sets"]["all"]["bits_per_byte"]
    assert 0 < bits < 9
    stopped = run(*text, "run_name=stopped", "checkpoint_interval=3")
    train(monkeypatch, *stopped, crash_before=8)
    resumed = train(monkeypatch, f"load_checkpoint={whole.parent / 'stopped'}")
    assert tensors(newest(resumed)) == tensors(newest(whole))
    best = json.loads((whole / "checkpoints" / "best.json").read_text())
    lines = map(json.loads, (whole / "metrics.jsonl").read_text().splitlines())
    measured = {x["step"]: x["all/bits_per_byte"] for x in lines if "all/bits_per_byte" in x}
    assert best["merit"] == -min(measured.values()) and measured[best["step"]] == -best["merit"]


def test_a_causal_model_does_not_see_what_it_predicts(run, text):
    import torch

    from training.loop import Trainer

    state = Trainer(resolved(*run(*text, "run_name=seen", "arch.puzzle_emb_ndim=0"))).state
    batch = state.loader.batch(0)
    model = state.model.eval()
    before = model(model.init_state(8), batch).logits
    changed = {**batch, "inputs": batch["inputs"].clone()}
    changed["inputs"][:, 12:] = 65
    after = model(model.init_state(8), changed).logits
    assert torch.allclose(before[:, :12], after[:, :12], atol=1e-5)
    assert not torch.allclose(before[:, 12:], after[:, 12:], atol=1e-3)


@pytest.mark.parametrize("num_workers", [1, 3])
def test_workers_give_the_same_run(run, monkeypatch, num_workers):
    maze = (
        "data=maze",
        "data.size=[4,5]",
        "data.num_train=20",
        "data.num_test=6",
        "data.num_aug=3",
    )
    here = train(monkeypatch, *run(*maze, "run_name=here"))
    there = train(
        monkeypatch, *run(*maze, "run_name=there", f"num_workers={num_workers}"), crash_before=6
    )
    resumed = train(monkeypatch, f"load_checkpoint={there}", "num_workers=0")
    assert tensors(newest(here)) == tensors(newest(resumed))
    scores = summary(here)["sets"]["all"]
    assert {"valid_path", "shortest_path", "excess_moves"} <= scores.keys()
    assert any(key.startswith("rating_") for key in scores)


def test_mixtures_train(run, monkeypatch):
    parts = "[{name:maze,size:[4,5],num_train:9,num_test:4},{name:maze,size:[4,5],num_train:7,"
    parts += "num_test:5,seed:3,num_aug:3}]"
    run_dir = train(monkeypatch, *run("data=mix", f"data.parts={parts}", "data.weights=[2,1]"))
    sets = summary(run_dir)["sets"]
    assert {name: report["count"] for name, report in sets.items()} == {
        "maze-4x5.all": 4, "maze-4x5-2.all": 5,
    }  # fmt: skip
    again = train(monkeypatch, f"load_checkpoint={run_dir}", "max_steps=10")
    assert summary(again)["step"] == 10


@pytest.fixture
def arc(tmp_path) -> tuple[str, ...]:
    sources = [write_kaggle(tmp_path, n, arc_set(f, 4)) for n, f in (("training", 0), ("eval", 50))]
    return (
        "data=arc", f"data.train=[{sources[0]}]", f"data.test=[{sources[1]}]", "data.num_aug=3",
        "arch.hidden_size=8", "arch.num_heads=1", "arch.puzzle_emb_ndim=8", "arch.puzzle_emb_len=1",
        "arch.H_cycles=1", "arch.L_cycles=1", "max_steps=4", "eval_interval=2",
    )  # fmt: skip


def test_arc_submits_and_votes_on_any_number_of_ranks(run, arc, tmp_path, monkeypatch):
    run_dir = train(monkeypatch, *run(*arc, "run_name=arc"))
    submission = json.loads((run_dir / "submission.json").read_text())
    assert submission.keys() == arc_set(50, 4).keys()
    scores = summary(run_dir)["sets"]["eval"]
    assert scores["tasks"] == 4 and scores["pass@1"] == 0 and scores["count"] == 6 * 4
    reports, answers = {}, {}
    for ranks in (1, 2, 3):
        out = tmp_path / f"out{ranks}"
        evaluate(ranks, f"checkpoint={run_dir}", f"output_dir={out}", "eval.batch_size=5",
                 "eval.save_predictions=true")  # fmt: skip
        (file,) = out.glob("evaluation-*.json")
        reports[ranks] = json.loads(file.read_text())["sets"]["eval"]
        votes = np.load(out / "votes.npz")
        predictions = np.load(out / "predictions-eval.npz")
        assert predictions["indices"].tolist() == np.repeat(np.arange(6), 4).tolist()
        assert predictions["augmentations"].tolist() == [0, 1, 2, 3] * 6
        answers[ranks] = votes["counts"].tolist()
        assert votes["counts"].sum() == 24
        assert (out / "submission.json").read_text() == (run_dir / "submission.json").read_text()
    assert reports[1] == pytest.approx(reports[2]) and reports[1] == pytest.approx(reports[3])
    assert answers[1] == answers[2] == answers[3]


def evaluate(ranks: int, *arguments: str) -> None:
    """Run evaluate.py in so many processes, as torchrun starts them."""
    port = 20_000 + os.getpid() % 20_000 + ranks
    processes = []
    for rank in range(ranks):
        world = {} if ranks == 1 else {
            "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks),
            "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
        }  # fmt: skip
        processes.append(
            subprocess.Popen(
                [sys.executable, str(ROOT / "evaluate.py"), *arguments, "device=cpu"],
                env=environment(**world), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            )
        )  # fmt: skip
    for process in processes:
        _, errors = process.communicate(timeout=300)
        assert process.returncode == 0, errors[-2000:]


def test_another_checkpoint_votes_too_when_asked(run, arc, tmp_path, monkeypatch):
    run_dir = train(monkeypatch, *run(*arc, "run_name=arc"))
    job = (f"checkpoint={run_dir}", f"output_dir={tmp_path / 'out'}", "device=cpu")
    once = run_evaluation(resolved_evaluation(*job))["sets"]
    votes = np.load(tmp_path / "out" / "votes.npz")["counts"].sum()
    twice = run_evaluation(
        resolved_evaluation(*job, f"eval.add_votes=[{tmp_path / 'out' / 'votes.npz'}]")
    )["sets"]
    assert np.load(tmp_path / "out" / "votes.npz")["counts"].sum() == 2 * votes
    assert once["eval"]["count"] == twice["eval"]["count"]
    few = run_evaluation(resolved_evaluation(*job, "eval.num_aug=1"))["sets"]
    assert few["eval"]["count"] == 12


def test_votes_are_looked_at_before_anything_is_done(run, arc, tmp_path, monkeypatch):
    with pytest.raises(ConfigError, match=r"eval\.add_votes is for evaluate\.py"):
        resolved(*run(*arc, "eval.add_votes=[a.npz]"))
    run_dir = train(monkeypatch, *run(*arc, "run_name=arc"))
    monkeypatch.setattr("training.evaluation.think", None)
    with pytest.raises(ConfigError, match=r"none\.npz does not exist"):
        resolved_evaluation(f"checkpoint={run_dir}", "eval.add_votes=[none.npz]")
    (tmp_path / "odd.npz").write_text("no votes")
    with pytest.raises(DataError, match=r"odd\.npz is not a file of votes"):
        run_evaluation(
            resolved_evaluation(f"checkpoint={run_dir}", f"eval.add_votes=[{tmp_path}/odd.npz]")
        )


def test_the_identifiers_of_arc_fill_the_table(arc, tmp_path):
    config = ArcConfig(test=(arc[2].removeprefix("data.test=").strip("[]"),), num_aug=3)
    dataset = read_dataset(config.prepare(tmp_path / "s"), "test")
    assert dataset.num_puzzle_identifiers == 1 + 4 * 4
