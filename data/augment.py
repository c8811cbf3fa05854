"""Augmentations, executed in torch: pure functions of (seed, example, augmentation index).

A batch may hold any rows in any order; each row's result depends on its own numbers alone and is
the same on CPU and GPU (integer operations only). Index 0 is the identity.
"""

from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor

from data.augment_grids import ArcAugmentation, DihedralAugmentation
from data.augment_sudoku import SudokuAugmentation
from data.errors import DataError
from data.sudoku_rules import BOXES


class Augmentation(Protocol):
    """What a loader calls."""

    def __call__(
        self,
        inputs: Tensor,
        labels: Tensor,
        examples: Tensor,
        indices: Tensor,
        identifiers: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Transform inputs and labels (B, L).

        Of every row: the number of its example in the split, its augmentation index, and the
        puzzle identifier of its original, each (B,) int64.
        """


def _sudoku(spec: dict[str, Any], seed: int, device: torch.device, training: bool) -> Augmentation:
    box = spec.get("box")
    if not isinstance(box, (list, tuple)) or tuple(box) not in BOXES:
        raise DataError(f"loopwright.augmentation.box in dataset.json must be one of {BOXES}.")
    return SudokuAugmentation(tuple(box), seed=seed, device=device)


def _dihedral(
    spec: dict[str, Any], seed: int, device: torch.device, training: bool
) -> Augmentation:
    size = spec.get("size")
    if not (isinstance(size, (list, tuple)) and len(size) == 2
            and all(isinstance(n, int) and n > 0 for n in size)):  # fmt: skip
        raise DataError(
            "loopwright.augmentation.size in dataset.json must be [rows, columns] of the grid."
        )
    return DihedralAugmentation(tuple(size), device=device)


def _arc(spec: dict[str, Any], seed: int, device: torch.device, training: bool) -> Augmentation:
    if not (isinstance(spec.get("seed"), int) and spec["seed"] >= 0):
        raise DataError("loopwright.augmentation.seed in dataset.json must be a number from 0 on.")
    # The dataset's seed, not the run's: identifiers stand for augmentations, also in evaluation.
    return ArcAugmentation(seed=spec["seed"], translate=training, device=device)


_Builder = Callable[[dict[str, Any], int, torch.device, bool], Augmentation]
AUGMENTATIONS: dict[str, _Builder] = {
    "sudoku": _sudoku,
    "dihedral": _dihedral,
    "arc": _arc,
}


def build_augmentation(
    spec: dict[str, Any], *, seed: int, device: torch.device, training: bool = True
) -> Augmentation:
    """The augmentation that a dataset's `loopwright.augmentation` names.

    `training` admits changes that an evaluation has no use for, such as moving a grid about.

    Raises:
        DataError: an unknown name or bad parameters.
    """
    if spec["name"] not in AUGMENTATIONS:
        raise DataError(
            f"loopwright.augmentation.name is {spec['name']!r} in dataset.json, but this version "
            f"knows {sorted(AUGMENTATIONS)}."
        )
    return AUGMENTATIONS[spec["name"]](spec, seed, device, training)
