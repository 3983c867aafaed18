"""How many unplanned exits of workers are made good before the master gives up."""

from __future__ import annotations

import time
from collections import deque

from prefork.config import Config
from prefork.errors import OverRecoveryError


class Recovery:
    """The exits that count, within recover_window."""

    def __init__(self) -> None:
        self.exits: deque[tuple[float, int | None]] = deque()

    def count(
        self, config: Config, workers: int, code: int | None, cause: Exception | None
    ) -> str:
        """One more: the tally, as a text. OverRecoveryError if that is too many."""
        now, window = time.monotonic(), config.recover_window
        while window is not None and self.exits and self.exits[0][0] <= now - window:
            self.exits.popleft()
        self.exits.append((now, code))
        threshold = config.recover_threshold
        if threshold is None:
            threshold = max(1, workers // 2)
        if len(self.exits) > threshold:
            statuses = [status for _, status in self.exits]
            raise OverRecoveryError(len(statuses), threshold, statuses) from cause
        return f"{len(self.exits)} of {threshold}"
