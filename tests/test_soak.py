"""Short runs of what benchmarks/ runs for long: uploads at once, and what may stay."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from programs import SANITIZED

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"

MOST = "1000" if SANITIZED else "50"


def run(program: str, *arguments: str) -> str:
    """What it prints; it must end well."""
    command = [sys.executable, BENCHMARKS / program, *arguments]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.parametrize(
    ("interface", "threads"), [("wsgi", 1), ("wsgi", 4), ("native", 1), ("asgi", 1)]
)
def test_large_uploads_at_once_arrive_whole_in_bounded_memory(interface, threads):
    arguments = [interface, "--clients", "8", "--size", "20", "--most", MOST]
    told = run("uploads.py", *arguments, "--threads", str(threads))
    assert "8 x 20 MiB" in told and ", 0 wrong, " in told


@pytest.mark.parametrize("threads", [1, 16])
def test_nothing_of_wsgi_requests_stays(threads):
    told = run("leaks.py", "wsgi", "--requests", "10000", "--threads", str(threads))
    assert "200 " in told and "500 " in told and "left " in told


def test_nothing_of_aborted_asgi_requests_stays():
    assert "left 7,000" in run("leaks.py", "asgi", "--requests", "10000")
