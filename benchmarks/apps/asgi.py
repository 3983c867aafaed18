"""The same answers as hello.py, for ASGI servers."""

BIG = b"x" * (1 << 20)


def _start(length):
    return {
        "type": "http.response.start",
        "status": 200,
        "headers": [
            (b"content-type", b"text/plain; charset=utf-8"),
            (b"content-length", length),
        ],
    }


async def _answer(scope, send, length, body):
    if scope["type"] == "http":
        await send(_start(length))
        await send({"type": "http.response.body", "body": body})


async def app(scope, receive, send):
    await _answer(scope, send, b"13", b"Hello, World!")


async def big(scope, receive, send):
    await _answer(scope, send, b"1048576", BIG)


async def echo(scope, receive, send):
    """WebSocket messages come back."""
    await receive()
    await send({"type": "websocket.accept"})
    while (event := await receive())["type"] == "websocket.receive":
        if (text := event.get("text")) is not None:
            await send({"type": "websocket.send", "text": text})
        else:
            await send({"type": "websocket.send", "bytes": event["bytes"]})
