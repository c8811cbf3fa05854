"""Search hyperparameters with Optuna: every trial is a run of pretrain.py in its own process.

    python scripts/search.py --trials 30 --name first experiment=sudoku6 eval_interval=200 \\
        'lr=tag(log, interval(1e-4, 1e-2))' 'optim=choice(adam_atan2, muon)' \\
        'arch.L_cycles=int(interval(2, 6))'

Ranges are written in Hydra's grammar; what is no range is the same in all trials. Trials whose
evaluations fall behind the median of the others are stopped (`--no-pruning`: not). All is kept in
RUNS_DIR/search-NAME: the study, a run folder per trial, results.csv, .md and .png. The same command
line goes on with a search that was interrupted, with the trial it was in, too.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import logging
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import optuna
from hydra.core.override_parser.types import ChoiceSweep, IntervalSweep, Override, RangeSweep

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from scripts.arguments import Parser, whole
from training.cli import check_override, compose_values, parse_overrides
from training.config import RunConfig
from training.errors import ConfigError, reported
from training.logging import set_up_logging
from training.resolve import check_job
from training.results import format_table, write_results

logger = logging.getLogger("search")
SCRIPT = Path(__file__).resolve().parents[1] / "pretrain.py"
METRICS = {"exact_accuracy": "maximize", "accuracy": "maximize", "lm_loss": "minimize"}


def suggest(trial: optuna.Trial, override: Override) -> Any:
    """A value of a range, from Optuna."""
    key, sweep = override.key_or_group, override.value()
    if isinstance(sweep, ChoiceSweep):
        return trial.suggest_categorical(key, sweep.list)
    if isinstance(sweep, RangeSweep):
        return trial.suggest_int(key, int(sweep.start), int(sweep.stop) - 1, step=int(sweep.step))
    log = "log" in sweep.tags
    whole = isinstance(sweep.start, int)
    return (trial.suggest_int if whole else trial.suggest_float)(
        key, sweep.start, sweep.end, log=log
    )


def check_range(override: Override) -> None:
    """Raise ConfigError for a range that Optuna cannot draw from."""
    sweep = override.value()
    if not isinstance(sweep, (ChoiceSweep, IntervalSweep, RangeSweep)):
        raise ConfigError(
            f"'{override.input_line}' is no range; use choice(…), interval(…), int(interval(…)), "
            "or tag(log, interval(…))"
        )
    if isinstance(sweep, IntervalSweep) and not sweep.start <= sweep.end:
        raise ConfigError(f"'{override.input_line}' is empty: give the smaller end first")


def lowest(override: Override) -> Any:
    """One value of a range."""
    sweep = override.value()
    return sweep.list[0] if isinstance(sweep, ChoiceSweep) else sweep.start


def evaluations(run_dir: Path, metric: str, seen: int) -> Iterator[tuple[int, float]]:
    """(step, mean over the test sets) of every evaluation after the first `seen`."""
    try:
        lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    except (OSError, ValueError):  # not there yet, or a line is being written
        return
    found = []
    for line in lines:
        values = [v for k, v in line.items() if k.endswith(f"/{metric}")
                  and not k.startswith("train/") and v is not None]  # fmt: skip
        if values:
            found.append((line["step"], sum(values) / len(values)))
    yield from found[seen:]


class Search:
    """Trials of one study."""

    def __init__(self, options: argparse.Namespace, overrides: list[Override]) -> None:
        self.options = options
        self.ranges = [o for o in overrides if o.is_sweep_override()]
        self.fixed = [o.input_line for o in overrides if not o.is_sweep_override()]
        runs_dir = next((t.partition("=")[2] for t in self.fixed if t.startswith("runs_dir=")),
                        "runs")  # fmt: skip
        self.folder = Path(runs_dir) / f"search-{options.name}"

    def objective(self, trial: optuna.Trial) -> float:
        """Run one trial to its end, unless it is pruned."""
        chosen = {o.key_or_group: suggest(trial, o) for o in self.ranges}
        digest = hashlib.sha256(json.dumps(chosen, sort_keys=True).encode()).hexdigest()[:8]
        run_dir = self.folder / f"trial-{digest}"
        trial.set_user_attr("run", str(run_dir))
        line = [*self.fixed, *(f"{k}={v}" for k, v in chosen.items()),
                f"run_name={self.folder.name}/{run_dir.name}", "resume=auto"]  # fmt: skip
        logger.info("trial %d: %s", trial.number, chosen)
        output = run_dir.with_suffix(".txt")
        with output.open("w") as file:
            process = subprocess.Popen([sys.executable, str(SCRIPT), *line], stderr=file)
        try:
            return self._watch(trial, process, run_dir)
        except KeyboardInterrupt:
            trial.set_user_attr("interrupted", True)
            raise
        finally:
            if process.poll() is None:
                process.send_signal(signal.SIGTERM)
                process.wait()

    def _watch(self, trial: optuna.Trial, process: subprocess.Popen, run_dir: Path) -> float:
        seen, value, running = 0, None, True
        while running:
            running = process.poll() is None
            for step, value in evaluations(run_dir, self.options.metric, seen):
                seen += 1
                trial.report(value, step)
                if running and trial.should_prune():
                    raise optuna.TrialPruned(f"at step {step}, with {value:.4g}")
            time.sleep(0.5 if running else 0)
        if process.returncode or value is None:
            raise RuntimeError(
                f"pretrain.py ended with exit code {process.returncode}; it says why in "
                f"{run_dir.with_suffix('.txt')}"
            )
        return value

    def run(self) -> optuna.Study:
        """Run trials until there are as many as wanted."""
        self.folder.mkdir(parents=True, exist_ok=True)
        journal = optuna.storages.journal.JournalFileBackend(str(self.folder / "study.log"))
        pruner = optuna.pruners.MedianPruner(n_startup_trials=4)
        if self.options.no_pruning:
            pruner = optuna.pruners.NopPruner()
        study = optuna.create_study(
            storage=optuna.storages.JournalStorage(journal), study_name=self.options.name,
            direction=METRICS[self.options.metric], pruner=pruner, load_if_exists=True,
        )  # fmt: skip
        known = study.get_trials()
        study.sampler = optuna.samplers.TPESampler(seed=self.options.seed + len(known))
        for trial in known:
            if trial.state == optuna.trial.TrialState.RUNNING:  # this program was killed
                study.tell(trial.number, state=optuna.trial.TrialState.FAIL)
            elif "interrupted" not in trial.user_attrs:
                continue
            if not any(t.params == trial.params for t in known[trial.number + 1 :]):
                study.enqueue_trial(trial.params)  # goes on in the same run folder
        while (left := self.options.trials - self._count(study)) > 0:
            study.optimize(self.objective, n_trials=1, catch=(RuntimeError,))
            self._keep_table(study)
            if left == self.options.trials - self._count(study) and self._failing(study):
                raise ConfigError(f"five trials in a row failed; {self.folder}/*.txt say why")
        self._keep_table(study)
        return study

    @staticmethod
    def _count(study: optuna.Study) -> int:
        ended = [optuna.trial.TrialState.COMPLETE, optuna.trial.TrialState.PRUNED]
        return len(study.get_trials(deepcopy=False, states=ended))

    @staticmethod
    def _failing(study: optuna.Study) -> bool:
        last = study.get_trials(deepcopy=False)[-5:]
        return len(last) == 5 and all(t.state == optuna.trial.TrialState.FAIL for t in last)

    def _keep_table(self, study: optuna.Study) -> None:
        rows, runs = [], {}
        for trial in study.get_trials(deepcopy=False):
            if trial.state == optuna.trial.TrialState.WAITING:
                continue
            last = max(trial.intermediate_values, default=None)
            outcome = {self.options.metric: trial.value, "step": last,
                       "state": trial.state.name.lower()}  # fmt: skip
            rows.append({**trial.params, **outcome, "run": trial.user_attrs.get("run")})
            if "run" in trial.user_attrs:
                runs[f"{trial.number}"] = Path(trial.user_attrs["run"])
        write_results(self.folder, rows, runs)
        logger.info("%s", format_table(rows))


def main() -> None:
    """Parse, check, search."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--trials", type=whole(1), default=20, help="ended ones, pruned ones included"
    )
    parser.add_argument("--name", default="search", help="of the study; the same name goes on")
    parser.add_argument("--metric", choices=METRICS, default="exact_accuracy")
    parser.add_argument("--seed", type=whole(0), default=0, help="of the sampler")
    parser.add_argument("--no-pruning", action="store_true")
    options, arguments = parser.parse_known_args()
    set_up_logging()
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    with reported():
        overrides = parse_overrides(arguments)
        search = Search(options, overrides)
        for override in overrides:
            check_override(override, RunConfig)
        for override in search.ranges:
            check_range(override)
        if not search.ranges:
            raise ConfigError("there is no range to search; such as 'lr=interval(1e-4, 1e-3)'")
        probe = [*search.fixed, *(f"{o.key_or_group}={lowest(o)}" for o in search.ranges)]
        check_job(compose_values("cfg_pretrain", probe), probe)
        study = search.run()
        logger.info("best: %s with %s", study.best_value, study.best_params)


if __name__ == "__main__":
    main()
