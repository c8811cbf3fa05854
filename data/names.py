"""Names of puzzles by their identifier, which is the row of their embedding."""

import json
from pathlib import Path

from data.arc import TASKS_FILE

IDENTIFIERS_FILE = "identifiers.json"  # of the ancestors' datasets: a list of names
_BLANK = "<blank>"  # as they name the identifier that belongs to no puzzle


def puzzle_names(path: str | Path) -> list[str] | None:
    """The names in a dataset's folder; None where it names none.

    A task of ours is named as it is; under its augmentation number N it is TASK|N.
    """
    path = Path(path)
    try:
        if (path / IDENTIFIERS_FILE).is_file():
            names = json.loads((path / IDENTIFIERS_FILE).read_text(encoding="utf-8"))
            return names if isinstance(names, list) else None
        tasks = json.loads((path / TASKS_FILE).read_text(encoding="utf-8"))["tasks"]
        about = json.loads((path / "test" / "dataset.json").read_text(encoding="utf-8"))
        variants = about["loopwright"]["augmentation"]["identifiers"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return [_BLANK, *(f"{t}|{n}" if n else t for t in tasks for n in range(variants))]
