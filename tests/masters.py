"""What the programs of test_prefork.py share: a tiny server, and a run that counts.

A test runs `from masters import *` and a few lines in a process of its own.
"""

from __future__ import annotations

import gc
import multiprocessing
import os
import select
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import NoReturn

from prefork import Prefork, Server, errors, is_child

__all__ = [
    "Drainer",
    "Prefork",
    "Server",
    "answer",
    "errors",
    "is_child",
    "listening",
    "multiprocessing",
    "os",
    "pause",
    "run",
    "say",
    "select",
    "serve",
    "signal",
    "socket",
    "subprocess",
    "sys",
    "text",
    "threading",
    "time",
]


def say(*words: object) -> None:
    """One event, whole, whichever process says it."""
    os.write(1, (" ".join(map(str, words)) + "\n").encode())


def answer(sock: socket.socket) -> bool:
    """Take one connection, read to the empty line, answer with our pid and close."""
    try:
        conn, _ = sock.accept()
    except BlockingIOError:
        return False
    with conn:
        conn.setblocking(True)
        say("begun", os.getpid())
        data = b""
        while not data.endswith(b"\r\n\r\n"):
            part = conn.recv(65536)
            if not part:
                return True
            data += part
        conn.sendall(str(os.getpid()).encode())
    return True


def serve(sock: socket.socket) -> None:
    """A stranger's server: it knows nothing of us and never returns."""
    while True:
        answer(sock)


class Drainer:
    """The smallest server that drains: it answers what is queued, then returns."""

    def boot(self) -> None:
        """For tests to override."""

    def serve(self, sockets, *, on_ready, lifeline, on_master_death, **_):
        self.boot()
        wake, end = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        signal.set_wakeup_fd(end)  # a handler may come too late to end select()
        signal.signal(signal.SIGTERM, lambda *_: say("asked", os.getpid()))
        on_ready()
        waiting = [wake, lifeline, *sockets]
        while not {wake, lifeline} & set(ready := select.select(waiting, [], [])[0]):
            for sock in ready:
                answer(sock)
        if lifeline in ready and on_master_death is not None:
            on_master_death()
        for sock in sockets:
            while answer(sock):
                pass


def pause() -> NoReturn:
    """Wait until a signal's handler raises, even if the signal comes just before."""
    wake, end = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
    signal.set_wakeup_fd(end)
    while True:
        select.select([wake], [], [])
        os.read(wake, 512)


def listening() -> int:
    """How many listening sockets this process holds."""
    count = 0
    for fd in map(int, os.listdir("/proc/self/fd")):
        try:
            sock = socket.socket(fileno=fd)
        except OSError:
            continue
        count += sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN)
        sock.detach()
    return count


def text(address: tuple[str, int] | str) -> str:
    """host:port or unix:path, as the tests' own process connects to it."""
    return f"unix:{address}" if isinstance(address, str) else "{}:{}".format(*address)


SIGNALS = (
    *{signal.SIGTERM, signal.SIGINT, signal.SIGQUIT, signal.SIGHUP},
    *{signal.SIGCHLD, signal.SIGPIPE, signal.SIGTTIN, signal.SIGTTOU},
)


def census() -> dict[str, object]:
    """What a run must leave as it found it."""
    wakeup = signal.set_wakeup_fd(-1)
    signal.set_wakeup_fd(wakeup)
    children = Path("/proc/self/task").glob("*/children")
    return {
        "fds": sorted(os.listdir("/proc/self/fd")),
        "children": "".join(path.read_text() for path in children),
        "mask": signal.pthread_sigmask(signal.SIG_BLOCK, []),
        "handlers": [signal.getsignal(number) for number in SIGNALS],
        "wakeup": wakeup,
        "frozen": gc.get_freeze_count() > 0,
    }


def run(
    address="127.0.0.1:0", server=None, call=None, **options
) -> BaseException | None:
    """Listen and serve with callbacks that speak; tell the end, and what is left.

    call(master) is what is called instead of listen_and_serve().
    """
    call = call or (lambda master: master.listen_and_serve(address))
    master = Prefork(server if server is not None else Drainer())
    callbacks = {
        "on_child_spawn": lambda pid: say("spawn", pid),
        "on_master_ready": lambda pids: say("ready", text(master.address), *pids),
        "on_child_recover": lambda old, new: say("recover", old, new),
    }
    for name, value in ({"workers": 2} | callbacks | options).items():
        setattr(master, name, value)
    sys.modules["__main__"].master = master
    if is_child():  # this program was run again: it serves, and ends here
        call(master)
    before = census()
    raised = None
    try:
        call(master)
    except BaseException as error:
        raised = error
        say("raised", type(error).__name__, str(error).strip().replace("\n", " | "))
        error.__traceback__ = None
    else:
        say("returned")
    after = census()
    changed = {name for name in before if before[name] != after[name]}
    say("left", *(f"{name}:{before[name]}->{after[name]}" for name in changed))
    return raised
