"""A differential fuzzer: the core against llhttp (httptools) and h11.

    python tests/fuzz/differential.py --seconds 60 [--seed N]

Each stream of streams.py is what a peer sends on one connection before it ends its
side. The core must not answer 2xx to a request that both others refuse, and must see
every request as they do: its method, its target, its body, and where the next begins.
That it refuses more than they do is its design, and not looked at.

The core is driven through its loop, on a unix socket. What it disagrees about is
minimised, printed in the notation of tests/http, and saved in build/fuzz/crashes.
"""

from __future__ import annotations

import argparse
import hashlib
import re
import socket
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from enum import Enum
from functools import partial
from itertools import chain, takewhile
from pathlib import Path
from typing import NamedTuple

import h11
import httptools

from prefork import _core

sys.path.insert(0, str(Path(__file__).parents[1]))

from http_cases import encode, read_all
from streams import Streams

CRASHES = Path(__file__).parents[2] / "build" / "fuzz" / "crashes"
DEADLINE = 10.0
KEEP_OR_CLOSE = {b"keep-alive", b"close"}
LARGEST = 4096
"""Bytes of an example: longer ones are about limits, which are ours alone."""
MOST = 10
"""Disagreements after which a run ends: more will hardly be other bugs."""


class End(Enum):
    """What a parser saw behind the requests."""

    WHOLE = "the end of the stream"
    CLOSED = "a close that the last one asked for"
    REFUSED = "something malformed or incomplete"
    SILENT = "something that this parser cannot judge"


class Request(NamedTuple):
    method: bytes
    target: bytes
    body: bytes


class Verdict(NamedTuple):
    """What one parser makes of a stream."""

    requests: list[Request]
    end: End

    def judges(self, count: int) -> bool:
        """Whether it says something about this many requests."""
        return len(self.requests) >= count or self.end is not End.SILENT


# ---- The others ----------------------------------------------------------------------


class LLHTTP:
    """The callbacks of one httptools parser."""

    def __init__(self) -> None:
        self.requests: list[Request] = []
        self.parser = httptools.HttpRequestParser(self)
        self.begun = self.closed = False

    def on_message_begin(self) -> None:
        self.begun = True
        self.target = self.body = b""

    def on_url(self, part: bytes) -> None:
        self.target += part

    def on_body(self, part: bytes) -> None:
        self.body += part

    def on_message_complete(self) -> None:
        if self.parser.should_upgrade():
            return
        method = self.parser.get_method()
        self.requests.append(Request(method, self.target, self.body))
        self.begun = False
        self.closed = not self.parser.should_keep_alive()

    def read(self, data: bytes) -> End:
        try:
            self.parser.feed_data(data)
        except httptools.HttpParserUpgrade:
            # It takes every Upgrade for granted; we may ignore it (RFC 9110 7.8).
            return End.SILENT
        except httptools.HttpParserInvalidMethodError:
            # It knows a list of methods; any token may be one (RFC 9110 9.1).
            return End.SILENT
        except httptools.HttpParserError:
            return End.CLOSED if self.closed else End.REFUSED
        if self.begun:
            return End.REFUSED
        return End.CLOSED if self.closed else End.WHOLE


def ask_llhttp(data: bytes) -> Verdict:
    llhttp = LLHTTP()
    end = llhttp.read(data)
    return Verdict(llhttp.requests, end)


def ask_h11(data: bytes) -> Verdict:
    """h11 answers before it reads on; a new connection for each request spares that."""
    requests: list[Request] = []
    while data := without_empty_lines(data):
        connection = h11.Connection(h11.SERVER, max_incomplete_event_size=1 << 20)
        connection.receive_data(data)
        connection.receive_data(b"")
        try:
            head = read_head(connection)
            requests.append(Request(head.method, head.target, read_body(connection)))
        except h11.RemoteProtocolError:
            return Verdict(requests, End.REFUSED)
        if connection.their_state is h11.MUST_CLOSE and not is_kept_1_0(head):
            return Verdict(requests, End.CLOSED)
        data, _ = connection.trailing_data
    return Verdict(requests, End.WHOLE)


def without_empty_lines(data: bytes) -> bytes:
    """h11 refuses all, at least one should be ignored (RFC 9112 2.2); we ignore two."""
    for _ in range(2):
        data = data.removeprefix(b"\r\n")
    return data


def is_kept_1_0(head: h11.Request) -> bool:
    """h11 closes behind any HTTP/1.0 request, we do not if asked so (RFC 9112 9.3)."""
    fields = b",".join(v for name, v in head.headers if name == b"connection")
    options = {option.strip() for option in fields.lower().split(b",")}
    return head.http_version == b"1.0" and options & KEEP_OR_CLOSE == {b"keep-alive"}


def read_head(connection: h11.Connection) -> h11.Request:
    event = connection.next_event()
    if isinstance(event, h11.Request):
        return event
    raise h11.RemoteProtocolError("the head is not whole")


def read_body(connection: h11.Connection) -> bytes:
    body = b""
    while isinstance(event := connection.next_event(), h11.Data):
        body += event.data
    if isinstance(event, h11.EndOfMessage):
        return body
    raise h11.RemoteProtocolError("the body is not whole")


# ---- Ours ----------------------------------------------------------------------------

ANSWER = re.compile(rb"HTTP/1\.1 (\d\d\d) (.*?)\r\n\r\n", re.DOTALL)


class CoreError(Exception):
    """The core did not answer as it must, whatever it was sent."""


class Core:
    """A loop that answers every request with 204 and notes what it was."""

    def __init__(self) -> None:
        self.directory = tempfile.TemporaryDirectory()
        self.path = str(Path(self.directory.name, "socket"))
        self.listener = socket.socket(socket.AF_UNIX)
        self.listener.bind(self.path)
        self.listener.listen()
        self.loop = _core.Loop(read_buffer_size=256)  # so longer ones take some reads
        self.loop.listen(self.listener.fileno())
        self.requests: list[Request] = []

    def __enter__(self) -> Core:
        return self

    def __exit__(self, *_: object) -> None:
        self.loop.shut()
        self.listener.close()
        self.directory.cleanup()

    def ask(self, data: bytes) -> Verdict:
        self.requests = []
        with socket.socket(socket.AF_UNIX) as peer:
            peer.connect(self.path)
            peer.sendall(data)
            peer.shutdown(socket.SHUT_WR)
            peer.setblocking(False)
            answers = b"".join(self.answers(peer))
        return Verdict(self.requests, read_end(answers, len(self.requests)))

    def answers(self, peer: socket.socket) -> Iterator[bytes]:
        """Turn the loop until it has closed the connection."""
        deadline = time.monotonic() + DEADLINE
        while time.monotonic() < deadline:
            for flags, request, code in self.loop.wait(0):
                assert request is not None
                self.serve(flags, request, code)
            try:
                while part := peer.recv(65536):
                    yield part
                return
            except BlockingIOError:
                continue
        raise CoreError("the connection stays open")

    def serve(self, flags: int, request: _core.Request, code: int) -> None:
        if flags & _core.CLOSED:
            request.refuse(code)
        elif not request.body_done:
            request.want_body(True)  # the peer said Expect: 100-continue
        else:
            method = request.method.encode("latin-1")
            self.requests.append(Request(method, request.target, request.take_body()))
            request.respond(204, [], b"")


def read_end(answers: bytes, accepted: int) -> End:
    """Read the answers: a 204 to each request, then at most one refusal."""
    found = [m for m in ANSWER.finditer(answers) if m[1] != b"100"]
    statuses = [int(m[1]) for m in found]
    refused = len(statuses) > accepted and statuses[-1] >= 400
    if statuses[: len(statuses) - refused] != [204] * accepted:
        raise CoreError("the answers are not those to the requests")
    if refused:
        return End.REFUSED
    closed = bool(found) and b"\r\nConnection: close" in found[-1][2]
    return End.CLOSED if closed else End.WHOLE


# ---- The comparison ------------------------------------------------------------------


def disagreement(ours: Verdict, others: dict[str, Verdict]) -> str | None:
    """What is wrong with our verdict; None if nothing is."""
    count = len(ours.requests)
    judges = [v for v in others.values() if v.judges(count)]
    if count and judges and all(len(v.requests) < count for v in judges):
        return f"request {count} is one to nobody else"
    for name, verdict in others.items():
        if verdict.requests[:count] != ours.requests[: len(verdict.requests)]:
            return f"{name} sees other requests"
    if ours.end is End.WHOLE and all(len(v.requests) > count for v in others.values()):
        return f"request {count + 1} is overlooked"
    return None


def compare(core: Core, data: bytes, tally: Counter[str]) -> str | None:
    """Have all three read one stream; what is wrong with our reading, if anything."""
    try:
        ours = core.ask(data)
    except CoreError as error:
        return str(error)
    if ours.end is End.REFUSED:
        tally["cut short" if ours.requests else "refused"] += 1
        if not ours.requests:
            return None  # whatever the others say
    else:
        tally["accepted"] += 1
    return disagreement(ours, {"llhttp": ask_llhttp(data), "h11": ask_h11(data)})


class Finding(NamedTuple):
    """A stream that is judged wrongly, and how."""

    stream: bytes
    error: str


def findings(
    core: Core, streams: Iterable[bytes], tally: Counter[str]
) -> Iterator[Finding]:
    """Every stream that is judged wrongly, without what is not needed for that."""
    for stream in streams:
        if found := compare(core, stream, tally):
            yield Finding(minimised(stream, partial(is_wrong, core, found)), found)


def is_wrong(core: Core, error: str, stream: bytes) -> bool:
    return compare(core, stream, Counter()) == error


def minimised(stream: bytes, differs: Callable[[bytes], bool]) -> bytes:
    """Leave out what is not needed to differ: halves, quarters, ... single bytes."""
    size = len(stream) // 2
    while size:
        at = 0
        while at < len(stream):
            shorter = stream[:at] + stream[at + size :]
            if differs(shorter):
                stream = shorter
            else:
                at += size
        size //= 2
    return stream


# ---- The command ---------------------------------------------------------------------


def examples() -> list[bytes]:
    """What the HTTP cases send, but for those about limits."""
    return [case.sent for case in read_all() if len(case.sent) <= LARGEST]


def until(deadline: float, streams: Iterable[bytes]) -> Iterator[bytes]:
    return takewhile(lambda _: time.monotonic() < deadline, streams)


def report(core: Core, finding: Finding) -> None:
    """Print it and save it."""
    stream = finding.stream
    path = CRASHES / f"differential-{hashlib.sha1(stream).hexdigest()}"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(stream)
    print(f"{finding.error}: {path}\n\n{encode(stream)}\n")
    for name, ask in (("llhttp", ask_llhttp), ("h11", ask_h11), ("ours", core.ask)):
        try:
            verdict = ask(stream)
        except CoreError as error:
            print(f"{name}: {error}")
            continue
        print(f"{name}: {len(verdict.requests)} requests, then {verdict.end.value}")
        for request in verdict.requests:
            print(f"    {request}")


def fuzz(seconds: float, seed: int) -> int:
    """The number of disagreements, at most MOST."""
    tally: Counter[str] = Counter()
    known = examples()
    begun = time.monotonic()
    streams = until(begun + seconds, chain(known, Streams(seed, known)))
    found: set[bytes] = set()
    with Core() as core:
        for finding in findings(core, streams, tally):
            if finding.stream not in found:
                report(core, finding)
            found.add(finding.stream)
            if len(found) == MOST:
                break
    count, passed = tally.total(), time.monotonic() - begun
    shares = ", ".join(f"{n / count:.0%} {what}" for what, n in tally.most_common())
    print(f"seed {seed}: {count} streams, {count / passed:.0f} a second: {shares};")
    print(f"{len(found)} disagreements")
    return len(found)


def main() -> int:
    parser = argparse.ArgumentParser(description="Compare our parser with others.")
    parser.add_argument("--seconds", type=float, default=60.0, help="default: 60")
    parser.add_argument("--seed", type=int, default=time.time_ns() % 10**9)
    options = parser.parse_args()
    return 1 if fuzz(options.seconds, options.seed) else 0


if __name__ == "__main__":
    sys.exit(main())
