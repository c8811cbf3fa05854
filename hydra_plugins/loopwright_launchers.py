"""Launchers of multiruns, each job in a process of its own: `hydra/launcher=process` (one after
another), `joblib` (several at a time), `submitit` (a SLURM cluster, or this machine), `ray`.

Jobs that share a process leak CUDA memory, compiled code and wandb state into each other. Hydra
finds launchers in packages below `hydra_plugins` only, hence this folder; the work is in
training/sweep.py and training/launchers.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from hydra.core.config_store import ConfigStore
from hydra.core.utils import JobReturn
from hydra.plugins.launcher import Launcher
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, OmegaConf

_SETTINGS: dict[str, dict[str, Any]] = {
    "process": {},
    "joblib": {"n_jobs": 2, "gpus_per_job": 0},
    "submitit": {
        "cluster": None,  # null: slurm where there is one, else local; or slurm, local, debug
        "timeout_min": 24 * 60,
        "nodes": 1,
        "gpus_per_node": 0,
        "cpus_per_task": 4,
        "mem_gb": None,
        "array_parallelism": 16,
        "slurm_partition": None,
        "additional_parameters": {},
    },
    "ray": {
        "address": "local",  # a Ray of this machine's own; or auto, HOST:PORT, ray://HOST:PORT
        "cpus_per_job": 1,
        "gpus_per_job": 0,
    },
}
for _name, _settings in _SETTINGS.items():
    ConfigStore.instance().store(
        group="hydra/launcher",
        name=_name,
        node={
            "_target_": "hydra_plugins.loopwright_launchers.LoopwrightLauncher",
            "kind": _name,
            **_settings,
        },
        provider="loopwright",
    )


class LoopwrightLauncher(Launcher):
    """Runs `python pretrain.py OVERRIDES` per job; a table of results at the end."""

    def __init__(self, kind: str, **settings: Any) -> None:
        self.kind, self.settings = kind, settings

    def setup(
        self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig
    ) -> None:
        """Keep what Hydra gives."""
        self.config = config

    def launch(
        self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int
    ) -> Sequence[JobReturn]:
        """Run the jobs; exits 1 if one failed, after all have run."""
        from training.errors import reported
        from training.launchers import make_launch
        from training.sweep import run_sweep

        with reported():
            launch = make_launch(self.kind, OmegaConf.to_container(OmegaConf.create(self.settings)))
            return run_sweep([list(job) for job in job_overrides], self.config.runs_dir, launch)
