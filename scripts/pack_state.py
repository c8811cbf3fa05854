"""Pack a training state into one small file, to go on elsewhere or at another time.

    python scripts/pack_state.py CHECKPOINT OUT.safetensors [--rounded bf16|fp8] [--limit-mib 50]
        [--step N]
    python pretrain.py load_checkpoint=OUT.safetensors …

CHECKPOINT is a run folder (its newest checkpoint) or a checkpoint's folder. Parameters stay exact;
moments and averages are rounded; the carry is left out, so that every row starts on a new puzzle.
A run that goes on from the file is not the same to the bit as one that was never cut.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from training import packing
from training.errors import ConfigError, reported
from training.resume import Resume, find_checkpoint


def main() -> None:
    """Pack, and say what it weighs."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("checkpoint")
    parser.add_argument("target", type=Path)
    parser.add_argument("--rounded", choices=("bf16", "fp8"), default="bf16")
    parser.add_argument("--limit-mib", type=float, default=50.0)
    parser.add_argument("--step", type=int, help="refuse a checkpoint of any other step")
    options = parser.parse_args()
    if options.target.suffix != ".safetensors":
        raise ConfigError(f"{options.target} should end in .safetensors")
    found = find_checkpoint(options.checkpoint, Path("runs"))
    if not (isinstance(found, Resume) and found.path.is_dir()):
        raise ConfigError(f"{options.checkpoint} is not a run folder nor a checkpoint's folder")
    if options.step not in (None, found.index["step"]):
        raise ConfigError(
            f"{found.path} is at step {found.index['step']}, not {options.step}: the sitting was "
            "stopped before its end, and goes on when it is called again"
        )
    header = packing.pack(found.path, options.target, options.rounded)
    size = options.target.stat().st_size / 2**20
    if size > options.limit_mib:
        options.target.unlink()
        hint = "; use --rounded fp8" if options.rounded == "bf16" else ""
        raise ConfigError(f"the state is {size:.1f} MiB, over {options.limit_mib:g}{hint}")
    print(
        f"{options.target}: {size:.1f} MiB, step {header['step']}, {header['seconds']:.1f} s of "
        f"training so far, sha256 {header['sha256'][:16]}"
    )


if __name__ == "__main__":
    with reported():
        main()
