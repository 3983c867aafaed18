"""The examples run as their first lines and the README say."""

from __future__ import annotations

import re
import signal
from contextlib import ExitStack
from pathlib import Path

import pytest
from programs import SOON, Program, ask
from websockets.sync.client import connect

EXAMPLES = Path(__file__).parent.parent / "examples"
COMMAND = ["-m", "prefork", "--bind", "127.0.0.1:0", "--workers", "1"]


def get(address: str, path: str, body: bytes = b"") -> bytes:
    head = f"POST {path} HTTP/1.1\r\nHost: a\r\nConnection: close\r\n"
    return ask(address, f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)


def served_by(program: Program) -> str:
    """The address that the command logs."""
    line = program.until_logged("serving on")
    return re.search(r"127\.0\.0\.1:\d+", line)[0]


def stop(program: Program) -> None:
    program.signal(signal.SIGTERM)
    assert program.wait() == 0


def test_hello_is_served_by_the_command():
    with Program([*COMMAND, "--app-dir", str(EXAMPLES), "hello:app"]) as program:
        assert get(served_by(program), "/").endswith(b"\r\n\r\nHello, World!")
        stop(program)


def test_the_program_preforks_itself():
    with Program([str(EXAMPLES / "program.py"), "127.0.0.1:0"]) as program:
        told = " ".join(program.until("listening"))
        address = "127.0.0.1:" + re.search(r"'127\.0\.0\.1', (\d+)", told)[1]
        assert get(address, "/").endswith(b"Hello, World!")
        assert get(address, "/json").endswith(b'{"hello": "world"}')
        assert get(address, "/echo", b"again").endswith(b"again")
        assert b"\r\n999\n\r\n" in get(address, "/count")
        assert b"HTTP/1.1 404 Not Found" in get(address, "/nothing")
        stop(program)


@pytest.mark.parametrize(
    ("path", "body", "answer"),
    [
        ("/", b"", b"slept\n"),
        ("/upload", b"x" * 100_000, b"100000 bytes\n"),
        ("/events", b"", b"data: 2\n\n\r\n0\r\n\r\n"),
    ],
)
def test_coroutines_answer(path, body, answer):
    command = [*COMMAND, "--app-dir", str(EXAMPLES), "coroutines:app"]
    with Program(command) as program:
        assert get(served_by(program), path, body).endswith(answer)
        stop(program)


def test_the_chat_brings_what_one_says_to_all():
    with Program([*COMMAND, "--app-dir", str(EXAMPLES), "chat:app"]) as program:
        address = served_by(program)
        assert b"new WebSocket(" in get(address, "/")
        with ExitStack() as stack:
            one, two = (
                stack.enter_context(connect(f"ws://{address}/", open_timeout=SOON))
                for _ in range(2)
            )
            assert two.recv(SOON) == "2 are here"
            one.send("hello")
            assert two.recv(SOON) == "hello"
            while one.recv(SOON) != "hello":
                pass
        stop(program)


def test_the_readme_s_program_runs(tmp_path):
    readme = (EXAMPLES.parent / "README.md").read_text()
    source = re.search(r"```python\n(# hello.py\n.*?)```", readme, re.DOTALL)[1]
    (tmp_path / "hello.py").write_text(source.replace('":8080"', '"127.0.0.1:0"'))
    with Program([str(tmp_path / "hello.py")]) as program:
        address = served_by(program)
        assert get(address, "/json").endswith(b'{"hello": "world"}')
        stop(program)
