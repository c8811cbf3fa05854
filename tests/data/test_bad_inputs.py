"""Everything a user can get wrong about `data=sudoku`: one sentence that names the key or file."""

import gzip
from pathlib import Path

import pytest
from pydantic import ValidationError

from data import DATASETS, DataError, SudokuConfig

G4 = {"box": (2, 2)}
BAD_KEYS = {
    "box of one row": ({"box": (1, 9)}, "data.box=[1, 9]"),
    "box too large": ({"box": (4, 4)}, "data.box"),
    "box of three numbers": ({"box": (3, 3, 3)}, "data.box=[3, 3, 3]"),
    "box of text": ({"box": "3x3"}, "data.box=3x3"),
    "unknown key": ({"num_trian": 5}, "num_trian"),
    "no test puzzles": ({"num_test": 0}, "num_test"),
    "negative training puzzles": ({"num_train": -5}, "num_train"),
    "absurdly many": ({"num_train": 10**12}, "num_train"),
    "number as text": ({"num_train": "many"}, "num_train"),
    "number with a fraction": ({"num_train": 10.5}, "num_train"),
    "bool for a number": ({"num_train": True}, "num_train"),
    "negative augmentations": ({"num_aug": -2}, "num_aug"),
    "text augmentations": ({"num_aug": "all"}, "num_aug"),
    "augmented 4×4": ({**G4, "num_aug": 10}, "data.num_aug=10 must be 0"),
    "endless 4×4": ({**G4, "num_aug": -1}, "data.num_aug=-1 must be 0"),
    "negative seed": ({"seed": -1}, "seed"),
    "ratings crossed": ({"min_rating": 9, "max_rating": 3}, "data.min_rating=9"),
    "negative rating": ({"min_rating": -1}, "min_rating"),
    "hard 4×4": ({**G4, "min_rating": 1}, "data.min_rating=1 must be 0"),
    "too few clues": ({"num_clues": 16}, "within 17 to 80"),
    "too many clues": ({**G4, "num_clues": 16}, "within 4 to 15"),
    "clues crossed": ({"num_clues": (30, 20)}, "data.num_clues=[30, 20]"),
    "clues of three": ({"num_clues": (20, 25, 30)}, "data.num_clues=[20, 25, 30]"),
    "clues of text": ({"num_clues": "few"}, "data.num_clues=few"),
    "more grids than exist": ({**G4, "holdout_grids": 288}, "within 1 to 287"),
    "no held-out grid": ({**G4, "holdout_grids": 0}, "data.holdout_grids=0"),
    "held-out grids of 9×9": ({"holdout_grids": 5}, "data.holdout_grids is for"),
    "more 4×4 than exist": ({**G4, "num_train": 9_999_999, "num_clues": 6}, "data.num_train"),
    "more 4×4 tests than exist": (
        {**G4, "num_test": 9_000, "holdout_grids": 1, "num_clues": 5},
        "data.num_test=9000",
    ),
    "subsample of a test file": ({"test_csv": "t.csv", "max_train": 5}, "data.max_train needs"),
    "subsample of nothing": ({"max_train": 5}, "data.max_train needs"),
    "fraction of nothing": ({"test_fraction": 0.1}, "data.test_fraction needs"),
    "no test set": ({"train_csv": "t.csv"}, "data.test_csv"),
    "two test sets": (
        {"train_csv": "t.csv", "test_csv": "t.csv", "test_fraction": 0.1},
        "either data.test_csv",
    ),
    "whole fraction": ({"train_csv": "t.csv", "test_fraction": 1.0}, "test_fraction"),
    "empty path": ({"train_csv": ""}, "train_csv"),
    "generator key with a file": (
        {"train_csv": "t.csv", "test_csv": "u.csv", "num_train": 5},
        "use data.max_train",
    ),
    "minimal with a file": (
        {"train_csv": "t.csv", "test_csv": "u.csv", "minimal": True},
        "data.minimal",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD_KEYS)
def test_bad_keys(name):
    keys, expected = BAD_KEYS[name]
    with pytest.raises(ValidationError) as caught:
        SudokuConfig(**keys)
    errors = caught.value.errors()
    text = "; ".join(f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in errors)
    assert expected in text and "\n" not in text


def lines(change):
    """Rows of which the third is changed."""
    return lambda rows: [*rows[:2], change(*rows[2].split(",")), *rows[3:10]]


def row(source="s", question=None, answer=None, rating="1"):
    return ",".join(v for v in (source, question, answer, rating) if v is not None)


def second_solution(s, q, a, r):
    """Blank the clues of two digits, which may then change places."""
    return row(s, q.replace("1", ".").replace("2", "."), a, r)


BAD_ROWS = {
    "short question": (lines(lambda s, q, a, r: row(s, q[:-1], a, r)), "the question has 80 cells"),
    "long answer": (lines(lambda s, q, a, r: row(s, q, a + "1", r)), "the answer has 82 cells"),
    "letters": (lines(lambda s, q, a, r: row(s, "x" + q[1:], a, r)), "the question holds 'x'"),
    "not ASCII": (lines(lambda s, q, a, r: row(s, "é" + q[1:], a, r)), "the question holds 'é'"),
    "blank in the answer": (
        lines(lambda s, q, a, r: row(s, q, "." + a[1:], r)),
        "the answer holds '.' in cell 1",
    ),
    "zero in the answer": (lines(lambda s, q, a, r: row(s, q, "0" + a[1:], r)), "holds '0'"),
    "answer of another puzzle": (
        lines(lambda s, q, a, r: row(s, q, a[::-1], r)),
        "does not agree with the clues",
    ),
    "answer that is none": (
        lines(lambda s, q, a, r: row(s, "." * 81, a[1] + a[0] + a[2:], r)),
        "not a valid solution",
    ),
    "two solutions": (lines(second_solution), "more than one solution"),
    "no clues": (lines(lambda s, q, a, r: row(s, "." * 81, a, r)), "more than one solution"),
    "a field missing": (lines(lambda s, q, a, r: row(s, q, a, None)), "3 fields"),
    "a field too many": (lines(lambda s, q, a, r: row(s, q, a, r + ",7")), "5 fields"),
    "rating of text": (lines(lambda s, q, a, r: row(s, q, a, "hard")), "not 'hard'"),
    "negative rating": (lines(lambda s, q, a, r: row(s, q, a, "-3")), "not '-3'"),
    "fractional rating": (lines(lambda s, q, a, r: row(s, q, a, "1.5")), "not '1.5'"),
    "huge rating": (lines(lambda s, q, a, r: row(s, q, a, "9" * 12)), "not '9999"),
}


@pytest.mark.parametrize("which", ["train_csv", "test_csv"])
@pytest.mark.parametrize("name", BAD_ROWS)
def test_bad_rows_name_file_and_line(tmp_path, write_csv, rows, name, which):
    spoil, expected = BAD_ROWS[name]
    paths = {
        "train_csv": write_csv("good.csv.gz", rows[10:20]),
        "test_csv": write_csv("also.csv", rows[20:30]),
        which: write_csv("bad.csv", spoil(rows)),
    }
    with pytest.raises(DataError) as caught:
        SudokuConfig(**paths).prepare(tmp_path / "sets")
    message = str(caught.value)
    assert message.startswith(f"{paths[which]}, line 4: ") and expected in message
    assert message.endswith(".") and "\n" not in message
    assert not list((tmp_path / "sets").glob("*")) and not list((tmp_path / "sets").glob(".*"))


def write(name, content):
    def act(folder: Path) -> str:
        (folder / name).write_bytes(content)
        return str(folder / name)

    return act


def truncated(folder):
    text = ("source,question,answer,rating\n" + "a,b,c,d\n" * 5000).encode()
    return write("cut.csv.gz", gzip.compress(text)[:-20])(folder)


def unreadable_middle(folder):
    packed = bytearray(gzip.compress(bytes(range(256)) * 400, compresslevel=1))
    packed[20:60] = b"\x00" * 40
    return write("broken.csv.gz", bytes(packed))(folder)


BAD_FILES = {
    "missing": (lambda f: str(f / "none.csv"), "does not exist"),
    "a folder": (lambda f: str(f), "is a folder"),
    "other extension": (write("a.parquet", b"x"), "must end in .csv"),
    "an archive": (write("a.zip", b"x"), "must end in .csv or .csv.gz or .csv.xz"),
    "empty": (write("a.csv", b""), "is empty"),
    "header only": (write("a.csv", b"source,question,answer,rating\n"), "has no puzzles"),
    "blank lines only": (write("a.csv", b"source,question,answer,rating\n\n\n"), "has no puzzles"),
    "no header": (write("a.csv", b"s," + b"1" * 81 + b"," + b"1" * 81 + b",3\n"), "line 1"),
    "column missing": (write("a.csv", b"source,question,rating\n"), "lacks answer"),
    "column twice": (write("a.csv", b"question,answer,answer\n"), "twice"),
    "not UTF-8": (write("a.csv", b"source,question,answer,rating\n\xff\xfe\xe9,,,\n"), "UTF-8"),
    "UTF-16": (write("a.csv", "source,question".encode("utf-16")), "UTF-8"),
    "not gzip": (write("a.csv.gz", b"source,question,answer,rating\n"), "not a gzip file"),
    "truncated gzip": (truncated, "truncated or damaged gzip"),
    "damaged gzip": (unreadable_middle, "a"),
    "binary": (write("a.csv", bytes(range(128)) * 9), "a.csv"),
    "one endless field": (
        write("a.csv", b"source,question,answer,rating\n" + b"1" * 200_000), "not a CSV file",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD_FILES)
def test_bad_files(tmp_path, write_csv, rows, name):
    make, expected = BAD_FILES[name]
    path = make(tmp_path)
    with pytest.raises(DataError) as caught:
        SudokuConfig(train_csv=write_csv("good.csv", rows), test_csv=path).prepare(tmp_path / "s")
    message = str(caught.value)
    assert path in message and expected in message and "\n" not in message
    assert message.endswith(".")


def test_the_cheap_checks_read_no_more_than_the_header(tmp_path, write_csv, rows):
    config = SudokuConfig(
        train_csv=write_csv("a.csv", [*rows, "nonsense"]), test_csv=write_csv("b.csv", rows)
    )
    config.check()


def test_puzzles_in_both_files_are_refused(tmp_path, write_csv, rows):
    config = SudokuConfig(
        train_csv=write_csv("a.csv", rows[:10]), test_csv=write_csv("b.csv", rows[8:20])
    )
    with pytest.raises(DataError, match=r"b.csv, line 2: .*a.csv, line 10, too \(2 shared"):
        config.prepare(tmp_path)


def test_selections_that_leave_nothing(tmp_path, write_csv, rows):
    train, test = write_csv("a.csv", rows[:20]), write_csv("b.csv", rows[20:])
    plain = write_csv("c.csv", [",".join(r.split(",")[1:3]) for r in rows[:5]], "question,answer")
    same = write_csv("d.csv", rows[:1] * 3)
    for keys, expected in (
        ({"train_csv": train, "test_csv": test, "min_rating": 10_000}, "data.min_rating"),
        ({"train_csv": train, "test_csv": test, "max_train": 21}, "data.max_train=21"),
        ({"train_csv": plain, "test_csv": test, "min_rating": 1}, "rating column"),
        ({"train_csv": same, "test_fraction": 0.5}, "data.test_fraction=0.5"),
        ({"train_csv": train, "test_csv": test, "box": (2, 3)}, "needs 36"),
    ):
        with pytest.raises(DataError, match=expected):
            SudokuConfig(**keys).prepare(tmp_path / "s")


def test_a_generator_that_finds_too_little_gives_up(tmp_path):
    config = SudokuConfig(box=(2, 3), num_train=5, num_test=5, num_clues=8, min_rating=10_000)
    with pytest.raises(DataError, match=r"data.num_train=5: only 0 distinct.*data.min_rating"):
        config.prepare(tmp_path)
    # There are 25,728 puzzles of four clues.
    rare = SudokuConfig(box=(2, 2), num_train=30_000, num_clues=4)
    with pytest.raises(DataError, match=r"only \d+ distinct puzzles"):
        rare.prepare(tmp_path)


@pytest.mark.parametrize("name", DATASETS)
def test_every_dataset_is_a_frozen_config_that_names_itself(name):
    config = DATASETS[name]
    assert config.model_fields["name"].default == name
    assert config.model_config["extra"] == "forbid" and config.model_config["frozen"]
