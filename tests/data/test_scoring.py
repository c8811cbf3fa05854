"""Scorers: oracle, noise and mixtures get what they deserve, on any number of processes."""

import json
import math
import pickle

import numpy as np
import pytest
import torch

from data import (
    ArcConfig,
    DataError,
    EvalLoader,
    ScoredRows,
    SudokuConfig,
    build_scorer,
    read_dataset,
)
from data.arc_grids import decode
from data.scoring.base import difficulty_edges
from data.scoring.sudoku import violations
from data.sudoku_4x4 import grids_4x4
from tests.data.conftest import arc_set, write_kaggle

CPU = torch.device("cpu")
A = 6


@pytest.fixture(scope="module")
def arc(tmp_path_factory):
    place = tmp_path_factory.mktemp("arc")
    source = write_kaggle(place, "evaluation", arc_set(0, 20))
    folder = ArcConfig(test=(source,), num_aug=A).prepare(place / "sets")
    return read_dataset(folder, "test")


def rows_of(dataset, name, answer, ranks=1, **settings):
    """Scored rows of every rank; `answer(examples, augmentations, labels)` predicts."""
    for rank in range(ranks):
        loader = EvalLoader(
            dataset, set_name=name, batch_size=12 * ranks, rank=rank, world_size=ranks,
            device=CPU, **settings,
        )  # fmt: skip
        collected = []
        for number, batch in enumerate(loader):
            example, index = loader.batch_indices(number), loader.batch_augmentations(number)
            real = example >= 0
            labels = batch["labels"].numpy()[real]
            tokens, confidence = answer(example[real], index[real], np.maximum(labels, 0))
            collected.append(
                ScoredRows(
                    example[real], index[real], batch["inputs"].numpy()[real], labels, tokens,
                    confidence,
                )
            )  # fmt: skip
        yield collected


def score(dataset, name, answer, ranks=1, **settings):
    scorers = []
    for collected in rows_of(dataset, name, answer, ranks, **settings):
        scorer = build_scorer(dataset, name)
        for rows in collected:
            scorer.add(rows)
        scorers.append(scorer)
    # What other processes send is pickled.
    scorers[0].merge(pickle.loads(pickle.dumps(other)) for other in scorers[1:])
    return scorers[0]


def certain(tokens):
    return tokens, np.full(len(tokens), 0.9)


def noise(seed, shape):
    return np.random.default_rng(seed).integers(0, 12, shape)


def oracle(examples, augmentations, labels):
    return certain(labels)


def random(examples, augmentations, labels):
    return certain(noise(int(examples[0]), labels.shape))


def some(examples, augmentations, labels):
    """Right about every third example, under every augmentation."""
    right = (examples % 3 == 0)[:, None]
    return certain(np.where(right, labels, noise(1, labels.shape)))


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_oracle_noise_and_mixed(arc, ranks):
    results = {f: score(arc, "evaluation", f, ranks).result() for f in (oracle, random, some)}
    assert all(results[oracle][f"pass@{k}"] == 1 for k in (1, 2, 5, 10, 100, 1000))
    assert all(results[random][f"pass@{k}"] == 0 for k in (1, 2, 5, 10, 100, 1000))
    arrays = arc.sets["evaluation"]
    right = np.arange(len(arrays)) % 3 == 0
    tasks = np.split(right, arrays.puzzle_indices[1:-1])
    expected = np.mean([task.mean() for task in tasks])
    assert 0 < expected < 1 and results[some]["tasks"] == 20
    assert results[some]["pass@1"] == results[some]["pass@1000"] == pytest.approx(expected)
    assert results[some] == score(arc, "evaluation", some).result()


def test_votes_decide_by_confidence_then_by_number(arc):
    """Wrong answers outnumber the right one, which is surer of itself."""

    def minority(examples, augmentations, labels):
        wrong = labels.copy()
        wrong[:, 0] = np.where(labels[:, 0] == 2, 3, 2)  # the same wrong colour: black or not
        right = augmentations == 0
        tokens = np.where(right[:, None], labels, wrong)
        return tokens, np.where(right, 0.99, 0.1)

    def timid(examples, augmentations, labels):
        tokens, confidence = minority(examples, augmentations, labels)
        return tokens, np.where(confidence > 0.5, 0.01, 0.9)

    sure = score(arc, "evaluation", minority).result()
    unsure = score(arc, "evaluation", timid).result()
    assert sure["pass@1"] == 1 and unsure["pass@1"] < 0.2 and unsure["pass@10"] == 1


def test_the_order_of_rows_does_not_matter(arc):
    (collected,) = rows_of(arc, "evaluation", some)
    forward, backward = build_scorer(arc, "evaluation"), build_scorer(arc, "evaluation")
    for rows in collected:
        forward.add(rows)
    for rows in reversed(collected):
        backward.add(rows)
    assert forward.result() == backward.result()
    assert forward.submission() == backward.submission()


def test_submission_holds_every_task_and_two_attempts(arc, tmp_path):
    scorer = score(arc, "evaluation", oracle, max_examples=7, num_aug=0)  # most are not tried
    scorer.write(tmp_path, "")
    submission = json.loads((tmp_path / "submission.json").read_text())
    tasks = arc_set(0, 20)
    assert submission.keys() == tasks.keys()
    right = 0
    for name, answers in submission.items():
        assert len(answers) == len(tasks[name]["test"])
        for answer, pair in zip(answers, tasks[name]["test"], strict=True):
            assert answer.keys() == {"attempt_1", "attempt_2"}
            right += answer["attempt_1"] == pair["output"]
            assert all(isinstance(row, list) for grid in answer.values() for row in grid)
    assert right == 7


def test_tasks_that_were_not_tried_whole_are_not_scored(arc):
    result = score(arc, "evaluation", oracle, max_examples=9, num_aug=0).result()
    assert result["tasks"] < 9 and result["pass@1"] == 1
    nothing = build_scorer(arc, "evaluation").result()
    assert nothing["tasks"] == 0 and "pass@1" not in nothing


def test_checkpoints_vote_together_only_when_asked(arc, tmp_path):
    first = score(arc, "evaluation", random)
    first.write(tmp_path, "")
    second = score(arc, "evaluation", oracle)
    alone = second.ranking(0)
    second.add_votes(tmp_path / "votes.npz")
    assert len(second.ranking(0)) >= len(alone) and second.result()["pass@1"] == 1
    twice = score(arc, "evaluation", oracle)
    twice.add_votes(tmp_path / "votes.npz")
    twice.add_votes(tmp_path / "votes.npz")
    votes = twice.ballots[0], second.ballots[0], score(arc, "evaluation", oracle).ballots[0]
    assert sum(v for v, _ in votes[0].values()) + sum(v for v, _ in votes[2].values()) == 2 * sum(
        v for v, _ in votes[1].values()
    )
    (tmp_path / "junk.npz").write_bytes(b"junk")
    with pytest.raises(DataError, match=r"junk\.npz is not a file of votes"):
        second.add_votes(tmp_path / "junk.npz")


def test_a_lost_list_of_names_costs_no_run(tmp_path, caplog):
    source = write_kaggle(tmp_path, "evaluation", arc_set(0, 3))
    dataset = read_dataset(ArcConfig(test=(source,), num_aug=1).prepare(tmp_path / "s"), "test")
    (dataset.path / "tasks.json").unlink()
    assert list(score(dataset, "evaluation", oracle).submission()) == ["0", "1", "2"]
    assert "does not name the tasks" in caplog.text


def test_votes_of_another_dataset_are_refused(arc, tmp_path):
    source = write_kaggle(tmp_path, "evaluation", arc_set(0, 3))
    other = read_dataset(ArcConfig(test=(source,), num_aug=1).prepare(tmp_path / "s"), "test")
    score(other, "evaluation", oracle).write(tmp_path, "")
    with pytest.raises(DataError, match="another dataset"):
        build_scorer(arc, "evaluation").add_votes(tmp_path / "votes.npz")


def test_predictions_that_are_no_grids_are_not_submitted(arc):
    def nothing(examples, augmentations, labels):
        return certain(np.zeros_like(labels))

    scorer = score(arc, "evaluation", nothing)
    assert scorer.ranking(0) == [] and scorer.result()["pass@1000"] == 0
    assert scorer.submission()["task0000"][0] == {"attempt_1": [[0]], "attempt_2": [[0]]}
    assert decode(np.zeros(900)).shape == (0, 0)


@pytest.fixture(scope="module")
def sudoku(tmp_path_factory):
    config = SudokuConfig(num_train=1, num_test=60, num_clues=(22, 40))
    return read_dataset(config.prepare(tmp_path_factory.mktemp("s")), "test")


def test_sudoku_violations():
    grids = grids_4x4().astype(int)
    assert (violations(grids, (2, 2)) == 0).all()
    assert (violations(np.ones((1, 16), int), (2, 2)) == 12 * 3).all()
    assert (violations(np.zeros((1, 16), int), (2, 2)) == 12 * 4).all()
    spoiled = grids.copy()
    spoiled[:, 0] = spoiled[:, 0] % 4 + 1  # one cell: one digit missing in three units
    assert (violations(spoiled, (2, 2)) == 3).all()


def test_sudoku_scores(sudoku):
    right = score(sudoku, "all", oracle).result()
    assert right["violations"] == 0 and right["valid"] == 1

    def clues_ignored(examples, augmentations, labels):  # valid grids, but not of these puzzles
        return certain(labels[:, ::-1].copy())

    other = score(sudoku, "all", clues_ignored).result()
    assert other["violations"] == 0 and other["valid"] == 0
    wild = score(sudoku, "all", lambda e, a, y: certain(noise(0, y.shape))).result()
    assert wild["violations"] > 50 and wild["valid"] == 0


def test_difficulty_buckets(sudoku):
    ratings = sudoku.sets["all"].ratings
    easy = np.median(ratings)

    def easy_only(examples, augmentations, labels):
        right = (ratings[examples] < easy)[:, None]
        return certain(np.where(right, labels, noise(2, (60, labels.shape[1]))[examples]))

    one, three = (score(sudoku, "all", easy_only, ranks).result() for ranks in (1, 3))
    assert one == pytest.approx(three)
    counts = {k: v for k, v in one.items() if k.endswith("/count")}
    assert sum(counts.values()) == 60 and 2 <= len(counts) <= 5
    for name in counts:
        low, high = map(int, name.split("/")[0].removeprefix("rating_").split("-"))
        inside = (ratings >= low) & (ratings <= high)
        assert inside.sum() == counts[name]
        exact = one[name.replace("count", "exact_accuracy")]
        assert exact == pytest.approx((ratings[inside] < easy).mean())
        assert exact <= one[name.replace("count", "accuracy")] <= 1
    assert difficulty_edges(np.array([5, 5, 5, 9])).tolist() == [5, 9]


def test_bits_per_byte(tmp_path):
    from data import TextConfig

    (tmp_path / "a.txt").write_bytes(bytes(range(256)) * 20)
    config = TextConfig(files=(str(tmp_path / "a.txt"),), seq_len=32)
    dataset = read_dataset(config.prepare(tmp_path / "s"), "test")
    loader = EvalLoader(dataset, set_name="all", batch_size=4, device=CPU)
    scorer = build_scorer(dataset, "all")
    assert scorer.needs_nll
    tokens = 0
    for number, batch in enumerate(loader):
        example = loader.batch_indices(number)
        real = example >= 0
        labels = batch["labels"].numpy()[real]
        nll = (labels != -100).sum(1) * math.log(2) * 3  # 3 bits for every token
        tokens += (labels != -100).sum()
        inputs = batch["inputs"].numpy()[real]
        rows = (example[real], example[real] * 0, inputs, labels, labels, nll * 0, nll)
        scorer.add(ScoredRows(*rows))
    # 512 held-out bytes and the end of text; the first byte has nothing before it
    assert tokens == 512 and scorer.result()["bits_per_byte"] == pytest.approx(3 * 512 / 511)
    assert scorer.merit() == -scorer.result()["bits_per_byte"]


def test_only_arc_has_votes(sudoku, tmp_path):
    with pytest.raises(DataError, match=r"eval\.add_votes=.*only ARC"):
        build_scorer(sudoku, "all").add_votes(tmp_path / "votes.npz")
