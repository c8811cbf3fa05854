"""Writing a dataset in the form that data/format.py reads."""

import json
import os
from pathlib import Path

import numpy as np

from data.format import FORMAT_VERSION
from data.puzzles import PuzzleDataset


def write_dataset(path: str | Path, dataset: PuzzleDataset, *, source: str | None = None) -> None:
    """Write one split of puzzles below `path`, synced to the disk.

    Use `build_once` to make it atomic.
    """
    folder = Path(path) / dataset.split
    folder.mkdir(parents=True, exist_ok=True)
    for name, arrays in dataset.sets.items():
        for key in ("inputs", "labels", "puzzle_identifiers", "puzzle_indices", "group_indices"):
            _save(folder / f"{name}__{key}.npy", getattr(arrays, key))
        if arrays.ratings is not None:
            _save(folder / f"{name}__ratings.npy", arrays.ratings.astype(np.int32))
    write_metadata(path, dataset, source=source)


def write_metadata(
    path: str | Path,
    dataset: PuzzleDataset,
    *,
    source: str | None,
    stream: dict[str, list[int]] | None = None,
) -> None:
    """Write dataset.json of one split below `path`; `stream` of sets that are token streams."""
    folder = Path(path) / dataset.split
    sets = dataset.sets.values()
    examples, puzzles = sum(map(len, sets)), sum(s.num_puzzles for s in sets)
    metadata = {
        "pad_id": dataset.pad_id,
        "ignore_label_id": dataset.ignore_label_id,
        "blank_identifier_id": dataset.blank_identifier_id,
        "vocab_size": dataset.vocab_size,
        "seq_len": dataset.seq_len,
        "num_puzzle_identifiers": dataset.num_puzzle_identifiers,
        "total_groups": sum(len(s.group_sizes) for s in sets),
        "mean_puzzle_examples": examples / puzzles,
        "total_puzzles": puzzles,
        "sets": list(dataset.sets),
        "loopwright": {
            "format": FORMAT_VERSION,
            "fingerprint": dataset.fingerprint,
            "augmentation": dataset.augmentation,
            "task": dataset.task,
            "source": source,
            **({} if stream is None else {"stream": stream}),
        },
    }
    with (folder / "dataset.json").open("w", encoding="utf-8") as stream:
        json.dump(metadata, stream, indent=2)
        stream.flush()
        os.fsync(stream.fileno())


def _save(file: Path, array: np.ndarray) -> None:
    with file.open("wb") as stream:
        np.save(stream, array, allow_pickle=False)
        stream.flush()
        os.fsync(stream.fileno())
