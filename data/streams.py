"""Token streams on disk, in nanoGPT's form: raw little-endian uint16, memory mapped.

    PATH/{train,test}/{set}__tokens_00000.bin, {set}__tokens_00001.bin, …

dataset.json says under loopwright.stream how many tokens each shard of each set has.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from data.errors import DataError
from data.puzzles import TokenStream

_DTYPE = np.dtype("<u2")
SHARD_TOKENS = 1 << 27  # of one file, at most
_SCAN_TOKENS = 1 << 25  # values are checked in pieces of this size


def _file(folder: Path, name: str, number: int) -> Path:
    return folder / f"{name}__tokens_{number:05d}.bin"


def read_stream(folder: Path, name: str, spec: Any, seq_len: int) -> TokenStream:
    """Map the shards of a set.

    Raises:
        DataError: a shard is missing or of another length than dataset.json says.
    """
    lengths = spec.get(name) if isinstance(spec, dict) else None
    if not (isinstance(lengths, list) and lengths
            and all(type(n) is int and n > 1 for n in lengths)):  # fmt: skip
        raise DataError(
            f"{folder / 'dataset.json'}: loopwright.stream must say how many tokens each shard of "
            f"{name} has."
        )
    shards = []
    for number, length in enumerate(lengths):
        file = _file(folder, name, number)
        if not file.is_file():
            raise DataError(f"{file} is missing.")
        size = file.stat().st_size
        if size != length * _DTYPE.itemsize:
            raise DataError(
                f"{file} has {size} bytes, but its {length} tokens need {length * 2}; it is "
                "truncated or of another dataset."
            )
        shards.append(np.memmap(file, _DTYPE, mode="r"))
    stream = TokenStream(tuple(shards), seq_len)
    if stream.group_sizes.sum() == 0:
        raise DataError(
            f"{folder}: {name} has fewer tokens than one window of seq_len {seq_len} and its label."
        )
    return stream


def check_stream(folder: Path, name: str, stream: TokenStream, vocab_size: int) -> None:
    """Require every token to lie within the vocabulary."""
    for number, shard in enumerate(stream.shards):
        for start in range(0, len(shard), _SCAN_TOKENS):
            piece = shard[start : start + _SCAN_TOKENS]
            if piece.max() >= vocab_size:
                place = start + int(np.argmax(piece >= vocab_size))
                raise DataError(
                    f"{_file(folder, name, number)}: place {place} holds the token "
                    f"{piece.max()}, but tokens must lie in [0, vocab_size = {vocab_size})."
                )


def write_stream(folder: Path, name: str, pieces: Iterator[np.ndarray], total: int) -> list[int]:
    """Write `total` tokens, which arrive in pieces, to shards of about equal size.

    Returns the tokens of each shard.
    """
    folder.mkdir(parents=True, exist_ok=True)
    shards = -(-total // SHARD_TOKENS)
    limit = -(-total // shards)
    lengths: list[int] = []
    rest = np.empty(0, _DTYPE)
    for number in range(shards):
        wanted = min(limit, total - number * limit)
        written = 0
        with _file(folder, name, number).open("wb") as stream:
            while written < wanted:
                if not len(rest):
                    rest = next(pieces).astype(_DTYPE)
                part, rest = rest[: wanted - written], rest[wanted - written :]
                stream.write(part.tobytes())
                written += len(part)
            stream.flush()
            os.fsync(stream.fileno())
        lengths.append(written)
    return lengths
