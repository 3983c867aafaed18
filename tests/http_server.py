"""The live server of the HTTP cases: an echo with default limits on a free port.

Writes its port on standard output once it accepts. It lives as long as its standard
input is open: whoever started it may die without a trace.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import threading

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


def _text(data: bytes) -> str:
    return bytes(data).decode("latin-1")


def report(server: prefork.Server) -> None:
    print(server.address[1], flush=True)


def follow_parent() -> None:
    sys.stdin.buffer.read()
    os.kill(os.getpid(), signal.SIGTERM)


if __name__ == "__main__":
    threading.Thread(target=follow_parent, daemon=True).start()
    prefork.Server(echo).listen_and_serve("127.0.0.1:0", on_ready=report)
