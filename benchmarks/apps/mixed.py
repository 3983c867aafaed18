"""What mixed.lua asks for: every way of answering."""

from collections import deque

from prefork import Response

LARGE = bytes(100_000)
kept = deque(maxlen=100)


def app(request):
    match request.path:
        case "/json":
            name = request.query.get("name", "")
            return Response(
                f'{{"name": "{name}", "a": "{request.cookies.get("a")}"}}',
                headers={"X-Host": request.headers["host"]},
                content_type="application/json",
            )
        case "/echo":
            return request.body
        case "/stream":
            return (b"part %d\n" % n for n in range(5))
        case "/large":
            return LARGE
        case "/kept":
            kept.append(request)
            return request.method
        case "/missing":
            return Response(b"not here\n", status=404)
        case "/raise":
            return Response("forged", headers={"X-Forged": "a\r\nb"})
        case _:
            return b"Hello, World!"
