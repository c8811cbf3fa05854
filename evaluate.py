"""Evaluate a checkpoint: `python evaluate.py --help`."""

from __future__ import annotations

import sys

import hydra
from omegaconf import DictConfig

from training.cli import plain, preflight
from training.config import EvaluateConfig
from training.errors import reported
from training.logging import set_up_logging
from training.report import resolve_evaluation, run_evaluation


@hydra.main(version_base="1.3", config_path="config", config_name="cfg_evaluate")
def main(composed: DictConfig) -> None:
    """Check the job without torch, then evaluate."""
    with reported():
        run_evaluation(resolve_evaluation(plain(composed)))


if __name__ == "__main__":
    set_up_logging()
    with reported():
        sys.argv[1:] = preflight("cfg_evaluate", EvaluateConfig, sys.argv[1:])
    main()
