"""The command line: help, options, what is imported when, and where parts are missing."""

from __future__ import annotations

import os
import re
import subprocess
import sys

import pytest

from tests.training.helpers import ROOT, call, environment
from training.cli import choices, help_text, preflight, split_arguments
from training.config import EvaluateConfig, RunConfig, known_keys, sections
from training.errors import ConfigError
from training.resolve import check_job


@pytest.mark.parametrize(
    "name, schema", [("cfg_pretrain", RunConfig), ("cfg_evaluate", EvaluateConfig)]
)
def test_help_mentions_every_key(name, schema):
    text = help_text(name, schema)
    for field_name, field in schema.model_fields.items():
        if sections(field):
            assert f"  {field_name}." in text or f"  {field_name}=" in text, field_name
        else:
            line = next(x for x in text.splitlines() if x.startswith(f"  {field_name}="))
            assert field.description in line
    assert all(len(line) <= 130 for line in text.splitlines())


def test_help_of_a_run_shows_presets_and_nested_keys():
    text = help_text("cfg_pretrain", RunConfig)
    for group in ("arch", "optim", "data", "experiment"):
        told = re.search(rf"^  {group}= +(.*(?:\n {{15}}.*)*)", text, re.MULTILINE)[1]
        assert re.split(r",\s+", told) == choices(group)
    shown = {x.strip().partition("=")[0] for x in text.splitlines() if x.startswith("  ")}
    keys = known_keys(RunConfig)
    assert {k for k in keys if k.startswith(("eval.", "wandb.", "arch.loss."))} <= shown
    assert {"arch.hidden_size", "arch.halt_max_steps", "optim.weight_decay"} <= shown
    assert "load_checkpoint=latest" in text and "-m optim=" in text


@pytest.mark.parametrize("script", ["pretrain.py", "evaluate.py"])
def test_help_as_a_process(tmp_path, script):
    done = call(tmp_path, script, "--help")
    assert done.returncode == 0 and done.stderr == ""
    assert done.stdout.startswith(f"usage: python {script}")
    assert list(tmp_path.iterdir()) == []


def test_cfg_job_prints_the_configuration(tmp_path):
    done = call(tmp_path, "pretrain.py", "--cfg", "job", "lr=0.25", "arch=trm")
    assert done.returncode == 0 and "lr: 0.25" in done.stdout and "mixer: attention" in done.stdout
    assert list(tmp_path.iterdir()) == []


def test_options_and_overrides_are_told_apart():
    assert split_arguments(["-m", "lr=1", "--cfg", "job"][1:]) == (["--cfg", "job"], ["lr=1"])
    assert split_arguments(["--cfg=job", "a=-1"]) == (["--cfg", "job"], ["a=-1"])
    with pytest.raises(ConfigError, match=r"did you mean --multirun"):
        split_arguments(["--multi-run"])


def test_the_last_of_several_values_of_a_key_counts():
    arguments = preflight(
        "cfg_pretrain", RunConfig, ["lr=1", "arch=trm_mlp", "lr=2", "arch=trm"], check_job
    )
    assert arguments == ["lr=2", "arch=trm"]


def test_a_sweep_is_checked_before_its_first_job():
    seen = []
    preflight(
        "cfg_pretrain", RunConfig, ["-m", "optim=adam_atan2,adamw", "seed=range(0,3)"],
        lambda values, overrides: seen.append((values["optim"]["name"], values["seed"])),
    )  # fmt: skip
    assert seen == [(o, s) for o in ("adam_atan2", "adamw") for s in range(3)]


# ---------------------------------------------------------------------------------------- imports


def python(code: str, **more: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=environment(**more),
        capture_output=True, text=True, timeout=300,
    )  # fmt: skip


def test_packages_import_without_what_they_do_not_need():
    done = python(
        "import sys, models, optim, data\n"
        "print([m for m in ('torch', 'hydra', 'omegaconf', 'wandb', 'numba', 'training')"
        " if m in sys.modules])"
    )
    assert done.stdout == "[]\n", done.stderr


def test_checks_import_neither_torch_nor_wandb():
    done = python(
        "import sys, training.cli, training.resolve, training.report\n"
        "print([m for m in ('torch', 'wandb', 'matplotlib', 'numba') if m in sys.modules])"
    )
    assert done.stdout == "[]\n", done.stderr


# None in sys.modules: neither an import nor `importlib.util.find_spec` finds the package.
MISSING = "import sys\nfor name in {names!r}: sys.modules[name] = None\n"


def modules() -> list[str]:
    """Every module of the packages."""
    found = []
    for package in ("models", "optim", "data", "training", "hydra_plugins"):
        for path in sorted((ROOT / package).rglob("*.py")):
            parts = path.relative_to(ROOT).with_suffix("").parts
            found.append(".".join(parts[:-1] if parts[-1] == "__init__" else parts))
    return found


def test_everything_imports_and_trains_without_triton(tiny):
    """As on macOS, Windows and a plain CPU."""
    kernels = [m for m in modules() if ".kernels." in m]
    code = MISSING.format(names=["triton"]) + (
        "from importlib import import_module\n"
        f"for name in {[m for m in modules() if m not in kernels]!r}: import_module(name)\n"
        "from training.cli import compose_values\n"
        "from training.resolve import resolve\n"
        "from training.loop import train\n"
        f"overrides = {tiny('max_steps=3')!r}\n"
        "print(train(resolve(compose_values('cfg_pretrain', overrides), overrides))['step'])\n"
        "assert sys.modules['triton'] is None\n"
        "assert 'wandb' not in sys.modules, 'it is disabled'\n"
    )
    done = python(code)
    assert done.returncode == 0 and done.stdout == "3\n", done.stderr[-2000:]


def test_a_run_without_wandb_and_matplotlib(tiny):
    code = MISSING.format(names=["wandb", "matplotlib"]) + (
        "from training.cli import compose_values\n"
        "from training.resolve import resolve\n"
        "from training.loop import train\n"
        f"overrides = {tiny('max_steps=3', 'wandb.mode=offline')!r}\n"
        "print(train(resolve(compose_values('cfg_pretrain', overrides), overrides))['step'])\n"
    )
    done = python(code)
    assert done.returncode == 0 and done.stdout == "3\n", done.stderr[-2000:]
    assert "wandb" in done.stderr and "curves could not be drawn" in done.stderr


@pytest.mark.slow
@pytest.mark.skipif(os.system("g++ --version > /dev/null 2>&1") != 0, reason="needs g++")
@pytest.mark.parametrize("arch", ["trm", "trm_mlp"])
def test_compile_on_the_cpu(tiny, tmp_path, arch):
    done = call(
        tmp_path, "pretrain.py", *tiny("compile=on", f"arch={arch}", "max_steps=4",
                                       "run_name=compiled", "log_interval=1"),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    plain = call(
        tmp_path, "pretrain.py", *tiny("compile=off", f"arch={arch}", "max_steps=4",
                                       "run_name=plain", "log_interval=1"),
    )  # fmt: skip
    assert plain.returncode == 0, plain.stderr[-2000:]
    from tests.training.helpers import metrics

    ours, theirs = (metrics(tmp_path / "runs" / n) for n in ("compiled", "plain"))
    for a, b in zip(ours, theirs, strict=True):
        assert a["step"] == b["step"]
        for key in (k for k in a if k.endswith("lm_loss")):
            assert a[key] == pytest.approx(b[key], rel=1e-3)
