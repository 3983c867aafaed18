"""Nothing is lost: what a crowd of clients meets when workers die and masters stop."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from pathlib import Path

import psutil
import pytest
from crowd import Crowd, Stream
from programs import SOON, Program

MODES = pytest.mark.parametrize("reuseport", [False, True], ids=["shared", "slots"])

PROGRAM = """
import sys, time
from prefork import Prefork, Server

def app(request):
    if request.path == "/slow":
        time.sleep(0.05)
    return b"Hello, World!"

def ready(pids):
    print("ready", prefork.address[1], *pids, flush=True)

prefork = Prefork(
    Server(app), workers=2, reuseport=sys.argv[1] == "True", recover_threshold=1000,
    on_master_ready=ready,
    on_child_recover=lambda old, new: print("new", new, flush=True),
)
prefork.listen_and_serve("127.0.0.1:0")
print("returned", flush=True)
"""


def open_fds(pid: int) -> int:
    return len(list(Path(f"/proc/{pid}/fd").iterdir()))


async def in_thread(function, *arguments):
    return await asyncio.get_running_loop().run_in_executor(None, function, *arguments)


@MODES
def test_a_killed_worker_takes_only_its_own_connections_with_it(reuseport):
    kills: list[float] = []

    async def kill_a_worker_every_second(program: Program, crowd: Crowd, pids) -> None:
        await crowd.start()
        for _ in range(5):
            await asyncio.sleep(1.0)
            victim = pids.pop(0)
            kills.append(time.monotonic())
            os.kill(victim, signal.SIGKILL)
            pids.append(int((await in_thread(program.until, "new"))[0]))
        await asyncio.sleep(0.5)
        await crowd.stop()

    with Program(["-c", PROGRAM, str(reuseport)]) as program:
        port, *workers = map(int, program.until("ready"))
        fds = open_fds(program.pid)
        crowd = Crowd("127.0.0.1", port)
        asyncio.run(kill_a_worker_every_second(program, crowd, workers))

        master = psutil.Process(program.pid)
        assert {child.pid for child in master.children()} == set(workers)
        assert open_fds(program.pid) == fds
        program.signal(signal.SIGTERM)
        assert program.wait() == 0

    assert crowd.answers > 200
    assert crowd.count("refused", "late", "wrong") == 0, crowd.troubles
    for trouble in crowd.troubles:
        since = min(trouble.when - kill for kill in kills if kill <= trouble.when)
        assert since < 0.9, (trouble, kills)
    assert len(crowd.troubles) <= len(kills) * (crowd.new + crowd.kept)
    assert crowd.slowest < 1.0


def stop_under_load(reuseport: bool, stop) -> tuple[Crowd, float]:
    """Run a crowd, stop the master amid; what the crowd met, and the stop's time."""
    took = 0.0

    async def scenario(program: Program, crowd: Crowd) -> None:
        nonlocal took
        await crowd.start()
        await asyncio.sleep(1.0)
        started = time.monotonic()
        stop(program)
        await in_thread(program.until, "returned")
        took = time.monotonic() - started
        await crowd.stop()

    with Program(["-c", PROGRAM, str(reuseport)]) as program:
        port = int(program.until("ready")[0])
        crowd = Crowd("127.0.0.1", port, paths=("/", "/", "/", "/slow"))
        asyncio.run(asyncio.wait_for(scenario(program, crowd), SOON))
        assert program.wait() == 0
    return crowd, took


@pytest.mark.contract("better: drain")
@MODES
def test_a_stop_under_load_answers_all_it_has_accepted(reuseport):
    crowd, took = stop_under_load(reuseport, lambda p: p.signal(signal.SIGTERM))
    assert crowd.answers > 50
    assert [t for t in crowd.troubles if t.kind != "refused"] == []
    assert took < 5.0


@MODES
def test_ctrl_c_under_load_answers_all_it_has_accepted(reuseport):
    crowd, took = stop_under_load(reuseport, lambda p: p.signal_group(signal.SIGINT))
    assert crowd.answers > 50
    assert [t for t in crowd.troubles if t.kind != "refused"] == []
    assert took < 5.0


# ---- Changes of workers, under an open loop ------------------------------------------

SECONDS = float(os.environ.get("PREFORK_LOAD_SECONDS", "5"))
RATE = float(os.environ.get("PREFORK_LOAD_RATE", "200"))


async def hup(program: Program, pids: list[int]) -> None:
    """Every 2 s."""
    program.signal(signal.SIGHUP)
    await in_thread(program.until_logged, "reloaded")
    await asyncio.sleep(2.0)


async def scale(program: Program, pids: list[int]) -> None:
    """One worker more, a second later one less."""
    for number in (signal.SIGTTIN, signal.SIGTTOU):
        program.signal(number)
        await in_thread(program.until_logged, "scaling from")
        await asyncio.sleep(1.0)


async def term(program: Program, pids: list[int]) -> None:
    """A worker is told to leave by a stranger."""
    victim = pids.pop(0)
    os.kill(victim, signal.SIGTERM)
    pids.append(int((await in_thread(program.until, "new"))[0]))
    await asyncio.sleep(1.0)


async def everything(program: Program, pids: list[int]) -> None:
    """All of it at once."""
    program.signal(signal.SIGHUP)
    program.signal(signal.SIGTTIN)
    await asyncio.sleep(0.5)
    for child in psutil.Process(program.pid).children()[:1]:
        child.send_signal(signal.SIGTERM)
    await asyncio.sleep(0.5)
    program.signal(signal.SIGTTOU)
    await asyncio.sleep(1.0)


def stream_while(change, reuseport: bool) -> Stream:
    """What an open loop meets while the workers change again and again."""

    async def scenario(program: Program, stream: Stream, pids: list[int]) -> None:
        await stream.start()
        began = time.monotonic()
        while time.monotonic() - began < SECONDS:
            await change(program, pids)
        await stream.stop()

    with Program(["-c", PROGRAM, str(reuseport)]) as program:
        port, *pids = map(int, program.until("ready"))
        stream = Stream("127.0.0.1", port, rate=RATE)
        asyncio.run(scenario(program, stream, pids))
        program.signal(signal.SIGTERM)
        assert program.wait() == 0
    return stream


@pytest.mark.contract("better: drain")
@MODES
@pytest.mark.timeout(60 + 2 * SECONDS)
@pytest.mark.parametrize("change", [hup, scale, term, everything])
def test_nobody_notices_planned_changes_of_workers(change, reuseport):
    stream = stream_while(change, reuseport)
    assert stream.answers > 0.2 * SECONDS * RATE  # a machine may be slow
    assert stream.overslept < 0.1 * stream.answers
    assert stream.troubles == []
    assert stream.slowest < 1.0


@pytest.mark.contract("better: slots")
@MODES
@pytest.mark.timeout(60 + 2 * SECONDS)
def test_a_worker_killed_under_an_open_loop_takes_only_its_own_with_it(reuseport):
    kills: list[float] = []

    async def kill_one(program: Program, pids: list[int]) -> None:
        victim = pids.pop(0)
        kills.append(time.monotonic())
        os.kill(victim, signal.SIGKILL)
        pids.append(int((await in_thread(program.until, "new"))[0]))
        await asyncio.sleep(1.0)

    stream = stream_while(kill_one, reuseport)
    assert stream.count("refused", "late", "wrong") == 0, stream.troubles
    for trouble in stream.troubles:
        since = min(trouble.when - kill for kill in kills if kill <= trouble.when)
        assert since < stream.pause + 0.2, (trouble, kills)
    assert stream.slowest < 1.0
