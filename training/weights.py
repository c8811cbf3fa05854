"""Files of weights alone, of which a new run starts warm. Nothing in them is ever executed."""

from __future__ import annotations

import pickletools
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from training.errors import ConfigError

if TYPE_CHECKING:
    from torch import Tensor

_HARMLESS = ("torch", "collections OrderedDict", "numpy")  # beginnings of what tensors need


def check_weights_file(path: Path) -> None:
    """Refuse without torch what is no file of weights, or a pickle that would call foreign code.

    torch's own restricted unpickler has the last word in `read_weights`.
    """
    kinds = "a .safetensors file or a torch file that holds tensors only"
    try:
        with path.open("rb") as file:
            start = file.read(9)
        size = path.stat().st_size
        header = int.from_bytes(start[:8], "little")
        if path.suffix == ".safetensors" or (start[8:] == b"{" and header <= size - 8):
            if start[8:] != b"{" or not 2 <= header <= size - 8:
                raise ConfigError(f"{path} is not a whole .safetensors file")
            return
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                pickles = [n for n in archive.namelist() if n.endswith("/data.pkl")]
                if not pickles:
                    raise ConfigError(f"{path} is not a torch file; give {kinds}")
                _check_pickle(path, archive.read(pickles[0]))
        elif start[:1] == b"\x80":
            _check_pickle(path, path.read_bytes())
        else:
            raise ConfigError(f"{path} is not a file of weights; give {kinds}")
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror or error}") from None
    except zipfile.BadZipFile:
        raise ConfigError(f"{path} is damaged: not a whole torch file") from None


def _check_pickle(path: Path, code: bytes) -> None:
    """Refuse a pickle that names anything but torch's and NumPy's own building blocks."""
    try:
        for opcode, argument, _ in pickletools.genops(code):
            foreign = opcode.name == "GLOBAL" and not str(argument).startswith(_HARMLESS)
            if foreign or opcode.name in ("STACK_GLOBAL", "INST"):
                what = str(argument).replace(" ", ".") if foreign else "foreign objects"
                raise ConfigError(
                    f"{path} is refused: it holds {what}, not tensors only, and loading it could "
                    "run foreign code"
                )
    except ValueError as error:
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(f"{path} is damaged: its pickle ends early") from None


def read_weights(path: Path) -> dict[str, Tensor]:
    """The tensors of a weights file under our names (with or without `_orig_mod.`).

    A `.safetensors` file, or a torch file, of which only tensors are unpickled.
    """
    from pickle import UnpicklingError

    import torch
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    from models.legacy import from_reference, is_reference

    try:
        if path.suffix == ".safetensors":
            tensors: Any = load_file(path)
        else:
            tensors = torch.load(path, map_location="cpu", weights_only=True)
    except (
        OSError, SafetensorError, UnpicklingError, RuntimeError, EOFError, ValueError, KeyError,
    ) as error:  # fmt: skip
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ConfigError(
            f"{path} cannot be read as a weights file ({reason}); give a .safetensors file "
            "or a torch file that holds tensors only"
        ) from None
    if not isinstance(tensors, Mapping) or not all(isinstance(t, torch.Tensor)
                                                   for t in tensors.values()):  # fmt: skip
        raise ConfigError(f"{path} is not a state dict: it should map names to tensors")
    try:
        if is_reference(tensors):
            return from_reference(tensors)
    except KeyError as error:
        raise ConfigError(f"{path}: {error.args[0]}") from None
    return {k.replace("_orig_mod.", "").removeprefix("model."): t for k, t in tensors.items()}
