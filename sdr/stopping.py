"""Signals that ask a run to end: it ends between two writes, and the same command goes on."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager

EXIT_CODES = {signal.SIGINT: 130, signal.SIGTERM: 143, signal.SIGUSR1: 143}


class Stop:
    """Whether a signal has asked the run to end; a second interrupt waits for nothing."""

    def __init__(self) -> None:
        self.signal: int | None = None
        self.interruptible = False

    def __call__(self) -> bool:
        return self.signal is not None

    def note(self, number: int, frame: object) -> None:
        """Handles a signal."""
        again, self.signal = self(), self.signal or number
        if self.interruptible or (again and number == signal.SIGINT):
            self.interruptible = False  # what ends is not interrupted
            raise KeyboardInterrupt

    @contextmanager
    def at_once(self) -> Iterator[None]:
        """Where each signal raises KeyboardInterrupt, since what is done there can be done again."""
        self.check()
        self.interruptible = True
        try:
            self.check()  # one may have come in between
            yield
        finally:
            self.interruptible = False
        self.check()  # an exception that a signal raised in a callback of C code may have been lost there

    def check(self) -> None:
        if self():
            raise KeyboardInterrupt

    @property
    def code(self) -> int:
        """Exit code of a run that was ended; where another process got the signal, that was most likely SIGTERM."""
        return EXIT_CODES[self.signal or signal.SIGTERM]


@contextmanager
def stopping() -> Iterator[Stop]:
    """SIGTERM, SIGUSR1 and the first interrupt become a wish that the run reads between two writes.

    One that is ignored, as under nohup, or handled by no Python stays so. Outside of the main thread, which alone may
    handle signals, all do.
    """
    stop, before = Stop(), {}
    try:
        if threading.current_thread() is threading.main_thread():
            for number in EXIT_CODES:
                if signal.getsignal(number) not in (signal.SIG_IGN, None):
                    before[number] = signal.signal(number, stop.note)
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
