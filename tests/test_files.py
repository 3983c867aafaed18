"""Bodies that are files: uploads that were spilled, answers that are sent from disk.

The bridge alone, without a server above it: a loop in a process of its own, whose
memory can be watched, does with each request what a few lines of script say.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from pathlib import Path

import h11
import pytest
from live import Client, chunk, get
from programs import Program

MIB = 1 << 20

SERVER = """
import hashlib, os, socket, sys
from prefork import _core

def peak():
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) for line in status if line[:6] == "VmHWM:")

def say(*words):
    print(*words, flush=True)

class File:
    '''What says that the core has let go of it.'''

    def __init__(self, path):
        self.fd = os.open(path, os.O_RDWR)

    def fileno(self):
        return self.fd

    def __del__(self):
        os.close(self.fd)
        say("released")

def descriptors():
    return len(os.listdir("/proc/self/fd"))

{handler}

listener = socket.create_server(("127.0.0.1", 0))
open_before = descriptors()
loop = _core.Loop(notices=True, **{options!r})
loop.listen(listener.fileno())
path = sys.argv[1]
before = peak()
say("ready", listener.getsockname()[1])
serving = True
while serving:
    for flags, request, code in loop.wait():
        if flags & _core.REQUEST and request.target == b"/stop":
            serving = False
            request.respond(200, [], b"")
        elif flags & _core.CLOSED:
            say("closed", code)
            request.abort()
        elif flags & _core.REQUEST:
            handle(request)
    for kind, _, _, error in loop.notices():
        if kind == "error":
            say("error", error)
request = None
loop.flush()
say("grown", (peak() - before) // 1024)
loop.shut()
say("opened", descriptors() - open_before)
"""

Start = Callable[..., "Served"]


class Served:
    """A loop with this handler in a process of its own."""

    def __init__(self, handler: str, path: Path, options: dict[str, object]) -> None:
        script = SERVER.format(handler=handler, options=options)
        self.program = Program(["-c", script, str(path)])
        self.address = ("127.0.0.1", int(self.program.until("ready")[0]))

    def stop(self) -> None:
        """Afterwards the program has told "grown" (MiB) and "opened" (descriptors)."""
        with Client(self.address) as client:
            client.ask(get("/stop"))
        assert self.program.wait() == 0, self.program.stderr

    def told(self, event: str) -> int:
        ((_, number),) = self.program.events(event)
        return int(number)


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    """start(handler, **options): a Served; in the end no descriptor of it is left."""
    running = []

    def serve(handler: str, **options: object) -> Served:
        running.append(Served(handler, tmp_path / "file", options))
        return running[-1]

    try:
        yield serve
    finally:
        for served in running:
            with served.program:
                pass


def pieces(total: int) -> Iterator[bytes]:
    """Bytes of which no two stretches are alike, 64 KiB at once."""
    for at in range(0, total, 65536):
        stretch = hashlib.shake_128(at.to_bytes(8, "big")).digest(65536)
        yield stretch[: total - at]


def sha256(parts: Iterator[bytes]) -> str:
    found = hashlib.sha256()
    for part in parts:
        found.update(part)
    return found.hexdigest()


# ---- uploads -------------------------------------------------------------------------

UPLOAD = """
def handle(request):
    found = request.body_file()
    if found is None:
        body = request.take_body()
        request.respond(200, [], b"memory %d" % len(body))
        return
    assert request.body_file() is None and request.take_body() == b""
    fd, size = found
    digest, part = hashlib.sha256(), memoryview(bytearray(65536))
    with open(fd, "rb", buffering=0) as file:
        while n := file.readinto(part):
            digest.update(part[:n])
        assert file.tell() == size
    request.respond(200, [], f"file {size} {digest.hexdigest()}".encode())
"""


def upload(served: Served, framing: str, parts: Iterator[bytes]) -> str:
    with Client(served.address) as client:
        client.send(get("/", framing, method="POST"))
        for part in parts:
            client.send(part)
        return client.answer().body.decode()


def test_a_large_upload_is_spilled_and_hardly_held(start):
    served = start(UPLOAD, body_buffer_size=MIB)
    size = 20 * MIB
    told = upload(served, f"Content-Length: {size}", pieces(size))
    assert told == f"file {size} {sha256(pieces(size))}"
    served.stop()
    assert served.told("grown") < 8
    assert served.told("opened") == 0


def test_a_chunked_upload_is_spilled_without_its_framing(start):
    served = start(UPLOAD, body_buffer_size=MIB)
    size = 20 * MIB
    framed = (chunk(part) for part in [*pieces(size), b""])
    told = upload(served, "Transfer-Encoding: chunked", framed)
    assert told == f"file {size} {sha256(pieces(size))}"
    served.stop()
    assert served.told("grown") < 8


def test_an_upload_within_the_limit_stays_in_memory(start):
    served = start(UPLOAD, body_buffer_size=1000)
    assert upload(served, "Content-Length: 1000", pieces(1000)) == "memory 1000"
    served.stop()


def test_without_a_limit_an_upload_stays_in_memory(start):
    served = start(UPLOAD)
    assert upload(served, "Content-Length: 100000", pieces(100000)) == "memory 100000"
    served.stop()


def test_a_file_that_nobody_takes_is_closed_with_its_request(start):
    served = start("handle = lambda r: r.respond(200, [], b'')", body_buffer_size=1000)
    assert upload(served, "Content-Length: 5000", pieces(5000)) == ""
    served.stop()
    assert served.told("opened") == 0


def test_an_upload_that_cannot_be_stored_is_answered_503(start):
    served = start(UPLOAD, body_buffer_size=1000, spill_dir="/nowhere")
    with Client(served.address) as client:
        client.send(get("/", "Content-Length: 5000", method="POST"))
        client.send(bytes(5000))
        answer = client.answer()
    assert (answer.status, answer.closes) == (503, True)
    assert answer.body == b"request body could not be stored\n"
    served.stop()
    (first, second) = served.program.events("error")
    assert "No such file or directory" in " ".join(first)
    assert "could not be stored" in " ".join(second)


# ---- answers -------------------------------------------------------------------------

FILE = """
def handle(request):
    file = File(path)
    size = os.fstat(file.fd).st_size
    request.begin(200, [], size)
    say("pending", request.write_file(file, 0, size))
    request.end()
"""


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "file"


def fill(path: Path, size: int) -> None:
    with path.open("wb") as file:
        file.writelines(pieces(size))


def test_a_large_file_reaches_a_slow_reader_and_is_not_read_into_memory(start, path):
    size = 64 * MIB
    fill(path, size)
    served = start(FILE)
    with Client(served.address, receive_buffer=65536) as client:
        client.send(get())
        assert b"Content-Length: %d\r\n" % size in client.until(b"\r\n\r\n")
        assert int(served.program.until("pending")[0]) > size
        assert served.program.events("released") == []

        def body() -> Iterator[bytes]:
            left = size
            while left > 0:
                part = client.receive()
                left -= len(part)
                yield part

        assert sha256(body()) == sha256(pieces(size))
        served.program.until("released")
    served.stop()
    assert served.told("grown") < 8
    assert served.told("opened") == 0


def test_an_answer_to_head_lets_go_of_the_file_at_once(start, path):
    fill(path, 100000)
    served = start(FILE)
    with Client(served.address) as client:
        answer = client.ask(get(method="HEAD"))
        assert (answer["content-length"], answer.body) == ("100000", b"")
        served.program.until("released")
        assert client.ask(get()).body == b"".join(pieces(100000))
    served.stop()


def test_a_part_of_a_file_is_a_chunk_among_others(start, path):
    fill(path, 100000)
    served = start("""
def handle(request):
    request.begin(200, [])
    request.write(b"before")
    request.write_file(File(path), 1000, 50000)
    request.write(b"behind")
    request.end()
""")
    with Client(served.address) as client:
        body = client.ask(get()).body
    assert body == b"before" + b"".join(pieces(100000))[1000:51000] + b"behind"
    served.program.until("released")
    served.stop()


def test_a_file_that_is_cut_while_it_is_sent_cuts_its_answer(start, path):
    fill(path, 100000)
    served = start("""
def handle(request):
    file = File(path)
    request.begin(200, [], 100000)
    request.write_file(file, 0, 100000)
    os.truncate(file.fd, 50000)
    request.end()
""")
    with Client(served.address) as client:
        with pytest.raises((ConnectionResetError, h11.RemoteProtocolError)):
            client.ask(get())
        served.program.until("released")
    assert "file ends before" in " ".join(served.program.until("error"))
    served.stop()


def test_what_cannot_be_sent_raises_while_another_answer_is_possible(start, path):
    fill(path, 1000)
    served = start("""
def handle(request):
    request.begin(200, [])
    said = []
    for file, length in [(File(path), 1001), (os.pipe()[0], 1), (object(), 1)]:
        try:
            request.write_file(file, 0, length)
        except (_core.ProtocolError, OSError, TypeError) as error:
            said.append(type(error).__name__)
    request.reset()
    request.respond(500, [], " ".join(said).encode())
""")
    with Client(served.address) as client:
        answer = client.ask(get())
    assert (answer.status, answer.body) == (500, b"ProtocolError OSError TypeError")
    served.stop()


def test_a_reader_that_leaves_lets_go_of_the_file(start, path):
    fill(path, 16 * MIB)
    served = start(FILE)
    client = Client(served.address, receive_buffer=65536)
    client.send(get())
    client.until(b"\r\n\r\n")
    client.reset()
    served.program.until("released")
    served.stop()
    assert served.told("opened") == 0
