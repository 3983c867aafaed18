"""Reload and scaling: planned changes of the workers; nobody is turned away."""

from __future__ import annotations

import os
import signal
import textwrap
import time
from pathlib import Path

import psutil
import pytest
from programs import SOON, Program, ask, connect, ending, kill, read_all, repeats
from runs import HALF, REST, WAYS, finish, ready, stop, who

from prefork import Prefork
from prefork.errors import ConfigError

HERE = str(Path(__file__).parent)

# A program whose workers answer with the text that was in a file when it was loaded.
LOADED = """
    class Loaded(Drainer):
        source = open({path!r}).read()
        exec(source)
        def serve(self, sockets, **more):
            say("serves", os.getpid(), text)
            super().serve(sockets, **more)
"""


@pytest.fixture
def loaded(start, tmp_path):
    """loaded(options): a run of what is in tmp_path/code.py, which defines `text`."""
    (tmp_path / "code.py").write_text("text = 'old'")
    program = textwrap.dedent(LOADED).replace("text)\n", "self.text)\n")

    def run(options: str) -> Program:
        path = str(tmp_path / "code.py")
        return start(program.format(path=path) + f"run(server=Loaded(), {options})")

    return run


def serving(program: Program, count: int) -> dict[int, str]:
    """Await so many workers that begin to serve; the code that each has loaded."""
    told = [program.until("serves") for _ in range(count)]
    return {int(pid): text for pid, text in told}


# ---- Reload --------------------------------------------------------------------------


@pytest.mark.contract("better: signals")
@WAYS
def test_hup_replaces_all_workers_with_the_new_code(loaded, tmp_path, way):
    program = loaded(f"workers=2, {way}")
    address, pids = ready(program)
    assert serving(program, 2) == dict.fromkeys(pids, "old")
    (tmp_path / "code.py").write_text("text = 'new'")
    program.signal(signal.SIGHUP)
    new = serving(program, 2)
    assert set(new.values()) == {"new"} and not set(new) & set(pids)
    program.until_logged("reloaded 2 workers, generation 2")
    assert who(address) in new
    stop(program)
    assert [int(pid) for _, pid in program.events("spawn")] == [*pids, *new]
    assert not program.events("recover")  # planned exits are no crashes


@pytest.mark.contract("better: signals")
@WAYS
def test_new_code_that_fails_leaves_the_old_workers_serving(loaded, tmp_path, way):
    program = loaded(f"workers=2, {way}")
    address, pids = ready(program)
    (tmp_path / "code.py").write_text("text = 'new'; raise ValueError('no database')")
    program.signal(signal.SIGHUP)
    program.until_logged("reload failed, the workers stay as they are")
    program.until_logged("ValueError: no database")
    assert who(address) in pids
    (tmp_path / "code.py").write_text("text = 'mended'")
    program.signal(signal.SIGHUP)
    assert who_serves(program, "mended", 2) & set(pids) == set()
    program.until_logged("reloaded 2 workers")
    stop(program)
    assert not program.events("recover")


def who_serves(program: Program, text: str, count: int) -> set[int]:
    """Await so many workers with this code."""
    found: set[int] = set()
    while len(found) < count:
        pid, code = program.until("serves")
        if code == text:
            found.add(int(pid))
    return found


def test_a_program_that_ends_before_it_serves_fails_the_reload(loaded, tmp_path):
    program = loaded("workers=1")
    address, pids = ready(program)
    (tmp_path / "code.py").write_text("os._exit(5)")
    program.signal(signal.SIGHUP)
    line = program.until_logged("reload failed")
    assert "exit status 5" in line and "listen_and_serve()" in line
    assert who(address) == pids[0]
    stop(program)


def test_a_successor_that_fails_to_boot_leaves_the_old_worker_serving(start, tmp_path):
    program = start(f"""
        class Moody(Drainer):
            def boot(self):
                if os.path.exists({str(tmp_path / "flag")!r}):
                    raise ValueError("not today")
        run(server=Moody(), workers=2, recover_threshold=0)
    """)
    address, pids = ready(program)
    (tmp_path / "flag").touch()
    program.signal(signal.SIGHUP)
    program.until_logged("reload failed")
    program.until_logged("ValueError: not today")
    assert who(address) in pids
    stop(program)
    assert len(program.events("spawn")) == 3  # the first slot only was tried


def test_the_new_worker_accepts_before_the_old_one_is_told_to_leave(start, mode):
    program = start(f"""
        class Telling(Drainer):
            def serve(self, sockets, **more):
                super().serve(sockets, **more)
                say("left", os.getpid())
            def boot(self):
                say("boots", os.getpid())
        run(server=Telling(), workers=1, {mode})
    """)
    address, pids = ready(program)
    with connect(address) as held:
        held.sendall(HALF)
        program.until("begun")
        program.signal(signal.SIGHUP)
        program.until("boots")
        new = int(program.until("boots")[0])
        answered = who(address)  # while the old one is busy
        assert answered == new
        held.sendall(REST)
        assert int(read_all(held)) == pids[0]
    assert int(program.until("left")[0]) == pids[0]
    program.until_logged("reloaded 1 workers")
    program.signal(signal.SIGTERM)
    assert program.wait() == 0
    assert program.events("left")[-1] == ["left"]


def test_one_slot_at_a_time_is_reloaded(start):
    program = start("""
        class Telling(Drainer):
            def serve(self, sockets, **more):
                say("in", os.getpid())
                super().serve(sockets, **more)
                say("out", os.getpid())
        run(server=Telling(), workers=3)
    """)
    ready(program)
    program.signal(signal.SIGHUP)
    program.until_logged("reloaded 3 workers")
    program.signal(signal.SIGTERM)
    assert program.wait() == 0
    order = [line[0] for line in program.events("in", "out")]
    assert order == ["in"] * 3 + ["in", "out"] * 3 + ["out"] * 3


def test_reloads_follow_each_other_and_one_asked_for_meanwhile_begins_anew(start):
    program = start("""
        class Slow(Drainer):
            def boot(self):
                if is_child() and os.getpid() != first.get("pid"):
                    say("boots", os.getpid())
        first = {}
        run(server=Slow(), workers=2)
    """)
    ready(program)
    for _ in range(5):
        program.signal(signal.SIGHUP)
    program.until_logged("reloaded 2 workers")
    program.signal(signal.SIGHUP)
    program.until_logged("reloaded 2 workers")
    stop(program)


def test_a_stop_in_the_middle_of_a_reload_is_orderly(start, mode):
    program = start(f"""
        class Slow(Drainer):
            def boot(self):
                if again:
                    say("boots")
                    pause()
        again = is_child()
        run(server=Slow(), workers=2, shutdown_grace_period=3600, {mode})
    """)
    ready(program)
    program.signal(signal.SIGHUP)
    program.until("boots")
    stop(program)


def test_a_stop_while_the_program_is_loaded_again_is_orderly(start):
    program = start("""
        if is_child():
            say("loads")
            pause()
        run(workers=2, shutdown_grace_period=0.5)
    """)
    ready(program)
    program.signal(signal.SIGHUP)
    program.until("loads")
    stop(program)


@pytest.mark.contract("behaviour 7")
@pytest.mark.parametrize("error", ["ValueError", "KeyboardInterrupt", "SystemExit"])
def test_on_child_spawn_raising_in_a_reload_tears_down_and_propagates(start, error):
    program = start(f"""
        def on_child_spawn(pid):
            spawned.append(pid)
            if len(spawned) == 3:
                raise {error}("no")
        spawned = []
        run(workers=2, on_child_spawn=on_child_spawn)
    """)
    ready(program)
    program.signal(signal.SIGHUP)
    assert finish(program) == 0
    assert program.events("raised")[0][1] == error


def test_a_crash_after_a_reload_is_recovered_with_the_new_code(loaded, tmp_path):
    program = loaded("workers=2")
    ready(program)
    serving(program, 2)
    (tmp_path / "code.py").write_text("text = 'new'")
    program.signal(signal.SIGHUP)
    new = serving(program, 2)
    program.until_logged("reloaded")
    (tmp_path / "code.py").write_text("text = 'newer, but nobody asked for it'")
    kill(next(iter(new)))
    assert list(serving(program, 1).values()) == ["new"]
    stop(program)


def test_a_template_that_dies_is_followed_by_another(loaded, tmp_path):
    program = loaded("workers=1")
    _, pids = ready(program)
    serving(program, 1)
    program.signal(signal.SIGHUP)
    (new,) = serving(program, 1)
    program.until_logged("reloaded")
    children = {child.pid for child in psutil.Process(program.pid).children()}
    (template,) = children - {new}
    kill(template)
    program.until_logged("reloaded")
    serving(program, 1)
    stop(program)


def test_a_template_that_hangs_is_killed_and_followed_by_another(start):
    program = start("""
        def on_child_spawn(pid):
            say("spawn", pid)
            sys.modules["prefork.spawn"].ANSWER_TIME = next(times, 20)
        times = iter([20, 0.1])  # behind the template's first worker
        run(workers=1, recover_threshold=9, on_child_spawn=on_child_spawn)
    """)
    _, (old,) = ready(program)
    program.signal(signal.SIGHUP)
    program.until("spawn"), program.until("spawn")
    program.until_logged("reloaded")
    children = {child.pid for child in psutil.Process(program.pid).children()} - {old}
    new = int(program.events("spawn")[1][1])
    (template,) = children - {new}
    with ending(template):
        os.kill(template, signal.SIGSTOP)
        kill(new)
    program.until_logged("template, which forks workers, has failed; going on")
    program.until_logged("reloaded")
    stop(program)


def test_the_old_template_ends_when_a_new_one_has_taken_over(start):
    program = start("run(workers=2)")
    ready(program)
    for _ in range(3):
        program.signal(signal.SIGHUP)
        program.until_logged("reloaded")
    deadline = time.monotonic() + SOON
    while len(psutil.Process(program.pid).children()) != 3:
        assert time.monotonic() < deadline
    stop(program)


def test_workers_of_a_template_end_with_the_master(start, mode):
    program = start(f"run(workers=2, {mode})")
    ready(program)
    program.signal(signal.SIGHUP)
    program.until_logged("reloaded")
    with ending(*(child.pid for child in psutil.Process(program.pid).children())):
        kill(program.pid)


def test_a_worker_of_a_template_that_serves_a_stranger_s_way_ends_with_the_master(
    start,
):
    program = start("run(workers=2, serve_func=serve)")
    ready(program)
    program.signal(signal.SIGHUP)
    program.until_logged("reloaded")
    with ending(*(child.pid for child in psutil.Process(program.pid).children())):
        kill(program.pid)


def test_a_worker_of_a_template_holds_what_is_its_own_and_nothing_else(start, mode):
    program = start(f"""
        class Counting(Drainer):
            def boot(self):
                fds = len(os.listdir("/proc/self/fd")) - 1
                say("holds", listening(), fds - 3, is_child(), os.getppid(),
                    len(signal.pthread_sigmask(signal.SIG_BLOCK, [])))
        run(server=Counting(), workers=2, {mode})
    """)
    ready(program)
    program.until("holds"), program.until("holds")
    program.signal(signal.SIGHUP)
    for _ in range(2):
        # its listener, the pipe to the master, the lifeline, the scoreboard
        told = program.until("holds")
        assert told == ["1", "4", "True", str(program.pid), "0"]
    program.until_logged("reloaded")
    stop(program)


@pytest.mark.contract("better: control")
def test_reload_is_a_method_for_callbacks_and_threads(start):
    program = start("""
        run(workers=1, on_master_ready=lambda pids: (
            say("ready", text(master.address), *pids),
            threading.Thread(target=master.reload).start()))
    """)
    ready(program)
    program.until_logged("reloaded 1 workers")
    stop(program)


def test_an_old_worker_that_does_not_leave_is_killed_after_the_grace_period(start):
    program = start("""
        class Stubborn(Drainer):
            def serve(self, sockets, *, on_ready, **_):
                signal.signal(signal.SIGTERM, signal.SIG_IGN)
                on_ready()
                while True:
                    signal.pause()
        run(server=Stubborn(), workers=1, shutdown_grace_period=0.2)
    """)
    ready(program)
    program.signal(signal.SIGHUP)
    program.until_logged("does not leave: killing it")
    program.until_logged("reloaded 1 workers")
    stop(program)
    assert not program.events("recover")


def test_a_program_that_cannot_be_run_again_says_so(start, tmp_path):
    script = "from masters import *\nrun(workers=1)\n"
    path = tmp_path / "script"
    path.write_text(script)
    line = f"import sys, os; os.dup2(os.open({str(path)!r}, 0), 0);"
    line += " os.execv(sys.executable, [sys.executable, '-'])"
    with Program(["-c", line], env={"PYTHONPATH": HERE}) as program:
        ready(program)
        program.signal(signal.SIGHUP)
        assert "reload failed" in (line := program.until_logged("cannot be run again"))
        stop(program)


# ---- Scaling -------------------------------------------------------------------------


@pytest.mark.contract("better: signals")
@WAYS
def test_ttin_is_one_worker_more_and_ttou_one_less(start, way):
    program = start(f"run(workers=1, recover_threshold=0, {way})")
    address, pids = ready(program)
    program.signal(signal.SIGTTIN)
    new = int(program.until("spawn")[0])
    while new in pids:
        new = int(program.until("spawn")[0])
    with connect(address) as held:  # keeps a worker busy: the other one answers
        held.sendall(HALF)
        busy = int(program.until("begun")[0])
        assert busy in {*pids, new}
        held.sendall(REST)
        read_all(held)
    psutil.Process(new).ppid()
    gone = psutil.Process(new)
    program.signal(signal.SIGTTOU)
    gone.wait(SOON)
    assert [who(address) for _ in range(8)] == pids * 8
    stop(program)
    assert not program.events("recover")


def test_a_slot_that_is_given_up_answers_what_is_in_its_queue(start, mode):
    program = start(f"run(workers=2, {mode})")
    address, pids = ready(program)
    held = [connect(address) for _ in range(20)]
    for sock in held:
        sock.sendall(HALF)  # both are busy with their first, the rest is queued
    program.until("begun")
    program.signal(signal.SIGTTOU)
    program.until_logged("scaling from 2 to 1 workers")
    for sock in held:
        sock.sendall(REST)
    answers = [read_all(sock) for sock in held]
    assert {int(answer) for answer in answers} <= set(pids)
    for sock in held:
        sock.close()
    stop(program)


def test_a_connection_after_ttou_waits_for_nobody_who_leaves(start):
    program = start("run(workers=4, reuseport=True, shutdown_grace_period=3600)")
    address, pids = ready(program)
    held = [connect(address) for _ in range(40)]
    busy = set()
    for sock in held:
        sock.sendall(HALF)
    while len(busy) < 4:
        busy.add(int(program.until("begun")[0]))
    program.signal(signal.SIGTTOU)
    program.until("asked")  # by then nobody new is sent there
    late = [connect(address) for _ in range(40)]
    assert [repeats(sock) for sock in late] == [0] * 40
    for sock in [*held, *late]:
        sock.sendall(HALF + REST if sock in late else REST)
    for sock in [*held, *late]:
        assert int(read_all(sock)) in pids
        sock.close()
    stop(program)


@pytest.mark.contract("better: control")
def test_scale_sets_how_many_and_so_does_the_attribute(start, mode):
    program = start(f"""
        def on_master_ready(pids):
            say("ready", text(master.address), *pids)
            master.scale(4)
        def on_child_spawn(pid):
            say("spawn", pid)
            if len(master.workers) == 4 and master.workers[3].pid == pid:
                master.workers = 2
        run(workers=1, on_master_ready=on_master_ready,
            on_child_spawn=on_child_spawn, {mode})
    """)
    address, pids = ready(program)
    program.until_logged("scaling from 1 to 4 workers")
    program.until_logged("scaling from 4 to 2 workers")
    deadline = time.monotonic() + SOON
    while len(psutil.Process(program.pid).children()) != 2:
        assert time.monotonic() < deadline
    assert who(address)
    stop(program)
    assert not program.events("recover")


def test_the_last_worker_stays(start):
    program = start("run(workers=1)")
    address, pids = ready(program)
    program.signal(signal.SIGTTOU)
    program.until_logged("SIGTTOU: workers must be at least 1, not 0")
    assert who(address) == pids[0]
    stop(program)


@pytest.mark.contract("behaviour 7")
def test_scaling_again_and_again_leaves_nothing_behind(start, mode):
    program = start(f"run(workers=2, {mode})")
    address, _ = ready(program)
    master = psutil.Process(program.pid)
    before = master.num_fds()
    for _ in range(3):
        for number in [signal.SIGTTIN] * 3 + [signal.SIGTTOU] * 3:
            program.signal(number)
            program.until_logged("scaling from")
        deadline = time.monotonic() + SOON
        while len(master.children()) != 2:
            assert time.monotonic() < deadline
        assert who(address)
    deadline = time.monotonic() + SOON
    while master.num_fds() != before:
        assert time.monotonic() < deadline, os.listdir(f"/proc/{program.pid}/fd")
    stop(program)


def test_reload_and_scaling_at_once_end_as_asked(start, mode, tmp_path):
    gate = tmp_path / "gate"
    os.mkfifo(gate)
    program = start(f"""
        if is_child():
            open({str(gate)!r}).read()
        run(workers=2, {mode})
    """)
    address, pids = ready(program)
    program.signal(signal.SIGHUP)
    program.until_logged("reloading")
    program.signal(signal.SIGTTIN)
    program.until_logged("scaling from 2 to 3 workers")
    gate.write_text("go on")
    program.until_logged("reloaded 3 workers")
    assert who(address) not in pids
    stop(program)


def test_scaling_ends_where_the_system_has_no_place_for_a_worker(start, mode):
    program = start(f"""
        import resource
        def on_master_ready(pids):
            used = max(map(int, os.listdir("/proc/self/fd")))
            resource.setrlimit(resource.RLIMIT_NOFILE, (used + 1, used + 1))
            say("ready", text(master.address), *pids)
            master.scale(9)
        run(workers=2, on_master_ready=on_master_ready, {mode})
    """)
    address, pids = ready(program)
    program.until_logged("cannot start a worker: too many open files; staying with 2")
    assert who(address) in pids
    stop(program)


def test_a_crashed_worker_that_cannot_be_replaced_is_tried_again(start):
    program = start("""
        def fork(fork=os.fork, failed=[]):
            if failed:
                return fork()
            failed.append(True)
            raise BlockingIOError(11, "")
        def on_master_ready(pids):
            os.fork = fork
            say("ready", text(master.address), *pids)
        run(workers=2, on_master_ready=on_master_ready)
    """)
    address, pids = ready(program)
    kill(pids[0])
    program.until_logged("cannot start a worker: resource temporarily unavailable; try")
    old, new = map(int, program.until("recover"))
    assert old == pids[0] and who(address) in (pids[1], new)
    stop(program)


def test_a_reload_fails_where_the_system_has_no_place_for_a_worker(start):
    program = start("""
        def on_master_ready(pids):
            def run_again(*_):
                raise BlockingIOError(11, "")
            sys.modules["prefork.spawn"].run_again = run_again
            say("ready", text(master.address), *pids)
            master.reload()
        run(workers=2, on_master_ready=on_master_ready, spawn="exec")
    """)
    address, pids = ready(program)
    program.until_logged("reload failed, the workers stay as they are: cannot start a")
    assert who(address) in pids
    stop(program)


@pytest.mark.parametrize("count", [0, -1, "x"])
def test_a_wrong_number_of_workers_is_told(start, count):
    program = start(f"""
        def on_master_ready(pids):
            try:
                master.scale({count!r})
            except errors.ConfigError as error:
                say("told", error)
            master.shutdown()
        run(on_master_ready=on_master_ready)
    """)
    assert "workers must be" in " ".join(program.until("told"))
    assert finish(program) == 0


def test_nothing_is_asked_of_a_prefork_that_does_not_run():
    master = Prefork(serve_func=print)
    master.reload()
    master.scale(3)
    with pytest.raises(ConfigError, match="at least 1"):
        master.scale(0)


# ---- Leaving, and signals to the whole group -----------------------------------------

SERVER = """
import os, sys
from masters import say
from prefork import Prefork, Server

def app(request):
    return str(os.getpid())

class Telling(Server):
    def _drain(self, *args):
        super()._drain(*args)
        say("drains")

def ready(pids):
    say("ready", "%s:%d" % prefork.address, *pids)

prefork = Prefork(Telling(app, drain_idle=60), workers=1, on_master_ready=ready,
    recover_threshold=0, shutdown_grace_period=60,
    on_child_recover=lambda old, new: say("recover", old, new))
prefork.listen_and_serve("127.0.0.1:0")
say("returned")
"""

GET = b"GET / HTTP/1.1\r\nHost: a\r\n\r\n"


@pytest.mark.contract("better: drain")
def test_while_a_worker_drains_another_one_has_taken_its_place():
    with Program(["-c", SERVER], {"PYTHONPATH": HERE}) as program:
        address, pid = program.until("ready")
        with connect(address) as kept:
            kept.sendall(GET)
            assert kept.recv(65536).endswith(pid.encode())
            os.kill(int(pid), signal.SIGTERM)
            assert program.until("recover")[0] == pid
            close = GET.replace(b"\r\n\r\n", b"\r\nConnection: close\r\n\r\n")
            assert not ask(address, close).endswith(pid.encode())
            kept.sendall(GET)  # it is idle, and has its time
            answer = read_all(kept)
            assert b"\r\nConnection: close\r\n" in answer
            assert answer.endswith(pid.encode())
        program.signal(signal.SIGTERM)
        assert program.wait() == 0


@pytest.mark.contract("better: drain")
def test_term_to_the_whole_group_does_not_cut_the_idle_short():
    with Program(["-c", SERVER], {"PYTHONPATH": HERE}) as program:
        address, pid = program.until("ready")
        with connect(address) as kept:
            kept.sendall(GET)
            kept.recv(65536)
            program.signal_group(signal.SIGTERM)
            program.until("drains")
            os.kill(int(pid), signal.SIGTERM)  # and once more
            program.until("drains")
            kept.sendall(GET)
            assert read_all(kept).endswith(pid.encode())
        assert program.wait() == 0
        assert program.events("returned")
