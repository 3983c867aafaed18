"""Runs of a master in a process of its own, and what the tests say to them.

start() runs lines of Python that have masters.py's names. What its run() tells is
awaited: ready, spawn, recover, raised, returned, left.
"""

from __future__ import annotations

import signal
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from programs import Program, ask

HERE = Path(__file__).parent
HALF, REST = b"GET / HTTP/1.1\r\n", b"\r\n"
MODES = {"shared": "reuseport=False", "reuseport": "reuseport=True"}

WAYS = pytest.mark.parametrize(
    "way",
    [
        "reuseport=False",
        "reuseport=True",
        "spawn='exec'",
        "spawn='exec', reuseport=1>0",
    ],
    ids=["fork-shared", "fork-slots", "exec-shared", "exec-slots"],
)

Start = Callable[..., Program]


@pytest.fixture
def start() -> Iterator[Start]:
    """Run lines of Python that have masters.py's names; in the end nothing is left."""
    programs: list[Program] = []

    def start(lines: str, **env: str) -> Program:
        script = "from masters import *\n" + textwrap.dedent(lines)
        program = Program(["-c", script], env={"PYTHONPATH": str(HERE), **env})
        programs.append(program)
        return program

    yield start
    for program in programs:
        with program:
            pass


@pytest.fixture(params=MODES)
def mode(request: pytest.FixtureRequest) -> str:
    return MODES[request.param]


def finish(program: Program) -> int:
    """Await the end; the run must have left everything as it was. The exit code."""
    code = program.wait()
    assert program.events("left") == [["left"]], program.told
    return code


def stop(program: Program, number: int = signal.SIGTERM) -> None:
    """Stop in order: the run returns normally."""
    program.signal(number)
    assert finish(program) == 0, program.stderr
    assert program.events("returned"), program.told


def ready(program: Program) -> tuple[str, list[int]]:
    """Await on_master_ready: the address and the workers."""
    address, *pids = program.until("ready")
    return address, [int(pid) for pid in pids]


def who(address: str) -> int:
    """The pid of the worker that answers."""
    return int(ask(address))
