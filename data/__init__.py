"""Datasets: configurations, builders, the on-disk format, loaders and augmentation.

Importing this package loads NumPy and pydantic only. The names that need torch (`TrainLoader`,
`EvalLoader`, `AUGMENTATIONS`, `build_augmentation`) are imported when they are first asked for, so
that wrong input is refused before torch is loaded.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from data.arc import ArcConfig
from data.config import DatasetConfig
from data.errors import DataError
from data.folder import FolderConfig
from data.format import dataset_info, read_dataset
from data.maze import MazeConfig
from data.mix import MixConfig
from data.names import puzzle_names
from data.puzzles import DatasetInfo, PuzzleDataset, PuzzleSet
from data.scoring import ScoredRows, build_scorer
from data.sudoku import SudokuConfig
from data.text import TextConfig
from data.writing import write_dataset

if TYPE_CHECKING:
    from data.augment import AUGMENTATIONS, build_augmentation
    from data.eval_loader import EvalLoader
    from data.loader import TrainLoader
    from data.workers import WorkerLoader, make_train_loader

# A new dataset is one file and one line here.
DATASETS: dict[str, type[DatasetConfig]] = {
    "sudoku": SudokuConfig,
    "maze": MazeConfig,
    "arc": ArcConfig,
    "text": TextConfig,
    "mix": MixConfig,
    "folder": FolderConfig,
}

_LAZY = {
    "TrainLoader": "data.loader",
    "EvalLoader": "data.eval_loader",
    "WorkerLoader": "data.workers",
    "make_train_loader": "data.workers",
    "AUGMENTATIONS": "data.augment",
    "build_augmentation": "data.augment",
}

__all__ = [
    "AUGMENTATIONS",
    "DATASETS",
    "ArcConfig",
    "DataError",
    "DatasetConfig",
    "DatasetInfo",
    "EvalLoader",
    "FolderConfig",
    "MazeConfig",
    "MixConfig",
    "PuzzleDataset",
    "PuzzleSet",
    "ScoredRows",
    "SudokuConfig",
    "TextConfig",
    "TrainLoader",
    "WorkerLoader",
    "build_augmentation",
    "build_scorer",
    "dataset_info",
    "make_train_loader",
    "puzzle_names",
    "read_dataset",
    "write_dataset",
]


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(import_module(_LAZY[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
