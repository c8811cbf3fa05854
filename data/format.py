"""The on-disk format: the ancestors' (HRM, TRM), with extras of our own under one key.

    PATH/{train,test}/dataset.json                metadata of the split
    PATH/{train,test}/{set}__inputs.npy           (examples, seq_len) tokens
    PATH/{train,test}/{set}__labels.npy           (examples, seq_len) tokens
    PATH/{train,test}/{set}__puzzle_identifiers.npy  (puzzles,) row of the puzzle embedding
    PATH/{train,test}/{set}__puzzle_indices.npy   (puzzles + 1,) first example of each puzzle
    PATH/{train,test}/{set}__group_indices.npy    (groups + 1,) first puzzle of each group
    PATH/{train,test}/{set}__ratings.npy          (examples,) int32 difficulty; optional, ours

A group is what belongs together (a task with its variants on disk); one epoch visits every group
once. Our extras in dataset.json: `"loopwright": {"format", "fingerprint", "augmentation", "task",
"source"}`. Everything here is NumPy only; nothing is unpickled.
"""

import hashlib
import json
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from data.errors import DataError
from data.mixture import is_mixture, mixture_info, read_mixture
from data.named import check_augmentation, check_task
from data.puzzles import DatasetInfo, PuzzleDataset, PuzzleSet, TokenStream
from data.streams import check_stream, read_stream

FORMAT_VERSION = 1
_MMAP_BYTES = 16 << 20  # token arrays above this size stay on the disk, memory mapped
_SCAN_BYTES = 64 << 20  # values are checked in pieces of this size
_PROBE_BYTES = 1 << 20  # of each end of a foreign file that go into its fingerprint

Natural = Annotated[int, Field(strict=True, ge=0)]
Positive = Annotated[int, Field(strict=True, ge=1)]


class Metadata(BaseModel):
    """dataset.json of one split; keys that we do not know are tolerated."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    pad_id: Natural
    ignore_label_id: Annotated[int, Field(strict=True)] | None
    blank_identifier_id: Natural
    vocab_size: Positive
    seq_len: Positive
    num_puzzle_identifiers: Positive
    total_groups: Positive
    mean_puzzle_examples: Annotated[float, Field(gt=0)]
    sets: Annotated[
        list[Annotated[str, Field(pattern=r"^[A-Za-z0-9][\w.\-]*$")]], Field(min_length=1)
    ]
    loopwright: dict[str, Any] = {}


def read_dataset(path: str | Path, split: str, *, verify: bool = True) -> PuzzleDataset:
    """Read one split; with `verify` every token is checked to lie within the vocabulary.

    Raises:
        DataError: anything is missing, of a wrong type or shape, or inconsistent.
    """
    path = Path(path)
    if is_mixture(path):
        return read_mixture(path, split, lambda part: read_dataset(part, split, verify=verify))
    meta = _read_metadata(path, split)
    stream = meta.loopwright.get("stream")
    sets = {
        name: _read_set(path / split, name, meta)
        if stream is None
        else read_stream(path / split, name, stream, meta.seq_len)
        for name in meta.sets
    }
    groups = sum(len(s.group_sizes) for s in sets.values())
    if groups != meta.total_groups:
        raise DataError(
            f"{path / split / 'dataset.json'}: total_groups is {meta.total_groups}, "
            f"but the arrays hold {groups} groups."
        )
    if verify:
        for name, arrays in sets.items():
            if isinstance(arrays, TokenStream):
                check_stream(path / split, name, arrays, meta.vocab_size)
                continue
            _check_tokens(path / split / f"{name}__inputs.npy", arrays.inputs, meta, None)
            _check_tokens(
                path / split / f"{name}__labels.npy", arrays.labels, meta, meta.ignore_label_id
            )
    return PuzzleDataset(
        split=split,
        vocab_size=meta.vocab_size,
        seq_len=meta.seq_len,
        num_puzzle_identifiers=meta.num_puzzle_identifiers,
        pad_id=meta.pad_id,
        ignore_label_id=meta.ignore_label_id,
        blank_identifier_id=meta.blank_identifier_id,
        fingerprint=_fingerprint(path, meta),
        augmentation=_named(path, split, meta, "augmentation"),
        sets=sets,
        task=_named(path, split, meta, "task"),
        path=path,
    )


def dataset_info(path: str | Path) -> DatasetInfo:
    """Describe a dataset from its metadata and index arrays, without reading its tokens.

    Raises:
        DataError: a split is missing or broken, or the two splits do not fit each other.
    """
    if is_mixture(Path(path)):
        return mixture_info(Path(path), dataset_info)
    test = read_dataset(path, "test", verify=False)
    if not (Path(path) / "train").exists():  # a dataset for evaluation
        train, groups, per_puzzle = test, 0, 0.0
    else:
        train = read_dataset(path, "train", verify=False)
        groups = _read_metadata(Path(path), "train").total_groups
        puzzles = sum(s.num_puzzles for s in train.sets.values())
        per_puzzle = sum(len(s) for s in train.sets.values()) / puzzles
    for key in ("vocab_size", "seq_len", "pad_id", "ignore_label_id", "num_puzzle_identifiers"):
        here, there = getattr(train, key), getattr(test, key)
        if here != there:
            raise DataError(
                f"{path}: {key} is {here} in train/dataset.json and {there} in test/dataset.json; "
                "both splits need the same."
            )
    return DatasetInfo(
        vocab_size=train.vocab_size,
        seq_len=train.seq_len,
        pad_id=train.pad_id,
        ignore_label_id=train.ignore_label_id,
        blank_identifier_id=train.blank_identifier_id,
        num_puzzle_ids=train.num_puzzle_identifiers,
        num_train_examples=train.rows_per_epoch if groups else 0,
        total_groups=groups,
        mean_puzzle_examples=per_puzzle,
        test_sets={name: len(s) for name, s in test.sets.items()},
        augmentation=train.augmentation,
        fingerprint=train.fingerprint,
        source=_read_metadata(Path(path), train.split).loopwright.get("source"),
        task=train.task,
        causal=any(isinstance(s, TokenStream) for s in test.sets.values()),
    )


def _read_metadata(path: Path, split: str) -> Metadata:
    file = path / split / "dataset.json"
    if not path.is_dir():
        raise DataError(f"{path} is not a folder; a dataset is a folder with train/ and test/.")
    if not file.is_file():
        raise DataError(f"{file} is missing; a dataset has a dataset.json in train/ and test/.")
    try:
        raw = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise DataError(f"{file} is not readable JSON ({error}).") from None
    if not isinstance(raw, dict):
        raise DataError(f"{file} must hold a JSON object, not a {type(raw).__name__}.")
    try:
        meta = Metadata.model_validate(raw)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(map(str, first["loc"]))
        raise DataError(f"{file}: {key}: {first['msg']}.") from None
    if meta.pad_id >= meta.vocab_size:
        raise DataError(f"{file}: pad_id {meta.pad_id} must be below vocab_size {meta.vocab_size}.")
    if meta.blank_identifier_id >= meta.num_puzzle_identifiers:
        raise DataError(
            f"{file}: blank_identifier_id {meta.blank_identifier_id} must be below "
            f"num_puzzle_identifiers {meta.num_puzzle_identifiers}."
        )
    if len(set(meta.sets)) != len(meta.sets):
        raise DataError(f"{file}: sets names a set twice: {meta.sets}.")
    version = meta.loopwright.get("format", FORMAT_VERSION)
    if version != FORMAT_VERSION:
        raise DataError(
            f"{file}: this is format {version}, but this version reads format {FORMAT_VERSION}; "
            "build the dataset again."
        )
    return meta


def _named(path: Path, split: str, meta: Metadata, key: str) -> dict[str, Any] | None:
    spec = meta.loopwright.get(key)
    if spec is not None and not (isinstance(spec, dict) and isinstance(spec.get("name"), str)):
        raise DataError(
            f"{path / split / 'dataset.json'}: loopwright.{key} must be null or an object "
            "with a name."
        )
    file = path / split / "dataset.json"
    if spec is not None and key == "augmentation":
        check_augmentation(file, spec, meta.seq_len)
    elif spec is not None:
        check_task(file, spec, meta.seq_len, meta.loopwright.get("augmentation"))
    return spec


def _load(file: Path, ndim: int) -> np.ndarray:
    """Open an integer array; large ones stay memory mapped."""
    if not file.is_file():
        raise DataError(f"{file} is missing.")
    try:
        array = np.load(file, mmap_mode="r", allow_pickle=False)
    except Exception as error:  # the header parser raises ValueError, SyntaxError, EOFError, …
        reason = str(error).splitlines()[0].rstrip(".") if str(error) else type(error).__name__
        raise DataError(f"{file} is not a complete .npy array ({reason}).") from None
    if not isinstance(array, np.ndarray) or array.dtype.kind not in "iu":
        found = getattr(array, "dtype", type(array).__name__)
        raise DataError(f"{file} must hold integers, not {found}.")
    if array.ndim != ndim or array.size == 0:
        raise DataError(
            f"{file} must be a non-empty array of {ndim} dimension(s), not of shape {array.shape}."
        )
    return array if array.nbytes > _MMAP_BYTES else np.array(array)


def _read_set(folder: Path, name: str, meta: Metadata) -> PuzzleSet:
    def file(array: str) -> Path:
        return folder / f"{name}__{array}.npy"

    inputs, labels = _load(file("inputs"), 2), _load(file("labels"), 2)
    if inputs.shape[1] != meta.seq_len:
        raise DataError(
            f"{file('inputs')} has rows of {inputs.shape[1]} tokens, but seq_len is {meta.seq_len}."
        )
    if labels.shape != inputs.shape:
        raise DataError(
            f"{file('labels')} has shape {labels.shape}, but the inputs have {inputs.shape}."
        )
    identifiers = _load(file("puzzle_identifiers"), 1)
    if identifiers.min() < 0 or identifiers.max() >= meta.num_puzzle_identifiers:
        raise DataError(
            f"{file('puzzle_identifiers')} must lie in [0, num_puzzle_identifiers = "
            f"{meta.num_puzzle_identifiers}), but spans {identifiers.min()} to {identifiers.max()}."
        )
    puzzles = _read_indices(file("puzzle_indices"), len(inputs), "examples")
    if len(puzzles) != len(identifiers) + 1:
        raise DataError(
            f"{file('puzzle_indices')} has {len(puzzles)} entries, but {len(identifiers)} puzzles "
            f"need {len(identifiers) + 1}."
        )
    groups = _read_indices(file("group_indices"), len(identifiers), "puzzles")
    ratings = None
    if file("ratings").exists():
        ratings = _load(file("ratings"), 1)
        if len(ratings) != len(inputs):
            raise DataError(
                f"{file('ratings')} has {len(ratings)} entries for {len(inputs)} examples."
            )
    return PuzzleSet(inputs, labels, identifiers.astype(np.int32), puzzles, groups, ratings)


def _read_indices(file: Path, total: int, what: str) -> np.ndarray:
    indices = _load(file, 1).astype(np.int64)
    if len(indices) < 2 or indices[0] != 0 or indices[-1] != total:
        raise DataError(
            f"{file} must run from 0 to the number of {what} ({total}), "
            f"but runs from {indices[0]} to {indices[-1]}."
        )
    if (np.diff(indices) <= 0).any():
        raise DataError(f"{file} must increase from entry to entry.")
    return indices


def _check_tokens(file: Path, tokens: np.ndarray, meta: Metadata, ignored: int | None) -> None:
    """Require 0 ≤ token < vocab_size, except where a label is the ignored one."""
    rows = max(1, _SCAN_BYTES // max(1, tokens.shape[1] * tokens.itemsize))
    for start in range(0, len(tokens), rows):
        piece = tokens[start : start + rows]
        if piece.min() >= 0 and piece.max() < meta.vocab_size:
            continue
        bad = (piece < 0) | (piece >= meta.vocab_size)
        if ignored is not None:
            bad &= piece != ignored
        if bad.any():
            row, column = np.argwhere(bad)[0]
            raise DataError(
                f"{file}: example {start + row} holds the token {piece[row, column]}, but tokens "
                f"must lie in [0, vocab_size = {meta.vocab_size})."
            )


def _fingerprint(path: Path, meta: Metadata) -> str:
    """Ours as recorded; of a foreign folder: its metadata, and size and both ends of each array."""
    if isinstance(recorded := meta.loopwright.get("fingerprint"), str):
        return recorded
    digest = hashlib.sha256()
    for file in sorted(path.glob("t*/*")):
        if file.parent.name in ("train", "test") and file.suffix in (".json", ".npy"):
            size = file.stat().st_size
            digest.update(f"{file.parent.name}/{file.name}:{size}\n".encode())
            with file.open("rb") as stream:
                digest.update(stream.read(_PROBE_BYTES))
                stream.seek(max(0, size - _PROBE_BYTES))
                digest.update(stream.read())
    return digest.hexdigest()
