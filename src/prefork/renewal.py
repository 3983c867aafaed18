"""What of TLS grows old while workers serve: the keys of tickets, and certificates.

The master keeps them fresh: a new ticket key every eight hours, and, if it is to watch
the certificates' files, a look at them when something has happened there.
"""

from __future__ import annotations

import time

from prefork import _core, log
from prefork.certificates import Certificates, Watch
from prefork.errors import CertificateError

TICKET_KEY_LIFE = 8 * 3600.0  # seconds in which new TLS session tickets have one key
SETTLE = 0.5  # seconds between the first change of a certificate's files and a look


class Renewal:
    """Of one server's TLS; lives in the master's main thread.

    Raises OSError if the files are to be watched, and cannot be.
    """

    def __init__(
        self, certificates: Certificates, board: _core.Scoreboard, logger: log.Logger
    ) -> None:
        self.certificates = certificates
        self.board = board
        self.logger = logger
        self.watch: Watch | None = None
        self.look_at: float | None = None  # when the files are to be looked at
        self._rotate_tickets()
        if certificates.config.tls_watch:
            self.watch = Watch(certificates.paths, certificates.digests)
            self.look_at = time.monotonic()  # what was loaded may be old by now

    def close(self) -> None:
        """Watch no more; may be repeated, and called in a forked child."""
        if self.watch is not None:
            self.watch.close()

    def fileno(self) -> int:
        """Readable when something has happened where the files are; -1: never."""
        return self.watch.fileno() if self.watch is not None else -1

    def on_change(self) -> None:
        """fileno() can be read; more may follow."""
        assert self.watch is not None
        self.watch.read()
        if self.look_at is None:
            self.look_at = time.monotonic() + SETTLE

    def dues(self) -> tuple[float | None, float | None]:
        """When there is something to do."""
        return self.rotate_at, self.look_at

    def do_what_is_due(self, now: float) -> bool:
        """Whether there are new certificates, for which a reload is due."""
        if self.rotate_at <= now:
            self._rotate_tickets()
        return self.look_at is not None and self.look_at <= now and self._look()

    def _rotate_tickets(self) -> None:
        """A new key for session tickets; those of the last day still open theirs."""
        self.board.rotate_tickets()
        self.rotate_at = time.monotonic() + TICKET_KEY_LIFE

    def _look(self) -> bool:
        """Whether the files hold something else that can be served with."""
        self.look_at = None
        assert self.watch is not None
        if not self.watch.differs():
            return False
        try:
            self.certificates.load()
        except OSError as error:
            return self._keep(f"{error.filename}: {error.strerror}")
        except CertificateError as error:
            return self._keep(str(error))
        self.logger.info("the certificates' files have changed")
        return True

    def _keep(self, reason: str) -> bool:
        self.logger.error("new certificates fail, the old ones stay: %s", reason)
        return False
