"""What the pages say is so: their programs run, their tables name what there is."""

from __future__ import annotations

import re
import signal
import time
from pathlib import Path

import psutil
import pytest
from authority import Authority, tell
from programs import SOON, Program, ask

from prefork import Prefork, cli, errors
from prefork.config import DEFAULTS, OPTIONS, PREFORK, Config, names
from prefork.master import SIGNALS

DOCS = Path(__file__).parent.parent / "docs"
PAGE = (DOCS / "prefork.md").read_text()
PAGES = PAGE + (DOCS / "wsgi.md").read_text() + (DOCS / "asgi.md").read_text()
PROGRAMS = re.findall(r"```python\n# (\w+)\.py\n(.*?)```", PAGES, re.DOTALL)
SECURE = (DOCS / "tls.md").read_text()
SECURED = re.findall(r"```python\n# (\w+)\.py\n(.*?)```", SECURE, re.DOTALL)
CLOSE = b"GET / HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n"


def section(title: str) -> str:
    return re.search(rf"^## {title}\n(.*?)(?=^## |\Z)", PAGE, re.DOTALL | re.M)[1]


def until_asleep(program: Program) -> None:
    """Await that none of its workers has anything to do."""
    deadline = time.monotonic() + SOON
    workers = psutil.Process(program.pid).children()
    while any(worker.status() != psutil.STATUS_SLEEPING for worker in workers):
        assert time.monotonic() < deadline


@pytest.mark.parametrize(("name", "source"), PROGRAMS, ids=[n for n, _ in PROGRAMS])
def test_each_program_of_the_page_runs(tmp_path, name, source):
    path = tmp_path / f"{name}.py"
    path.write_text(source.replace('":8080"', '"127.0.0.1:0"'))
    with Program([str(path)]) as program:
        address = re.search(r"127\.0\.0\.1:\d+", program.until_logged("serving on"))[0]
        assert ask(address, CLOSE).startswith(b"HTTP/1.1 200 OK\r\n")
        until_asleep(program)  # a stranger's server cannot be stopped while it starts
        program.signal(signal.SIGTERM)
        assert program.wait() == 0, program.stderr
        assert "Traceback" not in program.stderr


@pytest.mark.parametrize(("name", "source"), SECURED, ids=[n for n, _ in SECURED])
def test_each_program_of_the_page_of_tls_runs(tmp_path, name, source):
    authority = Authority(tmp_path)  # with a ca.pem
    for file, key in (("cert", "key.pem"), ("other", "other.key")):
        issued = authority.issue(file=file)
        issued.key.rename(tmp_path / key)
    (tmp_path / f"{name}.py").write_text(source.replace('":8443"', '"127.0.0.1:0"'))
    with Program([f"{name}.py"], cwd=tmp_path) as program:
        address = re.search(r"127\.0\.0\.1:\d+", program.until_logged("serving on"))[0]
        answer = tell(address, authority.trusting(), message=CLOSE)
        assert answer.startswith(b"HTTP/1.1 200 OK\r\n")
        until_asleep(program)
        program.signal(signal.SIGTERM)
        assert program.wait() == 0, program.stderr
        assert "Traceback" not in program.stderr


def test_there_are_programs():
    assert len(PROGRAMS) == PAGES.count("```python")
    assert len(SECURED) == SECURE.count("```python")


def test_the_flags_on_the_page_of_tls_are_known():
    page = SECURE.partition("| here | gunicorn")
    known = {flag for param in cli.command().params for flag in param.opts}
    ours = re.findall(r"^\| `(--[a-z-]+)`", page[2], re.M)
    told = re.findall(r"(?:prefork main:app|`)[^`\n]*?(--[a-z-]+)", page[0])
    assert ours and told and set(ours + told) <= known


def test_the_file_of_the_page_is_valid(tmp_path):
    path = tmp_path / "prefork.toml"
    path.write_text(re.search(r"```toml\n(.*?)```", PAGE, re.DOTALL)[1])
    config = Config.load({"config_file": path}, environ={})
    assert config.workers == 4 and config.shutdown_grace_period == 30.0


def test_each_attribute_is_in_the_table():
    told = set(re.findall(r"`(\w+)`", section("Attributes")))
    assert set(names(PREFORK)) <= told
    assert told & set(OPTIONS) == set(names(PREFORK))


def test_the_defaults_in_the_table_are_true():
    for line in section("Attributes").splitlines():
        row = [cell.strip() for cell in line.strip("|").split("|")]
        if len(row) != 3 or row[0].strip("`") not in OPTIONS:
            continue
        name, default = row[0].strip("`"), DEFAULTS[row[0].strip("`")]
        if default is not None:
            shown = OPTIONS[name].show(default)
            assert row[1].strip("`").replace(" s", "s") == shown, name


def test_each_public_method_is_in_the_table():
    methods = {name for name in dir(Prefork) if not name.startswith("_")}
    methods -= set(OPTIONS) - {"workers"}
    told = section("Methods")
    for name in methods - {"listen_and_serve_tls_embed"}:
        assert f"`{name}" in told, name


def test_each_callback_is_in_the_table():
    told = section("Callbacks")
    for name in names(PREFORK):
        if name.startswith("on_"):
            assert f"`{name}(" in told, name


def test_each_signal_is_in_the_table():
    told = section("Signals")
    for number in SIGNALS:
        assert signal.Signals(number).name.removeprefix("SIG") in told


def test_each_exit_code_is_in_the_table():
    told = {
        int(code)
        for code in re.findall(
            r"^\| (\d) \|", section("Exit codes of the command"), re.M
        )
    }
    codes = {
        error.exit_code
        for error in vars(errors).values()
        if isinstance(error, type) and issubclass(error, errors.PreforkError)
    }
    assert told == codes | {0, errors.EXIT_OS_ERROR}


def test_the_questions_of_the_command_are_told():
    for flag in cli._questions():
        assert flag.opts[-1] in PAGE
