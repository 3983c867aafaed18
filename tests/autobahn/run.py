"""Run the Autobahn test suite against an echo server: `make autobahn`.

    python tests/autobahn/run.py --cases '1.*,12.1.*'
    python tests/autobahn/run.py --app handler
    python tests/autobahn/run.py --server 'uvicorn echo:app --port {port}'

The suite's client (wstest, for Python 2.7) plays its cases against a server that is
started here, on a free port. A case is passed when its behaviour and its close are OK
or informational; any other outcome, a case that was not played, and a server that ends
on the way are failures, with exit code 1. Reports are left in build/autobahn/reports.
"""

from __future__ import annotations

import argparse
import ast
import json
import os
import re
import select
import shlex
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

HERE = Path(__file__).parent
BUILD = HERE.parent.parent / "build" / "autobahn"
PATH = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])

# A worker that crashes ends the server: nothing is hidden by its successor.
PREFORK = (
    "prefork echo:{app} --bind 127.0.0.1:{port} --workers 1 --recover-threshold 0"
    " --log-level warning"
)
SECTIONS = {
    "1": "framing",
    "2": "pings and pongs",
    "3": "reserved bits",
    "4": "opcodes",
    "5": "fragmentation",
    "6": "UTF-8",
    "7": "close handshake",
    "9": "limits and performance",
    "10": "automatic fragmentation",
    "12": "compression, by data",
    "13": "compression, by parameters",
}
PASSED = ("OK", "INFORMATIONAL")

START_SECONDS = 20.0
STALL_SECONDS = 120.0  # no case takes that long
STOP_SECONDS = 10.0
DAY_MS = 86_400_000


class Failure(Exception):
    """The suite could not be run to its end: why."""


@dataclass(frozen=True)
class Case:
    """What the suite says of one of its cases."""

    name: str
    behaviour: str
    close: str
    seconds: float
    report: Path

    @property
    def section(self) -> str:
        return self.name.partition(".")[0]

    @property
    def passed(self) -> bool:
        return self.behaviour in PASSED and self.close in PASSED

    @property
    def outcome(self) -> str:
        """One word for both, the worse."""
        if self.behaviour not in PASSED:
            return self.behaviour
        return self.behaviour if self.close in PASSED else self.close


def main() -> int:
    options = parse()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    signal.signal(signal.SIGHUP, lambda *_: sys.exit(128 + signal.SIGHUP))
    options.reports.mkdir(parents=True, exist_ok=True)
    for old in (*options.reports.glob("index.*"), *options.reports.glob("*_case_*")):
        old.unlink()
    try:
        with serving(options) as port:
            wanted = play(options, port)
        cases = read_reports(options.reports)
        print_table(cases)
        return verdict(wanted, cases)
    except Failure as failure:
        print(f"autobahn: {failure}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 128 + signal.SIGINT


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--cases", type=patterns, default="*", help="patterns, as '1.*,12.1.*'; all")
    add("--app", choices=("app", "handler"), default="app", help="of echo.py: ASGI's")
    add(
        "--server", default=PREFORK, help="another command; {port} and {app} are put in"
    )
    add("--wstest", type=absolute, default=BUILD / "wstest" / "bin" / "wstest")
    add(
        "--reports",
        type=absolute,
        default=BUILD / "reports",
        help="what was left there is removed",
    )
    return parser.parse_args()


def absolute(text: str) -> Path:
    """wstest runs elsewhere."""
    return Path(text).absolute()


def patterns(text: str) -> list[str]:
    return re.split(r"[,\s]+", text.strip())


# ---- Processes -----------------------------------------------------------------------


@dataclass(frozen=True)
class Process:
    """A process by its pidfd: it is not reaped before it is done with."""

    fd: int
    stdout: IO[bytes] | None

    def has_ended(self, seconds: float = 0) -> bool:
        return bool(select.select([self.fd], [], [], seconds)[0])


@contextmanager
def started(command: Sequence[str], **options: Any) -> Iterator[Process]:
    """A process in a session of its own, which Ctrl-C does not reach: it is ended here,
    and whoever it leaves behind."""
    try:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            start_new_session=True,
            env=os.environ | {"PATH": PATH, "PYTHONUNBUFFERED": "1"},
            **options,
        )
    except OSError as error:
        raise Failure(f"{command[0]} does not start: {error.strerror}") from None
    fd = os.pidfd_open(process.pid)
    handle = Process(fd, process.stdout)
    try:
        yield handle
    finally:
        try:
            signal.pidfd_send_signal(fd, signal.SIGTERM)
            ended = handle.has_ended(STOP_SECONDS)
        finally:  # also if somebody grows impatient
            with suppress(ProcessLookupError):  # so long, its number is nobody else's
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            os.close(fd)
    if not ended:
        raise Failure(f"{command[0]} had to be killed")


@contextmanager
def serving(options: argparse.Namespace) -> Iterator[int]:
    """The server under test; its port."""
    port = free_port()
    known = {"port": port, "app": options.app}
    command = [word.format(**known) for word in shlex.split(options.server)]
    log = options.reports / "server.log"
    with (
        log.open("wb", buffering=0) as out,
        started(command, cwd=HERE, stdout=out, stderr=out) as server,
    ):
        deadline = time.monotonic() + START_SECONDS
        while not accepts(port):
            if server.has_ended(0.05) or time.monotonic() > deadline:
                raise Failure(f"the server does not start: {tail(log)}")
        try:
            yield port
        except Failure as failure:
            if server.has_ended():
                raise Failure(f"{failure}\nthe server has ended: {tail(log)}") from None
            raise
        if server.has_ended():
            raise Failure(f"the server has ended: {tail(log)}")


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


def accepts(port: int) -> bool:
    with socket.socket() as sock:
        return sock.connect_ex(("127.0.0.1", port)) == 0


def tail(log: Path) -> str:
    return "\n".join(log.read_text(errors="replace").splitlines()[-20:])


# ---- The suite -----------------------------------------------------------------------


def play(options: argparse.Namespace, port: int) -> list[str]:
    """Plays the cases; the names of those that there are."""
    spec = options.reports / "spec.json"
    log = options.reports / "wstest.log"
    server = {"agent": "server", "url": f"ws://127.0.0.1:{port}"}
    told = {"outdir": str(options.reports), "servers": [server], "cases": options.cases}
    spec.write_text(json.dumps(told))
    command = [str(options.wstest), "--mode=fuzzingclient", f"--spec={spec}"]
    wanted: list[str] = []
    section = ""
    with (
        log.open("wb", buffering=0) as out,
        started(
            command,
            cwd=options.reports,
            stdout=subprocess.PIPE,
            stderr=out,
        ) as process,
    ):
        for line in lines(process):
            out.write(line + b"\n")
            text = line.decode(errors="replace")
            if text.startswith("Cases = "):
                wanted = ast.literal_eval(text.partition(" = ")[2])
                if not wanted:  # which it would play for ever
                    raise Failure(f"no case is called {' or '.join(options.cases)}")
            match = re.match(r"Running test case ID ((\d+)\.\S+)", text)
            if match and match[2] != section:
                section = match[2]
                print(f"section {section}, {SECTIONS.get(section, '')}", flush=True)
            if " failed (" in text:
                raise Failure(text)
    return wanted


def lines(process: Process) -> Iterator[bytes]:
    """What it prints, until it ends; a Failure when it is silent for too long."""
    assert process.stdout
    line = b"nothing"
    kept = b""
    with process.stdout as stream:
        while select.select([stream], [], [], STALL_SECONDS)[0]:
            data = os.read(stream.fileno(), 1 << 16)
            if not data:
                return
            *whole, kept = (kept + data).split(b"\n")
            for line in whole:
                yield line
    raise Failure(f"stalled for {STALL_SECONDS:.0f} s after: {line.decode()}")


def read_reports(reports: Path) -> list[Case]:
    try:
        told = json.loads((reports / "index.json").read_text())["server"]
    except (FileNotFoundError, KeyError):
        raise Failure(
            f"wstest gave no report: {tail(reports / 'wstest.log')}"
        ) from None
    cases = [
        Case(
            name,
            case["behavior"],
            case["behaviorClose"],
            # One that got no connection is timed from 1970 on.
            case["duration"] / 1000 if case["duration"] < DAY_MS else 0.0,
            reports / case["reportfile"],
        )
        for name, case in told.items()
    ]
    return sorted(cases, key=lambda case: [int(part) for part in case.name.split(".")])


# ---- What is told --------------------------------------------------------------------


def print_table(cases: list[Case]) -> None:
    row = "{:>7}  {:<27} {:>5} {:>5} {:>13} {:>10} {:>6} {:>8}"
    heads = ("section", "", "cases", "ok", "informational", "non-strict", "failed")
    print(row.format(*heads, "seconds"))
    for section in dict.fromkeys(case.section for case in cases):
        here = [case for case in cases if case.section == section]
        print(row.format(section, SECTIONS.get(section, ""), *counts(here)))
    print(row.format("all", "", *counts(cases)))


def counts(cases: list[Case]) -> tuple[object, ...]:
    by = Counter(case.outcome for case in cases)
    known = [by.pop(outcome, 0) for outcome in (*PASSED, "NON-STRICT")]
    seconds = sum(case.seconds for case in cases)
    return len(cases), *known, by.total(), f"{seconds:.1f}"


def verdict(wanted: list[str], cases: list[Case]) -> int:
    """Names what failed. The exit code."""
    failed = [case for case in cases if not case.passed]
    for case in failed:
        print(f"\n{case.name}: {case.behaviour}, close: {case.close}")
        details = json.loads(case.report.with_suffix(".json").read_text())
        print(f"  {plain(details['description'])}")
        print(f"  {plain(details['result'])}; {plain(details['resultClose'])}")
        print(f"  {case.report.with_suffix('.html')}")
    absent = sorted(set(wanted) - {case.name for case in cases})
    if absent:
        print(f"\nnot played: {', '.join(absent)}")
    if failed:
        print(f"\nfailed: {', '.join(case.name for case in failed)}")
    return 1 if failed or absent else 0


def plain(text: str) -> str:
    """A sentence of the suite's reports, which are HTML."""
    return " ".join(re.sub(r"<[^>]*>", " ", text).split())


if __name__ == "__main__":
    sys.exit(main())
