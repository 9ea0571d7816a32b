"""Signals that end a training."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager


class InterruptHandler:
    """SIGTERM and SIGINT end a training: at once, or, where they are `deferred`, as soon as that is left.

    A context: the handlers of before come back when it is left. Outside the main thread, which alone gets signals, it
    does nothing.

    Args:
        highest: of several processes that train together: their highest number; they then end together, at the next
            `check` after a signal to any of them.

    Raises: KeyboardInterrupt: in the main thread after SIGINT. SystemExit: of status 143 after SIGTERM.
    """

    def __init__(self, highest: Callable[[int], int] | None = None):
        self.waits, self.number, self.before, self.highest = False, None, {}, highest

    def __enter__(self) -> InterruptHandler:
        if threading.current_thread() is threading.main_thread():
            self.before = {number: signal.signal(number, self._note) for number in (signal.SIGTERM, signal.SIGINT)}
        return self

    def __exit__(self, *error) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: object) -> None:
        self.number = number
        if not self.waits and self.highest is None:
            self._end()

    def _end(self) -> None:
        raise KeyboardInterrupt if self.number == signal.SIGINT else SystemExit(128 + self.number)

    @contextmanager
    def deferred(self) -> Iterator[None]:
        """What is done within is finished before a signal ends the training."""
        self.waits = True
        try:
            yield
        finally:
            self.waits = False
        if self.number is not None and self.highest is None:
            self._end()

    def check(self) -> None:
        """Ends several processes together if one of them was told to end; each must come by."""
        if self.highest is not None and (number := self.highest(self.number or 0)):
            self.number = number
            self._end()
