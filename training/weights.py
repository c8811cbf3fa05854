"""Files of weights that a new run starts from, as `models.files` reads them."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from models import ModelError, files
from training.errors import ConfigError

if TYPE_CHECKING:
    from models.legacy import ForeignState


def check_weights_file(path: Path) -> None:
    """Refuse, without torch, what is no file of weights or could run foreign code."""
    try:
        files.check_file(path)
    except ModelError as error:
        raise ConfigError(str(error)) from None


def read_weights(path: Path) -> ForeignState:
    """The weights in a file under our names, whosever it is."""
    try:
        return files.read_file(path)
    except ModelError as error:
        raise ConfigError(str(error)) from None
