"""Loggers: prefork.error for what the server has to say, prefork.access for requests.

A program that configures logging itself is left alone. Otherwise both loggers get one
handler that writes lines to stderr.
"""

from __future__ import annotations

import logging
import sys
from typing import Any, Protocol

ERROR = "prefork.error"
ACCESS = "prefork.access"

FORMAT = "[{asctime}] [{process}] [{levelname}] {message}"
DATE_FORMAT = "%Y-%m-%d %H:%M:%S %z"


class Printer(Protocol):
    """What logger= takes besides a logging.Logger."""

    def printf(self, fmt: str, *args: object) -> object: ...


Logger = logging.Logger | logging.LoggerAdapter  # type: ignore[type-arg]


class _StderrHandler(logging.StreamHandler):  # type: ignore[type-arg]
    """Writes to what sys.stderr is at the moment, like logging's last resort."""

    def __init__(self) -> None:
        logging.Handler.__init__(self)

    @property
    def stream(self) -> Any:
        return sys.stderr

    @stream.setter
    def stream(self, stream: Any) -> None:
        raise AttributeError("this handler follows sys.stderr")


class _PrinterHandler(logging.Handler):
    """Hands each record to printf(), its traceback included."""

    def __init__(self, printer: Printer) -> None:
        super().__init__()
        self.printer = printer

    def emit(self, record: logging.LogRecord) -> None:
        try:
            text = self.format(record)
            self.printer.printf("%s", text)
        except Exception:
            self.handleError(record)


def error_logger(logger: Logger | Printer | None = None, level: str = "info") -> Logger:
    """The logger for what the server has to say: the given one, or prefork.error."""
    if logger is None:
        return _default(ERROR, level)
    if isinstance(logger, (logging.Logger, logging.LoggerAdapter)):
        return logger
    wrapped = logging.Logger(ERROR, logging.DEBUG)  # of its own, outside the registry
    wrapped.addHandler(_PrinterHandler(logger))
    return wrapped


def access_logger(level: str = "info") -> Logger:
    """The logger for requests."""
    return _default(ACCESS, level)


def _default(name: str, level: str) -> logging.Logger:
    logger = logging.getLogger(name)
    if not logger.hasHandlers():
        handler = _StderrHandler()
        handler.setFormatter(logging.Formatter(FORMAT, DATE_FORMAT, style="{"))
        logger.addHandler(handler)
        logger.setLevel(level.upper())
        logger.propagate = False
    if any(isinstance(handler, _StderrHandler) for handler in logger.handlers):
        logger.disabled = False  # as logging.config leaves what it does not know
    return logger


def flush() -> None:
    """Write out what is buffered: a fork would copy it, _exit would lose it."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except (AttributeError, OSError, ValueError):
            continue  # closed, or not there at all


__all__ = ["ACCESS", "ERROR", "Logger", "Printer", "access_logger", "error_logger"]
