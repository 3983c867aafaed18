"""Nothing is lost: what a crowd of clients meets when workers die and masters stop."""

from __future__ import annotations

import asyncio
import os
import signal
import ssl
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import psutil
import pytest
from authority import Authority
from crowd import Crowd, Death, Stream
from crowded import RATE, SECONDS, SOCKETS, TLS_RATE, in_thread, under_load, went_on
from programs import Program


class Side(NamedTuple):
    """In clear, or over TLS."""

    options: dict[str, Any]  # of the Server
    tls: ssl.SSLContext | None  # of the clients
    rate: float


@pytest.fixture(params=["clear", "tls"])
def side(request: pytest.FixtureRequest, tmp_path: Path) -> Side:
    if request.param == "clear":
        return Side({}, None, RATE)
    authority = Authority(tmp_path)
    return Side(authority.issue().options, authority.trusting(), TLS_RATE)


def open_fds(pid: int) -> int:
    return len(list(Path(f"/proc/{pid}/fd").iterdir()))


class Killer:
    """Kills workers, and writes down what died with them."""

    def __init__(self) -> None:
        self.deaths: list[Death] = []

    async def kill(self, program: Program, pids: list[int]) -> None:
        """One of the workers; awaits who takes its place."""
        self.deaths.append(await Death.of(pids.pop(0)))
        pids.append(int((await in_thread(program.until, "new"))[0]))

    def took_only_its_own(self, crowd: Crowd) -> None:
        """What the crowd met it met on connections that the dead had."""
        assert crowd.count("refused", "late", "wrong") == 0, crowd.troubles
        assert crowd.unexplained(self.deaths) == [], self.deaths
        assert crowd.repeated == 0


@SOCKETS
def test_a_killed_worker_takes_only_its_own_connections_with_it(sockets):
    killer = Killer()

    async def kill_a_worker_every_second(program: Program, pids: list[int]) -> None:
        fds = open_fds(program.pid)
        for _ in range(5):
            await asyncio.sleep(1.0)
            await killer.kill(program, pids)
        await asyncio.sleep(0.5)
        master = psutil.Process(program.pid)
        assert {child.pid for child in master.children()} == set(pids)
        assert open_fds(program.pid) == fds

    crowd = under_load(Crowd("127.0.0.1"), kill_a_worker_every_second, sockets)
    assert crowd.answers > 200
    killer.took_only_its_own(crowd)
    assert len(crowd.troubles) <= len(killer.deaths) * (crowd.new + crowd.kept)


def stop_under_load(stop: Callable[[Program], None], sockets: str, side: Side) -> None:
    """Stop the master while a crowd asks: it may be refused, but nothing else."""

    async def scenario(program: Program, pids: list[int]) -> None:
        await asyncio.sleep(1.0)
        stop(program)
        await in_thread(program.until, "returned")

    crowd = Crowd("127.0.0.1", paths=("/", "/", "/", "/slow"), tls=side.tls)
    under_load(crowd, scenario, sockets, **side.options)
    assert crowd.answers > 50
    assert [t for t in crowd.troubles if t.kind != "refused"] == []


@pytest.mark.contract("better: drain")
@SOCKETS
def test_a_stop_under_load_answers_all_it_has_accepted(sockets, side):
    stop_under_load(lambda p: p.signal(signal.SIGTERM), sockets, side)


@SOCKETS
def test_ctrl_c_under_load_answers_all_it_has_accepted(sockets):
    side = Side({}, None, RATE)
    stop_under_load(lambda p: p.signal_group(signal.SIGINT), sockets, side)


# ---- Changes of workers, under an open loop ------------------------------------------


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


def stream_while(change, sockets: str, side: Side) -> Stream:
    """What an open loop meets while the workers change again and again."""

    async def scenario(program: Program, pids: list[int]) -> None:
        began = time.monotonic()
        while time.monotonic() - began < SECONDS:
            await change(program, pids)

    stream = Stream("127.0.0.1", rate=side.rate, tls=side.tls)
    return under_load(stream, scenario, sockets, **side.options)


@pytest.mark.contract("better: drain")
@SOCKETS
@pytest.mark.timeout(60 + 2 * SECONDS)
@pytest.mark.parametrize("change", [hup, scale, term, everything])
def test_nobody_notices_planned_changes_of_workers(change, sockets):
    stream = stream_while(change, sockets, Side({}, None, RATE))
    went_on(stream)
    assert stream.repeated == 0


@pytest.mark.contract("better: slots")
@SOCKETS
@pytest.mark.timeout(60 + 2 * SECONDS)
def test_a_worker_killed_under_an_open_loop_takes_only_its_own_with_it(sockets, side):
    killer = Killer()

    async def kill_one(program: Program, pids: list[int]) -> None:
        await killer.kill(program, pids)
        await asyncio.sleep(1.0)

    stream = stream_while(kill_one, sockets, side)
    assert stream.answers > 0.2 * SECONDS * side.rate
    killer.took_only_its_own(stream)
