"""The servers: how each is started, found to be ready, and stopped.

Every one runs as it would in production with one worker: its fastest documented set-up,
no access log, keep-alive without a limit of requests where it has one.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import ssl
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import cpu
import load
from programs import ROOT, certificate, program

HERE = Path(__file__).parent
APPS = HERE / "apps"
READY_SECONDS = 30.0
STOP_SECONDS = 5.0
PROBE = b"GET / HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n"
HANDSHAKE = (
    b"GET / HTTP/1.1\r\nHost: localhost\r\n"
    b"Upgrade: websocket\r\nConnection: Upgrade\r\n"
    b"Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\nSec-WebSocket-Version: 13\r\n\r\n"
)


CIPHER = "TLS_AES_256_GCM_SHA384"  # the first that OpenSSL's clients offer


@dataclass(frozen=True)
class Probe:
    """How a server is asked whether it is ready."""

    upgrade: bool = False
    tls: bool = False


PLAIN = Probe()


class Unavailable(Exception):
    """A server cannot be run here: why, and the remedy."""


class ServerError(Exception):
    """A server did not start or did not answer as it should."""


@dataclass(frozen=True)
class Site:
    """What a server's command line is made from."""

    python: Path  # the interpreter that has prefork
    peers: Path  # the virtual environment that has the peers
    scratch: Path  # a directory for this run
    port: int
    scenario: load.Scenario
    key: str = "ec"  # of the certificate: "ec" or "rsa"

    @property
    def app(self) -> str:
        return self.scenario.answer

    @property
    def workers(self) -> str:
        return str(self.scenario.workers)

    def tls(self, certificate_option: str, key_option: str) -> list[str]:
        """The options of TLS, if it is asked for."""
        if not self.scenario.tls:
            return []
        cert, key = certificate(self.key)
        return [certificate_option, str(cert), key_option, str(key)]

    def peer(self, program: str) -> str:
        path = self.peers / "bin" / program
        if not path.exists():
            raise Unavailable(f"{program} is not installed: run.py --setup-peers")
        return str(path)


@dataclass(frozen=True)
class Running:
    """A server that is up: where, and all of its processes."""

    port: int
    pids: list[int]


@dataclass(frozen=True)
class Server:
    name: str
    command: Callable[[Site], list[str]]
    prints_port: bool = False  # it takes a free port itself and prints it
    serves: tuple[str, ...] = ("app", "big")
    tls: bool = False

    def start(self, site: Site) -> list[str]:
        """The command line; Unavailable where it does not serve what is asked for."""
        if site.app not in self.serves:
            raise Unavailable(f"it does not serve {site.app!r}")
        if site.scenario.tls and not self.tls:
            raise Unavailable("it does not speak TLS")
        return self.command(site)


LENGTHS = {"big": 1 << 20, "echo_json": 10 << 10}  # of answers that are not hello

# ---- Command lines -----------------------------------------------------------------


def limit(site: Site) -> list[str]:
    command = [program("limit")]
    if site.scenario.close:
        command.append("--close")
    if site.app in LENGTHS:
        command.append(f"--body={LENGTHS[site.app]}")
    if site.app == "echo":
        command.append("--websocket")
    return command


def limit_without_defer(site: Site) -> list[str]:
    return [*limit(site), "--no-defer-accept"]


def core(site: Site) -> list[str]:
    command = [program("core", *sorted((ROOT / "csrc").glob("*.c")))]
    return [*command, f"--body={1 << 20}"] if site.app == "big" else command


def prefork(module: str, *options: str) -> Callable[[Site], list[str]]:
    def command(site: Site) -> list[str]:
        path = site.python.parent / "prefork"
        if not path.exists():
            raise Unavailable(f"prefork is not installed for {site.python.name}")
        app = f"{site.scenario.module or module}:{site.app}"
        bind = f"127.0.0.1:{site.port}"
        tls = site.tls("--certfile", "--keyfile")
        workers = ["--workers", site.workers]
        return [str(path), app, "--bind", bind, *workers, *tls, *options]

    return command


def nginx(site: Site) -> list[str]:
    path = shutil.which("nginx") or shutil.which("nginx", path="/usr/sbin")
    if path is None:
        raise Unavailable("nginx is not here: apt-get install nginx-light")
    site.scratch.chmod(0o755)
    (site.scratch / "big").write_bytes(b"x" * (1 << 20))
    config = site.scratch / "nginx.conf"
    location = NGINX_LOCATIONS[site.app]
    text = NGINX.format(site=site, location=location, **_nginx_tls(site))
    config.write_text(text)
    return [path, "-p", str(site.scratch), "-c", str(config), "-e", "stderr"]


def _nginx_tls(site: Site) -> dict[str, str]:
    """Tickets are what the others resume by, too."""
    if not site.scenario.tls:
        return {"listen": "", "tls": ""}
    cert, key = certificate(site.key)
    lines = f"ssl_certificate {cert}; ssl_certificate_key {key};"
    lines += " ssl_protocols TLSv1.2 TLSv1.3; ssl_session_tickets on;"
    return {"listen": "ssl", "tls": lines}


NGINX_LOCATIONS = {
    "app": "return 200 'Hello, World!';",
    "big": "try_files /big =404;",
}

NGINX = """
daemon off;
worker_processes {site.workers};
worker_rlimit_nofile 20000;
pid {site.scratch}/nginx.pid;
error_log stderr crit;
events {{ worker_connections 16384; multi_accept on; }}
http {{
    access_log off;
    default_type "text/plain; charset=utf-8";
    keepalive_requests 1000000000;
    sendfile on;
    tcp_nopush on;
    client_body_temp_path {site.scratch};
    proxy_temp_path {site.scratch};
    fastcgi_temp_path {site.scratch};
    uwsgi_temp_path {site.scratch};
    scgi_temp_path {site.scratch};
    server {{
        listen 127.0.0.1:{site.port} backlog=4096 {listen};
        {tls}
        root {site.scratch};
        location / {{ {location} }}
    }}
}}
"""


def uvicorn(site: Site) -> list[str]:
    app = f"{site.scenario.module or 'asgi'}:{site.app}"
    return [
        *(site.peer("uvicorn"), app, "--port", str(site.port)),
        *("--loop", "uvloop", "--http", "httptools", "--workers", site.workers),
        *("--log-level", "error", "--no-access-log"),
        *("--timeout-keep-alive", "75", "--backlog", "4096"),
        *site.tls("--ssl-certfile", "--ssl-keyfile"),
    ]


def granian(interface: str, module: str = "") -> Callable[[Site], list[str]]:
    def command(site: Site) -> list[str]:
        app = f"{site.scenario.module or module or interface}:{site.app}"
        return [
            *(site.peer("granian"), app),
            *("--interface", interface, "--port", str(site.port)),
            *("--workers", site.workers, "--backlog", "16384"),
            *("--log-level", "error", "--no-access-log"),
            *site.tls("--ssl-certificate", "--ssl-keyfile"),
        ]

    return command


def gunicorn_gthread(module: str) -> Callable[[Site], list[str]]:
    def command(site: Site) -> list[str]:
        bind = f"127.0.0.1:{site.port}"
        return [
            *(site.peer("gunicorn"), f"{module}:{site.app}", "-b", bind),
            *("-k", "gthread", "--workers", site.workers, "--threads", "8"),
            *("--worker-connections", "16384", "--keep-alive", "75"),
            *("--backlog", "4096", "--log-level", "error"),
            *site.tls("--certfile", "--keyfile"),
        ]

    return command


def uwsgi(module: str) -> Callable[[Site], list[str]]:
    """A thread stays with a connection as long as that is kept alive."""

    def command(site: Site) -> list[str]:
        return [
            *(site.peer("uwsgi"), "--http11-socket", f"127.0.0.1:{site.port}"),
            *("--module", f"{module}:{site.app}", "--master", "--die-on-term"),
            *("--processes", "1", "--threads", str(site.scenario.connections)),
            *("--disable-logging", "--listen", "4096", "--need-app"),
        ]

    return command


def fastpysgi(module: str) -> Callable[[Site], list[str]]:
    def command(site: Site) -> list[str]:
        return _script(
            site,
            "fastpysgi",
            f"from {module} import {site.app} as app\n"
            f"fastpysgi.run(app, host='127.0.0.1', port={site.port}, workers=1)",
        )

    return command


def picows(site: Site) -> list[str]:
    return _script(site, "picows", f"from picows_echo import run\nrun({site.port})")


def bjoern(module: str) -> Callable[[Site], list[str]]:
    def command(site: Site) -> list[str]:
        return _script(
            site,
            "bjoern",
            f"from {module} import {site.app} as app\n"
            f"bjoern.run(app, '127.0.0.1', {site.port}, listen_backlog=4096)",
        )

    return command


def _script(site: Site, package: str, code: str) -> list[str]:
    python = site.peer("python")
    if subprocess.run(
        [python, "-c", f"import {package}"], stderr=subprocess.DEVNULL
    ).returncode:
        raise Unavailable(f"{package} is not installed: run.py --setup-peers")
    return [python, "-c", f"import {package}\n{code}"]


_EVERYTHING = ("app", "big", "echo")
_ASGI = (*_EVERYTHING, "api", "echo_json")


def _framework(name: str) -> Iterator[Server]:
    """The servers of WSGI apps, each with the smallest app of a framework."""
    module = f"{name}_hello"
    yield Server(f"prefork-{name}", prefork(module, "--interface", "wsgi"))
    threads = ("--threads", "16")
    yield Server(f"prefork-{name}-16", prefork(module, "--interface", "wsgi", *threads))
    yield Server(f"granian-{name}", granian("wsgi", module))
    yield Server(f"gunicorn-{name}", gunicorn_gthread(module))
    yield Server(f"uwsgi-{name}", uwsgi(module))
    yield Server(f"fastpysgi-{name}", fastpysgi(module))
    yield Server(f"bjoern-{name}", bjoern(module))


_ALL = (
    Server("limit", limit, prints_port=True, serves=_ASGI),
    Server("limit-nodefer", limit_without_defer, prints_port=True),
    Server("core", core, prints_port=True),
    Server("prefork", prefork("hello"), serves=_EVERYTHING, tls=True),
    Server("prefork-16", prefork("hello", "--threads", "16")),
    Server("prefork-wsgi", prefork("wsgi"), tls=True),
    Server("prefork-wsgi-16", prefork("wsgi", "--threads", "16"), tls=True),
    Server("prefork-asgi", prefork("asgi"), serves=_ASGI, tls=True),
    Server("nginx", nginx, tls=True),
    Server("uvicorn", uvicorn, serves=_ASGI, tls=True),
    Server("granian-wsgi", granian("wsgi"), tls=True),
    Server("granian-asgi", granian("asgi"), serves=_ASGI, tls=True),
    Server("granian-rsgi", granian("rsgi"), serves=_EVERYTHING, tls=True),
    Server("gunicorn", gunicorn_gthread("wsgi"), tls=True),
    Server("uwsgi", uwsgi("wsgi")),
    Server("fastpysgi-wsgi", fastpysgi("wsgi")),
    Server("fastpysgi-asgi", fastpysgi("asgi")),
    Server("bjoern", bjoern("wsgi")),
    Server("picows", picows, serves=("echo",)),
    *_framework("flask"),
    *_framework("django"),
)

SERVERS = {server.name: server for server in _ALL}


# ---- Installing ---------------------------------------------------------------------


def setup_peers(python: Path, peers: Path) -> None:
    """Install the peers into a virtual environment of their own, line by line."""
    if not (peers / "bin" / "pip").exists():
        if subprocess.run([str(python), "-m", "venv", str(peers)]).returncode:
            raise Unavailable(
                f"{python.name} makes no venv: apt-get install python3-venv"
            )
    pip = [str(peers / "bin" / "python"), "-m", "pip", "install", "--quiet"]
    for line in (HERE / "peers.txt").read_text().splitlines():
        wanted = line.partition("#")[0].split()
        if not wanted:
            continue
        done = subprocess.run([*pip, *wanted], stderr=subprocess.DEVNULL)
        if done.returncode:
            print(f"left out: {' '.join(wanted)}", file=sys.stderr)


# ---- Running -----------------------------------------------------------------------


@contextlib.contextmanager
def running(server: Server, site: Site, core: int) -> Iterator[Running]:
    """The server on one core, from its first answer on."""
    command = server.start(site)
    probe = Probe(site.app == "echo", site.scenario.tls)
    with open(site.scratch / "stderr", "w+") as errors:
        process = subprocess.Popen(
            command,
            cwd=APPS,
            env=os.environ | {"PYTHONPATH": str(APPS)},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE if server.prints_port else subprocess.DEVNULL,
            stderr=errors,
            text=True,
            preexec_fn=lambda: os.sched_setaffinity(0, {core}),
        )
        try:
            port = _printed_port(process) if server.prints_port else site.port
            _wait_until_ready(process, port, errors, probe)
            yield Running(port, cpu.tree(process.pid))
        finally:
            _stop(process)


@contextlib.contextmanager
def serving(command: list[str]) -> Iterator[int]:
    """A prefork of one's own: its port, from its first answer on.

    It inherits the listener: a port that is only known to be free may be taken.
    """
    with tempfile.TemporaryFile("w+") as errors:
        with socket.create_server(("127.0.0.1", 0)) as listener:
            port, fd = listener.getsockname()[1], listener.fileno()
            command = [*command, "--bind", f"fd://{fd}"]
            process = subprocess.Popen(command, stderr=errors, text=True, pass_fds=[fd])
        try:
            _wait_until_ready(process, port, errors)
            yield port
        finally:
            _stop(process)


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


def _printed_port(process: subprocess.Popen[str]) -> int:
    assert process.stdout
    line = process.stdout.readline()
    if not line.strip().isdigit():
        raise ServerError(f"{process.args!r} printed no port but {line!r}")
    return int(line)


def _wait_until_ready(
    process: subprocess.Popen[str],
    port: int,
    errors: IO[str],
    probe: Probe = PLAIN,
) -> None:
    """Until it has answered once; its own exit ends the wait at once."""
    wait = 0.002
    waited = 0.0
    while not answers(port, probe):
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(wait)
        waited += wait
        wait = min(2 * wait, 0.05)
        if process.returncode is not None or waited > READY_SECONDS:
            errors.seek(0)
            raise ServerError(f"did not start: {errors.read().strip()[-400:]}")


def answers(port: int, probe: Probe = PLAIN) -> bool:
    """Whether it answers a request, or a handshake, as it should."""
    upgrade = probe.upgrade
    try:
        with load.connect(port, probe.tls) as sock:
            cipher = sock.cipher() if isinstance(sock, ssl.SSLSocket) else None
            sock.sendall(HANDSHAKE if upgrade else PROBE)
            head, _ = load.read_head(sock) if upgrade else load.read_answer(sock)
    except OSError:
        return False
    if cipher and cipher[0] != CIPHER:
        raise ServerError(f"agrees on {cipher[0]}, not {CIPHER} as the others")
    if not head.startswith(b"HTTP/1.1 101 " if upgrade else b"HTTP/1.1 200 "):
        raise ServerError(f"answered {head.splitlines()[0]!r}")
    return True


def _stop(process: subprocess.Popen[str]) -> None:
    family = {pid: _handle(pid) for pid in cpu.tree(process.pid)[1:]}
    process.terminate()
    try:
        process.wait(STOP_SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    if process.stdout:
        process.stdout.close()
    for handle in family.values():
        if handle is not None:
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(handle, signal.SIGKILL)
            os.close(handle)


def _handle(pid: int) -> int | None:
    try:
        return os.pidfd_open(pid)
    except ProcessLookupError:
        return None
