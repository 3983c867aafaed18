"""Native handlers: the smallest answer, one of 1 MiB, and a WebSocket's echo."""

BIG = b"x" * (1 << 20)


def app(request):
    return b"Hello, World!"


def big(request):
    return BIG


async def echo(request):
    websocket = await request.websocket()
    async for message in websocket:
        await websocket.send(message)
