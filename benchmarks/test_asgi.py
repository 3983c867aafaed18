"""An ASGI call, all in: request parsed, scope made, task started, answer written.

The task runs on an event loop, which turns once a batch only: what is timed is what a
request costs, not what the loop does between batches. Beside it stands what the app
costs, stepped by hand, with a scope that is there already.
"""

from __future__ import annotations

import asyncio
from functools import partial

import pytest
from wire import BATCH, BROWSER, WRK

from prefork.asgi import AsgiDesk

pytestmark = pytest.mark.benchmark(group="256 ASGI calls", disable_gc=True)

HELLO = b"Hello, World!"
FIELDS = [(b"content-type", b"text/plain"), (b"content-length", b"13")]


async def app(scope, receive, send):
    await send({"type": "http.response.start", "status": 200, "headers": [*FIELDS]})
    await send({"type": "http.response.body", "body": HELLO})


async def reader(scope, receive, send):
    message = await receive()
    await send({"type": "http.response.start", "status": 200, "headers": [*FIELDS]})
    await send({"type": "http.response.body", "body": message["body"] or HELLO})


async def streamer(scope, receive, send):
    await send({"type": "http.response.start", "status": 200, "headers": [*FIELDS]})
    await send({"type": "http.response.body", "body": HELLO, "more_body": True})
    await send({"type": "http.response.body"})


@pytest.mark.parametrize("app", [app, reader, streamer])
@pytest.mark.parametrize("request_", [WRK, BROWSER], ids=["wrk", "browser"])
def test_prefork(wire, time_batches, app, request_):
    line = wire(app, AsgiDesk)

    async def main():
        line.desk.dispatcher.attach(asyncio.get_running_loop(), None)
        time_batches(line.serve, partial(line.load, request_), BATCH)

    asyncio.run(main())
    assert line.receive().endswith(b"\r\n\r\n" + HELLO)


def test_bare_call(time_batches):
    class Done:
        def __await__(self):
            return iter(())

    done = Done()

    def send(message):
        return done

    def call():
        for _ in range(BATCH):
            try:
                app({}, None, send).send(None)
            except StopIteration:
                pass

    time_batches(call, lambda: None, BATCH)
