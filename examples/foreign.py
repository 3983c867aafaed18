"""Other servers, preforked: `python examples/foreign.py http|asyncio|uvicorn [ADDR]`.

Each takes a listening socket and serves; that is all that Prefork wants of it.
"""

import asyncio
import http.server
import os
import sys

from prefork import Prefork

BODY = f"served by {sys.argv[1] if len(sys.argv) > 1 else 'nobody'}\n".encode()


class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.send_header("Worker", str(os.getpid()))
        self.end_headers()
        self.wfile.write(BODY)


def serve_http(sock):
    server = http.server.ThreadingHTTPServer(sock.getsockname()[:2], Handler, False)
    server.socket = sock
    server.serve_forever()


async def answer(reader, writer):
    await reader.readuntil(b"\r\n\r\n")
    writer.write(b"HTTP/1.1 200 OK\r\nConnection: close\r\n")
    writer.write(b"Worker: %d\r\n\r\n%b" % (os.getpid(), BODY))
    await writer.drain()
    writer.close()


def serve_asyncio(sock):
    async def serve():
        async with await asyncio.start_server(answer, sock=sock) as server:
            await server.serve_forever()

    asyncio.run(serve())


async def app(scope, receive, send):
    if scope["type"] == "http":
        headers = [(b"worker", b"%d" % os.getpid())]
        start = {"type": "http.response.start", "status": 200, "headers": headers}
        await send(start)
        await send({"type": "http.response.body", "body": BODY})


def serve_uvicorn(sock):
    import uvicorn

    config = uvicorn.Config(app, lifespan="off", log_level="warning")
    uvicorn.Server(config).run(sockets=[sock])


SERVERS = {"http": serve_http, "asyncio": serve_asyncio, "uvicorn": serve_uvicorn}

if __name__ == "__main__":
    address = sys.argv[2] if len(sys.argv) > 2 else ":8080"
    prefork = Prefork(serve_func=SERVERS[sys.argv[1]], workers=2)
    prefork.listen_and_serve(address)
