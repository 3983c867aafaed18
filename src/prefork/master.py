"""The master: binds, starts the workers, keeps them alive, and ends them in order.

    Master       one call of listen_and_serve(), from bind to teardown
    slots.Slot   the place of one worker; workers come and go, slots stay
    spawn        where workers come from
    reload       how all of them are replaced
    recovery     how many may crash
    queues       who accepts for a slot while its worker does not
    renewal      what of TLS is kept fresh
    signals      what ends the wait, and how signals do

The master waits in one blocking call for everything at once: signals, children that
end, and the pipes by which workers report. It runs in the program's main thread, as do
all callbacks but on_master_death, and never accepts a connection.

A stop is the same as a teardown after an error: listeners quiesced, SIGTERM to all, and
SIGKILL to who is left after the grace period. There is one way out.
"""

from __future__ import annotations

import contextlib
import dataclasses
import enum
import gc
import json
import os
import signal
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

from prefork import _core, _processes, listeners, signals, spawn, worker
from prefork.config import OPTIONS, PREFORK, Config, names
from prefork.errors import (
    ConfigError,
    ReloadError,
    SpawnError,
    WorkerBootError,
    describe_status,
)
from prefork.listeners import Listener
from prefork.queues import Queues
from prefork.recovery import Recovery
from prefork.reload import Reload
from prefork.renewal import Renewal
from prefork.slots import Life, Slot, WorkerState
from prefork.spawn import Forks, Producer, Programs, Seat, Source, Template


class State(enum.Enum):
    """Of a master; `Master._become` is the one writer."""

    STARTING = "starting"  # not every worker has accepted yet
    SERVING = "serving"
    STOPPING = "stopping"  # the workers drain
    KILLING = "killing"  # the grace period is over, or somebody lost patience


RUNNING = (State.STARTING, State.SERVING)
ROWS = 4 * 4096  # of the scoreboard: sparse, those never claimed take no memory
RETRY = 1.0  # seconds after which a worker that could not be started is tried again
STRANGERS_WAIT = 1.0  # seconds in which whoever started a child may reap it
INSIST = 1.0  # seconds after which who booted when it was told to leave is told again


def _spawn_error(error: OSError) -> SpawnError:
    reason = os.strerror(error.errno or 0)
    return SpawnError(f"cannot start a worker: {reason[:1].lower()}{reason[1:]}")


def plain(config: Config) -> dict[str, Any]:
    """The options that can be written down: what a reload takes over or warns of."""
    found = {name: getattr(config, name) for name in names(PREFORK)}
    return {n: v for n, v in found.items() if not OPTIONS[n].keyword_only}


# What a reload takes over; the rest is fixed by what the master has made of it.
RELOADED = (
    *("workers", "recover_threshold", "recover_window", "recover_interval"),
    *("shutdown_grace_period", "log_level"),
)


class Master:
    """One run, from bind to teardown; lives in the main thread.

    Other threads may call ask_stop(), ask_reload() and ask_scale() only.
    """

    def __init__(self, work: worker.Work, config: Config, run_name: str) -> None:
        self.work = work
        self.config = config
        self.run_name = run_name
        self.logger = work.logger
        self.state = State.STARTING
        self.generation = 1
        self.slots: list[Slot] = []
        self.retired: list[Slot] = []  # given up; their workers drain
        self.lives: dict[int, Life] = {}  # by pid: workers and templates
        self.reports: dict[int, Life] = {}  # by the pipe's read end
        self.listeners: list[Listener] = []
        self.news: deque[tuple[int, int, int]] = deque()  # outlives what one raises
        self.recovery = Recovery()
        self.deadline: float | None = None  # of a stop
        self.unsure: list[Life] = []  # who may not have understood that it is one
        self.insist_at: float | None = None  # when they are told again
        self.reap_at: float | None = None  # when strangers are reaped
        self.reload: Reload | None = None
        self.renewal: Renewal | None = None  # of our own server's TLS
        self.stop_asked = self.reload_asked = False
        self.scale_asked: int | None = None
        self.wake = signals.Wake()

    # ---- The run ----

    def run(self, addresses: Sequence[str]) -> None:
        with contextlib.ExitStack() as stack:
            self._listen(addresses, stack)
            self._open(stack)
            stack.callback(self._tear_down)
            self._start()
            while self.state in RUNNING:
                self._turn()

    def _listen(self, addresses: Sequence[str], stack: contextlib.ExitStack) -> None:
        """Bind, and make the slots; sockets that are left are closed in the end."""
        count = self.config.worker_count
        if self.config.command_producer is not None and self.config.reuseport:
            for text in addresses:
                listener = listeners.reserve(text, self.config)
                stack.callback(listener.close)
                self.listeners.append(listener)
            self.slots = [Slot(index, []) for index in range(count)]
            return
        on_close = stack.callback
        self.listeners = listeners.listen_all(addresses, self.config, count, on_close)
        for index in range(count):
            sockets = [listener.socket_of(index) for listener in self.listeners]
            self.slots.append(self._open_slot(index, sockets))

    def _open(self, stack: contextlib.ExitStack) -> None:
        """Pipes, then signals; given back in reverse order."""
        self.board = _core.Scoreboard(ROWS)
        stack.callback(self.board.close)
        self.queues = Queues(self.board, self.lives)
        self.lifeline, self.lifeline_end = ends = os.pipe2(os.O_CLOEXEC)
        for end in ends:
            stack.callback(os.close, end)
        self.wake.open()
        stack.callback(self.wake.close)
        stack.enter_context(signals.awaitable_children())
        numbers = [*SIGNALS]
        if signal.getsignal(signal.SIGCHLD) is signal.SIG_DFL:
            numbers.append(signal.SIGCHLD)
        stack.enter_context(signals.collected(numbers, self.wake.end))
        self.let_through = signals.let_through(numbers)
        self.processes = _processes.Processes(numbers)
        stack.callback(self.processes.close)
        self.processes.watch(self.wake.fd)
        self._open_tls(stack)
        self.source = self.first_source = self._first_source()
        self.was_reaper = _processes.is_reaper()
        stack.callback(self._close_sources)
        if isinstance(self.source, Forks):
            stack.enter_context(_frozen_heap())

    def _open_tls(self, stack: contextlib.ExitStack) -> None:
        """What our own server's TLS has the master do."""
        certificates = self.work.certificates
        if certificates is None or self.work.serve_func is not None:
            return
        self.renewal = Renewal(certificates, self.board, self.logger)
        stack.callback(self.renewal.close)
        if self.renewal.fileno() >= 0:
            self.processes.watch(self.renewal.fileno())

    def _first_source(self) -> Source:
        """Where workers come from, until a reload."""
        if self.config.command_producer is not None:
            child = dataclasses.replace(self._child(), blocked=())
            if self.config.reuseport:
                child.address = self.listeners[0].text
            produce = self.config.command_producer
            return Producer(produce, child, self._letting_through)
        if self.config.spawn == "exec":
            return Programs(self._child())
        return Forks(self.work, self._release)

    def _child(self) -> worker.Inheritance:
        """What is the same for all children that run the program again."""
        return worker.Inheritance(
            run=self.run_name, master=os.getpid(), blocked=self.let_through
        )

    def _start(self) -> None:
        for slot in list(self.slots):
            if self.stop_asked:
                self._become(State.STOPPING)
                return
            slot.source = self.source
            self._spawn(slot)

    def _turn(self) -> None:
        """Wait for one batch of news and deal with it."""
        if not self.news:
            self.news.extend(self.processes.wait(self._timeout()))
        while self.news:
            kind, number, status = self.news.popleft()
            EVENTS[kind](self, number, status)
        now = time.monotonic()
        for life in list(self.lives.values()):
            if life.kill_at is not None and life.kill_at <= now:
                self._lose_patience(life)
        if self.reap_at is not None and self.reap_at <= now:
            self.reap_at = None
            self.processes.reap_strangers()
        if self.state in RUNNING:
            self._do_what_is_due(now)
        if self.state is State.STARTING and self._all_ready():
            self._announce()
        if self.state is State.SERVING:
            self._do_as_asked()

    def _do_what_is_due(self, now: float) -> None:
        if self.renewal is not None and self.renewal.do_what_is_due(now):
            self.reload_asked = True
        for slot in list(self.slots):
            if self.state in RUNNING and slot.due is not None and slot.due <= now:
                self._recover(slot)

    def _timeout(self) -> float | None:
        dues = [life.kill_at for life in self.lives.values()]
        dues.append(self.reap_at)
        if self.state in RUNNING:
            dues += [slot.due for slot in self.slots]
            dues += self.renewal.dues() if self.renewal is not None else ()
        elif self.state is State.STOPPING:
            dues += [self.deadline, self.insist_at]
        known = [due for due in dues if due is not None]
        return max(0.0, min(known) - time.monotonic()) if known else None

    def _become(self, state: State) -> None:
        self.state = state

    def _all_ready(self) -> bool:
        return all(slot.state is WorkerState.READY for slot in self.slots)

    def _announce(self) -> None:
        self._become(State.SERVING)
        pids = [slot.life.pid for slot in self.slots if slot.life is not None]
        places = ", ".join(listener.text for listener in self.listeners)
        self.logger.info(
            "serving on %s with %d workers, master %d", places, len(pids), os.getpid()
        )
        if self.config.on_master_ready is not None:
            with self._letting_through():
                self.config.on_master_ready(pids)

    def _letting_through(self) -> contextlib.AbstractContextManager[None]:
        """While the user's code runs; what comes meanwhile goes to the wake pipe."""
        return signals.letting_through(self.let_through)

    # ---- Slots: what outlives a worker, and who must know ----

    def _open_slot(self, index: int, sockets: Sequence[Any]) -> Slot:
        """The one place where a worker's resources by virtue of its place are made."""
        if self.work.serve_func is not None:
            for sock in sockets:
                sock.setblocking(True)  # as strangers expect it
        return Slot(index, sockets)

    def _close_slot(self, slot: Slot) -> None:
        """And the one where they are given back, before the run ends."""
        for listener, sock in zip(self.listeners, slot.sockets, strict=False):
            listener.close_slot(sock)

    def _claimed(self, life: Life) -> None:
        """A worker is born into its slot; it may not accept yet."""
        self._fleet_changed()

    def _retired(self, life: Life) -> None:
        """A worker is gone from its slot, however it ended, and reaped."""
        self.board.retire(life.row)
        self._fleet_changed()

    def _fleet_changed(self) -> None:
        """Workers came, went or began to accept: somebody accepts for every slot."""
        if self.config.reuseport and self.state is State.SERVING:
            self.queues.attend(self.slots)

    # ---- Starting a worker ----

    def _spawn(self, slot: Slot) -> Life:
        """Start, record, on_child_spawn."""
        slot.due = None
        life = self._start_life(slot, slot.source)
        slot.life = life
        self._tell_spawned(life)
        return life

    def spawn_successor(self, slot: Slot, source: Source) -> None:
        """Start who is to take the place of this slot's worker when it accepts."""
        life = self._start_life(slot, source)
        slot.successor = life
        self._tell_spawned(life)
        if life.ready_at is not None:
            self._promote(slot)

    def _tell_spawned(self, life: Life) -> None:
        assert life.slot is not None
        self.logger.debug("worker %d started in slot %d", life.pid, life.slot.index)
        self._claimed(life)
        if self.config.on_child_spawn is not None:
            with self._letting_through():
                self.config.on_child_spawn(life.pid)

    def _start_life(self, slot: Slot, source: Source) -> Life:
        life = Life(slot, source, self.generation)
        with self._shortage(source), self._reporting(life) as end, self._counting(life):
            row, board = life.row, self.board
            seat = Seat(slot.index, slot.sockets, end, self.lifeline, row, board)
            self._adopt(life, source.start(seat))
        if not source.reports:
            life.ready_at = time.monotonic()
        return life

    @contextlib.contextmanager
    def _shortage(self, source: Source) -> Any:
        """No descriptor or process left is no reason to end those that serve.

        At the start it is, and what a command_producer raises is its own.
        """
        try:
            yield
        except OSError as error:
            if self.state is State.STARTING or isinstance(source, Producer):
                raise
            raise _spawn_error(error) from error

    @contextlib.contextmanager
    def _counting(self, life: Life) -> Any:
        """A row of the scoreboard, given back if it is not born."""
        assert life.slot is not None
        life.row = self.board.claim(life.slot.index, life.generation)
        try:
            yield
        except BaseException:
            self.board.retire(life.row)
            raise

    @contextlib.contextmanager
    def _reporting(self, life: Life) -> Any:
        """The write end of the pipe by which it reports, for as long as it is born."""
        report, end = os.pipe2(os.O_CLOEXEC)
        os.set_blocking(report, False)
        life.report = report
        self.reports[report] = life
        try:
            self.processes.watch(report)
            yield end
        except BaseException:
            if life.pid not in self.lives:
                self._close_report(life)
            raise
        finally:
            os.close(end)

    def _adopt(self, life: Life, pid: int) -> None:
        """From now on it is known by its pidfd; until then its pid is safe."""
        try:
            self.processes.adopt(pid)
        except OSError:
            with contextlib.suppress(ProcessLookupError, ChildProcessError):
                os.kill(pid, signal.SIGKILL)
                os.waitpid(pid, 0)
            raise
        life.pid = pid
        self.lives[pid] = life

    def _release(self, seat: Seat) -> Callable[[], None]:
        """What a forked worker closes: all that is the master's or other workers'."""
        socks = [sock for listener in self.listeners for sock in listener.sockets]
        others = [sock for sock in socks if sock not in seat.sockets]
        fds = [self.lifeline_end, self.wake.fd, self.wake.end, *self.reports]
        templates = [life.source for life in self.lives.values() if life.slot is None]
        renewal = self.renewal

        def release() -> None:
            if renewal is not None:
                renewal.close()
            for sock in others:
                sock.close()
            for fd in fds:
                os.close(fd)
            for template in templates:
                template.close()
            self.processes.forget()

        return release

    # ---- News ----

    def _on_signal(self, sender: int, number: int) -> None:
        SIGNALS.get(number, Master._expect_strangers)(self, number)

    def _stop_by(self, number: int) -> None:
        """The first TERM or INT stops in order, a second one kills."""
        name = signal.Signals(number).name
        if self.state in RUNNING:
            self.logger.info("%s: stopping", name)
            self._become(State.STOPPING)
        else:
            self._kill_by(number)

    def _kill_by(self, number: int) -> None:
        self.logger.warning("%s: killing the workers", signal.Signals(number).name)
        self._kill()

    def _reload_by(self, number: int) -> None:
        self.reload_asked = True

    def _scale_by(self, number: int) -> None:
        count = len(self.slots) if self.scale_asked is None else self.scale_asked
        count += 1 if number == signal.SIGTTIN else -1
        try:
            self.scale_asked = OPTIONS["workers"].read("workers", count)
        except ConfigError as error:
            self.logger.warning("%s: %s", signal.Signals(number).name, error)

    def _expect_strangers(self, number: int) -> None:
        """SIGCHLD: children that nobody here has started, we reap in a while."""
        if _processes.is_reaper() and self.reap_at is None:
            self.reap_at = time.monotonic() + STRANGERS_WAIT

    def _on_readable(self, fd: int, _: int) -> None:
        if fd == self.wake.fd:
            self._on_wake()
            return
        if self.renewal is not None and fd == self.renewal.fileno():
            self.renewal.on_change()
            return
        life = self.reports.get(fd)
        if life is None:
            return
        if not life.hear():
            self._close_report(life)
        self._understand(life)

    def _on_wake(self) -> None:
        """Somebody asked for something, or a signal met a thread that has it not
        blocked."""
        for number in self.wake.read():
            if number in SIGNALS or number == signal.SIGCHLD:
                self._on_signal(0, number)
        if self.stop_asked and self.state in RUNNING:
            self.logger.info("shutdown: stopping")
            self._become(State.STOPPING)

    def _understand(self, life: Life) -> None:
        """Act on what a worker has said."""
        if self.state not in RUNNING:
            return
        if life.ready_at is None and life.accepts:
            life.ready_at = time.monotonic()
            if life.slot is None:
                if self.reload is not None:
                    self.reload.on_template_ready(life)
            elif life.slot.successor is life:
                self._promote(life.slot)
            self._fleet_changed()
        if life.asked and not life.planned and life.slot is not None:
            if life.slot.life is life:
                self._relieve(life.slot)

    def _on_exit(self, pid: int, status: int) -> None:
        life = self.lives.pop(pid)
        if life.report is not None:
            life.hear()
            self._close_report(life)
        if life.ready_at is None and life.accepts:
            life.ready_at = time.monotonic()
        known = status != _processes.STATUS_UNKNOWN
        code = os.waitstatus_to_exitcode(status) if known else None
        if isinstance(life.source, Producer):
            life.source.reaped(pid, code)
        if life.slot is None:
            self._on_template_exit(life, code)
        else:
            self._on_worker_exit(life, life.slot, code)

    def _on_worker_exit(self, life: Life, slot: Slot, code: int | None) -> None:
        was_successor, was_worker = slot.successor is life, slot.life is life
        if was_successor:
            slot.successor = None
        if was_worker:
            slot.life, slot.previous = None, life.pid
        self._retired(life)
        if self.state not in RUNNING:
            text = describe_status(code)
            self.logger.debug("worker %d is gone: %s", life.pid, text)
            return
        if slot in self.retired:
            self._close_if_empty(slot)
        elif was_successor:
            self._on_successor_exit(slot, life, code)
        elif was_worker:
            self._judge(slot, life, code)
        if self.reload is not None:
            self.reload.on_gone(life)

    def _close_report(self, life: Life) -> None:
        if life.report is None:
            return
        with contextlib.suppress(FileNotFoundError):  # not watched yet
            self.processes.unwatch(life.report)
        del self.reports[life.report]
        os.close(life.report)
        life.report = None

    # ---- Recovery ----

    def _judge(self, slot: Slot, life: Life, code: int | None) -> None:
        """An exit that we did not ask for: replace the worker, or give up."""
        if life.left_well(code):
            self.logger.info("worker %d left; replacing it", life.pid)
            self._replace(slot, 0.0)
            return
        cause = self._boot_error(life, code)
        if cause is not None and self.state is State.STARTING:
            raise cause
        tally = self.recovery.count(self.config, len(self.slots), code, cause)
        ended = f"worker {life.pid} ended: {describe_status(code)}"
        what = str(cause) if cause else ended
        self.logger.error("%s; recovering, %s", what, tally)
        self._replace(slot, self.config.recover_interval)

    def _boot_error(self, life: Life, code: int | None) -> WorkerBootError | None:
        failure = life.boot_failure(code, f"it ended ({describe_status(code)})")
        return WorkerBootError(life.pid, failure) if failure is not None else None

    def _replace(self, slot: Slot, wait: float) -> None:
        if slot.successor is not None:
            self._notice(slot, slot.successor)  # it is on its way already
        elif wait > 0:
            slot.due = time.monotonic() + wait
        else:
            self._recover(slot)

    def _recover(self, slot: Slot) -> None:
        """Spawn, on_child_spawn, on_child_recover."""
        try:
            life = self._spawn_anyway(slot)
        except SpawnError as error:
            self.logger.error("%s; trying again in %g s", error, RETRY)
            slot.due = time.monotonic() + RETRY
            return
        self._notice(slot, life)

    def _spawn_anyway(self, slot: Slot) -> Life:
        """Of the program as it was started, if its template has failed."""
        try:
            return self._spawn(slot)
        except ReloadError as error:
            self.logger.error("%s; going on with the program as it was started", error)
            slot.source = self.source = self.first_source
            self.reload_asked = True
            return self._spawn(slot)

    def _notice(self, slot: Slot, life: Life) -> None:
        old, notice = slot.previous, self.config.on_child_recover
        if notice is None or old is None:
            return
        try:
            with self._letting_through():
                notice(old, life.pid)
        except Exception:
            self.logger.exception("on_child_recover(%d, %d) raised", old, life.pid)

    # ---- Planned changes of workers ----

    def _relieve(self, slot: Slot) -> None:
        """Somebody told this worker to leave: while it drains, another one accepts."""
        life = slot.life
        assert life is not None
        self.logger.info("worker %d leaves; replacing it", life.pid)
        slot.life, slot.previous = None, life.pid
        life.planned = True
        life.kill_at = time.monotonic() + self.config.shutdown_grace_period
        self._replace(slot, 0.0)

    def _promote(self, slot: Slot) -> None:
        """The successor accepts: the slot is its own, who was there may leave."""
        old, life = slot.life, slot.successor
        assert life is not None
        slot.life, slot.successor, slot.source = life, None, life.source
        if old is not None:
            self._dismiss(old)
        if self.reload is not None:
            self.reload.on_accept(slot, old)

    def _dismiss(self, life: Life) -> None:
        """Tell a worker to leave, and give it the time to finish."""
        life.planned = True
        life.kill_at = time.monotonic() + self.config.shutdown_grace_period
        with contextlib.suppress(ProcessLookupError):
            self.processes.kill(life.pid, signal.SIGTERM)

    def _lose_patience(self, life: Life) -> None:
        life.kill_at = None
        self.logger.warning("worker %d does not leave: killing it", life.pid)
        with contextlib.suppress(ProcessLookupError):
            self.processes.kill(life.pid, signal.SIGKILL)

    def _do_as_asked(self) -> None:
        """Scale and reload, when somebody has asked for it."""
        if self.scale_asked is not None:
            count, self.scale_asked = self.scale_asked, None
            self._scale(count)
        if self.reload_asked:
            self.reload_asked = False
            if self.reload is not None:
                self.reload.again = True
                return
            self.logger.info("reloading")
            self.reload = Reload(self)
            self.reload.begin()
        if self.reload is not None and self.reload.over:
            self.reload = None
            self._close_templates()

    # ---- Scaling ----

    def _scale(self, count: int) -> None:
        if count != len(self.slots):
            self.logger.info("scaling from %d to %d workers", len(self.slots), count)
        while len(self.slots) < count and self.state in RUNNING:
            try:
                self._add_slot()
            except SpawnError as error:
                there = len(self.slots)
                self.logger.error("%s; staying with %d workers", error, there)
                return
        while len(self.slots) > count:
            self._give_up(self.slots.pop())

    def _add_slot(self) -> None:
        producing = not self.slots[0].sockets if self.slots else False
        sockets = [] if producing else self._more_sockets()
        slot = self._open_slot(len(self.slots), sockets)
        slot.source = self.source
        self.slots.append(slot)
        if self.reload is not None:
            self.reload.on_slot_opened(slot)
        try:
            self._spawn_anyway(slot)
        except SpawnError:
            self._give_up(self.slots.pop())
            raise

    def _more_sockets(self) -> list[Any]:
        """What the worker of one more slot accepts from."""
        made: list[Any] = []
        try:
            for each in self.listeners:
                made.append(each.open_slot())
        except OSError as error:
            for listener, sock in zip(self.listeners, made, strict=False):
                listener.close_slot(sock)
            raise _spawn_error(error) from error
        return made

    def _give_up(self, slot: Slot) -> None:
        """Its worker drains; with a socket of its own, others get what would come."""
        for listener, sock in zip(self.listeners, slot.sockets, strict=False):
            listener.avoid(sock)
        slot.due = None
        self.queues.release(slot)
        self.retired.append(slot)
        for life in (slot.life, slot.successor):
            if life is not None:
                self._dismiss(life)
        if self.reload is not None:
            self.reload.on_slot_closed(slot)
        self._close_if_empty(slot)

    def _close_if_empty(self, slot: Slot) -> None:
        if not any(life.slot is slot for life in self.lives.values()):
            self.retired.remove(slot)
            self._close_slot(slot)

    # ---- Reload: what it asks of us ----

    def launch_template(self) -> Life | None:
        """Run the program again, as the template of forked workers, if they are."""
        if not isinstance(self.first_source, Forks):
            return None
        spawn.check_program()
        _processes.set_reaper(True)
        template = Template()
        life = Life(None, template, self.generation)
        with self._reporting(life) as end:
            pid = template.launch(self._child(), end, self.lifeline, self.board)
            self._adopt(life, pid)
        return life

    def reloaded(self, options: str) -> None:
        """All workers are new; take over what the program says of its options now."""
        count = len(self.slots)
        self.logger.info("reloaded %d workers, generation %d", count, self.generation)
        if options:
            self._take_over(json.loads(options))

    def _take_over(self, options: dict[str, Any]) -> None:
        old, new = json.loads(json.dumps(plain(self.config))), {}
        for name, value in options.items():
            if value == old.get(name):
                continue
            if name in RELOADED:
                new[name] = value
            else:
                self.logger.warning("%s needs a restart to change", name)
        self.config = dataclasses.replace(self.config, **new)
        if "workers" in new:
            self.scale_asked = self.config.worker_count
        if "log_level" in new and self.config.logger is None:
            self.logger.setLevel(self.config.log_level.upper())

    def reload_failed(self, reason: str) -> None:
        self.logger.error("reload failed, the workers stay as they are: %s", reason)

    def _on_template_exit(self, life: Life, code: int | None) -> None:
        life.source.close()
        if self.state not in RUNNING or life.planned:
            return
        ended = f"the program ended ({describe_status(code)})"
        if life.ready_at is not None:
            self.logger.error("%s that forks workers; reloading", ended)
            self.reload_asked = True
        elif self.reload is not None:
            reason = life.failure or f"{ended} before it came to listen_and_serve()"
            self.reload.on_template_end(life, reason)

    def _on_successor_exit(self, slot: Slot, life: Life, code: int | None) -> None:
        reason = str(self._boot_error(life, code) or "")
        reason = reason or f"worker {life.pid} ended: {describe_status(code)}"
        if slot.life is None:
            self._replace(slot, 0.0)
        if self.reload is not None:
            self.reload.on_failure(slot, reason)

    def _close_templates(self) -> None:
        """End the templates of which no worker will be ordered any more."""
        used = {id(self.source), *(id(slot.source) for slot in self.slots)}
        for life in self.lives.values():
            if life.slot is None and id(life.source) not in used:
                life.planned = True
                life.source.close()

    # ---- Stop ----

    def ask_stop(self) -> None:
        """Any thread, any signal handler of the master."""
        self.stop_asked = True
        self.wake.up()

    def ask_reload(self) -> None:
        """Any thread, any signal handler of the master."""
        self.reload_asked = True
        self.wake.up()

    def ask_scale(self, count: int) -> None:
        """Any thread, any signal handler of the master."""
        self.scale_asked = count
        self.wake.up()

    def _tear_down(self) -> None:
        """End every worker, whatever brought us here; no process is left behind."""
        try:
            self._drain()
        except BaseException:
            self._kill()
            while self.lives:
                self._turn()
            raise

    def _drain(self) -> None:
        if self.state in RUNNING:
            self._become(State.STOPPING)
        for listener in self.listeners:
            with contextlib.suppress(OSError):  # then some connections may be lost
                listener.quiesce()
        for life in self.lives.values():
            life.kill_at = None
            if life.slot is None:
                life.source.close()
        self.unsure = [life for life in self.lives.values() if life.ready_at is None]
        self._tell(signal.SIGTERM)
        now = time.monotonic()
        self.deadline = now + self.config.shutdown_grace_period
        self.insist_at = now + INSIST if self.unsure else None
        while self.lives:
            if self.state is State.STOPPING:
                self._hurry(time.monotonic())
            self._turn()
        self.logger.info("stopped")

    def _hurry(self, now: float) -> None:
        assert self.deadline is not None
        if now >= self.deadline:
            count = len(self.lives)
            self.logger.warning("grace period over, killing %d workers", count)
            self._kill()
        elif self.insist_at is not None and now >= self.insist_at:
            self._insist(now)

    def _insist(self, now: float) -> None:
        """Tell those again who booted; who has come to serve, once more and not again.

        Where a worker boots, SIGTERM is an exception, which may have come to nothing:
        Python ignores those in finalizers and in callbacks of weak references, of which
        its imports have some.
        """
        self.unsure = [life for life in self.unsure if life.pid in self.lives]
        for life in self.unsure:
            with contextlib.suppress(ProcessLookupError):
                self.processes.kill(life.pid, signal.SIGTERM)
        self.unsure = [life for life in self.unsure if not life.has_accepted]
        self.insist_at = now + INSIST if self.unsure else None

    def _kill(self) -> None:
        self._become(State.KILLING)
        self._tell(signal.SIGKILL)

    def _tell(self, number: signal.Signals) -> None:
        for pid in self.lives:
            with contextlib.suppress(ProcessLookupError):
                self.processes.kill(pid, number)

    def _close_sources(self) -> None:
        """After the last worker: what sources hold, and what nobody has reaped."""
        self.first_source.close()
        if self.reap_at is not None:
            self.processes.reap_strangers()
        if not self.was_reaper:
            _processes.set_reaper(False)


SIGNALS: dict[int, Callable[[Master, int], None]] = {
    signal.SIGTERM: Master._stop_by,
    signal.SIGINT: Master._stop_by,
    signal.SIGQUIT: Master._kill_by,
    signal.SIGHUP: Master._reload_by,
    signal.SIGTTIN: Master._scale_by,
    signal.SIGTTOU: Master._scale_by,
}

EVENTS: dict[int, Callable[[Master, int, int], None]] = {
    _processes.EXITED: Master._on_exit,
    _processes.SIGNALLED: Master._on_signal,
    _processes.READABLE: Master._on_readable,
}


@contextlib.contextmanager
def _frozen_heap() -> Any:
    """Keep the collector off what was made before the forks: it stays shared."""
    frozen_before = gc.get_freeze_count()
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        if not frozen_before:
            gc.unfreeze()
