"""Every option, once: a field of Config is keyword, flag, variable, file key and help.

A field carries an Option in its metadata: what kind of value it takes, within which
bounds, under which flags, and the sentence that explains it. The command line is
generated from here, `Server` and `Prefork` take their keywords from here, and all of
them have their values read by the one `Option.read`.

Precedence, later wins: defaults, a variable that other servers have for the same
(FORWARDED_ALLOW_IPS), file, environment (PREFORK_<NAME>), command line or keywords. The
command line reads prefork.toml, or [tool.prefork] of pyproject.toml, in the working
directory, or what --config names; `Server` and `Prefork` read a file only if they are
given config_file=.
"""

from __future__ import annotations

import dataclasses
import difflib
import enum
import json
import logging
import math
import os
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prefork import configfile, forwarded
from prefork.configfile import File
from prefork.errors import ConfigError


class Group(enum.Enum):
    """The sections of the help; also who takes which keywords."""

    APP = "Application"
    LISTENERS = "Listeners"
    WORKERS = "Workers"
    LIMITS = "Limits and timeouts"
    ANSWERS = "Requests and answers"
    PROXIES = "Proxies in front"
    TLS = "TLS"
    LOG = "Logging"


SERVER = frozenset(
    {
        *(Group.LISTENERS, Group.LIMITS, Group.ANSWERS),
        *(Group.PROXIES, Group.TLS, Group.LOG),
    }
)
PREFORK = frozenset({Group.LISTENERS, Group.WORKERS, Group.LOG})
EVERYONE = frozenset(Group)

OWNERS = {SERVER: "Server", PREFORK: "Prefork", EVERYONE: "prefork"}


# ---- Kinds of values ---------------------------------------------------------------


@dataclass(frozen=True)
class Kind:
    """How one kind of value is read, from text or as it is."""

    metavar: str
    wants: str  # completes "workers must be ..."
    convert: Callable[[Any], Any]  # raises ValueError or TypeError
    show: Callable[[Any], str] = str
    several: bool = False  # a flag that may be repeated


def _whole(value: Any) -> int:
    if isinstance(value, str):
        return int(value)
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError
    return value


_UNITS = {"": 1, "k": 1 << 10, "m": 1 << 20, "g": 1 << 30}
_SIZE = re.compile(r"(\d+(?:\.\d+)?) *([kmg]?)(?:i?b)?", re.ASCII | re.IGNORECASE)


def _size(value: Any) -> int:
    if not isinstance(value, str):
        return _whole(value)
    match = _SIZE.fullmatch(value.strip())
    if not match:
        raise ValueError
    return int(float(match[1]) * _UNITS[match[2].lower()])


def _show_size(value: int) -> str:
    for unit, factor in reversed(_UNITS.items()):
        if value and value % factor == 0:
            return f"{value // factor}{unit.upper()}"
    return str(value)


_SECONDS = {"ms": 0.001, "s": 1, "m": 60, "h": 3600, "d": 86400}
_SPAN = re.compile(r"(\d+(?:\.\d+)?)(ms|s|m|h|d)", re.ASCII)


def _seconds(value: Any) -> float:
    if isinstance(value, str):
        text = value.strip().replace(" ", "")
        spans = _SPAN.findall(text)
        if spans and "".join(map("".join, spans)) == text:
            value = sum(float(number) * _SECONDS[unit] for number, unit in spans)
        else:
            value = float(text)
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError
    if not math.isfinite(value):
        raise ValueError
    return float(value)


_BOOLEANS = {"1": True, "true": True, "yes": True, "on": True}
_BOOLEANS |= {"0": False, "false": False, "no": False, "off": False}


def _boolean(value: Any) -> bool:
    if isinstance(value, str):
        value = _BOOLEANS.get(value.strip().lower())
    if not isinstance(value, bool):
        raise TypeError
    return value


def _text(value: Any) -> str:
    if isinstance(value, os.PathLike):
        value = os.fspath(value)
    if not isinstance(value, str):
        raise TypeError
    if not value.isprintable():
        raise ValueError
    return value


def _ascii(value: Any) -> str:
    text = _text(value)
    if not text.isascii():
        raise ValueError
    return text


def _texts(value: Any) -> tuple[str, ...]:
    if isinstance(value, str):
        value = [part.strip() for part in value.split(",")]
    texts = tuple(_text(part) for part in value)
    if not all(texts) or not texts:
        raise ValueError
    return texts


def _peers(value: Any) -> tuple[str, ...]:
    texts = () if value in ("", [], ()) else _texts(value)
    forwarded.Trust(texts)
    return texts


def _files(value: Any) -> tuple[str, ...]:
    if isinstance(value, os.PathLike):
        value = [value]
    return () if value in ("", "none", [], ()) else _texts(value)


# The standard library's ssl, and other servers' flags, have numbers.
_CERT_REQS = {"0": "none", "1": "optional", "2": "required"}


def _cert_reqs(value: Any) -> str:
    if isinstance(value, int) and not isinstance(value, bool):
        value = str(int(value))
    text = _text(value).lower()
    return _CERT_REQS.get(text, text)


def _tls_version(value: Any) -> str:
    text = str(value) if isinstance(value, float) else _text(value)
    return text.lower().removeprefix("tls").removeprefix("v")


def _octal(value: Any) -> int:
    if isinstance(value, str):
        return int(value.strip().removeprefix("0o"), 8)
    return _whole(value)


def _callable(value: Any) -> Any:
    if not callable(value):
        raise TypeError
    return value


def _logger(value: Any) -> Any:
    if not isinstance(value, (logging.Logger, logging.LoggerAdapter)):
        _callable(getattr(value, "printf", None))
    return value


INTEGER = Kind("N", "a whole number", _whole)
SIZE = Kind("SIZE", "a size in bytes, like 65536, 64K or 10M", _size, _show_size)
DURATION = Kind(
    "TIME",
    "a duration in seconds, or like 500ms, 30s or 1h30m",
    _seconds,
    "{:g}s".format,
)
BOOLEAN = Kind("", "true or false", _boolean, lambda on: "on" if on else "off")
MODE = Kind("MODE", "octal permission bits, like 660", _octal, "{:03o}".format)
TEXT = Kind("TEXT", "printable text", _text)
ASCII = Kind("TEXT", "printable ASCII text", _ascii)
PATH = Kind("DIR", "the path of a directory", _text)
FILE = Kind("FILE", "the path of a file", _text)
TEXTS = Kind("ADDR", "one address or several", _texts, ",".join, several=True)
FILES = Kind(
    *("FILE", "the path of a file, or several", _files),
    show=lambda paths: ",".join(paths) or "none",
    several=True,
)
CERT_REQS = Kind("TEXT", "none, optional or required", _cert_reqs)
TLS_VERSION = Kind("VERSION", "1.2 or 1.3", _tls_version)
PEERS = Kind("PEERS", "addresses, networks, unix or *", _peers, ",".join)
FUNCTION = Kind("", "callable", _callable)
LOGGER = Kind("", "a logging.Logger or an object with printf(fmt, *args)", _logger)
APP = Kind("MODULE:ATTR", "MODULE:ATTR, like main:handler", lambda value: value)


# ---- One option --------------------------------------------------------------------


@dataclass(frozen=True)
class Option:
    """All that is known about a field but its name, type and default."""

    help: str
    kind: Kind
    group: Group
    flags: tuple[str, ...] = ()  # besides the one made of its name
    minimum: float | None = None
    maximum: float | None = None
    choices: tuple[str, ...] = ()
    none: str = ""  # what None means; empty: None is not allowed
    keyword_only: bool = False  # neither flag nor environment variable
    foreign: str = ""  # a variable that others have for it, too: the default if set
    secret: bool = False  # never shown

    def read(self, name: str, value: Any) -> Any:
        """The checked value, or ConfigError naming option, value and remedy."""
        if self.none and (value is None or value == "none"):
            return None
        try:
            result = self.kind.convert(value)
        except ConfigError as error:
            raise ConfigError(f"{name}: {error}") from None
        except (TypeError, ValueError, OverflowError):
            shown = HIDDEN if self.secret else value
            raise wrong(name, self.kind.wants, shown) from None
        if self.choices and result not in self.choices:
            raise wrong(name, f"one of {', '.join(self.choices)}", value)
        if self.minimum is not None and result < self.minimum:
            raise wrong(name, f"at least {self.kind.show(self.minimum)}", result)
        if self.maximum is not None and result > self.maximum:
            raise wrong(name, f"at most {self.kind.show(self.maximum)}", result)
        return result

    def literal(self, value: Any) -> str:
        """A value as a file has it."""
        if self.secret and value is not None:
            return json.dumps(HIDDEN)
        if isinstance(value, bool):
            return str(value).lower()
        if isinstance(value, tuple):
            return json.dumps(list(value), ensure_ascii=False)
        if self.kind is INTEGER and value is not None:
            return str(value)
        text = "none" if value is None else self.kind.show(value)
        return json.dumps(text, ensure_ascii=False)

    def show(self, value: Any) -> str:
        """A value as the help prints it."""
        if self.secret and value is not None:
            return HIDDEN
        return self.none if value is None else self.kind.show(value)


HIDDEN = "(not shown)"


def wrong(name: str, wants: str, value: Any) -> ConfigError:
    """The error of a value that is not what the option wants."""
    return ConfigError(f"{name} must be {wants}, not {value!r}")


def variable(name: str) -> str:
    """The environment variable of a field."""
    return "PREFORK_" + name.upper()


def _option(default: Any, help: str, kind: Kind, group: Group, **more: Any) -> Any:
    metadata = {"option": Option(help, kind, group, **more)}
    return dataclasses.field(default=default, metadata=metadata)


def _app(default: Any, help: str, kind: Kind, **more: Any) -> Any:
    return _option(default, help, kind, Group.APP, **more)


def _listener(default: Any, help: str, kind: Kind, **more: Any) -> Any:
    return _option(default, help, kind, Group.LISTENERS, **more)


def _workers(default: Any, help: str, kind: Kind, **more: Any) -> Any:
    return _option(default, help, kind, Group.WORKERS, **more)


def _limit(default: Any, help: str, kind: Kind, minimum: float, **more: Any) -> Any:
    more = {"maximum": _MOST.get(kind.metavar)} | more
    return _option(default, help, kind, Group.LIMITS, minimum=minimum, **more)


def _answer(default: Any, help: str, kind: Kind, **more: Any) -> Any:
    return _option(default, help, kind, Group.ANSWERS, **more)


def _proxies(default: Any, help: str, kind: Kind, **more: Any) -> Any:
    return _option(default, help, kind, Group.PROXIES, **more)


def _tls(default: Any, help: str, kind: Kind, **more: Any) -> Any:
    return _option(default, help, kind, Group.TLS, **more)


def _callback(group: Group, help: str) -> Any:
    return _option(None, help, FUNCTION, group, none="none", keyword_only=True)


# The C core counts in 32 bits, durations in milliseconds.
_MOST = {"N": 2**32 - 1, "SIZE": 2**30, "TIME": 4_000_000}
_INSTANT = 0.001
MAX_FIELDS = 128  # PF_HEAD_FIELDS in prefork.h


# ---- The options -------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Config:
    """The checked value of every option. Durations are seconds, sizes bytes."""

    # What is served.
    app: Any = _app(None, "The app: a module, and a name in it.", APP, none="none")
    app_dir: str = _app(".", "Look for the app's module here first.", PATH)
    chdir: str | None = _app(
        None, "Change to this directory before all else.", PATH, none="stay here"
    )

    # Where.
    bind: tuple[str, ...] = _listener(
        ("127.0.0.1:8000",),
        "Listen here: HOST:PORT, :PORT, [IPV6]:PORT, unix:PATH or fd://N. Repeatable.",
        TEXTS,
        flags=("-b",),
    )
    network: str = _listener(
        "tcp4",
        "Which addresses: tcp is both IP versions, and dual-stack without a host.",
        TEXT,
        choices=("tcp", "tcp4", "tcp6", "unix"),
    )
    backlog: int = _listener(
        2048,
        "Connections that may wait to be accepted, for each listening socket.",
        INTEGER,
        minimum=1,
        maximum=2**31 - 1,
    )
    unix_mode: int | None = _listener(
        None,
        "Permissions of a unix socket's file, like 660.",
        MODE,
        minimum=0,
        maximum=0o777,
        none="by umask",
    )
    defer_accept: bool = _listener(
        True,
        "Accept a connection when its first bytes are there (TCP_DEFER_ACCEPT).",
        BOOLEAN,
    )

    # By whom.
    workers: int | None = _workers(
        None,
        "Worker processes.",
        INTEGER,
        flags=("-w",),
        minimum=1,
        maximum=4096,
        none="the CPUs this process may use",
    )
    reuseport: bool = _workers(
        False,
        "Give each worker a listening socket of its own (SO_REUSEPORT).",
        BOOLEAN,
        flags=("--reuse-port",),
    )
    spawn: str = _workers(
        "fork", "How workers come to be.", TEXT, choices=("fork", "exec")
    )
    preload: bool = _workers(True, "Load the app once, before the workers.", BOOLEAN)
    recover_threshold: int | None = _workers(
        None,
        "Crashed workers that are replaced; one more ends the master.",
        INTEGER,
        minimum=0,
        none="half the workers, at least 1",
    )
    recover_window: float | None = _workers(
        60.0,
        "Forget crashes that are older; none: never.",
        DURATION,
        minimum=_INSTANT,
        none="for ever",
    )
    recover_interval: float = _workers(
        0.0, "Wait before a crashed worker is replaced.", DURATION, minimum=0
    )
    shutdown_grace_period: float = _workers(
        5.0,
        "Workers that still run so long after a stop are killed.",
        DURATION,
        minimum=0,
    )

    # How much.
    concurrency: int = _limit(
        65536, "Connections a worker holds, then 503; 0: no limit.", INTEGER, 0
    )
    max_conns_per_ip: int = _limit(
        0, "Connections from one address, then 429; 0: no limit.", INTEGER, 0
    )
    max_requests_per_conn: int = _limit(
        0, "Requests on one connection, then close; 0: no limit.", INTEGER, 0
    )
    header_timeout: float = _limit(
        30.0, "For a whole request head.", DURATION, _INSTANT
    )
    read_timeout: float = _limit(
        30.0, "Between two pieces of a request body.", DURATION, _INSTANT
    )
    write_timeout: float = _limit(
        30.0, "Without progress in sending an answer.", DURATION, _INSTANT
    )
    idle_timeout: float = _limit(
        75.0, "For the next request on a kept-alive connection.", DURATION, _INSTANT
    )
    linger_timeout: float = _limit(
        2.0, "Read on after a refusal, so that the answer arrives.", DURATION, 0
    )
    drain_idle: float = _limit(
        1.0, "In a stop, keep idle connections for one more request.", DURATION, 0
    )
    min_body_rate: int = _limit(
        240, "Slowest upload in bytes a second, then 408; 0: no limit.", SIZE, 0
    )
    max_request_body_size: int = _limit(
        1 << 30, "Then 413.", SIZE, 0, maximum=2**63 - 1
    )
    body_buffer_size: int = _limit(
        512 << 10,
        "Of a request body, then it goes to a temporary file; 0: never.  WSGI only.",
        SIZE,
        0,
    )
    body_temp_dir: str | None = _option(
        None, "Where that file is.", PATH, Group.LIMITS, none="as TMPDIR says"
    )
    ws_max_size: int = _limit(
        16 << 20, "Of a WebSocket message, then close 1009.", SIZE, 1
    )
    ws_ping_interval: float | None = _limit(
        20.0,
        "Ping a WebSocket that has said nothing for so long.",
        DURATION,
        _INSTANT,
        none="never",
    )
    ws_ping_timeout: float | None = _limit(
        20.0,
        "Close it (1011) if it says nothing then, either.",
        DURATION,
        _INSTANT,
        none="never",
    )
    ws_close_timeout: float = _limit(
        10.0, "For a client's part of a close that we began.", DURATION, _INSTANT
    )
    read_buffer_size: int = _limit(
        4096, "First size of a connection's read buffer.", SIZE, 256
    )
    max_target_size: int = _limit(8192, "Of a request target, then 414.", SIZE, 1)
    max_field_size: int = _limit(16384, "Of one header field, then 431.", SIZE, 16)
    max_header_size: int = _limit(65536, "Of a whole request head, then 431.", SIZE, 64)
    max_fields: int = _limit(
        100, "Header fields of a request, then 431.", INTEGER, 1, maximum=MAX_FIELDS
    )

    # With what manners.
    interface: str = _answer(
        "auto",
        "What the app is called with; auto tells it by the app's parameters.",
        TEXT,
        choices=("auto", "native", "wsgi", "asgi"),
    )
    threads: int = _answer(
        1,
        "Handlers that may block at the same time, in each worker.",
        INTEGER,
        minimum=1,
        maximum=4096,
    )
    root_path: str = _answer("", "Where the app is mounted, like /shop.", TEXT)
    lifespan: str = _answer(
        "auto",
        "ASGI: let the app start and end; auto: if it knows how to.",
        TEXT,
        choices=("auto", "on", "off"),
    )
    loop: str = _answer(
        "auto",
        "Event loop of ASGI and async handlers; auto is uvloop if it is installed.",
        TEXT,
        choices=("auto", "asyncio", "uvloop"),
    )
    ws_per_message_deflate: bool = _answer(
        True, "Agree to compress WebSocket messages (RFC 7692).", BOOLEAN
    )
    header_map: str = _answer(
        "drop",
        "WSGI: request fields with an underscore in their names.",
        TEXT,
        choices=("drop", "refuse", "allow"),
    )
    name: str = _answer("prefork", "Server field of answers.", ASCII)
    tcp_keepalive: bool = _answer(True, "Probe silent peers (SO_KEEPALIVE).", BOOLEAN)
    disable_keepalive: bool = _answer(
        False, "Close each connection after one answer.", BOOLEAN
    )
    get_only: bool = _answer(False, "Only GET and HEAD, else 405.", BOOLEAN)
    stream_request_body: bool = _answer(
        False,
        "Call handlers before the request body has arrived; plain ones in up to 64 "
        "threads.",
        BOOLEAN,
    )
    no_default_server_header: bool = _answer(False, "Send no Server field.", BOOLEAN)
    no_default_date: bool = _answer(False, "Send no Date field.", BOOLEAN)
    no_default_content_type: bool = _answer(
        False, "Send no Content-Type that the handler did not set.", BOOLEAN
    )
    close_on_shutdown: bool = _answer(
        True, "In a stop, answer with Connection: close.", BOOLEAN
    )
    log_all_errors: bool = _answer(
        False, "Log what peers do wrong, too, not only what we do.", BOOLEAN
    )
    header_received: Callable[..., Any] | None = _callback(
        Group.ANSWERS, "header_received(request): limits of this one request."
    )
    continue_handler: Callable[..., Any] | None = _callback(
        Group.ANSWERS, "continue_handler(request) -> bool: False answers 417."
    )
    expect_handler: Callable[..., Any] | None = _callback(
        Group.ANSWERS, "expect_handler(request) -> int: 100, or the status to answer."
    )
    error_handler: Callable[..., Any] | None = _callback(
        Group.ANSWERS, "error_handler(request, error): answers a refused request."
    )
    conn_state: Callable[..., Any] | None = _callback(
        Group.ANSWERS, "conn_state(connection, state): a notice of what changed."
    )

    # For whom.
    forwarded_allow_ips: tuple[str, ...] = _proxies(
        ("127.0.0.1", "::1"),
        "Peers whose X-Forwarded-* count; for others they are dropped. Addresses, "
        "networks, unix, *; empty: nobody.",
        PEERS,
        foreign="FORWARDED_ALLOW_IPS",
    )
    forwarded_header: str = _proxies(
        "x-forwarded",
        "What they write: X-Forwarded-For, -Proto and -Host, or Forwarded (RFC 7239).",
        TEXT,
        choices=("x-forwarded", "forwarded"),
    )
    proxy_protocol: str = _proxies(
        "off",
        "Listed peers begin with a PROXY header of this version, or are closed.",
        TEXT,
        choices=("off", "v1", "v2", "auto"),
    )
    proxy_allow_from: tuple[str, ...] = _proxies(
        ("127.0.0.1", "::1"), "Peers that begin with a PROXY header.", PEERS
    )

    # How securely. The names of others are taken, too, where the value means the same.
    certfile: tuple[str, ...] = _tls(
        (),
        "Serve TLS with this certificate and its chain (PEM). Repeatable: the first is "
        "the default, others are chosen by the name that a client asks for (SNI).",
        FILES,
        flags=("--certfile", "--ssl-certfile", "--ssl-certificate"),
    )
    keyfile: tuple[str, ...] = _tls(
        (),
        "Its private key (PEM), if that is not in certfile. Repeatable, in the order "
        "of the certificates.",
        FILES,
        flags=("--keyfile", "--ssl-keyfile"),
    )
    keyfile_password: str | None = _tls(
        None,
        "Decrypts the keys. Others can see a command line: rather use the variable.",
        TEXT,
        none="none",
        flags=("--keyfile-password", "--ssl-keyfile-password"),
        secret=True,
    )
    ca_certs: str | None = _tls(
        None,
        "CAs of clients' certificates (PEM).",
        FILE,
        none="none",
        flags=("--ca-certs", "--ssl-ca-certs", "--ssl-ca"),
    )
    cert_reqs: str = _tls(
        "none",
        "Whether clients are asked for a certificate, and must have one.",
        CERT_REQS,
        choices=("none", "optional", "required"),
        flags=("--cert-reqs", "--ssl-cert-reqs"),
    )
    tls_min: str = _tls(
        "1.2",
        "Oldest version of TLS that is spoken.",
        TLS_VERSION,
        choices=("1.2", "1.3"),
        flags=("--tls-min", "--ssl-protocol-min"),
    )
    ciphers: str | None = _tls(
        None,
        "Ciphers in OpenSSL's words; names of TLS 1.3 (TLS_...) count for that version "
        "only, all others for TLS 1.2.",
        ASCII,
        none="Mozilla's intermediate",
        flags=("--ciphers", "--ssl-ciphers"),
    )
    ocsp_file: tuple[str, ...] = _tls(
        (),
        "An OCSP response (DER) to staple. Repeatable, in the order of the "
        "certificates.",
        FILES,
    )
    tls_handshake_timeout: float = _option(
        10.0,
        "For a whole handshake.",
        DURATION,
        Group.TLS,
        minimum=_INSTANT,
        maximum=_MOST["TIME"],
    )
    tls_ktls: bool = _tls(
        False, "Let the kernel encrypt, where it and OpenSSL can (kTLS).", BOOLEAN
    )
    tls_watch: bool = _tls(
        False, "Reload when the files of certificates have changed.", BOOLEAN
    )

    # And what is told. These of Prefork are described in prefork.prefork.
    log_level: str = _option(
        "info",
        "Least important messages to log.",
        TEXT,
        Group.LOG,
        choices=("debug", "info", "warning", "error", "critical"),
    )
    logger: Any = _option(
        None,
        "A logging.Logger, or an object with printf(fmt, *args).",
        LOGGER,
        Group.LOG,
        none="prefork.error",
        keyword_only=True,
    )
    serve_func: Callable[..., Any] | None = _callback(
        Group.WORKERS, "serve_func(sock): any server, instead of ours."
    )
    serve_tls_func: Callable[..., Any] | None = _callback(
        Group.WORKERS, "serve_tls_func(sock, cert_file, key_file)."
    )
    serve_tls_embed_func: Callable[..., Any] | None = _callback(
        Group.WORKERS, "serve_tls_embed_func(sock, cert_data, key_data)."
    )
    command_producer: Callable[..., Any] | None = _callback(
        Group.WORKERS, "command_producer(files) -> subprocess.Popen."
    )
    on_child_spawn: Callable[..., Any] | None = _callback(
        Group.WORKERS, "on_child_spawn(pid), in the master, for every worker."
    )
    on_master_ready: Callable[..., Any] | None = _callback(
        Group.WORKERS, "on_master_ready(pids), in the master, once."
    )
    on_child_recover: Callable[..., Any] | None = _callback(
        Group.WORKERS, "on_child_recover(old, new), in the master."
    )
    on_master_death: Callable[..., Any] | None = _callback(
        Group.WORKERS, "on_master_death(), in a worker, once."
    )

    def __post_init__(self) -> None:
        for name, option in OPTIONS.items():
            value = option.read(name, getattr(self, name))
            object.__setattr__(self, name, value)
        if self.root_path and (self.root_path[0] != "/" or self.root_path[-1] == "/"):
            raise wrong("root_path", "empty, or like /shop", self.root_path)
        for part in ("max_target_size", "max_field_size"):
            if getattr(self, part) > self.max_header_size:
                most = f"at most max_header_size ({self.max_header_size})"
                raise wrong(part, most, getattr(self, part))
        self._check_tls()

    def _check_tls(self) -> None:
        """What of the TLS options belongs together."""
        count = len(self.certfile)
        if count and self.keyfile and len(self.keyfile) != count:
            wants = f"as many files as certfile ({count})"
            raise wrong("keyfile", wants, list(self.keyfile))
        if count and len(self.ocsp_file) > count:
            wants = f"at most as many files as certfile ({count})"
            raise wrong("ocsp_file", wants, list(self.ocsp_file))
        if self.cert_reqs == "none" and self.ca_certs is not None:
            wants = "optional or required where ca_certs are given"
            raise wrong("cert_reqs", wants, self.cert_reqs)
        if self.cert_reqs != "none" and self.ca_certs is None:
            raise wrong("cert_reqs", "none where no ca_certs are given", self.cert_reqs)

    @classmethod
    def load(
        cls,
        values: Mapping[str, Any],
        groups: frozenset[Group] = EVERYONE,
        environ: Mapping[str, str] | None = None,
        file: File | None = None,
    ) -> Config:
        """The options of these groups from a file, the environment and values.

        Each is above the one before; values may name the file: config_file. Raises
        ConfigError, also for a name that no option of these groups has.
        """
        return cls(**{n: o.value for n, o in origins(values, groups, environ, file)})

    def keywords(self, groups: frozenset[Group]) -> dict[str, Any]:
        """The values of these groups, as `Server` or `Prefork` takes them."""
        return {name: getattr(self, name) for name in names(groups)}

    @property
    def worker_count(self) -> int:
        """The workers to start: as configured, or one for each usable CPU."""
        return self.workers or usable_cpus()

    @property
    def threshold(self) -> int:
        """Unplanned exits that are recovered: as configured, or half the workers."""
        if self.recover_threshold is not None:
            return self.recover_threshold
        return max(1, self.worker_count // 2)


OPTIONS: Mapping[str, Option] = {
    field.name: field.metadata["option"] for field in dataclasses.fields(Config)
}
DEFAULTS: Mapping[str, Any] = {
    field.name: field.default for field in dataclasses.fields(Config)
}


def names(groups: frozenset[Group] = EVERYONE) -> list[str]:
    """The options of these groups, in order."""
    return [name for name, option in OPTIONS.items() if option.group in groups]


@dataclass(frozen=True)
class Origin:
    """A value, and who gave it."""

    value: Any
    place: str  # "default", file:line, a variable, "given"


def origins(
    values: Mapping[str, Any],
    groups: frozenset[Group] = EVERYONE,
    environ: Mapping[str, str] | None = None,
    file: File | None = None,
) -> Iterator[tuple[str, Origin]]:
    """The value of each option of these groups, and where it comes from."""
    given = dict(values)
    path = given.pop("config_file", None)
    if path is not None:
        file = configfile.read(path)
    check_names(given, groups)
    layers = {name: Origin(DEFAULTS[name], "default") for name in names(groups)}
    for name, value in foreign(groups, os.environ if environ is None else environ):
        layers[name] = Origin(value, OPTIONS[name].foreign)
    if file is not None:
        layers |= {n: Origin(v, p) for n, v, p in from_file(file, groups)}
    for name, value in environment(groups, os.environ if environ is None else environ):
        layers[name] = Origin(value, variable(name))
    layers |= {name: Origin(value, "given") for name, value in given.items()}
    yield from layers.items()


def from_file(file: File, groups: frozenset[Group]) -> Iterator[tuple[str, Any, str]]:
    """The options of these groups in a file: name, checked value, place.

    An error names the place; options of other groups may be there for others, a name
    that is no option at all may not.
    """
    for key, value in file.values.items():
        name, place = key.replace("-", "_"), file.place(key)
        option = OPTIONS.get(name)
        if option is None:
            raise ConfigError(f"{place}: {_unknown(name, 'prefork', names())}")
        if option.keyword_only:
            raise ConfigError(f"{place}: {name} can be set in Python only")
        if option.group not in groups:
            continue
        try:
            yield name, option.read(name, value), place
        except ConfigError as error:
            raise ConfigError(f"{place}: {error}") from None


def _unknown(name: str, owner: str, known: list[str]) -> str:
    close = difflib.get_close_matches(name, known, n=1)
    hint = f"; did you mean {close[0]}?" if close else ""
    return f"{owner} has no option {name}{hint}"


def check_names(values: Mapping[str, Any], groups: frozenset[Group]) -> None:
    """Raise ConfigError for a name that is no option here, with what may be meant."""
    known = names(groups)
    for name in values:
        if name in known:
            continue
        owner = OWNERS[groups]
        if name in OPTIONS:
            other = "Prefork" if OPTIONS[name].group in PREFORK else "Server"
            other = "the command line" if OPTIONS[name].group is Group.APP else other
            raise ConfigError(f"{name} is no option of {owner}; give it to {other}")
        raise ConfigError(_unknown(name, owner, known))


def environment(
    groups: frozenset[Group], environ: Mapping[str, str]
) -> Iterator[tuple[str, Any]]:
    """What PREFORK_<NAME> variables say, checked; an error names the variable."""
    for name in names(groups):
        text = environ.get(variable(name))
        option = OPTIONS[name]
        if text is None or option.keyword_only:
            continue
        try:
            yield name, option.read(name, text)
        except ConfigError as error:
            raise ConfigError(f"{error} (from {variable(name)})") from None


def foreign(
    groups: frozenset[Group], environ: Mapping[str, str]
) -> Iterator[tuple[str, Any]]:
    """What variables say that other servers have for the same, checked."""
    for name in names(groups):
        option = OPTIONS[name]
        text = environ.get(option.foreign) if option.foreign else None
        if text is None:
            continue
        try:
            yield name, option.read(name, text)
        except ConfigError as error:
            raise ConfigError(f"{error} (from {option.foreign})") from None


# ---- The machine -------------------------------------------------------------------


def usable_cpus(cgroups: Path = Path("/sys/fs/cgroup")) -> int:
    """CPUs this process may use: its affinity mask, cut by its cgroup's quota."""
    try:
        allowed = len(os.sched_getaffinity(0))
    except AttributeError:  # not Linux
        allowed = os.cpu_count() or 1
    quotas = [math.ceil(quota) for quota in _cpu_quotas(cgroups) if quota > 0]
    return max(1, min([allowed, *quotas]))


def _cpu_quotas(root: Path, own: Path = Path("/proc/self/cgroup")) -> Iterator[float]:
    """Quotas in CPUs, of our cgroup and of all above it, in version 2 and 1."""
    for line in _read(own).splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers and "cpu" not in controllers.split(","):
            continue
        base = root / controllers if controllers else root
        here = base / path.lstrip("/")
        for place in (here, *here.parents):
            yield from _quota_v1(place) if controllers else _quota_v2(place)
            if place == base:
                break


def _quota_v2(place: Path) -> Iterator[float]:
    match _read(place / "cpu.max").split():
        case [quota, period] if quota != "max":
            yield int(quota) / int(period)


def _quota_v1(place: Path) -> Iterator[float]:
    quota = _read(place / "cpu.cfs_quota_us").strip()
    period = _read(place / "cpu.cfs_period_us").strip()
    if period and not quota.startswith("-"):
        yield int(quota) / int(period)


def _read(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""
