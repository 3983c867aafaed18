"""TLS under a master: certificates loaded before all else, rotated, tickets shared."""

from __future__ import annotations

import asyncio
import os
import re
import shutil
import signal
import ssl
import subprocess
import textwrap
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from pathlib import Path

import httpx
import psutil
import pytest
from authority import DAY, NOW, Authority, Issued, body, dial, serial, tell
from crowd import Stream
from crowded import SECONDS, SOCKETS, TLS_RATE, in_thread, under_load, went_on
from programs import SOON, Program, ask, without_sanitizers
from runs import WAYS, ready, stop

from prefork import Prefork, Server
from prefork.config import DEFAULTS, OPTIONS, Group
from prefork.errors import CertificateError, ConfigError

CURL = shutil.which("curl")
OPENSSL = shutil.which("openssl")
KEEP = b"GET / HTTP/1.1\r\nHost: a\r\n\r\n"

APP = """
def app(request):
    return f"{os.getpid()} {request.scheme}"
"""

Run = Callable[..., Program]


@pytest.fixture
def authority(tmp_path: Path) -> Authority:
    return Authority(tmp_path)


@pytest.fixture
def issued(authority: Authority) -> Issued:
    return authority.issue()


@pytest.fixture
def trusting(authority: Authority) -> ssl.SSLContext:
    return authority.trusting()


@pytest.fixture
def run(start) -> Run:
    """run(arguments): masters.run() of an app that answers with pid and scheme."""

    def run(arguments: str, before: str = "") -> Program:
        return start(textwrap.dedent(before) + APP + f"run({arguments})")

    return run


def served(issued: Issued, **more: object) -> str:
    """server= of a Server with this certificate."""
    return f"server=Server(app, **{ {**issued.options, **more}!r})"


def worker(address: str, context: ssl.SSLContext) -> int:
    """The pid of the worker that answers, over https."""
    pid, scheme = body(address, context).split()
    assert scheme == "https"
    return int(pid)


# ---- The calls -----------------------------------------------------------------------


FILES = """
    call=lambda master: master.listen_and_serve_tls("127.0.0.1:0", **{files!r})
"""
EMBED = """
    call=lambda master: master.listen_and_serve_tls_embed(
        "127.0.0.1:0",
        cert_data=open({files[cert_file]!r}, "rb").read(),
        key_data=open({files[key_file]!r}, "rb").read(),
    )
"""


def serves_with(program: Program, issued: Issued, trusting: ssl.SSLContext) -> None:
    """Its workers answer over TLS, with this certificate; then it stops."""
    address, pids = ready(program)
    assert worker(address, trusting) in pids
    assert serial(address, trusting) == issued.serial
    stop(program)


@pytest.mark.contract("ListenAndServeTLS")
@WAYS
def test_listen_and_serve_tls_serves_with_files(run, issued, trusting, way):
    program = run(f"server=Server(app), {way}, {FILES.format(files=issued.files)}")
    serves_with(program, issued, trusting)


@pytest.mark.contract("ListenAndServeTLSEmbed")
@WAYS
def test_listen_and_serve_tls_embed_serves_with_bytes(run, issued, trusting, way):
    program = run(f"server=Server(app), {way}, {EMBED.format(files=issued.files)}")
    serves_with(program, issued, trusting)


@WAYS
def test_a_server_with_a_certificate_serves_tls(run, issued, trusting, way):
    program = run(f"{served(issued)}, {way}")
    address, pids = ready(program)
    assert worker(address, trusting) in pids
    assert ask(address, KEEP).startswith(b"HTTP/1.1 400 ")  # not in clear text
    stop(program)


def test_a_unix_socket_serves_tls_too(run, issued, trusting, tmp_path):
    program = run(f"'unix:{tmp_path}/sock', {served(issued)}")
    address, pids = ready(program)
    assert worker(address, trusting) in pids
    stop(program)


def test_every_address_is_served_over_tls(run, issued, trusting, tmp_path):
    program = run(f"['127.0.0.1:0', 'unix:{tmp_path}/sock'], {served(issued)}")
    address, pids = ready(program)
    for each in (address, f"unix:{tmp_path}/sock"):
        assert worker(each, trusting) in pids
    stop(program)


def test_a_server_without_a_master_serves_tls(serve, issued, trusting):
    live = serve(lambda request: request.scheme, **issued.options)
    assert body("{}:{}".format(*live.address), trusting) == "https"


def wsgi(environ, start_response):
    start_response("200 OK", [("Content-Type", "text/plain")])
    return [environ["wsgi.url_scheme"].encode()]


async def asgi(scope, receive, send):
    await send({"type": "http.response.start", "status": 200})
    await send({"type": "http.response.body", "body": scope["scheme"].encode()})


@pytest.mark.parametrize("app", [wsgi, asgi])
def test_apps_of_each_interface_are_told_https(serve, issued, trusting, app):
    live = serve(app, lifespan="off", **issued.options)
    assert body("{}:{}".format(*live.address), trusting) == "https"


def test_a_run_with_tls_leaves_a_server_that_serves_without(start, issued, trusting):
    program = start(f"""
        server = Server(lambda request: request.scheme)
        for call in (
            lambda m: m.listen_and_serve_tls("127.0.0.1:0", **{issued.files!r}),
            None,
        ):
            run(server=server, call=call)
    """)
    address, _ = ready(program)
    assert body(address, trusting) == "https"
    program.signal(signal.SIGTERM)
    program.until("returned")
    address, _ = ready(program)
    assert ask(address, KEEP.replace(b"\r\n\r\n", b"\r\nConnection: close\r\n\r\n"))[
        -4:
    ] == (b"http")
    program.signal(signal.SIGTERM)
    assert program.wait() == 0


@pytest.mark.skipif(CURL is None, reason="curl is not installed")
def test_curl_is_served(run, authority, issued):
    program = run(served(issued))
    address, pids = ready(program)
    port = address.rpartition(":")[2]
    url = f"https://localhost:{port}/"
    command = [str(CURL), "--silent", "--show-error", "--cacert", str(authority.cas)]
    command += ["--resolve", f"localhost:{port}:127.0.0.1", url, url]
    told = subprocess.run(
        command, capture_output=True, text=True, timeout=SOON, env=without_sanitizers()
    )
    assert told.stderr == ""
    assert len(told.stdout.split("https")) == 3
    stop(program)


def test_httpx_is_served(run, trusting, issued):
    program = run(served(issued))
    address, pids = ready(program)
    port = address.rpartition(":")[2]
    with httpx.Client(verify=trusting) as client:
        for _ in range(3):
            answer = client.get(f"https://localhost:{port}/")
            assert answer.status_code == 200 and answer.text.endswith(" https")
    stop(program)


# ---- Before any spawn ----------------------------------------------------------------


def never_spawned(program: Program) -> tuple[str, str]:
    """The class and the text of what was raised when nothing had been started."""
    assert program.wait() == 0, program.stderr
    assert program.events("left") == [["left"]], program.told
    assert program.events("spawn") == []
    ((_, kind, *words),) = program.events("raised")
    return kind, " ".join(words)


@pytest.mark.contract("better: certificates")
@pytest.mark.parametrize("name", ["cert_file", "key_file"])
@WAYS
def test_a_missing_file_is_the_true_error_before_any_spawn(run, issued, name, way):
    files = {**issued.files, name: "/no/such.pem"}
    program = run(f"server=Server(app), {way}, {FILES.format(files=files)}")
    kind, text = never_spawned(program)
    assert kind == "FileNotFoundError"
    assert "no such file or directory" in text and "/no/such.pem" in text


@pytest.mark.contract("better: certificates")
def test_a_file_that_may_not_be_read_is_the_true_error(run, issued, tmp_path):
    files = {**issued.files, "key_file": str(tmp_path)}
    kind, text = never_spawned(run(f"server=Server(app), {FILES.format(files=files)}"))
    assert kind == "IsADirectoryError" and str(tmp_path) in text


@pytest.mark.contract("better: certificates")
@WAYS
def test_a_wrong_key_is_told_before_any_spawn(run, authority, issued, way):
    other = authority.issue(file="other")
    files = {**issued.files, "key_file": str(other.key)}
    program = run(f"server=Server(app), {way}, {FILES.format(files=files)}")
    kind, text = never_spawned(program)
    assert kind == "CertificateError"
    assert text.startswith(f"{issued.cert} with key {other.key}: ")


@pytest.mark.contract("better: certificates")
def test_an_encrypted_key_without_its_password_is_told_before_any_spawn(run, authority):
    issued = authority.issue(password=b"secret")
    kind, text = never_spawned(run(served(issued)))
    assert kind == "CertificateError" and "encrypted" in text


def test_an_encrypted_key_is_opened_by_the_password(run, authority, trusting):
    issued = authority.issue(password=b"secret")
    program = run(served(issued, keyfile_password="secret"))
    address, pids = ready(program)
    assert worker(address, trusting) in pids
    stop(program)


@pytest.mark.contract("better: certificates")
def test_malformed_pem_is_told_before_any_spawn(run, issued):
    issued.cert.write_text("nothing of the kind")
    kind, text = never_spawned(
        run(f"server=Server(app), {EMBED.format(files=issued.files)}")
    )
    assert kind == "CertificateError"
    assert text.startswith("cert_data with key_data: ")


@pytest.mark.contract("better: certificates")
def test_an_expired_certificate_is_a_warning(run, authority):
    issued = authority.expired()
    program = run(served(issued))
    address, _ = ready(program)
    assert "expired" in program.until_logged("[WARNING] certificate of localhost")
    with pytest.raises(ssl.SSLCertVerificationError, match="expired"):
        serial(address, authority.trusting())
    stop(program)


def test_what_is_served_with_is_logged_once(run, authority):
    program = run(served(authority.issue("a.test", not_after=NOW + DAY)))
    ready(program)
    line = program.until_logged("certificate of a.test, until ")
    assert (NOW + DAY).strftime("%Y-%m-%d") in line
    stop(program)
    assert program.stderr.count("certificate of") == 1


def test_two_certificates_for_one_call_are_refused(issued):
    master = Prefork(Server(print, interface="native", certfile="a.pem"))
    with pytest.raises(ConfigError, match="certfile must be left out where the call"):
        master.listen_and_serve_tls("127.0.0.1:0", **issued.files)


def test_a_server_that_knows_no_tls_is_a_type_error_before_any_spawn(issued):
    master = Prefork(serve_func=print)
    with pytest.raises(TypeError, match="a prefork.Server, or serve_tls_func"):
        master.listen_and_serve_tls("127.0.0.1:0", **issued.files)
    with pytest.raises(TypeError, match="a prefork.Server, or serve_tls_embed_func"):
        master.listen_and_serve_tls_embed("127.0.0.1:0", cert_data=b"", key_data=b"")


@pytest.mark.contract("ListenAndServeTLS", "ListenAndServeTLSEmbed")
def test_certificate_and_key_are_named_so_they_cannot_be_mixed_up(issued):
    master = Prefork(Server(lambda request: b""))
    for call in (master.listen_and_serve_tls, master.listen_and_serve_tls_embed):
        with pytest.raises(TypeError, match="positional argument"):
            call("127.0.0.1:0", *issued.files.values())


# ---- Other servers -------------------------------------------------------------------


HTTP_SERVER = """
import http.server, ssl, tempfile

class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()
        self.wfile.write(b"%d https" % os.getpid())
    def log_message(self, *_):
        pass

def tls(sock, cert_file, key_file):
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(cert_file, key_file)
    server = http.server.ThreadingHTTPServer(sock.getsockname(), Handler, False)
    server.socket = context.wrap_socket(sock, server_side=True)
    server.serve_forever()

def embed(sock, cert_data, key_data):
    assert type(cert_data) is type(key_data) is bytes
    with tempfile.NamedTemporaryFile() as file:
        file.write(key_data + cert_data)
        file.flush()
        tls(sock, file.name, None)
"""

UVICORN = """
import uvicorn

async def app(scope, receive, send):
    text = f"{os.getpid()} {scope['scheme']}".encode()
    fields = [(b"content-length", b"%d" % len(text))]
    await send({"type": "http.response.start", "status": 200, "headers": fields})
    await send({"type": "http.response.body", "body": text})

def tls(sock, cert_file, key_file):
    config = uvicorn.Config(
        app, lifespan="off", log_level="warning",
        ssl_certfile=cert_file, ssl_keyfile=key_file,
    )
    uvicorn.Server(config).run(sockets=[sock])
"""


def foreign(start, lines: str, arguments: str) -> Program:
    return start(f"{lines}\nrun({arguments})")


@pytest.mark.contract("ServeTLSFunc")
@pytest.mark.parametrize("lines", [HTTP_SERVER, UVICORN], ids=["http", "uvicorn"])
@WAYS
def test_serve_tls_func_is_given_socket_certificate_and_key(
    start, issued, trusting, lines, way
):
    call = FILES.format(files=issued.files)
    program = foreign(start, lines, f"serve_tls_func=tls, {way}, {call}")
    address, pids = ready(program)
    assert worker(address, trusting) in pids
    stop(program)


@pytest.mark.contract("ServeTLSEmbedFunc")
@WAYS
def test_serve_tls_embed_func_is_given_socket_and_bytes(start, issued, trusting, way):
    call = EMBED.format(files=issued.files)
    program = foreign(start, HTTP_SERVER, f"serve_tls_embed_func=embed, {way}, {call}")
    address, pids = ready(program)
    assert worker(address, trusting) in pids
    stop(program)


@pytest.mark.contract("ServeTLSFunc")
def test_serve_tls_func_stands_before_the_server(start, issued, trusting):
    program = foreign(
        start,
        HTTP_SERVER,
        f"server=Server(lambda request: b'no'), serve_tls_func=tls, "
        f"{FILES.format(files=issued.files)}",
    )
    address, pids = ready(program)
    assert worker(address, trusting) in pids
    stop(program)


@pytest.mark.contract("ServeTLSFunc", "better: certificates")
def test_a_stranger_s_certificate_is_checked_before_any_spawn(start, authority, issued):
    other = authority.issue(file="other")
    files = {**issued.files, "key_file": str(other.key)}
    call = FILES.format(files=files)
    kind, text = never_spawned(
        foreign(start, HTTP_SERVER, f"serve_tls_func=tls, {call}")
    )
    assert kind == "CertificateError" and str(other.key) in text
    call = FILES.format(files={**files, "cert_file": "/no/such.pem"})
    kind, _ = never_spawned(foreign(start, HTTP_SERVER, f"serve_tls_func=tls, {call}"))
    assert kind == "FileNotFoundError"


@pytest.mark.contract("ServeTLSEmbedFunc", "better: certificates")
def test_a_stranger_s_bytes_are_checked_before_any_spawn(start, issued):
    issued.key.write_bytes(b"nothing")
    call = EMBED.format(files=issued.files)
    kind, text = never_spawned(
        foreign(start, HTTP_SERVER, f"serve_tls_embed_func=embed, {call}")
    )
    assert kind == "CertificateError" and text.startswith("cert_data with key_data")


def test_a_stranger_may_know_the_password_of_a_key(start, authority, trusting):
    issued = authority.issue(password=b"secret")
    lines = HTTP_SERVER.replace(
        "key_file)\n    server", "key_file, 'secret')\n    server"
    )
    call = FILES.format(files=issued.files)
    program = foreign(start, lines, f"serve_tls_func=tls, {call}")
    address, pids = ready(program)
    assert worker(address, trusting) in pids
    stop(program)


def test_a_stranger_s_worker_that_crashes_is_recovered(start, issued, trusting):
    call = FILES.format(files=issued.files)
    program = foreign(start, HTTP_SERVER, f"serve_tls_func=tls, {call}, workers=1")
    address, (pid,) = ready(program)
    os.kill(pid, signal.SIGKILL)
    _, new = program.until("recover")
    assert worker(address, trusting) == int(new)
    stop(program)


# ---- Rotation by HUP -----------------------------------------------------------------


def renewed(authority: Authority, issued: Issued) -> Issued:
    """Another certificate for the same name, beside the files of the first."""
    return authority.issue(file="renewed").move_to(issued)


@WAYS
def test_hup_loads_the_new_certificate(run, authority, issued, trusting, way):
    program = run(f"{served(issued)}, {way}")
    address, pids = ready(program)
    new = renewed(authority, issued)
    assert serial(address, trusting) == issued.serial
    program.signal(signal.SIGHUP)
    program.until_logged("reloaded 2 workers, generation 2")
    assert serial(address, trusting) == new.serial
    assert worker(address, trusting) not in pids
    stop(program)


def test_hup_gives_a_stranger_the_new_files(start, authority, issued, trusting):
    call = FILES.format(files=issued.files)
    program = foreign(start, HTTP_SERVER, f"serve_tls_func=tls, {call}, workers=1")
    address, _ = ready(program)
    assert serial(address, trusting) == issued.serial  # it reads them when it likes
    new = renewed(authority, issued)
    program.signal(signal.SIGHUP)
    program.until_logged("reloaded 1 worker")
    assert serial(address, trusting) == new.serial
    stop(program)


@WAYS
def test_a_broken_new_certificate_keeps_the_old_one_and_says_so(
    run, authority, issued, trusting, way
):
    program = run(f"{served(issued)}, {way}")
    address, pids = ready(program)
    issued.cert.write_text("broken")
    program.signal(signal.SIGHUP)
    program.until_logged("reload failed, the workers stay as they are: ")
    assert serial(address, trusting) == issued.serial
    assert worker(address, trusting) in pids
    new = renewed(authority, issued)
    program.signal(signal.SIGHUP)
    program.until_logged("reloaded 2 workers")
    assert serial(address, trusting) == new.serial
    stop(program)
    assert f"CertificateError: {issued.cert} with key {issued.key}: " in program.stderr
    assert "Traceback" not in program.stderr


def test_a_new_certificate_that_has_expired_is_a_warning(run, authority, issued):
    program = run(served(issued))
    ready(program)
    authority.expired()
    program.signal(signal.SIGHUP)
    program.until_logged("[WARNING] certificate of localhost expired ")
    program.until_logged("reloaded 2 workers")
    stop(program)


def test_a_certificate_that_is_gone_is_told_in_one_line(run, issued, trusting):
    program = run(served(issued))
    address, _ = ready(program)
    issued.key.unlink()
    program.signal(signal.SIGHUP)
    line = program.until_logged("reload failed, the workers stay as they are: ")
    assert f"{issued.key}: cannot read the key: no such file or directory" in line
    assert serial(address, trusting) == issued.serial
    stop(program)


@pytest.mark.timeout(60 + 2 * SECONDS)
@SOCKETS
@pytest.mark.parametrize("how", ["hup", "watch"])
def test_nobody_notices_a_rotation_under_load(
    authority, issued, trusting, how, sockets
):
    made, seen = [issued.serial], [issued.serial]

    async def rotate(program: Program, pids: list[int]) -> None:
        address = f"127.0.0.1:{stream.port}"
        began = time.monotonic()
        while time.monotonic() - began < SECONDS or len(made) < 3:
            made.append(renewed(authority, issued).serial)
            if how == "hup":
                program.signal(signal.SIGHUP)
            await in_thread(program.until_logged, "reloaded")
            seen.append(await in_thread(serial, address, trusting))
            await asyncio.sleep(1.0)

    stream = Stream("127.0.0.1", tls=trusting, rate=TLS_RATE)
    options = {**issued.options, "tls_watch": how == "watch"}
    under_load(stream, rotate, sockets, **options)
    assert seen == made
    went_on(stream)


# ---- Rotation by the files -----------------------------------------------------------


@WAYS
def test_tls_watch_loads_what_was_renamed_over_the_files(
    run, authority, issued, trusting, way
):
    program = run(f"{served(issued, tls_watch=True)}, {way}")
    address, pids = ready(program)
    for generation in (2, 3):
        new = renewed(authority, issued)
        program.until_logged("the certificates' files have changed")
        program.until_logged(f"reloaded 2 workers, generation {generation}")
        assert serial(address, trusting) == new.serial
    stop(program)


def test_tls_watch_loads_what_a_swapped_link_leads_to(
    run, authority, trusting, tmp_path
):
    def mount(version: str) -> Issued:
        """As kubernetes does: new files in a new directory, then one link."""
        directory = tmp_path / "mount" / f"..{version}"
        directory.mkdir(parents=True)
        issued = authority.issue(file="tls", directory=directory)
        (tmp_path / "mount" / "..tmp").symlink_to(f"..{version}")
        (tmp_path / "mount" / "..tmp").replace(tmp_path / "mount" / "..data")
        return issued

    first = mount("2026_01")
    cert, key = tmp_path / "mount" / "tls.pem", tmp_path / "mount" / "tls.key"
    cert.symlink_to("..data/tls.pem")
    key.symlink_to("..data/tls.key")
    issued = Issued(cert, key, first.serial)
    program = run(served(issued, tls_watch=True))
    address, _ = ready(program)
    assert serial(address, trusting) == first.serial
    for version in ("2026_02", "2026_03"):
        new = mount(version)
        program.until_logged("reloaded 2 workers")
        assert serial(address, trusting) == new.serial
    stop(program)


def test_tls_watch_keeps_the_old_certificate_until_the_new_one_is_whole(
    run, authority, issued, trusting
):
    program = run(served(issued, tls_watch=True))
    address, pids = ready(program)
    new = authority.issue(file="renewed")
    new.key.replace(issued.key)
    line = program.until_logged("new certificates fail, the old ones stay: ")
    assert f"{issued.cert} with key {issued.key}: " in line
    assert serial(address, trusting) == issued.serial
    assert worker(address, trusting) in pids
    new.cert.replace(issued.cert)
    program.until_logged("reloaded 2 workers, generation 2")
    assert serial(address, trusting) == new.serial
    issued.cert.unlink()
    line = program.until_logged("new certificates fail, the old ones stay: ")
    assert f"{issued.cert}: cannot read the certificate: no such file" in line
    assert serial(address, trusting) == new.serial
    stop(program)


def test_tls_watch_is_not_misled_by_what_happens_beside_the_files(
    run, authority, issued, trusting, tmp_path
):
    program = run(served(issued, tls_watch=True))
    address, pids = ready(program)
    (tmp_path / "other").write_text("x")
    issued.cert.write_bytes(issued.cert.read_bytes())
    new = renewed(authority, issued)
    program.until_logged("reloaded 2 workers, generation 2")
    assert serial(address, trusting) == new.serial
    stop(program)
    assert program.stderr.count("have changed") == 1


def test_tls_watch_sees_what_changed_before_it_began(run, authority, issued, trusting):
    new = authority.issue(file="renewed")
    program = run(
        f"{served(issued, tls_watch=True)}, logger=Renewing()",
        f"""
        class Renewing:
            def printf(self, fmt, *args):
                line = fmt % args
                print(line, file=sys.stderr, flush=True)
                if "certificate of" in line and os.path.exists({str(new.key)!r}):
                    os.replace({str(new.key)!r}, {str(issued.key)!r})
                    os.replace({str(new.cert)!r}, {str(issued.cert)!r})
        """,
    )
    address, _ = ready(program)
    program.until_logged("reloaded 2 workers, generation 2")
    assert serial(address, trusting) == new.serial
    stop(program)


@WAYS
def test_the_watch_is_the_master_s_alone(run, issued, way):
    program = run(f"{served(issued, tls_watch=True)}, {way}")
    ready(program)

    def holders() -> set[int]:
        parties = [psutil.Process(program.pid)]
        parties += parties[0].children(recursive=True)
        return {party.pid for party in parties if "inotify" in files_of(party.pid)}

    assert holders() == {program.pid}
    program.signal(signal.SIGHUP)
    program.until_logged("reloaded 2 workers")
    assert holders() == {program.pid}
    stop(program)


def files_of(pid: int) -> str:
    """What the descriptors of a process are."""
    found = []
    for fd in Path(f"/proc/{pid}/fd").iterdir():
        with suppress(FileNotFoundError):  # it is closed
            found.append(str(fd.readlink()))
    return " ".join(found)


# ---- Tickets -------------------------------------------------------------------------


@pytest.fixture(params=[ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3])
def version(request: pytest.FixtureRequest) -> ssl.TLSVersion:
    return request.param


def of_version(authority: Authority, version: ssl.TLSVersion) -> ssl.SSLContext:
    return authority.trusting(minimum_version=version, maximum_version=version)


def ticket(address: str, context: ssl.SSLContext) -> tuple[int, ssl.SSLSession]:
    """A session, and the worker that gave it."""
    with dial(address, context) as secure:
        secure.sendall(KEEP)
        pid = pid_of(secure)
        assert not secure.session_reused
        assert secure.session is not None and secure.session.has_ticket
        return pid, secure.session


def pid_of(secure: ssl.SSLSocket) -> int:
    answer = b""
    while not answer.endswith(b" https"):
        part = secure.recv(65536)
        assert part, answer
        answer += part
    return int(answer.rpartition(b"\r\n\r\n")[2].split()[0])


def resumed(
    address: str, context: ssl.SSLContext, session: ssl.SSLSession
) -> tuple[int, bool]:
    """Who answers a connection with this session, and whether it is resumed."""
    with dial(address, context, session=session) as secure:
        secure.sendall(KEEP)
        return pid_of(secure), bool(secure.session_reused)


def resumed_by_all(
    address: str, context: ssl.SSLContext, session: ssl.SSLSession, pids: list[int]
) -> None:
    """Connect, and stay, until each of these workers has resumed the session."""
    met: set[int] = set()
    deadline = time.monotonic() + SOON
    with ExitStack() as held:
        while met != set(pids):
            assert time.monotonic() < deadline, (met, pids)
            secure = held.enter_context(dial(address, context, session=session))
            secure.sendall(KEEP)
            met.add(pid_of(secure))
            assert secure.session_reused


@WAYS
def test_a_ticket_of_one_worker_is_taken_by_every_other(
    run, authority, issued, version, way
):
    context = of_version(authority, version)
    program = run(f"{served(issued)}, {way}, workers=3")
    address, pids = ready(program)
    pid, session = ticket(address, context)
    assert pid in pids
    resumed_by_all(address, context, session, pids)
    stop(program)


ROTATE = """
import threading

def rotate(pids):
    say("ready", text(master.address), *pids)
    def turn():
        for _ in range(4):
            with open({fifo!r}) as fifo:
                fifo.read()
            master.scoreboard.rotate_tickets()
            say("rotated")
    threading.Thread(target=turn, daemon=True).start()
"""


def test_a_ticket_is_taken_after_three_rotations_and_not_after_four(
    run, authority, issued, version, tmp_path
):
    context = of_version(authority, version)
    os.mkfifo(tmp_path / "fifo")
    program = run(
        f"{served(issued)}, on_master_ready=rotate",
        ROTATE.format(fifo=str(tmp_path / "fifo")),
    )
    address, pids = ready(program)
    _, session = ticket(address, context)
    for _ in range(3):
        (tmp_path / "fifo").write_text("turn")
        program.until("rotated")
        resumed_by_all(address, context, session, pids)
    (tmp_path / "fifo").write_text("turn")
    program.until("rotated")
    assert resumed(address, context, session)[1] is False
    stop(program)


def test_the_master_rotates_ticket_keys_by_itself(run, authority, issued, trusting):
    program = run(
        served(issued), "from prefork import renewal as r; r.TICKET_KEY_LIFE = 0.1"
    )
    address, pids = ready(program)
    _, session = ticket(address, trusting)
    deadline = time.monotonic() + SOON
    while resumed(address, trusting, session)[1]:
        assert time.monotonic() < deadline
    stop(program)


@WAYS
def test_a_ticket_is_taken_by_the_workers_of_a_reload(
    run, authority, issued, version, way
):
    context = of_version(authority, version)
    program = run(f"{served(issued)}, {way}")
    address, pids = ready(program)
    _, session = ticket(address, context)
    renewed(authority, issued)
    program.signal(signal.SIGHUP)
    program.until_logged("reloaded 2 workers")
    pid, again = resumed(address, context, session)
    assert again and pid not in pids
    stop(program)


# ---- Options -------------------------------------------------------------------------


def test_certificates_are_chosen_by_the_name_that_is_asked_for(serve, authority):
    one = authority.issue("a.test", file="a")
    two = authority.issue("*.b.test", file="b")
    live = serve(
        lambda request: b"", certfile=[one.cert, two.cert], keyfile=[one.key, two.key]
    )
    address = "{}:{}".format(*live.address)
    lenient = authority.trusting(check_hostname=False)
    assert serial(address, authority.trusting(), "a.test") == one.serial
    assert serial(address, authority.trusting(), "x.b.test") == two.serial
    assert serial(address, lenient, "elsewhere.test") == one.serial


@pytest.mark.parametrize("required", [True, False])
def test_cert_reqs_says_whether_clients_must_have_a_certificate(
    serve, authority, issued, required
):
    live = serve(
        lambda request: b"ok",
        **issued.options,
        ca_certs=authority.cas,
        cert_reqs="required" if required else "optional",
    )
    address = "{}:{}".format(*live.address)
    known = authority.trusting(authority.issue("client.test", file="client"))
    assert body(address, known) == "ok"
    if not required:
        assert body(address, authority.trusting()) == "ok"
        return
    with pytest.raises((ssl.SSLError, ConnectionError)):
        tell(address, authority.trusting())


def test_a_client_s_name_is_in_environ_as_pep_3333_has_it(serve, authority, issued):
    def app(environ, start_response):
        start_response("200 OK", [])
        return [environ["SSL_CLIENT_S_DN"].encode("latin-1")]

    live = serve(app, **issued.options, ca_certs=authority.cas, cert_reqs="required")
    client = authority.issue("client.test", file="client", common_name="Юлия")
    address = "{}:{}".format(*live.address)
    assert "CN=Юлия" in body(address, authority.trusting(client))


def test_tls_min_refuses_what_is_older(serve, authority, issued):
    live = serve(lambda request: b"ok", **issued.options, tls_min="1.3")
    address = "{}:{}".format(*live.address)
    assert body(address, of_version(authority, ssl.TLSVersion.TLSv1_3)) == "ok"
    with pytest.raises(ssl.SSLError):
        body(address, of_version(authority, ssl.TLSVersion.TLSv1_2))


@pytest.mark.parametrize(
    ("version", "cipher"),
    [
        (ssl.TLSVersion.TLSv1_2, "ECDHE-ECDSA-AES256-GCM-SHA384"),
        (ssl.TLSVersion.TLSv1_3, "TLS_CHACHA20_POLY1305_SHA256"),
    ],
    indirect=["version"],
)
def test_ciphers_are_those_of_both_versions(serve, authority, issued, version, cipher):
    ciphers = "ECDHE-ECDSA-AES256-GCM-SHA384:TLS_CHACHA20_POLY1305_SHA256"
    live = serve(lambda request: b"ok", **issued.options, ciphers=ciphers)
    address = "{}:{}".format(*live.address)
    with dial(address, of_version(authority, version)) as secure:
        assert secure.cipher()[0] == cipher


def test_log_all_errors_tells_why_a_handshake_failed(serve, authority, issued):
    live = serve(
        lambda request: b"",
        **issued.options,
        ca_certs=authority.cas,
        cert_reqs="required",
        log_all_errors=True,
    )
    address = "{}:{}".format(*live.address)
    expired = authority.issue(
        file="expired", not_before=NOW - 2 * DAY, not_after=NOW - DAY
    )
    for client, told in (
        (None, "TLS handshake failed (peer did not return a certificate)"),
        (expired, "TLS handshake failed (certificate has expired)"),
    ):
        with pytest.raises((ssl.SSLError, ConnectionError)):
            tell(address, authority.trusting(client))
        assert told in live.log.until(told)


def test_tls_handshake_timeout_closes_who_says_nothing(serve, issued):
    live = serve(lambda request: b"", **issued.options, tls_handshake_timeout=0.2)
    client = live.client()
    client.send(b"\x16\x03\x01")
    assert client.rest() == b""


@pytest.mark.skipif(OPENSSL is None, reason="openssl is not installed")
def test_an_ocsp_response_is_stapled(serve, authority, issued, tmp_path):
    (tmp_path / "ocsp.der").write_bytes(authority.says_good(issued))
    live = serve(lambda request: b"", **issued.options, ocsp_file=tmp_path / "ocsp.der")
    command = [str(OPENSSL), "s_client", "-status", "-servername", "localhost"]
    command += ["-CAfile", str(authority.cas), "-connect"]
    command += ["{}:{}".format(*live.address)]
    told = subprocess.run(
        command,
        capture_output=True,
        text=True,
        timeout=SOON,
        stdin=subprocess.DEVNULL,
        env=without_sanitizers(),
    )
    assert "OCSP Response Status: successful" in told.stdout
    assert "Cert Status: good" in told.stdout


# ---- The command ---------------------------------------------------------------------

HELLO = """
import os

def app(request):
    return f"{os.getpid()} {request.scheme}"
"""


@pytest.fixture
def command(tmp_path: Path) -> Iterator[Run]:
    """Run `python -m prefork ARGUMENTS` beside a module hello; nothing may be left."""
    (tmp_path / "hello.py").write_text(HELLO)
    programs: list[Program] = []

    def command(*arguments: str, **env: str) -> Program:
        line = ["-m", "prefork", "hello:app", "-b", "127.0.0.1:0", "-w2", *arguments]
        programs.append(Program(line, env=env, cwd=tmp_path))
        return programs[-1]

    yield command
    for program in programs:
        with program:
            pass


def serving(program: Program) -> str:
    line = program.until_logged("serving on")
    return re.search(r"127\.0\.0\.1:\d+", line)[0]


def end(program: Program) -> None:
    program.signal(signal.SIGTERM)
    assert program.wait() == 0, program.stderr


@pytest.mark.parametrize(
    "more", [[], ["--no-preload"], ["--spawn", "exec"]], ids=["fork", "late", "exec"]
)
def test_the_command_serves_tls_and_hup_renews_it(
    command, authority, issued, trusting, more
):
    program = command(*issued.flags, *more)
    address = serving(program)
    worker(address, trusting)
    new = renewed(authority, issued)
    program.signal(signal.SIGHUP)
    program.until_logged("reloaded 2 workers")
    assert serial(address, trusting) == new.serial
    issued.cert.unlink()
    program.signal(signal.SIGHUP)
    program.until_logged("reload failed, the workers stay as they are: ")
    assert serial(address, trusting) == new.serial
    end(program)
    assert f"{issued.cert}: cannot read the certificate: no such file" in program.stderr
    assert "Traceback" not in program.stderr


@pytest.mark.parametrize(
    "flags",
    [
        ["--ssl-certfile", "server.pem", "--ssl-keyfile", "server.key"],
        ["--ssl-certificate", "server.pem", "--ssl-keyfile", "server.key"],
    ],
    ids=["uvicorn", "granian"],
)
def test_the_flags_of_others_are_known(command, issued, trusting, flags):
    program = command(*flags)
    worker(serving(program), trusting)
    end(program)


def test_a_password_comes_by_the_environment(command, authority, trusting):
    issued = authority.issue(password=b"secret")
    program = command(*issued.flags, PREFORK_KEYFILE_PASSWORD="secret")
    worker(serving(program), trusting)
    end(program)


def test_the_command_takes_several_certificates(command, authority):
    one, two = authority.issue("a.test", file="a"), authority.issue("b.test", file="b")
    program = command(*one.flags, *two.flags)
    address = serving(program)
    assert serial(address, authority.trusting(), "a.test") == one.serial
    assert serial(address, authority.trusting(), "b.test") == two.serial
    end(program)


def mistake(program: Program, code: int) -> str:
    """The one line about a mistake that ends with this exit code."""
    assert program.wait() == code, program.stderr
    (line,) = program.stderr.splitlines()
    return line.removeprefix("prefork: ")


@pytest.mark.parametrize("spawn", ["fork", "exec"])
def test_a_missing_file_is_one_line_and_5(command, issued, spawn):
    program = command("--certfile", "no.pem", "--spawn", spawn)
    told = "no.pem: cannot read the certificate: no such file or directory"
    assert mistake(program, 5) == told


@pytest.mark.parametrize("spawn", ["fork", "exec"])
def test_a_wrong_key_is_one_line_and_2(command, authority, issued, spawn):
    authority.issue(file="other")
    program = command(
        *("--certfile", "server.pem", "--keyfile", "other.key", "--spawn", spawn)
    )
    assert mistake(program, 2).startswith("server.pem with key other.key: ")


def test_options_that_would_do_nothing_are_one_line_and_2(command):
    told = "certfile must name the certificate of keyfile"
    assert mistake(command("--keyfile", "a.key"), 2) == told


def test_check_config_loads_the_certificates_too(command, authority, issued):
    program = command("--check-config", *issued.flags)
    assert program.wait() == 0 and program.stderr == ""
    program = command("--check-config", *authority.expired().flags)
    assert program.wait() == 0
    assert "certificate of localhost expired" in program.stderr
    issued.key.write_text("broken")
    assert "server.pem with key" in mistake(command("--check-config", *issued.flags), 2)


def test_print_config_does_not_tell_the_password(command, issued):
    program = command("--print-config", PREFORK_KEYFILE_PASSWORD="hunter2")
    assert program.wait() == 0
    told = "\n".join(program.told)
    assert "hunter2" not in told
    assert '\n# keyfile_password = "(not shown)"' in told


# ---- The page ------------------------------------------------------------------------


def test_each_option_of_tls_is_in_the_table():
    page = (Path(__file__).parent.parent / "docs" / "tls.md").read_text()
    for name, option in OPTIONS.items():
        if option.group is Group.TLS:
            shown = option.show(DEFAULTS[name]).replace("10s", "10 s")
            assert f"| `{name}` | {shown} |" in page.replace("`none`", "none"), name


def test_a_certificate_error_is_a_config_error():
    assert issubclass(CertificateError, ConfigError)
