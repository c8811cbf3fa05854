"""The command line before Hydra sees it: help, and every wrong override named in one sentence."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from omegaconf import OmegaConf
from omegaconf.errors import MissingMandatoryValue, OmegaConfBaseException
from pydantic import BaseModel

from training.config import known_keys, sections, validate
from training.errors import ConfigError, nearest

CONFIG_DIR = Path(__file__).parent.parent / "config"
GROUPS = ("arch", "optim", "data", "experiment")
_FLAGS_WITH_VALUE = {"--config-name", "-cn", "--config-path", "-cp", "--config-dir", "-cd"}
_FLAGS_WITH_VALUE |= {"--package", "-p", "--info", "-i", "--cfg", "-c"}


def choices(group: str) -> list[str]:
    """The presets of a config group: the files in its folder."""
    return sorted(path.stem for path in (CONFIG_DIR / group).glob("*.yaml"))


def parse_overrides(arguments: list[str]) -> list[Override]:
    """Parse `key=value` arguments with Hydra's grammar; ConfigError names a wrong one."""
    parser = OverridesParser.create()
    parsed = []
    for text in arguments:
        try:
            parsed.append(parser.parse_override(text))
        except HydraException as error:
            if "=" not in text:
                raise ConfigError(f"'{text}' is not of the form key=value") from None
            reason = str(error).splitlines()[0]
            raise ConfigError(
                f"'{text}' cannot be read ({reason}); quote a value with special characters, "
                "as in 'key=\"a b\"'"
            ) from None
    return parsed


def split_arguments(argv: list[str]) -> tuple[list[str], list[str]]:
    """Hydra's flags (with their values) and the overrides."""
    flags, overrides, value_of_flag = [], [], False
    for argument in argv:
        if value_of_flag or argument.startswith("-"):
            flags.append(argument)
            value_of_flag = not value_of_flag and argument in _FLAGS_WITH_VALUE
        else:
            overrides.append(argument)
    return flags, overrides


def check_override(override: Override, schema: type[BaseModel]) -> None:
    """Raise ConfigError unless the override names a key or group that exists."""
    key = override.key_or_group
    if key == "hydra" or key.startswith(("hydra.", "hydra/")):
        return
    if override.is_delete():
        raise ConfigError(f"'{override.input_line}' deletes a key; set {key} to a value instead")
    section, _, rest = key.partition(".")
    if rest == "name" and section in GROUPS:
        raise ConfigError(
            f"{key} comes with its preset; choose one with {section}=NAME"
            f"{nearest(str(override.get_value_element_as_str()), choices(section))}"
        )
    groups = [g for g in GROUPS if g in schema.model_fields or (CONFIG_DIR / g).is_dir()]
    if key in groups and not isinstance(override.value(), dict):
        values = list(override.sweep_iterator()) if override.is_sweep_override() else None
        for value in values or [override.get_value_element_as_str()]:
            name = str(value).strip("'\"")
            if name not in choices(key) and name != "null":
                raise ConfigError(f"{key}={name} does not exist{nearest(name, choices(key))}")
            if name == "null" and key != "experiment" and not _nullable(schema, key):
                raise ConfigError(f"{key}=null is not possible{nearest('', choices(key))}")
        return
    keys = known_keys(schema)
    if key not in keys and key not in groups:
        hint = nearest(key, keys)
        if not hint:  # a bare name may be the end of a nested key
            nested = [k for k in keys if k.rpartition(".")[2] == key.rpartition(".")[2]]
            hint = nearest(nested[0], nested) if nested else "; --help lists all keys"
        raise ConfigError(f"there is no key {key}{hint}")


def _nullable(schema: type[BaseModel], key: str) -> bool:
    field = schema.model_fields.get(key)
    return field is not None and field.default is None and not field.is_required()


def compose_values(config_name: str, overrides: list[str]) -> dict[str, Any]:
    """Compose the YAML files with `overrides` into plain values."""
    try:
        with initialize_config_dir(str(CONFIG_DIR), version_base="1.3"):
            composed = compose(config_name, overrides=overrides, return_hydra_config=True)
        return plain(OmegaConf.masked_copy(composed, [k for k in composed if k != "hydra"]))
    except (HydraException, OmegaConfBaseException) as error:
        reason = str(error).splitlines()[0]
        raise ConfigError(f"the configuration cannot be composed: {reason}") from None


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


_INFORM = {"--hydra-help", "--version", "--shell-completion", "-sc", "--resolve"}
_MULTIRUN, _RUN = {"--multirun", "-m"}, {"--run", "-r"}


def preflight(config_name: str, schema: type[BaseModel], argv: list[str]) -> list[str]:
    """Answer --help, and check the whole command line: ConfigError names what is wrong.

    Returns the arguments for Hydra.
    """
    flags, arguments = split_arguments(argv)
    if {"--help", "-h"} & set(flags):
        sys.stdout.write(help_text(config_name, schema))
        sys.exit(0)
    known = _MULTIRUN | _RUN | _INFORM | _FLAGS_WITH_VALUE
    for flag in flags:
        if flag.startswith("-") and flag.split("=")[0] not in known:
            raise ConfigError(f"there is no option {flag}{nearest(flag, known)}")
    arguments = _last_wins(arguments)
    overrides = parse_overrides(arguments)
    for override in overrides:
        check_override(override, schema)
    if set(flags) - _MULTIRUN - _RUN:
        return argv  # asks Hydra for information, or for other YAML files: it composes by itself
    if "data" in schema.model_fields and _nullable(schema, "data"):
        arguments = _onto_null_data(arguments)
    if not _MULTIRUN & set(flags):
        for override in overrides:
            if override.is_sweep_override():
                raise ConfigError(
                    f"'{override.input_line}' gives several values; add -m to run them all"
                )
        compose_values(config_name, arguments)
        return [*flags, *arguments]
    for job in expand_sweep(overrides):
        validate(schema, compose_values(config_name, job))
    return [*flags, *arguments]


def _last_wins(arguments: list[str]) -> list[str]:
    """Of several overrides of one key or group, the last: Hydra refuses a group given twice."""
    last = {text.lstrip("+").partition("=")[0]: text for text in arguments}
    return [text for text in arguments if last[text.lstrip("+").partition("=")[0]] is text]


def _onto_null_data(arguments: list[str]) -> list[str]:
    """`data.key=value` without a `data=` preset adds to the checkpoint's own data settings."""
    if any(text.startswith("data=") for text in arguments):
        return arguments
    return [f"++{text}" if text.startswith("data.") else text for text in arguments]


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
            lines.append(f"  {group + '=':<13}{', '.join(choices(group))}")
    lines += ["", "keys, with their values in this configuration"]
    lines += _describe(schema, values, "")
    lines += ["", "also: -m (several values per key), --cfg job (print the configuration),"]
    lines += ["--hydra-help (Hydra's own options)", ""]
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
