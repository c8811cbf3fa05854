"""The command line before Hydra sees it: help, and every wrong override named in one sentence."""

from __future__ import annotations

import math
import os
import re
import sys
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from textwrap import wrap
from typing import Any

from hydra import compose, initialize_config_dir
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from omegaconf import OmegaConf
from omegaconf.errors import MissingMandatoryValue, OmegaConfBaseException
from pydantic import BaseModel

from training.config import known_keys, sections
from training.errors import ConfigError, nearest
from training.run_folder import is_restart

CONFIG_DIR = Path(__file__).parent.parent / "config"
GROUPS = ("arch", "optim", "data", "experiment")
_MULTIRUN, _RUN = ("--multirun", "-m"), ("--run", "-r")
_CFG, _INFO = ("--cfg", "-c"), ("--info", "-i")
_VALUES = {
    **dict.fromkeys(_CFG, ("job", "hydra", "all")),
    **dict.fromkeys(_INFO, ("all", "config", "defaults", "defaults-tree", "plugins", "searchpath")),
}
_HELP, _PLAIN = ("--help", "-h"), ("--hydra-help", "--version", "--resolve")
_HYDRA = ("hydra/launcher", "hydra.launcher.", "hydra/sweeper", "hydra.sweeper.", "hydra.sweep.")
_HYDRA_HINT = "hydra/launcher, hydra/sweeper and their keys"
_MOST_JOBS = 1000  # of one sweep
_FLAGS = (*_HELP, *_MULTIRUN, *_RUN, *_PLAIN, *_VALUES)


def choices(group: str) -> list[str]:
    """The presets of a config group: the files in its folder."""
    return sorted(path.stem for path in (CONFIG_DIR / group).glob("*.yaml"))


def parse_overrides(arguments: list[str]) -> list[Override]:
    """Parse `key=value` arguments with Hydra's grammar; ConfigError names a wrong one."""
    parser = OverridesParser.create()
    parsed = []
    for text in arguments:
        if text.startswith("="):
            raise ConfigError(f"'{text}' has no key; give key=value")
        try:
            parsed.append(parser.parse_override(text))
        except (HydraException, ValueError, RecursionError) as error:
            if "=" not in text:
                raise ConfigError(f"'{text}' is not of the form key=value") from None
            reason = (str(error).splitlines() or ["no value"])[0].partition(" expecting ")[0]
            raise ConfigError(
                f"'{text}' cannot be read ({reason}); quote a value with special characters, "
                "as in 'key=\"a b\"'"
            ) from None
    return parsed


def split_arguments(argv: list[str]) -> tuple[list[str], list[str]]:
    """Hydra's options (with their values) and the overrides; ConfigError names a wrong option."""
    flags, overrides = [], []
    rest = iter(argv)
    for argument in rest:
        if not argument.startswith("-"):
            overrides.append(argument)
            continue
        flag, has_value, value = argument.partition("=")
        if flag not in _FLAGS or (has_value and flag not in _VALUES):
            raise ConfigError(f"there is no option {argument}{nearest(flag, _FLAGS)}")
        flags.append(flag)
        if flag in _VALUES:
            value = value if has_value else next(rest, "")
            if value not in _VALUES[flag]:
                raise ConfigError(f"{flag} {value or 'alone'} is not possible"
                                  f"{nearest(value, _VALUES[flag])}")  # fmt: skip
            flags.append(value)
    given = set(flags)
    if "--resolve" in given and not given & set(_CFG):
        raise ConfigError("--resolve belongs to --cfg; use --cfg job --resolve")
    if given & set(_MULTIRUN) and given & {*_CFG, *_INFO, *_RUN}:
        raise ConfigError("-m runs jobs; leave out --run, --cfg and --info, or leave out -m")
    return flags, overrides


def check_override(override: Override, schema: type[BaseModel]) -> None:
    """Raise ConfigError unless the override names a key or group that exists."""
    key = override.key_or_group
    if key == "hydra" or key.startswith(("hydra.", "hydra/")):
        if not key.startswith(_HYDRA):
            raise ConfigError(f"{key} is fixed here; of Hydra's settings, {_HYDRA_HINT} are open")
        return
    if override.package is not None:
        raise ConfigError(f"'{override.input_line}': a preset cannot be moved; use {key}=NAME")
    if override.is_delete():
        raise ConfigError(f"'{override.input_line}' deletes a key; set {key} to a value instead")
    section, _, rest = key.partition(".")
    if rest == "name" and section in GROUPS:
        raise ConfigError(
            f"{key} comes with its preset; choose one with {section}=NAME"
            f"{nearest(str(override.get_value_element_as_str()), choices(section))}"
        )
    groups = [g for g in GROUPS if g in schema.model_fields]
    if "optim" in groups:  # a whole run: an experiment may be laid over it
        groups.append("experiment")
    if key in groups and (override.is_add() or override.is_force_add()):
        raise ConfigError(f"'{override.input_line}': leave out the +, as in {key}=NAME")
    if key in groups and not isinstance(override.value(), dict):
        for value in _given(override):
            name = str(value).strip("'\"")
            if name not in choices(key) and name != "null":
                raise ConfigError(f"{key}={name} does not exist{nearest(name, choices(key))}")
            if name == "null" and not _nullable(schema, key):
                raise ConfigError(f"{key}=null is not possible{nearest('', choices(key))}")
        return
    keys = known_keys(schema)
    if key not in keys and key not in groups:
        hint = nearest(key, keys)
        if not hint:  # a bare name may be the end of a nested key
            nested = [k for k in keys if k.rpartition(".")[2] == key.rpartition(".")[2]]
            hint = nearest(nested[0], nested) if nested else "; --help lists all keys"
        raise ConfigError(f"there is no key {key}{hint}")


def _given(override: Override) -> list[Any]:
    """The value of an override, or the values of a sweep over it."""
    if not override.is_sweep_override():
        return [override.get_value_element_as_str()]
    line, example = override.input_line, f"{override.key_or_group}=A,B"
    try:
        values = list(islice(override.sweep_iterator(), _MOST_JOBS + 1))
    except (HydraException, ValueError, TypeError):
        raise ConfigError(f"'{line}' cannot be swept over; list values, as in {example}") from None
    if not 1 <= len(values) <= _MOST_JOBS:
        raise ConfigError(f"'{line}' gives {'no value' if not values else 'too many values'}")
    return values


def _nullable(schema: type[BaseModel], key: str) -> bool:
    field = schema.model_fields.get(key)
    return field is not None and field.default is None and not field.is_required()


def compose_values(config_name: str, overrides: list[str]) -> dict[str, Any]:
    """Compose the YAML files with `overrides` into plain values."""
    try:
        with initialize_config_dir(str(CONFIG_DIR), version_base="1.3"):
            composed = compose(config_name, overrides=overrides, return_hydra_config=True)
        return plain(OmegaConf.masked_copy(composed, [k for k in composed if k != "hydra"]))
    except (HydraException, OmegaConfBaseException, AssertionError) as error:
        raise ConfigError(_composition_error(str(error).splitlines()[0], overrides)) from None


def _check_launcher(config_name: str, overrides: list[str]) -> None:
    """Raise ConfigError where a multirun's launcher is unknown or has a wrong setting."""
    from training.launchers import make_launch

    try:
        with initialize_config_dir(str(CONFIG_DIR), version_base="1.3"):
            composed = compose(config_name, overrides=overrides, return_hydra_config=True)
        settings = plain(composed.hydra.launcher)
    except (HydraException, OmegaConfBaseException, AssertionError) as error:
        raise ConfigError(_composition_error(str(error).splitlines()[0], overrides)) from None
    make_launch(settings.pop("kind"), {k: v for k, v in settings.items() if k != "_target_"})


def _composition_error(reason: str, overrides: list[str]) -> str:
    """Hydra's complaint in the terms of the command line."""
    named = re.match(r"Could not override '([\w.]+)'|Error merging override ([^=]+)=", reason)
    if named is None:
        return f"the configuration cannot be composed: {reason}"
    key = (named[1] or named[2]).lstrip("+")
    line = next((t for t in overrides if t.lstrip("+").partition("=")[0] == key), key)
    group = key.partition(".")[0]
    if key in GROUPS:
        return f"'{line}' cannot be used; give the name of a preset{nearest('', choices(key))}"
    if group in GROUPS:
        return f"'{line}' cannot be used: the chosen {group} preset has no such key"
    return f"'{line}' cannot be used: {key} takes another kind of value"


def plain(composed: Any) -> dict[str, Any]:
    """An OmegaConf tree as plain values, interpolations resolved."""
    try:
        return OmegaConf.to_container(composed, resolve=True, throw_on_missing=True)
    except MissingMandatoryValue as error:
        raise ConfigError(f"{error.full_key} is missing; give it a value") from None
    except OmegaConfBaseException as error:
        raise ConfigError(f"{error.full_key}: {str(error).splitlines()[0]}") from None


def expand_sweep(overrides: list[Override]) -> list[list[str]]:
    """All combinations of a multirun's overrides, as Hydra's basic sweeper makes them."""
    from hydra._internal.core_plugins.basic_sweeper import BasicSweeper

    return BasicSweeper.split_arguments(overrides, max_batch_size=None)[0]


def preflight(
    config_name: str,
    schema: type[BaseModel],
    argv: list[str],
    check_job: Callable[[dict[str, Any], list[str]], object] | None = None,
) -> list[str]:
    """Answer --help, and check the whole command line: ConfigError names what is wrong.

    `check_job(values, overrides)` checks each job of a multirun before the first one starts; an
    entry without it has no multirun. Returns the arguments for Hydra.
    """
    flags, arguments = split_arguments(argv)
    if set(_HELP) & set(flags):
        sys.stdout.write(help_text(config_name, schema))
        sys.exit(0)
    arguments = _last_wins(arguments)
    overrides = parse_overrides(arguments)
    for override in overrides:
        check_override(override, schema)
    # a group that may be null is null already, and Hydra takes no such override
    arguments = [t for t in arguments if t not in {f"{g}=null" for g in GROUPS}]
    arguments = _onto_checkpoint(arguments, schema)
    if not set(_MULTIRUN) & set(flags):
        for override in overrides:
            if override.is_sweep_override():
                hint = "; add -m to run them all" if check_job else ""
                raise ConfigError(f"'{override.input_line}' gives several values{hint}")
        compose_values(config_name, arguments)
        return [*flags, *arguments]
    if os.environ.get("WORLD_SIZE", "1") != "1":
        raise ConfigError("-m starts processes of its own; call it without torchrun")
    if check_job is None:
        raise ConfigError("-m is for pretrain.py; evaluate one checkpoint at a time")
    if math.prod(len(_given(override)) for override in overrides) > _MOST_JOBS:
        raise ConfigError(f"the sweep has more than {_MOST_JOBS} jobs; list fewer values")
    _check_launcher(config_name, [text for text in arguments if text.startswith("hydra")])
    for job in expand_sweep(parse_overrides(arguments)):
        check_job(compose_values(config_name, job), job)
    return [*flags, *arguments]


def _last_wins(arguments: list[str]) -> list[str]:
    """Of several overrides of one key or group, the last: Hydra refuses a group given twice."""
    last = {text.lstrip("+").partition("=")[0]: text for text in arguments}
    return [text for text in arguments if last[text.lstrip("+").partition("=")[0]] is text]


def _onto_checkpoint(arguments: list[str], schema: type[BaseModel]) -> list[str]:
    """`group.key=value` where the checkpoint's preset counts, not the one that is composed here.

    The `++` lets Hydra take a key that the composed preset lacks; the schema has the last word.
    """
    texts = [text.lstrip("+") for text in arguments]
    resumes = any(t.startswith(("load_checkpoint=", "resume=")) for t in texts) or is_restart()
    if not (resumes or "checkpoint" in schema.model_fields):
        return arguments
    given = {text.partition("=")[0] for text in texts}
    return [
        f"++{text}" if text.partition(".")[0] in {*GROUPS} - given and "." in text.partition("=")[0]
        else argument
        for argument, text in zip(arguments, texts, strict=True)
    ]  # fmt: skip


def help_text(config_name: str, schema: type[BaseModel]) -> str:
    """What a person needs: how to call it, the presets, every key with its default."""
    script = Path(sys.argv[0]).name
    values = compose_values(config_name, [])
    lines = [f"usage: python {script} [group=preset …] [key=value …]", ""]
    if config_name == "cfg_pretrain":
        lines += [
            "Train a recursive-reasoning model. Without arguments: the quickstart.",
            "",
            f"  python {script} experiment=sudoku_trm_mlp data.train_csv=train.csv.gz "
            "data.test_csv=test.csv.gz",
            f"  python {script} arch=trm_mlp optim=adamw lr=3e-4 max_steps=2000",
            f"  python {script} load_checkpoint=latest            continue the newest run",
            f"  python {script} -m optim=adam_atan2,adamw seed=0,1  one run per combination",
        ]
    else:
        lines += [
            "Evaluate a checkpoint on its test sets, or on other data.",
            "",
            f"  python {script} checkpoint=latest",
            f"  python {script} checkpoint=runs/NAME data=sudoku data.test_csv=test.csv.gz",
        ]
    lines += ["", "presets (config/GROUP/PRESET.yaml)"]
    for group in GROUPS:
        if group in schema.model_fields or config_name == "cfg_pretrain":
            names = ", ".join(choices(group))
            lines += wrap(
                names, 100, initial_indent=f"  {group + '=':<13}", subsequent_indent=15 * " "
            )
    lines += ["", "keys, with their values in this configuration"]
    lines += _describe(schema, values, "")
    multirun = "-m (several values per key), " if config_name == "cfg_pretrain" else ""
    lines += ["", f"also: {multirun}--cfg job (print the configuration)", ""]
    return "\n".join(lines)


def _describe(schema: type[BaseModel], values: dict[str, Any], prefix: str) -> list[str]:
    lines = []
    for name, field in schema.model_fields.items():
        value, nested = values.get(name), sections(field)
        if nested and isinstance(value, dict):
            chosen = [c for c in nested if _is_named(c, value.get("name"))] or nested
            lines += _describe(chosen[0], value, f"{prefix}{name}.")
            continue
        shown = (
            "null" if value is None else str(value).lower() if isinstance(value, bool) else value
        )
        text = f"  {prefix}{name}={shown}"
        lines.append(f"{text:<42} {field.description or ''}".rstrip())
    return lines


def _is_named(schema: type[BaseModel], name: str | None) -> bool:
    field = schema.model_fields.get("name")
    return field is not None and name in getattr(field.annotation, "__args__", ())
