"""Which device, how it computes, and what to say when its memory runs out."""

from __future__ import annotations

import contextlib
import importlib.util
import logging
import os
from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch

from models import kernels
from models.kernels.hopper.compile import cache_folder
from training.config import RunConfig
from training.errors import ConfigError, TrainingFailed

if TYPE_CHECKING:
    from models.reasoning import ReasoningModel
    from training.state import TrainState

logger = logging.getLogger(__name__)


def choose_device(name: str, local_rank: int = 0) -> torch.device:
    """The device that `name` means here: auto prefers CUDA, then MPS, then the CPU."""
    if name == "auto":
        if torch.cuda.is_available():
            return _gpu(local_rank)
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    device = torch.device(name)
    if device.type == "cuda":
        if not torch.cuda.is_available():
            raise ConfigError(
                f"device={name}: this build of torch ({torch.__version__}) sees no CUDA device; "
                "install a CUDA build, or use device=cpu"
            )
        return _gpu(local_rank) if device.index is None else device
    return device


def _gpu(local_rank: int) -> torch.device:
    """The GPU of the `local_rank`-th process of this machine."""
    count = torch.cuda.device_count()
    if local_rank >= count:
        raise ConfigError(
            f"there are {count} CUDA devices here and more ranks than that; use torchrun "
            f"--nproc-per-node {count}"
        )
    return torch.device("cuda", local_rank)


def device_name(device: torch.device) -> str:
    """In words: the GPU's name and memory, or the number of CPU threads."""
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        return f"{device} ({properties.name}, {properties.total_memory / 2**30:.0f} GiB)"
    if device.type == "cpu":
        return f"cpu ({torch.get_num_threads()} threads)"
    return str(device)


def set_determinism(device: torch.device) -> None:
    """Same inputs, same bits, on the same hardware: no float atomics, nothing chosen by timing."""
    if device.type != "cuda":
        return
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.cuda.set_device(device)
    torch.use_deterministic_algorithms(True)  # flash attention's backward heeds only this form
    torch.utils.deterministic.fill_uninitialized_memory = False  # it only costs time
    torch.backends.cudnn.benchmark = False
    torch.backends.cuda.enable_cudnn_sdp(False)  # its plans are chosen by heuristics that vary


def wants_compile(setting: str, device: torch.device) -> bool:
    """Whether to compile: `auto` does on CUDA where Triton is installed."""
    has_triton = importlib.util.find_spec("triton") is not None
    if setting == "on" and device.type == "cuda" and not has_triton:
        raise ConfigError("compile=on needs the package triton on CUDA; install it, or compile=off")
    return setting == "on" or (setting == "auto" and device.type == "cuda" and has_triton)


def prepare_execution(state: TrainState, config: RunConfig) -> None:
    """How the steps of `state` will run: fused kernels, compiled levels, a CUDA graph."""
    if config.kernels == "off":
        kernels.switch_off()
    if wants_compile(config.compile, state.device):
        compile_model(state.model, config.compile, len(state.carry.steps) // config.grad_accum)
    if config.cuda_graph == "auto" and state.device.type == "cuda":
        if state.ranks.size > 1 and not state.ranks.on_device:
            logger.info("gloo's collectives cannot be captured in a CUDA graph: no graph")
            return
        state.use_graph()


def compile_model(model: ReasoningModel, setting: str, rows: int) -> None:
    """Compile the levels of `model` for batches of `rows`; `auto`: where that fuses anything."""
    if model.compile_levels(rows if setting == "auto" else None):  # at its first call
        configure_compiler()


def configure_compiler() -> None:
    """Compiled kernels whose choice does not depend on timing, so that a resume is exact.

    They are kept with the others (torch's own place is lost when the machine starts anew).
    """
    import torch._dynamo
    import torch._inductor.config as inductor

    folder = cache_folder().parent / "inductor"
    with contextlib.suppress(OSError):
        folder.mkdir(parents=True, exist_ok=True)
        if os.access(folder, os.W_OK):
            os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(folder))
    torch._dynamo.config.cache_size_limit = 64
    if hasattr(inductor, "deterministic"):
        inductor.deterministic = True
    else:  # no benchmarking of reductions' tile sizes
        inductor.triton.autotune_pointwise = False


@contextlib.contextmanager
def memory_advice(config: RunConfig) -> Iterator[None]:
    """Turn running out of memory into one sentence that says which settings to change."""
    advice = (
        f"set arch.grad_checkpoint=block ({config.arch.grad_checkpoint}), lower global_batch_size "
        f"({config.global_batch_size}), raise grad_accum ({config.grad_accum}), or lower "
        f"arch.hidden_size ({config.arch.hidden_size})"
    )
    try:
        yield
    except torch.cuda.OutOfMemoryError as error:
        first = str(error).split(". ")[0]
        raise TrainingFailed(f"the GPU's memory is full ({first}): {advice}") from None
    except (MemoryError, RuntimeError) as error:
        text = str(error)
        if isinstance(error, MemoryError) or "DefaultCPUAllocator" in text:
            raise TrainingFailed(f"the memory is full: {advice}") from None
        raise
