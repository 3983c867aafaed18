"""The live server of the HTTP cases: an echo with default limits on a free port.

Its arguments are the interface, and the files of a certificate and its key if it is to
speak TLS. Writes its port on standard output once it accepts. It
lives as long as its standard input is open: whoever started it may die without a trace.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
from collections.abc import Callable
from typing import Any

import prefork


def echo(request: prefork.Request) -> prefork.Response:
    """The request as JSON; its bytes as the characters with the same numbers."""
    seen = {
        "method": request.method,
        "target": request.target,
        "path": request.raw_path,
        "query": request.query_string,
        "version": request.http_version,
        "fields": request.headers.raw,
        "body": request.body,
    }
    return prefork.Response(json.dumps(seen, default=_text))


def application(environ: dict[str, Any], start_response: Any) -> list[bytes]:
    """The same, as far as a WSGI app sees it."""
    start_response("200 OK", [("Content-Type", "application/json")])
    seen = {
        "method": environ["REQUEST_METHOD"],
        "target": environ["RAW_URI"],
        "path": environ["PATH_INFO"],
        "query": environ["QUERY_STRING"],
        "version": environ["SERVER_PROTOCOL"].removeprefix("HTTP/"),
        "environ": {key: environ[key] for key in environ if "." not in key},
        "body": environ["wsgi.input"].read(),
    }
    return [json.dumps(seen, default=_text).encode()]


async def asgi(scope: dict[str, Any], receive: Any, send: Any) -> None:
    """And as far as an ASGI app does."""
    assert scope["type"] == "http"
    body = b""
    while (message := await receive())["type"] == "http.request":
        body += message["body"]
        if not message["more_body"]:
            break
    else:
        return  # the body is broken: the server has answered
    seen = {
        "method": scope["method"],
        "path": scope["raw_path"],
        "query": scope["query_string"],
        "version": scope["http_version"],
        "fields": scope["headers"],
        "body": body,
    }
    await send({"type": "http.response.start", "status": 200})
    text = json.dumps(seen, default=_text).encode()
    await send({"type": "http.response.body", "body": text})


APPS: dict[str, Callable[..., Any]] = {
    "native": echo,
    "wsgi": application,
    "asgi": asgi,
}


def _text(data: bytes) -> str:
    return bytes(data).decode("latin-1")


def report(server: prefork.Server) -> None:
    print(server.address[1], flush=True)


def follow_parent() -> None:
    sys.stdin.buffer.read()
    os.kill(os.getpid(), signal.SIGTERM)


if __name__ == "__main__":
    threading.Thread(target=follow_parent, daemon=True).start()
    interface, *files = sys.argv[1:]
    options = dict(zip(("certfile", "keyfile"), files, strict=False))
    server = prefork.Server(APPS[interface], **options)
    server.listen_and_serve("127.0.0.1:0", on_ready=report)
