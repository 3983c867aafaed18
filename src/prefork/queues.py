"""The queues of slots whose worker is not there: somebody accepts for each.

With a socket for each slot, what waits at one without a worker, or whose worker still
boots, is accepted by another meanwhile.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence

from prefork import _core
from prefork.slots import Life, Slot, WorkerState


class Queues:
    """Who accepts for whom; lives in the master's main thread."""

    def __init__(self, board: _core.Scoreboard, lives: Mapping[int, Life]) -> None:
        self.board = board
        self.lives = lives  # by pid, of all that have not ended

    def attend(self, slots: Sequence[Slot]) -> None:
        """Workers came, went or began to accept: see that none is left alone."""
        ready = [slot.life for slot in slots if slot.state is WorkerState.READY]
        able = [life for life in ready if life is not None and life.row >= 0]
        for slot in slots:
            if slot.state is WorkerState.READY:
                self.release(slot)
            elif slot.adopter not in able:
                self._adopt(slot, able)

    def _adopt(self, slot: Slot, able: Sequence[Life]) -> None:
        """The worker with the fewest connections accepts for this slot, too."""
        held = {life.row: self.board.row(life.row) for life in able}
        slot.adopter = min(
            able,
            key=lambda life: (held[life.row] or {}).get("connections", 0),
            default=None,
        )
        if slot.adopter is None:
            return
        try:
            for sock in slot.sockets:
                self.board.adopt(slot.adopter.row, slot.index, sock.fileno())
        except OSError:  # a stranger, or too busy: the slot's next worker comes soon
            self.release(slot)

    def release(self, slot: Slot) -> None:
        """Nobody accepts for this slot any more but its own worker."""
        adopter, slot.adopter = slot.adopter, None
        if adopter is not None and adopter.pid in self.lives:
            with contextlib.suppress(OSError):
                self.board.release(adopter.row, slot.index)
