"""A handler forks, and the child comes back from it: it ends there, whatever it does.

The parent waits for the child, tells its exit status, and goes on as if nothing had
been. A child that answered would be seen as bytes that nobody asked for.
"""

from __future__ import annotations

import signal
import textwrap
from collections.abc import Callable, Iterator

import pytest
from live import Client, get, post
from programs import Program
from test_websocket import BINARY, TEXT, Raw, frame

PRELUDE = """
import asyncio, os, sys
from prefork import Response, Server

def say(*words):
    os.write(1, (" ".join(map(str, words)) + "\\n").encode())

def ready(server):
    say("ready", *server.address)

def run(app, **options):
    options.setdefault("drain_idle", 0)
    Server(app, **options).listen_and_serve("127.0.0.1:0", on_ready=ready)
    say("returned")

PLAIN = [("Content-Type", "text/plain")]

def forked(act=lambda: ending()):
    '''b"child" in the child, behind act(); in the parent that one's exit status.'''
    pid = os.fork()
    if pid == 0:
        act()
        return b"child"
    return forked_status(pid)

def forked_status(pid):
    return b"%d" % os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
"""

# How the child comes back, and its exit status.
ENDINGS = {
    "returns": ("pass", 0),
    "raises": ("1 / 0", 1),
    "exits": ("raise SystemExit(7)", 7),
}
ODD_ENDINGS = {
    "exits with a list": ("raise SystemExit(['how'])", 1),
    "raises in its hook": ("sys.excepthook = None; 1 / 0", 1),
    "has no stdout": ("sys.stdout.close()", 0),
}

HANDLER = """
def app(request):
    return forked()
"""
STREAM = """
def app(request):
    yield forked()
"""
READER = """
def app(request):
    for part in request.stream():
        pass
    return forked()
"""
WSGI = """
def app(environ, start_response):
    start_response("200 OK", PLAIN)
    return [forked()]
"""
WSGI_READER = """
def app(environ, start_response):
    start_response("200 OK", PLAIN)
    return [forked() + environ["wsgi.input"].read()[:0]]
"""
WSGI_STREAM = """
def app(environ, start_response):
    start_response("200 OK", PLAIN)
    yield b""
    yield forked()
"""
COROUTINE = """
async def app(request):
    return forked()
"""
LATE_COROUTINE = """
async def app(request):
    await asyncio.sleep(0)
    return forked()
"""
ASGI = """
async def app(scope, receive, send):
    if scope["type"] == "http":
        body = forked()
        if body == b"child":
            return
        await send({"type": "http.response.start", "status": 200})
        await send({"type": "http.response.body", "body": body})
"""
LATE_ASGI = ASGI.replace(
    "        body = forked", "        await asyncio.sleep(0)\n        body = forked"
)
LATER = {
    "async": COROUTINE,
    "async-late": LATE_COROUTINE,
    "asgi": ASGI,
    "asgi-late": LATE_ASGI,
}
CHUNKED = "run(app, stream_request_body=True)"

SERVED = {
    "handler": HANDLER + "run(app)",
    "handler-crew": HANDLER + "run(app, threads=4)",
    "stream": STREAM + "run(app)",
    "stream-crew": STREAM + "run(app, threads=4)",
    "body": READER + CHUNKED,
    "body-crew": READER + "run(app, stream_request_body=True, threads=4)",
    "wsgi": WSGI + "run(app)",
    "wsgi-crew": WSGI + "run(app, threads=4)",
    "wsgi-body": WSGI_READER + "run(app)",
    "wsgi-stream": WSGI_STREAM + "run(app)",
    "wsgi-stream-crew": WSGI_STREAM + "run(app, threads=4)",
    **{
        f"{name}-{loop}": f"{app}run(app, loop={loop!r})"
        for name, app in LATER.items()
        for loop in ("asyncio", "uvloop")
    },
}

Start = Callable[..., Program]


@pytest.fixture
def start() -> Iterator[Start]:
    """Run lines of Python behind PRELUDE; in the end no process is left."""
    programs: list[Program] = []

    def start(lines: str, ending: str = "pass") -> Program:
        define = f"def ending():\n    {ending}\n"
        code = PRELUDE + define + textwrap.dedent(lines)
        programs.append(Program(["-W", "ignore::DeprecationWarning", "-c", code]))
        return programs[-1]

    yield start
    for program in programs:
        with program:
            pass


def connected(program: Program) -> Client:
    host, port = program.until("ready")
    return Client((host, int(port)))


def stop(program: Program) -> str:
    """Its orderly end; what it has written to stderr."""
    program.process.terminate()
    assert program.wait() == 0, program.stderr
    assert program.events("returned") == [["returned"]]
    return program.stderr


@pytest.mark.parametrize("ending", ENDINGS)
@pytest.mark.parametrize("name", SERVED)
def test_a_child_that_comes_back_ends_there(start, name, ending):
    code, status = ENDINGS[ending]
    program = start(SERVED[name], code)
    late = name.startswith("body")
    with connected(program) as client:
        for _ in range(2):
            if late:
                client.send(post(b"hello")[:-2])
                assert client.is_quiet()
                client.send(b"lo")
            else:
                client.send(get())
            answer = client.answer()
            assert (answer.status, answer.body) == (200, b"%d" % status)
        assert client.is_quiet()
    told = stop(program)
    assert ("ZeroDivisionError" in told) == (ending == "raises")


@pytest.mark.parametrize("ending", ODD_ENDINGS)
@pytest.mark.parametrize("name", ["handler", "wsgi-crew", "async-late-asyncio"])
def test_a_child_ends_whatever_its_last_words_do(start, name, ending):
    code, status = ODD_ENDINGS[ending]
    program = start(SERVED[name], code)
    with connected(program) as client:
        for _ in range(2):
            client.send(get())
            assert client.answer().body == b"%d" % status
        assert client.is_quiet()
    stop(program)


# What the child does that would reach the client.
REACHES = {
    "write": """
        def app(environ, start_response):
            write = start_response("200 OK", PLAIN)
            how = forked(lambda: write(b"child"))
            return [how]
        run(app, interface="wsgi")
    """,
    "write-crew": """
        def app(environ, start_response):
            write = start_response("200 OK", PLAIN)
            how = forked(lambda: write(b"child"))
            return [how]
        run(app, threads=4)
    """,
    "hint": """
        def app(environ, start_response):
            how = forked(lambda: environ["wsgi.early_hints"]([("Link", "</a>")]))
            start_response("200 OK", PLAIN)
            return [how]
        run(app)
    """,
    "inform": """
        def app(request):
            return forked(lambda: request.inform(103, [("Link", "</a>")]))
        run(app)
    """,
    "inform-body": """
        def app(request):
            return forked(lambda: request.inform(103, [("Link", "</a>")]))
        run(app, stream_request_body=True)
    """,
    "read-body": """
        def app(request):
            return forked(lambda: request.body)
        run(app, stream_request_body=True)
    """,
    "input": """
        def app(environ, start_response):
            how = forked(environ["wsgi.input"].read)
            start_response("200 OK", PLAIN)
            return [how]
        run(app)
    """,
    "send": """
        async def app(scope, receive, send):
            if scope["type"] == "http":
                start = {"type": "http.response.start", "status": 200}
                how = forked(lambda: send(start))
                await send(start)
                await send({"type": "http.response.body", "body": how})
        run(app)
    """,
    "receive": """
        async def app(scope, receive, send):
            if scope["type"] == "http":
                how = forked(receive)
                await send({"type": "http.response.start", "status": 200})
                await send({"type": "http.response.body", "body": how})
        run(app)
    """,
}


@pytest.mark.parametrize("name", REACHES)
def test_a_child_that_would_reach_the_client_is_told_that_it_cannot(start, name):
    program = start(REACHES[name])
    request = post(b"hello", *["Expect: 100-continue"] * (name == "input"))
    unread = name in ("read-body", "inform-body", "input")
    with connected(program) as client:
        client.send(request[:-2] if unread else request)
        answer = client.answer()
        assert (answer.status, answer.body, answer.interim) == (200, b"1", [])
    assert "was forked by a handler: the client" in stop(program)


@pytest.mark.parametrize("loop", ["asyncio", "uvloop"])
def test_a_child_that_would_go_on_in_the_event_loop_ends(start, loop):
    program = start(f"""
        async def app(request):
            await asyncio.sleep(0)
            pid = os.fork()
            if pid == 0:
                while True:
                    await asyncio.sleep(0.01)
            return forked_status(pid)
        run(app, loop={loop!r})
    """)
    with connected(program) as client:
        for _ in range(2):
            client.send(get())
            assert client.answer().body.isdigit()
        assert client.is_quiet()
    stop(program)


@pytest.mark.parametrize("loop", ["asyncio", "uvloop"])
def test_a_child_of_a_websocket_leaves_what_came_with_its_message_to_its_parent(
    start, loop
):
    program = start(f"""
        import signal
        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGUSR1])
        parent = os.getpid()
        async def app(request):
            websocket = await request.websocket()
            async for message in websocket:
                if message == "hold":
                    say("held")
                    signal.sigwait([signal.SIGUSR1])
                elif message == "fork":
                    await websocket.send(forked())
                else:
                    say("heard", os.getpid() == parent)
                    await websocket.send(message)
        run(app, loop={loop!r})
    """)
    host, port = program.until("ready")
    address = (host, int(port))
    with Client(address) as holding, Client(address) as forking, Client(address) as one:
        clients = [holding, forking, one]
        raws = [Raw(client) for client in clients]
        raws[0].send(frame(TEXT, b"hold"))
        program.until("held")
        raws[1].send(frame(TEXT, b"fork"))
        raws[2].send(frame(TEXT, b"hello"))
        program.signal(signal.SIGUSR1)
        assert raws[1].frame() == (BINARY, b"0")
        assert raws[2].frame() == (TEXT, b"hello")
        for client in clients:
            client.reset()
    stop(program)
    assert program.events("heard") == [["heard", "True"]]
