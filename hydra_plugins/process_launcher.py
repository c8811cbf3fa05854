"""`hydra/launcher: process`: each job of a multirun in a process of its own, one after another.

Jobs that share a process leak CUDA memory, compiled code and wandb state into each other. Hydra
finds launchers in packages below `hydra_plugins` only, hence this folder; the work is in
training/sweep.py.
"""

from __future__ import annotations

from collections.abc import Sequence

from hydra.core.config_store import ConfigStore
from hydra.core.utils import JobReturn
from hydra.plugins.launcher import Launcher
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig

ConfigStore.instance().store(
    group="hydra/launcher",
    name="process",
    node={"_target_": "hydra_plugins.process_launcher.ProcessLauncher"},
    provider="loopwright",
)


class ProcessLauncher(Launcher):
    """Runs `python pretrain.py OVERRIDES` per job; a table of results at the end."""

    def setup(
        self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig
    ) -> None:
        """Keep what Hydra gives."""
        self.config = config

    def launch(
        self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int
    ) -> Sequence[JobReturn]:
        """Run the jobs in turn; exits 1 if one failed, after all have run."""
        from training.sweep import run_sweep

        return run_sweep([list(job) for job in job_overrides], self.config.runs_dir)
