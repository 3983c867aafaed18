"""Async handlers: `prefork coroutines:app --app-dir examples --bind :8080`."""

import asyncio

from prefork import Response


async def app(request):
    if request.path == "/events":
        return Response(events(), content_type="text/event-stream")
    if request.path == "/upload":
        size = 0
        async for part in request.stream():
            size += len(part)
        return f"{size} bytes\n"
    await asyncio.sleep(0.01)  # a database, another service ...
    return "slept\n"


async def events():
    """Server-sent events; left off when the client leaves."""
    for number in range(3):
        yield f"data: {number}\n\n"
        await asyncio.sleep(0.1)
