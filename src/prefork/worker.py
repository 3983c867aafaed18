"""The worker: the life of a child, however it was born, and the app that it serves.

A forked worker is born inside its master's call of fork(), deep in the master's stack,
and must never return there: run() ends in os._exit(). An executed one runs the program
again, finds out while it imports prefork (enlist()), and serves where the program calls
listen_and_serve(). A template, too, runs the program again up to there, but then forks
workers when the master asks it to: that is how new code comes into forked workers.

A child talks to the master by one pipe, of which it holds the write end:

    R             it accepts; a template adds its options, as one line of JSON
    L             it leaves because it was asked to, so its exit is no crash
    F traceback   it failed before it accepted

and hears of the master's death by another, the lifeline, whose write end only the
master holds: it becomes readable when the master is gone, however it went.
"""

from __future__ import annotations

import contextlib
import difflib
import gc
import importlib
import json
import os
import select
import signal
import socket
import sys
import threading
import traceback
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from types import TracebackType
from typing import Any, NoReturn, Protocol

from prefork import _core, _listeners, _processes, log, signals
from prefork.certificates import Certificates
from prefork.errors import (
    AppLoadError,
    AppStartupError,
    CertificateError,
    ConfigError,
    InheritanceError,
    WorkerBootError,
)

READY, LEAVING, FAILED = b"R", b"L", b"F"

MARKER = "PREFORK_CHILD"  # "1" in the environment of a child that is executed
TABLE = "PREFORK_CHILD_OF"  # what such a child was given: see Inheritance

# A stop of the whole group (Ctrl-C) is the master's to hear: it tells the workers. The
# other signals mean something to the master only.
MASTERS_OWN = (
    *(signal.SIGINT, signal.SIGQUIT, signal.SIGHUP, signal.SIGTTIN, signal.SIGTTOU),
)

_worker_pid: int | None = None


def is_child() -> bool:
    """True in a worker; false in the master, elsewhere, and in what a worker starts.

    Any thread. In a worker that was executed, and in a template, it is true from the
    import of prefork on. The pid is what tells: a worker's subprocess inherits
    everything else.
    """
    return _worker_pid == os.getpid()


# ---- What a worker is given ----------------------------------------------------------


class Servant(Protocol):
    """What Prefork needs of a server: prefork.Server has it."""

    def serve(
        self,
        sockets: list[socket.socket],
        *,
        on_ready: Callable[[], None] | None = None,
        on_drain: Callable[[], None] | None = None,
        lifeline: int | None = None,
        on_master_death: Callable[[], None] | None = None,
    ) -> None: ...


@dataclass
class Work:
    """What a program knows of its workers' task, whichever process it runs in."""

    server: Servant | None
    serve_func: Callable[[socket.socket], object] | None  # instead of server
    on_master_death: Callable[[], None] | None
    logger: log.Logger
    grace: float | None = None  # seconds from being asked to leave to being killed
    certificates: Certificates | None = None  # that were loaded, or checked; None: none


@dataclass
class Task:
    """All that a worker has in its life."""

    work: Work
    slot: int
    sockets: Sequence[socket.socket]
    report: int  # the write end; -1: the master does not listen
    lifeline: int  # the read end; or the master's pidfd
    master: int  # its pid
    release: Callable[[], None]  # closes what is the master's or other workers'
    board: _core.Scoreboard | None = None
    row: int = -1
    accepting: bool = False
    leaving: bool = False

    def say(self, text: bytes) -> None:
        """Report to the master, if it is there."""
        if self.report < 0:
            return
        try:
            os.write(self.report, text)
        except BrokenPipeError:
            pass  # it is gone: the lifeline tells

    def tell_ready(self) -> None:
        self.accepting = True
        self.say(READY)

    def tell_leaving(self) -> None:
        if not self.leaving:
            self.leaving = True
            self.say(LEAVING)


class Leave(SystemExit):
    """Raised by SIGTERM where nobody handles it better: before and outside serve()."""


# ---- A forked worker -----------------------------------------------------------------


def run(task: Task) -> NoReturn:
    """Live the worker's whole life; in its only thread, right after the fork.

    SIGTERM may still raise Leave behind it: it must not leave through the master's
    stack, hence the second finally.
    """
    status = 1
    try:
        try:
            status = _live(task)
        finally:
            signal.signal(signal.SIGTERM, signals.ignore)
            log.flush()
    finally:
        os._exit(status)


def _live(task: Task) -> int:
    global _worker_pid
    _worker_pid = os.getpid()
    try:
        _reset_signals()
        task.release()  # from here on signals come through
        (_serve if task.work.serve_func is None else _serve_foreign)(task)
    except Leave:
        signal.signal(signal.SIGTERM, signals.ignore)
        task.tell_leaving()
        return 0
    except BaseException as error:
        return _fail(task, error)
    return 0


def _reset_signals() -> None:
    signal.set_wakeup_fd(-1)
    signal.signal(signal.SIGTERM, _leave)
    for number in MASTERS_OWN:
        signal.signal(number, signals.ignore)  # unlike SIG_IGN, ends with an exec
    if signal.getsignal(signal.SIGCHLD) is signals.ignore:
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # it was the master's


def _leave(number: int, frame: object) -> NoReturn:
    """Each time: an import, a finalizer may have swallowed the one before."""
    if _inheritance is not None and _inheritance.report >= 0 and is_child():
        with contextlib.suppress(OSError):
            os.write(_inheritance.report, LEAVING)
    raise Leave(0)


def _serve(task: Task) -> None:
    """Serve with our server: it returns when it was asked to leave and has drained."""
    assert task.work.server is not None
    take_seat = getattr(task.work.server, "take_seat", None)
    if task.board is not None and take_seat is not None:
        take_seat(task.board, task.row, task.work.grace)
    task.work.server.serve(
        list(task.sockets),
        on_ready=task.tell_ready,
        on_drain=task.tell_leaving,
        lifeline=task.lifeline,
        on_master_death=task.work.on_master_death,
    )
    raise Leave(0)


def _serve_foreign(task: Task) -> None:
    """Serve with a stranger, which knows no lifeline: a signal or a thread watches."""
    assert task.work.serve_func is not None
    _watch_master(task)
    task.tell_ready()
    task.work.serve_func(task.sockets[0])


def _watch_master(task: Task) -> None:
    on_death = task.work.on_master_death
    if on_death is None:
        try:
            _processes.set_parent_death_signal(signal.SIGTERM, task.master)
            return
        except ProcessLookupError:  # it is gone, or somebody stands between us
            on_death = _leave_by_signal
    args = (task.lifeline, on_death)
    threading.Thread(
        target=_await_death, args=args, name="prefork-lifeline", daemon=True
    ).start()


def _leave_by_signal() -> None:
    os.kill(os.getpid(), signal.SIGTERM)


def _await_death(lifeline: int, on_master_death: Callable[[], None]) -> None:
    select.select([lifeline], [], [])  # nobody ever writes: it ends with the master
    on_master_death()


def _fail(task: Task, error: BaseException) -> int:
    """Tell the master, or after the start the log; the exit status."""
    if task.accepting and isinstance(error, SystemExit):
        if task.work.serve_func is None:
            task.tell_leaving()  # a handler wanted it: no crash, whoever asked for that
        return _status_of(error)
    if task.accepting:
        task.work.logger.critical("worker %d ends", os.getpid(), exc_info=error)
        return 1
    if not _report_failure(task.report, error):
        task.work.logger.critical("worker %d ends", os.getpid(), exc_info=error)
    return WorkerBootError.exit_code


def _report_failure(report: int, error: BaseException) -> bool:
    """Send the traceback to the master, however long; False if it does not listen."""
    if report < 0:
        return False
    text = "".join(traceback.format_exception(*told(error)))
    try:
        with open(report, "wb", closefd=False) as pipe:
            pipe.write(FAILED + text.encode("utf-8", "backslashreplace"))
    except BrokenPipeError:
        return False
    return True


def _status_of(error: SystemExit) -> int:
    """The exit status that Python would make of it."""
    if error.code is None:
        return 0
    return error.code & 0xFF if isinstance(error.code, int) else 1


# ---- A program that is run again -----------------------------------------------------


@dataclass
class Inheritance:
    """What an executed child was given: its environment variable TABLE, as JSON.

    Without the variable, which a command_producer may leave out, a child has nothing
    but a listener at fd 3.
    """

    role: str = "worker"  # or "template"
    run: str = ""  # which listen_and_serve() of the program it is for; "": the first
    master: int = 0
    slot: int = 0
    listeners: Sequence[int] = (_processes.FIRST_FD,)
    report: int = -1
    lifeline: int = -1
    control: int = -1  # of a template
    board: int = -1  # the scoreboard's memory
    row: int = -1  # of the scoreboard
    address: str = ""  # where to listen, if it inherits no listener
    blocked: Sequence[int] = ()  # signals that its master blocked, to be let through

    def environment(self) -> dict[str, str]:
        """The marker, and what goes with it."""
        return {MARKER: "1", TABLE: json.dumps(asdict(self), separators=(",", ":"))}

    def fds(self) -> list[int]:
        others = (self.report, self.lifeline, self.control, self.board)
        return [*self.listeners, *(fd for fd in others if fd >= 0)]

    def open_board(self) -> _core.Scoreboard | None:
        """The scoreboard, of which the master passed the memory."""
        if self.board < 0:
            return None
        board = _core.Scoreboard(fd=self.board)
        os.close(self.board)
        self.board = -1
        return board


_inheritance: Inheritance | None = None


def enlist() -> None:
    """Find out whether this process is an executed child; at the import of prefork.

    The marker is taken out of the environment, so that what this process starts does
    not take itself for a child.
    """
    global _inheritance, _worker_pid
    if os.environ.get(MARKER) != "1":
        return
    del os.environ[MARKER]
    text = os.environ.pop(TABLE, "")
    try:
        found = Inheritance(**json.loads(text)) if text else Inheritance()
    except (TypeError, ValueError):
        found = Inheritance()
    _inheritance = found
    if not _is_real(found, bool(text)):
        return
    _worker_pid = os.getpid()
    for fd in found.fds():
        os.set_inheritable(fd, False)
    if found.report >= 0:
        _answer_signals(found)
        sys.excepthook = _report_uncaught


def _is_real(found: Inheritance, told: bool) -> bool:
    """Whether the marker is ours, and not left over from somewhere."""
    if told and not found.listeners:
        return found.role == "template" or found.master == os.getppid()
    try:
        for fd in found.listeners:
            _listeners.check_listener(fd)
        for fd in found.fds():
            os.fstat(fd)
    except OSError:
        return False
    return True


def _answer_signals(found: Inheritance) -> None:
    """Handle signals from the first moment on; those that came early come now."""
    if threading.current_thread() is threading.main_thread():
        _reset_signals()
        signal.pthread_sigmask(signal.SIG_UNBLOCK, found.blocked)


def _report_uncaught(
    kind: type[BaseException], error: BaseException, tb: TracebackType | None
) -> None:
    """sys.excepthook until this child accepts: its master tells what went wrong."""
    found = _inheritance
    if found is None or not is_child() or not _report_failure(found.report, error):
        sys.__excepthook__(kind, error, tb)


def report_boot_failure(error: BaseException) -> bool:
    """Let the master tell why this executed child cannot serve; False: it cannot."""
    found = _inheritance
    return found is not None and is_child() and _report_failure(found.report, error)


def inheritance() -> Inheritance | None:
    """What this executed child has inherited and not taken yet."""
    return _inheritance


def serve_inherited(
    found: Inheritance,
    work: Work,
    sockets: Any,
    board: _core.Scoreboard | None,
    options: str,
) -> int:
    """Be the worker, or the template, as which this program was executed.

    Returns the exit status, with which the program is to end.
    """
    global _inheritance
    _inheritance = None
    sys.excepthook = sys.__excepthook__
    if threading.current_thread() is not threading.main_thread():
        raise RuntimeError("call listen_and_serve() in the main thread")
    if found.role == "template":
        return _be_template(found, work, board, options)
    master = found.master or os.getppid()
    lifeline = found.lifeline if found.lifeline >= 0 else os.pidfd_open(master)
    task = Task(
        work=work,
        slot=found.slot,
        sockets=sockets,
        report=found.report,
        lifeline=lifeline,
        master=master,
        release=lambda: None,
        board=board,
        row=found.row,
    )
    try:
        return _live(task)
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # the end has begun


def inherited_sockets(found: Inheritance) -> list[socket.socket]:
    """The listeners, checked; InheritanceError if they are not there."""
    sockets = []
    for fd in found.listeners:
        try:
            _listeners.check_listener(fd)
        except OSError as error:
            raise InheritanceError(
                f"{MARKER}=1 is set, but no listener was inherited at fd {fd} "
                f"({(error.strerror or '').lower()}): unset it, or have the master "
                "start this program"
            ) from None
        sockets.append(socket.socket(fileno=fd))
    return sockets


# ---- A template ----------------------------------------------------------------------


def _be_template(
    found: Inheritance, work: Work, board: _core.Scoreboard | None, options: str
) -> int:
    """Fork a worker for each order from the master, until it closes the control socket.

    An order is a line of JSON and descriptors: the report pipe, the lifeline and the
    listeners. The answer is the worker's pid; a child of a child that has ended, it is
    the master's (a subreaper) from then on.
    """
    signal.signal(signal.SIGTERM, signals.ignore)  # the control socket tells
    gc.collect()
    gc.freeze()
    os.write(found.report, READY + options.encode() + b"\n")
    with socket.socket(fileno=found.control) as control:
        while True:
            text, fds, _, _ = socket.recv_fds(
                control, ORDER_SIZE, MAX_FDS, socket.MSG_CMSG_CLOEXEC
            )
            if not text:
                return 0
            own = [found.control, found.report, found.lifeline]
            task = _ordered(json.loads(text), fds, work, found, own)
            task.board = board
            control.send(str(_fork_twice(task, own, found.blocked)).encode())
            for sock in task.sockets:
                sock.detach()
            for fd in fds:
                os.close(fd)


ORDER_SIZE, MAX_FDS = 4096, 253


def _ordered(
    order: dict[str, Any],
    fds: Sequence[int],
    work: Work,
    found: Inheritance,
    own: list[int],
) -> Task:
    """The task of the worker that the master wants; own grows until it is forked."""
    report, lifeline, *listeners = fds

    def release() -> None:
        for fd in own:
            os.close(fd)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, found.blocked)

    return Task(
        work=work,
        slot=order["slot"],
        sockets=[socket.socket(fileno=fd) for fd in listeners],
        report=report,
        lifeline=lifeline,
        master=found.master,
        release=release,
        row=order["row"],
    )


def _fork_twice(task: Task, own: list[int], blocked: Sequence[int]) -> int:
    """The worker's pid. Who is between us ends at once, so it becomes the master's.

    Signals are blocked from here to where the worker can answer them.
    """
    log.flush()
    signal.pthread_sigmask(signal.SIG_BLOCK, blocked)
    try:
        told, end = os.pipe2(os.O_CLOEXEC)
        between = os.fork()
        if between == 0:
            _fork_and_end(task, [*own, told], end)
        os.close(end)
        with open(told, "rb") as answer:
            text = answer.read()
        os.waitpid(between, 0)
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, blocked)
    return int(text or b"-1")


def _fork_and_end(task: Task, own: list[int], end: int) -> NoReturn:
    status = 1
    try:
        us = os.pidfd_open(os.getpid())
        pid = os.fork()
        if pid == 0:
            os.close(end)
            select.select([us], [], [])  # from then on the master is our parent
            for fd in (us, own.pop()):
                os.close(fd)
            run(task)
        os.write(end, str(pid).encode())
        status = 0
    finally:
        os._exit(status)


# ---- The app -----------------------------------------------------------------------


def load_app(name: str, app_dir: str = ".") -> Any:
    """Import MODULE:ATTR, looking in app_dir first.

    Raises ConfigError for a malformed name, else AppLoadError with the remedy; what the
    app's own code raised is its cause.
    """
    module_name, _, attribute = name.partition(":")
    if not module_name or not attribute:
        raise ConfigError(f"app must be MODULE:ATTR, like main:handler, not {name!r}")
    if module_name.endswith(".py") or "/" in module_name:
        better = module_name.removesuffix(".py").strip("./").replace("/", ".")
        raise ConfigError(
            f"app must name a module, not a file: {better}:{attribute}, not {name!r}"
        )
    directory = os.path.abspath(app_dir)
    if directory not in sys.path:
        sys.path.insert(0, directory)
    return _attribute(_import(module_name, directory), attribute)


def _import(name: str, directory: str) -> Any:
    importlib.invalidate_caches()
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{name}.".startswith(f"{error.name}."):
            raise _own_fault(name, error) from error
        raise AppLoadError(
            f"no module {error.name!r} in {directory} or on the Python path; "
            "check its name, or use --app-dir"
        ) from None
    except KeyboardInterrupt:
        raise
    except BaseException as error:
        raise _own_fault(name, error) from error


def told(
    error: BaseException,
) -> tuple[type[BaseException], BaseException, TracebackType | None]:
    """What a traceback is to show: of an app's own fault, only the app's part.

    Of a certificate's fault, no more than the line that names it.
    """
    if isinstance(error, CertificateError):
        return type(error), error, None
    if isinstance(error, AppStartupError):
        cause = error.__cause__
        return (type(error), error, None) if cause is None else told(cause)
    if not isinstance(error, AppLoadError) or not error.own or not error.__cause__:
        return type(error), error, error.__traceback__
    cause = error.__cause__
    tb = cause.__traceback__
    while tb is not None and _is_ours(tb):
        tb = tb.tb_next
    return type(cause), cause, tb


def _is_ours(tb: TracebackType) -> bool:
    code = tb.tb_frame.f_code
    return (
        code.co_filename in (__file__, importlib.__file__)
        or "importlib._bootstrap" in code.co_filename
    )


def _own_fault(name: str, error: BaseException) -> AppLoadError:
    what = f"{type(error).__name__}: {error}".partition("\n")[0]
    return AppLoadError(f"importing {name} failed: {what}", own=True)


def _attribute(module: Any, path: str) -> Any:
    found = module
    for part in path.split("."):
        try:
            found = getattr(found, part)
        except AttributeError:
            raise AppLoadError(_missing(module, path, part, found)) from None
    if not callable(found):
        kind = type(found).__name__
        raise AppLoadError(f"{module.__name__}:{path} is of type {kind}, not callable")
    return found


def _missing(module: Any, path: str, part: str, found: Any) -> str:
    close = difflib.get_close_matches(part, dir(found), n=1)
    remedy = f"did you mean {close[0]}?" if close else "check the name"
    return f"module {module.__name__} has no {path}; {remedy}"


enlist()
