"""Time from `python pretrain.py …` to its first step, with empty and with filled caches.

    python scripts/bench_start.py experiment=sudoku_trm_mlp data.train_csv=… data.test_csv=…
    python scripts/bench_start.py --runs warm              # as the caches of this user are
    python scripts/bench_start.py --out start.json experiment=smoke

Overrides are those of pretrain.py. Each run is a process of its own in a folder of its own, which
is stopped after `--steps` steps (the third is captured as a CUDA graph). `cold` has empty compile
caches and builds its dataset; each `warm` follows with what the ones before it have left. A stage
ends with the line of the log that is named; the clock starts with the command.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
CACHES = ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR", "XDG_CACHE_HOME", "NUMBA_CACHE_DIR")
STAGES = {  # the first words of the log line that ends it
    "run folder": "imports, configuration, dataset",
    "device": "model, optimizers, loader",
}


def start(overrides: list[str], env: dict[str, str], folder: Path, steps: int) -> dict[str, float]:
    """Seconds since the command at the end of each stage, and of each of the first steps."""
    command = [
        sys.executable, "pretrain.py", *overrides, "log_interval=1", "eval_interval=null",
        f"runs_dir={folder}", "run_name=start", f"datasets_dir={env['DATASETS']}",
    ]  # fmt: skip
    began = time.perf_counter()
    process = subprocess.Popen(
        command, cwd=ROOT, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    times: dict[str, float] = {}
    lines: list[str] = []

    def listen() -> None:
        assert process.stdout is not None
        for line in process.stdout:
            lines.append(line)
            for words, stage in STAGES.items():
                if line.startswith(words):
                    times.setdefault(stage, time.perf_counter() - began)

    listener = threading.Thread(target=listen)
    listener.start()
    metrics = folder / "start" / "metrics.jsonl"
    seen = 0
    while seen < steps and process.poll() is None:
        time.sleep(0.02)
        done = metrics.read_text().count("\n") if metrics.exists() else 0
        for number in range(seen + 1, done + 1):
            times[f"step {number}"] = time.perf_counter() - began
        seen = max(seen, done)
    if process.poll() is None:
        process.send_signal(signal.SIGTERM)
    process.wait()
    listener.join()
    if seen < steps:
        sys.exit(f"the run ended before step {steps}:\n{''.join(lines[-20:])}")
    return times


def main() -> None:
    """Run and report."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("overrides", nargs="*", help="of pretrain.py")
    parser.add_argument("--runs", nargs="+", choices=("cold", "warm"), default=["cold", "warm"])
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--out", type=Path, help="write the numbers as JSON")
    args = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as place:
        env = {**os.environ, "DATASETS": f"{place}/datasets"}
        for number, kind in enumerate(args.runs):
            if kind == "cold":
                env |= {name: f"{place}/{number}/{name}" for name in CACHES}
                env["DATASETS"] = f"{place}/{number}/datasets"
            times = start(args.overrides, env, Path(place) / f"runs{number}", args.steps)
            rows.append({"kind": kind, "seconds": times})
            shown = ", ".join(f"{name} {seconds:.1f}" for name, seconds in times.items())
            print(f"{kind}: first step after {times['step 1']:.1f} s ({shown})", flush=True)
    if args.out:
        args.out.write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
