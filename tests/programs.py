"""Programs under test as real processes: what they say, signals, and what they leave.

A Program runs a script as a leader of its own. The script speaks in lines on stdout,
one event each, which the test awaits with a deadline; what it logs is on stderr. At the
end nothing that it started may be left.
"""

from __future__ import annotations

import os
import queue
import select
import signal
import socket
import struct
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO

SOON = 20.0  # seconds until we give up waiting for what must happen

# A sanitizer surrounds what is allocated, and keeps for a while what was freed.
SANITIZED = "asan" in os.environ.get("LD_PRELOAD", "")


def without_sanitizers() -> dict[str, str]:
    """The environment of a program that is not ours: no sanitizer is loaded into it."""
    return {name: text for name, text in os.environ.items() if name != "LD_PRELOAD"}


class Lines:
    """What a stream told so far, and the wait for more."""

    def __init__(self, stream: IO[str]) -> None:
        self.told: list[str] = []
        self._coming: queue.SimpleQueue[str | None] = queue.SimpleQueue()
        self._reader = threading.Thread(target=self._read, args=[stream], daemon=True)
        self._reader.start()

    def _read(self, stream: IO[str]) -> None:
        with stream:
            for line in stream:
                self._coming.put(line.rstrip("\n"))
        self._coming.put(None)

    def next(self) -> str | None:
        """The next line; None when there will be no more. queue.Empty if silent."""
        line = self._coming.get(timeout=SOON)
        if line is not None:
            self.told.append(line)
        else:
            self._coming.put(None)
        return line

    def close(self) -> None:
        """Nobody writes any more: the stream is closed when this returns."""
        self._reader.join(SOON)


class Program:
    """A running script; a context that ends with nothing of it left."""

    def __init__(
        self,
        arguments: Sequence[str],
        env: Mapping[str, str] | None = None,
        cwd: str | Path | None = None,
    ) -> None:
        self.process = subprocess.Popen(
            [sys.executable, *arguments],
            env={**os.environ, **(env or {})},
            cwd=cwd,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        self.pid = self.process.pid
        assert self.process.stdout is not None and self.process.stderr is not None
        self._out = Lines(self.process.stdout)
        self._log = Lines(self.process.stderr)
        self._taken: Counter[str] = Counter()

    @property
    def told(self) -> list[str]:
        """The lines on stdout that were awaited so far."""
        return self._out.told

    @property
    def stderr(self) -> str:
        """The lines on stderr that were awaited so far: after wait(), all."""
        return "\n".join(self._log.told)

    def _await(self, lines: Lines, what: str, wanted: Callable[[str], bool]) -> str:
        try:
            while (line := lines.next()) is not None:
                if wanted(line):
                    return line
        except queue.Empty:
            pass
        raise AssertionError(f"no {what} in {self.told}\n{self.stderr}")

    def until(self, event: str) -> list[str]:
        """Await the next line whose first word is event; its other words.

        Processes speak at the same time, so lines of other events may come before or
        after: each event is counted on its own.
        """
        self._taken[event] += 1
        while len(found := self.events(event)) < self._taken[event]:
            self._await(self._out, event, lambda line: True)
        return found[self._taken[event] - 1][1:]

    def until_logged(self, text: str) -> str:
        """Await a line on stderr that holds text."""
        return self._await(self._log, text, lambda line: text in line)

    def rest(self) -> None:
        """Await the end of all output: nobody is left who could write."""
        for lines in (self._out, self._log):
            try:
                while lines.next() is not None:
                    pass
            except queue.Empty:
                raise AssertionError(f"runs on: {self.told}\n{self.stderr}") from None

    def events(self, *names: str) -> list[list[str]]:
        """What was told so far, in words, of the events of these names."""
        words = [line.split() for line in self.told]
        return [line for line in words if line and line[0] in names]

    def wait(self) -> int:
        """The exit code, negative for a signal; reads what is told till then."""
        self.rest()
        return self.process.wait(SOON)

    def signal(self, number: int) -> None:
        os.kill(self.pid, number)

    def signal_group(self, number: int) -> None:
        """As the terminal does it for Ctrl-C."""
        os.killpg(self.pid, number)

    def __enter__(self) -> Program:
        return self

    def __exit__(self, *error: object) -> None:
        left = self.process.poll() is not None and members(self.pid)
        for pid in members(self.pid):
            os.kill(pid, signal.SIGKILL)
        self.process.wait(SOON)
        self._out.close()
        self._log.close()
        if error[0] is None:
            assert left == [], "processes are left behind"


def members(leader: int) -> list[int]:
    """The living processes that a leader (setsid) has started, and itself."""
    found = []
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        try:
            stat = (entry / "stat").read_text()
        except OSError:
            continue
        state, _, _, sid = stat.rpartition(")")[2].split()[:4]
        if int(sid) == leader and state != "Z":
            found.append(int(entry.name))
    return found


@contextmanager
def ending(*pids: int) -> Iterator[None]:
    """Do what ends these processes, then wait until they have ended."""
    fds = [os.pidfd_open(pid) for pid in pids]
    try:
        yield
        for pid, fd in zip(pids, fds, strict=True):
            assert select.select([fd], [], [], SOON)[0], f"process {pid} still runs"
    finally:
        for fd in fds:
            os.close(fd)


def kill(pid: int, number: int = signal.SIGKILL) -> None:
    """Signal a process and wait until it has ended."""
    with ending(pid):
        os.kill(pid, number)


def connect(address: str) -> socket.socket:
    """A connection to host:port or unix:path."""
    if address.startswith("unix:"):
        sock = socket.socket(socket.AF_UNIX)
        sock.settimeout(SOON)
        sock.connect(address.removeprefix("unix:"))
        return sock
    host, _, port = address.rpartition(":")
    return socket.create_connection((host.strip("[]"), int(port)), timeout=SOON)


def repeats(sock: socket.socket) -> int:
    """How often TCP had to say something again; behind connect(): its handshake."""
    info = sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 104)
    return int(struct.unpack_from("I", info, 100)[0])  # tcpi_total_retrans


def read_all(sock: socket.socket) -> bytes:
    """Everything until the peer closes."""
    parts = []
    while part := sock.recv(65536):
        parts.append(part)
    return b"".join(parts)


def ask(address: str, message: bytes = b"GET / HTTP/1.1\r\nHost: a\r\n\r\n") -> bytes:
    """Send a message on a new connection; the whole answer, to its close."""
    with connect(address) as sock:
        sock.sendall(message)
        return read_all(sock)
