"""What the ranks of the tests in test_ranks.py do: `python -m tests.training.rank_cases JOBS OUT`.

JOBS is a pickled list of (case, arguments); all are done in one group of processes, in turn. The
results of every rank go to OUT/RANK.pickle.
"""

from __future__ import annotations

import hashlib
import os
import pickle
import signal
import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

import training.loop
from data import read_dataset
from tests.training.helpers import ROOT, environment
from training.device import choose_device, prepare_execution, set_determinism
from training.loop import Trainer
from training.ranks import ALONE, Ranks, joined
from training.resolve import ResolvedRun, World
from training.state import TrainState
from training.step import train_step

Job = tuple[str, dict[str, Any]]


def together(size: int, jobs: list[Job], place: Path, timeout: float = 400) -> list[list[Any]]:
    """Do `jobs` on `size` ranks; the results of each rank, in their order."""
    place.mkdir(parents=True, exist_ok=True)
    (place / "jobs.pickle").write_bytes(pickle.dumps(jobs))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    processes = []
    for rank in range(size):
        world = {
            "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(size),
            "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
        }  # fmt: skip
        call = [
            sys.executable,
            "-m",
            "tests.training.rank_cases",
            str(place / "jobs.pickle"),
            place,
        ]
        settings = {"cwd": ROOT, "env": environment(**world), "stderr": subprocess.PIPE}
        processes.append(subprocess.Popen(call, text=True, **settings))
    for process in processes:
        _, errors = process.communicate(timeout=timeout)
        assert process.returncode == 0, errors[-3000:]
    return [pickle.loads((place / f"{rank}.pickle").read_bytes()) for rank in range(size)]


def steps(
    run: ResolvedRun,
    ranks: Ranks = ALONE,
    count: int = 20,
    order: list[int] | None = None,
    ids: list[int] | None = None,
    nan_at: tuple[int, int] | None = None,
) -> dict[str, Any]:
    """Train `count` steps; the loss of each over all ranks, and what the state is in the end.

    `order` permutes the rows of every batch (on one rank), `ids` (global batch,) stands in for the
    puzzle identifiers, `nan_at` (rank, step) spoils that rank's logits in that step.
    """
    device = choose_device(run.config.device, run.world.local_rank)
    set_determinism(device)
    state = TrainState(run, read_dataset(run.dataset_path, "train"), device, ranks)
    prepare_execution(state, run.config)
    state.model.q_head.bias.data.fill_(0.1)  # rows halt at different steps
    batch, local = state.loader.batch, state.loader.local
    if order is not None:
        state.loader.batch = lambda step: {k: v[order] for k, v in batch(step).items()}
        state.row_numbers = state.row_numbers[order]
    if ids is not None:
        mine = torch.tensor(ids[local], dtype=torch.int32, device=device)
        table = torch.zeros(max(ids) + 1, 32, dtype=torch.float64, device=device)
        state.model.embedding.puzzles = table
        state.optimizers["sparse_signsgd"].param_groups[0]["params"][0] = table
        state.loader.batch = lambda step: {**batch(step), "puzzle_ids": mine}
        state.carry.batch["puzzle_ids"] = mine.clone()
        state.incoming["puzzle_ids"] = mine.clone()
    losses = []
    for step in range(count):
        hook = None
        if nan_at == (ranks.rank, step):
            hook = state.model.register_forward_hook(
                lambda m, i, out: out._replace(logits=out.logits * float("nan"))
            )
        train_step(state, run.config, run.total_steps)
        if hook is not None:
            hook.remove()
        loss = ranks.sum(state.sums["lm_loss"].double().clone())
        losses.append(float(loss) / run.config.global_batch_size)
        state.sums["lm_loss"].zero_()
    graphs = 0 if state.graph is None else len(state.graph.graphs)
    state.graph = None  # NCCL does not end while there is one
    whole = {name: tensor.cpu() for name, tensor in state.model.state_dict().items()}
    puzzles = state.model.embedding.puzzles
    digest = hashlib.sha256()
    for name, tensor in whole.items():
        digest.update(name.encode() + tensor.numpy().tobytes())
    return {
        "losses": losses,
        "digest": digest.hexdigest(),
        "grad_norm": float(state.sums["grad_norm"]),
        "nonfinite": int(state.nonfinite),
        "puzzles": None if puzzles is None else puzzles.cpu(),
        "model": whole,
        "graphs": graphs,
        "halted": float(ranks.sum(state.sums["count"].clone())),
    }


def fit(run: ResolvedRun, ranks: Ranks = ALONE, stop_in: int | None = None) -> dict[str, Any]:
    """A sitting of a run; in step `stop_in` its last rank is sent SIGTERM."""
    trainer = Trainer(run, ranks)
    if trainer.state.step == 0:
        trainer.state.model.q_head.bias.data.fill_(0.1)

    def signalled(state: TrainState, *arguments: Any) -> None:
        if state.step + 1 == stop_in and ranks.rank == ranks.size - 1:
            os.kill(os.getpid(), signal.SIGTERM)
        train_step(state, *arguments)

    training.loop.train_step = signalled
    try:
        return trainer.fit()
    finally:
        training.loop.train_step = train_step


CASES = {"steps": steps, "fit": fit}


def main() -> None:
    """Join the others, do the jobs."""
    torch.set_num_threads(1)
    training.loop.plot_run = lambda run_dir: run_dir / "curves.png"
    jobs: list[Job] = pickle.loads(Path(sys.argv[1]).read_bytes())
    world = World.from_environment()
    with joined(world, seconds=60) as ranks:
        done = []
        for case, arguments in jobs:
            run = replace(arguments["run"], world=world)
            done.append(CASES[case](**{**arguments, "run": run}, ranks=ranks))
    (Path(sys.argv[2]) / f"{os.environ['RANK']}.pickle").write_bytes(pickle.dumps(done))


if __name__ == "__main__":
    main()
