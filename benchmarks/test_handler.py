"""A handler call, all in: request parsed, handler called, answer written.

Each round is a batch of 256 of wrk's GETs. What a bare call of the same function costs
stands beside it.
"""

from __future__ import annotations

import pytest
from wire import BATCH, WRK

from prefork import Response

pytestmark = pytest.mark.benchmark(group="256 handler calls", disable_gc=True)

HELLO = b"Hello, World!"


def app(request):
    return HELLO


def text(request):
    return "Hello, World!"


def response(request):
    return Response(HELLO)


def reader(request):
    return HELLO if request.path == "/" and request.headers["host"] else b""


def keeper(request):
    keeper.last = request
    return HELLO


@pytest.mark.parametrize("handler", [app, text, response, reader, keeper])
def test_prefork(wire, time_batches, handler):
    line = wire(handler)
    time_batches(line.serve, lambda: line.load(WRK), BATCH)
    assert line.receive().endswith(b"\r\n\r\n" + HELLO)


def test_bare_call(time_batches):
    def call():
        for _ in range(BATCH):
            app(None)

    time_batches(call, lambda: None, BATCH)
