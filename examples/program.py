"""A program that preforks itself: `python examples/program.py [ADDRESS]`."""

import os
import sys

from prefork import Prefork, Response, Server


def app(request):
    match request.path:
        case "/":
            return b"Hello, World!"
        case "/json":
            return Response('{"hello": "world"}', content_type="application/json")
        case "/echo":
            return request.body
        case "/count":
            return (f"{n}\n" for n in range(1000))  # streamed as the client reads
        case "/worker":
            return str(os.getpid())
    return Response(f"no {request.path}\n", status=404)


def ready(pids):
    print(f"listening on {prefork.address}, workers {pids}", flush=True)


if __name__ == "__main__":
    prefork = Prefork(Server(app), workers=2, on_master_ready=ready)
    prefork.listen_and_serve(sys.argv[1] if len(sys.argv) > 1 else ":8080")
