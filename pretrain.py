"""Train a recursive-reasoning model: `python pretrain.py --help`."""

from __future__ import annotations

import sys

import hydra
from omegaconf import DictConfig

from training.cli import plain, preflight
from training.config import RunConfig
from training.errors import reported
from training.logging import set_up_logging
from training.resolve import World, check_job, resolve


@hydra.main(version_base="1.3", config_path="config", config_name="cfg_pretrain")
def main(composed: DictConfig) -> None:
    """Run one job: check it without torch, then train."""
    with reported():
        run = resolve(plain(composed), list(composed_overrides()))
        from training.loop import train

        train(run)


def composed_overrides() -> list[str]:
    """What the user wrote on the command line, key by key."""
    from hydra.core.hydra_config import HydraConfig

    return list(HydraConfig.get().overrides.task)


if __name__ == "__main__":
    set_up_logging()
    with reported():
        world = World.from_environment()
        if world.rank > 0:  # rank 0 reads the command line, and tells
            if not any(argument.startswith("-") for argument in sys.argv[1:]):
                from training.loop import follow

                follow(world)
            sys.exit()
        sys.argv[1:] = preflight("cfg_pretrain", RunConfig, sys.argv[1:], check_job)
    main()
