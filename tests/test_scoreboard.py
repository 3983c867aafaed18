"""The scoreboard: what workers count, what stays of it, and how they share the load."""

from __future__ import annotations

import json
import os
import signal
import socket
import time
from bisect import bisect_left
from collections.abc import Iterator
from itertools import pairwise

import pytest
from programs import Program, ask

from prefork import _core

SOON = 10.0


@pytest.fixture
def board() -> Iterator[_core.Scoreboard]:
    board = _core.Scoreboard(8)
    yield board
    board.close()


class Fleet:
    """Loops of one process that stand for workers: each has a row, all one listener."""

    def __init__(
        self, board: _core.Scoreboard, count: int, reuseport: bool, **options: int
    ) -> None:
        self.board = board
        self.options = options
        self.listeners: list[socket.socket] = []
        self.loops: list[_core.Loop] = []
        self.rows: list[int] = []
        port = 0
        for slot in range(count):
            if reuseport or not self.listeners:
                self.listeners.append(listener(port, reuseport))
                port = self.listeners[0].getsockname()[1]
            self.add(slot, self.listeners[-1])
        self.address = self.listeners[0].getsockname()
        self.clients: list[socket.socket] = []

    def add(self, slot: int, sock: socket.socket) -> _core.Loop:
        row = self.board.claim(slot, 1)
        loop = _core.Loop(drain_idle_ms=1, **self.options)
        loop.attach(self.board, row)
        loop.listen(sock.fileno())
        self.rows.append(row)
        self.loops.append(loop)
        return loop

    def connect(self, count: int) -> None:
        for _ in range(count):
            self.clients.append(socket.create_connection(self.address))

    def turn(self) -> None:
        for loop in self.loops:
            for flags, request, _ in loop.wait(0):
                if flags & _core.REQUEST:
                    request.respond(200, [], str(os.getpid()).encode())

    def until(self, condition) -> None:
        deadline = time.monotonic() + SOON
        while not condition():
            assert time.monotonic() < deadline, self.board.rows()
            self.turn()

    @property
    def held(self) -> list[int]:
        return [loop.stats()["connections"] for loop in self.loops]

    def close(self) -> None:
        for loop in self.loops:
            loop.shut()
        for sock in [*self.clients, *self.listeners]:
            sock.close()


def listener(port: int, reuseport: bool) -> socket.socket:
    sock = socket.socket()
    if reuseport:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    sock.bind(("127.0.0.1", port))
    sock.listen(512)
    return sock


@pytest.fixture
def fleet(board):
    made: list[Fleet] = []

    def make(count: int, reuseport: bool = False, **options: int) -> Fleet:
        made.append(Fleet(board, count, reuseport, **options))
        return made[-1]

    yield make
    for one in made:
        one.close()


def test_a_claimed_row_says_who_is_meant(board):
    row = board.claim(3, 7)
    found = board.row(row)
    assert (found["slot"], found["generation"], found["state"]) == (3, 7, "booting")
    assert [one["row"] for one in board.rows()] == [row]


def test_a_full_board_refuses_another_claim(board):
    for slot in range(8):
        board.claim(slot, 1)
    with pytest.raises(OSError, match="No space"):
        board.claim(8, 1)


def test_a_worker_counts_in_its_row(fleet, board):
    one = fleet(1)
    one.connect(1)
    one.clients[0].sendall(b"GET / HTTP/1.1\r\nHost: a\r\n\r\n" * 3)
    one.until(lambda: board.row(one.rows[0])["bytes_out"] > 0)
    row = board.row(one.rows[0])
    assert row["pid"] == os.getpid()
    assert (row["accepted"], row["connections"], row["lent"]) == (1, 1, 0)
    assert row["statuses"] == {1: 0, 2: 3, 3: 0, 4: 0, 5: 0}
    assert row["bytes_in"] == 3 * 27 and row["bytes_out"] > 3 * 27
    assert sum(row["latency"]) == 3


def test_the_latency_of_a_request_is_counted_where_it_belongs(fleet, board):
    one = fleet(1)
    one.connect(1)
    began = time.monotonic()
    one.clients[0].sendall(b"GET / HTTP/1.1\r\nHost: a\r\n\r\n")
    held = []
    while not held:
        held = [event[1] for event in one.loops[0].wait(SOON)]
    until = time.monotonic() + 0.05
    while time.monotonic() < until:
        one.loops[0].wait(until - time.monotonic())
    held[0].respond(200, [], b"")
    took = time.monotonic() - began
    (bucket,) = [i for i, n in enumerate(board.row(one.rows[0])["latency"]) if n]
    least, most = (bisect_left(_core.LATENCY_BOUNDS, value) for value in (0.05, took))
    assert least <= bucket <= most


def test_latency_bounds_grow_by_a_quarter_at_most(board):
    bounds = _core.LATENCY_BOUNDS
    assert all(a < b <= max(1.26 * a, a + 1.1e-6) for a, b in pairwise(bounds))
    assert bounds[-1] > 100


def test_what_a_worker_counted_survives_it(fleet, board):
    one = fleet(1)
    one.connect(1)
    one.clients[0].sendall(b"GET / HTTP/1.1\r\nHost: a\r\n\r\n")
    one.until(lambda: board.totals()["statuses"][2] == 1)
    one.loops[0].shut()
    board.retire(one.rows[0])
    assert board.rows() == []
    totals = board.totals()
    assert (totals["requests"], totals["statuses"][2], totals["accepted"]) == (1, 1, 1)
    assert (totals["connections"], totals["lent"]) == (0, 0)
    assert sum(totals["latency"]) == 1


def test_another_process_reads_the_same_board(board):
    board.claim(5, 1)
    again = _core.Scoreboard(fd=board.fileno())
    assert [row["slot"] for row in again.rows()] == [5]
    again.close()


def test_a_descriptor_that_is_no_board_is_refused(tmp_path):
    with (tmp_path / "other").open("wb+") as other:
        other.write(bytes(65536))
        other.flush()
        with pytest.raises(OSError, match="Invalid argument"):
            _core.Scoreboard(fd=other.fileno())


@pytest.mark.parametrize("count", [2, 4])
@pytest.mark.parametrize("reuseport", [False, True], ids=["shared", "slots"])
def test_connections_come_to_be_spread_evenly(fleet, count, reuseport):
    one = fleet(count, reuseport)
    one.connect(400)
    most = 1.1 if count == 2 else 1.2
    one.until(lambda: sum(one.held) == 400 and max(one.held) <= most * min(one.held))


def test_connections_that_end_at_once_are_spread_evenly_too(fleet, board):
    one = fleet(2)
    for _ in range(10):
        one.connect(16)
        for client in one.clients[-16:]:
            client.sendall(b"GET / HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n")
        one.until(lambda: sum(one.held) == 16)
        for client in one.clients[-16:]:
            client.close()
        one.until(lambda: sum(one.held) == 0)
    accepted = [board.row(row)["accepted"] for row in one.rows]
    assert sum(accepted) == 160 and max(accepted) <= 1.2 * min(accepted)


def test_quiet_connections_move_to_a_worker_that_has_come_late(fleet, board):
    one = fleet(1)
    one.connect(60)
    one.until(lambda: one.held == [60])
    one.add(1, one.listeners[0])
    one.until(lambda: sum(one.held) == 60 and one.held[1] >= 25)
    for client in one.clients:
        client.sendall(b"GET / HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n")
    one.until(lambda: sum(one.held) == 0)
    answers = [client.recv(65536) for client in one.clients]
    assert all(answer.startswith(b"HTTP/1.1 200 OK\r\n") for answer in answers)


def test_busy_connections_move_between_two_requests(fleet, board):
    one = fleet(1)
    one.connect(80)
    ask_for = b"GET / HTTP/1.1\r\nHost: a\r\n\r\n"
    waiting: dict[tuple[str, int], _core.Request] = {}

    def take(timeout: float) -> None:
        for loop in one.loops:
            for flags, request, _ in loop.wait(timeout):
                if flags & _core.REQUEST:
                    waiting[request.client] = request

    def ask_all(clients: list[socket.socket]) -> None:
        for client in clients:
            client.sendall(ask_for)
        deadline = time.monotonic() + SOON
        while len(waiting) < len(one.clients) and time.monotonic() < deadline:
            take(0)
        assert len(waiting) == len(one.clients)

    ask_all(one.clients)
    one.add(1, one.listeners[0])
    for client in one.clients:  # all but one are being answered, at any time
        waiting.pop(client.getsockname()).respond(200, [], b"")
        take(0.002)
        assert client.recv(65536).startswith(b"HTTP/1.1 200 OK\r\n")
        ask_all([client])
    assert one.held[1] >= 30
    for request in waiting.values():
        request.respond(200, [], b"")
    one.until(lambda: board.totals()["lent"] == 0)


def test_a_passed_connection_is_answered_and_knows_its_peer(fleet, board):
    one = fleet(2, reuseport=False)
    one.connect(60)
    one.until(lambda: sum(one.held) == 60)
    assert board.totals()["passed_on"] > 0
    for client in one.clients:
        client.sendall(b"GET / HTTP/1.1\r\nHost: a\r\n\r\n")
    seen = set()
    deadline = time.monotonic() + SOON
    while len(seen) < 60 and time.monotonic() < deadline:
        for loop in one.loops:
            for flags, request, _ in loop.wait(0):
                if flags & _core.REQUEST:
                    seen.add(request.client)
                    request.respond(200, [], b"")
    assert seen == {client.getsockname() for client in one.clients}


def test_where_addresses_are_counted_nobody_is_passed_on(fleet, board):
    one = fleet(2, reuseport=False, max_connections_per_ip=40)
    one.connect(40)
    one.until(lambda: sum(one.held) == 40)
    totals = board.totals()
    assert (totals["passed_on"], totals["refused"]) == (0, 0)


def test_a_passed_connection_has_the_requests_left_that_it_had(fleet, board):
    one = fleet(1, max_requests=2)
    one.connect(60)
    for client in one.clients:
        client.sendall(b"GET / HTTP/1.1\r\nHost: a\r\n\r\n")
    one.until(lambda: board.totals()["statuses"][2] == 60)
    one.add(1, one.listeners[0])
    one.until(lambda: one.held[1] >= 25)
    for client in one.clients:
        assert client.recv(65536).startswith(b"HTTP/1.1 200 OK\r\n")
        client.sendall(b"GET / HTTP/1.1\r\nHost: a\r\n\r\n")
    one.until(lambda: sum(one.held) == 0)
    assert all(b"Connection: close" in client.recv(65536) for client in one.clients)


def test_a_draining_worker_is_passed_nothing(fleet, board):
    one = fleet(2, reuseport=False)
    one.loops[1].drain()
    one.connect(60)
    one.until(lambda: sum(one.held) == 60)
    assert one.held == [60, 0]
    assert board.row(one.rows[1])["state"] == "draining"


def test_a_worker_that_is_gone_is_passed_nothing(fleet, board):
    one = fleet(2, reuseport=False)
    one.loops.pop().shut()  # as kill -9 leaves it: its row still says that it waits
    one.connect(60)
    one.until(lambda: sum(one.held) == 60)
    assert board.row(one.rows[0])["passed_on"] == 0


def test_the_queue_of_a_vacant_slot_is_served_by_who_adopts_it(fleet, board):
    one = fleet(2, reuseport=True)
    one.loops[1].shut()
    board.retire(one.rows[1])
    one.loops.pop()
    one.connect(40)
    board.adopt(one.rows[0], 1, one.listeners[1].fileno())
    one.until(lambda: sum(one.held) == 40)

    board.release(one.rows[0], 1)
    one.turn()
    successor = one.add(1, one.listeners[1])
    one.connect(40)
    one.until(lambda: sum(one.held) == 80)
    assert successor.stats()["accepted"] > 0


def test_a_queue_given_back_as_it_fills_is_left_to_its_own_worker(fleet, board):
    one = fleet(2, reuseport=True)
    one.loops.pop().shut()
    board.retire(one.rows[1])
    for _ in range(20):
        board.adopt(one.rows[0], 1, one.listeners[1].fileno())
        one.turn()
        board.release(one.rows[0], 1)
        one.connect(4)  # the letter and the queue are news of the same moment
        one.turn()
    one.add(1, one.listeners[1])
    one.until(lambda: sum(one.held) == 80)


def test_letters_of_other_users_are_not_read(fleet, board):
    if os.getuid() != 0:
        pytest.skip("only root can be somebody else")
    one = fleet(1)
    with open("/proc/net/unix") as table:
        names = [line.split()[-1] for line in table if " @" in line]
    pid = os.fork()
    if pid == 0:
        os.setuid(65534)
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as stranger:
            ends = socket.socketpair()
            for name in names:
                try:
                    stranger.connect("\0" + name[1:])
                    socket.send_fds(stranger, [bytes(36)], [ends[0].fileno()])
                except OSError:
                    continue
        os._exit(0)
    os.waitpid(pid, 0)
    fds = len(os.listdir("/proc/self/fd"))
    one.turn()
    assert one.held == [0]
    assert len(os.listdir("/proc/self/fd")) == fds


MASTER = """
import os, signal
from prefork import Prefork, Server

def ready(pids):
    print("ready", prefork.address[1], flush=True)

def recovered(old, new):
    totals = prefork.scoreboard.totals()
    print("totals", totals["requests"], len(prefork.scoreboard.rows()), flush=True)

prefork = Prefork(
    Server(lambda request: str(os.getpid())), workers=2, on_master_ready=ready,
    on_child_recover=recovered,
)
prefork.listen_and_serve("127.0.0.1:0")
"""


def test_the_master_reads_what_a_killed_worker_had_counted():
    with Program(["-c", MASTER]) as program:
        address = f"127.0.0.1:{program.until('ready')[0]}"
        get = b"GET / HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n"
        victims = [int(ask(address, get).rpartition(b"\r\n")[2]) for _ in range(5)]
        os.kill(victims[-1], signal.SIGKILL)
        assert program.until("totals") == ["5", "2"]
        program.signal(signal.SIGTERM)
        assert program.wait() == 0


FLEET = """
import json, os, sys
from prefork import Prefork, Server

def app(request):
    serving = [row for row in prefork.scoreboard.rows() if row["state"] != "booting"]
    return json.dumps([os.getpid(), sorted(row["pid"] for row in serving)])

def ready(pids):
    print("ready", prefork.address[1], *pids, flush=True)

options = json.loads(sys.argv[1])
prefork = Prefork(Server(app), workers=2, on_master_ready=ready, **options)
prefork.listen_and_serve("127.0.0.1:0")
"""
GET = b"GET / HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n"


def told(address: str) -> tuple[int, list[int]]:
    """Who answers, and whom it reads on the scoreboard."""
    pid, pids = json.loads(ask(address, GET).rpartition(b"\r\n")[2])
    return pid, pids


@pytest.mark.parametrize("spawn", ["fork", "exec"])
def test_every_worker_counts_and_reads_however_it_was_started(spawn):
    with Program(["-c", FLEET, json.dumps({"spawn": spawn})]) as program:
        port, *pids = map(int, program.until("ready"))
        pid, found = told(f"127.0.0.1:{port}")
        assert pid in pids and found == sorted(pids)
        program.signal(signal.SIGTERM)
        assert program.wait() == 0


def test_workers_of_a_reload_count_and_read_too():
    with Program(["-c", FLEET, "{}"]) as program:
        port, *old = map(int, program.until("ready"))
        program.signal(signal.SIGHUP)
        program.until_logged("reloaded")
        pid, found = told(f"127.0.0.1:{port}")
        assert pid in found and not set(found) & set(old)
        program.signal(signal.SIGTERM)
        assert program.wait() == 0


def test_while_a_slot_is_vacant_others_answer_what_is_hashed_to_it():
    options = {"reuseport": True, "recover_interval": 60.0}
    with Program(["-c", FLEET, json.dumps(options)]) as program:
        port, victim, survivor = map(int, program.until("ready"))
        os.kill(victim, signal.SIGKILL)
        program.until_logged("recovering")
        assert {told(f"127.0.0.1:{port}")[0] for _ in range(32)} == {survivor}
        program.signal(signal.SIGTERM)
        assert program.wait() == 0


WORKERS = """
from prefork import Prefork, Server

def ready(pids):
    told = [worker.row["pid"] for worker in prefork.workers]
    print("told", told == pids, {worker.row["slot"] for worker in prefork.workers})
    prefork.shutdown()

prefork = Prefork(Server(lambda request: b""), workers=2, on_master_ready=ready)
prefork.listen_and_serve("127.0.0.1:0")
"""


def test_workers_tells_the_row_of_each():
    with Program(["-c", WORKERS]) as program:
        assert program.until("told") == ["True", "{0,", "1}"]
        assert program.wait() == 0
