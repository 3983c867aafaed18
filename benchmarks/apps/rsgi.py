"""The same answers as hello.py, for granian's RSGI."""

BIG = b"x" * (1 << 20)
HEADERS = [("content-type", "text/plain; charset=utf-8")]
MESSAGE_CLOSE, MESSAGE_BYTES, MESSAGE_TEXT = range(3)


async def app(scope, protocol):
    protocol.response_bytes(200, HEADERS, b"Hello, World!")


async def big(scope, protocol):
    protocol.response_bytes(200, HEADERS, BIG)


async def echo(scope, protocol):
    """WebSocket messages come back."""
    transport = await protocol.accept()
    while (message := await transport.receive()).kind != MESSAGE_CLOSE:
        if message.kind == MESSAGE_TEXT:
            await transport.send_str(message.data)
        else:
            await transport.send_bytes(message.data)
