"""A browser's GET through parser and bridge, beside httptools and h11.

Every reader ends with the same knowledge: method, target and all header fields as pairs
of bytes. Each handles a batch of 256 requests. Ours also takes them from sockets and
answers them, since a connection lends its next request when the last one is answered.
"""

from __future__ import annotations

import h11
import httptools
import pytest
from wire import BATCH, BROWSER, TIMEOUT_MS

pytestmark = pytest.mark.benchmark(group="256 times a browser's GET", disable_gc=True)


def unused(request):
    raise AssertionError("the requests are taken from the loop itself")


def test_prefork_with_every_field_read(wire, time_batches):
    line = wire(unused)
    seen = []

    def take():
        left = BATCH
        wait = line.loop.wait
        while left:
            for _, request, _ in wait(TIMEOUT_MS / 1000):
                seen[:] = request.method, request.target, request.headers.raw
                request.respond(200, (), b"")
                left -= 1

    time_batches(take, lambda: line.load(BROWSER), BATCH)
    assert seen == [*expected()]


def test_prefork_with_no_field_read(wire, time_batches):
    line = wire(unused)

    def take():
        left = BATCH
        wait = line.loop.wait
        while left:
            for _, request, _ in wait(TIMEOUT_MS / 1000):
                request.respond(200, (), b"")
                left -= 1

    time_batches(take, lambda: line.load(BROWSER), BATCH)


class Collector:
    """What httptools calls back."""

    def __init__(self):
        self.headers = []

    def on_url(self, url):
        self.target = url

    def on_header(self, name, value):
        self.headers.append((name, value))


def test_httptools(time_batches):
    seen = []

    def take():
        for _ in range(BATCH):
            collector = Collector()
            parser = httptools.HttpRequestParser(collector)
            parser.feed_data(BROWSER)
            seen[:] = parser.get_method(), collector.target, collector.headers

    time_batches(take, lambda: None, BATCH)
    assert seen == [b"GET", *expected()[1:]]


def test_h11(time_batches):
    seen = []

    def take():
        for _ in range(BATCH):
            connection = h11.Connection(h11.SERVER)
            connection.receive_data(BROWSER)
            event = connection.next_event()
            seen[:] = event.method, event.target, event.headers.raw_items()

    time_batches(take, lambda: None, BATCH)
    assert seen == [b"GET", *expected()[1:]]


def expected():
    """Method, target and fields of BROWSER, taken apart by hand."""
    first, *lines = BROWSER.removesuffix(b"\r\n\r\n").split(b"\r\n")
    method, target, _ = first.split(b" ")
    fields = [line.split(b": ", 1) for line in lines]
    return method.decode(), target, [(name, value) for name, value in fields]
