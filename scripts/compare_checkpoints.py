"""Compare two checkpoints bit for bit: `python scripts/compare_checkpoints.py A B`.

A and B are checkpoint folders or run folders (of which the newest checkpoint is taken). Every
tensor of every file and every counter is compared. Exit code 0: identical; 1: not; 2: unusable.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

from scripts.arguments import Parser
from training.checkpoint import read_index, read_tensors
from training.errors import ConfigError, fail
from training.resume import Resume, find_checkpoint

COUNTERS = ("step", "total_steps", "rows_seen")
CONFIGURATION = ("arch", "optim", "seed", "global_batch_size", "grad_accum", "lr", "ema_rate")


def load(text: str) -> Resume:
    """The checkpoint that `text` names."""
    found = find_checkpoint(text, Path("runs"))
    if not isinstance(found, Resume):
        raise ConfigError(f"{text} is a bare file; give a checkpoint folder or a run folder")
    read_index(found.path)
    return found


def differences(a: Resume, b: Resume) -> list[str]:
    """What differs between two checkpoints, one line each."""
    import torch

    lines = [
        f"{key}: {a.index[key]} and {b.index[key]}"
        for key in COUNTERS
        if a.index[key] != b.index[key]
    ]
    lines += [
        f"configuration {key}: {a.index['config'][key]} and {b.index['config'][key]}"
        for key in CONFIGURATION
        if a.index["config"][key] != b.index["config"][key]
    ]
    if a.index["dataset"]["fingerprint"] != b.index["dataset"]["fingerprint"]:
        lines.append("dataset fingerprint")
    for file in sorted(a.index["files"].keys() | b.index["files"].keys()):
        stem = file.removesuffix(".safetensors")
        ours, theirs = read_tensors(a.path, stem), read_tensors(b.path, stem)
        for name in sorted(ours.keys() | theirs.keys()):
            x, y = ours.get(name), theirs.get(name)
            if x is None or y is None:
                lines.append(f"{stem}: {name} is in one of them only")
            elif x.dtype != y.dtype or x.shape != y.shape:
                lines.append(
                    f"{stem}: {name} is {x.dtype} {list(x.shape)} and {y.dtype} {list(y.shape)}"
                )
            elif not torch.equal(
                x.contiguous().view(-1).view(torch.uint8), y.contiguous().view(-1).view(torch.uint8)
            ):
                gap = (x.double() - y.double()).abs().max().item()
                lines.append(f"{stem}: {name} differs, by {gap:.3g} at most")
    return lines


def main() -> None:
    """Print `identical`, or every difference."""
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument("a", metavar="A", help="checkpoint folder or run folder")
    parser.add_argument("b", metavar="B", help="the other one")
    arguments = parser.parse_args()
    try:
        a, b = load(arguments.a), load(arguments.b)
    except ConfigError as error:
        fail(str(error))
    found = differences(a, b)
    print("\n".join(found) if found else f"identical: {a.path} and {b.path}")
    sys.exit(1 if found else 0)


if __name__ == "__main__":
    main()
