"""Apps of many kinds of requests, and what objects their process has."""

import asyncio
import gc
import json
import sys
import tempfile
import time
from collections import Counter

PLAIN = [("Content-Type", "text/plain")]
FILE = tempfile.TemporaryFile()
FILE.write(bytes(100_000))


def objects():
    """Allocated blocks, and the collector's objects by type."""
    gc.collect()
    kinds = Counter(type(one).__qualname__ for one in gc.get_objects())
    return json.dumps([sys.getallocatedblocks(), kinds]).encode()


class Closing:
    """Parts whose close() raises."""

    def __iter__(self):
        return iter([b"a", b"b"])

    def close(self):
        raise LookupError("close")


def plain(environ, start_response):
    start_response("200 OK", [*PLAIN, ("Content-Length", "5")])
    return [b"hello"]


def echo(environ, start_response):
    start_response("200 OK", [*PLAIN])
    return [environ["wsgi.input"].read()]


def unread(environ, start_response):
    start_response("200 OK", [*PLAIN])
    return [b"unread"]


def stream(environ, start_response):
    start_response("200 OK", [*PLAIN])
    return (b"part %d\n" % n for n in range(5))


def write(environ, start_response):
    write = start_response("200 OK", [*PLAIN])
    write(b"written")
    return [b"returned"]


def file(environ, start_response):
    start_response("200 OK", [*PLAIN])
    FILE.seek(0)
    return environ["wsgi.file_wrapper"](FILE)


def raises(environ, start_response):
    raise LookupError("call")


def raises_late(environ, start_response):
    start_response("200 OK", [*PLAIN])
    yield b"first"
    raise LookupError("part")


def replaces(environ, start_response):
    start_response("200 OK", [*PLAIN])
    try:
        raise LookupError("replaced")
    except LookupError:
        start_response("500 Oh", [*PLAIN], sys.exc_info())
    return [b"replaced"]


def forged(environ, start_response):
    start_response("200 OK", [("X", "a\nb")])
    return [b"never"]


def closing(environ, start_response):
    start_response("200 OK", [*PLAIN])
    return Closing()


def hints(environ, start_response):
    environ["wsgi.early_hints"]([("Link", "</a>; rel=preload")])
    start_response("200 OK", [*PLAIN])
    return [b"hinted"]


def slow(environ, start_response):
    time.sleep(0.005)
    start_response("200 OK", [*PLAIN])
    return [b"slow"]


def endless(environ, start_response):
    start_response("200 OK", [*PLAIN])
    while True:
        yield bytes(16384)


def count(environ, start_response):
    body = objects()
    start_response("200 OK", [*PLAIN])
    return [body]


PATHS = {
    f"/{app.__name__}": app
    for app in (
        *(plain, echo, unread, stream, write, file, raises, raises_late, replaces),
        *(forged, closing, hints, slow, endless, count),
    )
}


def wsgi(environ, start_response):
    return PATHS.get(environ["PATH_INFO"], plain)(environ, start_response)


async def websocket(scope, receive, send):
    await receive()
    if scope["path"] == "/denied":
        await send({"type": "websocket.close"})
        return
    await send({"type": "websocket.accept"})
    while scope["path"] == "/flood":
        await send({"type": "websocket.send", "bytes": bytes(16384)})
    while (message := await receive())["type"] == "websocket.receive":
        await send({"type": "websocket.send", "text": message["text"]})


async def asgi(scope, receive, send):
    if scope["type"] == "lifespan":
        return
    if scope["type"] == "websocket":
        await websocket(scope, receive, send)
        return
    path, body, more = scope["path"], b"", True
    if path == "/count":
        body = objects()
    elif path == "/slow":
        await asyncio.sleep(0.005)
    elif path == "/waits":
        while (await receive())["type"] != "http.disconnect":
            pass
    elif path in ("/echo", "/upload"):
        while more:
            message = await receive()
            if message["type"] == "http.disconnect":
                raise ConnectionResetError("the upload")
            body += message["body"]
            more = message["more_body"]
    await send({"type": "http.response.start", "status": 200})
    while path == "/endless":
        await send({"type": "http.response.body", "body": bytes(16384), "more_body": 1})
    await send({"type": "http.response.body", "body": body})
