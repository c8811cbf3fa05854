"""A mixture of datasets: a folder with mix.json, which says where they are and how they weigh.

    {"fingerprint": …, "parts": [{"name", "path", "weight", "num_aug"}, …]}

Paths are absolute or relative to the folder. The parts have one token format; their puzzle
identifiers are counted one after the other.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from data.errors import DataError
from data.puzzles import DatasetInfo, Part, PuzzleDataset

MIXTURE_FILE = "mix.json"
_SAME = ("vocab_size", "seq_len", "pad_id", "ignore_label_id")


class PartEntry(BaseModel):
    """One dataset of mix.json."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][\w.\-]*$")]
    path: str
    weight: Annotated[float, Field(gt=0, allow_inf_nan=False)]
    num_aug: Annotated[int, Field(strict=True, ge=-1)]


class Mixture(BaseModel):
    """mix.json."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    fingerprint: str
    parts: Annotated[list[PartEntry], Field(min_length=1)]


def is_mixture(path: Path) -> bool:
    """Whether a dataset folder is a mixture."""
    return (path / MIXTURE_FILE).is_file()


def _read(path: Path) -> Mixture:
    file = path / MIXTURE_FILE
    try:
        return Mixture.model_validate(json.loads(file.read_text(encoding="utf-8")))
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(map(str, first["loc"]))
        raise DataError(f"{file}: {key}: {first['msg']}.") from None
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"{file} is not readable JSON ({error}).") from None


def _require_same(mixture: Mixture, described: list[Any]) -> None:
    for entry, other in zip(mixture.parts[1:], described[1:], strict=True):
        for key in _SAME:
            here, there = getattr(described[0], key), getattr(other, key)
            if here != there:
                raise DataError(
                    f"data.parts: {key} is {here} in {mixture.parts[0].name} and {there} in "
                    f"{entry.name}; datasets that are mixed need the same token format."
                )


def read_mixture(path: Path, split: str, read: Callable[[Path], PuzzleDataset]) -> PuzzleDataset:
    """One split of all parts; `read` reads that of one.

    Raises:
        DataError: a part is broken, or the parts do not fit each other.
    """
    mixture = _read(path)
    datasets = [read(path / entry.path) for entry in mixture.parts]
    _require_same(mixture, datasets)
    parts, sets, first = [], {}, 0
    for entry, dataset in zip(mixture.parts, datasets, strict=True):
        dataset = replace(dataset, first_identifier=first)
        first += dataset.num_puzzle_identifiers
        parts.append(Part(dataset, entry.weight, entry.num_aug))
        sets |= {f"{entry.name}.{name}": arrays for name, arrays in dataset.sets.items()}
    same = {key: getattr(datasets[0], key) for key in _SAME}
    return PuzzleDataset(
        split=split,
        **same,
        num_puzzle_identifiers=first,
        blank_identifier_id=0,
        fingerprint=mixture.fingerprint,
        augmentation=None,
        sets=sets,
        path=path,
        parts=tuple(parts),
    )


def mixture_info(path: Path, describe: Callable[[Path], DatasetInfo]) -> DatasetInfo:
    """What a run needs to know of a mixture; `describe` describes one part."""
    mixture = _read(path)
    infos = [describe(path / entry.path) for entry in mixture.parts]
    _require_same(mixture, infos)
    for entry, info in zip(mixture.parts, infos, strict=True):
        if info.num_train_examples == 0:
            raise DataError(f"data.parts: {entry.name} has a test split only; nothing to mix in.")
    same = {key: getattr(infos[0], key) for key in _SAME}
    groups = sum(info.total_groups for info in infos)
    return DatasetInfo(
        **same,
        blank_identifier_id=0,
        num_puzzle_ids=sum(info.num_puzzle_ids for info in infos),
        num_train_examples=sum(info.num_train_examples for info in infos),
        total_groups=groups,
        mean_puzzle_examples=sum(i.mean_puzzle_examples * i.total_groups for i in infos) / groups,
        test_sets={
            f"{entry.name}.{name}": count
            for entry, info in zip(mixture.parts, infos, strict=True)
            for name, count in info.test_sets.items()
        },
        augmentation=None,
        fingerprint=mixture.fingerprint,
        source=" and ".join(str(entry.path) for entry in mixture.parts),
        causal=any(info.causal for info in infos),
    )
