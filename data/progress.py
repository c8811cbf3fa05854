"""Progress bars of the builders: drawn on a terminal, silent elsewhere."""

from collections.abc import Iterable, Iterator
from typing import TypeVar

from tqdm import tqdm

T = TypeVar("T")


def progress(
    items: Iterable[T], description: str, *, total: int | None = None, unit: str = "it"
) -> Iterator[T]:
    """Pass `items` on and draw a bar of them where standard error is a terminal."""
    return iter(tqdm(items, desc=description, total=total, unit=unit, leave=False, disable=None))


def bar(description: str, total: int, unit: str) -> tqdm:
    """A bar that its user advances with `update(n)`; a context manager."""
    return tqdm(desc=description, total=total, unit=unit, leave=False, disable=None)
