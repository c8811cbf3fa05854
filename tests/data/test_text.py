"""Text: every byte once, windows inside their shard, random but reproducible."""

import numpy as np
import pytest
import torch

from data import DataError, EvalLoader, TextConfig, TrainLoader, dataset_info, read_dataset
from data.puzzles import TokenStream
from data.text import END_OF_TEXT

CPU = torch.device("cpu")
L = 16


@pytest.fixture
def texts(tmp_path):
    rng = np.random.default_rng(0)
    for name, size in (("a.txt", 700), ("b.md", 303), ("sub/c.py", 1000), ("sub/d.bin", 50)):
        (tmp_path / "texts" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "texts" / name).write_bytes(rng.integers(0, 256, size, np.uint8).tobytes())
    return tmp_path / "texts"


def built(texts, tmp_path, split, **keys):
    config = TextConfig(**{"files": (str(texts),), "seq_len": L, **keys})
    return read_dataset(config.prepare(tmp_path / "sets"), split)


def stream(dataset) -> np.ndarray:
    return np.concatenate(dataset.sets["all"].shards)


def test_tokens_are_the_bytes_of_all_files(texts, tmp_path):
    train, test = (built(texts, tmp_path, s) for s in ("train", "test"))
    expected = {"train": [], "test": []}
    for name in ("a.txt", "b.md", "sub/c.py"):
        raw = list((texts / name).read_bytes())
        cut = len(raw) - round(len(raw) * 0.1)
        expected["train"] += [*raw[:cut], END_OF_TEXT]
        expected["test"] += [*raw[cut:], END_OF_TEXT]
    assert stream(train).tolist() == expected["train"]
    assert stream(test).tolist() == expected["test"]
    info = dataset_info(train.path)
    assert info.causal and info.vocab_size == 257 and info.seq_len == L
    assert info.num_train_examples == (len(expected["train"]) - 1) // L


def test_shards_and_pieces_change_nothing(texts, tmp_path, monkeypatch):
    whole = stream(built(texts, tmp_path, "train"))
    monkeypatch.setattr("data.streams.SHARD_TOKENS", 500)
    monkeypatch.setattr("data.text._PIECE_BYTES", 77)
    dataset = built(texts, tmp_path / "other", "train")
    shards = dataset.sets["all"].shards
    assert len(shards) == 4 and max(map(len, shards)) <= 500
    assert (stream(dataset) == whole).all()


def test_windows_are_labelled_by_what_follows(texts, tmp_path, monkeypatch):
    monkeypatch.setattr("data.streams.SHARD_TOKENS", 500)
    dataset = built(texts, tmp_path, "train")
    tokens, shards = stream(dataset), dataset.sets["all"].shards
    loaders = [
        TrainLoader(dataset, global_batch_size=11, seed=3, device=CPU, resident_bytes=size)
        for size in (0, 1 << 30)
    ]
    ends = np.cumsum([len(s) for s in shards])
    starts = []
    for step in range(60):
        batches = [loader.batch(step) for loader in loaders]
        assert all(torch.equal(batches[0][k], batches[1][k]) for k in batches[0])
        for begin, inputs, labels in zip(
            loaders[0].plan(step)[0], batches[0]["inputs"], batches[0]["labels"], strict=True
        ):
            shard = np.searchsorted(ends, begin, side="right")
            assert begin + L < ends[shard]
            assert inputs.tolist() == tokens[begin : begin + L].tolist()
            assert labels.tolist() == tokens[begin + 1 : begin + L + 1].tolist()
            starts.append(begin)
    n = loaders[0].rows_per_epoch
    assert n == sum((len(s) - 1) // L for s in shards)
    epochs = [np.sort(starts[i * n : (i + 1) * n]) for i in range(len(starts) // n)]
    for places in epochs:  # no overlap within a shard
        which = np.searchsorted(ends, places, side="right")
        gaps, same = np.diff(places), np.diff(which) == 0
        assert (gaps[same] >= L).all()
    assert len({tuple(e) for e in epochs}) == len(epochs) >= 3  # other windows every time


def test_evaluation_predicts_every_token_once(texts, tmp_path, monkeypatch):
    monkeypatch.setattr("data.streams.SHARD_TOKENS", 90)
    dataset = built(texts, tmp_path, "test")
    for resident in (0, 1 << 30):
        for world in (1, 2):
            labels = []
            for rank in range(world):
                loader = EvalLoader(
                    dataset, set_name="all", batch_size=4, device=CPU, resident_bytes=resident,
                    rank=rank, world_size=world,
                )  # fmt: skip
                for batch in loader:
                    assert batch["inputs"].min() >= 0 and batch["inputs"].max() <= END_OF_TEXT
                    labels += batch["labels"][batch["labels"] != -100].tolist()
            expected = [t for s in dataset.sets["all"].shards for t in s[1:].tolist()]
            assert sorted(labels) == sorted(expected)


def test_given_test_files_and_patterns(texts, tmp_path):
    config = {"files": (f"{texts}/*.txt", str(texts / "sub")), "test_files": (f"{texts}/**/*.md",)}
    train, test = (built(texts, tmp_path, s, **config) for s in ("train", "test"))
    assert len(stream(train)) == 700 + 1000 + 2 and len(stream(test)) == 303 + 1


def test_the_order_of_an_epoch_is_seeded(texts, tmp_path):
    dataset = built(texts, tmp_path, "train")
    args = {"global_batch_size": 9, "device": CPU}
    a, b, c = (TrainLoader(dataset, seed=s, **args).plan(4) for s in (1, 1, 2))
    assert (a == b).all() and (a != c).any()
    with pytest.raises(DataError, match="num_aug=3: a text has no augmentation"):
        TrainLoader(dataset, seed=0, num_aug=3, **args)


def test_damaged_shards_are_refused(texts, tmp_path):
    dataset = built(texts, tmp_path, "train")
    file = next((dataset.path / "train").glob("*.bin"))
    whole = file.read_bytes()
    file.write_bytes(whole[:-3])
    with pytest.raises(DataError, match=r"tokens_00000\.bin has \d+ bytes, but its"):
        read_dataset(dataset.path, "train")
    file.write_bytes(whole[:-2] + b"\xff\xff")
    with pytest.raises(DataError, match=r"holds the token 65535"):
        read_dataset(dataset.path, "train")
    file.unlink()
    with pytest.raises(DataError, match="is missing"):
        read_dataset(dataset.path, "train")


def test_lengths_of_a_stream():
    text = TokenStream((np.zeros(33, np.uint16), np.zeros(5, np.uint16)), 16)
    assert len(text) == 2 + 1 and text.group_sizes.tolist() == [2, 0]
