"""Millions of requests of mixed kinds against one worker: does its memory grow?

    python benchmarks/soak.py --requests 10000000

Prints the worker's resident memory after every tenth of the run and exits with 1 if it
grew by more than two percent after the first two tenths.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import time
from pathlib import Path

import psutil

HERE = Path(__file__).parent
TOLERANCE = 1.02


def start() -> tuple[subprocess.Popen[str], int]:
    """The server, and its port."""
    command = [sys.executable, "-m", "prefork", "mixed:app", "--bind", "127.0.0.1:0"]
    command += ["--workers", "1", "--log-level", "critical"]
    command += ["--app-dir", str(HERE / "apps")]
    server = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        for child in psutil.Process(server.pid).children():
            for connection in child.net_connections("tcp"):
                if connection.status == psutil.CONN_LISTEN:
                    return server, connection.laddr.port
        time.sleep(0.05)
    raise SystemExit("the server did not start")


def load(port: int, seconds: float) -> int:
    """Requests that wrk had answered."""
    command = ["wrk", "-t1", "-c64", f"-d{seconds:.0f}", "-s", str(HERE / "mixed.lua")]
    out = subprocess.run(
        [*command, f"http://127.0.0.1:{port}/"], capture_output=True, text=True
    ).stdout
    return int(re.search(r"(\d+) requests in", out)[1])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--requests", type=int, default=10_000_000)
    total = parser.parse_args().requests
    server, port = start()
    try:
        worker = psutil.Process(server.pid).children()[0]
        done, sizes = 0, []
        while done < total:
            tenth = total * (len(sizes) + 1) / 10
            while done < tenth:
                done += load(port, 5)
            sizes.append(worker.memory_info().rss)
            fds = worker.num_fds()
            print(f"{done:>12,} requests  {sizes[-1] / 1024:>9,.0f} KiB  {fds} fds")
    finally:
        server.terminate()
        server.wait()
    grew = sizes[-1] / sizes[min(1, len(sizes) - 1)]
    print(f"grew by {100 * (grew - 1):.2f} % after warm-up")
    return int(grew > TOLERANCE)


if __name__ == "__main__":
    raise SystemExit(main())
