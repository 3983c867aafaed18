"""A rolling reload: new code, one slot after the other, and nobody is turned away.

    1. where the new workers come from is made ready: after a fork of the master they
       would run the old code, so the program is run again as a template, up to where it
       would serve; workers that run the program themselves need nothing
    2. in each slot a successor is started; when it accepts, the old worker is told to
       leave; when that is gone, the next slot has its turn
    3. when all are new, what the program now says of its options is taken over

What fails on the way, fails the reload: it is logged, and the workers that are there go
on. Another reload asked for meanwhile begins anew after the present step.
"""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING

from prefork.errors import PreforkError, ReloadError, SpawnError
from prefork.slots import Life, Slot
from prefork.spawn import Source, Template

if TYPE_CHECKING:
    from prefork.master import Master


class Reload:
    """One run through the slots; told by the master what happens to its workers."""

    def __init__(self, master: Master) -> None:
        self.master = master
        self.queue: deque[Slot] = deque()
        self.slot: Slot | None = None  # whose successor boots
        self.leaving: Life | None = None  # who is waited for
        self.template: Life | None = None
        self.source: Source | None = None  # of the new workers, once it is ready
        self.again = False
        self.over = False

    def begin(self) -> None:
        master = self.master
        master.generation += 1
        self.queue = deque(master.slots)
        self.again, self.source = False, None
        try:
            self.template = master.launch_template()
        except (OSError, PreforkError) as error:
            self.fail(str(error))
            return
        if self.template is None:
            self.source = master.source
            self._proceed()

    def _proceed(self) -> None:
        """Go on to the next slot that has a worker."""
        self.slot = self.leaving = None
        if self.again:
            self.begin()
            return
        while self.queue:
            slot = self.queue.popleft()
            if slot not in self.master.slots:
                continue
            assert self.source is not None
            if slot.life is None:
                slot.source = self.source
                continue
            self.slot = slot
            try:
                self.master.spawn_successor(slot, self.source)
            except (ReloadError, SpawnError) as error:
                self.fail(str(error))
            return
        self._finish()

    def _finish(self) -> None:
        self.over = True
        assert self.source is not None
        self.master.source = self.source
        self.master.reloaded(self.template.options if self.template else "")

    def fail(self, reason: str) -> None:
        """Leave everything as it is by now."""
        if self.again:
            self.slot = None
            self.begin()
            return
        self.over = True
        self.master.reload_failed(reason.rstrip())

    # ---- What the master tells ----

    def on_template_ready(self, life: Life) -> None:
        assert isinstance(life.source, Template)
        if life is self.template:
            self.source = life.source
            self._proceed()

    def on_template_end(self, life: Life, reason: str) -> None:
        if life is self.template:
            self.fail(reason)

    def on_accept(self, slot: Slot, old: Life | None) -> None:
        """A successor has taken over this slot from old, which was told to leave."""
        if slot is not self.slot:
            return
        self.slot, self.leaving = None, old
        if old is None:
            self._proceed()

    def on_gone(self, life: Life) -> None:
        if life is self.leaving:
            self._proceed()

    def on_failure(self, slot: Slot, reason: str) -> None:
        """The successor in this slot has ended before it accepted."""
        if slot is self.slot:
            self.slot = None
            self.fail(reason)

    def on_slot_closed(self, slot: Slot) -> None:
        """A slot is given up; its successor is told to leave."""
        if slot is self.slot:
            self._proceed()

    def on_slot_opened(self, slot: Slot) -> None:
        """A slot came in; its worker is of the old code."""
        self.queue.append(slot)
