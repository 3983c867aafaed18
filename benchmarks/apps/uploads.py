"""Apps that answer an upload by its SHA-256, read in pieces, and tell what memory."""

import hashlib
import json

PIECE = 1 << 16


def memory():
    """Bytes of resident memory: now, and at most so far."""
    found = {}
    with open("/proc/self/status") as status:
        for line in status:
            name, _, value = line.partition(":")
            if name in ("VmRSS", "VmHWM"):
                found[name] = int(value.split()[0]) * 1024
    return json.dumps([found["VmRSS"], found["VmHWM"]]).encode()


def wsgi(environ, start_response):
    start_response("200 OK", [("Content-Type", "text/plain")])
    if environ["PATH_INFO"] == "/memory":
        return [memory()]
    digest = hashlib.sha256()
    while piece := environ["wsgi.input"].read(PIECE):
        digest.update(piece)
    return [digest.hexdigest().encode()]


def native(request):
    if request.path == "/memory":
        return memory()
    digest = hashlib.sha256()
    for piece in request.stream():
        digest.update(piece)
    return digest.hexdigest()


async def asgi(scope, receive, send):
    if scope["type"] != "http":
        return
    if scope["path"] == "/memory":
        body = memory()
    else:
        digest, more = hashlib.sha256(), True
        while more:
            message = await receive()
            if message["type"] == "http.disconnect":
                return
            digest.update(message["body"])
            more = message["more_body"]
        body = digest.hexdigest().encode()
    await send({"type": "http.response.start", "status": 200})
    await send({"type": "http.response.body", "body": body})
