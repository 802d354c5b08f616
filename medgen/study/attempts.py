"""Slows whoever tries many tokens: after a few wrong ones, an address may not log in for a while."""

from __future__ import annotations

import threading
import time
from collections import deque

from starlette.exceptions import HTTPException

MOST, SECONDS = 10, 60.0
MOST_ADDRESSES = 10_000


class Attempts:
    """Wrong tokens of the last minute by address. Only logging in is barred: whoever has a valid cookie goes on reading, so that a
    neighbour behind the same address cannot lock readers out.
    """

    def __init__(self) -> None:
        self._failures: dict[str, deque[float]] = {}
        self._lock = threading.Lock()

    def failed(self, address: str) -> None:
        """Count a wrong token."""
        with self._lock:
            if len(self._failures) >= MOST_ADDRESSES and address not in self._failures:
                del self._failures[next(iter(self._failures))]  # the oldest address
            self._failures.setdefault(address, deque(maxlen=MOST)).append(time.monotonic())

    def check(self, address: str) -> None:
        """Raises 429, with the seconds to wait, after `MOST` wrong tokens within `SECONDS`."""
        with self._lock:
            failures = self._failures.get(address, deque())
            wait = SECONDS - (time.monotonic() - failures[0]) if len(failures) == MOST else 0.0
        if wait > 0:
            whole = str(int(wait) + 1)
            raise HTTPException(429, f"too many wrong log-ins from here: wait {whole} seconds", {"retry-after": whole})
