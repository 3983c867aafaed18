"""A crowd of clients: what it meets while workers die and masters stop.

Some clients make a connection for each request, some keep theirs. Each writes down what
went wrong and when. Being refused ends a client: whether that is an error is the test's
to say, as is what a kept connection suffers when its worker is killed.

A Crowd is a closed loop: a client asks again when it has its answer. A Stream is an
open one: it asks when its time has come, whether or not others still wait, so a pause
of the server is seen in full.

What a worker's death explains is told without a clock's help: a connection that was
well before the worker was gone, and in trouble after it was killed.
"""

from __future__ import annotations

import asyncio
import ssl
import time
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass, field

from programs import kill, repeats

LATE = 3.0  # seconds after which an answer does not count as one
PROMISED = 0.8  # seconds between two requests of a kept connection, at most


@dataclass
class Trouble:
    """One request that was not answered."""

    kind: str  # "refused", "reset", "cut", "late", "wrong"
    when: float  # time.monotonic()
    well: float  # when the connection was begun, or asked what it still answered
    kept: bool  # on a connection that had served before
    detail: str = ""


@dataclass
class Death:
    """A worker that was killed."""

    killed: float  # time.monotonic()
    gone: float  # by then all its connections were closed

    @classmethod
    async def of(cls, pid: int) -> Death:
        killed = time.monotonic()
        await asyncio.get_running_loop().run_in_executor(None, kill, pid)
        return cls(killed, time.monotonic())

    def explains(self, trouble: Trouble) -> bool:
        return self.killed <= trouble.when and trouble.well <= self.gone


@dataclass
class Crowd:
    """Clients at one address; start() them, stop() them, read what they met."""

    host: str
    port: int = 0  # to be known before start()
    new: int = 8  # clients that connect for each request
    kept: int = 8  # clients that keep their connection
    paths: tuple[str, ...] = ("/",)
    tls: ssl.SSLContext | None = None  # whom it trusts; None: plain
    answers: int = 0
    slowest: float = 0.0
    repeated: int = 0  # handshakes of TCP that were lost, and came again a second later
    troubles: list[Trouble] = field(default_factory=list)
    stopping: bool = False

    async def start(self) -> None:
        clients = [self._client(False, n) for n in range(self.new)]
        clients += [self._client(True, n) for n in range(self.kept)]
        self.tasks = [asyncio.create_task(client) for client in clients]

    async def stop(self) -> None:
        self.stopping = True
        await asyncio.gather(*self.tasks)

    async def _connect(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        name = None if self.tls is None else "localhost"
        reader, writer = await asyncio.open_connection(
            self.host, self.port, ssl=self.tls, server_hostname=name
        )
        sock = writer.get_extra_info("socket")
        if sock.fileno() >= 0:  # else it is lost already
            self.repeated += repeats(sock)
        return reader, writer

    async def _leave(self, writer: asyncio.StreamWriter) -> None:
        """Close; over TLS that takes two, and asyncio leaves the socket until then."""
        writer.close()
        if self.tls is not None:
            with suppress(OSError, asyncio.TimeoutError):
                await asyncio.wait_for(writer.wait_closed(), LATE)

    async def _client(self, keep: bool, number: int) -> None:
        turn = number
        while not self.stopping:
            well = time.monotonic()
            try:
                reader, writer = await asyncio.wait_for(self._connect(), LATE)
            except (ConnectionRefusedError, asyncio.TimeoutError):
                self._met("refused", well, False)
                return
            except ConnectionError as error:
                self._met("reset", well, False, f"connect: {error}")
                continue
            served = 0
            try:
                while not self.stopping:
                    path = self.paths[turn % len(self.paths)]
                    turn += 1
                    asked = time.monotonic()
                    if not await self._ask(reader, writer, path, keep, served, well):
                        break
                    served, well = served + 1, asked
                    if not keep:
                        break
            finally:
                await self._leave(writer)
            await asyncio.sleep(0)

    async def _ask(
        self,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        path: str,
        keep: bool,
        served: int,
        well: float,
    ) -> bool:
        """One request; whether the connection can carry another."""
        if reader.at_eof():
            return False  # closed while idle: nothing was asked
        close = "" if keep else "Connection: close\r\n"
        start = time.monotonic()
        try:
            writer.write(f"GET {path} HTTP/1.1\r\nHost: a\r\n{close}\r\n".encode())
            head = await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), LATE)
            fields = head.lower().split(b"\r\n")
            length = next(f for f in fields if f.startswith(b"content-length:"))
            body = reader.readexactly(int(length.partition(b":")[2]))
            await asyncio.wait_for(body, LATE)
        except asyncio.TimeoutError:
            return self._met("late", well, served > 0)
        except asyncio.IncompleteReadError as error:
            return self._met("cut", well, served > 0, repr(error.partial[:40]))
        except ConnectionError as error:
            return self._met("reset", well, served > 0, str(error))
        self.slowest = max(self.slowest, time.monotonic() - start)
        if not head.startswith(b"HTTP/1.1 200 "):
            return self._met("wrong", well, served > 0, repr(head[:40]))
        self.answers += 1
        return b"connection: close" not in fields

    def _met(self, kind: str, well: float, kept: bool, detail: str = "") -> bool:
        self.troubles.append(Trouble(kind, time.monotonic(), well, kept, detail))
        return False

    def count(self, *kinds: str) -> int:
        return sum(trouble.kind in kinds for trouble in self.troubles)

    def unexplained(self, deaths: Iterable[Death]) -> list[Trouble]:
        """The troubles of which no death is the cause."""
        return [t for t in self.troubles if not any(d.explains(t) for d in deaths)]


@dataclass
class Stream(Crowd):
    """Requests at fixed times: as many on new connections as on kept ones.

    A kept connection carries a request every `pause` seconds, until told to close. Who
    finds that it comes later than PROMISED, because the machine is busy, connects anew:
    meanwhile a worker that leaves may have closed the connection, as it may.
    """

    rate: float = 200.0  # requests a second, in all
    pause: float = 0.4
    overslept: int = 0

    async def start(self) -> None:
        self.asked: set[asyncio.Task[None]] = set()
        kept = max(1, round(self.rate / 2 * self.pause))
        self.tasks = [asyncio.create_task(self._ask_new())]
        for number in range(kept):
            delay = self.pause * number / kept
            self.tasks.append(asyncio.create_task(self._ask_kept(delay)))

    async def stop(self) -> None:
        await super().stop()
        await asyncio.gather(*self.asked)

    async def _ask_new(self) -> None:
        start, asked = time.monotonic(), 0
        while not self.stopping:
            asked += 1
            task = asyncio.create_task(self._once())
            self.asked.add(task)
            task.add_done_callback(self.asked.discard)
            due = start + asked / (self.rate / 2)
            await asyncio.sleep(max(0.0, due - time.monotonic()))

    async def _once(self) -> None:
        well = time.monotonic()
        opened = await self._open()
        if opened is not None:
            await self._ask(*opened, "/", False, 0, well)
            await self._leave(opened[1])

    async def _open(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter] | None:
        start = time.monotonic()
        try:
            return await asyncio.wait_for(self._connect(), LATE)
        except ConnectionRefusedError:
            self._met("refused", start, False)
        except asyncio.TimeoutError:
            self._met("late", start, False, "connect")
        except ConnectionError as error:
            self._met("reset", start, False, f"connect: {error}")
        finally:
            self.slowest = max(self.slowest, time.monotonic() - start)
        return None

    async def _ask_kept(self, delay: float) -> None:
        await asyncio.sleep(delay)
        due = time.monotonic()
        while not self.stopping:
            well = time.monotonic()
            opened = await self._open()
            if opened is None:
                await asyncio.sleep(self.pause)
                continue
            reader, writer = opened
            served, before = 0, time.monotonic()
            while not self.stopping:
                now = time.monotonic()
                if now - before > PROMISED:
                    self.overslept += 1
                    break
                if reader.at_eof():
                    self._met("reset", well, True, "closed without notice")
                    break
                if not await self._ask(reader, writer, "/", True, served, well):
                    break
                served, before, well = served + 1, now, now
                due = max(due + self.pause, time.monotonic())
                await asyncio.sleep(due - time.monotonic())
            await self._leave(writer)
