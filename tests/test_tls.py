"""TLS of the core, over real sockets: what is agreed on, refused, cut, and told.

Python's ssl judges most of it, as a client that says record by record and segment by
segment what it wants; OpenSSL's s_client, curl, httpx and websockets say the rest. The
HTTP cases over TLS are in test_http_cases.py, workers and masters in
test_tls_prefork.py.
"""

from __future__ import annotations

import asyncio
import datetime
import hashlib
import os
import shutil
import ssl
import subprocess
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
import trustme
from authority import Authority, Issued
from cryptography import x509
from live import GET, SOON, Held, Live, chunk, get, post
from programs import SANITIZED, Program, without_sanitizers
from secure import SecureClient, dial, only
from websockets.asyncio.client import connect

from prefork import Request

OPENSSL, CURL = shutil.which("openssl"), shutil.which("curl")
LOOPS = ["asyncio", *(["uvloop"] if find_spec("uvloop") else [])]
BOTH = pytest.mark.parametrize("version", ["1.2", "1.3"])
WITH_OPENSSL = pytest.mark.skipif(OPENSSL is None, reason="openssl is not installed")
LARGE = 20 << 20

Secured = Callable[..., Live]


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(tmp_path_factory.mktemp("authority"))


@pytest.fixture(scope="module")
def issued(authority: Authority) -> Issued:
    return authority.issue()


@pytest.fixture(scope="module")
def customer(authority: Authority) -> Issued:
    """The certificate of a client."""
    return authority.issue("alice@example.org", file="alice", common_name="Alice")


@pytest.fixture
def secured(serve: Callable[..., Live], issued: Issued) -> Secured:
    """secured(app, **options): a Live that speaks TLS."""

    def start(app: Any, *args: Any, **options: Any) -> Live:
        return serve(app, *args, **{**issued.options, **options})

    return start


@pytest.fixture(params=["tls", "ktls"])
def either(secured: Secured, request: pytest.FixtureRequest) -> Secured:
    """The same, and where OpenSSL has the socket, and the kernel encrypts if it can."""
    kernel = request.param == "ktls"

    def start(app: Any, **options: Any) -> Live:
        return secured(app, tls_ktls=kernel, **options)

    return start


@pytest.fixture
def trusting(authority: Authority) -> ssl.SSLContext:
    return authority.trusting()


def hello(request: Request) -> bytes:
    return b"hello"


def digest(request: Request) -> str:
    return hashlib.sha256(request.body).hexdigest()


def digest_of(answer: bytes) -> str:
    return hashlib.sha256(answer).hexdigest()


@pytest.fixture(scope="module")
def large() -> bytes:
    """Bytes of which no two stretches are alike."""
    return hashlib.shake_128(b"large").digest(LARGE)


# ---- What is agreed on ---------------------------------------------------------------


@BOTH
def test_both_versions_are_spoken(secured, authority, version):
    live = secured(lambda request: f"{request.tls.version} {request.tls.cipher}")
    client = dial(live, authority.trusting(**only(version)))
    told = client.ask().body.decode().split()
    assert told[0] == f"TLSv{version}" == client.tls.version()
    if version == "1.3":
        assert told[1] == client.tls.cipher()[0]
    else:
        assert told[1].startswith("TLS_ECDHE_ECDSA_WITH_")


@BOTH
def test_requests_follow_each_other_on_one_connection(secured, authority, version):
    client = dial(secured(hello), authority.trusting(**only(version)))
    assert [client.ask().body for _ in range(20)] == [b"hello"] * 20


def test_a_request_knows_what_was_agreed_on(secured, trusting, issued):
    seen = []

    def app(request: Request) -> str:
        seen.append(request.tls)
        return f"{request.scheme}"

    trusting.set_alpn_protocols(["h2", "http/1.1"])
    client = dial(secured(app), trusting)
    assert client.ask().body == b"https"
    (tls,) = seen
    assert (tls.version, tls.version_number) == ("TLSv1.3", 0x0304)
    assert (tls.server_name, tls.alpn, tls.resumed) == ("localhost", "http/1.1", False)
    assert (tls.client, tls.client_chain) == (None, ())
    assert tls.server.der == ssl.PEM_cert_to_DER_cert(issued.cert.read_text())
    assert tls.server.names == ("localhost",)


def test_a_handler_that_has_lost_the_lead_knows_it_too(secured, trusting):
    def app(request: Request) -> str:
        live.run(threading.get_ident)  # another thread runs the loop
        return f"{request.tls.version} {request.tls.server.names}"

    live = secured(app, threads=4)
    client = dial(live, trusting)
    for _ in range(2):
        assert client.ask().body == b"TLSv1.3 ('localhost',)"


def test_a_handler_that_waits_for_its_body_knows_it_too(secured, trusting):
    begun = threading.Event()

    def app(request: Request) -> str:
        begun.set()
        body = request.body
        return f"{request.tls.version} {body!r}"

    client = dial(secured(app, stream_request_body=True), trusting)
    request = post(b"hello")
    client.send(request[:-1])
    assert begun.wait(SOON)
    assert client.ask(request[-1:]).body == b"TLSv1.3 b'hello'"


def test_without_tls_there_is_nothing_to_know(serve):
    live = serve(lambda request: f"{request.tls} {request.scheme}")
    assert live.ask().body == b"None http"


def test_forward_secret_ciphers_are_the_default(secured, authority):
    live = secured(hello)
    for version, cipher in (("1.2", "AES256-SHA"), ("1.2", "ECDHE-ECDSA-AES128-SHA")):
        context = authority.trusting(**only(version))
        context.set_ciphers(cipher)
        with pytest.raises(ssl.SSLError, match="HANDSHAKE_FAILURE"):
            dial(live, context)
    context = authority.trusting(**only("1.2"))
    context.set_ciphers("ECDHE-ECDSA-CHACHA20-POLY1305")
    assert dial(live, context).ask().body == b"hello"


def test_ciphers_may_be_chosen(secured, authority):
    live = secured(hello, ciphers="ECDHE-ECDSA-AES256-GCM-SHA384")
    client = dial(live, authority.trusting(**only("1.2")))
    assert client.tls.cipher()[0] == "ECDHE-ECDSA-AES256-GCM-SHA384"


def test_tls_min_refuses_the_older_version(secured, authority):
    live = secured(hello, tls_min="1.3")
    with pytest.raises(ssl.SSLError, match="PROTOCOL_VERSION"):
        dial(live, authority.trusting(**only("1.2")))
    assert dial(live, authority.trusting()).ask().body == b"hello"


# ALPN (RFC 7301) and SNI (RFC 6066 3).


@pytest.mark.parametrize(
    ("offered", "chosen"),
    [
        ([], None),
        (["http/1.1"], "http/1.1"),
        (["h2", "http/1.1"], "http/1.1"),
        (["http/1.0"], "http/1.0"),
        (["http/1.0", "http/1.1"], "http/1.1"),
    ],
)
def test_alpn_agrees_on_http_1(secured, trusting, offered, chosen):
    live = secured(lambda request: f"{request.tls.alpn}")
    if offered:
        trusting.set_alpn_protocols(offered)
    client = dial(live, trusting)
    assert client.tls.selected_alpn_protocol() == chosen
    assert client.ask().body.decode() == str(chosen)


@BOTH
def test_alpn_without_a_protocol_of_ours_is_refused_by_an_alert(
    secured, authority, version
):
    live = secured(hello, log_all_errors=True)
    context = authority.trusting(**only(version))
    context.set_alpn_protocols(["h2"])
    with pytest.raises(ssl.SSLError, match="no application protocol"):
        dial(live, context)
    live.log.until("TLS handshake failed")


def test_certificates_are_chosen_by_name(serve, authority):
    names = ["localhost", "a.example.org", "*.example.org", "b.test"]
    pairs = [authority.issue(name, file=f"sni{n}") for n, name in enumerate(names)]
    live = serve(
        lambda request: request.tls.server.names[0],
        certfile=[str(pair.cert) for pair in pairs],
        keyfile=[str(pair.key) for pair in pairs],
    )
    found = {
        "a.example.org": "a.example.org",
        "A.EXAMPLE.org": "a.example.org",
        "other.example.org": "*.example.org",
        "b.test": "b.test",
    }
    for asked, expected in found.items():
        client = dial(live, authority.trusting(), name=asked)
        assert client.ask().body.decode() == expected
    unknown = authority.trusting(check_hostname=False)
    for asked in ("x.y.example.org", "example.org", "unknown.test", None):
        client = dial(live, unknown, name=asked)
        assert client.ask().body == b"localhost"


def test_an_unknown_name_is_told_to_the_app_as_it_was_asked_for(secured, authority):
    live = secured(lambda request: f"{request.tls.server_name}")
    for asked in ("unknown.test", None):
        client = dial(live, authority.trusting(check_hostname=False), name=asked)
        assert client.ask().body.decode() == str(asked)


def test_keys_of_two_kinds_stand_beside_each_other(serve, authority):
    rsa = authority.issue("rsa.test", file="rsa", key_type=trustme.KeyType.RSA)
    ec = authority.issue("ec.test", file="ec", key_type=trustme.KeyType.ECDSA)
    live = serve(
        hello,
        certfile=[str(rsa.cert), str(ec.cert)],
        keyfile=[str(rsa.key), str(ec.key)],
    )
    for name, cipher in (("rsa.test", "ECDHE-RSA"), ("ec.test", "ECDHE-ECDSA")):
        client = dial(live, authority.trusting(**only("1.2")), name=name)
        assert client.tls.cipher()[0].startswith(cipher)


def test_the_chain_is_sent(serve, authority):
    """Who trusts only the root is convinced by what stands between."""
    leaf = authority.ca.create_child_ca().create_child_ca().issue_cert("localhost")
    cert, key = (authority.directory / f"chain.{kind}" for kind in ("pem", "key"))
    cert.write_bytes(b"".join(pem.bytes() for pem in leaf.cert_chain_pems))
    key.write_bytes(leaf.private_key_pem.bytes())
    live = serve(hello, certfile=str(cert), keyfile=str(key))
    assert dial(live, authority.trusting()).ask().body == b"hello"


def test_an_encrypted_key_is_opened(serve, authority):
    pair = authority.issue(file="encrypted", password=b"secret")
    live = serve(hello, **pair.options, keyfile_password="secret")
    assert dial(live, authority.trusting()).ask().body == b"hello"


# ---- Certificates of clients ---------------------------------------------------------

ASKED = {"optional": {"cert_reqs": "optional"}, "required": {"cert_reqs": "required"}}


def refused(live: Live, context: ssl.SSLContext) -> str:
    """Why a client is refused: in the handshake, or with TLS 1.3 right behind it."""
    with pytest.raises(ssl.SSLError) as caught:
        dial(live, context).ask()
    return caught.value.reason


@BOTH
@pytest.mark.parametrize("wanted", ASKED)
def test_a_client_is_known_by_its_certificate(
    secured, authority, customer, wanted, version
):
    def app(request: Request) -> str:
        client = request.tls.client
        return f"{client.subject}|{client.serial}|{len(request.tls.client_chain)}"

    live = secured(app, ca_certs=str(authority.cas), cert_reqs=wanted)
    client = dial(live, authority.trusting(customer, **only(version)))
    subject, serial, count = client.ask().body.decode().split("|")
    assert "CN=Alice" in subject
    assert (int(serial, 16), count) == (int(customer.serial, 16), "2")


@BOTH
def test_a_client_without_a_certificate_is_refused_where_one_is_required(
    secured, authority, version
):
    live = secured(hello, ca_certs=str(authority.cas), cert_reqs="required")
    context = authority.trusting(**only(version))
    reason = refused(live, context)
    assert "CERTIFICATE_REQUIRED" in reason or "HANDSHAKE_FAILURE" in reason


@BOTH
def test_a_client_without_a_certificate_is_let_in_where_it_is_optional(
    secured, authority, version
):
    live = secured(
        lambda request: f"{request.tls.client}",
        ca_certs=str(authority.cas),
        cert_reqs="optional",
    )
    client = dial(live, authority.trusting(**only(version)))
    assert client.ask().body == b"None"


@BOTH
@pytest.mark.parametrize("wanted", ASKED)
def test_a_certificate_of_another_authority_is_refused(
    secured, authority, tmp_path, wanted, version
):
    live = secured(hello, ca_certs=str(authority.cas), cert_reqs=wanted)
    stranger = Authority(tmp_path).issue("mallory@example.org")
    context = authority.trusting(stranger, **only(version))
    assert refused(live, context) == "TLSV1_ALERT_UNKNOWN_CA"


def test_an_expired_certificate_of_a_client_is_refused(secured, authority, tmp_path):
    live = secured(hello, ca_certs=str(authority.cas), cert_reqs="optional")
    now = datetime.datetime.now(datetime.timezone.utc)
    day = datetime.timedelta(days=1)
    old = authority.issue(
        *("bob@example.org",), file="old", not_before=now - 2 * day, not_after=now - day
    )
    assert "CERTIFICATE_EXPIRED" in refused(live, authority.trusting(old))


@BOTH
def test_a_resumed_session_still_knows_its_client(
    secured, authority, customer, version
):
    live = secured(
        lambda request: f"{request.tls.resumed} {request.tls.client.subject}",
        ca_certs=str(authority.cas),
        cert_reqs="required",
    )
    context = authority.trusting(customer, **only(version))
    first = dial(live, context)
    told = first.ask().body.decode().split(" ", 1)
    again = dial(live, context, session=first.tls.session)
    assert again.ask().body.decode().split(" ", 1) == ["True", told[1]]


# ---- Sessions ------------------------------------------------------------------------


@BOTH
def test_a_ticket_resumes_a_session(secured, authority, version):
    live = secured(lambda request: f"{request.tls.resumed}")
    context = authority.trusting(**only(version))
    first = dial(live, context)
    assert first.ask().body == b"False"
    for _ in range(3):
        again = dial(live, context, session=first.tls.session)
        assert again.tls.session_reused
        assert again.ask().body == b"True"


def test_a_ticket_of_another_server_is_not_believed(secured, authority):
    context = authority.trusting()
    first = dial(secured(hello), context)
    first.ask()
    again = dial(secured(hello), context, session=first.tls.session)
    assert not again.tls.session_reused
    assert again.ask().body == b"hello"


def test_a_ticket_counts_only_for_who_is_let_in_now(secured, authority):
    """What was begun when nobody was asked for a certificate is not resumed."""
    context = authority.trusting()
    first = dial(secured(hello), context)
    first.ask()
    live = secured(hello, ca_certs=str(authority.cas), cert_reqs="required")
    with pytest.raises(ssl.SSLError):
        dial(live, context, session=first.tls.session).ask()


# ---- Refused -------------------------------------------------------------------------


def test_tls_1_1_is_refused_by_an_alert(either, authority):
    live = either(hello, log_all_errors=True)
    context = authority.trusting()
    context.set_ciphers("DEFAULT:@SECLEVEL=0")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        context.minimum_version = ssl.TLSVersion.TLSv1
        context.maximum_version = ssl.TLSVersion.TLSv1_1
    with pytest.raises(ssl.SSLError, match="PROTOCOL_VERSION"):
        dial(live, context)
    live.log.until("TLS handshake failed")


@pytest.mark.parametrize(
    "said",
    [GET, post(b"x" * 100_000), b"G", b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"],
    ids=["GET", "POST", "one byte", "HTTP/2"],
)
def test_plain_http_is_told_so_in_clear(either, said):
    answer = either(hello).ask(said)
    assert (answer.status, answer.closes) == (400, True)
    assert b"HTTPS" in answer.body


GARBAGE = {
    "ones": b"\xff" * 100,
    "a cut record": b"\x16\x03\x01\xff\xff" + b"\x01" * 20,
    "a record of nothing": b"\x16\x03\x01\x00\x00",
    "an odd handshake": b"\x16\x03\x01\x00\x05\x63\x00\x00\x01\x00",
    "an alert": b"\x15\x03\x01\x00\x02\x02\x28",
    "data before the handshake": b"\x17\x03\x03\x00\x05hello",
    "SSL 2": b"\x80\x2e\x01\x00\x02\x00\x15\x00\x00\x00\x10" + b"\x07" * 40,
    "zeros": bytes(100),
}


@pytest.mark.parametrize("said", GARBAGE.values(), ids=GARBAGE)
def test_garbage_ends_the_connection(either, authority, said):
    live = either(hello)
    client = live.client()
    client.send(said)
    client.half_close()
    try:
        assert b"200" not in client.rest()
    except ConnectionResetError:
        pass
    live.until(lambda stats: stats["connections"] == 0)
    assert dial(live, authority.trusting()).ask().body == b"hello"


@BOTH
def test_garbage_behind_the_handshake_ends_the_connection(either, authority, version):
    live = either(hello)
    client = dial(live, authority.trusting(**only(version)))
    assert client.ask().body == b"hello"
    client.socket.raw.sendall(b"\x17\x03\x03\x00\x40" + b"x" * 64)
    with pytest.raises((ssl.SSLError, ConnectionResetError)):
        client.receive()
    live.until(lambda stats: stats["connections"] == 0)


@BOTH
def test_a_forged_record_is_not_read(either, authority, version):
    """A bit of a request flips on its way; what comes before it is still answered."""
    seen = []

    def app(request: Request) -> bytes:
        seen.append(request.target)
        return b""

    live = either(app)
    client = dial(live, authority.trusting(**only(version)))
    client.ask(get("/good"))
    client.tls.write(get("/forged"))
    record = bytearray(client.socket.out.read())
    record[-20] ^= 1
    client.socket.raw.sendall(record)
    with pytest.raises((ssl.SSLError, ConnectionResetError)):
        client.receive()
    live.until(lambda stats: stats["connections"] == 0)
    assert seen == [b"/good"]


@WITH_OPENSSL
def test_renegotiation_is_refused(either, authority):
    live = either(lambda request: b"hello\n")
    with s_client(live, authority, "-tls1_2", talks=True) as program:
        assert program.stdin and program.stdout
        program.stdin.write(GET)
        program.stdin.flush()
        for line in program.stdout:
            if line.startswith(b"hello"):
                break
        program.stdin.write(b"R\n")
        program.stdin.flush()
        told = program.stdout.read()
    assert b"RENEGOTIATING" in told
    assert b"no renegotiation" in told.lower()


@pytest.mark.parametrize("part", [0, 1, 5, 100])
def test_a_handshake_that_does_not_come_is_not_waited_for(either, authority, part):
    live = either(
        hello, tls_handshake_timeout=0.05, defer_accept=False, log_all_errors=True
    )
    client = live.client()
    client.send(hello_of(authority)[:part])
    try:
        assert client.rest() == b""
    except ConnectionResetError:
        pass
    live.log.until("TLS handshake took too long")
    assert live.stats()["connections"] == 0


def hello_of(authority: Authority) -> bytes:
    """The first record of a client."""
    into, out = ssl.MemoryBIO(), ssl.MemoryBIO()
    tls = authority.trusting().wrap_bio(into, out, server_hostname="localhost")
    with pytest.raises(ssl.SSLWantReadError):
        tls.do_handshake()
    return out.read()


def test_a_handshake_in_drops_is_not_waited_for_either(either, authority):
    """The timeout is that of the whole handshake."""
    live = either(
        hello, tls_handshake_timeout=0.2, defer_accept=False, log_all_errors=True
    )
    client = live.client()
    with pytest.raises(OSError):
        for byte in hello_of(authority) * 100:
            client.send(bytes([byte]))
            client.socket.settimeout(0.01)
            try:
                client.socket.recv(1)
                break
            except TimeoutError:
                continue
        client.send(b"\x16")
        client.send(b"\x16")
    live.log.until("TLS handshake took too long")


def test_a_request_has_its_own_time_behind_the_handshake(either, trusting):
    live = either(hello, header_timeout=0.05, tls_handshake_timeout=SOON)
    client = dial(live, trusting)
    assert client.answer().status == 408
    assert client.is_ended()


# ---- Ends, and cuts ------------------------------------------------------------------


@BOTH
def test_who_has_said_all_is_still_answered(either, authority, version):
    held = Held()

    def app(request: Request) -> bytes:
        held.wait()
        return b"late"

    client = dial(either(app), authority.trusting(**only(version)))
    client.send(GET)
    client.half_close()
    held.let_go()
    assert client.answer().body == b"late"
    assert client.is_ended()


@BOTH
def test_who_shuts_the_socket_behind_a_request_is_still_answered(
    either, authority, version
):
    held = Held()

    def app(request: Request) -> bytes:
        held.wait()
        return b"late"

    live = either(app, threads=2)
    client = dial(live, authority.trusting(**only(version)))
    client.send(GET)
    client.socket.cut()
    assert held.begun.wait(SOON)
    live.run(threading.get_ident)  # the end was seen
    held.let_go()
    assert client.answer().body == b"late"


CUTS = {
    "a head": GET[:-2],
    "a body": post(b"hello")[:-1],
    "a chunk": get("/", "Transfer-Encoding: chunked", method="POST") + b"5\r\nhel",
    "a last chunk": get("/", "Transfer-Encoding: chunked", method="POST")
    + chunk(b"hello"),
}


@pytest.mark.parametrize("end", ["close_notify", "cut"])
@pytest.mark.parametrize("said", CUTS.values(), ids=CUTS)
def test_half_a_request_is_not_served(either, trusting, said, end):
    seen = []
    live = either(lambda request: seen.append(request) or b"")
    client = dial(live, trusting)
    client.send(said)
    if end == "cut":
        client.socket.cut()
    else:
        client.half_close()
    data = client.rest()
    assert b" 200 " not in data
    live.until(lambda stats: stats["connections"] == 0)
    assert seen == []


def test_a_reset_amid_the_handshake_leaves_nothing(either, authority):
    live = either(hello)
    said = hello_of(authority)
    for n in (1, 50, len(said)):
        client = live.client()
        client.send(said[:n])
        if n == len(said):
            assert client.receive()  # its answer
        client.reset()
    live.until(lambda stats: stats["connections"] == 0)


def test_a_reset_amid_a_request_leaves_nothing(either, trusting):
    live = either(hello)
    client = dial(live, trusting)
    client.send(post(b"hello")[:-1])
    live.until(lambda stats: stats["buffers_in_use"] > 0)
    client.reset()
    live.until(lambda stats: stats["connections"] == 0)


ENDS = {
    "the client's wish": get("/", "Connection: close"),
    "HTTP/1.0": b"GET / HTTP/1.0\r\n\r\n",
    "a bad request": b"GET /\r\n\r\n",
    "a target too long": get("/" + "x" * 10_000),
}


@BOTH
@pytest.mark.parametrize("said", ENDS.values(), ids=ENDS)
def test_an_end_is_announced(either, authority, said, version):
    """A client can tell by close_notify that nothing is missing (RFC 8446 6.1)."""
    client = dial(either(hello), authority.trusting(**only(version)))
    client.send(said)
    assert client.rest().startswith(b"HTTP/1.1 ")
    assert client.socket.raw.recv(1) == b""


def test_the_end_of_an_idle_connection_is_announced(either, trusting):
    client = dial(either(hello, idle_timeout=0.05), trusting)
    assert client.ask().body == b"hello"
    assert client.is_ended()


def test_the_end_of_a_connection_that_has_served_enough_is_announced(either, trusting):
    client = dial(either(hello, max_requests_per_conn=2), trusting)
    assert [client.ask().closes for _ in range(2)] == [False, True]
    assert client.is_ended()


def test_the_end_of_all_connections_is_announced(either, trusting):
    live = either(hello)
    clients = [dial(live, trusting) for _ in range(3)]
    assert [client.ask().body for client in clients] == [b"hello"] * 3
    live.server.shutdown()
    assert [client.is_ended() for client in clients] == [True] * 3


def test_an_answer_without_length_ends_with_the_connection(either, trusting):
    client = dial(either(lambda request: iter([b"a", b"b"])), trusting)
    client.send(b"GET / HTTP/1.0\r\n\r\n")
    assert client.rest().endswith(b"\r\n\r\nab")


def broken(request: Request) -> Iterator[bytes]:
    yield b"first"
    raise LookupError("amid the answer")


@BOTH
@pytest.mark.parametrize("said", [GET, b"GET / HTTP/1.0\r\n\r\n"], ids=["1.1", "1.0"])
def test_an_answer_that_breaks_off_is_seen_to_be_cut(either, authority, said, version):
    live = either(broken)
    client = dial(live, authority.trusting(**only(version)))
    client.send(said)
    with pytest.raises((ssl.SSLEOFError, ConnectionResetError)):
        client.rest()
    live.log.until("LookupError: amid the answer")


def test_an_answer_that_is_not_taken_in_time_is_seen_to_be_cut(either, trusting):
    live = either(lambda request: bytes(LARGE), write_timeout=0.1)
    client = dial(live, trusting, receive_buffer=4096)
    client.send(get("/", "Connection: close"))
    live.until(lambda stats: stats["connections"] == 0)
    with pytest.raises((ssl.SSLEOFError, ConnectionResetError)):
        client.rest()


# ---- Large, and in parts -------------------------------------------------------------


@BOTH
def test_a_large_answer_to_a_slow_reader_is_whole(either, authority, large, version):
    live = either(lambda request: large)
    client = dial(live, authority.trusting(**only(version)), receive_buffer=4096)
    client.send(GET)
    live.until(lambda stats: stats["bytes_out"] > 0)
    answer = client.answer()
    assert answer.body == large
    assert client.ask().body == large


def test_a_streamed_answer_to_a_slow_reader_is_whole(either, trusting, large):
    sizes = [1, 16383, 16384, 16385, 100_000, 5, 65536]

    def parts(request: Request) -> Iterator[bytes]:
        at = n = 0
        while at < len(large):
            yield large[at : at + sizes[n % len(sizes)]]
            at, n = at + sizes[n % len(sizes)], n + 1

    client = dial(either(parts), trusting, receive_buffer=4096)
    assert digest_of(client.ask().body) == digest_of(large)


@pytest.fixture(scope="module")
def large_file(tmp_path_factory: pytest.TempPathFactory, large: bytes) -> Path:
    path = tmp_path_factory.mktemp("large") / "file"
    path.write_bytes(large)
    return path


@pytest.mark.parametrize("threads", [1, 4])
def test_wsgi_sends_a_large_file(either, trusting, large, large_file, threads):
    def app(environ: dict[str, Any], start_response: Any) -> Any:
        start_response("200 OK", [("Content-Length", str(len(large)))])
        return environ["wsgi.file_wrapper"](large_file.open("rb"))

    live = either(app, threads=threads)
    client = dial(live, trusting, receive_buffer=4096)
    for _ in range(2):
        assert client.ask().body == large


@pytest.mark.parametrize("loop", LOOPS)
def test_asgi_sends_a_large_file(either, trusting, large, large_file, loop):
    async def app(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200})
        await send({"type": "http.response.pathsend", "path": str(large_file)})

    live = either(app, loop=loop, lifespan="off")
    client = dial(live, trusting, receive_buffer=4096)
    for _ in range(2):
        assert client.ask().body == large


def test_a_file_that_shrinks_is_seen_to_be_cut(either, trusting, tmp_path):
    path = tmp_path / "shrinks"
    path.write_bytes(bytes(LARGE))

    def app(environ: dict[str, Any], start_response: Any) -> Any:
        start_response("200 OK", [("Content-Length", str(LARGE))])
        return environ["wsgi.file_wrapper"](path.open("rb"))

    live = either(app, log_all_errors=True)
    client = dial(live, trusting, receive_buffer=4096)
    client.send(GET)
    client.until(b"\r\n\r\n")
    os.truncate(path, 0)
    with pytest.raises((ssl.SSLEOFError, ConnectionResetError)):
        client.rest()
    live.log.until("file")


@BOTH
def test_a_large_upload_is_whole(either, authority, large, version):
    client = dial(either(digest), authority.trusting(**only(version)))
    for _ in range(2):
        assert client.ask(post(large)).body.decode() == digest_of(large)


def test_a_large_upload_in_chunks_is_whole(either, trusting, large):
    head = get("/", "Transfer-Encoding: chunked", method="POST")
    parts = [large[at : at + 50_000] for at in range(0, len(large), 50_000)]
    client = dial(either(digest), trusting)
    answer = client.ask(head + b"".join(map(chunk, [*parts, b""])))
    assert answer.body.decode() == digest_of(large)


@pytest.mark.parametrize("threads", [1, 4])
def test_wsgi_reads_a_large_upload(either, trusting, large, threads):
    def app(environ: dict[str, Any], start_response: Any) -> Any:
        found = hashlib.sha256()
        while part := environ["wsgi.input"].read(65536):
            found.update(part)
        start_response("200 OK", [])
        return [found.hexdigest().encode()]

    client = dial(either(app, threads=threads), trusting)
    assert client.ask(post(large)).body.decode() == digest_of(large)


@pytest.mark.parametrize("loop", LOOPS)
def test_asgi_reads_and_sends_what_is_large(either, trusting, large, loop):
    async def app(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200})
        more = True
        while more:
            message = await receive()
            more = message["more_body"]
            body = {"type": "http.response.body", "body": message["body"]}
            await send({**body, "more_body": more})

    client = dial(either(app, loop=loop, lifespan="off"), trusting)
    sender = threading.Thread(target=client.socket.raw.sendall, args=[b""])
    sender.start()
    sender.join()
    size = 200_000  # what the sockets hold, so that nobody waits for the other
    assert client.ask(post(large[:size])).body == large[:size]


def test_100_continue_is_sent_before_the_body(either, trusting):
    client = dial(either(digest), trusting)
    request = get("/", "Content-Length: 5", "Expect: 100-continue", method="POST")
    answer = client.ask(request, on_100=b"hello")
    assert [status for status, _ in answer.interim] == [100]
    assert answer.body.decode() == digest_of(b"hello")


# ---- Records and segments ------------------------------------------------------------

SIXTEEN = [get(f"/{number}") for number in range(16)]


def targets(client: SecureClient) -> list[bytes]:
    return [client.answer().body for _ in range(16)]


EACH = [b"/%d" % number for number in range(16)]


@BOTH
def test_sixteen_requests_in_one_record_are_answered_in_order(
    either, authority, version
):
    live = either(lambda request: request.target)
    client = dial(live, authority.trusting(**only(version)))
    client.send(b"".join(SIXTEEN))
    assert targets(client) == EACH


@BOTH
@pytest.mark.parametrize("size", [1, 7, 100])
def test_requests_may_end_anywhere_in_a_record(either, authority, size, version):
    live = either(lambda request: request.target)
    client = dial(live, authority.trusting(**only(version)))
    data = b"".join(SIXTEEN)
    for at in range(0, len(data), size):
        client.tls.write(data[at : at + size])
    client.socket.raw.sendall(client.socket.out.read())  # all records at once
    assert targets(client) == EACH


@BOTH
@pytest.mark.parametrize("step", [1, 2, 5, 1000])
def test_records_may_end_anywhere_in_a_segment(either, authority, step, version):
    """The handshake, too, comes in segments of so many bytes."""
    live = either(lambda request: request.target)
    client = dial(live, authority.trusting(**only(version)), step=step)
    for request in SIXTEEN:
        client.send(request)
    assert targets(client) == EACH


@BOTH
def test_a_request_may_come_with_the_end_of_the_handshake(either, authority, version):
    """In the segment of the client's last words, as OpenSSL's own clients send it."""
    live = either(hello)
    client = live.client()
    into, out = ssl.MemoryBIO(), ssl.MemoryBIO()
    context = authority.trusting(**only(version))
    tls = context.wrap_bio(into, out, server_hostname="localhost")
    while True:
        try:
            tls.do_handshake()
            break
        except ssl.SSLWantReadError:
            client.send(out.read())
            into.write(client.receive())
    tls.write(GET)
    client.send(out.read())
    while True:
        try:
            assert tls.read(65536).startswith(b"HTTP/1.1 200 OK\r\n")
            break
        except ssl.SSLWantReadError:
            into.write(client.receive())


def test_a_head_and_its_body_are_one_record(either, authority):
    """Small answers cost one record: 22 bytes more than in clear (TLS 1.3)."""
    live = either(hello)
    client = dial(live, authority.trusting(**only("1.3")))
    client.ask()
    client.send(GET)
    record = client.socket.raw.recv(65536)
    assert record[:3] == b"\x17\x03\x03"
    assert int.from_bytes(record[3:5], "big") == len(record) - 5
    client.socket.into.write(record)
    assert client.answer().body == b"hello"


# ---- WebSockets ----------------------------------------------------------------------


@pytest.mark.parametrize("loop", LOOPS)
@BOTH
def test_websockets_are_echoed(either, authority, loop, version):
    async def echo(request: Request) -> None:
        assert request.scheme in ("https", "wss")
        websocket = await request.websocket()
        async for message in websocket:
            await websocket.send(message)

    live = either(echo, loop=loop)
    context = authority.trusting(**only(version))
    messages = ("small", b"\x00\xff" * 50, "x" * 500_000, os.urandom(500_000))
    asyncio.run(are_echoed(live, context, messages))


async def are_echoed(
    live: Live, context: ssl.SSLContext, messages: Sequence[str | bytes]
) -> None:
    """In one thread: those of the other client's would share an SSL object, which no
    Python before 3.14 guards."""
    host, port = live.address
    async with connect(
        f"wss://localhost:{port}/", ssl=context, host=host, max_size=None
    ) as client:
        for message in messages:
            await client.send(message)
            assert await asyncio.wait_for(client.recv(), SOON) == message


@pytest.mark.parametrize("loop", LOOPS)
def test_websockets_of_asgi_apps_are_echoed(either, trusting, loop):
    scopes = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        scopes.append(scope)
        assert (await receive())["type"] == "websocket.connect"
        await send({"type": "websocket.accept"})
        while (event := await receive())["type"] == "websocket.receive":
            await send({**event, "type": "websocket.send"})

    live = either(app, loop=loop, lifespan="off")
    asyncio.run(are_echoed(live, trusting, ("small", os.urandom(500_000))))
    assert scopes[0]["scheme"] == "wss"
    assert scopes[0]["extensions"]["tls"]["tls_version"] == 0x0304


# ---- What apps are told --------------------------------------------------------------


@pytest.mark.parametrize("threads", [1, 4])
def test_wsgi_apps_are_told(secured, authority, customer, threads):
    seen: list[dict[str, Any]] = []

    def app(environ: dict[str, Any], start_response: Any) -> list[bytes]:
        seen.append(dict(environ))
        start_response("200 OK", [])
        return [b"hello"]

    live = secured(
        app, threads=threads, ca_certs=str(authority.cas), cert_reqs="optional"
    )
    for client in (None, customer):
        assert dial(live, authority.trusting(client)).ask().body == b"hello"
    stranger, known = seen
    assert (stranger["wsgi.url_scheme"], stranger["HTTPS"]) == ("https", "on")
    assert stranger["SSL_PROTOCOL"] == "TLSv1.3"
    assert stranger["SSL_CIPHER"].startswith("TLS_")
    assert stranger["SSL_TLS_SNI"] == "localhost"
    assert stranger["SSL_CLIENT_VERIFY"] == "NONE"
    assert [name for name in stranger if name.startswith("SSL_CLIENT_")] == [
        "SSL_CLIENT_VERIFY"
    ]
    assert known["SSL_CLIENT_VERIFY"] == "SUCCESS"
    assert "CN=Alice" in known["SSL_CLIENT_S_DN"]
    assert "trustme" in known["SSL_CLIENT_I_DN"]
    assert int(known["SSL_CLIENT_M_SERIAL"], 16) == int(customer.serial, 16)
    decoded = ssl._ssl._test_decode_cert(str(customer.cert))  # type: ignore
    assert known["SSL_CLIENT_V_START"] == decoded["notBefore"]
    assert known["SSL_CLIENT_V_END"] == decoded["notAfter"]
    pem = known["SSL_CLIENT_CERT"]
    assert ssl.PEM_cert_to_DER_cert(pem) == ssl.PEM_cert_to_DER_cert(
        customer.cert.read_text()
    )
    assert all(type(value) is str for name, value in known.items() if name[:3] == "SSL")


def test_a_client_cannot_forge_what_wsgi_apps_are_told(secured, trusting):
    def app(environ: dict[str, Any], start_response: Any) -> list[bytes]:
        start_response("200 OK", [])
        return [environ["SSL_CLIENT_VERIFY"].encode()]

    forged = get("/", "SSL_CLIENT_VERIFY: SUCCESS", "SSL-Client-Verify: SUCCESS")
    assert dial(secured(app), trusting).ask(forged).body == b"NONE"


@pytest.mark.parametrize("loop", LOOPS)
def test_asgi_apps_are_told(secured, authority, issued, customer, loop):
    seen: list[dict[str, Any]] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        seen.append(scope)
        await send({"type": "http.response.start", "status": 200})
        await send({"type": "http.response.body", "body": b"hello"})

    live = secured(
        app,
        loop=loop,
        lifespan="off",
        ca_certs=str(authority.cas),
        cert_reqs="optional",
    )
    for client in (None, customer):
        assert dial(live, authority.trusting(client)).ask().body == b"hello"
    assert [scope["scheme"] for scope in seen] == ["https", "https"]
    stranger, known = (scope["extensions"]["tls"] for scope in seen)
    leaf = x509.load_pem_x509_certificate(issued.cert.read_bytes())
    found = x509.load_pem_x509_certificate(stranger["server_cert"].encode())
    assert found == leaf
    assert stranger["client_cert_chain"] == []
    assert (stranger["client_cert_name"], stranger["client_cert_error"]) == (None, None)
    assert stranger["tls_version"] == 0x0304
    assert stranger["cipher_suite"] in (0x1301, 0x1302, 0x1303)
    chain = [
        x509.load_pem_x509_certificate(pem.encode())
        for pem in known["client_cert_chain"]
    ]
    assert chain[0] == x509.load_pem_x509_certificate(customer.cert.read_bytes())
    assert "CN=Alice" in known["client_cert_name"]


def test_without_tls_asgi_apps_are_told_nothing(serve):
    seen: list[dict[str, Any]] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        seen.append(scope)
        await send({"type": "http.response.start", "status": 200})
        await send({"type": "http.response.body"})

    serve(app, lifespan="off").ask()
    assert seen[0]["scheme"] == "http" and "tls" not in seen[0]["extensions"]


# ---- Other clients -------------------------------------------------------------------


def s_client(
    live: Live, authority: Authority, *options: str, talks: bool = False
) -> subprocess.Popen[bytes]:
    """OpenSSL's own client; unless it talks, its input has ended."""
    assert OPENSSL is not None
    command = [OPENSSL, "s_client", "-connect", "{}:{}".format(*live.address)]
    command += ["-servername", "localhost", "-CAfile", str(authority.cas), *options]
    return subprocess.Popen(
        command,
        stdin=subprocess.PIPE if talks else subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        env=without_sanitizers(),
    )


@WITH_OPENSSL
@pytest.mark.parametrize("version", ["-tls1_2", "-tls1_3"])
def test_s_client_verifies_what_it_is_shown(secured, authority, version):
    with s_client(secured(hello), authority, version) as program:
        told = program.communicate(timeout=SOON)[0]
    assert b"Verify return code: 0 (ok)" in told
    assert b"Secure Renegotiation IS supported" in told or version == "-tls1_3"


@WITH_OPENSSL
@pytest.mark.parametrize("version", ["-tls1_2", "-tls1_3"])
def test_an_ocsp_response_is_stapled_for_who_asks(
    serve, authority, issued, tmp_path, version
):
    path = tmp_path / "response.der"
    path.write_bytes(authority.says_good(issued))
    live = serve(hello, **issued.options, ocsp_file=str(path))
    with s_client(live, authority, version, "-status") as program:
        told = program.communicate(timeout=SOON)[0]
    assert b"OCSP Response Status: successful" in told
    assert b"Cert Status: good" in told
    with s_client(live, authority, version) as program:
        assert b"OCSP" not in program.communicate(timeout=SOON)[0]


@pytest.mark.skipif(CURL is None, reason="curl is not installed")
@pytest.mark.parametrize("version", ["1.2", "1.3"])
def test_curl_is_served(secured, authority, version):
    assert CURL is not None
    live = secured(digest)
    body = os.urandom(3 << 20)
    done = subprocess.run(
        [CURL, "-sS", "--cacert", str(authority.cas), "--data-binary", "@-"]
        + ["--tlsv" + version, "--tls-max", version, "--max-time", str(SOON)]
        + [f"https://localhost:{live.address[1]}/"]
        + ["--resolve", f"localhost:{live.address[1]}:127.0.0.1"],
        input=body,
        capture_output=True,
        env=without_sanitizers(),
    )
    assert (done.stdout.decode(), done.stderr) == (digest_of(body), b"")


@pytest.mark.skipif(CURL is None, reason="curl is not installed")
def test_curl_presents_a_certificate(secured, authority, customer):
    assert CURL is not None
    live = secured(
        lambda request: request.tls.client.subject,
        ca_certs=str(authority.cas),
        cert_reqs="required",
    )
    command = [CURL, "-sS", "--cacert", str(authority.cas), "--max-time", str(SOON)]
    command += ["--cert", str(customer.cert), "--key", str(customer.key)]
    url = f"https://127.0.0.1:{live.address[1]}/"
    done = subprocess.run(
        [*command, url], capture_output=True, env=without_sanitizers()
    )
    assert b"CN=Alice" in done.stdout, done.stderr


def test_httpx_is_served(secured, authority, large):
    live = secured(digest)
    url = f"https://127.0.0.1:{live.address[1]}/"
    with httpx.Client(verify=authority.trusting(), timeout=SOON) as client:
        for body in (b"", b"hello", large[: 1 << 20]):
            assert client.post(url, content=body).text == digest_of(body)
        parts = iter([large[:100], large[100:70_000]])
        assert client.post(url, content=parts).text == digest_of(large[:70_000])


# ---- Proxies -------------------------------------------------------------------------

LINE = b"PROXY TCP4 192.0.2.1 198.51.100.7 56324 443\r\n"
BINARY = bytes.fromhex("0d0a0d0a000d0a515549540a2111000cc0000201c6336407dc0401bb")
HEADERS = pytest.mark.parametrize("header", [LINE, BINARY], ids=["v1", "v2"])


def ends(request: Request) -> str:
    return "{} {} - {} {}".format(*request.client, *request.server)


TOLD = b"192.0.2.1 56324 - 198.51.100.7 443"


@HEADERS
@BOTH
def test_a_proxy_introduces_its_client_in_clear(secured, authority, header, version):
    live = secured(ends, proxy_protocol="auto")
    client = dial(live, authority.trusting(**only(version)), before=header)
    assert [client.ask().body for _ in range(2)] == [TOLD] * 2


@HEADERS
def test_a_proxy_may_introduce_byte_by_byte(secured, trusting, header):
    """Each byte of header, handshake and request in a segment of its own."""
    live = secured(ends, proxy_protocol="auto")
    client = live.client()
    for byte in header:
        client.send(bytes([byte]))
    with SecureClient(live.address, trusting, before=header, step=1) as client:
        assert client.ask().body == TOLD


@HEADERS
def test_header_and_handshake_may_come_in_one_segment(secured, authority, header):
    """What was read behind the header is not lost."""
    live = secured(ends, proxy_protocol="auto")
    client = live.client()
    into, out = ssl.MemoryBIO(), ssl.MemoryBIO()
    tls = authority.trusting().wrap_bio(into, out, server_hostname="localhost")
    before = header
    while True:
        try:
            tls.do_handshake()
            break
        except ssl.SSLWantReadError:
            client.send(before + out.read())
            before = b""
            into.write(client.receive())
    tls.write(GET)
    client.send(out.read())
    data = b""
    while TOLD not in data:
        try:
            data += tls.read(65536)
        except ssl.SSLWantReadError:
            into.write(client.receive())


def test_a_peer_that_is_no_proxy_needs_no_header(secured, trusting):
    options = {"proxy_protocol": "auto", "proxy_allow_from": "192.0.2.0/24"}
    client = dial(secured(ends, **options), trusting)
    assert client.ask().body.startswith(b"127.0.0.1 ")


def test_a_missing_header_is_not_made_up_for_by_a_handshake(secured, trusting):
    live = secured(ends, proxy_protocol="auto")
    with pytest.raises((ssl.SSLError, ConnectionResetError)):
        dial(live, trusting).ask()


# ---- Limits --------------------------------------------------------------------------


def test_one_connection_too_many_is_told_so_over_tls(secured, trusting):
    live = secured(hello, concurrency=2)
    clients = [dial(live, trusting) for _ in range(2)]
    assert [client.ask().status for client in clients] == [200, 200]
    surplus = dial(live, trusting)
    answer = surplus.answer()
    assert (answer.status, answer.closes) == (503, True)
    assert surplus.is_ended()
    surplus.close()
    clients[0].close()
    live.until(lambda stats: stats["connections"] == 1)
    assert dial(live, trusting).ask().status == 200


def test_one_connection_too_many_of_an_address_is_told_so_over_tls(secured, trusting):
    live = secured(hello, max_conns_per_ip=1)
    assert dial(live, trusting).ask().status == 200
    answer = dial(live, trusting).answer()
    assert (answer.status, answer.closes) == (429, True)


IDLE = """
import sys
from prefork import Server

def ready(server):
    print("ready", server.address[1], flush=True)

cert, key = sys.argv[1:]
server = Server(lambda request: b"hello", certfile=cert, keyfile=key)
server.listen_and_serve("127.0.0.1:0", on_ready=ready)
"""


@pytest.mark.skipif(SANITIZED, reason="with a sanitizer it holds ten times as much")
@BOTH
def test_an_idle_connection_holds_little(issued, authority, version, capsys):
    """Room for a record and more would be 34 KiB; it holds none of that."""
    count = 1000
    context = authority.trusting(**only(version))
    with Program(["-c", IDLE, str(issued.cert), str(issued.key)]) as program:
        address = ("127.0.0.1", int(program.until("ready")[0]))
        with SecureClient(address, context) as client:
            client.ask()
        before = psutil.Process(program.pid).memory_full_info().uss
        clients = []
        for _ in range(count):
            client = SecureClient(address, context)
            clients.append(client)
            assert client.ask().body == b"hello"
        after = psutil.Process(program.pid).memory_full_info().uss
        for client in clients:
            client.close()
        program.process.terminate()
        assert program.wait() == 0
    each = (after - before) / count
    with capsys.disabled():
        print(f"\nan idle connection of TLS {version} holds {each / 1024:.1f} KiB")
    assert each < 24 * 1024
