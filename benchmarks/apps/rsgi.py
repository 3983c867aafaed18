"""The same answers as hello.py, for granian's RSGI."""

BIG = b"x" * (1 << 20)
HEADERS = [("content-type", "text/plain; charset=utf-8")]


async def app(scope, protocol):
    protocol.response_bytes(200, HEADERS, b"Hello, World!")


async def big(scope, protocol):
    protocol.response_bytes(200, HEADERS, BIG)
