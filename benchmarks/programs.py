"""The C programs of this directory, compiled anew when their sources are newer."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

HERE = Path(__file__).parent
ROOT = HERE.parent
BUILD = ROOT / "build" / "benchmarks"


class ProgramError(Exception):
    """A program cannot be compiled: why, and the remedy."""


def program(name: str, *sources: Path) -> str:
    out = BUILD / name
    files = [HERE / f"{name}.c", *sources]
    headers = (ROOT / "csrc").glob("*.h")
    if out.exists() and _newest(*files, *headers) < out.stat().st_mtime:
        return str(out)
    compiler = os.environ.get("CC") or shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        raise ProgramError(f"{name} needs a C compiler: apt-get install gcc")
    BUILD.mkdir(parents=True, exist_ok=True)
    options = ["-std=c11", "-O3", "-DNDEBUG", "-D_GNU_SOURCE=", "-pthread"]
    command = [compiler, *options, f"-I{ROOT / 'csrc'}", "-o", str(out)]
    command += [*map(str, files), "-lz"]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise ProgramError(f"{name} does not compile: {done.stderr.strip()[:400]}")
    return str(out)


def _newest(*files: Path) -> float:
    return max(file.stat().st_mtime for file in files)
