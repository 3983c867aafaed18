"""Signals of a program that waits in one call, and the pipe that ends its wait.

A signal to the process goes to any thread that does not block it, and by default would
end us there, or (SIGCHLD) be lost. So each has a handler, and Python's own writes its
number to the pipe, whichever thread it meets.
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Iterable, Iterator, Sequence

WAKE = b"\0"  # written by other threads; signals write their number


class Wake:
    """The pipe; open() and close() belong to the thread that waits."""

    def __init__(self) -> None:
        self.fd = self.end = -1
        self._lock = threading.RLock()

    def open(self) -> None:
        self.fd, self.end = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)

    def up(self) -> None:
        """End the wait, if there is one. Any thread, any signal handler."""
        with self._lock, contextlib.suppress(BlockingIOError):
            if self.end >= 0:
                os.write(self.end, WAKE)

    def read(self) -> bytes:
        """The numbers of the signals that have come, among other bytes."""
        try:
            return os.read(self.fd, 512)
        except BlockingIOError:
            return b""

    def close(self) -> None:
        with self._lock:
            fds = self.fd, self.end
            self.fd = self.end = -1
        for fd in fds:
            os.close(fd)


def ignore(number: int, frame: object) -> None:
    """A handler that does nothing: the wakeup fd tells, or nobody is to know."""


def let_through(numbers: Iterable[int]) -> list[int]:
    """Of these signals, those that nobody had blocked in this thread before."""
    blocked = signal.pthread_sigmask(signal.SIG_BLOCK, [])
    return [number for number in numbers if number not in blocked]


@contextlib.contextmanager
def letting_through(numbers: Sequence[int]) -> Iterator[None]:
    """While the user's code runs: what it starts must not have these blocked."""
    signal.pthread_sigmask(signal.SIG_UNBLOCK, numbers)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_BLOCK, numbers)


@contextlib.contextmanager
def collected(numbers: Iterable[int], wake_end: int) -> Iterator[None]:
    """Have these written to the wake pipe. What was set before is restored."""
    old_fd = signal.set_wakeup_fd(wake_end, warn_on_full_buffer=False)
    old = {number: signal.getsignal(number) for number in numbers}
    for number in numbers:
        signal.signal(number, ignore)
    try:
        yield
    finally:
        signal.set_wakeup_fd(old_fd)
        for number, handler in old.items():
            if handler is not None:  # None: not installed by Python
                signal.signal(number, handler)


@contextlib.contextmanager
def awaitable_children() -> Iterator[None]:
    """Have ended children wait for us, where SIGCHLD is ignored and they would not."""
    if signal.getsignal(signal.SIGCHLD) is not signal.SIG_IGN:
        yield
        return
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    try:
        yield
    finally:
        signal.signal(signal.SIGCHLD, signal.SIG_IGN)
