"""The HTTP cases against a live server, and the case files against their notation.

Each case is delivered whole, byte by byte, and with a request behind it that must be
answered exactly if the connection is kept; to a native handler, a WSGI and an ASGI app,
in clear and over TLS, where a byte is a record, or a segment. The answers are read by
h11.
"""

from __future__ import annotations

import json
import re
import socket
import ssl
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import unquote_to_bytes

import h11
import pytest
from authority import Authority
from http_cases import (
    DIRECTORY,
    Answer,
    Case,
    CaseError,
    Request,
    decode,
    encode,
    parse_outcome,
    read_all,
    read_file,
)
from secure import Secure

CASES = read_all()
SERVER = [sys.executable, str(Path(__file__).with_name("http_server.py"))]
HEADER = Path(__file__).parents[1] / "csrc" / "prefork.h"

DEADLINE = 10.0
SMALL = 2048
PARTS = 64
CANARY = b"GET /trailing-canary HTTP/1.1\r\nHost: a\r\n\r\n"
CANARY_ANSWER = Answer(200, Request(b"GET", b"/trailing-canary"))


def each(cases: Iterable[Case]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("case", [pytest.param(c, id=c.id) for c in cases])


# ---- The files -----------------------------------------------------------------------


def rows() -> set[str]:
    """The names in the first column of the README's last table."""
    table = (DIRECTORY / "README.md").read_text("ascii").partition("## Rows")[2]
    firsts = (line.split("|")[1] for line in table.splitlines() if line[:3] == "| `")
    return {name for first in firsts for name in re.findall(r"`([^`]+)`", first)}


def test_names_are_unique() -> None:
    names = [case.id for case in CASES]
    assert sorted(set(names)) == sorted(names)


def test_every_row_has_a_case_and_every_case_a_row() -> None:
    assert {case.row for case in CASES} == rows()


def test_every_case_says_why_and_cites_its_source() -> None:
    silent = [
        c.id for c in CASES if not re.search(r"\((RFC|CVE)[- ]\d.*\)", c.sentence)
    ]
    assert silent == []


def test_every_error_is_one_of_the_header_with_its_status() -> None:
    found = re.findall(r"^ +X\((\w+), -\d+, (\d+),", HEADER.read_text("ascii"), re.M)
    known = {(name, int(status)) for name, status in found}
    answers = [a for c in CASES for a in (*c.outcome.answers, *(c.outcome.eof or ()))]
    assert {(a.error, a.status) for a in answers if a.status >= 400} <= known


def test_notation_survives_the_round_trip() -> None:
    inputs = [case.sent for case in CASES] + [bytes(range(256)) * 2, b"x" * 1000, b""]
    assert [decode(encode(data)) for data in inputs] == inputs


def test_notation_repeats_what_stands_in_braces() -> None:
    assert decode(r"a{b\{{c\r*2}*3}\x00") == b"a" + b"b{c\rc\r" * 3 + b"\0"


@pytest.mark.parametrize(
    "text", ["{a", "a}", "{a}", "{a*}", r"\y", "\\", "\t", r"\xg0"]
)
def test_notation_refuses(text: str) -> None:
    with pytest.raises(ValueError):
        decode(text)


@pytest.mark.parametrize(
    "text",
    ["", "200", "200 GET", "400", "400 X", "200 GET / what", "400 close X Y", "hello"]
    + [
        "400 close X\n200 GET /",
        "incomplete\n400 close X",
        "incomplete",
        "200 GET /\nsurplus",
        '400 close body="x"',
    ],
)
def test_outcome_refuses(text: str) -> None:
    with pytest.raises(ValueError):
        parse_outcome(text)


def test_an_error_in_a_file_names_file_and_line(tmp_path: Path) -> None:
    path = tmp_path / "broken.md"
    path.write_text("# T\n\n## A\n\nB.\n\n```http\n{\n```\n\n```outcome\n100\n```\n")
    with pytest.raises(CaseError, match=r"broken\.md:3: A: '{' without '}'"):
        list(read_file(path))


# ---- A peer --------------------------------------------------------------------------


@dataclass
class Reply:
    """One final answer as it was received, and the interim ones before it."""

    interim: list[int] = field(default_factory=list)
    status: int = 0
    headers: list[tuple[bytes, bytes]] = field(default_factory=list)
    body: bytes = b""

    def says(self, option: bytes) -> bool:
        values = [value for name, value in self.headers if name == b"connection"]
        return option in (
            part.strip().lower() for v in values for part in v.split(b",")
        )


class Peer:
    """The client's end of one connection: over TLS, if it has whom to trust.

    A step is how many bytes of TLS a segment holds; 0: a record.
    """

    def __init__(
        self, port: int, trusting: ssl.SSLContext | None = None, step: int = 0
    ) -> None:
        raw = socket.create_connection(("127.0.0.1", port), DEADLINE)
        raw.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.socket: Any = raw
        if trusting is not None:
            self.socket = Secure(raw, trusting, step=step)
        self.unread = b""

    def __enter__(self) -> Peer:
        return self

    def __exit__(self, *_: object) -> None:
        self.socket.close()

    def send(self, data: bytes) -> None:
        self.socket.sendall(data)

    def send_in_steps(self, data: bytes) -> None:
        """Byte by byte; a large input in a few dozen parts."""
        step = 1 if len(data) <= SMALL else len(data) // PARTS
        for at in range(0, len(data), step):
            self.socket.send(data[at : at + step])

    def end(self) -> None:
        """Say that nothing more will be said."""
        self.socket.shutdown(socket.SHUT_WR)

    def read_reply(self, method: bytes, go_on: Callable[[], None]) -> Reply:
        """The next answer, to a request with this method; `go_on` follows a 100."""
        connection = h11.Connection(h11.CLIENT)
        connection.send(h11.Request(method=method, target="/", headers=[("Host", "a")]))
        connection.send(h11.EndOfMessage())
        if self.unread:
            connection.receive_data(self.unread)
        reply = Reply()
        while not isinstance(event := connection.next_event(), h11.EndOfMessage):
            if event is h11.NEED_DATA:
                connection.receive_data(self.socket.recv(65536))
            elif isinstance(event, h11.InformationalResponse):
                reply.interim.append(event.status_code)
                go_on()
            elif isinstance(event, h11.Response):
                reply.status = event.status_code
                reply.headers = list(event.headers)
            elif isinstance(event, h11.Data):
                reply.body += event.data
        self.unread = connection.trailing_data[0]
        return reply

    def assert_closed(self) -> None:
        """Nothing more was sent, and the connection ended without reset or cut."""
        assert self.unread + self.socket.recv(65536) == b""


def no_more() -> None:
    pass


def check_reply(reply: Reply, answer: Answer) -> None:
    assert reply.status == answer.status
    assert reply.says(b"close") == answer.close
    assert reply.says(b"keep-alive") == answer.keep_alive
    if answer.request and answer.request.method == b"HEAD":
        assert reply.body == b""
    elif answer.request:
        check_echo(json.loads(reply.body), answer.request)


def key_of(name: str) -> str:
    """The environ key of a field."""
    key = name.upper().replace("-", "_")
    return key if key in ("CONTENT_TYPE", "CONTENT_LENGTH") else f"HTTP_{key}"


def environ_of(request: Request) -> dict[str, str | None]:
    """What environ must tell of the fields; None: it must not have the key.

    Of names that are the same but for an underscore only one is let in, and a chunked
    body has its length told.
    """
    found: dict[str, str | None] = {}
    for name, values in request.fields.items():
        if "_" in name or name == "transfer-encoding":
            continue
        glue = "; " if name == "cookie" else ","
        text = glue.join(value.decode("latin-1") for value in values)
        found[key_of(name)] = text if values else None
    return found


def check_environ(seen: dict[str, Any], request: Request) -> None:
    if request.path is not None:
        assert seen["path"] == unquote_to_bytes(request.path).decode("latin-1")
    expected = environ_of(request)
    assert {key: seen["environ"].get(key) for key in expected} == expected
    if "HTTP_TRANSFER_ENCODING" in seen["environ"]:  # the body was not here yet
        assert "HTTP_EXPECT" in seen["environ"]
        assert "CONTENT_LENGTH" not in seen["environ"]
    else:
        assert int(seen["environ"].get("CONTENT_LENGTH", "0")) == len(request.body)


def check_echo(seen: dict[str, Any], request: Request) -> None:
    wsgi = "environ" in seen
    for name in ("method", "target", "body", "path", "query", "version"):
        expected: bytes | None = getattr(request, name)
        if expected is not None and name in seen and not (wsgi and name == "path"):
            assert (name, seen[name]) == (name, expected.decode("latin-1"))
    if wsgi:
        check_environ(seen, request)
        return
    for name, values in request.fields.items():
        found = [value for key, value in seen["fields"] if key.lower() == name]
        assert (name, found) == (name, [value.decode("latin-1") for value in values])


def check_answers(
    peer: Peer,
    case: Case,
    answers: Iterable[Answer],
    go_on: Callable[[], None] = no_more,
) -> None:
    """A 100 must come to a peer that waits for it; others may do without."""
    due = False
    for answer in answers:
        if answer.status == 100:
            due = True
            continue
        reply = peer.read_reply(asked_with(case, answer), go_on)
        assert reply.interim in ([100] if due else [], [100] if waits(go_on) else [])
        check_reply(reply, answer)
        due = False


def waits(go_on: Callable[[], None]) -> bool:
    return go_on is not no_more


def asked_with(case: Case, answer: Answer) -> bytes:
    """The method, which says whether an answer has a body."""
    if answer.request:
        return answer.request.method
    return b"HEAD" if case.sent.startswith(b"HEAD ") else b"GET"


def check_conversation(
    peer: Peer, case: Case, go_on: Callable[[], None] = no_more
) -> None:
    """Everything behind the sending: the answers, then the end of the connection."""
    if case.outcome.eof is not None and not waits(go_on):
        peer.end()
    if case.outcome.eof is not None:
        check_answers(peer, case, (*case.outcome.answers, *case.outcome.eof), go_on)
    else:
        check_answers(peer, case, case.outcome.answers, go_on)
        if not case.outcome.closes:
            peer.end()
    peer.assert_closed()


# ---- The server ----------------------------------------------------------------------


PLAIN = ["native", "wsgi", "asgi"]
OVER_TLS = [f"{interface} over TLS" for interface in PLAIN]
Connect = Callable[..., Peer]


@pytest.fixture(scope="module", params=[*PLAIN, *OVER_TLS[:1]])
def connect(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Connect]:
    """connect(): a Peer of a server of this kind."""
    interface, over_tls, _ = request.param.partition(" over TLS")
    arguments, trusting = [interface], None
    if over_tls:
        authority = Authority(tmp_path_factory.mktemp("authority"))
        issued, trusting = authority.issue(), authority.trusting()
        arguments += [str(issued.cert), str(issued.key)]
    with subprocess.Popen(
        [*SERVER, *arguments],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as server:
        assert server.stdin and server.stdout
        line = server.stdout.readline()
        assert line, f"the server ended with status {server.wait()}"
        port = int(line)
        yield lambda **options: Peer(port, trusting, **options)
        assert server.poll() is None, "the server died"
        server.stdin.close()
        assert server.wait(DEADLINE) == 0


@pytest.mark.parametrize("connect", [*PLAIN, *OVER_TLS], indirect=True)
@each(CASES)
def test_whole(connect: Connect, case: Case) -> None:
    with connect() as peer:
        peer.send(case.sent)
        check_conversation(peer, case)


@each(case for case in CASES if not case.outcome.surplus)
def test_byte_by_byte(connect: Connect, case: Case) -> None:
    with connect() as peer:
        peer.send_in_steps(case.sent)
        check_conversation(peer, case)


@pytest.mark.parametrize("connect", OVER_TLS[:1], indirect=True)
@each(case for case in CASES if not case.outcome.surplus)
def test_segment_by_segment(connect: Connect, case: Case) -> None:
    """Of a byte each, from the first one of the handshake on."""
    with connect(step=1 if len(case.sent) <= SMALL else 1000) as peer:
        peer.send_in_steps(case.sent)
        check_conversation(peer, case)


@each(case for case in CASES if case.outcome.eof is None)
def test_with_a_request_behind_it(connect: Connect, case: Case) -> None:
    with connect() as peer:
        peer.send(case.sent + CANARY)
        check_answers(peer, case, case.outcome.answers)
        if not case.outcome.closes:
            check_answers(peer, case, [CANARY_ANSWER])
            peer.end()
        peer.assert_closed()


@each(
    case
    for case in CASES
    if case.outcome.answers and case.outcome.answers[0].status == 100
)
def test_body_sent_after_the_100(connect: Connect, case: Case) -> None:
    head, end, body = case.sent.partition(b"\r\n\r\n")
    with connect() as peer:

        def go_on() -> None:
            peer.send(body)
            if case.outcome.eof is not None:
                peer.end()

        peer.send(head + end)
        check_conversation(peer, case, go_on)
