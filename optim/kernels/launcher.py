"""One kernel on one device, launched again and again with little of Triton's Python in between."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from triton import knobs
from triton.runtime import driver


class Launcher:
    """A kernel whose first parameters are tensors that may change, and whose others do not.

    Triton's own way from a call to a launch (binding, specialization, cache key) takes several
    times as long as the launch. It is gone once for each tuple of dtypes of the changing tensors;
    then the compiled kernel is called with their addresses. So a kernel must not be specialized on
    the alignment of its changing parameters: name them in `do_not_specialize_on_alignment`.

    Args:
        kernel: a function of `triton.jit`.
        grid: one to three numbers of programs.
        device: of every tensor.
        fixed: the parameters after the changing ones, in the order of the kernel, constants last.
        options: of the compilation, `num_warps` among them.
    """

    def __init__(
        self,
        kernel: Any,
        grid: tuple[int, ...],
        device: torch.device,
        fixed: Mapping[str, Any],
        **options: Any,
    ) -> None:
        self.kernel, self.fixed, self.options = kernel, dict(fixed), options
        self.grid = (*grid, 1, 1)[:3]
        self.device = device
        self.tail = [v.data_ptr() if isinstance(v, Tensor) else v for v in fixed.values()]
        self.compiled: dict[tuple[torch.dtype, ...], Any] = {}

    def __call__(self, *changing: Tensor) -> None:
        """Launch on the current stream of the device."""
        if self.device.type != "cuda":  # the interpreter
            self.kernel[self.grid](*changing, **self.fixed, **self.options)
        elif torch.cuda.current_device() == self.device.index:
            self._launch(changing)
        else:
            with torch.cuda.device(self.device):
                self._launch(changing)

    def _launch(self, changing: tuple[Tensor, ...]) -> None:
        dtypes = tuple([t.dtype for t in changing])
        done = self.compiled.get(dtypes)
        if done is None or _hooked():
            done = self.kernel[self.grid](*changing, **self.fixed, **self.options)
            self.compiled[dtypes] = done
            return
        stream = driver.active.get_current_stream(self.device.index)
        addresses = [t.data_ptr() for t in changing]
        done.run(
            *self.grid, stream, done.function, done.packed_metadata, None, None, None,
            *addresses, *self.tail,
        )  # fmt: skip


def _hooked() -> bool:
    """Whether a profiler has asked Triton to report launches."""
    hooks = knobs.runtime.launch_enter_hook, knobs.runtime.launch_exit_hook  # or None
    return any([getattr(hook, "calls", hook) for hook in hooks])
