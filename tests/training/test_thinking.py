"""Test-time compute: depth, breadth, early halting, and how an answer is chosen."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from data import EvalLoader
from data.augment_sudoku import SudokuAugmentation
from training.config import ThinkConfig
from training.evaluation import evaluate
from training.thinking import Thinker, Trajectories, depths_up_to

CPU = torch.device("cpu")


def loader(dataset, batch_size=8):
    return EvalLoader(dataset, set_name="all", batch_size=batch_size, device=CPU)


def think(solver, batch_size=8, **options) -> Trajectories:
    act, dataset = solver
    with torch.no_grad():
        return Thinker(act, dataset, loader(dataset, batch_size), ThinkConfig(**options), 0).run()


@pytest.mark.parametrize("batch_size", [3, 8, 64])
def test_one_plain_trajectory_is_the_plain_evaluation(solver, batch_size):
    act, dataset = solver
    found = think(solver, batch_size, depth=5)
    report = evaluate(act, dataset, ThinkConfig(), batch_size=batch_size, seed=0, device=CPU)["all"]
    assert report.count == len(found.steps)
    assert found.accuracy(1, "halt") == pytest.approx(report.exact_accuracy)
    assert (found.steps == 5).all() and found.depths == (1, 2, 4, 5)
    predictions = []
    with torch.no_grad():
        for batch in loader(dataset):
            carry = act.refill(act.initial_carry(batch), batch)
            for _ in range(5):
                carry, output = act(carry)
            predictions.append(output.logits.argmax(-1))
    assert np.array_equal(torch.cat(predictions)[: len(found.steps)].numpy(), found.answers[:, 0])


def test_early_halting_ends_rows_and_keeps_their_answer(solver):
    full, early = think(solver, depth=5), think(solver, depth=5, early_halt=True)
    assert (early.steps <= full.steps).all() and early.steps.sum() < full.steps.sum()
    halted = early.steps[:, 0] < 5
    for k, depth in enumerate(full.depths):
        same = early.steps[:, 0] >= depth
        assert np.allclose(full.q_halt[same, 0, k], early.q_halt[same, 0, k], atol=1e-5)
    assert (early.q_halt[halted, 0, -1] > 0).all()  # what a row ended with holds for later depths


def test_a_surer_head_is_waited_for(solver):
    early = think(solver, depth=5, early_halt=True)
    surer = think(solver, depth=5, early_halt=True, confidence=0.8)
    assert (surer.steps >= early.steps).all() and surer.steps.sum() > early.steps.sum()
    ended = surer.steps[:, 0] < 5
    assert (surer.q_halt[ended, 0, -1] > np.log(4) - 1e-5).all()  # a probability of 0.8
    with pytest.raises(ValueError, match="needs early_halt"):
        ThinkConfig(confidence=0.9)


def test_a_puzzle_ends_when_enough_sure_trajectories_agree(solver):
    how = {"depth": 5, "breadth": 6, "noise": 1e-6, "early_halt": True, "select": "vote"}
    runs = {agree: think(solver, 2, agree=agree, **how) for agree in (1, 2, 6)}
    for agree, found in runs.items():
        for p in range(len(found.steps)):
            shared = [found.sharing(p, t) for t in np.flatnonzero(found.sure[p])]
            settled = max(shared, default=0) >= agree
            assert settled or found.ran[p].all()  # it wanted every trajectory
    ran = {agree: found.ran.sum() for agree, found in runs.items()}
    assert ran[1] < ran[2] < ran[6]
    same = runs[1].ran & runs[2].ran  # what is run does not depend on when a puzzle ends
    assert np.array_equal(runs[1].answers[same], runs[2].answers[same])
    with pytest.raises(ValueError, match="agree=2 needs early_halt"):
        ThinkConfig(breadth=2, augment=True, agree=2)
    with pytest.raises(ValueError, match="agree=2 needs select=vote"):
        ThinkConfig(breadth=2, augment=True, early_halt=True, agree=2)
    with pytest.raises(ValueError, match="agree=3 is more than breadth=2"):
        ThinkConfig(breadth=2, augment=True, early_halt=True, select="vote", agree=3)


@pytest.mark.parametrize("how", [{"noise": 0.5}, {"random_init": True}, {"augment": True}])
def test_further_trajectories_differ_and_come_again(solver, how):
    found, again = (think(solver, breadth=3, **how) for _ in range(2))
    assert np.array_equal(found.answers, again.answers)
    assert np.array_equal(found.answers[:, 0], think(solver, depth=5).answers[:, 0])
    assert not np.array_equal(found.answers[:, 0], found.answers[:, 1])
    assert not np.array_equal(found.answers[:, 1], found.answers[:, 2])
    curve = list(found.curve("vote"))
    assert [row["breadth"] for row in curve] == [1] * 4 + [2, 3]
    assert curve[-1]["ACT_steps"] == 15


def test_puzzles_that_are_content_want_no_more_trajectories(solver):
    solver[0].model.q_head.bias.data.fill_(-4)  # so that some never halt
    found = think(solver, breadth=4, noise=0.5, early_halt=True)
    first = found.q_halt[:, 0, -1] > 0
    assert 0 < first.sum() < len(first)
    assert (found.steps[first, 1:] == 0).all() or found.steps[first, 1:].sum() <= 8 * 5
    assert (found.steps[~first].sum(1) > found.steps[~first, 0]).all()


def made(answers, right, q, stable) -> Trajectories:
    shape = np.array(q).shape
    return Trajectories(
        depths=(1,),
        labels=np.zeros((shape[0], 1)),
        answers=np.array(answers)[:, :, None],
        right=np.array(right)[:, :, None],
        q_halt=np.array(q, np.float32)[:, :, None],
        sure=np.array(q) > 0,
        stable=np.array(stable),
        steps=np.ones(shape, int),
    )


def test_how_an_answer_is_chosen():
    found = made([[1, 2, 2]], [[True, False, False]], [[3.0, 1.0, 2.0]], [[0, 4, 1]])
    assert found.chosen(3, "halt").tolist() == [0]
    assert found.chosen(3, "convergence").tolist() == [1]
    assert found.chosen(3, "vote").tolist() == [2]  # the surest of the two that agree
    assert found.accuracy(3, "halt") == 1 and found.accuracy(3, "vote") == 0
    assert depths_up_to(16) == (1, 2, 4, 8, 16) and depths_up_to(5) == (1, 2, 4, 5)


@pytest.mark.parametrize("box", [(2, 2), (2, 3), (3, 3)])
def test_an_augmentation_is_undone(box):
    n = box[0] * box[1]
    augment = SudokuAugmentation(box, seed=3, device=CPU)
    tokens = torch.randint(0, n + 2, (50, n * n))
    examples, indices = torch.arange(50), torch.arange(50) * 7
    turned, _ = augment(tokens, tokens, examples, indices)
    assert torch.equal(augment.invert(turned, examples, indices), tokens)
    assert torch.equal(turned[0], tokens[0]) and not torch.equal(turned[1:], tokens[1:])
