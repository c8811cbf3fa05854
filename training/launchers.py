"""How the jobs of a sweep are started: several at a time, or on a cluster."""

from __future__ import annotations

import importlib.util
import logging
import os
import queue
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field, ValidationError
from pydantic.dataclasses import dataclass

from training.errors import ConfigError
from training.sweep import Job, Launch, one_after_another, run_job

logger = logging.getLogger(__name__)
_ROOT = Path(__file__).parents[1]


def make_launch(kind: str, settings: dict[str, Any]) -> Launch:
    """The launch function of `hydra/launcher=KIND`; ConfigError where a package is missing."""
    if kind == "process":
        return one_after_another
    if importlib.util.find_spec(kind) is None:
        raise ConfigError(f"hydra/launcher={kind} needs the package {kind}: pip install {kind}")
    try:
        kinds = {"joblib": JoblibLaunch, "submitit": SubmititLaunch, "ray": RayLaunch}
        return kinds[kind](**settings)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        key, message = ".".join(map(str, first["loc"])), first["msg"].removeprefix("Input ")
        raise ConfigError(f"hydra.launcher.{key}={first['input']}: {message}") from None


@dataclass(frozen=True, config=ConfigDict(strict=True))
class JoblibLaunch:
    """`n_jobs` processes at a time on this machine; with `gpus_per_job`, each on its own GPUs."""

    n_jobs: Annotated[int, Field(ge=-1)]  # -1: one per CPU
    gpus_per_job: Annotated[int, Field(ge=0)]

    def __call__(self, jobs: list[Job]) -> Iterator[tuple[Job, int]]:
        """Launch; yields jobs as they end."""
        from joblib import Parallel, delayed

        slots: queue.Queue[int] = queue.Queue()
        for slot in range(max(self.n_jobs, 1) if self.n_jobs > 0 else os.cpu_count() or 1):
            slots.put(slot)

        def run(job: Job) -> tuple[Job, int]:
            slot = slots.get()
            try:
                logger.info("job %d: %s", job.number, " ".join(job.overrides))
                return job, run_job(job, env=self._environment(slot))
            finally:
                slots.put(slot)

        # threads: each only waits for the process of its job
        parallel = Parallel(self.n_jobs, backend="threading", return_as="generator_unordered")
        yield from parallel(delayed(run)(job) for job in jobs)

    def _environment(self, slot: int) -> dict[str, str]:
        if not self.gpus_per_job:
            return dict(os.environ)
        first = slot * self.gpus_per_job
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        own = visible.split(",") if visible else [str(i) for i in range(first + self.gpus_per_job)]
        mine = own[first : first + self.gpus_per_job]
        if len(mine) < self.gpus_per_job:
            raise ConfigError(
                f"hydra.launcher.n_jobs={self.n_jobs} times gpus_per_job={self.gpus_per_job} are "
                f"more GPUs than CUDA_VISIBLE_DEVICES={visible} has"
            )
        return {**os.environ, "CUDA_VISIBLE_DEVICES": ",".join(mine)}


@dataclass(frozen=True, config=ConfigDict(strict=True))
class SubmititLaunch:
    """Jobs of a SLURM array, or processes of this machine, through submitit."""

    cluster: Literal["slurm", "local", "debug"] | None
    timeout_min: Annotated[int, Field(ge=1)]
    nodes: Annotated[int, Field(ge=1)]
    gpus_per_node: Annotated[int, Field(ge=0)]
    cpus_per_task: Annotated[int, Field(ge=1)]
    mem_gb: float | None
    array_parallelism: Annotated[int, Field(ge=1)]
    slurm_partition: str | None
    additional_parameters: dict[str, Any]

    def __call__(self, jobs: list[Job]) -> Iterator[tuple[Job, int]]:
        """Launch; yields jobs as they end."""
        import submitit

        if not jobs:
            return
        # what submitit starts imports this package from wherever it runs
        paths = [str(_ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
        os.environ["PYTHONPATH"] = os.pathsep.join(paths)
        folder = jobs[0].sweep_dir / "submitit"
        executor = submitit.AutoExecutor(folder=folder, cluster=self.cluster)
        parameters = {
            "timeout_min": self.timeout_min, "nodes": self.nodes,
            "gpus_per_node": self.gpus_per_node, "cpus_per_task": self.cpus_per_task,
            "mem_gb": self.mem_gb, "slurm_array_parallelism": self.array_parallelism,
            "slurm_partition": self.slurm_partition, "name": "loopwright",
            "slurm_additional_parameters": dict(self.additional_parameters) or None,
        }  # fmt: skip
        executor.update_parameters(**{k: v for k, v in parameters.items() if v is not None})
        started = executor.map_array(Requeued(), jobs)
        by_id = {job.job_id: own for job, own in zip(started, jobs, strict=True)}
        logger.info("%d jobs are with %s; their output is in %s", len(jobs), executor.cluster,
                    folder)  # fmt: skip
        for job in submitit.helpers.as_completed(started, poll_frequency=1):
            error = job.exception()
            if error is not None:
                logger.error("job %d: %s", by_id[job.job_id].number, error)
            yield by_id[job.job_id], 1 if error is not None else job.result()


class Requeued:
    """Runs a job; submitit submits it again where the cluster took its machine away."""

    def __call__(self, job: Job) -> int:
        """Run it; it goes on where it was."""
        return run_job(job)

    def checkpoint(self, job: Job) -> Any:
        """What submitit asks for at a preemption or the time limit."""
        from submitit.helpers import DelayedSubmission

        return DelayedSubmission(self, job)


@dataclass(frozen=True, config=ConfigDict(strict=True))
class RayLaunch:
    """Tasks of a Ray cluster, or of a Ray of this machine's own: as many at a time as fit."""

    address: str
    cpus_per_job: float
    gpus_per_job: float

    def __call__(self, jobs: list[Job]) -> Iterator[tuple[Job, int]]:
        """Launch; yields jobs as they end."""
        import ray

        if not jobs:
            return
        # what Ray starts imports this package from wherever it runs
        paths = [str(_ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
        variables = {"PYTHONPATH": os.pathsep.join(paths)}
        ray.init(self.address, runtime_env={"env_vars": variables}, log_to_driver=False,
                 logging_level=logging.ERROR)  # fmt: skip
        try:
            self._check(ray.cluster_resources())
            wants = {"num_cpus": self.cpus_per_job, "num_gpus": self.gpus_per_job}
            remote = ray.remote(_run_in).options(**wants, max_retries=3)
            waiting = {remote.remote(str(Path.cwd()), job): job for job in jobs}
            while waiting:
                (done,), _ = ray.wait(list(waiting), num_returns=1)
                job, code = waiting.pop(done), 1
                try:
                    code = ray.get(done)
                except ray.exceptions.RayError as error:
                    logger.error("job %d: %s", job.number, str(error).strip().splitlines()[-1])
                yield job, code
        finally:
            ray.shutdown()

    def _check(self, there: dict[str, float]) -> None:
        """A job that no machine could ever take would wait forever."""
        if self.address != "local":  # a cluster may grow
            return
        for key, name, wanted in (("cpus_per_job", "CPU", self.cpus_per_job),
                                  ("gpus_per_job", "GPU", self.gpus_per_job)):  # fmt: skip
            if wanted > there.get(name, 0):
                raise ConfigError(
                    f"hydra.launcher.{key}={wanted:g} is more than this machine's "
                    f"{there.get(name, 0):g}"
                )


def _run_in(folder: str, job: Job) -> int:
    """Run a job as if started in `folder`, which Ray's workers are not."""
    os.chdir(folder)
    return run_job(job)
