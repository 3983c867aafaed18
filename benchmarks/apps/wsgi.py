"""The same answers as hello.py, for WSGI servers (PEP 3333)."""

BIG = b"x" * (1 << 20)


def _headers(length):
    return [
        ("Content-Type", "text/plain; charset=utf-8"),
        ("Content-Length", length),
    ]


def app(environ, start_response):
    start_response("200 OK", _headers("13"))
    return [b"Hello, World!"]


def big(environ, start_response):
    start_response("200 OK", _headers("1048576"))
    return [BIG]
