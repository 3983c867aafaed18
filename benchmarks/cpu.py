"""What processes cost: CPU time, memory, and what all the others used meanwhile.

The scheduler's own run time (schedstat, nanoseconds) is preferred to the 10 ms ticks of
/proc/<pid>/stat, which stand in where threads or processes came and went in between.
"""

from __future__ import annotations

import os
import resource
import time
from dataclasses import dataclass
from pathlib import Path

PROC = Path("/proc")
TICK_NS = 1_000_000_000 // os.sysconf("SC_CLK_TCK")
LOST_NS = 5 * TICK_NS  # so far schedstat may stay behind the ticks


# ---- Processes ---------------------------------------------------------------------


def tree(pid: int) -> list[int]:
    """The process and all that descend from it, parents first."""
    children: dict[int, list[int]] = {}
    for entry in PROC.iterdir():
        if entry.name.isdigit() and (fields := _stat(int(entry.name))):
            children.setdefault(int(fields[1]), []).append(int(entry.name))
    found = [pid]
    for parent in found:
        found += children.get(parent, [])
    return found


def _stat(pid: int) -> list[str]:
    """Fields of /proc/<pid>/stat behind the name: state, ppid, ...; empty if gone."""
    try:
        return (PROC / str(pid) / "stat").read_text().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return []


def _scheduled_ns(pid: int) -> int:
    total = 0
    try:
        for task in (PROC / str(pid) / "task").iterdir():
            total += int((task / "schedstat").read_text().split()[0])
    except (FileNotFoundError, ProcessLookupError):
        pass
    return total


def pss(pids: list[int]) -> int:
    """Bytes of memory, shared pages divided among those who share them."""
    total = 0
    for pid in pids:
        for line in (PROC / str(pid) / "smaps_rollup").read_text().splitlines():
            if line.startswith("Pss:"):
                total += int(line.split()[1]) * 1024
    return total


# ---- Readings ----------------------------------------------------------------------


@dataclass(frozen=True)
class Reading:
    """The clocks at one moment, in nanoseconds since whenever."""

    wall: int
    scheduled: int
    user: int  # of the server, in ticks
    system: int
    machine: int  # all CPUs, whoever ran, and what the host took away
    ours: int  # this process and the load generators it has waited for


@dataclass(frozen=True)
class Usage:
    """What happened between two readings."""

    seconds: float
    cpu_ns: int
    user_ns: int
    system_ns: int
    foreign: float  # CPUs used by others


def read(pids: list[int]) -> Reading:
    user = system = scheduled = 0
    for pid in pids:
        fields = _stat(pid)
        if fields:
            user += int(fields[11]) + int(fields[13])
            system += int(fields[12]) + int(fields[14])
        scheduled += _scheduled_ns(pid)
    return Reading(
        time.monotonic_ns(),
        scheduled,
        user * TICK_NS,
        system * TICK_NS,
        _machine_ns(),
        _ours_ns(),
    )


def between(before: Reading, after: Reading) -> Usage:
    user, system = after.user - before.user, after.system - before.system
    scheduled = after.scheduled - before.scheduled
    cpu = scheduled if scheduled > user + system - LOST_NS else user + system
    wall = after.wall - before.wall
    foreign = after.machine - before.machine - cpu - (after.ours - before.ours)
    return Usage(wall / 1e9, cpu, user, system, foreign / wall)


def _machine_ns() -> int:
    """User, nice, system, irq, softirq and steal of all CPUs together."""
    fields = (PROC / "stat").read_text().splitlines()[0].split()[1:]
    user, nice, system, _idle, _iowait, irq, softirq, steal = map(int, fields[:8])
    return (user + nice + system + irq + softirq + steal) * TICK_NS


def _ours_ns() -> int:
    total = 0.0
    for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN):
        used = resource.getrusage(who)
        total += used.ru_utime + used.ru_stime
    return int(total * 1e9)


# ---- The machine -------------------------------------------------------------------


def model() -> str:
    for line in (PROC / "cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return os.uname().machine


def cores() -> tuple[int, int]:
    """One CPU for the server, another, if there is one, for the load."""
    allowed = sorted(os.sched_getaffinity(0))
    return allowed[0], allowed[-1]
