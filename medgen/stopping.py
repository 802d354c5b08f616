"""Asking a process to stop politely: signals set one flag, long work polls it at points where it can be continued later."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)


class StopRequested(Exception):
    """Raised at a safe point after a stop signal, where work is resumable without saving anything more."""


class StopFlag:
    """Whether this process was asked to stop; set by SIGTERM, SIGUSR1 and the first Ctrl-C, read at safe points."""

    def __init__(self) -> None:
        self.requested = False

    @contextmanager
    def listening(self) -> Iterator[StopFlag]:
        """Catch the signals inside the block. Outside the main thread (a notebook's executor) none can be caught."""
        self.requested = False
        previous: dict[signal.Signals, Any] = {}
        try:
            for caught in _SIGNALS:
                previous[caught] = signal.signal(caught, self._handle)
        except ValueError:
            pass
        try:
            yield self
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        del frame
        self.requested = True
        if number == signal.SIGINT:
            signal.signal(signal.SIGINT, signal.default_int_handler)  # the second Ctrl-C means it

    def check(self) -> None:
        """Raise `StopRequested` if a stop was asked for."""
        if self.requested:
            raise StopRequested


STOP = StopFlag()
"""The process's one flag."""
