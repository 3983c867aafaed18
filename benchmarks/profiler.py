"""Where a server's time goes under a load, by perf: counters and hot symbols."""

from __future__ import annotations

import contextlib
import re
import shutil
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import load

TOP = 25
COUNTERS = ("task-clock", "context-switches", "cpu-migrations", "page-faults")


class ProfileError(Exception):
    """perf is not here or not permitted: the remedy."""


def check() -> None:
    if shutil.which("perf") is None:
        raise ProfileError("perf is not here: apt-get install linux-perf")
    command = ["perf", "stat", "-e", "task-clock", "true"]
    if subprocess.run(command, capture_output=True).returncode:
        raise ProfileError("perf is not permitted: sysctl kernel.perf_event_paranoid=1")


def profile(scenario: load.Scenario, target: load.Target, scratch: Path) -> str:
    """A report of one run."""
    check()
    data = scratch / "perf.data"
    pids = ",".join(map(str, target.pids))
    record = ["perf", "record", "-e", "cpu-clock", "-F", "1999", "-p", pids]
    stat = ["perf", "stat", "-e", ",".join(COUNTERS), "-p", pids]
    with _interrupted([*record, "-o", str(data)]), _interrupted(stat) as counters:
        sample = scenario.run(scenario, target)
    requests = max(sample.requests, 1)
    text = f"{sample.cpu_us:.2f} µs a request, {requests} requests\n"
    return text + _counters(counters, requests) + _symbols(data)


@contextlib.contextmanager
def _interrupted(command: list[str]) -> Iterator[list[str]]:
    """Runs beside the block and is interrupted after it; then yields what it said."""
    said: list[str] = []
    process = subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )
    try:
        yield said
    finally:
        process.send_signal(signal.SIGINT)
        said.append(process.communicate()[1])


def _counters(said: list[str], requests: int) -> str:
    text = ""
    names = "|".join(COUNTERS)
    pattern = rf"^ +([\d,.]+) +(?:msec )?({names})\b"
    for value, name in re.findall(pattern, "".join(said), re.M):
        count = float(value.replace(",", ""))
        unit = "ms of " if name == "task-clock" else ""
        text += f"{count:12,.0f} {unit}{name}, {count / requests:.4f} a request\n"
    return text


def _symbols(data: Path) -> str:
    """The hottest symbols of user space, and what share the kernel has."""
    command = ["perf", "report", "-i", str(data), "--stdio", "--no-children"]
    command += ["--sort", "symbol,dso", "--percent-limit", "0.05"]
    done = subprocess.run(command, capture_output=True, text=True)
    pattern = r"^ +([\d.]+)% +\[(.)\] +(.+?) {2,}(\S+)"
    rows = re.findall(pattern, done.stdout, re.M)
    kernel = sum(float(share) for share, kind, *_ in rows if kind == "k")
    text = f"kernel {kernel:.1f}%; in user space:\n"
    user = [row for row in rows if row[1] == "."]
    for share, _, symbol, home in user[:TOP]:
        text += f"{float(share):6.2f}%  {symbol}  {home}\n"
    return text
