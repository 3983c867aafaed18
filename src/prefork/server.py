"""Server: an app and its limits, served by one process.

`Server(app).listen_and_serve(":8080")` serves here and now; `Prefork(server)` has many
processes do so. Whoever calls serve() runs the loop: it returns when the server was
asked to stop (SIGTERM, SIGINT, shutdown()) and has drained.
"""

from __future__ import annotations

import inspect
import signal
import socket
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from prefork import _core, _tls, asgi, eventloop, listeners, log
from prefork.certificates import Certificates
from prefork.config import SERVER, Config
from prefork.errors import ConfigError
from prefork.forwarded import Trust
from prefork.native import Desk, Hooks, desk_for
from prefork.wsgi import Manners, WsgiDesk

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT)
CONTENT_TYPE = "text/plain; charset=utf-8"  # of answers that name none
UNLIMITED = 2**63 - 1
PROXY_VERSIONS = {
    "off": 0,
    "v1": _core.PROXY_V1,
    "v2": _core.PROXY_V2,
    "auto": _core.PROXY_V1 | _core.PROXY_V2,
}


# Of the grace period: so long peers may go on saying what they have begun to say. ASGI
# tasks are cancelled a little later (asgi.PATIENCE), and then the loop is closed.
PATIENCE = 2 / 3


def _ms(seconds: float) -> int:
    return max(1, round(seconds * 1000)) if seconds > 0 else 0


INTERFACES = {1: "native", 2: "wsgi", 3: "asgi"}


def interface_of(app: Any) -> str:
    """native, wsgi or asgi, told by how many parameters the app must be given.

    handler(request), app(environ, start_response), app(scope, receive, send). Raises
    ConfigError if that cannot be told.
    """
    try:
        parameters = inspect.signature(app).parameters.values()
    except (TypeError, ValueError):
        parameters = ()  # type: ignore[assignment]
    positional = [p for p in parameters if p.kind in (0, 1) and p.default is p.empty]
    interface = INTERFACES.get(len(positional))
    if interface is None:
        name = getattr(app, "__qualname__", type(app).__qualname__)
        raise ConfigError(
            f"cannot tell the interface of {name} by its {len(positional)} parameters; "
            "interface must be native, wsgi or asgi"
        )
    return interface


def refuse_asgi2(app: Any) -> None:
    """Raise ConfigError for an app of ASGI 2, whose call returns what is called."""
    call: Any = app.__call__ if inspect.isclass(app) else app
    try:
        names = [name for name in inspect.signature(call).parameters if name != "self"]
    except (TypeError, ValueError):
        return
    if names == (["receive", "send"] if inspect.isclass(app) else ["scope"]):
        raise ConfigError(
            f"{app.__qualname__} is an ASGI 2 app, app(scope)(receive, send); wrap it: "
            "asgiref.compatibility.guarantee_single_callable(app)"
        )


def loop_options(config: Config, interface: str = "native") -> dict[str, Any]:
    """What the C loop is told; its names are those of prefork.h."""
    hooks = config.header_received is not None
    bare = config.no_default_content_type or interface != "native"
    spills = interface == "wsgi"
    return {
        "body_buffer_size": config.body_buffer_size if spills else 0,
        "spill_dir": config.body_temp_dir or tempfile.gettempdir(),
        "max_connections": config.concurrency,
        "max_connections_per_ip": config.max_conns_per_ip,
        "max_requests": config.max_requests_per_conn,
        "tls_handshake_timeout_ms": _ms(config.tls_handshake_timeout),
        "header_timeout_ms": _ms(config.header_timeout),
        "read_timeout_ms": _ms(config.read_timeout),
        "write_timeout_ms": _ms(config.write_timeout),
        "idle_timeout_ms": _ms(config.idle_timeout),
        "linger_timeout_ms": _ms(config.linger_timeout),
        "drain_idle_ms": _ms(config.drain_idle),
        "min_body_rate": config.min_body_rate,
        "read_buffer_size": config.read_buffer_size,
        "max_target_size": config.max_target_size,
        "max_field_size": config.max_field_size,
        "max_header_size": config.max_header_size,
        "max_fields": config.max_fields,
        # The hook may allow a request more: then the desk sets the limit of each.
        "max_body_size": UNLIMITED if hooks else config.max_request_body_size,
        "ws_max_size": config.ws_max_size,
        "ws_ping_interval_ms": _ms(config.ws_ping_interval or 0),
        "ws_ping_timeout_ms": _ms(config.ws_ping_timeout or 0),
        "ws_close_timeout_ms": _ms(config.ws_close_timeout),
        "ws_deflate": config.ws_per_message_deflate,
        "server": "" if config.no_default_server_header else config.name,
        "content_type": "" if bare else CONTENT_TYPE,
        "lend_heads": hooks or streams_bodies(config, interface),
        "lend_refused": config.error_handler is not None,
        "notices": config.conn_state is not None or config.log_all_errors,
        "no_date": config.no_default_date,
        "no_keep_alive": config.disable_keepalive,
        "get_only": config.get_only,
        "tcp_keepalive": config.tcp_keepalive,
        "keep_on_drain": not config.close_on_shutdown,
        "proxy_protocol": PROXY_VERSIONS[config.proxy_protocol],
        "proxy_trust": Trust(config.proxy_allow_from).rows(),
        "forwarded_trust": Trust(config.forwarded_allow_ips).rows(),
    }


def streams_bodies(config: Config, interface: str) -> bool:
    """Whether the app is called before the body of its request is here."""
    if interface == "native":
        return config.stream_request_body
    return interface == "asgi"


def trust_of(config: Config) -> Trust:
    """Whose word in header fields counts."""
    standard = config.forwarded_header == "forwarded"
    return Trust(config.forwarded_allow_ips, standard=standard)


class Server:
    """An app and the options that it is served with.

    app is a native handler, `def handler(request)` or `async def handler(request)`, a
    WSGI or an ASGI app; interface says which, by default by its parameters. The options
    are those of `prefork.config.Config` but for the workers'; a wrong one raises
    ConfigError. Nothing is opened before it serves.
    """

    def __init__(self, app: Any, **options: Any) -> None:
        if not callable(app):
            raise ConfigError(f"app must be callable, not {app!r}")
        self.app = app
        self.config = Config.load(options, SERVER)
        self.interface = self.config.interface
        if self.interface == "auto":
            self.interface = interface_of(app)
        if self.interface == "asgi" or self.config.interface == "auto":
            refuse_asgi2(app)
        if self.interface == "asgi" and self.config.threads > 1:
            raise ConfigError(
                f"threads must be 1, not {self.config.threads}, for an ASGI app: it "
                "runs on the event loop"
            )
        eventloop.check(self.config.loop)
        self.address: Any = None
        self.tls: _tls.Tls | None = None
        self._desk: Desk | None = None
        self._own: list[listeners.Listener] = []
        self._on_drain: Callable[[], object] | None = None
        self._seat: tuple[_core.Scoreboard, int] | None = None
        self._grace: float | None = None
        self._draining = self._once = False
        self._lock = threading.Lock()

    @property
    def logger(self) -> log.Logger | log.Printer | None:
        """What it was given to log to; its master takes it if it has none itself."""
        given: log.Logger | log.Printer | None = self.config.logger
        return given

    def listen_and_serve(
        self,
        addr: str | Iterable[str] | None = None,
        *,
        on_ready: Callable[[Server], object] | None = None,
    ) -> None:
        """Listen on these addresses (default: bind=) and serve in this process.

        on_ready(server) is called once it accepts; `server.address` is then what the
        first socket is bound to. Raises ConfigError or OSError before it serves, also
        if a certificate cannot be read or used.
        """
        if addr is None:
            addr = self.config.bind
        texts = [addr] if isinstance(addr, str) else list(addr)
        ready = (lambda: on_ready(self)) if on_ready is not None else None
        with ExitStack() as stack:
            if self.tls is None:
                self.tls = self._load_certificates()
                stack.callback(setattr, self, "tls", None)
            made = listeners.listen_all(texts, self.config, 1, stack.callback)
            sockets = [listener.socket_of(0) for listener in made]
            self._serve(sockets, ready, None, None, made)

    def serve(
        self,
        sockets: list[socket.socket],
        *,
        on_ready: Callable[[], object] | None = None,
        on_drain: Callable[[], object] | None = None,
        lifeline: int | None = None,
        on_master_death: Callable[[], object] | None = None,
    ) -> None:
        """Serve listening sockets, which stay the caller's, until drained.

        In the main thread SIGTERM and SIGINT drain and are given back afterwards;
        on_drain() is called in the loop's thread when it begins to. When
        lifeline becomes readable, on_master_death() is called in the loop's thread;
        by default the server drains.
        """
        self._on_drain = on_drain
        self._serve(sockets, on_ready, lifeline, on_master_death, [])

    def take_seat(
        self, board: _core.Scoreboard, row: int, grace: float | None = None
    ) -> None:
        """Count in this row of a scoreboard, and share connections with the others.

        In a worker, before serve(). grace: so many seconds after it was asked to leave
        it will be killed.
        """
        self._seat = (board, row)
        self._grace = grace

    def shutdown(self) -> None:
        """Drain, then let serve() return. Any thread; may be repeated."""
        with self._lock:
            if self._desk is not None:
                now = time.monotonic()
                self._desk.core.call(self._drain, self._desk, self._own, now)

    def _serve(
        self,
        sockets: list[socket.socket],
        on_ready: Callable[[], object] | None,
        lifeline: int | None,
        on_master_death: Callable[[], object] | None,
        own: list[listeners.Listener],
    ) -> None:
        tls = self._load_certificates() if self.tls is None else self.tls
        core = _core.Loop(**loop_options(self.config, self.interface))
        core.trust = trust_of(self.config)
        if self._seat is not None:
            core.attach(*self._seat)
        if tls is not None:
            self._secure(core, tls)
        desk = self._open_desk(core)
        self._own, self._draining, self._once = own, False, lifeline is not None

        def start() -> None:
            for sock in sockets:
                core.listen(sock.fileno())
            if on_ready is not None:
                on_ready()

        try:
            self.address = sockets[0].getsockname()
            if len(sockets) == 1 and isinstance(self.address, str):
                desk.unix_path = self.address
            with self._signals(desk, own):
                if lifeline is not None:
                    self._watch_master(desk, lifeline, on_master_death)
                desk.run(start)
        finally:
            with self._lock:
                self._desk = None
            core.flush()  # answers that are queued when a handler ends the server
            core.shut()
            desk.close()

    def _load_certificates(self) -> _tls.Tls | None:
        certificates = Certificates.of(self.config)
        if certificates is None:
            return None
        tls = certificates.load()
        certificates.warn(log.error_logger(self.config.logger, self.config.log_level))
        return tls

    def _secure(self, core: _core.Loop, tls: _tls.Tls) -> None:
        """Speak TLS; sessions are resumed by every worker on the same scoreboard."""
        if self._seat is not None:
            tls.share_tickets(self._seat[0])
        tls.secure(core)

    def _open_desk(self, core: _core.Loop) -> Desk:
        config = self.config
        hooks = Hooks(
            config.header_received,
            config.continue_handler,
            config.expect_handler,
            config.error_handler,
            config.conn_state,
            config.stream_request_body,
            config.log_all_errors,
            config.max_request_body_size,
        )
        logger = log.error_logger(config.logger, config.log_level)
        desk = self._make_desk(core, hooks, logger)
        with self._lock:
            if self._desk is not None:
                core.shut()
                raise RuntimeError("this Server serves already")
            self._desk = desk
        return desk

    def _make_desk(self, core: _core.Loop, hooks: Hooks, logger: log.Logger) -> Desk:
        config = self.config
        if self.interface == "native":
            return desk_for(self.app, core, hooks, logger, config.threads, config.loop)
        if self.interface == "asgi":
            return self._make_asgi_desk(core, hooks, logger)
        manners = Manners(config.root_path, config.header_map, self._seat is not None)
        return WsgiDesk(self.app, core, hooks, logger, config.threads, manners)

    def _make_asgi_desk(
        self, core: _core.Loop, hooks: Hooks, logger: log.Logger
    ) -> Desk:
        config = self.config
        manners = asgi.Manners(config.root_path, config.lifespan, self._grace)
        factory = eventloop.factory_of(config.loop)
        return asgi.AsgiDesk(self.app, core, hooks, logger, factory, manners)

    def _drain(self, desk: Desk, own: list[listeners.Listener], asked: float) -> None:
        """Stop accepting and finish; in the loop's thread, which may have been in a
        handler since it was asked to.

        A worker does so once: who stops a whole group tells it, and so does its master.
        """
        if self._draining and self._once:
            return
        self._draining = True
        for listener in own:
            listener.quiesce()
        patience = None
        if self._grace is not None:
            spent = time.monotonic() - asked
            patience = max(0.0, self._grace * PATIENCE - spent)
        desk.core.drain(patience=patience)
        on_drain, self._on_drain = self._on_drain, None
        if on_drain is not None:
            on_drain()  # what comes from now on is another's
        desk.on_drain()

    def _watch_master(
        self, desk: Desk, lifeline: int, on_master_death: Callable[[], object] | None
    ) -> None:
        def on_readable() -> None:
            desk.unwatch(lifeline)
            if on_master_death is not None:
                on_master_death()
            else:
                self._drain(desk, [], time.monotonic())

        desk.watch(lifeline, on_readable)

    @contextmanager
    def _signals(self, desk: Desk, own: list[listeners.Listener]) -> Iterator[None]:
        """SIGTERM and SIGINT drain, a second one closes idle connections at once."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before: dict[int, Any] = {}

        def on_signal(_: int, frame: object) -> None:
            desk.core.call(self._drain, desk, own, time.monotonic())

        for number in STOP_SIGNALS:
            if number == signal.SIGINT and signal.getsignal(number) not in (
                signal.default_int_handler,
                signal.SIG_DFL,
            ):
                continue  # a worker's master answers Ctrl-C
            before[number] = signal.signal(number, on_signal)
        wakeup = signal.set_wakeup_fd(desk.core.wake_fileno, warn_on_full_buffer=False)
        try:
            yield
        finally:
            signal.set_wakeup_fd(wakeup)
            for stopped, handler in before.items():
                signal.signal(stopped, handler)
