"""A response of four header fields becomes bytes, beside h11's serialisation.

Each round makes 256 of them. Ours are measured with the whole way of a request around
them, h11's alone.
"""

from __future__ import annotations

import h11
import pytest
from wire import BATCH, WRK

from prefork import Response

pytestmark = pytest.mark.benchmark(group="256 responses", disable_gc=True)

BODY = b'{"id": 42}'
FIELDS = [
    ("Content-Type", "application/json"),
    ("Cache-Control", "no-store"),
    ("X-Request-Id", "7f9c2ba4e88f827d616045507605853e"),
    ("Vary", "Accept-Encoding, Cookie"),
]


def test_prefork(wire, time_batches):
    line = wire(lambda request: Response(BODY, headers=FIELDS))
    time_batches(line.serve, lambda: line.load(WRK), BATCH)
    answer = line.receive()
    assert all(f"{name}: {value}\r\n".encode() in answer for name, value in FIELDS)
    assert answer.endswith(b"\r\n\r\n" + BODY)


def test_h11(time_batches):
    fields = [*FIELDS, ("Server", "h11"), ("Content-Length", str(len(BODY)))]
    date = ("Date", "Sun, 06 Nov 1994 08:49:37 GMT")
    sent = []

    def prepare():
        connections = [h11.Connection(h11.SERVER) for _ in range(BATCH)]
        for connection in connections:
            connection.receive_data(WRK)
            connection.next_event()
        return connections

    def send(connections):
        for connection in connections:
            head = h11.Response(status_code=200, headers=[*fields, date])
            sent[:] = (
                connection.send(head),
                connection.send(h11.Data(BODY)),
                connection.send(h11.EndOfMessage()),
            )

    time_batches(send, prepare, BATCH)
    assert b"".join(sent).endswith(b"\r\n\r\n" + BODY)
