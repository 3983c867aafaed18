"""The same answers as hello.py, for WSGI servers (PEP 3333)."""

BIG = b"x" * (1 << 20)


def app(environ, start_response):
    headers = [("Content-Type", "text/plain; charset=utf-8"), ("Content-Length", "13")]
    start_response("200 OK", headers)
    return [b"Hello, World!"]


def big(environ, start_response):
    length = str(len(BIG))
    headers = [
        ("Content-Type", "text/plain; charset=utf-8"),
        ("Content-Length", length),
    ]
    start_response("200 OK", headers)
    return [BIG]
