"""Sizes of programs per GPU architecture: pinned, never timed at run time.

A tile chosen by timing would change the order of sums, and with it a resumed run. Change a number
here only with a measurement; `name` goes into checkpoints.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Tile:
    """How a launch over a table is cut."""

    name: str
    block: int  # elements of one program of the update
    warps: int
    norm_programs: int  # programs, and partial sums, of the norm
    norm_block: int  # elements a program of the norm sums at once
    norm_warps: int


_DEFAULT = Tile("default-1", 2048, 8, 256, 2048, 8)
_INTERPRETER = Tile("interpreter-1", 2048, 8, 8, 2048, 8)  # one program after the other
_BY_CAPABILITY = {
    (9, 0): Tile("sm90-2", 2048, 8, 528, 4096, 8),  # 4 programs per multiprocessor of 132
}
# Below this many elements in all, more and smaller programs hide the start of a launch better.
SMALL = 1 << 25
_SMALL_BY_CAPABILITY = {
    (9, 0): Tile("sm90-small-1", 1024, 4, 528, 4096, 8),
}


def tile_for(device: torch.device, elements: int = SMALL) -> Tile:
    """The tile of a device for so many elements; the default for what is not in the table."""
    if device.type != "cuda":
        return _INTERPRETER
    capability = torch.cuda.get_device_capability(device)
    if elements < SMALL and capability in _SMALL_BY_CAPABILITY:
        return _SMALL_BY_CAPABILITY[capability]
    return _BY_CAPABILITY.get(capability, _DEFAULT)


@dataclass(frozen=True)
class MiniTile:
    """How the launches of Adam-mini are cut."""

    name: str
    block: int  # elements of one program
    widest: int  # of a partition's blocks that one program takes whole; a larger one takes several
    warps: int


_MINI_BY_CAPABILITY = {(9, 0): MiniTile("mini-sm90-1", 4096, 4096, 8)}
_MINI_DEFAULT = MiniTile("mini-default-1", 4096, 4096, 8)


def mini_tile_for(device: torch.device) -> MiniTile:
    """The tile of Adam-mini on a device; the default for what is not in the table."""
    if device.type != "cuda":
        return _MINI_DEFAULT
    return _MINI_BY_CAPABILITY.get(torch.cuda.get_device_capability(device), _MINI_DEFAULT)
