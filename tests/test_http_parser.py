"""The HTTP cases against the parser, in the C program tests/c/test_http_cases.c."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest
from http_cases import read_all, write_stream

ROOT = Path(__file__).parents[1]
NAME = "test_http_cases"


def built_program() -> Path | None:
    """The one of $PREFORK_C_TESTS, else the newest that CMake has made."""
    if directory := os.environ.get("PREFORK_C_TESTS"):
        return Path(directory) / NAME
    made = [path for path in ROOT.glob(f"build/*/tests/c/{NAME}") if fresh(path)]
    return max(made, key=lambda path: path.stat().st_mtime, default=None)


def fresh(program: Path) -> bool:
    sources = [ROOT / "tests" / "c" / f"{NAME}.c", *ROOT.glob("csrc/*.[ch]")]
    return program.stat().st_mtime >= max(path.stat().st_mtime for path in sources)


def compile_program(directory: Path) -> Path:
    """With assertions; what is not linked in is not needed."""
    program = directory / NAME
    sources = [ROOT / "tests" / "c" / f"{NAME}.c", *sorted(ROOT.glob("csrc/*.c"))]
    options = ["-std=c11", "-O1", "-g", "-D_GNU_SOURCE=", f"-I{ROOT / 'csrc'}"]
    compiler = os.environ.get("CC", "cc")
    files = ["-o", str(program), *map(str, sources)]
    libraries = ["-pthread", "-lz", "-lssl", "-lcrypto"]
    subprocess.run([compiler, *options, *files, *libraries], check=True)
    return program


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return built_program() or compile_program(tmp_path_factory.mktemp("c"))


def test_parser_gives_every_case_its_outcome(program: Path, tmp_path: Path) -> None:
    cases = read_all()
    stream = tmp_path / "cases"
    with stream.open("w") as out:
        write_stream(cases, out)
    run = subprocess.run([program, stream], capture_output=True, text=True)
    assert (run.returncode, run.stdout) == (0, f"{len(cases)} cases\n"), run.stderr
