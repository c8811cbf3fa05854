"""Triton kernels of the optimizers. Nothing here is imported unless a kernel is asked for.

`table` (no Triton needed) says what a launch works on, `tiles` how large its programs are, the
other modules hold kernels, each beside the function that launches it.
"""

from __future__ import annotations

from functools import lru_cache
from importlib.util import find_spec


@lru_cache(maxsize=1)
def available() -> bool:
    """Whether Triton can be imported here."""
    return find_spec("triton") is not None
