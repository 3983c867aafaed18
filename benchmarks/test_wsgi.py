"""A WSGI call, all in: request parsed, environ made, app called, answer written.

Beside it stands what the app costs, called with an environ that is there already.
"""

from __future__ import annotations

import pytest
from wire import BATCH, BROWSER, WRK

from prefork.wsgi import WsgiDesk

pytestmark = pytest.mark.benchmark(group="256 WSGI calls", disable_gc=True)

HELLO = b"Hello, World!"
FIELDS = [("Content-Type", "text/plain"), ("Content-Length", "13")]


def app(environ, start_response):
    start_response("200 OK", [*FIELDS])
    return [HELLO]


def reader(environ, start_response):
    body = environ["wsgi.input"].read()
    start_response("200 OK", [*FIELDS])
    return [body or HELLO]


@pytest.mark.parametrize("app", [app, reader])
@pytest.mark.parametrize("request_", [WRK, BROWSER], ids=["wrk", "browser"])
def test_prefork(wire, time_batches, app, request_):
    line = wire(app, WsgiDesk)
    time_batches(line.serve, lambda: line.load(request_), BATCH)
    assert line.receive().endswith(b"\r\n\r\n" + HELLO)


def test_bare_call(time_batches):
    def start_response(status, headers):
        pass

    def call():
        for _ in range(BATCH):
            app({}, start_response)

    time_batches(call, lambda: None, BATCH)
