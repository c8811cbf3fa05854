"""The on-disk format: round trip, the ancestors' folders, and everything that can be broken."""

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from data import (
    DataError,
    FolderConfig,
    PuzzleDataset,
    PuzzleSet,
    SudokuConfig,
    dataset_info,
    read_dataset,
    write_dataset,
)
from data.config import build_once


def ancestor_folder(path):
    """Write a dataset as the ancestors' builders do: int64 arrays, no extras of ours."""
    rng = np.random.default_rng(0)
    for split, puzzles, groups in (("train", [3, 2, 2, 5], [1, 3]), ("test", [2, 1], [1, 1])):
        folder = path / split
        folder.mkdir(parents=True)
        examples = sum(puzzles)
        metadata = {
            "pad_id": 0,
            "ignore_label_id": 0,
            "blank_identifier_id": 0,
            "vocab_size": 12,
            "seq_len": 6,
            "num_puzzle_identifiers": 9,
            "total_groups": len(groups),
            "mean_puzzle_examples": examples / len(puzzles),
            "sets": ["all"],
        }
        arrays = {
            "inputs": rng.integers(0, 12, (examples, 6)),
            "labels": rng.integers(0, 12, (examples, 6)),
            "puzzle_identifiers": np.arange(len(puzzles), dtype=np.int32) + 1,
            "puzzle_indices": np.cumsum([0, *puzzles]).astype(np.int32),
            "group_indices": np.cumsum([0, *groups]).astype(np.int32),
        }
        (folder / "dataset.json").write_text(json.dumps(metadata))
        for key, array in arrays.items():
            np.save(folder / f"all__{key}.npy", array)
    return path


def edit_json(path, **changes):
    file = path / "train" / "dataset.json"
    metadata = {**json.loads(file.read_text()), **changes}
    file.write_text(json.dumps({k: v for k, v in metadata.items() if v != "DROP"}))


def edit_array(path, key, change):
    file = path / "train" / f"all__{key}.npy"
    np.save(file, change(np.load(file)))


def put(array, index, value):
    array = array.copy()
    array[index] = value
    return array


def test_round_trip(tmp_path):
    rng = np.random.default_rng(1)
    arrays = PuzzleSet(
        inputs=rng.integers(0, 9, (7, 5)).astype(np.uint8),
        labels=rng.integers(0, 9, (7, 5)).astype(np.int16),
        puzzle_identifiers=np.array([4, 2, 0], np.int32),
        puzzle_indices=np.array([0, 2, 3, 7]),
        group_indices=np.array([0, 2, 3]),
        ratings=np.arange(7, dtype=np.int32),
    )
    single = PuzzleSet.of_single_examples(arrays.inputs, arrays.labels)
    for split in ("train", "test"):
        written = PuzzleDataset(
            split, 9, 5, 5, 0, None, 0, "print", {"name": "dihedral", "size": [1, 5]},
            {"all": arrays, "hard": single},
        )  # fmt: skip
        write_dataset(tmp_path, written, source="here")
        found = read_dataset(tmp_path, split)
        for key in ("vocab_size", "seq_len", "num_puzzle_identifiers", "pad_id", "augmentation"):
            assert getattr(found, key) == getattr(written, key)
        assert found.ignore_label_id is None and found.fingerprint == "print"
        for name in ("all", "hard"):
            for key, value in vars(written.sets[name]).items():
                got = getattr(found.sets[name], key)
                assert (got is None and value is None) or np.array_equal(got, value)
        assert found.rows_per_epoch == 2 + 4 + 7
    info = dataset_info(tmp_path)
    assert info.test_sets == {"all": 7, "hard": 7} and info.source == "here"
    assert info.num_train_examples == 13 and info.total_groups == 9
    assert json.loads(info.model_dump_json())["mean_puzzle_examples"] == 1.4


def test_an_ancestors_folder_is_read(tmp_path):
    path = ancestor_folder(tmp_path / "arc")
    assert FolderConfig(path=str(path)).prepare(tmp_path / "unused") == path
    assert not (tmp_path / "unused").exists()
    info = dataset_info(path)
    assert (info.num_puzzle_ids, info.num_train_examples, info.total_groups) == (9, 3 + 5, 2)
    assert info.augmentation is None and info.test_sets == {"all": 3}
    dataset = read_dataset(path, "train")
    assert dataset.sets["all"].puzzle_indices.tolist() == [0, 3, 5, 7, 12]
    before = info.fingerprint
    edit_array(path, "inputs", lambda a: put(a, (3, 3), (a[3, 3] + 1) % 12))
    assert dataset_info(path).fingerprint != before


def test_unknown_keys_and_a_label_to_ignore_outside_the_vocabulary_are_tolerated(tmp_path):
    path = ancestor_folder(tmp_path / "d")
    for split in ("train", "test"):
        file = path / split / "dataset.json"
        metadata = {**json.loads(file.read_text()), "ignore_label_id": -100, "comment": [1]}
        file.write_text(json.dumps(metadata))
    edit_array(path, "labels", lambda a: put(a, (0, 0), -100))
    assert read_dataset(path, "train").sets["all"].labels[0, 0] == -100


def remove(name):
    return lambda path: (path / "train" / name).unlink()


def overwrite(name, content):
    return lambda path: (path / "train" / name).write_bytes(content)


def truncate(name):
    def act(path):
        file = path / "train" / name
        file.write_bytes(file.read_bytes()[:-9])

    return act


BAD_FOLDERS = {
    "no test split": (lambda p: shutil.rmtree(p / "test"), "test/dataset.json is missing"),
    "no train split": (lambda p: shutil.rmtree(p / "train"), "train/dataset.json is missing"),
    "no inputs": (remove("all__inputs.npy"), "all__inputs.npy is missing"),
    "no labels": (remove("all__labels.npy"), "all__labels.npy is missing"),
    "no group indices": (remove("all__group_indices.npy"), "group_indices.npy is missing"),
    "broken json": (overwrite("dataset.json", b"{"), "not readable JSON"),
    "binary json": (overwrite("dataset.json", b"\xff\xfe\x00"), "not readable JSON"),
    "json list": (overwrite("dataset.json", b"[1]"), "JSON object"),
    "missing key": (lambda p: edit_json(p, vocab_size="DROP"), "vocab_size"),
    "text for a number": (lambda p: edit_json(p, seq_len="six"), "seq_len"),
    "bool for a number": (lambda p: edit_json(p, seq_len=True), "seq_len"),
    "negative pad": (lambda p: edit_json(p, pad_id=-1), "pad_id"),
    "pad outside": (lambda p: edit_json(p, pad_id=12), "pad_id 12"),
    "blank id outside": (lambda p: edit_json(p, blank_identifier_id=9), "blank_identifier_id 9"),
    "no sets": (lambda p: edit_json(p, sets=[]), "sets"),
    "unknown set": (lambda p: edit_json(p, sets=["easy"]), "easy__inputs.npy is missing"),
    "set twice": (lambda p: edit_json(p, sets=["all", "all"]), "twice"),
    "set leaves the folder": (lambda p: edit_json(p, sets=["../../x"]), "sets"),
    "other groups": (lambda p: edit_json(p, total_groups=7), "total_groups is 7"),
    "other length": (lambda p: edit_json(p, seq_len=7), "seq_len is 7"),
    "splits differ": (lambda p: edit_json(p, vocab_size=13), "vocab_size is 13"),
    "later format": (lambda p: edit_json(p, loopwright={"format": 2}), "format 2"),
    "unknown augmentation": (
        lambda p: edit_json(p, loopwright={"augmentation": {"name": "rotate"}}),
        "augmentation.name is 'rotate', but this version knows arc, dihedral, sudoku",
    ),
    "augmentation of another size": (
        lambda p: edit_json(p, loopwright={"augmentation": {"name": "dihedral", "size": [7, 7]}}),
        "augmentation.size must be [rows, columns]",
    ),
    "augmentation without its seed": (
        lambda p: edit_json(p, loopwright={"augmentation": {"name": "arc"}}),
        "augmentation.seed must be a number",
    ),
    "task without its box": (
        lambda p: edit_json(p, loopwright={"task": {"name": "sudoku"}}),
        "task.box must be one of",
    ),
    "task of another size": (
        lambda p: edit_json(p, loopwright={"task": {"name": "sudoku", "box": [3, 3]}}),
        "task.box=[3, 3] is of 81 tokens",
    ),
    "votes without augmentations": (
        lambda p: edit_json(p, loopwright={"task": {"name": "arc"}}),
        "must be arc, too",
    ),
    "odd augmentation": (lambda p: edit_json(p, loopwright={"augmentation": 3}), "augmentation"),
    "float inputs": (lambda p: edit_array(p, "inputs", lambda a: a / 2), "integers, not float64"),
    "flat inputs": (lambda p: edit_array(p, "inputs", np.ravel), "2 dimension"),
    "empty inputs": (lambda p: edit_array(p, "inputs", lambda a: a[:0]), "inputs.npy"),
    "short labels": (lambda p: edit_array(p, "labels", lambda a: a[:-1]), "shape"),
    "ids outside": (lambda p: edit_array(p, "puzzle_identifiers", lambda a: a + 8), "[0, num_"),
    "negative ids": (lambda p: edit_array(p, "puzzle_identifiers", lambda a: a - 9), "[0, num_"),
    "ids too few": (lambda p: edit_array(p, "puzzle_identifiers", lambda a: a[1:]), "entries"),
    "indices from 1": (lambda p: edit_array(p, "puzzle_indices", lambda a: a[1:]), "from 0"),
    "indices too far": (lambda p: edit_array(p, "group_indices", lambda a: a * 2), "from 0"),
    "indices fall": (
        lambda p: edit_array(p, "puzzle_indices", lambda a: a[[0, 2, 1, 3, 4]]),
        "must increase",
    ),
    "token outside": (
        lambda p: edit_array(p, "inputs", lambda a: put(a, (5, 2), 12)),
        "example 5 holds the token 12",
    ),
    "negative label": (
        lambda p: edit_array(p, "labels", lambda a: put(a, (1, 1), -1)),
        "example 1 holds the token -1",
    ),
    "truncated array": (truncate("all__inputs.npy"), "not a complete .npy"),
    "truncated indices": (truncate("all__group_indices.npy"), "not a complete .npy"),
    "not an array": (overwrite("all__labels.npy", b"hello"), "not a complete .npy"),
    "empty file": (overwrite("all__labels.npy", b""), "not a complete .npy"),
    "pickle": (
        lambda p: np.save(p / "train" / "all__labels.npy", np.array([{}]), allow_pickle=True),
        "not a complete .npy",
    ),
    "short ratings": (
        lambda p: np.save(p / "train" / "all__ratings.npy", np.zeros(3, np.int32)),
        "3 entries for 12 examples",
    ),
}


@pytest.mark.parametrize("name", BAD_FOLDERS)
def test_broken_folders_are_refused_in_one_sentence(tmp_path, name):
    spoil, expected = BAD_FOLDERS[name]
    path = ancestor_folder(tmp_path / "d")
    spoil(path)
    with pytest.raises(DataError) as caught:
        FolderConfig(path=str(path)).prepare(tmp_path)
    message = str(caught.value)
    assert expected in message and str(path) in message
    assert "\n" not in message and message.endswith(".")


def test_a_folder_that_is_none_and_augmentation_where_there_is_none(tmp_path):
    (tmp_path / "file").write_text("x")
    for path in ("missing", "file", ""):
        with pytest.raises(DataError, match=r"data.path|dataset.json is missing"):
            FolderConfig(path=str(tmp_path / path)).check()
    path = ancestor_folder(tmp_path / "d")
    with pytest.raises(DataError, match=r"data.num_aug=5.*data.num_aug=0"):
        FolderConfig(path=str(path), num_aug=5).check()


def test_preparing_is_idempotent_and_shared_by_all_num_aug(tmp_path, write_csv, rows):
    a = write_csv("a.csv", rows[:20])
    b = write_csv("b.csv.gz", rows[20:])
    config = SudokuConfig(train_csv=a, test_csv=b)
    folder = config.prepare(tmp_path / "sets")
    stamp = (folder / "train" / "all__inputs.npy").stat().st_mtime_ns
    assert config.prepare(tmp_path / "sets") == folder
    assert SudokuConfig(train_csv=a, test_csv=b, num_aug=7).prepare(tmp_path / "sets") == folder
    assert (folder / "train" / "all__inputs.npy").stat().st_mtime_ns == stamp
    write_csv("a.csv", rows[:19])
    assert config.prepare(tmp_path / "sets") != folder
    assert len(list((tmp_path / "sets").iterdir())) == 2


def test_an_interrupted_build_leaves_nothing(tmp_path):
    def build(folder):
        (folder / "train").mkdir()
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build_once(tmp_path / "sets" / "d", "f", build)
    assert not (tmp_path / "sets").exists()


def test_remains_of_a_killed_build_are_swept_after_a_day(tmp_path, sudoku4):
    old, new = tmp_path / ".d.1.tmp", tmp_path / ".d.2.tmp"
    for left in (old, new):
        left.mkdir()
    os.utime(old, (0, time.time() - 2 * 24 * 3600))
    fingerprint = dataset_info(sudoku4).fingerprint
    build_once(
        tmp_path / "d", fingerprint, lambda p: shutil.copytree(sudoku4, p, dirs_exist_ok=True)
    )
    assert not old.exists() and new.exists()


def test_a_damaged_or_foreign_dataset_in_its_place_is_named(tmp_path):
    config = SudokuConfig(box=(2, 2), num_train=20, num_test=5)
    folder = config.prepare(tmp_path)
    (folder / "train" / "all__labels.npy").unlink()
    with pytest.raises(DataError, match=r"damaged.*delete it"):
        config.prepare(tmp_path)
    other = SudokuConfig(box=(2, 2), num_train=21, num_test=5).prepare(tmp_path)
    shutil.rmtree(folder)
    other.rename(folder)
    with pytest.raises(DataError, match=r"another dataset.*delete it"):
        config.prepare(tmp_path)


def test_an_unusable_root_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match="choose a writable folder"):
        SudokuConfig(box=(2, 2), num_train=20, num_test=5).prepare(tmp_path / "file")


BUILD = """
import sys
from data import SudokuConfig
print(SudokuConfig(box=(2, 2), num_train=2000, num_test=100).prepare(sys.argv[1]))
"""


def test_concurrent_builds_do_not_clash(tmp_path):
    command = [sys.executable, "-c", BUILD, str(tmp_path)]
    root = Path(__file__).parents[2]
    workers = [subprocess.Popen(command, cwd=root, stdout=subprocess.PIPE) for _ in range(4)]
    folders = {worker.communicate(timeout=60)[0].decode().strip() for worker in workers}
    assert [worker.returncode for worker in workers] == [0] * 4
    assert len(folders) == 1 and [str(p) for p in tmp_path.iterdir()] == list(folders)
    assert len(read_dataset(folders.pop(), "train").sets["all"]) == 2000
