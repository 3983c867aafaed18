"""Prefork: what users hold. Its options, and the calls that serve with them.

listen_and_serve() is called in three processes: where it makes a Master and returns
when that has ended; in a worker that runs the program again, which serves in its place;
and in a template, which forks such workers.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import json
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NoReturn

from prefork import _core, listeners, log, spawn, worker
from prefork.certificates import Certificates, Data, Files
from prefork.config import OPTIONS, PREFORK, Config, names, usable_cpus
from prefork.errors import (
    CertificateError,
    ConfigError,
    OnlyReuseportOnWindowsError,
)
from prefork.master import Master, plain
from prefork.slots import Worker, WorkerState

_made = itertools.count(1)  # the Preforks of this program


class Prefork:
    """Serve one server from several worker processes.

    server is a `prefork.Server`, or anything with its serve(). Options are keywords,
    and plain attributes that may be set until listen_and_serve() validates them; the
    environment (PREFORK_<NAME>) gives their defaults. Callbacks:

    on_child_spawn(pid)       for every worker, after it was started
    on_master_ready(pids)     once, when every worker accepts
    on_child_recover(old, new)  after on_child_spawn(new); a notice
    on_master_death()         in the worker, when the master died; default: drain, exit

    The first three run in the master's main thread. They may call shutdown(), reload()
    and scale(). What the first two raise tears everything down and leaves
    listen_and_serve() unchanged; what the third raises is logged. docs/prefork.md has
    the details.
    """

    bind: Sequence[str]
    network: str
    backlog: int
    unix_mode: int | None
    defer_accept: bool
    reuseport: bool
    spawn: str
    preload: bool
    recover_threshold: int | None
    recover_window: float | None
    recover_interval: float
    shutdown_grace_period: float
    log_level: str
    logger: log.Logger | log.Printer | None
    serve_func: Callable[..., object] | None
    serve_tls_func: Callable[..., object] | None
    serve_tls_embed_func: Callable[..., object] | None
    command_producer: Callable[..., object] | None
    on_child_spawn: Callable[[int], object] | None
    on_master_ready: Callable[[list[int]], object] | None
    on_child_recover: Callable[[int, int], object] | None
    on_master_death: Callable[[], None] | None

    def __init__(self, server: worker.Servant | None = None, **options: Any) -> None:
        config = Config.load(options, PREFORK)
        self.server = server
        self._workers: Any = None
        self._master: Master | None = None
        self._board: _core.Scoreboard | None = None  # of a child that was executed
        self._number, self._runs = next(_made), 0
        for name, value in config.keywords(PREFORK).items():
            setattr(self, name, value)
        if self.logger is None:
            self.logger = getattr(server, "logger", None)

    @property
    def workers(self) -> tuple[Worker, ...]:
        """One entry for each slot. To set it to a number is to choose how many."""
        if self._master is not None:
            row_of = self._master.board.row
            return tuple(slot.worker(row_of) for slot in self._master.slots)
        count = self._workers if isinstance(self._workers, int) else usable_cpus()
        return tuple(Worker(None, slot, WorkerState.VACANT) for slot in range(count))

    @workers.setter
    def workers(self, count: int | None) -> None:
        if self._master is not None:
            self.scale(count if count is not None else usable_cpus())
        self._workers = count

    def scale(self, count: int) -> None:
        """Have so many workers; any thread of the master, and every callback.

        Returns at once. Workers that are too many drain and leave.
        """
        count = OPTIONS["workers"].read("workers", count)
        master = self._asked("scale")
        if master is not None:
            master.ask_scale(count)

    @property
    def scoreboard(self) -> _core.Scoreboard | None:
        """What the workers do and have counted: rows(), and totals() of all that lived.

        None while nothing runs. The master and every worker may read it, any thread.
        """
        return self._master.board if self._master is not None else self._board

    @property
    def addresses(self) -> tuple[Any, ...]:
        """What the listeners are bound to, as getsockname() tells it; empty if none.

        (host, port), for IPv6 with two more numbers, or the path of a unix socket.
        """
        listeners = self._master.listeners if self._master is not None else []
        return tuple(listener.name for listener in listeners)

    @property
    def address(self) -> Any:
        """The first of the addresses, with its real port; None if there is none."""
        return next(iter(self.addresses), None)

    def listen_and_serve(self, address: str | Iterable[str] | None = None) -> None:
        """Bind, start the workers and supervise them until an orderly stop.

        address is ":8080", "host:port", "[::1]:8080", "unix:/path" or several of them
        (None: the attribute bind). Runs in the main thread, where it handles SIGTERM,
        SIGINT and SIGQUIT while it runs; it returns after one of them or shutdown().

        Raises ConfigError, TypeError (nothing to serve with), OSError (an address
        cannot be bound; nothing was started), WorkerBootError (a worker failed before
        it accepted), OverRecoveryError, and what a callback raised.
        """
        self._run(address, None)

    def listen_and_serve_tls(
        self, address: str | Iterable[str], *, key_file: str, cert_file: str
    ) -> None:
        """The same with TLS: a certificate with its chain, and its key, in PEM files.

        The server is `prefork.Server`, whose TLS options count too, or serve_tls_func.
        The files are read and checked before anything is bound or started.

        Raises what listen_and_serve() does, OSError for a file that cannot be read,
        and CertificateError for what cannot be served with.
        """
        self._run(address, Files.named(cert_file, key_file))

    def listen_and_serve_tls_embed(
        self, address: str | Iterable[str], *, cert_data: bytes, key_data: bytes
    ) -> None:
        """The same with a certificate and a key in memory, as PEM.

        The server is `prefork.Server` or serve_tls_embed_func.
        """
        self._run(address, Data.named(cert_data, key_data))

    def _run(
        self, address: str | Iterable[str] | None, place: Files | Data | None
    ) -> None:
        """Be the master, or the worker that this call is the place of."""
        self._runs += 1
        config = self._validated()
        addresses = config.bind if address is None else _listed(address)
        serve_func = self._serve_func(config, place)
        inheritance = worker.inheritance()
        if inheritance is not None:
            if inheritance.run in ("", self._run_name):
                secured = self._secured(serve_func, place)
                with _told_in_one_line(secured) as certificates:
                    work = self._work(config, serve_func, certificates)
                    if inheritance.role == "template":
                        _tell_of(certificates, work.logger)
                    self._serve_as_child(inheritance, config, work, addresses)
            return  # the master of another one has started this program
        self._check_caller()
        if serve_func is not None and len(addresses) != 1:
            raise ConfigError("serve_func takes one listener: give one address")
        with self._secured(serve_func, place) as certificates:
            work = self._work(config, serve_func, certificates)
            _tell_of(certificates, work.logger)
            self._master = Master(work, config, self._run_name)
            try:
                self._master.run(addresses)
            finally:
                self._master = None

    def _serve_func(
        self, config: Config, place: Files | Data | None
    ) -> Callable[[Any], object] | None:
        """The stranger's server that is to be called in workers; None: ours is."""
        if place is None:
            if config.serve_func is None and not callable(
                getattr(self.server, "serve", None)
            ):
                raise TypeError("Prefork needs a server with a serve(), or serve_func")
            return config.serve_func
        embedded = isinstance(place, Data)
        name = "serve_tls_embed_func" if embedded else "serve_tls_func"
        function = getattr(config, name)
        if function is None and _tls_config(self.server) is None:
            raise TypeError(f"Prefork needs a prefork.Server, or {name}")
        if function is None:
            return None
        return lambda sock: function(sock, place.cert, place.key)

    @contextlib.contextmanager
    def _secured(
        self,
        serve_func: Callable[[Any], object] | None,
        place: Files | Data | None,
    ) -> Iterator[Certificates | None]:
        """Load the certificates: what the server has then, forked workers share."""
        if serve_func is not None:
            certificates = None if place is None else Certificates(Config(), [place])
            if certificates is not None:
                certificates.check()
            yield certificates
            return
        config = _tls_config(self.server)
        certificates = Certificates.chosen(config, place) if config else None
        if certificates is None:
            yield None
            return
        server: Any = self.server
        server.tls = certificates.load()
        try:
            yield certificates
        finally:
            server.tls = None

    @property
    def _run_name(self) -> str:
        """The same in a program that is run again: which Prefork, which of its runs."""
        return f"{self._number}.{self._runs}"

    def _work(
        self,
        config: Config,
        serve_func: Callable[[Any], object] | None,
        certificates: Certificates | None,
    ) -> worker.Work:
        return worker.Work(
            server=self.server,
            serve_func=serve_func,
            on_master_death=config.on_master_death,
            logger=log.error_logger(config.logger, config.log_level),
            grace=config.shutdown_grace_period,
            certificates=certificates,
        )

    def _serve_as_child(
        self,
        found: worker.Inheritance,
        config: Config,
        work: worker.Work,
        addresses: Sequence[str],
    ) -> NoReturn:
        """Serve here what the master listens on; ends the program."""
        with contextlib.ExitStack() as stack:
            sockets = worker.inherited_sockets(found)
            if not sockets and found.role == "worker":
                sockets = self._own_sockets(found, config, addresses, stack)
            if work.serve_func is not None:
                for sock in sockets:
                    sock.setblocking(True)
            options = json.dumps(plain(config))
            self._board = found.open_board()
            status = worker.serve_inherited(found, work, sockets, self._board, options)
        raise SystemExit(status)

    def _own_sockets(
        self,
        found: worker.Inheritance,
        config: Config,
        addresses: Sequence[str],
        stack: contextlib.ExitStack,
    ) -> list[Any]:
        """With reuseport, a worker that inherits nothing listens for itself."""
        texts = [found.address] if found.address else addresses
        config = dataclasses.replace(config, reuseport=True)
        made = listeners.listen_all(texts, config, 1, stack.callback)
        return [listener.socket_of(0) for listener in made]

    def reload(self) -> None:
        """Replace all workers, with the program's present code, one after the other.

        Any thread of the master, and every callback. Returns at once; what goes wrong
        is logged, and the old workers go on.
        """
        master = self._asked("reload")
        if master is not None:
            master.ask_reload()

    def shutdown(self) -> None:
        """Ask for an orderly stop; any thread of the master, and every callback.

        Returns at once; listen_and_serve() returns when the workers are gone.
        """
        master = self._asked("shutdown")
        if master is not None:
            master.ask_stop()

    def _asked(self, what: str) -> Master | None:
        if worker.is_child():
            raise RuntimeError(f"{what}() must be called in the master")
        return self._master

    def _validated(self) -> Config:
        values = {name: getattr(self, name) for name in names(PREFORK)}
        values["workers"] = self._workers
        config = Config(**values)
        if sys.platform == "win32" and not config.reuseport:
            raise OnlyReuseportOnWindowsError("reuseport must be True on Windows")
        if config.spawn == "exec" and config.command_producer is None:
            spawn.check_program()
        return config

    def _check_caller(self) -> None:
        if worker.is_child():
            raise RuntimeError("a worker cannot be a master: guard the call by a main")
        if self._master is not None:
            raise RuntimeError("this Prefork serves already")
        if threading.current_thread() is not threading.main_thread():
            raise RuntimeError(
                "listen_and_serve() handles signals: call it in the main thread"
            )


def _listed(address: str | Iterable[str]) -> tuple[str, ...]:
    found = (address,) if isinstance(address, str) else tuple(address)
    if not found:
        raise ConfigError("address must be one address or several, not none")
    return found


def _tls_config(server: Any) -> Config | None:
    """The options of a server that takes certificates: ours does."""
    config = getattr(server, "config", None)
    return config if isinstance(config, Config) and hasattr(server, "tls") else None


def _tell_of(certificates: Certificates | None, logger: log.Logger) -> None:
    """Log what is served with, and what is wrong with its dates."""
    if certificates is not None:
        for line in certificates.describe():
            logger.info(line)
        certificates.warn(logger)


@contextlib.contextmanager
def _told_in_one_line(
    secured: contextlib.AbstractContextManager[Certificates | None],
) -> Iterator[Certificates | None]:
    """In a child, whose errors its master tells: not with a traceback."""
    with contextlib.ExitStack() as stack:
        try:
            certificates = stack.enter_context(secured)
        except OSError as error:
            raise CertificateError(f"{error.filename}: {error.strerror}") from None
        yield certificates
