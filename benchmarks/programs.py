"""The C programs of this directory, compiled anew when their sources are newer; and the
certificates that servers are measured with.
"""

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
    command += [*map(str, files), "-lssl", "-lcrypto", "-lz"]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise ProgramError(f"{name} does not compile: {done.stderr.strip()[:400]}")
    return str(out)


KEYS = {
    "ec": ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256"],
    "rsa": ["-newkey", "rsa:2048"],
}


def certificate(kind: str) -> tuple[Path, Path]:
    """A certificate of localhost, signed by itself, and its key: made once, kept."""
    cert, key = BUILD / f"{kind}.pem", BUILD / f"{kind}.key.pem"
    if cert.exists() and key.exists():
        return cert, key
    if shutil.which("openssl") is None:
        raise ProgramError("a certificate needs openssl: apt-get install openssl")
    BUILD.mkdir(parents=True, exist_ok=True)
    command = ["openssl", "req", "-x509", *KEYS[kind], "-nodes", "-days", "3650"]
    command += ["-subj", "/CN=localhost", "-addext", "subjectAltName=DNS:localhost"]
    command += ["-keyout", str(key), "-out", str(cert)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise ProgramError(f"openssl made no certificate: {done.stderr.strip()[:400]}")
    return cert, key


def _newest(*files: Path) -> float:
    return max(file.stat().st_mtime for file in files)
