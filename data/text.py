"""Text as bytes, to predict the next one from those before it (causal training)."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, ClassVar, Literal

import numpy as np
from pydantic import Field, model_validator

from data.config import DatasetConfig, Paths, file_sha256
from data.errors import DataError
from data.progress import bar
from data.puzzles import OUTSIDE, PuzzleDataset, TokenStream
from data.streams import write_stream
from data.writing import write_metadata

logger = logging.getLogger(__name__)

_BUILDER = 1  # raise it when the same configuration gives another dataset
END_OF_TEXT = 256  # follows every file; bytes are their own tokens
_VOCAB_SIZE = 257
_PIECE_BYTES = 1 << 22
_SUFFIXES = (".txt", ".md", ".rst", ".py")

_Range = tuple[Path, int, int]  # file, first byte, end


class TextConfig(DatasetConfig):
    """`data=text data.files=[…] arch.causal=true`.

    A path is a file of any kind, a folder (its .txt, .md, .rst and .py files, with those of its
    subfolders) or a pattern such as docs/**/*.md. Without `test_files`, the end of every file is
    held out. The examples are windows of `seq_len` bytes, labelled by the bytes that follow.
    """

    causal: ClassVar[bool] = True

    name: Literal["text"] = "text"
    files: Paths = ()
    test_files: Paths = ()
    test_fraction: Annotated[float, Field(gt=0, lt=1)] = 0.1  # of every file, unless test_files
    seq_len: Annotated[int, Field(strict=True, ge=2, le=2**16)] = 256

    @model_validator(mode="after")
    def _keys_fit_together(self) -> TextConfig:
        if not self.files:
            raise ValueError("data.files=[] names no text; give at least one file or folder")
        if self.num_aug != 0:
            raise ValueError(f"data.num_aug={self.num_aug} must be 0: a text has no augmentation")
        return self

    def label(self) -> str:
        """Such as text-256."""
        return f"text-{self.seq_len}"

    def _find(self, key: str) -> list[Path]:
        """The files that the paths of a key mean, each once, in their order."""
        found: list[Path] = []
        for value in getattr(self, key):
            path = Path(value).expanduser()
            if path.is_dir():
                inside = (p for p in path.rglob("*") if p.suffix.lower() in _SUFFIXES)
                files = sorted(p for p in inside if p.is_file())
                hint = f"is a folder without {', '.join(_SUFFIXES)} files"
            elif path.is_file():
                files, hint = [path], ""
            elif any(map(_is_pattern, path.parts)):
                first = next(i for i, part in enumerate(path.parts) if _is_pattern(part))
                matches = Path(*path.parts[:first]).glob("/".join(path.parts[first:]))
                files, hint = sorted(p for p in matches if p.is_file()), "matches no file"
            else:
                files, hint = [], "does not exist"
            if not files:
                raise DataError(f"data.{key}={value} {hint}; give text files or a folder of them.")
            found += files
        found = list(dict.fromkeys(found))
        full = [path for path in found if path.stat().st_size > 0]
        if not full:
            raise DataError(f"data.{key}: every file is empty.")
        if len(full) < len(found):
            logger.warning("data.%s: %d files are empty", key, len(found) - len(full))
        return full

    def check(self) -> None:
        """Check that the files are there and hold enough."""
        train, test = self._splits()
        shared = {p.resolve() for p, _, _ in train} & {p.resolve() for p, _, _ in test}
        if self.test_files and shared:
            raise DataError(
                f"data.test_files: {sorted(shared)[0]} is among data.files, too; leave it out of "
                "one of them."
            )
        for split, ranges in (("training", train), ("test", test)):
            count = _count(ranges)
            if count <= self.seq_len:
                raise DataError(
                    f"data.seq_len={self.seq_len}: the {split} text has {count} tokens, fewer than "
                    "one window and its last label; give more text or a smaller data.seq_len."
                )

    def _splits(self) -> tuple[list[_Range], list[_Range]]:
        """What trains and what is held out: (file, first byte, end) each."""
        files = self._find("files")
        if self.test_files:
            tests = self._find("test_files")
            return tuple([(p, 0, p.stat().st_size) for p in part] for part in (files, tests))
        train, test = [], []
        for path in files:
            size = path.stat().st_size
            cut = size - round(size * self.test_fraction)
            train.append((path, 0, cut))
            if cut < size:
                test.append((path, cut, size))
        return train, test

    def planned_tokens(self) -> tuple[int, int]:
        """See `DatasetConfig.planned_tokens`."""
        return self.seq_len, _VOCAB_SIZE

    def identity(self) -> dict[str, object]:
        """All keys; files by their contents, in their order."""
        keys = self.model_dump(mode="json", exclude={"files", "test_files", "num_aug"})
        contents = {
            key: [file_sha256(path) for path in self._find(key)]
            for key in ("files", "test_files")
            if getattr(self, key)
        }
        return {"builder": _BUILDER, **keys, **contents}

    def build(self, folder: Path, fingerprint: str) -> None:
        """Write both splits as shards of tokens, reading some megabytes at a time."""
        for split, ranges in zip(("train", "test"), self._splits(), strict=True):
            total = _count(ranges)
            with bar(f"writing {split}", total, "token") as progress:
                lengths = write_stream(folder / split, "all", _tokens(ranges, progress), total)
            logger.info("%s: %d files, %d bytes", split, len(ranges), total - len(ranges))
            shards = tuple(np.broadcast_to(np.uint16(0), n) for n in lengths)  # for their lengths
            dataset = PuzzleDataset(
                split=split,
                vocab_size=_VOCAB_SIZE,
                seq_len=self.seq_len,
                num_puzzle_identifiers=1,
                pad_id=END_OF_TEXT,
                ignore_label_id=OUTSIDE,
                blank_identifier_id=0,
                fingerprint=fingerprint,
                augmentation=None,
                sets={"all": TokenStream(shards, self.seq_len)},
                task={"name": "text"},
            )
            source = " and ".join((*self.files, *self.test_files))
            write_metadata(folder, dataset, source=source, stream={"all": lengths})


def _is_pattern(part: str) -> bool:
    return any(c in part for c in "*?[")


def _count(ranges: list[_Range]) -> int:
    return sum(end - begin + 1 for _, begin, end in ranges)


def _tokens(ranges: list[_Range], progress: object) -> Iterator[np.ndarray]:
    """The bytes of every range, and the end of text after each."""
    for path, begin, end in ranges:
        with path.open("rb") as stream:
            stream.seek(begin)
            left = end - begin
            while left:
                piece = stream.read(min(left, _PIECE_BYTES))
                if not piece:
                    raise DataError(f"{path} became shorter while it was read; build again.")
                left -= len(piece)
                progress.update(len(piece))
                yield np.frombuffer(piece, np.uint8)
        yield np.array([END_OF_TEXT])
