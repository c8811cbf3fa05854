"""Build a dataset without training: `python -m data.build {sudoku,maze,arc,text,mix} key=value …`

The keys are those of `pretrain.py`'s `data.*`; `--key value` and `data.key=value` mean the same.
What is built already is recognized by its fingerprint; an interrupted build leaves nothing.
"""

from __future__ import annotations

import difflib
import logging
import sys
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError
from pydantic_core import PydanticUndefined

from data import DATASETS, DataError, DatasetConfig, dataset_info

logger = logging.getLogger("data.build")

_KINDS = [name for name in DATASETS if name != "folder"]
_EXIT_BAD_INPUT = 2
_INTERRUPTED = 130


def usage() -> str:
    """How to call it, and every key of every kind."""
    lines = [
        "usage: python -m data.build KIND [key=value …] [out=DIR]",
        "",
        "Build a dataset below DIR (default: datasets) and print its folder. pretrain.py builds",
        "the same from data=KIND data.key=value …, or takes it as data=folder data.path=FOLDER.",
        "",
        "  python -m data.build sudoku train_csv=train.csv.gz test_csv=test.csv.gz num_aug=1000",
        "  python -m data.build maze num_train=1000 num_test=200 seed=1",
        "  python -m data.build arc 'train=[arc-agi_training_challenges.json]' "
        "'test=[arc-agi_evaluation_challenges.json]'",
        "  python -m data.build text 'files=[docs,README.md]' seq_len=256",
    ]
    for kind in _KINDS:
        lines += ["", f"{kind}: {(DATASETS[kind].__doc__ or '').split('.  ')[0].splitlines()[0]}"]
        for key, field in DATASETS[kind].model_fields.items():
            if key == "name":
                continue
            default = field.default
            shown = "(needed)" if default is PydanticUndefined else yaml.safe_dump(
                list(default) if isinstance(default, tuple) else default,
                default_flow_style=True).split("\n")[0]  # fmt: skip
            lines.append(f"  {key}={shown}")
    return "\n".join([*lines, ""])


def parse(arguments: list[str]) -> tuple[str, dict[str, Any], Path]:
    """Kind, keys and output folder; DataError names what is wrong."""
    kind, rest = arguments[0], list(arguments[1:])
    if kind not in _KINDS:
        raise DataError(f"there is no dataset {kind}{_nearest(kind, _KINDS)}")
    known = {key for key in DATASETS[kind].model_fields if key != "name"}
    values: dict[str, Any] = {}
    out = "datasets"
    while rest:
        word = rest.pop(0)
        key, has_value, value = word.partition("=")
        if word.startswith("--") and not has_value:
            if not rest:
                raise DataError(f"{word} has no value; give {word} VALUE.")
            has_value, value = "=", rest.pop(0)
        key = key.removeprefix("--").replace("-", "_").removeprefix("data.")
        if not (has_value and key):
            raise DataError(f"'{word}' is not of the form key=value.")
        if key in ("out", "datasets_dir"):
            if not value:
                raise DataError(f"{key}= names no folder; give the one to build in.")
            out = value
        elif key not in known:
            raise DataError(f"data.{key}: {kind} has no such key{_nearest(key, known)}")
        else:
            values[key] = _value(key, value)
    return kind, values, Path(out)


def _value(key: str, text: str) -> Any:
    """A value as YAML reads it, lists as tuples."""
    try:
        value = yaml.safe_load(_spaced(text))
    except yaml.YAMLError:
        if not text.startswith(("[", "{")):
            return text  # such as *.txt
        raise DataError(f"data.{key}={text} cannot be read; quote special characters.") from None
    return _tuples(value)


def _spaced(text: str) -> str:
    """`{a:b}`, as on Hydra's command line, for YAML, which wants a blank after the colon."""
    if not text.lstrip().startswith(("{", "[")):
        return text
    out, quote = [], ""
    for i, char in enumerate(text):
        quote = "" if char == quote else char if not quote and char in "'\"" else quote
        out.append(char)
        is_key = char == ":" and not quote and text[i + 1 : i + 2] != " "
        before = "".join(out[:-1]).replace("[", "{").replace(",", "{").rpartition("{")[2]
        if is_key and ":" not in before and text[: i + 1].count("{") > text[: i + 1].count("}"):
            out.append(" ")
    return "".join(out)


def _tuples(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _tuples(v) for key, v in value.items()}
    return tuple(map(_tuples, value)) if isinstance(value, list) else value


def _nearest(word: str, choices: list[str] | set[str]) -> str:
    close = difflib.get_close_matches(word, choices, n=1, cutoff=0.5)
    return f"; did you mean {close[0]}?" if close else f"; there are {', '.join(sorted(choices))}."


def configure(kind: str, values: dict[str, Any]) -> DatasetConfig:
    """The configuration, strictly checked; DataError names the first wrong key."""
    try:
        return DATASETS[kind].model_validate({"name": kind, **values}, strict=True)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        key, *inside = [*map(str, first["loc"]), ""]
        message = first["msg"].removeprefix("Value error, ")
        if message.startswith("data."):
            raise DataError(f"{message}.") from None
        if key not in values:
            raise DataError(f"data.{key} is missing; give it a value.") from None
        given = f"data.{key}={_shown(values[key])}"
        if first["type"] == "tuple_type":
            message = "should be a list, such as [A,B]"
        elif first["type"] == "missing":
            message = f"should have a value number {int(inside[0]) + 1}"
        elif first["type"] == "too_long":
            message = f"should have at most {first['ctx']['max_length']} values"
        message = message.removeprefix("Input ")
        raise DataError(f"{given}: {message[0].lower()}{message[1:]}.") from None


def _shown(value: Any) -> str:
    """A value as the command line has it."""
    if isinstance(value, tuple):
        return f"[{','.join(map(_shown, value))}]"
    if isinstance(value, dict):
        return f"{{{','.join(f'{k}:{_shown(v)}' for k, v in value.items())}}}"
    return "null" if value is None else str(value)


def main(arguments: list[str]) -> int:
    """Build; returns the exit code."""
    if not arguments or {"-h", "--help"} & set(arguments):
        sys.stdout.write(usage())
        return 0 if arguments else _EXIT_BAD_INPUT
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    try:
        kind, values, out = parse(arguments)
        folder = configure(kind, values).prepare(out)
        info = dataset_info(folder)
        logger.info(
            "%d training rows per epoch, test sets %s; %d tokens of a vocabulary of %d, %d puzzle "
            "identifiers", info.num_train_examples, info.test_sets, info.seq_len, info.vocab_size,
            info.num_puzzle_ids,
        )  # fmt: skip
        sys.stdout.write(f"{folder}\n")
        return 0
    except DataError as error:
        sys.stderr.write(f"data.build: error: {' '.join(str(error).split())}\n")
        return _EXIT_BAD_INPUT
    except KeyboardInterrupt:
        sys.stderr.write("data.build: interrupted; nothing is left behind\n")
        return _INTERRUPTED


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
