"""What protects a run: stop signals that save first, and naming the samples behind a NaN."""

from __future__ import annotations

import signal
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

import torch

EXIT_STOPPED = 75
"""Exit code of a run that was asked to stop and saved (EX_TEMPFAIL: the same command again continues it)."""

_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)


class NonFiniteError(RuntimeError):
    """Too many steps in a row had a NaN or infinite loss or gradient."""


class StopRequested(Exception):
    """Raised at a safe point after a stop signal, where work is resumable without saving anything more."""


class StopFlag:
    """Whether this process was asked to stop; set by SIGTERM, SIGUSR1 and the first Ctrl-C, read at safe points."""

    def __init__(self) -> None:
        self.requested = False

    @contextmanager
    def listening(self) -> Iterator[StopFlag]:
        """Catch the signals inside the block. Outside the main thread (a notebook's executor) none can be caught."""
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
"""The process's one flag: long work outside the loop (cache building) polls `STOP.check()` too."""


def suspects(items: Iterable[dict[str, Any]]) -> set[str]:
    """Ids of the items that hold a NaN or infinite number."""
    return {str(item["id"]) for item in items if any(map(_nonfinite, item.values()))}


def _nonfinite(value: Any) -> bool:
    if isinstance(value, dict):
        return any(map(_nonfinite, value.values()))
    if isinstance(value, (list, tuple)):
        return any(map(_nonfinite, value))
    tensor = value if isinstance(value, torch.Tensor) else torch.tensor(value) if isinstance(value, float) else None
    return tensor is not None and tensor.is_floating_point() and not bool(tensor.isfinite().all())
