"""Signals that ask a run to stop: noted when they come, acted on between two steps."""

import os
import signal
import time
from typing import Any

from timefast import distributed

# torchrun passes on the signals it gets, and a terminal or a batch system sends them to every
# process as well: what comes this soon after the first is the same wish
SAME_SIGNAL = 2.0  # seconds


class Interrupt:
    """Notes the first SIGINT, SIGTERM or SIGUSR1, for the loop to act on; a second one exits.

    The exit code of an interrupted run is 128 + signal number.
    """

    def __init__(self) -> None:
        self.signal: int | None = None

    def __enter__(self) -> "Interrupt":
        numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
        self._before = {s: signal.signal(s, self._note) for s in numbers}
        return self

    def __exit__(self, *_: Any) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: Any) -> None:
        if self.signal is None:
            self.signal, self._at = number, time.monotonic()
        elif distributed.world_size() == 1 or time.monotonic() - self._at > SAME_SIGNAL:
            os._exit(128 + number)


class Interrupted(Exception):
    """A signal asked the run to stop, and everything is saved."""
