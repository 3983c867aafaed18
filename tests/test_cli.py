"""The command line: what it starts, and what it says to a mistake."""

from __future__ import annotations

import errno
import os
import signal
import socket
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path

import click
import pytest
from programs import Program, ask, connect, kill, read_all

from prefork import cli
from prefork.config import DEFAULTS, OPTIONS, Config, variable

HELLO = """
    import os

    def app(request):
        return str(os.getpid())

    def wsgi(environ, start_response):
        return []

    def asgi2(scope):
        return None

    class Asgi2:
        def __init__(self, scope):
            pass

        async def __call__(self, receive, send):
            pass

    class Application:
        def __call__(self, environ, start_response):
            start_response("200 OK", [("Content-Type", "text/plain")])
            return [environ["SCRIPT_NAME"].encode()]

    class Nested:
        handler = app

    async def asgi(scope, receive, send):
        if scope["type"] == "http":
            await send({"type": "http.response.start", "status": 200})
            await send({"type": "http.response.body"})

    application = Application()
    number = 3
    flexible = lambda *args: b""
"""

REQUEST = b"GET / HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n"

Run = Callable[..., Program]


@pytest.fixture
def run(tmp_path: Path) -> Iterator[Run]:
    """Run `python -m prefork ARGUMENTS` beside a module hello; nothing may be left."""
    (tmp_path / "hello.py").write_text(textwrap.dedent(HELLO))
    programs: list[Program] = []

    def run(*arguments: str, **env: str) -> Program:
        program = Program(["-m", "prefork", *arguments], env=env, cwd=tmp_path)
        programs.append(program)
        return program

    yield run
    for program in programs:
        with program:
            pass


def mistake(program: Program, code: int) -> str:
    """The one line about a mistake that ends with this exit code."""
    assert program.wait() == code, program.stderr
    assert program.told == []
    lines = program.stderr.splitlines()
    assert len(lines) == 1 and lines[0].startswith("prefork: "), program.stderr
    return lines[0].removeprefix("prefork: ")


# ---- Serving -------------------------------------------------------------------------


def serving(program: Program, path: Path) -> str:
    """Await the log line that names the address."""
    address = f"unix:{path}"
    assert address in program.until_logged("serving on")
    return address


def test_it_serves_until_it_is_told_to_stop(run, tmp_path):
    path = tmp_path / "sock"
    program = run("hello:app", "--bind", f"unix:{path}", "--workers", "2")
    address = serving(program, path)
    answer = ask(address, REQUEST)
    assert answer.startswith(b"HTTP/1.1 200 OK\r\n")
    worker = int(answer.rpartition(b"\r\n")[2])
    assert worker != program.pid
    kill(worker)
    program.until_logged("killed by SIGKILL")
    assert ask(address, REQUEST).startswith(b"HTTP/1.1 200 OK\r\n")
    program.signal(signal.SIGTERM)
    assert program.wait() == 0
    assert not path.exists()
    for said in ("with 2 workers", "SIGTERM: stopping", "stopped"):
        assert said in program.stderr


def test_options_come_from_the_environment_too(run, tmp_path):
    path = tmp_path / "sock"
    program = run(
        PREFORK_APP="hello:app", PREFORK_BIND=f"unix:{path}", PREFORK_WORKERS="1"
    )
    assert ask(serving(program, path), REQUEST).startswith(b"HTTP/1.1 200 OK\r\n")
    assert "with 1 workers" in program.stderr
    program.signal_group(signal.SIGINT)
    assert program.wait() == 0


@pytest.mark.parametrize("app", ["app", "application", "asgi"])
def test_who_never_says_all_of_a_request_does_not_have_a_worker_killed(
    run, tmp_path, app
):
    """Its header_timeout is longer than the grace period; nor does it leave then."""
    path = tmp_path / "sock"
    program = run(f"hello:{app}", f"-bunix:{path}", "-w1", "--shutdown-grace-period=4")
    with connect(serving(program, path)) as client:
        client.sendall(REQUEST[:-2])
        assert ask(f"unix:{path}", REQUEST).startswith(b"HTTP/1.1 200 ")  # it was read
        program.signal(signal.SIGTERM)
        assert read_all(client).startswith(b"HTTP/1.1 408 ")
        assert program.wait() == 0
    assert "grace period over" not in program.stderr


def test_limits_reach_the_server(run, tmp_path):
    path = tmp_path / "sock"
    program = run(
        *["hello:app", "-b", f"unix:{path}", "-w", "1"],
        *["--name", "mine", "--max-target-size", "64"],
    )
    address = serving(program, path)
    assert b"\r\nServer: mine\r\n" in ask(address, REQUEST)
    long = REQUEST.replace(b"/ ", b"/" + b"x" * 64 + b" ")
    assert ask(address, long).startswith(b"HTTP/1.1 414 ")
    program.signal(signal.SIGTERM)
    assert program.wait() == 0


def test_an_app_is_found_where_app_dir_says(run, tmp_path):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "other.py").write_text("def app(request): return 'ok'")
    path = tmp_path / "sock"
    program = run("other:app", "--app-dir", "elsewhere", "-b", f"unix:{path}", "-w1")
    assert ask(serving(program, path), REQUEST).endswith(b"\r\n\r\nok")
    program.signal(signal.SIGTERM)
    assert program.wait() == 0


def test_chdir_comes_before_all_else(run, tmp_path):
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "other.py").write_text("def app(request): return 'ok'")
    program = run("other:app", "--chdir", "there", "-b", "unix:sock", "-w1")
    path = tmp_path / "there" / "sock"
    assert ask(serving(program, path), REQUEST).endswith(b"\r\n\r\nok")
    program.signal(signal.SIGTERM)
    assert program.wait() == 0


# ---- Mistakes: 2, an option ----------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ([], "app is missing: prefork MODULE:ATTR, like main:handler"),
        (["hello"], "app must be MODULE:ATTR, like main:handler, not 'hello'"),
        (["hello:"], "app must be MODULE:ATTR, like main:handler, not 'hello:'"),
        (
            ["hello.py:app"],
            "app must name a module, not a file: hello:app, not 'hello.py:app'",
        ),
        (
            ["./sub/hello.py:app"],
            "app must name a module, not a file: sub.hello:app, "
            "not './sub/hello.py:app'",
        ),
        (["hello:app", "--workers", "0"], "workers must be at least 1, not 0"),
        (["hello:app", "-w", "x"], "workers must be a whole number, not 'x'"),
        (
            ["hello:app", "--network", "udp"],
            "network must be one of tcp, tcp4, tcp6, unix, not 'udp'",
        ),
        (
            ["hello:app", "--bind", "8000"],
            "address must be HOST:PORT, :PORT, [IPV6]:PORT, unix:PATH or fd://N, "
            "not '8000'",
        ),
        (
            ["hello:app", "--chdir", "/no/such"],
            "chdir must be a directory to enter, not '/no/such' "
            "(no such file or directory)",
        ),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_wrong_option_gives_one_line_and_2(run, arguments, text):
    assert mistake(run(*arguments), 2) == text


def test_a_wrong_variable_is_named(run):
    text = mistake(run("hello:app", PREFORK_WORKERS="many"), 2)
    assert text == "workers must be a whole number, not 'many' (from PREFORK_WORKERS)"


@pytest.mark.parametrize("arguments", [["--worker", "3"], ["--bind"], ["extra"]])
def test_an_unknown_option_gives_one_line_and_2(run, arguments):
    assert "See prefork --help." in mistake(run("hello:app", *arguments), 2)


@pytest.mark.parametrize(
    ("app", "interface", "text"),
    [
        ("asgi2", "auto", "asgi2 is an ASGI 2 app, app(scope)(receive, send); wrap"),
        ("Asgi2", "asgi", "Asgi2 is an ASGI 2 app, app(scope)(receive, send); wrap"),
        (
            "flexible",
            "auto",
            "cannot tell the interface of <lambda> by its 0 parameters",
        ),
    ],
)
def test_an_interface_that_is_not_served_says_so(run, app, interface, text):
    assert mistake(run(f"hello:{app}", "--interface", interface), 2).startswith(text)


def test_a_wsgi_app_is_known_by_its_parameters(run, tmp_path):
    path = tmp_path / "sock"
    program = run("hello:application", "--bind", f"unix:{path}", "--root-path", "/shop")
    assert ask(serving(program, path), REQUEST).endswith(b"\r\n\r\n/shop")
    program.signal(signal.SIGTERM)
    assert program.wait() == 0


# ---- Mistakes: 4, the app ------------------------------------------------------------


def test_a_missing_module_gives_one_line_and_4(run, tmp_path):
    for name in ("helo", "helo.sub", "hello.sub"):
        text = mistake(run(f"{name}:app"), 4)
        assert text.endswith("check its name, or use --app-dir")
        assert f"in {tmp_path} or on the Python path" in text


@pytest.mark.parametrize(
    ("app", "text"),
    [
        ("ap", "module hello has no ap; did you mean app?"),
        ("zzz", "module hello has no zzz; check the name"),
        ("Nested.handle", "module hello has no Nested.handle; did you mean handler?"),
        ("number", "hello:number is of type int, not callable"),
    ],
)
def test_a_missing_attribute_gives_one_line_and_4(run, app, text):
    assert mistake(run(f"hello:{app}"), 4) == text


@pytest.mark.parametrize(
    ("source", "text"),
    [
        ("1 / 0", "ZeroDivisionError: division by zero"),
        (
            "import no_such_thing",
            "ModuleNotFoundError: No module named 'no_such_thing'",
        ),
        ("import sys; sys.exit('no database')", "SystemExit: no database"),
        ("def (", "SyntaxError: invalid syntax"),
    ],
)
def test_an_app_that_raises_shows_its_own_traceback_and_4(run, tmp_path, source, text):
    (tmp_path / "broken.py").write_text(source)
    program = run("broken:app")
    assert program.wait() == 4
    *shown, last = program.stderr.splitlines()
    assert last.startswith("prefork: importing broken failed: ")
    assert text in "\n".join(shown) and "broken.py" in "\n".join(shown)
    assert "importlib" not in program.stderr and "worker.py" not in program.stderr


# ---- Signals that come before there is a master --------------------------------------

LOADING = """
    import os

    if os.path.exists("gate"):
        print("loading", flush=True)
        open("gate").read()

    from hello import app
"""


def loading(run: Run, tmp_path: Path, *arguments: str) -> Program:
    """A program whose app waits at a gate while it is imported."""
    (tmp_path / "loading.py").write_text(textwrap.dedent(LOADING))
    os.mkfifo(tmp_path / "gate")
    program = run("loading:app", "--bind", f"unix:{tmp_path}/sock", "-w1", *arguments)
    program.until("loading")
    return program


def open_gate(tmp_path: Path) -> None:
    with (tmp_path / "gate").open("w"):
        (tmp_path / "gate").unlink()


@pytest.mark.contract("better: signals")
@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT", "SIGQUIT"])
def test_a_signal_that_stops_does_so_while_the_app_is_loaded(run, tmp_path, name):
    program = loading(run, tmp_path)
    program.signal(getattr(signal, name))
    assert program.wait() == 0
    assert program.stderr == f"prefork: {name}: stopped"


@pytest.mark.contract("better: signals")
def test_hup_while_the_app_is_loaded_is_a_reload_when_it_serves(run, tmp_path):
    program = loading(run, tmp_path)
    program.signal(signal.SIGHUP)
    open_gate(tmp_path)
    program.until_logged("serving on")
    program.until_logged("reloaded 1 workers, generation 2")
    program.signal(signal.SIGTERM)
    assert program.wait() == 0


def test_ttin_while_the_app_is_loaded_is_one_worker_more_when_it_serves(run, tmp_path):
    program = loading(run, tmp_path)
    program.signal(signal.SIGTTIN)
    open_gate(tmp_path)
    program.until_logged("scaling from 1 to 2 workers")
    program.signal(signal.SIGTERM)
    assert program.wait() == 0


@pytest.mark.parametrize("arguments", [["--no-preload"], ["--spawn", "exec"]])
def test_a_worker_that_loads_the_app_is_ended_by_its_master(run, tmp_path, arguments):
    program = loading(run, tmp_path, *arguments)
    program.signal(signal.SIGTERM)
    assert program.wait() == 0
    assert "SIGTERM: stopping" in program.stderr


# ---- Mistakes: 3, 5, 6 ---------------------------------------------------------------


def test_a_port_in_use_gives_one_line_and_5(run):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        text = mistake(run("hello:app", "--bind", f"127.0.0.1:{port}"), 5)
    assert text == (
        f"cannot listen on 127.0.0.1:{port}: address already in use; "
        "stop what listens there, or choose another address"
    )


def test_an_unknown_host_gives_one_line_and_5(run):
    text = mistake(run("hello:app", "--bind", "no-such-host.invalid:80"), 5)
    assert text.startswith(
        "cannot resolve 'no-such-host.invalid' in no-such-host.invalid"
    )


def test_a_missing_permission_gives_one_line_and_5(monkeypatch, capsys):
    def refuse(config: Config) -> None:
        raise PermissionError(errno.EACCES, "cannot listen on :80: permission denied")

    monkeypatch.setattr(cli, "_serve", refuse)
    with pytest.raises(SystemExit) as caught:
        cli.main(["hello:app"])
    assert caught.value.code == 5
    told = capsys.readouterr().err
    assert told == "prefork: cannot listen on :80: permission denied\n"


def test_workers_that_crash_too_often_give_one_line_and_6(run, tmp_path):
    path = tmp_path / "sock"
    program = run("hello:app", "-b", f"unix:{path}", "-w1", "--recover-threshold", "0")
    worker = ask(serving(program, path), REQUEST).rpartition(b"\r\n")[2]
    os.kill(int(worker), signal.SIGKILL)
    assert program.wait() == 6
    last = program.stderr.splitlines()[-1]
    assert last == (
        "prefork: 1 unplanned worker exits (killed by SIGKILL), "
        "more than recover_threshold 0 allows"
    )


# ---- Help ----------------------------------------------------------------------------


@pytest.mark.parametrize("flag", ["--help", "-h"])
def test_help_groups_all_options_with_default_and_variable(run, flag):
    program = run(flag)
    assert program.wait() == 0
    text = " ".join(" ".join(program.told).split())
    for name, option in OPTIONS.items():
        assert (variable(name) in text) == (not option.keyword_only), name
    for group in {option.group for option in OPTIONS.values()}:
        assert f"{group.value}:" in text
    assert "-b, --bind ADDR" in text and "default: 127.0.0.1:8000]" in text
    assert "-w, --workers N" in text and "--reuse-port / --no-reuse-port" in text


def test_version_is_told(run):
    program = run("--version")
    assert program.wait() == 0
    assert len(program.told) == 1 and program.told[0].startswith("prefork ")


def test_every_option_is_a_flag_that_config_reads():
    flags = {param.name: param for param in cli.command().params}
    for name, option in OPTIONS.items():
        assert (name in flags) == (not option.keyword_only), name
    for name, param in flags.items():
        if not isinstance(param, click.Option) or name not in OPTIONS:
            continue
        default = DEFAULTS[name]
        if param.is_flag:
            assert Config(**{name: not default}) != Config()
        elif default is not None:
            assert Config(**{name: OPTIONS[name].show(default)}) == Config()


@pytest.mark.parametrize(
    ("flag", "name", "value"),
    [
        ("--reuse-port", "reuseport", True),
        ("--no-reuse-port", "reuseport", False),
        ("--no-tcp-keepalive", "tcp_keepalive", False),
        ("--default-date", "no_default_date", False),
        ("--no-default-date", "no_default_date", True),
        ("--enable-keepalive", "disable_keepalive", False),
        ("--disable-keepalive", "disable_keepalive", True),
    ],
)
def test_switches_have_an_opposite(monkeypatch, flag, name, value):
    given: dict[str, object] = {}
    monkeypatch.setattr(cli, "_command", lambda **values: given.update(values))
    with pytest.raises(SystemExit) as caught:
        cli.main(["hello:app", flag])
    assert caught.value.code == 0
    assert given[name] is value


# ---- Configuration files -------------------------------------------------------------


def printed(program: Program) -> dict[str, tuple[str, str]]:
    """What --print-config tells: value and origin of each option."""
    assert program.wait() == 0, program.stderr
    found = {}
    for line in program.told:
        option, _, origin = line.rpartition("  # ")
        name, _, value = option.partition(" = ")
        found[name] = (value.strip(), origin)
    return found


def test_print_config_tells_each_option_and_where_it_comes_from(run, tmp_path):
    (tmp_path / "prefork.toml").write_text("# mine\nworkers = 3\nbacklog = 5\n")
    told = printed(run("--print-config", "--name", "me", PREFORK_BACKLOG="7"))
    assert set(told) == {n for n, o in OPTIONS.items() if not o.keyword_only}
    assert told["workers"] == ("3", "prefork.toml:2")
    assert told["backlog"] == ("7", "PREFORK_BACKLOG")
    assert told["name"] == ('"me"', "command line")
    assert told["idle_timeout"] == ('"75s"', "default")
    assert told["recover_window"] == ('"60s"', "default")
    assert told["app"] == ('"none"', "default")


def test_what_print_config_tells_is_a_configuration_file(run, tmp_path):
    program = run("--print-config", "--workers", "3", "--unix-mode", "660")
    assert program.wait() == 0
    (tmp_path / "prefork.toml").write_text("\n".join(program.told))
    again = printed(run("--print-config"))
    assert {origin.partition(":")[0] for _, origin in again.values()} == {
        "prefork.toml"
    }
    assert again["workers"][0] == "3" and again["unix_mode"][0] == '"660"'


def test_a_pyproject_is_read_where_there_is_no_file_of_its_own(run, tmp_path):
    text = "[project]\nname = 'x'\n[tool.prefork]\nmax-fields = 50\n"
    (tmp_path / "pyproject.toml").write_text(text)
    assert printed(run("--print-config"))["max_fields"] == ("50", "pyproject.toml:4")
    (tmp_path / "prefork.toml").write_text("max_fields = 60")
    assert printed(run("--print-config"))["max_fields"] == ("60", "prefork.toml:1")


@pytest.mark.parametrize("how", ["flag", "variable"])
def test_a_file_that_is_named_is_read_instead(run, tmp_path, how):
    (tmp_path / "prefork.toml").write_text("workers = 2")
    (tmp_path / "other.toml").write_text("backlog = 5")
    if how == "flag":
        told = printed(run("--print-config", "-c", "other.toml"))
    else:
        told = printed(run("--print-config", PREFORK_CONFIG="other.toml"))
    assert told["backlog"] == ("5", "other.toml:1")
    assert told["workers"][1] == "default"


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("a = 1\nworker = 3", "prefork.toml:1: prefork has no option a"),
        (
            "\n\nworker = 3",
            "prefork.toml:3: prefork has no option worker; did you mean workers?",
        ),
        ("workers = 0", "prefork.toml:1: workers must be at least 1, not 0"),
        ("workers = true", "prefork.toml:1: workers must be a whole number, not True"),
        ("on_child_spawn = 'f'", "prefork.toml:1: on_child_spawn can be set in Python"),
        ("workers = ", "prefork.toml is no valid TOML: "),
    ],
)
def test_a_mistake_in_a_file_is_told_with_its_place(run, tmp_path, text, told):
    (tmp_path / "prefork.toml").write_text(text)
    assert mistake(run("hello:app"), 2).startswith(told)


def test_a_file_that_is_not_there_is_told(run):
    text = mistake(run("hello:app", "--config", "no.toml"), 2)
    assert text == (
        "config must name a file to read, not 'no.toml' (no such file or directory)"
    )


def test_all_can_come_from_a_file(run, tmp_path):
    path = tmp_path / "sock"
    (tmp_path / "prefork.toml").write_text(
        f"app = 'hello:app'\nbind = ['unix:{path}']\nworkers = 1\n"
        "shutdown_grace_period = '2s'\nmax_header_size = 65536\nunix-mode = 0o600\n"
    )
    program = run()
    assert ask(serving(program, path), REQUEST).startswith(b"HTTP/1.1 200 OK\r\n")
    assert path.stat().st_mode & 0o777 == 0o600
    program.signal(signal.SIGTERM)
    assert program.wait() == 0


def test_hup_reads_the_file_again(run, tmp_path):
    path, file = tmp_path / "sock", tmp_path / "prefork.toml"
    file.write_text("workers = 1\nname = 'old'\n")
    program = run("hello:app", "-b", f"unix:{path}")
    address = serving(program, path)
    assert b"\r\nServer: old\r\n" in ask(address, REQUEST)
    file.write_text("workers = 2\nname = 'new'\nbacklog = 5\n")
    program.signal(signal.SIGHUP)
    program.until_logged("backlog needs a restart to change")
    program.until_logged("scaling from 1 to 2 workers")
    assert b"\r\nServer: new\r\n" in ask(address, REQUEST)
    file.write_text("workers = 'many'")
    program.signal(signal.SIGHUP)
    program.until_logged("reload failed")
    program.until_logged("prefork.toml:1: workers must be a whole number, not 'many'")
    assert b"\r\nServer: new\r\n" in ask(address, REQUEST)
    program.signal(signal.SIGTERM)
    assert program.wait() == 0


def test_check_config_loads_options_and_app_and_says_so(run, tmp_path):
    program = run("--check-config", "hello:app")
    assert program.wait() == 0
    assert program.told == ["prefork: hello:app is in order"]
    (tmp_path / "prefork.toml").write_text("app = 'hello:app'")
    program = run("--check-config")
    assert program.wait() == 0
    assert program.told == ["prefork: hello:app and prefork.toml are in order"]


@pytest.mark.parametrize(
    ("arguments", "code"), [(["hello:app", "-w", "0"], 2), (["hello:nothing"], 4)]
)
def test_check_config_ends_as_the_start_would(run, arguments, code):
    assert mistake(run("--check-config", *arguments), code)
