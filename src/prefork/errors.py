"""Every error of the package, and the exit code that the command line makes of it.

| code | meaning |
|---|---|
| 0 | orderly stop, also after a kill that was asked for |
| 1 | an error that has no code of its own |
| 2 | a wrong option or value, a certificate that cannot be served with |
| 3 | a worker failed to boot, or a child found no listener |
| 4 | the app failed to load |
| 5 | the operating system refused: address in use, no permission, no such file |
| 6 | workers crashed more often than recover_threshold allows |

3 and 4 are gunicorn's. An address that cannot be bound raises the true OSError
(PermissionError, and so on), worded with the address and the remedy.
"""

from __future__ import annotations

import signal
from collections.abc import Sequence

EXIT_OS_ERROR = 5


class PreforkError(Exception):
    """Base of the errors below."""

    exit_code = 1


class ConfigError(PreforkError, ValueError):
    """An option or value is wrong; the text is one line with the remedy."""

    exit_code = 2


class OnlyReuseportOnWindowsError(ConfigError):
    """Windows cannot share one listener between processes: use reuseport=True."""


class CertificateError(ConfigError):
    """A certificate, its key or a CA cannot be used; the text names the file."""


class NoReuseportError(PreforkError, OSError):
    """This kernel knows no SO_REUSEPORT: use reuseport=False."""

    exit_code = EXIT_OS_ERROR


class AppLoadError(PreforkError):
    """The app could not be imported; `__cause__` is what its module raised, if it did.

    own is true when the app's own code raised, so that its traceback matters.
    """

    exit_code = 4

    def __init__(self, message: str, *, own: bool = False) -> None:
        super().__init__(message)
        self.own = own


class AppStartupError(PreforkError):
    """The app failed to start (ASGI lifespan); `__cause__` is what it raised."""

    exit_code = 3


class WorkerBootError(PreforkError):
    """A worker raised before it accepted; `traceback` is its traceback as text."""

    exit_code = 3

    def __init__(self, pid: int, traceback: str) -> None:
        super().__init__(pid, traceback)
        self.pid = pid
        self.traceback = traceback

    def __str__(self) -> str:
        return f"worker {self.pid} failed to boot\n{self.traceback}".rstrip()


class OverRecoveryError(PreforkError):
    """Workers ended unplanned more often than recover_threshold allows.

    exits counts them, within recover_window; statuses holds the exit status of each in
    order, negative for a signal, None if unknown.
    """

    exit_code = 6

    def __init__(
        self, exits: int, threshold: int, statuses: Sequence[int | None]
    ) -> None:
        super().__init__(exits, threshold, tuple(statuses))
        self.exits = exits
        self.threshold = threshold
        self.statuses = tuple(statuses)

    def __str__(self) -> str:
        causes = ", ".join(describe_status(status) for status in self.statuses)
        return (
            f"{self.exits} unplanned worker exits ({causes}), "
            f"more than recover_threshold {self.threshold} allows"
        )


class InheritanceError(PreforkError):
    """PREFORK_CHILD=1 says that this is a worker, but it has inherited no listener."""

    exit_code = 3


class ReloadError(PreforkError):
    """A reload did not come about; it is logged, and the old workers go on."""


class SpawnError(PreforkError):
    """The system has no place for a worker now; it is logged, the others go on."""


class CommandProducerNoneError(PreforkError):
    """command_producer returned None instead of a started process."""


class CommandProducerNotStartedError(PreforkError):
    """command_producer returned a process that was not started."""


class ProtocolError(PreforkError):
    """The app broke the rules of HTTP: framing, a forged header line, call order."""


class RequestError(PreforkError):
    """The peer broke the rules of HTTP; status is what answers it."""

    def __init__(self, message: str, status: int = 400) -> None:
        super().__init__(message, status)
        self.status = status

    def __str__(self) -> str:
        return str(self.args[0])


class ClientDisconnected(PreforkError, ConnectionError):
    """The peer has left, or stopped reading, before the answer was complete."""


def describe_status(status: int | None) -> str:
    """Word an exit status as os.waitstatus_to_exitcode gives it (negative: signal)."""
    if status is None:
        return "exit status unknown"
    if status >= 0:
        return f"exit status {status}"
    try:
        return f"killed by {signal.Signals(-status).name}"
    except ValueError:
        return f"killed by signal {-status}"
