"""What a dataset's metadata name: its task and its augmentation, with parameters that fit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from data.errors import DataError
from data.sudoku_rules import BOXES

KNOWN_AUGMENTATIONS = ("arc", "dihedral", "sudoku")
_ARC_TOKENS = 900


def check_task(file: Path, task: dict[str, Any], seq_len: int, augmentation: Any) -> None:
    """Raise DataError if a task that is known here lacks what its scorer needs.

    Of an unknown task there are no more than the plain metrics.
    """
    where = f"{file}: loopwright.task"
    if task["name"] == "sudoku":
        _check_box(where, task, seq_len)
    elif task["name"] == "maze":
        _check_size(where, task, seq_len)
    elif task["name"] == "arc" and (augmentation or {}).get("name") != "arc":
        raise DataError(f"{where} is arc, whose loopwright.augmentation must be arc, too.")


def check_augmentation(file: Path, spec: dict[str, Any], seq_len: int) -> None:
    """Raise DataError if an augmentation is unknown or its parameters do not fit."""
    where = f"{file}: loopwright.augmentation"
    if spec["name"] == "sudoku":
        _check_box(where, spec, seq_len)
    elif spec["name"] == "dihedral":
        _check_size(where, spec, seq_len)
    elif spec["name"] == "arc":
        for key, least in (("seed", 0), ("identifiers", 1)):
            if type(spec.get(key)) is not int or spec[key] < least:
                raise DataError(f"{where}.{key} must be a number from {least} on.")
        if seq_len != _ARC_TOKENS:
            raise DataError(f"{where} is arc, of {_ARC_TOKENS} tokens, but seq_len is {seq_len}.")
    else:
        raise DataError(
            f"{where}.name is {spec['name']!r}, but this version knows "
            f"{', '.join(KNOWN_AUGMENTATIONS)}."
        )


def _check_box(where: str, spec: dict[str, Any], seq_len: int) -> None:
    box = spec.get("box")
    if not isinstance(box, (list, tuple)) or tuple(box) not in BOXES:
        raise DataError(f"{where}.box must be one of {', '.join(str(list(b)) for b in BOXES)}.")
    if (box[0] * box[1]) ** 2 != seq_len:
        raise DataError(
            f"{where}.box={list(box)} is of {(box[0] * box[1]) ** 2} tokens, but seq_len is "
            f"{seq_len}."
        )


def _check_size(where: str, spec: dict[str, Any], seq_len: int) -> None:
    size = spec.get("size")
    whole = isinstance(size, (list, tuple)) and len(size) == 2
    if not (whole and all(type(n) is int and n > 0 for n in size) and size[0] * size[1] == seq_len):
        raise DataError(f"{where}.size must be [rows, columns] of the {seq_len} tokens.")
