"""The ways in which workers come to be. Each is a Source: seat in, pid out.

    Forks       the master forks itself: what it has loaded is shared, copy on write
    Programs    the program is run again, once for each worker
    Template    the program is run again once, and forks workers for us
    Producer    the user's command_producer starts them

A program is run again as it was: interpreter, its flags, arguments, first directory.
What it inherits has fixed numbers, from fd 3 on: listeners, then pipes; a variable of
its environment says which is which (worker.Inheritance).
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import signal
import socket
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

from prefork import _core, _processes, log, worker
from prefork.errors import (
    CommandProducerNoneError,
    CommandProducerNotStartedError,
    ConfigError,
    ReloadError,
)

try:
    STARTED_IN: str | None = os.getcwd()
except OSError:  # it was removed
    STARTED_IN = None


@dataclass
class Seat:
    """What the master gives to a worker."""

    slot: int
    sockets: Sequence[socket.socket]
    report: int  # the write end
    lifeline: int  # the read end
    row: int  # of the scoreboard
    board: _core.Scoreboard

    def fds(self) -> list[int]:
        """What a template is sent of it."""
        return [self.report, self.lifeline, *(sock.fileno() for sock in self.sockets)]


class Source(Protocol):
    """Where workers come from; belongs to the master's main thread."""

    reports: bool  # whether its workers tell when they accept
    executes: bool  # whether each runs the program from its beginning

    def start(self, seat: Seat) -> int: ...

    def close(self) -> None: ...


# ---- By fork -------------------------------------------------------------------------


class Forks:
    """Children of the master's own memory."""

    reports, executes = True, False

    def __init__(
        self, work: worker.Work, release: Callable[[Seat], Callable[[], None]]
    ) -> None:
        self.work = work
        self.release = release  # what a child must close that is not in its seat

    def start(self, seat: Seat) -> int:
        log.flush()
        task = worker.Task(
            work=self.work,
            slot=seat.slot,
            sockets=seat.sockets,
            report=seat.report,
            lifeline=seat.lifeline,
            master=os.getpid(),
            release=self.release(seat),
            board=seat.board,
            row=seat.row,
        )
        pid = os.fork()
        if pid == 0:
            worker.run(task)
        return pid

    def close(self) -> None:
        pass


# ---- By running the program again ----------------------------------------------------


def check_program() -> None:
    """Raise ConfigError if this program cannot be run again."""
    if not sys.executable or not _names_a_program(sys.orig_argv[1:]):
        raise ConfigError(
            "spawn must be fork, not 'exec', in a program that cannot be run again: "
            "start it as a script, with -m or with -c"
        )


def _names_a_program(arguments: Sequence[str]) -> bool:
    """Whether the interpreter was told what to run: neither stdin nor a prompt."""
    rest = iter(arguments)
    for argument in rest:
        if argument == "-" or not argument.startswith("-"):
            return argument != "-"
        if argument.startswith("--"):
            if argument == "--check-hash-based-pycs":
                next(rest, None)
            continue
        for at, letter in enumerate(argument[1:], 1):
            if letter in "cm":
                return True
            if letter in "WX":
                if at == len(argument) - 1:
                    next(rest, None)
                break
    return False


def run_again(child: worker.Inheritance, fds: Sequence[int]) -> int:
    """Start this program as it was started; it finds fds at 3 and behind."""
    log.flush()
    argv = [sys.executable, *sys.orig_argv[1:]]
    environ = {**os.environ, **child.environment()}
    return _processes.start_program(sys.executable, argv, environ, fds, STARTED_IN)


class Programs:
    """The program once more for each worker."""

    reports, executes = True, True

    def __init__(self, child: worker.Inheritance) -> None:
        self.child = child  # with what is the same for all

    def start(self, seat: Seat) -> int:
        listeners = range(_processes.FIRST_FD, _processes.FIRST_FD + len(seat.sockets))
        child = replace(
            self.child,
            slot=seat.slot,
            listeners=list(listeners),
            report=listeners.stop,
            lifeline=listeners.stop + 1,
            board=listeners.stop + 2,
            row=seat.row,
        )
        fds = [sock.fileno() for sock in seat.sockets]
        return run_again(child, [*fds, seat.report, seat.lifeline, seat.board.fileno()])

    def close(self) -> None:
        pass


ANSWER_TIME = 10.0  # seconds in which a template has forked: the master waits for it


class Template:
    """The program once more, stopped where it would serve; it forks on demand.

    launch() starts it. It is ready when its report pipe says so; from then on start()
    orders workers of it.
    """

    reports, executes = True, False

    def __init__(self) -> None:
        self.pid: int | None = None
        self.control: socket.socket | None = None

    def launch(
        self,
        child: worker.Inheritance,
        report: int,
        lifeline: int,
        board: _core.Scoreboard,
    ) -> int:
        first = _processes.FIRST_FD
        child = replace(
            child,
            role="template",
            listeners=[],
            control=first,
            report=first + 1,
            lifeline=first + 2,
            board=first + 3,
        )
        self.control, end = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        try:
            with end:
                fds = [end.fileno(), report, lifeline, board.fileno()]
                self.pid = run_again(child, fds)
        except BaseException:
            self.close()
            raise
        return self.pid

    def start(self, seat: Seat) -> int:
        assert self.control is not None and self.pid is not None
        self.control.settimeout(ANSWER_TIME)
        try:
            order = json.dumps({"slot": seat.slot, "row": seat.row}).encode()
            socket.send_fds(self.control, [order], seat.fds())
            pid = int(self.control.recv(64) or b"-1")
        except TimeoutError:
            os.kill(self.pid, signal.SIGKILL)  # ours, and not reaped while we are here
            pid = -1
        except OSError:
            pid = -1
        if pid <= 0:
            raise ReloadError("the template, which forks workers, has failed")
        return pid

    def close(self) -> None:
        """Let it end: it reads the end of its orders."""
        if self.control is not None:
            self.control.close()
            self.control = None


# ---- By the user ---------------------------------------------------------------------


class Producer:
    """command_producer(files) -> Popen.

    While it is called, os.environ holds the marker of a child and what goes with it.
    The listener is at fd 3, unless the program had something else there before.
    """

    reports, executes = False, True

    def __init__(
        self,
        produce: Callable[[list[Any]], Any],
        child: worker.Inheritance,
        letting_through: Callable[[], contextlib.AbstractContextManager[None]],
    ) -> None:
        self.produce = produce
        self.child = child
        self.letting_through = letting_through  # no signal is blocked in it
        self.files: dict[int, socket.socket] = {}  # by the fd that they copy
        self.made: dict[int, Any] = {}

    def start(self, seat: Seat) -> int:
        files = [self._file(sock) for sock in seat.sockets]
        numbers = [file.fileno() for file in files]
        child = replace(self.child, slot=seat.slot, listeners=numbers)
        with _environment(child.environment()), self.letting_through():
            process = self.produce(files)
        if process is None:
            raise CommandProducerNoneError(
                "command_producer returned None: it must return a subprocess.Popen"
            )
        pid = getattr(process, "pid", None)
        if not isinstance(pid, int) or getattr(process, "returncode", None) is not None:
            raise CommandProducerNotStartedError(
                f"command_producer must return a started process, not {process!r}"
            )
        self.made[pid] = process
        return pid

    def _file(self, sock: socket.socket) -> socket.socket:
        fd = sock.fileno()
        if fd == _processes.FIRST_FD:
            return sock
        if fd not in self.files:
            copy = fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, _processes.FIRST_FD)
            self.files[fd] = socket.socket(fileno=copy)
        return self.files[fd]

    def reaped(self, pid: int, code: int | None) -> None:
        """Tell its Popen that the process has ended, which the master has reaped."""
        process = self.made.pop(pid, None)
        if process is not None and hasattr(process, "returncode"):
            with contextlib.suppress(AttributeError):
                process.returncode = code if code is not None else -1

    def close(self) -> None:
        for file in self.files.values():
            file.close()
        self.files.clear()


@contextlib.contextmanager
def _environment(values: dict[str, str]) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
