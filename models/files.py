"""Files of weights: whose they are, and what they say of themselves. Nothing is ever executed.

Read are `.safetensors` files and torch files (state dicts, or training states of the ancestors'
forks), of which only tensors and plain values are unpickled. What lies beside an ancestor's file is
used: `all_config.yaml`, its configuration.
"""

from __future__ import annotations

import io
import json
import pickletools
import re
import urllib.error
import urllib.request
import zipfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from models.errors import ModelError

if TYPE_CHECKING:
    from models.legacy import ForeignState

HUB = "hf:"
METADATA = "loopwright"  # of a .safetensors file: JSON of {"arch", "dims"}
KINDS = "a .safetensors file or a torch file that holds tensors only"
_HARMLESS = ("torch", "collections OrderedDict", "numpy")  # beginnings of what tensors need
_TEXTS = {".md", ".txt", ".json", ".yaml", ".yml", ".py", ".csv", ".png", ".jpg"}
_HEAD = "lm_head.weight"
_PICKLES = 4  # at the beginning of an old torch file
_WAIT_SECONDS = 5  # for the hub's answer
_SAVED = re.compile(r"step_(\d+)(\.pt)?$")  # as the ancestors name their files


def is_safetensors(path: Path) -> bool:
    """Whether the file says so by its name or its first bytes; ModelError if it is cut short."""
    with path.open("rb") as file:
        start = file.read(9)
    header = int.from_bytes(start[:8], "little")
    whole = start[8:] == b"{" and 2 <= header <= path.stat().st_size - 8
    if path.suffix == ".safetensors" and not whole:
        raise ModelError(f"{path} is not a whole .safetensors file")
    return whole


def check_file(path: Path) -> None:
    """Refuse without torch what is no file of weights, or a pickle that would call foreign code.

    torch's own restricted unpickler has the last word in `read_file`.
    """
    try:
        if is_safetensors(path):
            _require_weights(path, _names_in_safetensors(path))
            return
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                pickles = [n for n in archive.namelist() if n.endswith("/data.pkl")]
                if not pickles:
                    raise ModelError(f"{path} is not a torch file; give {KINDS}")
                _check_pickles(path, archive.read(pickles[0]))
            return
        with path.open("rb") as file:
            pickled = file.read(1) == b"\x80"
        if not pickled:
            raise ModelError(f"{path} is not a file of weights; give {KINDS}")
        _check_pickles(path, path.read_bytes())
    except OSError as error:
        raise ModelError(f"{path} cannot be read: {error.strerror or error}") from None
    except zipfile.BadZipFile:
        raise ModelError(f"{path} is damaged: not a whole torch file") from None


def _names_in_safetensors(path: Path) -> list[str]:
    """Names of the tensors; ModelError unless header and file fit each other."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        text = file.read(length)
    try:
        header = json.loads(text)
        tensors = {name: about for name, about in header.items() if name != "__metadata__"}
        end = max((about["data_offsets"][1] for about in tensors.values()), default=0)
        if end != path.stat().st_size - 8 - length:
            raise ValueError
    except (ValueError, TypeError, KeyError, IndexError, AttributeError, RecursionError):
        raise ModelError(f"{path} is not a whole .safetensors file") from None
    return list(tensors)


def _check_pickles(path: Path, code: bytes) -> None:
    """Refuse pickles that name anything but torch's and NumPy's own building blocks.

    An old torch file is several in a row: a number, a version, the machine, the state.
    """
    stream, texts = io.BytesIO(code), []
    try:
        for _ in range(_PICKLES):
            for opcode, argument, _ in pickletools.genops(stream):
                foreign = opcode.name == "GLOBAL" and not str(argument).startswith(_HARMLESS)
                if foreign or opcode.name in ("STACK_GLOBAL", "INST"):
                    what = str(argument).replace(" ", ".") if foreign else "foreign objects"
                    raise ModelError(
                        f"{path} is refused: it holds {what}, not tensors only, and loading it "
                        "could run foreign code"
                    )
                texts.append(argument)
            if stream.tell() == len(code):
                break
    except ValueError as error:
        if isinstance(error, ModelError):
            raise
        raise ModelError(f"{path} is damaged: its pickle ends early") from None
    _require_weights(path, texts)


def _require_weights(path: Path, names: Iterable[object]) -> None:
    """Refuse a file without the one tensor that every model here has."""
    if not any(isinstance(name, str) and name.endswith(_HEAD) for name in names):
        raise ModelError(f"{path} holds no model that is known here: no tensor is named {_HEAD}")


def read_file(path: Path) -> ForeignState:
    """The weights in a file, under our names, on the CPU; ModelError says what is wrong with it."""
    from pickle import UnpicklingError

    import torch
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    from models.legacy import read_state

    check_file(path)
    try:
        if is_safetensors(path):
            content: Any = load_file(path)
        else:
            content = torch.load(path, map_location="cpu", weights_only=True)
    except (
        OSError, SafetensorError, UnpicklingError, RuntimeError, EOFError, ValueError, KeyError,
    ) as error:  # fmt: skip
        reason = str(error).splitlines()[0].split(". ")[0] if str(error) else "it ends early"
        raise ModelError(
            f"{path} cannot be read as a weights file ({reason}); give {KINDS}"
        ) from None
    try:
        if not isinstance(content, Mapping) or not all(isinstance(n, str) for n in content):
            raise TypeError
        return read_state(content)
    except TypeError:
        raise ModelError(f"{path} is not a state dict: it should map names to tensors") from None
    except KeyError as error:
        raise ModelError(f"{path}: {error.args[0]}") from None


def metadata(path: Path) -> dict[str, Any] | None:
    """`{"arch", "dims"}` of a .safetensors file that says what model it belongs to, or None."""
    from safetensors import safe_open

    if not is_safetensors(path):
        return None
    with safe_open(path, "pt") as file:
        text = (file.metadata() or {}).get(METADATA)
    try:
        told = None if text is None else json.loads(text)
        if told is not None and not (told["arch"]["name"] and isinstance(told["dims"], dict)):
            raise ValueError
    except (ValueError, KeyError, TypeError, RecursionError):
        raise ModelError(f"{path}: its description of the model is damaged") from None
    return told


def reference_config(path: Path) -> dict[str, Any]:
    """The `arch` section of the `all_config.yaml` beside an ancestor's file; {} without one."""
    import yaml

    beside = path.parent / "all_config.yaml"
    if not beside.is_file():
        return {}
    try:
        arch = (yaml.safe_load(beside.read_text()) or {}).get("arch")
    except (OSError, ValueError, yaml.YAMLError, AttributeError) as error:
        raise ModelError(f"{beside} cannot be read: {str(error).splitlines()[0]}") from None
    return arch if isinstance(arch, dict) else {}


def newest_file(folder: Path) -> Path | None:
    """The last `step_N` file of an ancestor's run folder, or None."""
    found = [(int(m[1]), p) for p in folder.glob("step_*") if (m := _SAVED.match(p.name))]
    files = [(number, p) for number, p in found if p.is_file()]
    return max(files)[1] if files else None


def from_hub(text: str) -> Path:
    """Download `hf:owner/name` or `hf:owner/name/file` and what lies beside it; the file's path.

    Without a file's name it must be plain which is meant, see `_choose`.
    """
    owner, _, rest = text.removeprefix(HUB).partition("/")
    name, _, wanted = rest.partition("/")
    if not re.fullmatch(r"[\w.\-]+/[\w.\-]+", f"{owner}/{name}") or ".." in rest.split("/"):
        raise ModelError(f"{text} should be hf:owner/name, or hf:owner/name/file")
    try:
        import huggingface_hub as hub
    except ImportError:
        raise ModelError(
            f"{text} needs the package huggingface_hub, which is not installed; install it, or "
            "download the file and give its path"
        ) from None
    repository = f"{owner}/{name}"
    _require_network(text)
    try:
        files = hub.list_repo_files(repository)
        chosen = wanted or _choose(text, files)
        folder = chosen.rpartition("/")[0]
        for beside in ("all_config.yaml", "identifiers.json"):
            if (side := f"{folder}/{beside}".lstrip("/")) in files:
                hub.hf_hub_download(repository, side)
        return Path(hub.hf_hub_download(repository, chosen))
    except ModelError:
        raise
    except Exception as error:  # its errors have no common class, and a proxy adds its own
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ModelError(f"{text} cannot be downloaded: {reason}") from None


def _require_network(text: str) -> None:
    """Refuse at once where the hub cannot be reached: its client tries again for a minute."""
    from huggingface_hub import constants

    instead = "download the file elsewhere and give its path"
    if constants.HF_HUB_OFFLINE:
        raise ModelError(f"{text} cannot be downloaded (HF_HUB_OFFLINE is set); {instead}")
    request = urllib.request.Request(constants.ENDPOINT, method="HEAD")
    try:
        urllib.request.urlopen(request, timeout=_WAIT_SECONDS).close()
    except urllib.error.HTTPError:
        return  # it answers; the client says what is wrong
    except (OSError, ValueError) as error:
        reason = str(getattr(error, "reason", error))[:200].rstrip(".")
        raise ModelError(f"{text} cannot be downloaded ({reason}); {instead}") from None


def _choose(text: str, names: list[str]) -> str:
    """The file that must be meant: the only .safetensors, the last step_N, the only binary one."""
    safe = [f for f in names if f.endswith(".safetensors")]
    saved = [(int(m[1]), f) for f in names if (m := _SAVED.match(f.rpartition("/")[2]))]
    binary = [f for f in names if Path(f).suffix not in _TEXTS and not Path(f).name.startswith(".")]
    if len(safe) == 1:
        return safe[0]
    if saved:
        return max(saved)[1]
    if len(binary) == 1:
        return binary[0]
    shown = ", ".join((safe or binary or names)[:8]) or "nothing"
    raise ModelError(f"{text}: name a file of it, as in {text}/FILE; it holds {shown}")
