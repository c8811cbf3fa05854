"""Files of the hub: downloaded once, refused with a way out where that is not possible."""

import importlib.util
import urllib.error
from types import SimpleNamespace

import pytest

from data import DataError, SudokuConfig, dataset_info, hub

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("huggingface_hub") is None, reason="huggingface_hub is not installed"
)
TRAIN, TEST = "hf:someone/puzzles/train.csv", "hf:someone/puzzles/test/hard.csv"


@pytest.fixture
def online(monkeypatch, write_csv, rows):
    """A hub with two files; what was downloaded from it."""
    files = {
        "train.csv": write_csv("train.csv", rows[:9]),
        "test/hard.csv": write_csv("hard.csv", rows[9:12]),
    }
    downloaded: list[str] = []

    def hf_hub_download(repository, name, *, repo_type, **_):
        assert (repository, repo_type) == ("someone/puzzles", "dataset")
        if name not in files:
            raise FileNotFoundError(f"404: no {name}\nwith a second line")
        downloaded.append(name)
        return files[name]

    monkeypatch.setattr("huggingface_hub.hf_hub_download", hf_hub_download)
    monkeypatch.setattr(
        "huggingface_hub.try_to_load_from_cache",
        lambda repository, name, repo_type: files[name] if name in downloaded else None,
    )
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    answer = SimpleNamespace(close=lambda: None)
    monkeypatch.setattr("urllib.request.urlopen", lambda *_, **__: answer)
    return downloaded


def test_files_are_downloaded_when_built_and_once(online, tmp_path):
    config = SudokuConfig(train_csv=TRAIN, test_csv={"hard": TEST})
    config.check()
    assert online == []  # a check downloads nothing
    info = dataset_info(config.prepare(tmp_path / "sets"))
    assert info.num_train_examples == 9 and info.test_sets == {"hard": 3}
    assert sorted(online) == ["test/hard.csv", "train.csv"]
    config.prepare(tmp_path / "sets")
    assert len(online) == 2


def test_a_file_that_is_not_there(online, tmp_path):
    with pytest.raises(DataError, match=r"FileNotFoundError: 404: no no\.csv.*=PATH") as caught:
        SudokuConfig(test_csv="hf:someone/puzzles/no.csv").prepare(tmp_path / "sets")
    assert "\n" not in str(caught.value)


def test_without_a_network(online, monkeypatch, tmp_path):
    def unreachable(*_, **__):
        raise urllib.error.URLError(OSError(-2, "Name or service not known"))

    monkeypatch.setattr("urllib.request.urlopen", unreachable)
    with pytest.raises(DataError, match=r"cannot be downloaded .*Name or service.*test_csv=PATH"):
        SudokuConfig(test_csv=TEST).prepare(tmp_path / "sets")
    assert online == [] and not (tmp_path / "sets").exists()


def test_an_answer_of_refusal_is_left_to_the_client(online, monkeypatch, tmp_path):
    def forbidden(*_, **__):
        raise urllib.error.HTTPError("https://x", 401, "Unauthorized", {}, None)

    monkeypatch.setattr("urllib.request.urlopen", forbidden)
    SudokuConfig(test_csv=TEST).prepare(tmp_path / "sets")
    assert online == ["test/hard.csv"]


def test_without_the_package(monkeypatch, tmp_path):
    monkeypatch.setattr(hub.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(DataError, match="needs the package huggingface_hub; install it"):
        SudokuConfig(test_csv=TEST).check()
