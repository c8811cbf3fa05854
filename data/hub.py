"""Files of the public hub of data sets: `hf:OWNER/NAME/FILE`, downloaded once by huggingface_hub.

Nothing here is needed for local files, and the package is optional.
"""

import importlib.util
import logging
import re
import urllib.error
import urllib.request
from typing import NoReturn

from data.errors import DataError

logger = logging.getLogger(__name__)

PREFIX = "hf:"
_FORM = re.compile(r"hf:([\w.\-]+/[\w.\-]+)/([\w./\-]+)")
_WAIT_SECONDS = 10


def _parse(key: str, value: str) -> tuple[str, str]:
    match = _FORM.fullmatch(value)
    if match is None:
        raise DataError(f"data.{key}={value} must be of the form hf:OWNER/NAME/FILE.")
    return match[1], match[2]


def _require_package(key: str, value: str) -> None:
    if importlib.util.find_spec("huggingface_hub") is None:
        raise DataError(
            f"data.{key}={value} needs the package huggingface_hub; install it, or download the "
            f"file yourself and give its path as data.{key}."
        )


def is_cached(key: str, value: str) -> bool:
    """Whether a file can be read now: it is local, or was downloaded before.

    Raises:
        DataError: a hub address of a wrong form, or the package is missing.
    """
    if not value.startswith(PREFIX):
        return True
    repository, name = _parse(key, value)
    _require_package(key, value)
    from huggingface_hub import try_to_load_from_cache

    return isinstance(try_to_load_from_cache(repository, name, repo_type="dataset"), str)


def _require_network(key: str, value: str, url: str) -> None:
    """Refuse at once where the hub cannot be reached: its client tries again for a minute."""
    request = urllib.request.Request(url, method="HEAD")
    try:
        urllib.request.urlopen(request, timeout=_WAIT_SECONDS).close()
    except urllib.error.HTTPError:
        return  # it answers; the client says what is wrong
    except (OSError, ValueError) as error:
        _refuse(key, value, str(getattr(error, "reason", error)))


def _refuse(key: str, value: str, reason: str) -> NoReturn:
    repository, name = _parse(key, value)
    raise DataError(
        f"data.{key}={value} cannot be downloaded ({reason[:200].rstrip('.')}); download {name} of "
        f"the data set {repository} elsewhere and give its path as data.{key}=PATH."
    ) from None


def download(key: str, value: str) -> str:
    """Path of a hub file in huggingface_hub's cache, downloaded if it is not there.

    Raises:
        DataError: no network, no such file, no package; says how to use a local file instead.
    """
    repository, name = _parse(key, value)
    _require_package(key, value)
    from huggingface_hub import constants, hf_hub_download, hf_hub_url, try_to_load_from_cache

    cached = try_to_load_from_cache(repository, name, repo_type="dataset")
    if isinstance(cached, str):
        return cached
    if constants.HF_HUB_OFFLINE:
        _refuse(key, value, "HF_HUB_OFFLINE is set")
    _require_network(key, value, hf_hub_url(repository, name, repo_type="dataset"))
    logger.info("downloading %s of the hub's data set %s", name, repository)
    try:
        return hf_hub_download(repository, name, repo_type="dataset", etag_timeout=_WAIT_SECONDS)
    except Exception as error:  # its many kinds of errors say the same: there is no file
        lines = str(error).strip().splitlines() or ["no reason given"]
        _refuse(key, value, f"{type(error).__name__}: {lines[0]}")
