"""How evenly workers share the load: `python benchmarks/evenness.py`.

Two and four workers (--workers) serve 512 connections (--connections) that wrk makes,
for a minute each (--seconds), from one shared socket and from a socket for each slot:

    kept    each connection carries request after request
    new     each carries one

Told are the requests that each worker has counted in its row of the scoreboard, the
most by the least, and the connections that each held amid. 1.1 is the bound for
two workers, 1.2 for more; exits with 1 if it is missed. The app runs as `evenness.py
--serve`, in a process of its own.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import IO

import load

LOADS = {"kept": [], "new": ["--header=Connection: close"]}


def serve(workers: int, reuseport: bool) -> None:
    """Serve; tell the port, then what each worker has counted, whenever asked."""
    from prefork import Prefork, Server

    def app(request: object) -> bytes:
        return b"Hello, World!"

    def answer() -> None:
        for _ in sys.stdin:
            assert prefork.scoreboard is not None
            print(json.dumps(prefork.scoreboard.rows()), flush=True)

    def ready(pids: list[int]) -> None:
        print(prefork.address[1], flush=True)
        threading.Thread(target=answer, daemon=True).start()

    prefork = Prefork(
        Server(app),
        workers=workers,
        reuseport=reuseport,
        on_master_ready=ready,
        log_level="error",
    )
    prefork.listen_and_serve("127.0.0.1:0")


@dataclass
class Fleet:
    """A server that runs, in a process of its own."""

    port: int
    questions: IO[str]
    answers: IO[str]

    def rows(self) -> list[dict[str, int]]:
        print(file=self.questions, flush=True)
        found: list[dict[str, int]] = json.loads(self.answers.readline())
        return sorted(found, key=lambda row: row["slot"])


@contextmanager
def serving(workers: int, reuseport: bool) -> Iterator[Fleet]:
    command = [sys.executable, __file__, "--serve", f"--workers={workers}"]
    if reuseport:
        command.append("--reuseport")
    pipe = subprocess.PIPE
    program = subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True)
    assert program.stdin is not None and program.stdout is not None
    try:
        port = int(program.stdout.readline())
        yield Fleet(port, program.stdin, program.stdout)
    finally:
        program.send_signal(signal.SIGTERM)
        program.communicate()


def measure(options: argparse.Namespace, name: str, workers: int, slots: bool) -> bool:
    """One load on one fleet; whether it was even."""
    with serving(workers, slots) as fleet:
        command = [load.wrk(), "--threads=2", f"--connections={options.connections}"]
        command += [f"--duration={options.seconds}", "--timeout=5", *LOADS[name]]
        command.append(f"http://127.0.0.1:{fleet.port}/")
        wrk = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        with contextlib.suppress(subprocess.TimeoutExpired):
            wrk.wait(options.seconds / 2)
        held = [row["connections"] for row in fleet.rows()]
        text = wrk.communicate()[0]
        rows = fleet.rows()
    counts = [row["requests"] for row in rows]
    ratio, bound = max(counts) / max(min(counts), 1), 1.1 if workers == 2 else 1.2
    print(
        f"{'slots' if slots else 'shared':6}  {name:4}  {workers} workers:"
        f"  {ratio:.3f} of {bound}  ({', '.join(f'{count:,}' for count in counts)};"
        f" connections {held}, passed on {sum(row['passed_on'] for row in rows):,},"
        f" errors {load.errors(text)})",
        flush=True,
    )
    return ratio <= bound


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--workers", type=int, nargs="+", default=[2, 4])
    parser.add_argument("--connections", type=int, default=512)
    parser.add_argument("--seconds", type=int, default=60)
    parser.add_argument("--loads", nargs="+", choices=LOADS, default=list(LOADS))
    parser.add_argument("--modes", nargs="+", default=["shared", "slots"])
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--reuseport", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve:
        serve(options.workers[0], options.reuseport)
        return 0
    even = [
        measure(options, name, workers, mode == "slots")
        for workers in options.workers
        for mode in options.modes
        for name in options.loads
    ]
    return int(not all(even))


if __name__ == "__main__":
    sys.exit(main())
