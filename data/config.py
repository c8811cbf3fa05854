"""What every dataset's configuration has in common: checks first, then one atomic build."""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import shutil
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, ClassVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

from data.errors import DataError
from data.format import FORMAT_VERSION, dataset_info
from data.hub import PREFIX, download

logger = logging.getLogger(__name__)

_STALE_SECONDS = 24 * 3600  # an unfinished build of a killed process is swept after this time


def _listed(value: object) -> object:
    return (value,) if isinstance(value, str) and value else value


# A list of paths; a single one may be given as it is.
Paths = Annotated[
    tuple[Annotated[str, Field(min_length=1)], ...],
    BeforeValidator(_listed, json_schema_input_type=str),
]
NumAug = Annotated[int, Field(strict=True, ge=-1, le=10**9)]
Seed = Annotated[int, Field(strict=True, ge=0, lt=2**63)]


class DatasetConfig(BaseModel):
    """Base of all dataset configurations: a subclass is one file and one line in `DATASETS`.

    A subclass adds its keys and `name: Literal[...]`, and implements `check`, `identity` and
    `build`. Nothing here or there may import torch: wrong input is refused before it is loaded.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    causal: ClassVar[bool] = False  # whether the labels are the inputs to come
    may_have_votes: ClassVar[bool] = False  # whether its scorer may collect votes

    name: str
    # 0: none; N: an index from 0..N, 0 being the identity (the papers' "1k × 1000" is 1000);
    # -1: a fresh augmentation every time.
    num_aug: NumAug = 0

    def check(self) -> None:
        """Refuse what can be refused at once (a missing file, a wrong extension).

        Raises:
            DataError: with one sentence that names the key and the file.
        """
        raise NotImplementedError

    def identity(self) -> dict[str, object]:
        """Everything that decides the contents of the dataset, as JSON; file contents as hashes."""
        raise NotImplementedError

    def build(self, folder: Path, fingerprint: str) -> None:
        """Write both splits to the empty `folder`."""
        raise NotImplementedError

    def label(self) -> str:
        """Readable beginning of the dataset's folder name."""
        return self.name

    def fingerprint(self) -> str:
        """SHA-256 (hex) of `identity` and the format version."""
        text = json.dumps({"format": FORMAT_VERSION, **self.identity()}, sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()

    def planned_examples(self) -> int | None:
        """Training examples that `build` would write, where the keys tell."""
        return None

    def planned_tokens(self) -> tuple[int, int] | None:
        """Tokens of an example and size of the vocabulary that `build` would write, where known."""
        return None

    def test_only(self) -> DatasetConfig:
        """This configuration reduced to what an evaluation needs."""
        return self

    def prepare(self, root: str | Path) -> Path:
        """Build the dataset below `root` unless it is there; return its folder.

        The folder's name holds the fingerprint, so that one configuration is built once, and a
        changed source file gives another folder.

        Raises:
            DataError: the configuration or its files cannot be used, or `root` is not writable.
        """
        self.check()
        fingerprint = self.fingerprint()
        folder = Path(root) / f"{self.label()}-{fingerprint[:16]}"
        return build_once(folder, fingerprint, lambda path: self.build(path, fingerprint))


def build_once(folder: Path, fingerprint: str, build: Callable[[Path], None]) -> Path:
    """Return `folder`, made by `build(temporary sibling)` and one rename if it is missing.

    An interrupted build leaves no half dataset, and of two processes that build at the same time
    one wins and the other takes its result.
    """
    if folder.exists():
        return _require_intact(folder, fingerprint)
    started, root_is_new = time.monotonic(), not folder.parent.exists()
    temporary = folder.parent / f".{folder.name}.{uuid.uuid4().hex[:8]}.tmp"
    try:
        temporary.mkdir(parents=True)
    except OSError as error:
        raise DataError(
            f"The dataset cannot be built in {folder.parent}: {error.strerror}; "
            "choose a writable folder."
        ) from None
    try:
        _sweep(folder)
        build(temporary)
        try:
            temporary.rename(folder)
        except OSError:
            if not folder.exists():  # otherwise another process was faster
                raise
    except OSError as error:
        raise DataError(f"The dataset could not be written to {folder.parent}: {error}.") from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        if root_is_new:
            with contextlib.suppress(OSError):  # it holds the dataset, unless building failed
                folder.parent.rmdir()
    logger.info("built %s in %.1f s", folder, time.monotonic() - started)
    return _require_intact(folder, fingerprint)


def _require_intact(folder: Path, fingerprint: str) -> Path:
    try:
        found = dataset_info(folder).fingerprint
    except DataError as error:
        raise DataError(
            f"{folder} is damaged ({str(error).rstrip('.')}); delete it, and it is built again."
        ) from None
    if found != fingerprint:
        raise DataError(f"{folder} holds another dataset; delete it, and it is built again.")
    return folder


def _sweep(folder: Path) -> None:
    """Remove what killed builds of the same dataset left behind long ago."""
    for left in folder.parent.glob(f".{folder.name}.*.tmp"):
        if time.time() - left.stat().st_mtime > _STALE_SECONDS:
            logger.info("removing the unfinished build %s", left)
            shutil.rmtree(left, ignore_errors=True)


def require_file(key: str, value: str, suffixes: tuple[str, ...]) -> Path:
    """Check that `value`, given for `data.<key>`, is a readable, non-empty file of a known kind.

    A file on the hub is downloaded.
    """
    if value.startswith(PREFIX):
        value = download(key, value)
    path = Path(value).expanduser()
    if path.is_dir():
        raise DataError(f"data.{key}={value} is a folder; give a file ({' or '.join(suffixes)}).")
    if not path.is_file():
        raise DataError(f"data.{key}={value} does not exist; give the path of a file.")
    if not path.name.lower().endswith(suffixes):
        raise DataError(f"data.{key}={value} must end in {' or '.join(suffixes)}.")
    if not os.access(path, os.R_OK):
        raise DataError(f"data.{key}={value} is not readable; check its permissions.")
    if path.stat().st_size == 0:
        raise DataError(f"data.{key}={value} is empty.")
    return path


def file_sha256(path: Path) -> str:
    """SHA-256 (hex) of a file's contents."""
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while piece := stream.read(1 << 20):
            digest.update(piece)
    return digest.hexdigest()
