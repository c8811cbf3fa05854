"""Checkpoints of HRM, TinyRecursiveModels and URM into Loopwright's, and back.

    python scripts/convert_checkpoint.py THEIRS OURS.safetensors [arch.num_heads=8 …] [--seq-len N]
    python scripts/convert_checkpoint.py OURS THEIRS [--prefix _orig_mod.model.inner.]

THEIRS is a state dict or a fork's training state (or `hf:owner/name`); its `all_config.yaml`, where
it lies beside the file, tells what the tensors do not. OURS is a run folder, a checkpoint folder or
a .safetensors file. The direction follows from the names of the tensors. A .safetensors file that
is written here says what model it belongs to: evaluate.py and `load_pretrained` take it as it is.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import yaml

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from models import ModelDims, ModelError, files
from scripts.arguments import Parser, whole
from training.errors import reported

# What the references' code cannot compute, and no tensor tells.
OURS = {"glu_norm": ("product", "hidden"), "attn_norm": (True,), "pos_encodings": ("rope_2d",)}


def fields_of(texts: list[str]) -> dict[str, Any]:
    """`arch.key=value` arguments as fields of an architecture."""
    fields = {}
    for text in texts:
        key, equals, value = text.partition("=")
        if not (equals and key.startswith("arch.")):
            raise ModelError(f"'{text}' is not of the form arch.key=value")
        fields[key.removeprefix("arch.")] = yaml.safe_load(value)
    return fields


def to_ours(path: Path, target: Path, options: argparse.Namespace) -> str:
    """Write `target`, which says what model it belongs to; what was done, in words."""
    from safetensors.torch import save_file

    from models.pretrained import describe_file, make_config

    if target.suffix != ".safetensors":
        raise ModelError(f"{target} should end in .safetensors")
    name, fields, dims, tensors = describe_file(path, options.weights)
    config = make_config(name, {**fields, **fields_of(options.fields)}, path)
    told = asdict(ModelDims(options.seq_len or dims.seq_len, dims.vocab_size, dims.num_puzzle_ids))
    text = json.dumps({"arch": config.model_dump(mode="json"), "dims": told})
    whole = {k: t.contiguous().clone() for k, t in tensors.items()}
    save_file(whole, target, metadata={files.METADATA: text})
    return f"{path} → {target}: arch={name}, {len(whole)} tensors, {told}"


def to_theirs(path: Path, target: Path, options: argparse.Namespace) -> str:
    """Write `target`, a torch file of a state dict; what was done, in words."""
    import torch

    from models.legacy import PREFIX, to_reference
    from models.pretrained import load_tensors

    if options.fields:
        raise ModelError(f"'{options.fields[0]}' is for ancestors' files; {path} is of Loopwright")
    name, fields, _, tensors = load_tensors(path, options.weights)
    if ours := [f"arch.{k}={fields[k]}" for k, v in OURS.items() if fields.get(k) in v]:
        raise ModelError(
            f"{path} was trained with {', '.join(ours)}, which the references' code does not know: "
            "it would compute something else with these weights"
        )
    try:
        renamed = to_reference(tensors)
    except KeyError as error:
        raise ModelError(f"{path}: the references have no tensor like {error.args[0]}") from None
    renamed = {options.prefix + k.removeprefix(PREFIX): t for k, t in renamed.items()}
    torch.save(renamed, target)
    return f"{path} → {target}: arch={name}, {len(renamed)} tensors, as in {next(iter(renamed))}"


def check_target(target: Path) -> None:
    """Raise ModelError if nothing can be written there, or something is there already."""
    if target.exists():
        raise ModelError(f"{target} exists already; remove it, or choose another name")
    if not target.parent.is_dir() or not os.access(target.parent, os.W_OK):
        raise ModelError(f"{target}: {target.parent} is not a folder that can be written to")


def main() -> None:
    """Convert in the direction that the source asks for."""
    parser = Parser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("source")
    parser.add_argument("target", type=Path)
    parser.add_argument("fields", nargs="*", metavar="arch.key=value")
    parser.add_argument("--weights", choices=("ema", "model"), default="ema")
    parser.add_argument(
        "--seq-len", type=whole(1), help="tokens of a puzzle, where the file is silent"
    )
    parser.add_argument("--prefix", default="_orig_mod.model.inner.", help="of THEIRS' names")
    options = parser.parse_intermixed_args()
    check_target(options.target)
    hub = options.source.startswith(files.HUB)
    path = files.from_hub(options.source) if hub else Path(options.source).expanduser()
    if path.is_dir() and (newest := files.newest_file(path)):
        path = newest
    theirs = path.is_file() and files.read_file(path).reference
    convert = to_ours if theirs else to_theirs
    print(convert(path, options.target, options))


if __name__ == "__main__":
    with reported():
        main()
