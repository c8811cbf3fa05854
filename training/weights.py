"""Files of weights that a new run starts from, as `models.files` reads them."""

from __future__ import annotations

from pathlib import Path

from models import ModelError, files, published
from models.legacy import ForeignState
from training.errors import ConfigError


def check_weights_file(path: Path) -> None:
    """Refuse, without torch, what is no file of weights or could run foreign code."""
    try:
        files.check_file(path)
    except ModelError as error:
        raise ConfigError(str(error)) from None


def read_weights(path: Path) -> ForeignState:
    """The weights in a file under our names, whosever it is."""
    try:
        if published.is_published(path):
            return ForeignState(published.read(path))
        return files.read_file(path)
    except ModelError as error:
        raise ConfigError(str(error)) from None
