"""Errors that a user can mend: one sentence, exit code 2, never a traceback."""

from __future__ import annotations

import contextlib
import difflib
import errno
import os
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

EXIT_BAD_INPUT = 2
EXIT_INTERRUPTED = 130
_LONGEST = 1200  # characters of a message
# What the system refuses through no fault of the program: a full disk, a folder without rights.
_OUTSIDE = ("ENOSPC", "EDQUOT", "EFBIG", "EROFS", "EACCES", "EPERM", "EIO", "ENAMETOOLONG")
_OUTSIDE_NUMBERS = {getattr(errno, name) for name in _OUTSIDE if hasattr(errno, name)}


class ConfigError(ValueError):
    """One sentence that names the key or file, what is wrong with it and what would be right."""

    exit_code = EXIT_BAD_INPUT


class TrainingFailed(ConfigError):
    """A run that began and cannot go on: numbers that are not finite, a full memory."""

    exit_code = 1


def nearest(word: str, choices: Iterable[str]) -> str:
    """`; did you mean X?` for the closest choice, or `; the choices are …` for a short list."""
    choices = sorted(choices)
    close = difflib.get_close_matches(word, choices, n=1, cutoff=0.5)
    if close:
        return f"; did you mean {close[0]}?"
    if choices and len(choices) <= 12:
        return f"; the choices are {', '.join(choices)}"
    return ""


def fail(message: str, exit_code: int = EXIT_BAD_INPUT) -> None:
    """Say what is wrong and end the program."""
    sentence = " ".join(str(message).split())
    if len(sentence) > _LONGEST:  # someone's huge value in its middle
        sentence = f"{sentence[: _LONGEST // 2]} … {sentence[-_LONGEST // 2 :]}"
    rank = os.environ.get("RANK", "0")
    where = "" if rank == "0" else f"rank {rank}: "
    sys.stderr.write(f"{Path(sys.argv[0]).name}: error: {where}{sentence}\n")
    sys.exit(exit_code)


@contextlib.contextmanager
def reported() -> Iterator[None]:
    """Turn an error that the user can mend into one sentence and its exit code."""
    from data import DataError
    from models import ModelError

    try:
        yield
    except (ConfigError, DataError, ModelError) as error:
        fail(str(error), getattr(error, "exit_code", EXIT_BAD_INPUT))
    except KeyboardInterrupt:
        fail("interrupted", EXIT_INTERRUPTED)
    except OSError as error:
        if error.errno not in _OUTSIDE_NUMBERS:
            raise
        fail(f"{error.filename or 'writing'}: {error.strerror}", TrainingFailed.exit_code)
