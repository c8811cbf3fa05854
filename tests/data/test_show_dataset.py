"""The sheet of examples: one PNG for every kind of dataset."""

import importlib.util
from pathlib import Path

import pytest

from data.build import main as build
from tests.data.conftest import arc_set, write_kaggle

SCRIPT = Path(__file__).parents[2] / "scripts" / "show_dataset.py"


@pytest.fixture(scope="module")
def show():
    spec = importlib.util.spec_from_file_location("show_dataset", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.main


COMMANDS = {
    "sudoku": "sudoku box=[2,3] num_train=8 num_test=2",
    "maze": "maze size=[4,5] num_train=4 num_test=2",
    "arc": "arc test=arc-agi_evaluation_challenges.json num_aug=3",
    "text": "text files=text.txt seq_len=9",
    "mix": "mix parts=[{name:maze,size:[3,3],num_train:3,num_test:2}]",
}


@pytest.mark.parametrize("kind", COMMANDS)
def test_a_sheet_of_every_kind(tmp_path, monkeypatch, capsys, show, kind):
    monkeypatch.chdir(tmp_path)
    write_kaggle(tmp_path, "evaluation", arc_set(0, 3))
    Path("text.txt").write_bytes("naïve $x^2$ text\n\x00".encode() * 20)
    assert build([*COMMANDS[kind].split(), "out=sets"]) == 0
    folder = capsys.readouterr().out.strip()
    for split in ("train", "test"):
        show([folder, "--split", split, "--count", "2", "--out", f"{split}.png"])
        picture = Path(f"{split}.png").read_bytes()
        assert picture[:8] == b"\x89PNG\r\n\x1a\n" and len(picture) > 3000
    show([folder, "--count", "2"])
    assert Path(f"{Path(folder).name}.png").exists()


def test_refusals_are_one_sentence(tmp_path, show, sudoku4, capsys):
    for arguments, expected in (
        ([str(tmp_path / "none")], "is not a folder"),
        ([str(sudoku4), "--set", "hard"], "has the sets all"),
        ([str(sudoku4), "--count", "0"], "--count: 0 should be a whole number, 1 to 100"),
        ([str(sudoku4), "--out", str(tmp_path / "a.txt")], "must end in .png"),
        ([str(sudoku4), "--out", str(tmp_path / "no" / "a.png")], "is not a folder that can be"),
    ):
        with pytest.raises(SystemExit) as ended:
            show(arguments)
        message = capsys.readouterr().err
        assert ended.value.code == 2
        assert ": error: " in message and expected in message and message.count("\n") == 1
