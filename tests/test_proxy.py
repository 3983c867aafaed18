"""PROXY headers over real sockets: from listed peers, from strangers, from HAProxy."""

from __future__ import annotations

import shutil
import socket
import struct
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from ipaddress import ip_address
from pathlib import Path

import pytest
from live import GET, SOON, Client, Live, get

from prefork import Request
from prefork.config import DEFAULTS, OPTIONS, Group

LINE = b"PROXY TCP4 192.0.2.1 198.51.100.7 56324 443\r\n"
HAPROXY = shutil.which("haproxy") or shutil.which("haproxy", path="/usr/sbin")


def ends(request: Request) -> str:
    """Who is served, and where they went."""
    return "{} {} - {} {}".format(*request.client, *request.server)


TOLD = b"192.0.2.1 56324 - 198.51.100.7 443"


def binary(
    client: str, server: str, ports: tuple[int, int], tail: bytes = b""
) -> bytes:
    """A header of version 2."""
    packed = ip_address(client).packed + ip_address(server).packed
    block = packed + struct.pack("!HH", *ports) + tail
    family = 0x11 if len(packed) == 8 else 0x21
    return (
        b"\r\n\r\n\0\r\nQUIT\n" + struct.pack("!BBH", 0x21, family, len(block)) + block
    )


BINARY = binary("192.0.2.1", "198.51.100.7", (56324, 443))


# ---- Listed peers --------------------------------------------------------------------


@pytest.mark.parametrize("version", ["auto", "v1", "v2"])
@pytest.mark.parametrize("header", [LINE, BINARY], ids=["v1", "v2"])
def test_a_listed_peer_speaks_for_its_client_in_its_version(serve, version, header):
    client = serve(ends, proxy_protocol=version).client()
    client.send(header + GET)
    if version in ("auto", "v1" if header is LINE else "v2"):
        assert client.answer().body == TOLD
        assert client.ask().body == TOLD
    else:
        assert is_closed(client)


def is_closed(client: Client) -> bool:
    """Whether the server closes without a word."""
    try:
        return client.rest() == b""
    except ConnectionResetError:
        return True


@pytest.mark.parametrize("header", [LINE, BINARY], ids=["v1", "v2"])
def test_header_and_request_may_come_byte_by_byte(serve, header):
    client = serve(ends, proxy_protocol="auto").client()
    for byte in header + GET:
        client.send(bytes([byte]))
    assert client.answer().body == TOLD


def test_the_request_may_come_later_than_the_header(serve):
    live = serve(ends, proxy_protocol="auto")
    client = live.client()
    client.send(BINARY)
    live.until(lambda s: s["bytes_in"] == len(BINARY) and s["buffers_in_use"] == 0)
    assert client.ask().body == TOLD


def test_ipv6_and_records_are_understood(serve):
    header = binary("2001:db8::1", "::1", (1, 2), b"\xea\0\3abc")
    client = serve(ends, proxy_protocol="v2").client()
    assert client.ask(header + GET).body == b"2001:db8::1 1 - ::1 2"


def test_a_proxy_may_speak_for_itself(serve):
    live = serve(ends, proxy_protocol="auto")
    for header in (b"PROXY UNKNOWN\r\n", b"\r\n\r\n\0\r\nQUIT\n\x20\0\0\0"):
        client = live.client()
        host, port = client.socket.getsockname()
        told = "{} {} - {} {}".format(host, port, *live.address)
        assert client.ask(header + GET).body.decode() == told


def test_a_unix_socket_is_asked_if_the_list_says_so(serve, tmp_path):
    for n, listed in enumerate(["unix", "*", "127.0.0.1"]):
        path = f"unix:{tmp_path}/{n}"
        live = serve(ends, path, proxy_protocol="v1", proxy_allow_from=listed)
        assert (live.client().ask(LINE + GET).status == 400) == ("1" in listed)


@pytest.mark.parametrize(
    "said",
    [
        GET,
        b"PROXY TCP4 1.2.3.4 5.6.7.8 01 2\r\n",
        LINE[:-2] + b"\n",
        b"\r\n\r\n" + LINE,
    ],
)
def test_what_is_no_header_is_closed_silently_and_told_in_the_log(serve, said):
    live = serve(ends, proxy_protocol="auto", log_all_errors=True)
    client = live.client()
    client.send(said)
    assert is_closed(client)
    assert "malformed or missing PROXY header" in live.log.until("PROXY")


def test_a_header_that_does_not_come_is_not_waited_for(serve):
    live = serve(ends, proxy_protocol="auto", header_timeout=0.05, defer_accept=False)
    clients = [live.client(), live.client()]
    clients[1].send(LINE[:20])
    assert all(is_closed(client) for client in clients)
    assert live.stats()["timeouts"] == 2


# ---- Others --------------------------------------------------------------------------


def test_a_forged_header_is_a_bad_request(serve):
    live = serve(ends, proxy_protocol="auto", proxy_allow_from="192.0.2.0/24")
    assert live.ask(LINE + GET).status == 400
    assert live.ask(BINARY + GET).status == 400
    assert live.ask().body.startswith(b"127.0.0.1 ")


def test_without_the_option_nobody_is_asked(serve):
    live = serve(ends)
    assert live.ask().body.startswith(b"127.0.0.1 ")
    assert live.ask(LINE + GET).status == 400


# ---- Whose connection it is ----------------------------------------------------------


def test_connections_are_counted_for_the_client(serve):
    live = serve(ends, proxy_protocol="auto", max_conns_per_ip=1)
    first, second, third = live.client(), live.client(), live.client()
    assert first.ask(LINE + GET).status == 200
    assert second.ask(LINE + GET).status == 429
    other = LINE.replace(b"192.0.2.1", b"192.0.2.2")
    assert third.ask(other + GET).status == 200


def test_the_client_of_the_header_is_looked_for_in_the_forwarded_list(serve):
    live = serve(ends, proxy_protocol="auto")
    said = get("/", "X-Forwarded-For: 6.6.6.6")
    assert live.ask(LINE + said).body == TOLD
    near = LINE.replace(b"192.0.2.1", b"127.0.0.1")
    assert live.ask(near + said).body == b"6.6.6.6 0 - 198.51.100.7 443"


# ---- The page ------------------------------------------------------------------------


def test_the_page_tells_each_option_and_its_default():
    page = (Path(__file__).parent.parent / "docs" / "proxies.md").read_text()
    for name, option in OPTIONS.items():
        if option.group is Group.PROXIES:
            assert f"| `{name}` | `{option.show(DEFAULTS[name])}` |" in page


# ---- HAProxy -------------------------------------------------------------------------

SETTINGS = """
global
    maxconn 50
defaults
    mode {mode}
    timeout connect 10s
    timeout client 10s
    timeout server 10s
listen all
    bind fd@{fd}
    {more}
    server one {host}:{port} {send}
"""


@contextmanager
def haproxy(live: Live, directory: Path, **settings: str) -> Iterator[tuple[str, int]]:
    """A HAProxy in front of a server; gives its address."""
    path = directory / "haproxy.cfg"
    host, port = live.address
    with socket.create_server(("127.0.0.1", 0)) as listener:
        values = {"fd": listener.fileno(), "host": host, "port": port, **settings}
        path.write_text(SETTINGS.format(**{"more": "", **values}))
        process = subprocess.Popen(
            [str(HAPROXY), "-db", "-f", str(path)],
            pass_fds=[listener.fileno()],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        try:
            yield listener.getsockname()
        finally:
            process.kill()
            process.wait(SOON)


@pytest.mark.skipif(HAPROXY is None, reason="haproxy is not installed")
@pytest.mark.parametrize("mode", ["tcp", "http"])
@pytest.mark.parametrize("send", ["send-proxy", "send-proxy-v2"])
def test_haproxy_brings_its_clients(serve, tmp_path, mode, send):
    live = serve(ends, proxy_protocol="auto")
    with haproxy(live, tmp_path, mode=mode, send=send) as address:
        for _ in range(3):
            with Client(address) as client:
                host, port = client.socket.getsockname()
                told = "{} {} - {} {}".format(host, port, *address)
                assert [client.ask().body.decode() for _ in range(2)] == [told] * 2


@pytest.mark.skipif(HAPROXY is None, reason="haproxy is not installed")
def test_haproxy_writes_fields_that_are_believed(serve, tmp_path):
    def handler(request: Request) -> str:
        return f"{request.client[0]} {request.scheme} {request.host}"

    more = "option forwardfor\n    http-request set-header X-Forwarded-Proto https"
    live = serve(handler)
    with haproxy(live, tmp_path, mode="http", send="", more=more) as address:
        with Client(address) as client:
            said = get("/", "X-Forwarded-For: 6.6.6.6", "X-Forwarded-Proto: ftp")
            assert client.ask(said).body == b"6.6.6.6 https a"


# ---- What apps are told --------------------------------------------------------------


def wsgi(environ, start_response):
    start_response("200 OK", [("Content-Type", "text/plain")])
    return [environ["REMOTE_ADDR"].encode()]


async def asgi(scope, receive, send):
    await send({"type": "http.response.start", "status": 200})
    await send({"type": "http.response.body", "body": scope["client"][0].encode()})


@pytest.mark.parametrize("app", [wsgi, asgi])
def test_addresses_of_both_families_are_told_apart_where_their_bytes_are_alike(
    serve, app
):
    live = serve(app, proxy_protocol="v1", lifespan="off")
    told = {}
    for family, host in [
        ("TCP4", "192.0.2.9"),
        ("TCP4", "1.2.3.4"),
        ("TCP6", "102:304::"),
    ]:
        client = live.client()
        client.send(f"PROXY {family} {host} {host} 1 2\r\n".encode() + GET)
        told[host] = client.answer().body.decode()
    assert told == {host: host for host in told}
