"""Slots, which stay, and the lives of the workers that come and go in them.

A slot has at most one worker that serves, and besides it, in a reload, a successor that
boots. Who is told to leave, or says so, is no slot's any more: it drains, and somebody
else takes its place meanwhile.
"""

from __future__ import annotations

import enum
import os
import socket
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from prefork import worker

CLEAN_LIFE = 1.0  # seconds after which a worker's unasked exit 0 is no crash


class WorkerState(str, enum.Enum):
    """Of a slot; what the master knows of its worker."""

    VACANT = "vacant"
    BOOTING = "booting"
    READY = "ready"
    LEAVING = "leaving"


class Worker(NamedTuple):
    """One entry of `Prefork.workers`; pid is None while the slot is vacant.

    row is its row of the scoreboard, as `Scoreboard.row()` gives it; None without one.
    """

    pid: int | None
    slot: int
    state: WorkerState
    row: dict[str, Any] | None = None


class Life:
    """Of one worker, or of a template: what the master knows and has heard of it."""

    def __init__(self, slot: Slot | None, source: Any, generation: int) -> None:
        self.slot = slot  # None: a template
        self.source = source
        self.generation = generation
        self.pid = 0
        self.row = -1  # of the scoreboard
        self.report: int | None = None  # the pipe's read end
        self.text = bytearray()
        self.ready_at: float | None = None
        self.planned = False  # told to leave, or leaving because somebody told it
        self.kill_at: float | None = None  # when patience ends

    def hear(self) -> bool:
        """Read what the pipe holds; False at its end."""
        assert self.report is not None
        while True:
            try:
                data = os.read(self.report, 65536)
            except BlockingIOError:
                return True
            if not data:
                return False
            self.text += data

    @property
    def accepts(self) -> bool:
        """It said that it accepts; a template, that it can be given orders."""
        if self.slot is None:
            return self.text.startswith(worker.READY) and self.text.endswith(b"\n")
        return self.text.startswith(worker.READY)

    @property
    def has_accepted(self) -> bool:
        """The same, also of one that said before that it leaves, and did not."""
        return self.failure is None and worker.READY in self.text

    @property
    def options(self) -> str:
        """What a template has to say."""
        return self.text[1:].decode()

    @property
    def failure(self) -> str | None:
        """The traceback of a worker that did not come to accept."""
        if not self.text.startswith(worker.FAILED):
            return None
        return self.text[1:].decode("utf-8", "replace")

    @property
    def asked(self) -> bool:
        """The worker said that it leaves because it was asked to."""
        return self.failure is None and self.text.endswith(worker.LEAVING)

    def boot_failure(self, code: int | None, ended: str) -> str | None:
        """Why it did not come to accept, if that is not to be taken for a crash.

        A program that is run again may end before it comes to serve, and before it can
        tell: killed, it has crashed; by itself, it will do so again.
        """
        if self.failure is not None or self.ready_at is not None or self.asked:
            return self.failure
        if self.source.executes and self.source.reports and (code or 0) >= 0:
            return f"{ended} before it came to listen_and_serve()\n"
        return None

    def left_well(self, code: int | None) -> bool:
        """The exit was planned: asked for, or clean after some time of service."""
        if self.planned or self.asked:
            return True
        if code != 0 or self.ready_at is None:
            return False
        return time.monotonic() - self.ready_at >= CLEAN_LIFE


class Slot:
    """The place of one worker.

    What a worker has by virtue of its place (its sockets) is made before the first one,
    lasts as long as the slot, and is closed with it: the master's _open_slot() and
    _close_slot().
    """

    def __init__(self, index: int, sockets: Sequence[socket.socket]) -> None:
        self.index = index
        self.sockets = list(sockets)
        self.life: Life | None = None
        self.successor: Life | None = None  # boots, to take the place of life
        self.previous: int | None = None  # the worker that the next one replaces
        self.due: float | None = None  # when the next one is to be started
        self.source: Any = None  # where the next one comes from
        self.adopter: Life | None = None  # who accepts for it while it is vacant

    @property
    def state(self) -> WorkerState:
        if self.life is None:
            return WorkerState.VACANT
        if self.life.planned or self.life.asked:
            return WorkerState.LEAVING
        ready = self.life.ready_at is not None
        return WorkerState.READY if ready else WorkerState.BOOTING

    def worker(self, row_of: Callable[[int], dict[str, Any] | None]) -> Worker:
        """What `Prefork.workers` tells of it."""
        if self.life is None:
            return Worker(None, self.index, self.state)
        row = row_of(self.life.row)
        counts = row is not None and row["pid"] != 0  # a stranger never does
        return Worker(self.life.pid, self.index, self.state, row if counts else None)
