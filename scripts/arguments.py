"""Command lines of the scripts: what is wrong is said in one sentence, with exit code 2."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import NoReturn

from training.errors import fail


class Parser(argparse.ArgumentParser):
    """argparse's parser without the usage before each complaint; `--help` shows it."""

    def error(self, message: str) -> NoReturn:
        """End the program with the sentence."""
        fail(f"{message}; --help lists all arguments")
        raise AssertionError  # not reached


def whole(least: int, most: int = 10**9) -> Callable[[str], int]:
    """A type of argument: a whole number from `least` to `most`."""

    def read(text: str) -> int:
        try:
            number = int(text)
        except ValueError:
            number = least - 1
        if not least <= number <= most:
            raise argparse.ArgumentTypeError(f"{text} should be a whole number, {least} to {most}")
        return number

    return read
