"""How workers come to be: by fork, by running the program again, by the user's hand."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import psutil
import pytest
from programs import SOON, Program, ask, connect, ending, kill, read_all
from runs import HALF, REST, finish, ready, stop, who

from prefork.errors import ConfigError
from prefork.spawn import _names_a_program

HERE = Path(__file__).parent
EXAMPLES = HERE.parent / "examples"
EXEC = {"shared": "spawn='exec'", "slots": "spawn='exec', reuseport=True"}


@pytest.fixture(params=EXEC)
def executed(request: pytest.FixtureRequest) -> str:
    return EXEC[request.param]


# ---- The program is run again --------------------------------------------------------

FORM = """
import os, sys
from masters import Drainer, Prefork, is_child, say, text
if is_child():
    say("child", sys.flags.optimize, __name__, sys.argv[1:], __debug__)
p = Prefork(Drainer(), workers=1, spawn="exec",
            on_master_ready=lambda pids: say("ready", text(p.address), *pids))
p.listen_and_serve("127.0.0.1:0")
say("returned")
"""


@pytest.mark.contract("better: fork")
@pytest.mark.parametrize("form", ["script", "relative", "module", "command"])
def test_each_form_of_a_program_is_run_again_with_its_flags(tmp_path, form):
    (tmp_path / "prog.py").write_text(FORM)
    arguments = {
        "script": [str(tmp_path / "prog.py")],
        "relative": ["prog.py"],
        "module": ["-m", "prog"],
        "command": ["-c", FORM],
    }[form]
    env = {"PYTHONPATH": str(HERE)}
    with Program(["-O", *arguments, "a b", ""], env, tmp_path) as program:
        told = program.until("child")
        address, pid = program.until("ready")
        assert told == ["1", "__main__", "['a", "b',", "'']", "False"]
        assert who(address) == int(pid)
        program.signal(signal.SIGTERM)
        assert program.wait() == 0
        assert program.events("returned") == [["returned"]]  # in the master only


def test_the_console_script_is_run_again(tmp_path):
    script = Path(sys.executable).parent / "prefork"
    (tmp_path / "main.py").write_text(
        "def app(r): return str(__import__('os').getpid())"
    )
    arguments = ["main:app", "--spawn", "exec", "-w2", "-b", "127.0.0.1:0"]
    with Program([str(script), *arguments], cwd=tmp_path) as program:
        address = re.search(r"127\.0\.0\.1:\d+", program.until_logged("serving on"))[0]
        close = b"GET / HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n"
        pid = int(ask(address, close).rpartition(b"\r\n")[2])
        assert "main:app" in psutil.Process(pid).cmdline()
        program.signal(signal.SIGTERM)
        assert program.wait() == 0


def test_the_program_is_run_again_where_it_was_started(start, tmp_path):
    program = start(f"""
        say("in", os.getcwd())
        os.chdir({str(tmp_path)!r})
        run(workers=1, spawn="exec")
    """)
    ready(program)
    stop(program)
    assert program.events("in") == [["in", os.getcwd()]] * 2


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["prog.py"], True),
        (["-m", "prog"], True),
        (["-Im", "prog"], True),
        (["-c", "pass"], True),
        (["-X", "dev", "-W", "error", "prog.py"], True),
        (["-Xdev", "-OO", "--check-hash-based-pycs", "never", "prog.py"], True),
        (["-X", "dev"], False),
        (["-"], False),
        (["-i"], False),
        ([], False),
    ],
)
def test_whether_a_program_can_be_run_again_is_told_by_its_arguments(arguments, named):
    assert _names_a_program(arguments) == named


# ---- What an executed child finds ----------------------------------------------------


@pytest.mark.contract("behaviour 6")
def test_an_executed_worker_finds_its_listener_at_fd_3_and_no_input(start, executed):
    program = start(f"""
        class Looking(Drainer):
            def serve(self, sockets, **more):
                fds = sorted(map(int, os.listdir("/proc/self/fd")))
                say("fds", sockets[0].fileno(), listening(), len(fds) - 1)
                say("input", os.readlink("/proc/self/fd/0"))
                for fd in (1, 2):
                    say("output", os.readlink(f"/proc/self/fd/{{fd}}"))
                say("mask", len(signal.pthread_sigmask(signal.SIG_BLOCK, [])))
                super().serve(sockets, **more)
        run(server=Looking(), workers=2, {executed})
    """)
    outputs = [os.readlink(f"/proc/{program.pid}/fd/{fd}") for fd in (1, 2)]
    ready(program)
    stop(program)
    # its listener, the pipe to the master, the lifeline, the scoreboard
    assert program.events("fds") == [["fds", "3", "1", "7"]] * 2
    assert program.events("input") == [["input", "/dev/null"]] * 2
    assert {text for _, text in program.events("output")} == set(outputs)
    assert program.events("mask") == [["mask", "0"]] * 2


def test_with_reuseport_an_executed_worker_has_its_slot_s_socket(start):
    program = start("""
        class Telling(Drainer):
            def serve(self, sockets, **more):
                say("inode", os.fstat(sockets[0].fileno()).st_ino)
                super().serve(sockets, **more)
        run(server=Telling(), workers=3, reuseport=True, spawn="exec")
    """)
    _, pids = ready(program)
    before = [program.until("inode")[0] for _ in range(3)]
    assert len(set(before)) == 3
    kill(pids[1])
    assert program.until("inode")[0] in before
    stop(program)


@pytest.mark.contract("FASTHTTP_PREFORK_CHILD=1")
@pytest.mark.parametrize("stale", [None, "0", "2", "true", ""])
def test_a_stale_marker_is_replaced_and_its_siblings_are_kept(start, stale):
    code = """
        env = dict(line.split("=", 1) for line in
            open("/proc/self/environ").read().split("\\0") if "=" in line)
        say("marker", env.get("PREFORK_CHILD"), env["PREFORK_CHILD_X"], is_child())
        say("left", "PREFORK_CHILD" in os.environ) if is_child() else None
        run(workers=1, spawn="exec")
    """
    env = {"PREFORK_CHILD_X": "kept"} | (
        {} if stale is None else {"PREFORK_CHILD": stale}
    )
    program = start(code, **env)
    ready(program)
    program.signal(signal.SIGTERM)
    assert program.wait() == 0
    assert program.events("marker")[1] == ["marker", "1", "kept", "True"]
    assert program.events("left")[0] == ["left", "False"]


@pytest.mark.contract("behaviour 6")
@pytest.mark.parametrize("options", ["", "reuseport=True"])
def test_the_marker_without_a_listener_is_an_error_that_says_so(start, options):
    program = start(
        f"""
        p = Prefork(Drainer(), {options})
        try:
            p.listen_and_serve("127.0.0.1:0")
        except errors.InheritanceError as error:
            say("told", error)
        """,
        PREFORK_CHILD="1",
    )
    text = " ".join(program.until("told"))
    assert "PREFORK_CHILD=1 is set, but no listener was inherited at fd 3" in text
    assert program.wait() == 0


@pytest.mark.contract("IsChild")
def test_is_child_is_true_in_an_executed_worker_and_false_in_what_it_starts(start):
    program = start("""
        class Asking(Drainer):
            def boot(self):
                say("worker", is_child())
                code = "import prefork; print('executed', prefork.is_child())"
                subprocess.run([sys.executable, "-c", code])
                subprocess.run([sys.executable, "-c", code], close_fds=False)
        say("first" if not is_child() else "again", is_child())
        run(server=Asking(), workers=1, spawn="exec",
            on_master_ready=lambda _: (say("master", is_child()), master.shutdown()))
    """)
    assert program.wait() == 0
    names = ("first", "again", "worker", "executed", "master")
    told = program.events(*names)
    assert told.count(["executed", "False"]) == 2
    assert dict(told) == dict.fromkeys(names, "False") | {
        "worker": "True",
        "again": "True",
    }


def test_an_executed_worker_is_no_master_s_master(start):
    program = start("""
        class Nested(Drainer):
            def boot(self):
                Prefork(Drainer()).listen_and_serve("127.0.0.1:0")
        run(server=Nested(), workers=1, spawn="exec")
    """)
    assert finish(program) == 0
    assert "a worker cannot be a master" in " ".join(program.events("raised")[0])


@pytest.mark.contract("better: two")
def test_two_preforks_in_one_program_both_work(start, executed):
    program = start(f"""
        class Named(Drainer):
            def __init__(self, name):
                self.name = name
            def boot(self):
                say("serves", self.name)
        def go(pids):
            say("ready", 0, *pids)
        first = Prefork(Named("first"), workers=1, {executed})
        second = Prefork(Named("second"), workers=1, {executed})
        for each in (first, second, first):
            each.on_master_ready = lambda pids: each.shutdown()
            each.listen_and_serve("127.0.0.1:0")
        say("end")
    """)
    program.until("end")
    assert program.wait() == 0
    assert [name for _, name in program.events("serves")] == [
        "first",
        "second",
        "first",
    ]
    assert program.events("end") == [["end"]]


# ---- Its life ------------------------------------------------------------------------


def test_executed_workers_are_recovered(start, executed):
    program = start(f"run(workers=2, {executed})")
    address, pids = ready(program)
    kill(pids[0])
    assert int(program.until("recover")[0]) == pids[0]
    assert who(address)
    stop(program)


def test_a_connection_made_while_no_executed_worker_lives_waits(start, executed):
    program = start(f"run(workers=1, {executed})")
    address, pids = ready(program)
    kill(pids[0])
    assert who(address) == int(program.until("recover")[1])
    stop(program)


@pytest.mark.contract("better: exits")
@pytest.mark.parametrize(
    ("code", "told"),
    [
        ("raise ValueError('no database')", "ValueError: no database"),
        ("sys.exit(5)", "exit status 5"),
        ("sys.exit(0)", "exit status 0"),
        ("os._exit(7)", "exit status 7"),
    ],
)
def test_a_program_that_fails_before_it_serves_is_a_boot_failure(start, code, told):
    program = start(f"""
        if is_child():
            {code}
        run(workers=2, spawn="exec")
    """)
    assert finish(program) == 0
    line = " ".join(program.events("raised")[0])
    assert line.startswith("raised WorkerBootError ") and told in line
    assert not program.events("ready", "recover")


def test_an_executed_worker_that_fails_to_serve_is_raised_with_its_traceback(start):
    program = start("""
        class Broken(Drainer):
            def boot(self):
                raise ValueError("no database")
        run(server=Broken(), workers=2, spawn="exec")
    """)
    assert finish(program) == 0
    line = " ".join(program.events("raised")[0])
    assert "in boot" in line and line.endswith("ValueError: no database")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_stop_while_programs_start_is_orderly(start, number):
    program = start("""
        if is_child():
            say("begins")
            pause()
        run(workers=2, spawn="exec", shutdown_grace_period=3600)
    """)
    program.until("begins")
    program.signal_group(number)
    assert finish(program) == 0
    assert program.events("returned")


@pytest.mark.parametrize("then", ["pause()", "pass"], ids=["boots on", "serves"])
@pytest.mark.parametrize("spawn", ["fork", "exec"])
def test_a_stop_that_an_import_swallows_is_told_again(start, spawn, then):
    program = start(f"""
        class Deaf(Drainer):
            def boot(self):
                try:
                    say("boots")
                    pause()
                except SystemExit:
                    pass  # as a weak reference's callback does
                {then}
        run(server=Deaf(), workers=1, spawn={spawn!r}, shutdown_grace_period=3600)
    """)
    program.until("boots")
    stop(program)


def test_ctrl_c_is_one_orderly_stop_of_executed_workers_too(start, executed):
    program = start(f"run({executed})")
    address, _ = ready(program)
    with connect(address) as sock:
        sock.sendall(HALF)
        pid = int(program.until("begun")[0])
        program.signal_group(signal.SIGINT)
        sock.sendall(REST)
        assert int(read_all(sock)) == pid
    assert finish(program) == 0
    assert program.events("returned") and "Traceback" not in program.stderr


@pytest.mark.contract("better: lifeline")
def test_the_master_s_death_is_noticed_by_executed_workers(start, executed):
    program = start(f"run({executed})")
    _, pids = ready(program)
    with ending(*pids):
        kill(program.pid)


@pytest.mark.contract("OnMasterDeath")
def test_on_master_death_is_called_once_in_each_executed_worker(start, executed):
    program = start(
        f"run({executed}, on_master_death=lambda: say('orphan', os.getpid()))"
    )
    _, pids = ready(program)
    with ending(*pids):
        kill(program.pid)
    program.rest()
    assert sorted(int(pid) for _, pid in program.events("orphan")) == sorted(pids)


def test_a_stranger_s_executed_worker_ends_with_its_master(start, executed):
    program = start(f"run(serve_func=serve, {executed})")
    address, pids = ready(program)
    assert who(address) in pids
    with ending(*pids):
        kill(program.pid)


def test_what_runs_at_exit_runs_in_an_executed_worker(start):
    program = start("""
        import atexit
        atexit.register(say, "bye", is_child())
        run(workers=1, spawn="exec")
    """)
    ready(program)
    stop(program)
    assert program.events("bye") == [["bye", "True"], ["bye", "False"]]


# ---- command_producer ----------------------------------------------------------------

PRODUCER = """
    def produce(files):
        say("files", *(file.fileno() for file in files))
        return subprocess.Popen(
            [sys.executable, *sys.orig_argv[1:]], {more}
            pass_fds=[file.fileno() for file in files],
        )
"""
PRODUCERS = pytest.mark.parametrize(
    "env",
    ["", 'env={**os.environ, "PREFORK_CHILD": "1"},', "env=bare,"],
    ids=["inherited", "marked", "bare"],
)
BARE = """
    kept = ("PYTHONPATH", "PYTHONMALLOC", "LD_PRELOAD", "ASAN_OPTIONS")  # make asan's
    bare = {name: os.environ[name] for name in kept if name in os.environ}
    bare["PREFORK_CHILD"] = "1"
"""


def produced(options: str, env: str = "") -> str:
    return (
        textwrap.dedent(BARE)
        + textwrap.dedent(PRODUCER).replace("{more}", env)
        + f"run(command_producer=produce, {options})"
    )


@pytest.mark.contract("CommandProducer")
@PRODUCERS
def test_a_command_producer_starts_initial_and_recovered_workers(start, env):
    program = start(produced("workers=2", env))
    address, pids = ready(program)
    who(address)
    kill(pids[0])
    assert int(program.until("recover")[0]) == pids[0]
    assert who(address)
    stop(program)
    assert program.events("files") == [["files", "3"]] * 3


@pytest.mark.contract("CommandProducer")
def test_with_reuseport_a_command_producer_gets_no_files(start):
    program = start(produced("workers=2, reuseport=True"))
    address, pids = ready(program)
    deadline = time.monotonic() + SOON
    while True:
        try:
            assert who(address) in pids
            break
        except ConnectionRefusedError:  # as there, started is not yet listening
            assert time.monotonic() < deadline
    kill(pids[0])
    program.until("recover")
    stop(program)
    assert program.events("files") == [["files"]] * 3


def test_a_port_in_use_is_told_before_a_command_producer_is_asked(start, mode):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        code = produced(mode).replace("run(", f'run("127.0.0.1:{port}", ')
        program = start(code)
        assert finish(program) == 0
    assert program.events("raised")[0][1] == "OSError"
    assert not program.events("files", "spawn")


@pytest.mark.contract("ErrCommandProducerNilCmd", "ErrCommandProducerNotStarted")
@pytest.mark.parametrize(
    ("result", "error"),
    [
        ("None", "CommandProducerNoneError"),
        ("object()", "CommandProducerNotStartedError"),
        ("multiprocessing.Process()", "CommandProducerNotStartedError"),
        ("1 / 0", "ZeroDivisionError"),
        ("sys.exit(3)", "SystemExit"),
    ],
)
def test_a_command_producer_that_starts_nothing_ends_it(start, mode, result, error):
    program = start(f"run(command_producer=lambda files: {result}, {mode})")
    assert finish(program) == 0
    assert program.events("raised")[0][1] == error
    assert not program.events("spawn", "ready")


@pytest.mark.contract("behaviour 2")
def test_a_command_producer_that_fails_later_tears_down_the_others(start):
    program = start("""
        started = []
        def produce(files):
            if len(started) == 2:
                return None
            started.append(subprocess.Popen([sys.executable, *sys.orig_argv[1:]],
                                            pass_fds=[3]))
            return started[-1]
        run(workers=4, command_producer=produce)
        say("codes", *(process.returncode for process in started))
    """)
    assert finish(program) == 0
    assert program.events("raised")[0][1] == "CommandProducerNoneError"
    assert len(program.events("spawn")) == 2
    codes = program.events("codes")[0][1:]
    assert len(codes) == 2 and "None" not in codes


def test_workers_of_a_command_producer_end_with_the_master(start):
    program = start(produced("workers=2"))
    address, pids = ready(program)
    who(address)
    with ending(*pids):
        kill(program.pid)


def test_what_a_callback_starts_has_no_signals_blocked(start):
    program = start("""
        def look(name):
            code = f"import signal; print({name!r}, len(signal.pthread_sigmask(0, [])))"
            subprocess.run([sys.executable, "-c", code])
        def on_master_ready(pids):
            look("ready")
            say("go", *pids)
        run(workers=1, on_child_spawn=lambda pid: look("spawn"),
            on_master_ready=on_master_ready,
            on_child_recover=lambda old, new: (look("recover"), master.shutdown()))
    """)
    kill(int(program.until("go")[0]))
    assert finish(program) == 0
    told = program.events("spawn", "ready", "recover")
    assert told == [[name, "0"] for name in ("spawn", "ready", "spawn", "recover")]


@pytest.mark.contract("CommandProducer")
def test_any_program_that_accepts_at_fd_3_can_be_produced(start):
    program = start("""
        code = "\\n".join([
            "import os, socket",
            "listener = socket.socket(fileno=3)",
            "listener.setblocking(True)",
            "while True:",
            "    conn, _ = listener.accept()",
            "    conn.recv(65536)",
            "    conn.sendall(str(os.getpid()).encode())",
            "    conn.close()",
        ])
        run(workers=2, command_producer=lambda files: subprocess.Popen(
            [sys.executable, "-c", code], pass_fds=[files[0].fileno()]))
    """)
    address, pids = ready(program)
    assert who(address) in pids
    program.signal(signal.SIGHUP)
    program.until_logged("reloaded 2 workers")
    assert who(address) not in pids
    stop(program)


# ---- Other people's servers ----------------------------------------------------------


@pytest.mark.contract("ServeFunc")
@pytest.mark.parametrize("name", ["http", "asyncio", "uvicorn"])
def test_a_foreign_server_is_preforked_in_three_lines(name):
    arguments = [str(EXAMPLES / "foreign.py"), name, "127.0.0.1:0"]
    with Program(arguments) as program:
        address = re.search(r"127\.0\.0\.1:\d+", program.until_logged("serving on"))[0]
        old = both(address, name)
        kill(old.pop())
        old |= both(address, name)
        program.signal(signal.SIGHUP)
        program.until_logged("reloaded 2 workers")
        assert not both(address, name) & old
        program.signal(signal.SIGTERM)
        assert program.wait() == 0, program.stderr
        assert (
            "Traceback" not in program.stderr and "does not leave" not in program.stderr
        )


def both(address: str, name: str) -> set[int]:
    """Ask until two workers have answered: by then each of them serves."""
    seen: set[int] = set()
    deadline = time.monotonic() + SOON
    while len(seen) < 2:
        assert time.monotonic() < deadline, seen
        answer = ask(address, CLOSE)
        assert b" 200 OK" in answer and f"served by {name}\n".encode() in answer
        seen.add(int(re.search(rb"(?i)worker: (\d+)", answer)[1]))
    return seen


# ---- Where the app is loaded ---------------------------------------------------------

APP = """
import os
os.write(1, b"loaded %d\\n" % os.getpid())
def app(request):
    return f"{os.getpid()} old"
"""
CLOSE = b"GET / HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n"


@pytest.fixture
def command(tmp_path):
    """command(*arguments): `prefork main:app ...` beside main.py; nothing is left."""
    (tmp_path / "main.py").write_text(APP)
    programs = []

    def command(*arguments: str) -> Program:
        base = ["-m", "prefork", "main:app", "-b", "127.0.0.1:0"]
        program = Program([*base, *arguments], cwd=tmp_path)
        programs.append(program)
        return program

    yield command
    for program in programs:
        with program:
            pass


def address_of(program: Program) -> str:
    return re.search(r"127\.0\.0\.1:\d+", program.until_logged("serving on"))[0]


def body(address: str) -> str:
    return ask(address, CLOSE).rpartition(b"\r\n")[2].decode()


def loaders(program: Program) -> list[int]:
    return [int(pid) for _, pid in program.events("loaded")]


@pytest.mark.contract("better: fork")
@pytest.mark.parametrize(
    ("options", "where"),
    [([], "master"), (["--no-preload"], "workers"), (["--spawn", "exec"], "workers")],
)
def test_the_app_is_loaded_once_or_in_each_worker(command, options, where):
    program = command("-w2", *options)
    address = address_of(program)
    assert body(address).endswith(" old")
    children = {child.pid for child in psutil.Process(program.pid).children()}
    program.signal(signal.SIGTERM)
    assert program.wait() == 0
    expected = {program.pid} if where == "master" else children
    assert set(loaders(program)) == expected


@pytest.mark.parametrize("options", [[], ["--no-preload"], ["--spawn", "exec"]])
def test_hup_loads_the_app_anew(command, tmp_path, options):
    program = command("-w2", *options)
    address = address_of(program)
    assert body(address).endswith(" old")
    (tmp_path / "main.py").write_text(APP.replace("old", "new, much newer"))
    program.signal(signal.SIGHUP)
    program.until_logged("reloaded 2 workers")
    assert body(address).endswith(" new, much newer")
    (tmp_path / "main.py").write_text("1 / 0")
    program.signal(signal.SIGHUP)
    program.until_logged("reload failed")
    program.until_logged("ZeroDivisionError")
    assert body(address).endswith(" new, much newer")
    program.signal(signal.SIGTERM)
    assert program.wait() == 0


@pytest.mark.parametrize("options", [["--no-preload"], ["--spawn", "exec"]])
def test_an_app_that_raises_in_the_worker_is_told_with_its_traceback(
    command, tmp_path, options
):
    (tmp_path / "main.py").write_text("1 / 0")
    program = command("-w2", *options)
    assert program.wait() == 3
    assert program.stderr.count("ZeroDivisionError: division by zero") == 1
    assert "failed to boot" in program.stderr.splitlines()[-1]
    assert "importlib" not in program.stderr and "worker.py" not in program.stderr


def test_preload_shares_what_the_app_has_loaded(start):
    program = start("""
        import gc
        class Looking(Drainer):
            def boot(self):
                say("frozen", gc.get_freeze_count() > 0)
        run(server=Looking(), workers=1)
    """)
    ready(program)
    stop(program)
    assert program.events("frozen") == [["frozen", "True"]]


def test_spawn_exec_needs_a_program_that_can_be_run_again(monkeypatch):
    from prefork import Prefork

    monkeypatch.setattr(sys, "orig_argv", ["python"])
    with pytest.raises(ConfigError, match="cannot be run again"):
        Prefork(serve_func=print, spawn="exec").listen_and_serve("127.0.0.1:0")


# ---- Process 1 -----------------------------------------------------------------------

STRANGERS = """
    class Careless(Drainer):
        def boot(self):
            pid = os.fork()
            if pid == 0:
                if os.fork() == 0:
                    say("orphan", os.getpid())
                os._exit(0)
            os.waitpid(pid, 0)
    def zombies():
        found = 0
        for name in os.listdir("/proc"):
            if name.isdigit():
                try:
                    stat = open(f"/proc/{name}/stat").read().rpartition(")")[2].split()
                except OSError:
                    continue
                found += stat[0] == "Z" and stat[1] == str(os.getpid())
        return found
    def look():
        own = subprocess.Popen(["true"])
        say("own", own.wait())
        deadline = time.monotonic() + 20
        while zombies() and time.monotonic() < deadline:
            threading.Event().wait(0.05)
        say("zombies", zombies(), os.getpid())
        master.shutdown()
    def on_master_ready(pids):
        say("ready", 0, *pids)
        threading.Thread(target=look).start()
"""


def can_unshare() -> bool:
    command = ["unshare", "--pid", "--fork", "--mount-proc", "true"]
    return subprocess.run(command, capture_output=True).returncode == 0


def test_as_process_1_it_reaps_strangers(start):
    if not can_unshare():
        pytest.skip("no pid namespace may be made here; the next test shows the same")
    code = textwrap.dedent(STRANGERS)
    code += "run(server=Careless(), on_master_ready=on_master_ready)"
    script = "from masters import *\n" + code
    line = ["unshare", "--pid", "--fork", "--mount-proc", sys.executable, "-c", script]
    code = f"import os; os.execvp('unshare', {line!r})"
    with Program(["-c", code], env={"PYTHONPATH": str(HERE)}) as program:
        assert program.until("own") == ["0"]
        assert program.until("zombies") == ["0", "1"]
        assert program.wait() == 0
        assert program.events("returned")


def test_as_a_subreaper_it_reaps_strangers(start):
    code = textwrap.dedent(STRANGERS)
    program = start(
        "from prefork import _processes\n_processes.set_reaper(True)\n"
        + code
        + "run(server=Careless(), on_master_ready=on_master_ready)"
    )
    assert program.until("own") == ["0"]
    assert program.until("zombies")[0] == "0"
    assert finish(program) == 0


# ---- Addresses -----------------------------------------------------------------------


@pytest.mark.parametrize("spawn", ["fork", "exec"])
def test_an_inherited_listener_is_served_and_stays_as_it_was(start, spawn):
    code = f"""
        inherited = socket.create_server(("127.0.0.1", 0)) if not is_child() else None
        fd = inherited.fileno() if inherited else 99
        run(f"fd://{{fd}}", workers=2, spawn={spawn!r})
        inherited.settimeout(20)
        say("alive", text(inherited.getsockname()), os.get_blocking(fd))
        say("accepted", bool(inherited.accept()))
    """
    program = start(code)
    address, pids = ready(program)
    assert who(address) in pids
    stopped = program.signal(signal.SIGTERM)
    assert stopped is None
    assert program.until("alive") == [address, "False"]  # it has a timeout
    with connect(address):
        assert program.until("accepted") == ["True"]
        assert program.wait() == 0


@pytest.mark.parametrize("fd", ["999", "0"])
def test_a_descriptor_that_is_no_listener_is_told(start, fd):
    program = start(f"run('fd://{fd}')")
    assert finish(program) == 0
    line = " ".join(program.events("raised")[0])
    assert f"cannot listen on fd://{fd}: descriptor {fd} is no listening" in line


@pytest.mark.parametrize(
    ("option", "umask", "mode"),
    [
        ("unix_mode='600'", 0, 0o600),
        ("unix_mode=0o666", 0o77, 0o666),
        ("", 0o27, 0o750),
    ],
)
def test_a_unix_socket_has_the_mode_that_was_asked_for(
    start, tmp_path, option, umask, mode
):
    path = tmp_path / "sock"
    program = start(f"os.umask({umask})\nrun('unix:{path}', {option})")
    ready(program)
    assert path.stat().st_mode & 0o777 == mode
    assert path.stat().st_uid == os.getuid()
    assert who(f"unix:{path}")
    stop(program)
