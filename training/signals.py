"""SIGTERM and SIGINT end a run after the current step, on all ranks after the same one."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from types import FrameType

from training.ranks import ALONE, Ranks

_ECHO = 1.0  # seconds in which torchrun repeats a signal that the terminal has sent to all


class StopSignal:
    """Notes SIGTERM and SIGINT; a second SIGINT is immediate."""

    def __init__(self, ranks: Ranks = ALONE) -> None:
        self.name: str | None = None
        self._ranks = ranks
        self._own = 0  # the signal that came here
        self._since = 0.0
        self._asked: Callable[[], int] | None = None
        self._before = {}
        for number in (signal.SIGTERM, signal.SIGINT):
            self._before[number] = signal.signal(number, self._note)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if not self._own:
            self._own, self._since = number, time.monotonic()
            if "TORCHELASTIC_RUN_ID" not in os.environ:
                signal.signal(signal.SIGINT, signal.default_int_handler)
        elif number == signal.SIGINT and time.monotonic() - self._since > _ECHO:
            signal.default_int_handler(number, frame)

    def agreed(self) -> bool:
        """Whether to end here; call it once before every step, on every rank.

        Of several ranks, what one was told before a step ends all after it: the question goes out
        and is answered a step later, so that no rank waits.
        """
        heard = self._asked() if self._asked is not None else 0
        self._asked = self._ranks.largest(self._own) if not heard else None
        if self._ranks.size == 1:
            heard = self._own
        if heard:
            self.name = signal.Signals(heard).name
        return bool(heard)

    def settle(self) -> None:
        """Hear the last answer, which comes too late: no more steps are to be made."""
        if self._asked is not None:
            self._asked()
            self._asked = None

    def restore(self) -> None:
        """Put the handlers back that were there before."""
        for number, handler in self._before.items():
            signal.signal(number, handler)
