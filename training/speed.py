"""How fast a run is, beside what its card could do."""

from __future__ import annotations

import logging
import sys
import threading

import torch

from models.cost import cost
from training.resolve import ResolvedRun

logger = logging.getLogger(__name__)

# Dense bf16/fp16 products, TFLOP/s, from the vendors' data sheets; the first name that fits counts.
_PEAK = {
    "B200": 2250.0,
    "H100 PCIe": 756.0,
    "H100 NVL": 835.0,
    "H100": 989.4,
    "H200": 989.4,
    "GH200": 989.4,
    "A100": 312.0,
    "L40S": 362.1,
    "L40": 181.1,
    "L4": 121.0,
    "A10": 125.0,
    "RTX 5090": 209.5,
    "RTX 4090": 165.2,
    "RTX 3090": 71.2,
    "V100": 125.0,
    "T4": 65.0,
}


def peak_flops(device: torch.device) -> float | None:
    """FLOP/s of half-precision products by the data sheet; None where the card is not known."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((rate * 1e12 for card, rate in _PEAK.items() if card in name), None)


def step_flops(run: ResolvedRun, device: torch.device) -> int:
    """FLOPs of a training step on this rank: products once forward, twice backward, no recomputing.

    Takes a moment: the step is gone through on shapes alone.
    """
    arch = run.config.arch.model_copy(update={"grad_checkpoint": "none"})
    found = cost(arch, run.dims, run.config.global_batch_size // run.world.size, device)
    return found.forward_flops + found.gradient_flops


def peak_memory(device: torch.device) -> int:
    """Most bytes held so far: by tensors on a GPU, by the process elsewhere; 0: not known."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if sys.platform == "win32":
        return 0
    import resource

    size = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return size if sys.platform == "darwin" else size * 1024


def describe_speed(run: ResolvedRun, device: torch.device, seconds: float) -> str:
    """One line: step time, examples/s, FLOPs and utilization, peak memory."""
    flops = step_flops(run, device)
    rate, peak = flops / seconds, peak_flops(device)
    line = (
        f"a step takes {seconds * 1e3:.3g} ms, {run.config.global_batch_size / seconds:.0f} "
        f"examples/s; {flops / 1e12:.3g} TFLOP each, {rate / 1e12:.3g} TFLOP/s"
    )
    if peak is not None:
        line += f", model FLOP utilization {rate / peak:.0%}"
    memory = peak_memory(device)
    return f"{line}; peak memory {memory / 2**30:.2f} GiB" if memory else line


def announce_speed(run: ResolvedRun, device: torch.device, seconds: float) -> None:
    """Log `describe_speed`. Counting FLOPs takes seconds, in which a GPU goes on with its steps."""

    def announce() -> None:
        logger.info("%s", describe_speed(run, device, seconds))

    if device.type == "cuda":
        threading.Thread(target=announce, name="speed").start()
    else:
        announce()
