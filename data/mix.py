"""Several datasets in one run, mixed by weight."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, SerializeAsAny, ValidationError, field_validator, model_validator

from data.config import DatasetConfig, build_once
from data.folder import FolderConfig
from data.format import dataset_info
from data.mixture import MIXTURE_FILE

_MOST_PARTS = 64
Weight = Annotated[float, Field(gt=0, le=1e6)]


class MixConfig(DatasetConfig):
    """`data=mix 'data.parts=[{name:sudoku,num_aug:100},datasets/other]' 'data.weights=[2,1]'`.

    A part is a dataset's keys with its `name`, or the path of a dataset folder. Each row of a batch
    comes from a part with a chance in proportion to its weight (equal ones by default). The parts
    need one token format: vocabulary, length, padding. Augmentations are those of the parts.
    """

    may_have_votes: ClassVar[bool] = True

    name: Literal["mix"] = "mix"
    parts: tuple[SerializeAsAny[DatasetConfig], ...]
    weights: tuple[Weight, ...] | None = None

    @field_validator("parts", mode="before")
    @classmethod
    def _build_parts(cls, given: object) -> object:
        if not isinstance(given, (list, tuple)) or not 1 <= len(given) <= _MOST_PARTS:
            raise ValueError(
                f"data.parts must be a list of 1 to {_MOST_PARTS} datasets, such as "
                "[{name:sudoku},datasets/other]"
            )
        return tuple(_part(number, part) for number, part in enumerate(given, 1))

    @model_validator(mode="after")
    def _keys_fit_together(self) -> MixConfig:
        if self.num_aug != 0:
            raise ValueError("data.num_aug belongs to each of data.parts; leave it out here")
        if self.weights is not None and len(self.weights) != len(self.parts):
            raise ValueError(
                f"data.weights has {len(self.weights)} numbers, but data.parts "
                f"{len(self.parts)} datasets; give one for each"
            )
        return self

    def _weights(self) -> tuple[float, ...]:
        return self.weights or (1.0,) * len(self.parts)

    def check(self) -> None:
        """Check every part."""
        for part in self.parts:
            part.check()

    def identity(self) -> dict[str, object]:
        """The parts by their fingerprints, with weights and augmentations."""
        return {
            "name": "mix",
            "parts": [
                [part.fingerprint(), part.num_aug, weight]
                for part, weight in zip(self.parts, self._weights(), strict=True)
            ],
        }

    def prepare(self, root: str | Path) -> Path:
        """Build the parts that are missing, and the mixture."""
        self.check()
        paths = [part.prepare(root) for part in self.parts]
        fingerprint = self.fingerprint()
        folder = Path(root) / f"mix-{fingerprint[:16]}"
        written = json.dumps(self._entries(paths, folder, fingerprint), indent=1) + "\n"

        def write(target: Path) -> None:
            (target / MIXTURE_FILE).write_text(written, encoding="utf-8")
            dataset_info(target)  # refuses parts that do not fit each other

        return build_once(folder, fingerprint, write)

    def _entries(self, paths: list[Path], folder: Path, fingerprint: str) -> dict[str, Any]:
        names: list[str] = []
        for part in self.parts:
            name = Path(part.path).name if isinstance(part, FolderConfig) else part.label()
            name = "".join(c if c.isalnum() or c in "_-." else "-" for c in name).lstrip("-_.")
            name = name.removesuffix(".") or "part"
            names.append(name if name not in names else f"{name}-{len(names) + 1}")
        return {
            "fingerprint": fingerprint,
            "parts": [
                {
                    "name": name,
                    "path": _place(path, part, folder),
                    "weight": weight,
                    "num_aug": part.num_aug,
                }
                for name, path, part, weight in zip(
                    names, paths, self.parts, self._weights(), strict=True
                )
            ],
        }


def _place(path: Path, part: DatasetConfig, folder: Path) -> str:
    """Built parts lie beside the mixture and move with it; the user's folders stay in place."""
    if isinstance(part, FolderConfig):
        return str(path.absolute())
    return os.path.relpath(path.absolute(), folder.absolute())


def _part(number: int, given: object) -> DatasetConfig:
    from data import DATASETS

    if isinstance(given, DatasetConfig):
        return given
    if isinstance(given, str):
        return FolderConfig(path=given)
    name = given.get("name") if isinstance(given, dict) else None
    known = sorted(set(DATASETS) - {"mix"})
    if name not in known:
        raise ValueError(
            f"data.parts: number {number} must be the path of a dataset folder, or keys with a "
            f"name, which is one of {', '.join(known)}"
        )
    try:
        return DATASETS[name].model_validate(given)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        key = ".".join(map(str, first["loc"]))
        message = first["msg"].removeprefix("Value error, ")
        raise ValueError(
            f"data.parts: number {number} ({name}): {key}{': ' if key else ''}{message}"
        ) from None
