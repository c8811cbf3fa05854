"""Publish a run's weights in small parts that fit into a git repository.

    python scripts/publish_weights.py CHECKPOINT NAME [--weights ema|model] [--which newest|best]
        [--dtype bfloat16|float32] [--into docs/weights] [--note exact_accuracy=0.874 …]
    python evaluate.py checkpoint=docs/weights/NAME data.test_csv=test.csv.gz

Parameters are rounded to bfloat16, which is what a GPU computes with anyway; buffers (initial
states, puzzle embeddings) stay as they are. The index keeps configuration, dims, dataset, step,
training time, the code's version and the device, and of files their names without the folders.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from training import checkpoint
from training.errors import ConfigError, reported
from training.resume import Resume, find_checkpoint

_ENVIRONMENT = ("code", "python", "packages", "device")
_OF_THE_MACHINE = ("runs_dir", "datasets_dir", "load_checkpoint", "resume", "wandb")


def portable(config: dict[str, Any]) -> dict[str, Any]:
    """A run's configuration without what belongs to one machine: folders, accounts."""
    kept = {k: v for k, v in config.items() if k not in _OF_THE_MACHINE}
    kept["data"] = {
        k: Path(v).name if isinstance(v, str) and ("/" in v or "\\" in v) else v
        for k, v in config["data"].items()
    }
    return kept


def notes(texts: list[str]) -> dict[str, str]:
    """`key=value` arguments as a dictionary."""
    for text in texts:
        if "=" not in text:
            raise ConfigError(f"--note {text} is not of the form key=value")
    return dict(text.split("=", 1) for text in texts)


def main() -> None:
    """Publish, and say how to evaluate it."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("checkpoint")
    parser.add_argument("name")
    parser.add_argument("--weights", choices=("ema", "model"), default="ema")
    parser.add_argument("--which", choices=("newest", "best"), default="newest")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument("--into", type=Path, default=Path("docs/weights"))
    parser.add_argument("--note", action="append", default=[], metavar="key=value")
    options = parser.parse_args()
    if not options.name or Path(options.name).name != options.name:
        raise ConfigError(f"NAME={options.name} should be a plain name of a folder")
    found = find_checkpoint(options.checkpoint, Path("runs"))
    if not (isinstance(found, Resume) and found.path.is_dir()):
        raise ConfigError(f"{options.checkpoint} is not a run folder nor a checkpoint's folder")
    folder, index = found.path, found.index
    if options.which == "best":
        best = checkpoint.best(found.run_dir)
        if best is None:
            raise ConfigError(f"--which best: {found.run_dir} was not evaluated yet")
        folder = folder.parent / checkpoint.name(best["step"])
        index = checkpoint.read_index(folder)
    if options.weights == "ema" and "ema.safetensors" not in index["files"]:
        raise ConfigError(f"{folder} has no EMA weights; use --weights model")
    target = options.into / options.name
    if target.exists():
        raise ConfigError(f"{target} exists already; choose another name, or remove it")
    publish(folder, index, target, options)
    size = sum(p.stat().st_size for p in target.iterdir())
    print(f"{target}: {size / 2**20:.1f} MiB in {len(list(target.glob('weights.*')))} parts")
    print(f"evaluate it: python evaluate.py checkpoint={target} data.test_csv=FILE")


def publish(folder: Path, index: dict[str, Any], target: Path, options: argparse.Namespace) -> None:
    """Write the weights of the checkpoint in `folder` to `target`."""
    import torch

    from models import published

    tensors = checkpoint.read_tensors(folder, "model")
    averages = checkpoint.read_tensors(folder, "ema")
    parameters = averages.keys() or {k for k in tensors if "_init" not in k and "puzzles" not in k}
    if options.weights == "ema":
        tensors |= averages
    dtype = getattr(torch, options.dtype)
    tensors = {k: t.to(dtype) if k in parameters else t for k, t in tensors.items()}
    environment = index.get("environment", {})
    published.write(
        target,
        tensors,
        {
            "weights": options.weights,
            "dtype": options.dtype,
            "step": index["step"],
            "seconds": index["seconds"],
            "rows_seen": index.get("rows_seen"),
            "environment": {k: environment[k] for k in _ENVIRONMENT if k in environment},
            "notes": notes(options.note),
            "dims": index["dims"],
            "dataset": index["dataset"],
            "config": portable(index["config"]),
        },
    )


if __name__ == "__main__":
    with reported():
        main()
