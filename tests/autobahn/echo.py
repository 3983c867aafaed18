"""What the Autobahn suite talks to: an ASGI app, and a handler, that echo messages."""


async def app(scope, receive, send):
    assert scope["type"] == "websocket"
    await receive()
    await send({"type": "websocket.accept"})
    while (event := await receive())["type"] == "websocket.receive":
        await send(event | {"type": "websocket.send"})


async def handler(request):
    websocket = await request.websocket()
    async for message in websocket:
        await websocket.send(message)
