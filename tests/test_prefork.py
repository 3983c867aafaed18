"""The rows of the prefork contract, with real processes, signals, sockets and clients.

Each test runs a master in a process of its own (programs.py), in which masters.py
counts before and after: file descriptors, children, signal mask and handlers.
"""

from __future__ import annotations

import errno
import os
import select
import signal
import socket
import sys
import textwrap
import time
from pathlib import Path

import pytest
from programs import SOON, ask, connect, ending, kill, read_all
from runs import HALF, REST, finish, ready, stop, who

from prefork import Prefork, _listeners, is_child
from prefork.errors import (
    ConfigError,
    NoReuseportError,
    OnlyReuseportOnWindowsError,
    OverRecoveryError,
    WorkerBootError,
)

# ---- Start ---------------------------------------------------------------------------


@pytest.mark.contract("OnMasterReady", "behaviour 1")
def test_children_are_spawned_one_by_one_and_then_the_master_is_ready(start, mode):
    program = start(f"run(workers=3, {mode})")
    _, pids = ready(program)
    spawned = [int(pid) for _, pid in program.events("spawn")]
    assert spawned == pids and len(set(pids)) == 3
    stop(program)
    assert [line[0] for line in program.events("spawn", "ready", "returned")] == [
        *["spawn"] * 3,
        "ready",
        "returned",
    ]


@pytest.mark.contract("better: ready")
def test_ready_means_that_every_worker_accepts(start, mode):
    program = start(f"""
        class Slow(Drainer):
            def boot(self):
                os.read(gate, 1)  # opened when the last child is spawned
                say("accepts", os.getpid())
        gate, end = os.pipe()
        spawned = []
        def on_child_spawn(pid):
            spawned.append(pid)
            if len(spawned) == 3:
                os.write(end, b"123")
        run(server=Slow(), workers=3, on_child_spawn=on_child_spawn, {mode})
    """)
    _, pids = ready(program)
    assert sorted(int(pid) for _, pid in program.events("accepts")) == sorted(pids)
    stop(program)


@pytest.mark.contract("ListenAndServe")
def test_every_worker_answers(start, mode):
    program = start(f"run(workers=3, {mode})")
    address, pids = ready(program)
    seen: set[int] = set()
    deadline = time.monotonic() + SOON
    while seen != set(pids) and time.monotonic() < deadline:
        with connect(address) as held:  # keeps its worker busy
            held.sendall(HALF)
            seen.add(who_else(address))
            held.sendall(REST)
            seen.add(int(read_all(held)))
    assert seen == set(pids)
    stop(program)


def who_else(address: str) -> int:
    """The pid of a worker that is free: where hashing meets a busy one, try again."""
    deadline = time.monotonic() + SOON
    while time.monotonic() < deadline:
        with connect(address) as sock:
            sock.sendall(HALF + REST)
            if select.select([sock], [], [], 0.2)[0]:
                return int(read_all(sock))
    raise AssertionError("no worker is free")


@pytest.mark.contract("behaviour 8")
def test_callbacks_run_in_the_master_s_main_thread(start):
    program = start("""
        def where(name):
            own = threading.current_thread() is threading.main_thread()
            return lambda *_: say(name, os.getpid(), own)
        run(
            workers=1,
            on_child_spawn=where("spawn"),
            on_master_ready=lambda pids: (where("ready")(), say("go", *pids)),
            on_child_recover=where("recover"),
        )
    """)
    kill(int(program.until("go")[0]))
    program.until("recover")
    stop(program)
    for _, pid, own in program.events("spawn", "ready", "recover"):
        assert (int(pid), own) == (program.pid, "True")


@pytest.mark.contract("New", "attributes")
def test_attributes_set_after_construction_are_what_counts(start):
    program = start("""
        p = Prefork(None)
        p.serve_func, p.workers, p.shutdown_grace_period = serve, 3, "1s"
        def on_master_ready(pids):
            say("ready", text(p.address), *pids)
            p.shutdown()
        p.on_master_ready = on_master_ready
        p.listen_and_serve("127.0.0.1:0")
        p.workers = 0
        try:
            p.listen_and_serve("127.0.0.1:0")
        except errors.ConfigError as error:
            say("refused", error)
    """)
    assert len(ready(program)[1]) == 3
    words = program.until("refused")
    assert " ".join(words) == "workers must be at least 1, not 0"
    assert program.wait() == 0


def test_a_run_can_follow_a_run(start, mode):
    program = start(f"""
        for _ in range(3):
            run(on_master_ready=lambda pids: (say("ready", 0, *pids),
                                              master.shutdown()), {mode})
    """)
    assert program.wait() == 0
    told = program.events("ready", "returned", "left")
    assert [line[0] for line in told] == ["ready", "returned", "left"] * 3
    assert program.events("left") == [["left"]] * 3


# ---- What cannot be started ----------------------------------------------------------


@pytest.mark.contract("better: slots")
def test_a_port_in_use_is_the_true_error_before_any_spawn(start, mode):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        program = start(f"""
            error = run("127.0.0.1:{port}", {mode})
            say("errno", error.errno)
        """)
        assert finish(program) == 0
    text = " ".join(program.events("raised")[0])
    assert (
        f"OSError [Errno {errno.EADDRINUSE}] cannot listen on 127.0.0.1:{port}" in text
    )
    assert "address already in use; stop what listens there" in text
    assert not program.events("spawn", "ready")


def test_the_second_of_two_addresses_fails_before_any_spawn(start, mode):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        program = start(f'run(["127.0.0.1:0", "127.0.0.1:{port}"], {mode})')
        assert finish(program) == 0
    assert program.events("raised")[0][1] == "OSError"
    assert not program.events("spawn")


@pytest.mark.parametrize(
    ("address", "error", "text"),
    [
        (
            "no-such-host.invalid:80",
            "gaierror",
            "cannot resolve 'no-such-host.invalid'",
        ),
        ("192.0.2.1:80", "OSError", "choose an address that this machine has"),
        (
            "unix:/no/such/dir/sock",
            "FileNotFoundError",
            "create the socket's directory",
        ),
        ("unix:/" + "x" * 200, "OSError", "choose a path of at most 107 bytes"),
        ("8000", "ConfigError", "address must be HOST:PORT"),
        ("a:b", "ConfigError", "port must be between 0 and 65535, not 'b'"),
        (":65536", "ConfigError", "port must be between 0 and 65535, not '65536'"),
        ("::1:80", "ConfigError", "address must be HOST:PORT"),
        ("[::1]:80", "ConfigError", "but network is tcp4; use tcp or tcp6"),
        ("unix:", "ConfigError", "address must name the socket's path"),
        ("fd://x", "ConfigError", "address must be fd://N, like fd://3"),
    ],
)
def test_a_wrong_address_is_told_with_the_remedy(start, address, error, text):
    program = start(f"run({address!r})")
    assert finish(program) == 0
    line = " ".join(program.events("raised")[0])
    assert line.startswith(f"raised {error} ") and text in line
    assert not program.events("spawn")


def test_no_addresses_are_told():
    with pytest.raises(ConfigError, match="not none"):
        Prefork(serve_func=print).listen_and_serve([])


@pytest.mark.contract("better: nothing")
@pytest.mark.parametrize("server", [None, object()])
def test_nothing_to_serve_with_is_a_type_error_before_any_spawn(server):
    with pytest.raises(TypeError, match="needs a server with a serve"):
        Prefork(server).listen_and_serve("127.0.0.1:0")


@pytest.mark.contract("ServeFunc")
def test_serve_func_takes_one_listener():
    with pytest.raises(ConfigError, match="one listener"):
        Prefork(serve_func=print).listen_and_serve(["127.0.0.1:0", "127.0.0.1:0"])


def test_it_must_run_in_the_main_thread(start):
    program = start("""
        def elsewhere():
            try:
                Prefork(Drainer()).listen_and_serve("127.0.0.1:0")
            except RuntimeError as error:
                say("refused", error)
        thread = threading.Thread(target=elsewhere)
        thread.start()
        thread.join()
    """)
    assert "call it in the main thread" in " ".join(program.until("refused"))
    assert program.wait() == 0


def test_a_running_prefork_cannot_be_run_again(start):
    program = start("""
        def again(pids):
            try:
                master.listen_and_serve("127.0.0.1:0")
            except RuntimeError as error:
                say("refused", error)
            master.shutdown()
        run(on_master_ready=again)
    """)
    assert "serves already" in " ".join(program.until("refused"))
    assert finish(program) == 0


def test_a_worker_cannot_be_a_master(start):
    program = start("""
        class Nested(Drainer):
            def boot(self):
                Prefork(Drainer()).listen_and_serve("127.0.0.1:0")
        run(server=Nested())
    """)
    assert finish(program) == 0
    assert "a worker cannot be a master" in " ".join(program.events("raised")[0])


@pytest.mark.contract("ErrOnlyReuseportOnWindows")
def test_on_windows_a_listener_cannot_be_shared(monkeypatch):
    monkeypatch.setattr(sys, "platform", "win32")
    with pytest.raises(OnlyReuseportOnWindowsError, match="must be True on Windows"):
        Prefork(serve_func=print).listen_and_serve("127.0.0.1:0")


@pytest.mark.contract("reuseport.ErrNoReusePort")
def test_a_kernel_without_reuseport_is_told_by_its_errno(monkeypatch):
    def refuse(*_: object) -> int:
        raise OSError(errno.ENOPROTOOPT, os.strerror(errno.ENOPROTOOPT))

    monkeypatch.setattr(_listeners, "listen", refuse)
    with pytest.raises(NoReuseportError, match="use reuseport=False") as caught:
        Prefork(serve_func=print, reuseport=True).listen_and_serve("127.0.0.1:0")
    assert caught.value.errno == errno.ENOPROTOOPT


# ---- Failing callbacks ---------------------------------------------------------------

RAISED = ["ValueError", "OSError", "KeyboardInterrupt", "SystemExit", "GeneratorExit"]


@pytest.mark.contract("OnChildSpawn", "behaviour 2")
@pytest.mark.parametrize("error", RAISED)
def test_on_child_spawn_raising_tears_down_and_propagates_unchanged(start, mode, error):
    program = start(f"""
        error = {error}("no")
        spawned = []
        def on_child_spawn(pid):
            say("spawn", pid)
            spawned.append(pid)
            if len(spawned) == 2:
                raise error
        raised = run(workers=4, on_child_spawn=on_child_spawn, {mode})
        say("same", raised is error)
    """)
    assert finish(program) == 0
    assert len(program.events("spawn")) == 2  # the rest are never started
    assert program.events("same") == [["same", "True"]]
    assert not program.events("ready")


@pytest.mark.contract("OnMasterReady", "behaviour 7")
@pytest.mark.parametrize("error", RAISED)
def test_on_master_ready_raising_tears_down_and_propagates_unchanged(
    start, mode, error
):
    program = start(f"""
        error = {error}("no")
        def on_master_ready(pids):
            raise error
        raised = run(on_master_ready=on_master_ready, {mode})
        say("same", raised is error)
    """)
    assert finish(program) == 0
    assert program.events("same") == [["same", "True"]]


@pytest.mark.contract("behaviour 4")
@pytest.mark.parametrize("error", RAISED)
def test_on_child_spawn_raising_in_a_recovery_means_no_on_child_recover(start, error):
    program = start(f"""
        def on_child_spawn(pid):
            say("spawn", pid)
            if master.workers[1].pid is not None and said:
                raise {error}("no")
        def on_master_ready(pids):
            said.append(1)
            say("ready", 0, *pids)
        said = []
        run(on_child_spawn=on_child_spawn, on_master_ready=on_master_ready)
    """)
    kill(ready(program)[1][0])
    assert finish(program) == 0
    assert program.events("raised")[0][1] == error
    assert len(program.events("spawn")) == 3
    assert not program.events("recover")


@pytest.mark.contract("OnChildRecover")
def test_on_child_recover_raising_is_logged_and_no_more(start):
    program = start("""
        def on_child_recover(old, new):
            say("recover", old, new)
            raise ValueError("only a notice")
        run(on_child_recover=on_child_recover)
    """)
    address, pids = ready(program)
    kill(pids[0])
    program.until("recover")
    assert who(address)
    stop(program)
    assert "ValueError: only a notice" in program.stderr


@pytest.mark.parametrize("error", ["KeyboardInterrupt", "SystemExit"])
def test_on_child_recover_raising_what_is_no_exception_tears_down(start, error):
    program = start(f"""
        def on_child_recover(old, new):
            raise {error}("no")
        run(on_child_recover=on_child_recover)
    """)
    kill(ready(program)[1][0])
    assert finish(program) == 0
    assert program.events("raised")[0][1] == error


# ---- Recovery ------------------------------------------------------------------------


@pytest.mark.contract("OnChildSpawn", "OnChildRecover", "behaviour 4")
def test_recovery_spawns_then_notices_with_old_and_new_pid(start, mode):
    program = start(f"run({mode})")
    _, pids = ready(program)
    kill(pids[1])
    old, new = map(int, program.until("recover"))
    assert old == pids[1]
    assert program.events("spawn", "recover")[-2:] == [
        ["spawn", str(new)],
        ["recover", str(old), str(new)],
    ]
    stop(program)


@pytest.mark.contract("RecoverThreshold", "ErrOverRecovery", "behaviour 3")
@pytest.mark.parametrize("threshold", [0, 1, 3])
def test_exactly_threshold_exits_are_recovered_and_one_more_ends_it(
    start, mode, threshold
):
    program = start(f"""
        error = run(recover_threshold={threshold}, {mode})
        say("error", error.exits, error.threshold, *error.statuses)
    """)
    _, pids = ready(program)
    victim = pids[0]
    for _ in range(threshold):
        kill(victim)
        victim = int(program.until("recover")[1])
    kill(victim)
    assert finish(program) == 0
    assert len(program.events("recover")) == threshold
    told = [str(threshold + 1), str(threshold), *["-9"] * (threshold + 1)]
    assert program.events("error") == [["error", *told]]
    assert program.events("raised")[0][1] == OverRecoveryError.__name__


@pytest.mark.contract("behaviour 3")
def test_exits_at_the_same_moment_are_recovered_up_to_the_threshold(start):
    program = start("run(workers=4, recover_threshold=2)")
    _, pids = ready(program)
    program.signal(signal.SIGSTOP)  # the master finds all of them at once
    for pid in pids:
        kill(pid)
    program.signal(signal.SIGCONT)
    assert finish(program) == 0
    assert len(program.events("recover")) == 2
    assert program.events("raised")[0][1] == OverRecoveryError.__name__


@pytest.mark.contract("better: exits")
def test_exits_older_than_the_window_are_forgotten(start):
    program = start("""
        run(workers=1, recover_threshold=1, recover_window=0.05, recover_interval=0.1)
    """)
    _, pids = ready(program)
    victim = pids[0]
    for _ in range(4):
        kill(victim)
        victim = int(program.until("recover")[1])  # 0.1 s later
    stop(program)


@pytest.mark.contract("better: exits")
def test_without_a_window_exits_count_for_life(start):
    program = start("""
        run(workers=1, recover_threshold=1, recover_window=None, recover_interval=0.1)
    """)
    _, pids = ready(program)
    kill(pids[0])
    kill(int(program.until("recover")[1]))
    assert finish(program) == 0
    assert program.events("raised")[0][1] == OverRecoveryError.__name__


@pytest.mark.contract("RecoverInterval")
def test_the_recover_interval_is_waited_for_by_each_child_on_its_own(start):
    interval = 1.0
    program = start(f"""
        run(workers=3, recover_threshold=9, recover_interval={interval},
            on_child_recover=lambda old, new: say("recover", time.monotonic()))
    """)
    address, pids = ready(program)
    killed = time.monotonic()
    kill(pids[0])
    kill(pids[1])
    gone = time.monotonic()
    first = float(program.until("recover")[0])
    second = float(program.until("recover")[0])
    assert first - killed >= interval
    assert second - first < interval + (gone - killed)
    assert who(address)
    stop(program)


@pytest.mark.contract("RecoverInterval")
def test_a_stop_interrupts_the_recover_interval(start):
    program = start("run(workers=1, recover_interval=3600)")
    _, pids = ready(program)
    kill(pids[0])
    stop(program)
    assert len(program.events("spawn")) == 1


@pytest.mark.contract("behaviour 5")
def test_a_connection_made_while_no_worker_lives_waits_for_the_next(start, mode):
    program = start(f"run(workers=1, recover_interval=0.3, {mode})")
    address, pids = ready(program)
    kill(pids[0])
    with connect(address) as sock:
        sock.sendall(HALF + REST)
        new = int(program.until("recover")[1])
        assert int(read_all(sock)) == new
    stop(program)


@pytest.mark.contract("better: slots")
def test_connections_queued_at_a_dying_worker_are_answered_by_its_successor(
    start, mode
):
    program = start(f"run(workers=1, {mode})")
    address, pids = ready(program)
    with connect(address) as victim:
        victim.sendall(HALF)
        program.until("begun")
        queued = [connect(address) for _ in range(5)]
        for sock in queued:
            sock.sendall(HALF + REST)
        kill(pids[0])
        new = int(program.until("recover")[1])
        assert [int(read_all(sock)) for sock in queued] == [new] * 5
    for sock in queued:
        sock.close()
    stop(program)


@pytest.mark.contract("better: exits")
def test_a_worker_told_to_leave_by_anybody_is_replaced_and_not_counted(start, mode):
    program = start(f"run(recover_threshold=0, {mode})")
    address, pids = ready(program)
    for pid in pids:
        kill(pid, signal.SIGTERM)
        assert int(program.until("recover")[0]) == pid
    assert who(address) not in pids
    stop(program)


def test_a_stranger_s_worker_told_to_leave_is_not_counted_either(start):
    program = start("run(serve_func=serve, recover_threshold=0)")
    _, pids = ready(program)
    kill(pids[0], signal.SIGTERM)
    program.until("recover")
    stop(program)


def test_a_server_that_just_returns_is_a_crash(start):
    program = start("run(workers=1, serve_func=lambda sock: None, recover_threshold=3)")
    assert finish(program) == 0
    line = " ".join(program.events("raised")[0])
    assert line.startswith("raised OverRecoveryError 4 unplanned worker exits")
    assert len(program.events("recover")) == 3


def test_a_worker_that_raises_is_a_crash_with_its_traceback_in_the_log(start):
    program = start("""
        def crash(sock):
            answer(sock)
            raise ValueError("out of order")
        run(workers=1, serve_func=crash, recover_threshold=1)
    """)
    address, pids = ready(program)
    assert who(address) == pids[0]
    new = int(program.until("recover")[1])
    assert who(address) == new
    assert finish(program) == 0
    assert "OverRecoveryError" in " ".join(program.events("raised")[0])
    assert "ValueError: out of order" in program.stderr


def test_a_worker_that_exits_by_itself_is_told_with_its_status(start):
    program = start("""
        error = run(workers=1, serve_func=lambda sock: sys.exit(7), recover_threshold=0)
        say("statuses", *error.statuses)
    """)
    assert finish(program) == 0
    assert program.events("statuses") == [["statuses", "7"]]


def test_exits_are_told_even_where_children_are_ignored(start):
    program = start("""
        signal.signal(signal.SIGCHLD, signal.SIG_IGN)
        error = run(workers=1, recover_threshold=0)
        say("statuses", *error.statuses)
    """)
    kill(ready(program)[1][0])
    assert finish(program) == 0
    assert program.events("statuses") == [["statuses", "-9"]]


def test_a_child_of_somebody_else_is_left_to_whoever_started_it(start):
    program = start("""
        other = subprocess.Popen([sys.executable, "-c", "raise SystemExit(5)"])
        run(workers=1)
        say("other", other.wait())
    """)
    kill(ready(program)[1][0])
    program.until("recover")
    program.signal(signal.SIGTERM)
    assert program.until("other") == ["5"]
    assert program.wait() == 0


# ---- Boot failures -------------------------------------------------------------------


@pytest.mark.contract("better: exits")
@pytest.mark.parametrize("error", ["ValueError('no database')", "SystemExit(3)"])
def test_a_worker_that_fails_to_boot_is_raised_with_its_traceback(start, mode, error):
    program = start(f"""
        class Broken(Drainer):
            def boot(self):
                raise {error}
        error = run(server=Broken(), workers=3, {mode})
        say("traceback", error.pid, error.traceback.count("in boot"))
    """)
    assert finish(program) == 0
    assert program.events("raised")[0][1] == WorkerBootError.__name__
    pid, count = program.events("traceback")[0][1:]
    assert [pid] in [line[1:] for line in program.events("spawn")] and int(count) == 1
    assert not program.events("ready", "recover")


def test_a_long_traceback_of_a_boot_failure_arrives_whole(start):
    program = start("""
        class Broken(Drainer):
            def boot(self):
                raise ValueError("x" * 1_000_000 + "end")
        error = run(server=Broken(), workers=1)
        say("length", len(error.traceback) > 1_000_000, error.traceback[-4:-1])
    """)
    assert program.until("length") == ["True", "end"]
    assert finish(program) == 0


def test_a_worker_killed_while_it_boots_is_recovered(start):
    program = start("""
        class Slow(Drainer):
            def boot(self):
                if master.workers[0].pid is None and not os.path.exists(sys.argv[1]):
                    open(sys.argv[1], "w").close()
                    say("boots", os.getpid())
                    signal.pause()
        import tempfile
        sys.argv.append(tempfile.mkdtemp() + "/first")
        run(server=Slow(), workers=1)
        os.unlink(sys.argv[1])
        os.rmdir(os.path.dirname(sys.argv[1]))
    """)
    kill(int(program.until("boots")[0]))
    address, pids = ready(program)
    assert who(address) == pids[0]
    assert len(program.events("recover")) == 1
    stop(program)


def test_replacements_that_fail_to_boot_count_and_the_last_one_is_the_cause(start):
    program = start("""
        class Broken(Drainer):
            def boot(self):
                if os.path.exists(flag):
                    raise ValueError("gone bad")
        import tempfile
        directory = tempfile.mkdtemp()
        flag = directory + "/flag"
        def on_master_ready(pids):
            open(flag, "w").close()
            say("ready", 0, *pids)
        error = run(server=Broken(), recover_threshold=2,
                    on_master_ready=on_master_ready)
        say("cause", type(error.__cause__).__name__)
        os.unlink(flag)
        os.rmdir(directory)
    """)
    kill(ready(program)[1][0])
    assert finish(program) == 0
    assert program.events("raised")[0][1] == OverRecoveryError.__name__
    assert program.events("cause") == [["cause", WorkerBootError.__name__]]
    assert len(program.events("recover")) == 2
    assert "ValueError: gone bad" in program.stderr


# ---- Stop ----------------------------------------------------------------------------

STOPS = [signal.SIGTERM, signal.SIGINT]


@pytest.mark.contract("better: signals")
@pytest.mark.parametrize("number", STOPS)
def test_a_stop_finishes_what_is_under_way_and_returns(start, mode, number):
    program = start(f"run({mode})")
    address, _ = ready(program)
    with connect(address) as sock:
        sock.sendall(HALF)
        pid = int(program.until("begun")[0])
        program.signal(number)
        sock.sendall(REST)
        assert int(read_all(sock)) == pid
    assert finish(program) == 0
    assert program.events("returned")


@pytest.mark.contract("better: signals")
def test_ctrl_c_reaches_the_whole_group_and_is_one_orderly_stop(start, mode):
    program = start(f"run({mode})")
    address, _ = ready(program)
    with connect(address) as sock:
        sock.sendall(HALF)
        pid = int(program.until("begun")[0])
        program.signal_group(signal.SIGINT)
        sock.sendall(REST)
        assert int(read_all(sock)) == pid
    assert finish(program) == 0
    assert program.events("returned") and not program.events("recover")


def test_ctrl_c_is_one_orderly_stop_with_a_stranger_s_server_too(start):
    program = start("run(serve_func=serve)")
    ready(program)
    program.signal_group(signal.SIGINT)
    assert finish(program) == 0
    assert program.events("returned") and not program.events("recover")


def test_connections_in_the_queue_when_a_stop_begins_are_answered(start, mode):
    program = start(f"run(workers=1, {mode})")
    address, pids = ready(program)
    with connect(address) as first:
        first.sendall(HALF)
        program.until("begun")
        queued = [connect(address) for _ in range(5)]
        program.signal(signal.SIGTERM)
        for sock in queued:
            sock.sendall(HALF + REST)
        first.sendall(REST)
        assert [int(read_all(sock)) for sock in [first, *queued]] == pids * 6
    for sock in queued:
        sock.close()
    assert finish(program) == 0


def test_a_connection_that_comes_in_a_stop_waits_for_the_successor(start, mode):
    program = start(f"run(workers=1, {mode})")
    address, _ = ready(program)
    port = int(address.rpartition(":")[2])
    with connect(address) as first, socket.socket() as late:
        first.sendall(HALF)
        program.until("begun")
        program.signal(signal.SIGTERM)
        until_quiet(address)
        late.setblocking(False)
        late.connect_ex(("127.0.0.1", port))
        first.sendall(REST)
        read_all(first)
        assert finish(program) == 0
        with socket.create_server(("127.0.0.1", port)):
            assert select.select([], [late], [], SOON)[1]
            assert late.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR) == 0


def until_quiet(address: str) -> None:
    """Connect until no handshake begins any more: the listeners are quiesced."""
    host, _, port = address.rpartition(":")
    deadline = time.monotonic() + SOON
    while time.monotonic() < deadline:
        with socket.socket() as probe:
            probe.setblocking(False)
            probe.connect_ex((host, int(port)))
            if not select.select([], [probe], [], 0.5)[1]:
                return
            probe.setblocking(True)
            probe.settimeout(SOON)
            probe.sendall(HALF + REST)
    raise AssertionError("the listener still accepts")


STUBBORN = """
    class Stubborn(Drainer):
        def boot(self):
            self.on_term = signal.signal(signal.SIGTERM, signal.SIG_IGN)
        def serve(self, sockets, *, on_ready, **_):
            self.boot()
            on_ready()
            while True:
                answer(sockets[0])
                select.select(sockets, [], [])
"""


@pytest.mark.contract("better: signals")
@pytest.mark.parametrize("number", STOPS)
def test_a_second_signal_kills_who_does_not_leave(start, mode, number):
    program = start(
        textwrap.dedent(STUBBORN)
        + f"run(server=Stubborn(), shutdown_grace_period=3600, {mode})"
    )
    address, _ = ready(program)
    program.signal(signal.SIGTERM)
    until_quiet(address)  # so the first was taken
    program.signal(number)
    assert finish(program) == 0
    assert program.events("returned")


@pytest.mark.contract("ShutdownGracePeriod")
def test_after_the_grace_period_who_is_left_is_killed(start):
    program = start(
        textwrap.dedent(STUBBORN) + "run(server=Stubborn(), shutdown_grace_period=0.2)"
    )
    ready(program)
    began = time.monotonic()
    stop(program)
    assert time.monotonic() - began >= 0.2
    assert "grace period over, killing 2 workers" in program.stderr


@pytest.mark.contract("ShutdownGracePeriod")
def test_a_grace_period_of_0_kills_at_once(start):
    program = start(
        textwrap.dedent(STUBBORN) + "run(server=Stubborn(), shutdown_grace_period=0)"
    )
    ready(program)
    stop(program)


@pytest.mark.contract("ShutdownGracePeriod")
def test_a_stop_returns_as_soon_as_the_last_worker_is_gone(start):
    program = start("run(shutdown_grace_period=3600)")
    ready(program)
    stop(program)


@pytest.mark.contract("better: signals")
def test_quit_kills_at_once(start, mode):
    program = start(
        textwrap.dedent(STUBBORN)
        + f"run(server=Stubborn(), shutdown_grace_period=3600, {mode})"
    )
    ready(program)
    stop(program, signal.SIGQUIT)


def test_quit_to_the_whole_group_is_no_crash(start):
    program = start("run(recover_threshold=0)")
    ready(program)
    program.signal_group(signal.SIGQUIT)
    assert finish(program) == 0
    assert program.events("returned")


@pytest.mark.contract("better: signals")
def test_a_stop_while_workers_boot_is_orderly(start):
    program = start("""
        class Slow(Drainer):
            def boot(self):
                say("boots")
                pause()
        run(server=Slow(), shutdown_grace_period=3600)
    """)
    program.until("boots")
    program.signal(signal.SIGTERM)
    assert finish(program) == 0
    assert program.events("returned") and not program.events("ready", "recover")


def test_signals_that_meet_another_thread_are_not_lost(start):
    program = start("""
        numbers = [signal.SIGTERM]
        threading.Thread(target=threading.Event().wait, daemon=True).start()
        run()
    """)
    ready(program)
    stop(program)


def test_shutdown_from_another_thread_is_orderly(start, mode):
    program = start(f"""
        go = threading.Event()
        threading.Thread(target=lambda: (go.wait(), master.shutdown())).start()
        run(on_master_ready=lambda pids: go.set(), {mode})
    """)
    assert finish(program) == 0
    assert program.events("returned")


@pytest.mark.contract("better: control")
@pytest.mark.parametrize(
    "callback", ["on_child_spawn", "on_master_ready", "on_child_recover"]
)
def test_shutdown_from_a_callback_is_orderly(start, callback):
    program = start(f"""
        options = {{"{callback}": lambda *_: master.shutdown()}}
        run(**options)
    """)
    if callback == "on_child_recover":
        kill(ready(program)[1][0])
    assert finish(program) == 0
    assert program.events("returned")
    assert len(program.events("ready")) == (callback == "on_child_recover")


def test_shutdown_before_and_after_a_run_does_nothing():
    master = Prefork(serve_func=print)
    master.shutdown()
    assert master.address is None


def test_shutdown_in_a_worker_is_refused(start):
    program = start("""
        class Confused(Drainer):
            def boot(self):
                master.shutdown()
        run(server=Confused())
    """)
    assert finish(program) == 0
    assert "must be called in the master" in " ".join(program.events("raised")[0])


# ---- The worker ----------------------------------------------------------------------


@pytest.mark.contract("IsChild")
def test_is_child_is_true_in_a_worker_only(start):
    program = start("""
        class Asking(Drainer):
            def boot(self):
                say("worker", is_child())
                pid = os.fork()
                if pid == 0:
                    say("grandchild", is_child())
                    os._exit(0)
                os.waitpid(pid, 0)
                code = "import prefork; print('executed', prefork.is_child())"
                subprocess.run([sys.executable, "-c", code])
        say("plain", is_child())
        run(server=Asking(), workers=1,
            on_master_ready=lambda _: (say("master", is_child()), master.shutdown()))
        say("afterwards", is_child())
    """)
    assert finish(program) == 0
    names = ("plain", "worker", "grandchild", "executed", "master", "afterwards")
    told = program.events(*names)
    assert dict(told) == dict.fromkeys(names, "False") | {"worker": "True"}


@pytest.mark.contract("FASTHTTP_PREFORK_CHILD=1")
def test_a_stale_marker_makes_no_child(start):
    program = start('say("child", is_child())', PREFORK_CHILD="1")
    assert program.until("child") == ["False"]
    assert program.wait() == 0


@pytest.mark.contract("IsChild")
def test_this_process_is_no_child():
    assert not is_child()


def test_a_worker_holds_what_is_its_own_and_nothing_else(start, mode):
    program = start(f"""
        class Counting(Drainer):
            def boot(self):
                say("holds", listening(), len(os.listdir("/proc/self/fd")) - inherited)
        inherited = len(os.listdir("/proc/self/fd"))
        run(server=Counting(), workers=3, {mode})
    """)
    _, pids = ready(program)
    kill(pids[0])
    for _ in range(4):
        program.until("holds")
    # its listener, the pipe to the master, the lifeline, the scoreboard
    assert program.events("holds") == [["holds", "1", "4"]] * 4
    stop(program)


def test_a_worker_s_signals_are_its_own(start):
    program = start("""
        class Looking(Drainer):
            def boot(self):
                say("mask", len(signal.pthread_sigmask(signal.SIG_BLOCK, [])))
                say("wakeup", signal.set_wakeup_fd(-1))
        run(server=Looking(), workers=1)
    """)
    ready(program)
    assert program.events("mask", "wakeup") == [["mask", "0"], ["wakeup", "-1"]]
    stop(program)


@pytest.mark.contract("ServeFunc")
def test_a_stranger_gets_a_real_blocking_socket(start, mode):
    program = start(f"""
        def look(sock):
            say("socket", type(sock) is socket.socket, os.get_blocking(sock.fileno()),
                sock.gettimeout(), sock.getsockname()[0])
            serve(sock)
        run(serve_func=look, workers=1, {mode})
    """)
    assert program.until("socket") == ["True", "True", "None", "127.0.0.1"]
    address, pids = ready(program)
    assert who(address) == pids[0]
    stop(program)


def test_http_server_of_the_standard_library_can_be_preforked(start, mode):
    program = start(f"""
        from http.server import HTTPServer, SimpleHTTPRequestHandler
        def serve_http(sock):
            server = HTTPServer(sock.getsockname(), SimpleHTTPRequestHandler, False)
            server.socket.close()
            server.socket = sock
            server.serve_forever()
        run(serve_func=serve_http, {mode})
    """)
    address, _ = ready(program)
    assert ask(address, b"HEAD / HTTP/1.0\r\n\r\n").startswith(b"HTTP/1.0 200")
    stop(program)


def test_what_a_worker_printed_is_not_lost(start):
    program = start("""
        class Talking(Drainer):
            def boot(self):
                print("buffered")
        print("before")
        run(server=Talking(), workers=1)
    """)
    ready(program)
    stop(program)
    assert " ".join(program.told).count("before") == 1
    assert " ".join(program.told).count("buffered") == 1


@pytest.mark.parametrize("child", ["raise SystemExit", "1 / 0", "return b'child'"])
def test_a_child_that_comes_back_from_a_handler_ends_there(start, child):
    program = start(f"""
        from prefork import Server
        def app(request):
            forked = os.fork()
            if forked == 0:
                {child}
            return str(os.waitpid(forked, 0)[0] == forked)
        run(server=Server(app), workers=1)
    """)
    address, _ = ready(program)
    asked = b"GET / HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n"
    for _ in range(3):
        assert ask(address, asked).endswith(b"\r\n\r\nTrue")
    stop(program)


# ---- The master's death --------------------------------------------------------------


@pytest.mark.contract("better: lifeline")
def test_the_master_s_death_is_noticed_and_workers_drain(start, mode):
    program = start(f"run({mode})")
    address, pids = ready(program)
    with connect(address) as sock:
        sock.sendall(HALF)
        pid = int(program.until("begun")[0])
        with ending(*pids):
            kill(program.pid)
            sock.sendall(REST)
            assert int(read_all(sock)) == pid
    assert pid in pids


@pytest.mark.contract("OnMasterDeath")
def test_on_master_death_is_called_once_in_each_worker(start):
    program = start("""
        run(on_master_death=lambda: say("orphan", os.getpid()))
    """)
    _, pids = ready(program)
    with ending(*pids):
        kill(program.pid)
    program.rest()
    assert sorted(int(pid) for _, pid in program.events("orphan")) == sorted(pids)


@pytest.mark.contract("OnMasterDeath")
def test_on_master_death_is_not_called_in_an_orderly_stop(start):
    program = start("""
        run(on_master_death=lambda: say("orphan", os.getpid()))
    """)
    ready(program)
    stop(program)
    assert not program.events("orphan")


def test_a_stranger_s_worker_ends_with_its_master(start):
    program = start("run(serve_func=serve)")
    _, pids = ready(program)
    with ending(*pids):
        kill(program.pid)


def test_on_master_death_is_called_beside_a_stranger_s_server(start):
    program = start("""
        def orphan():
            say("orphan", os.getpid())
            os._exit(0)
        run(serve_func=serve, on_master_death=orphan)
    """)
    _, pids = ready(program)
    with ending(*pids):
        kill(program.pid)
    program.rest()
    assert sorted(int(pid) for _, pid in program.events("orphan")) == sorted(pids)


# ---- Addresses -----------------------------------------------------------------------


@pytest.mark.contract("Reuseport", "better: slots")
def test_port_0_is_one_port_for_all_slots(start):
    program = start("""
        class Telling(Drainer):
            def serve(self, sockets, **more):
                say("port", sockets[0].getsockname()[1])
                super().serve(sockets, **more)
        run(server=Telling(), workers=4, reuseport=True)
    """)
    address, _ = ready(program)
    port = address.rpartition(":")[2]
    assert program.events("port") == [["port", port]] * 4
    stop(program)


@pytest.mark.contract("Reuseport")
def test_each_slot_has_a_socket_of_its_own_that_its_workers_inherit(start):
    program = start("""
        class Telling(Drainer):
            def serve(self, sockets, **more):
                say("inode", os.fstat(sockets[0].fileno()).st_ino)
                super().serve(sockets, **more)
        run(server=Telling(), workers=3, reuseport=True)
    """)
    _, pids = ready(program)
    before = [inode for _, inode in program.events("inode")]
    assert len(set(before)) == 3
    kill(pids[1])
    after = [program.until("inode")[0] for _ in range(4)]
    assert sorted(after[:3]) == sorted(before) and after[3] in before
    stop(program)


@pytest.mark.contract("ListenAndServe")
def test_several_addresses_are_served_at_once(start, mode, tmp_path):
    program = start(f"""
        run(["127.0.0.1:0", "unix:{tmp_path}/sock", "127.0.0.2:0"],
            on_master_ready=lambda _: say("ready", *map(text, master.addresses)),
            {mode})
    """)
    addresses = program.until("ready")
    assert addresses[1] == f"unix:{tmp_path}/sock"
    for address in addresses:
        assert who(address)
    stop(program)


def test_the_attribute_bind_is_where_it_listens_by_default(start, tmp_path):
    program = start(f'run(None, bind=["unix:{tmp_path}/sock"])')
    address, _ = ready(program)
    assert address == f"unix:{tmp_path}/sock" and who(address)
    stop(program)


def test_a_unix_socket_is_removed_at_the_end_and_replaced_if_stale(
    start, mode, tmp_path
):
    path = tmp_path / "sock"
    with socket.socket(socket.AF_UNIX) as stale:
        stale.bind(str(path))
    program = start(f'run("{path}", network="unix", {mode})')
    address, pids = ready(program)
    assert who(address) in pids
    stop(program)
    assert not path.exists()


def test_a_unix_socket_in_use_is_refused_and_stays(start, tmp_path):
    path = tmp_path / "sock"
    with socket.socket(socket.AF_UNIX) as taken:
        taken.bind(str(path))
        taken.listen()
        program = start(f'run("unix:{path}")')
        assert finish(program) == 0
        assert "address already in use" in " ".join(program.events("raised")[0])
        with connect(f"unix:{path}"):
            pass


def test_a_unix_socket_that_somebody_replaced_is_left_alone(start, tmp_path):
    path = tmp_path / "sock"
    program = start(f'run("unix:{path}")')
    ready(program)
    path.unlink()
    path.write_text("theirs")
    stop(program)
    assert path.read_text() == "theirs"


@pytest.mark.contract("Network", "ListenAndServe")
@pytest.mark.parametrize(
    ("network", "address", "peers"),
    [
        ("tcp", ":0", ["127.0.0.1", "::1"]),
        ("tcp", "[::]:0", ["127.0.0.1", "::1"]),
        ("tcp", "localhost:0", ["127.0.0.1"]),
        ("tcp", "[::1]:0", ["::1"]),
        ("tcp4", ":0", ["127.0.0.1"]),
        ("tcp4", "localhost:0", ["127.0.0.1"]),
        ("tcp6", "[::1]:0", ["::1"]),
    ],
)
def test_a_network_listens_where_it_says(start, mode, network, address, peers):
    if "::1" in peers and not has_ipv6():
        pytest.skip("this machine has no IPv6")
    program = start(f'run({address!r}, network="{network}", {mode})')
    port = ready(program)[0].rpartition(":")[2]
    for peer in peers:
        assert who(f"[{peer}]:{port}")
    stop(program)


@pytest.mark.contract("Network")
def test_tcp6_is_ipv6_only(start, mode):
    if not has_ipv6():
        pytest.skip("this machine has no IPv6")
    program = start(f'run(":0", network="tcp6", {mode})')
    port = ready(program)[0].rpartition(":")[2]
    assert who(f"[::1]:{port}")
    with pytest.raises(ConnectionRefusedError):
        connect(f"127.0.0.1:{port}")
    stop(program)


def has_ipv6() -> bool:
    try:
        with socket.create_server(("::1", 0), family=socket.AF_INET6):
            return True
    except OSError:
        return False


@pytest.mark.contract("option: tcp_keepalive")
@pytest.mark.parametrize("on", [True, False])
def test_tcp_keepalive_is_an_option_of_accepted_connections(serve, on):
    live = serve(lambda request: b"", tcp_keepalive=on)
    client = live.client()
    client.ask()
    ends = [live.address[1], client.socket.getsockname()[1]]
    deadline = time.monotonic() + SOON
    while (timer := timer_of(ends)) is None:  # while others come and go, lines skip
        assert time.monotonic() < deadline, "the connection is gone"
    assert timer == ("02" if on else "00")  # keep-alive, or none


def timer_of(ports: list[int]) -> str | None:
    """What the kernel waits for on the connection between these."""
    for line in Path("/proc/net/tcp").read_text().splitlines()[1:]:
        words = line.split()
        if [int(end.partition(":")[2], 16) for end in words[1:3]] == ports:
            return words[5].partition(":")[0]
    return None


# ---- What it tells -------------------------------------------------------------------


@pytest.mark.contract("better: control")
def test_workers_tells_pid_slot_and_state(start):
    program = start("""
        def look(name):
            for pid, slot, state, _ in master.workers:
                say(name, slot, state.value, pid)
        run(
            on_child_spawn=lambda pid: look("spawning"),
            on_master_ready=lambda pids: (look("serving"), say("pids", *pids),
                                          master.shutdown()),
        )
        look("afterwards")
    """)
    assert finish(program) == 0
    pids = program.events("pids")[0][1:]
    assert program.events("spawning")[:2] == [
        ["spawning", "0", "booting", pids[0]],
        ["spawning", "1", "vacant", "None"],
    ]
    assert [line[1:] for line in program.events("serving")] == [
        ["0", "ready", pids[0]],
        ["1", "ready", pids[1]],
    ]
    assert [line[1:] for line in program.events("afterwards")] == [
        ["0", "vacant", "None"],
        ["1", "vacant", "None"],
    ]


def test_workers_set_to_a_number_says_how_many():
    master = Prefork(serve_func=print, workers=3)
    assert len(master.workers) == 3
    master.workers = 5
    assert [worker.slot for worker in master.workers] == [0, 1, 2, 3, 4]
    master.workers = None
    assert 1 <= len(master.workers) <= len(os.sched_getaffinity(0))


@pytest.mark.contract("Logger")
def test_a_logger_with_printf_hears_everything(start):
    program = start("""
        class Printer:
            def printf(self, fmt, *args):
                say("log", fmt % args)
        run(logger=Printer())
    """)
    ready(program)
    stop(program)
    lines = [" ".join(line) for line in program.events("log")]
    assert any("serving on 127.0.0.1:" in line for line in lines)
    assert lines[-1] == "log stopped" and program.stderr == ""


@pytest.mark.contract("New", "Logger")
def test_a_server_s_logger_is_its_master_s_too(start):
    program = start("""
        from prefork import Server
        class Printer:
            def printf(self, fmt, *args):
                say("log", fmt % args)
        def app(request):
            raise ValueError("no")
        run(server=Server(app, logger=Printer()), workers=1)
    """)
    address, _ = ready(program)
    ask(address, b"GET / HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n")
    stop(program)
    lines = [" ".join(line) for line in program.events("log")]
    assert any("serving on 127.0.0.1:" in line for line in lines)
    assert any("GET /" in line for line in lines)
    assert lines[-1] == "log stopped" and program.stderr == ""


@pytest.mark.contract("Logger")
def test_a_logging_logger_is_used_as_it_is(start):
    program = start("""
        import logging
        class Handler(logging.Handler):
            def emit(self, record):
                say("log", record.getMessage())
        logger = logging.getLogger("mine")
        logger.setLevel("INFO")
        logger.addHandler(Handler())
        run(logger=logger)
    """)
    ready(program)
    stop(program)
    assert program.events("log")[-1] == ["log", "stopped"] and program.stderr == ""


@pytest.mark.contract("Logger")
def test_logging_configured_by_the_app_does_not_silence_the_master(start):
    program = start("""
        import logging.config
        from prefork import log
        log.error_logger()  # as the command line does, before the app is loaded
        logging.config.dictConfig({"version": 1})
        run()
    """)
    ready(program)
    stop(program)
    assert "serving on" in program.stderr


def test_an_unknown_option_is_told_with_what_may_be_meant():
    with pytest.raises(ConfigError, match="no option worker; did you mean workers?"):
        Prefork(serve_func=print, worker=3)
    with pytest.raises(ConfigError, match="give it to Server"):
        Prefork(serve_func=print, read_timeout=3)


def test_environment_variables_are_defaults(monkeypatch):
    monkeypatch.setenv("PREFORK_WORKERS", "7")
    monkeypatch.setenv("PREFORK_RECOVER_THRESHOLD", "2")
    assert len(Prefork(serve_func=print).workers) == 7
    assert len(Prefork(serve_func=print, workers=2).workers) == 2
    assert Prefork(serve_func=print).recover_threshold == 2
