"""Kernels launched again and again with little of Triton's Python in between.

Triton's own way from a call to a launch (binding, specialization, cache key) takes several times as
long as the launch. It is gone once; then the compiled kernel is called with addresses.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from copy import copy
from functools import lru_cache
from types import CellType, FunctionType
from typing import Any

import torch
from torch import Tensor
from triton import knobs
from triton.runtime import driver

Repeat = Callable[[int], Any]  # of a stream's address


class Launcher:
    """A kernel whose first parameters are tensors that may change, and whose others do not.

    It is compiled once for each tuple of dtypes of the changing tensors. So it must not be
    specialized on their alignment: name them in `do_not_specialize_on_alignment`.

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
        elif _here(self.device):
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
        _run(done, self.grid, self.device, [*[t.data_ptr() for t in changing], *self.tail])


class Kernel:
    """A kernel launched with any arguments.

    Args:
        kernel: a function of `triton.jit`.
    """

    def __init__(self, kernel: Any) -> None:
        self.kernel = kernel
        self.compiled: dict[tuple[Any, ...], Any] = {}

    def __call__(
        self,
        grid: tuple[int, ...],
        device: torch.device,
        arguments: Sequence[Any],
        constants: Mapping[str, Any],
        kinds: tuple[Any, ...] | None = None,
        **options: Any,
    ) -> None:
        """Launch on the current stream of `device`.

        Args:
            grid: one to three numbers of programs.
            device: of every tensor.
            arguments: tensors, tensor descriptors and numbers, in the order of the kernel.
            constants: its constants.
            kinds: what of the arguments Triton specializes on, where the caller knows a shorter
                form of it than can be found out here.
            options: of the compilation.
        """
        if device.type != "cuda":  # the interpreter
            self.kernel[grid](*arguments, **constants, **options)
        elif _here(device):
            self._launch(grid, device, arguments, constants, kinds, options)
        else:
            with torch.cuda.device(device):
                self._launch(grid, device, arguments, constants, kinds, options)

    def _launch(
        self,
        grid: tuple[int, ...],
        device: torch.device,
        arguments: Sequence[Any],
        constants: Mapping[str, Any],
        kinds: tuple[Any, ...] | None,
        options: Mapping[str, Any],
    ) -> Any:
        if kinds is None:
            kinds = tuple([_kind(x) for x in arguments])
        key = (device.index, kinds, *constants.values(), *options.values())
        done = self.compiled.get(key)
        if done is None or _hooked():
            done = self.compiled[key] = self.kernel[grid](*arguments, **constants, **options)
        else:
            _run(done, (*grid, 1, 1)[:3], device, _values(arguments, constants))
        return done

    def again(
        self,
        grid: tuple[int, ...],
        device: torch.device,
        arguments: Sequence[Any],
        constants: Mapping[str, Any],
        kinds: tuple[Any, ...] | None = None,
        **options: Any,
    ) -> Repeat | None:
        """Launch on CUDA's current device; see `__call__`.

        Returns:
            What launches the same on a stream, addresses included, without any of the work before
            it, the encoding of tensor descriptors above all. None where Triton's launcher is not
            built as known here. It keeps no tensor alive.
        """
        done = self._launch(grid, device, arguments, constants, kinds, options)
        return _flattened(done, (*grid, 1, 1)[:3], _values(arguments, constants))


def _values(arguments: Sequence[Any], constants: Mapping[str, Any]) -> list[Any]:
    """What the compiled kernel is called with."""
    return [
        *[x.data_ptr() if isinstance(x, Tensor) else x for x in arguments],
        *constants.values(),
    ]


def _kind(x: Any) -> Any:
    """What Triton may have specialized a kernel on."""
    if isinstance(x, Tensor):
        return x.dtype, x.data_ptr() % 16 == 0
    if isinstance(x, int):
        return x == 1, x % 16 == 0, x >= 1 << 31
    return float if isinstance(x, float) else (x.base.dtype, *x.block_shape)


def _run(done: Any, grid: tuple[int, ...], device: torch.device, values: list[Any]) -> None:
    """What `JITFunction.run` does in the end."""
    stream = driver.active.get_current_stream(device.index)
    done.run(*grid, stream, done.function, done.packed_metadata, None, None, None, *values)


def _flattened(done: Any, grid: tuple[int, ...], values: list[Any]) -> Repeat | None:
    """Triton's own launch in C with the arguments that `done.run` would hand to it.

    `done.run` turns descriptors into what the driver wants and passes all on to a function of C,
    the variable `launcher` of a closure where there are descriptors. A copy that passes them on to
    a list instead shows what they are.
    """
    given: list[Any] = []
    seen = lambda *arguments: given.extend(arguments)  # noqa: E731
    try:
        run, launch = copy(done.run), done.run.launch
        if isinstance(launch, FunctionType):
            place = launch.__code__.co_freevars.index("launcher")
            cells = list(launch.__closure__)
            final, cells[place] = cells[place].cell_contents, CellType(seen)
            code = (launch.__code__, launch.__globals__, None, launch.__defaults__, tuple(cells))
            run.launch = FunctionType(*code)
        else:
            final, run.launch = launch, seen
        mark = 1 << 40  # no stream's address: it must come back as the fourth
        run(*grid, mark, done.function, done.packed_metadata, None, None, None, *values)
    except (AttributeError, TypeError, ValueError):
        return None
    if given[:4] != [*grid, mark] or any(isinstance(x, Tensor) for x in _leaves(given)):
        return None
    head, tail = given[:3], given[4:]
    return lambda stream: final(*head, stream, *tail)


def _leaves(values: Sequence[Any]) -> Iterator[Any]:
    for x in values:
        yield from _leaves(x) if isinstance(x, list | tuple) else (x,)


def repeat_all(launches: Sequence[Repeat], device: torch.device) -> None:
    """Launch everything on the current stream of `device`, which must be CUDA's current one."""
    stream = driver.active.get_current_stream(device.index)
    for launch in launches:
        launch(stream)


def is_current(device: torch.device) -> bool:
    """Whether a launch may be repeated there: on CUDA's current device, with no profiler asking."""
    return device.type == "cuda" and _here(device) and not _hooked()


def _hooked() -> bool:
    """Whether a profiler has asked Triton to report launches."""
    runtime = knobs.runtime
    first, last = runtime.launch_enter_hook, runtime.launch_exit_hook  # or None
    return bool(getattr(first, "calls", first) or getattr(last, "calls", last))


def _here(device: torch.device) -> bool:
    """Whether this is CUDA's current device."""
    return not _several() or torch.cuda.current_device() == device.index


@lru_cache(maxsize=1)
def _several() -> bool:
    """Whether the current device may be another one than that of the tensors."""
    return torch.cuda.device_count() > 1
