"""The command line, generated from prefork.config, and what goes wrong on it.

    prefork MODULE:ATTR [--bind ADDR]... [--workers N] ...

Every value goes as text to Config, which reads flags, environment and keywords alike,
so that a mistake is worded the same wherever it was made. It gives one line on stderr
and an exit code of its own (see prefork.errors); a traceback is shown only if it is
the app's.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import os
import signal
import socket
import sys
import traceback
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NoReturn

import click

from prefork import config as options
from prefork import configfile, log, worker
from prefork.certificates import Certificates
from prefork.config import PREFORK, SERVER, Config, Option
from prefork.errors import (
    EXIT_OS_ERROR,
    AppLoadError,
    ConfigError,
    PreforkError,
    WorkerBootError,
)


def main(args: Sequence[str] | None = None) -> None:
    """Run the command line; always raises SystemExit, with the exit code."""
    sys.exit(_run(command(), args))


# ---- The command, out of Config ----------------------------------------------------


class Command(click.Command):
    """Prints its options under the headings of config.Group."""

    def format_options(
        self, ctx: click.Context, formatter: click.HelpFormatter
    ) -> None:
        sections: dict[str, list[tuple[str, str]]] = {}
        for param in self.get_params(ctx):
            record = param.get_help_record(ctx)
            if isinstance(param, click.Argument):
                record = (options.APP.metavar, _help("app", options.OPTIONS["app"]))
            if record is not None:
                sections.setdefault(_section_of(param), []).append(record)
        for title, records in sections.items():
            with formatter.section(title):
                formatter.write_dl(records)


def _section_of(param: click.Parameter) -> str:
    option = options.OPTIONS.get(param.name or "")
    return option.group.value if option else "Other"


def command() -> click.Command:
    """The command with an argument for the app and a flag for every option."""
    argument = click.Argument(["app"], required=False, metavar=options.APP.metavar)
    flags = [
        _flag(name, option)
        for name, option in options.OPTIONS.items()
        if not option.keyword_only and name != "app"
    ]
    version = click.version_option(
        _version(), "--version", message="prefork %(version)s"
    )
    return version(
        Command(
            "prefork",
            callback=_command,
            params=[argument, *sorted(flags, key=_section_order), *_questions()],
            help="Serve the app MODULE:ATTR from several worker processes.",
            epilog="SIZE takes units, like 64K or 10M; TIME seconds, or 500ms, 1h30m.",
            context_settings={"help_option_names": ["-h", "--help"]},
        )
    )


def _questions() -> list[click.Option]:
    """The flags that are no options: where to read those, and what to do instead."""
    return [
        click.Option(
            ["config", "-c", "--config"],
            metavar="FILE",
            help="Read options from this TOML file; default: prefork.toml, else "
            "[tool.prefork] of pyproject.toml, in the working directory.  "
            "[env: PREFORK_CONFIG]",
        ),
        click.Option(
            ["check_config", "--check-config"],
            is_flag=True,
            help="Load options and app, say whether they are right, and exit.",
        ),
        click.Option(
            ["print_config", "--print-config"],
            is_flag=True,
            help="Print each option, its value and where it comes from, and exit.",
        ),
    ]


def _section_order(flag: click.Parameter) -> int:
    return [group.value for group in options.Group].index(_section_of(flag))


def _flag(name: str, option: Option) -> click.Option:
    long = [flag for flag in option.flags if flag.startswith("--")]
    short = [flag for flag in option.flags if not flag.startswith("--")]
    flags = long or ["--" + name.replace("_", "-")]
    switch = option.kind is options.BOOLEAN
    if switch:
        flags = [f"{flag}/{_opposite(flag)}" for flag in flags]
    return click.Option(
        [name, *short, *flags],
        help=_help(name, option),
        default=None,
        is_flag=switch,
        type=click.BOOL if switch else click.STRING,
        multiple=option.kind.several,
        metavar=None if switch else _metavar(option),
    )


OPPOSITES = {"--no-": "--", "--disable-": "--enable-", "--": "--no-"}


def _opposite(flag: str) -> str:
    prefix = next(prefix for prefix in OPPOSITES if flag.startswith(prefix))
    return OPPOSITES[prefix] + flag.removeprefix(prefix)


def _metavar(option: Option) -> str:
    return "|".join(option.choices) or option.kind.metavar


def _help(name: str, option: Option) -> str:
    default = option.show(options.DEFAULTS[name])
    return f"{option.help}  [env: {options.variable(name)}; default: {default}]"


def _version() -> str:
    try:
        return importlib.metadata.version("prefork")
    except importlib.metadata.PackageNotFoundError:
        return "unknown"


# ---- What it does ------------------------------------------------------------------


def _command(
    config: str | None, check_config: bool, print_config: bool, **values: Any
) -> int:
    given = {name: value for name, value in values.items() if value not in (None, ())}
    path = config or os.environ.get("PREFORK_CONFIG")
    file = configfile.read(path) if path else configfile.find()
    if print_config:
        _print_config(given, file)
    elif check_config:
        _check_config(given, file)
    else:
        return _serve(_configured(given, file))
    return 0


def _print_config(given: Mapping[str, Any], file: configfile.File | None) -> None:
    """Every option, so that a file may be made of it."""
    config = Config.load(given, file=file)
    lines = []
    for name, origin in options.origins(given, file=file):
        option = options.OPTIONS[name]
        if not option.keyword_only:
            place = "command line" if origin.place == "given" else origin.place
            value = getattr(config, name)
            hidden = "# " if option.secret and value is not None else ""
            lines.append((f"{hidden}{name} = {option.literal(value)}", place))
    width = max(len(line) for line, _ in lines if len(line) < 60)
    for line, place in lines:
        click.echo(f"{line:{width}}  # {place}")


def _check_config(given: Mapping[str, Any], file: configfile.File | None) -> None:
    config = _configured(given, file)
    _server(config)
    certificates = Certificates.of(config)
    if certificates is not None:
        certificates.load()
        certificates.warn(log.error_logger(config.logger, config.log_level))
    what = f"{config.app} is" if file is None else f"{config.app} and {file.path} are"
    click.echo(f"prefork: {what} in order")


def _serve(config: Config) -> int:
    log.error_logger(config.logger, config.log_level)
    try:
        with _early_signals() as kept:
            _supervise(config, kept)
    except Stopped as stopped:
        return _tell(f"{stopped}: stopped", 0)
    return 0


def _supervise(config: Config, kept: Sequence[int]) -> None:
    from prefork.prefork import Prefork

    early = config.preload and config.spawn == "fork"
    server = _server(config) if early else Deferred(config)
    prefork = Prefork(server, **config.keywords(PREFORK))

    def deliver(pids: list[int]) -> None:
        for number in kept:
            os.kill(os.getpid(), number)

    prefork.on_master_ready = deliver
    prefork.listen_and_serve(config.bind)


class Stopped(KeyboardInterrupt):
    """A signal asked for the end when nothing had been started."""


@contextlib.contextmanager
def _early_signals() -> Iterator[list[int]]:
    """Handle signals while the app is loaded, and there is no master that does so.

    Some stop that; the others are kept for the master. What is ignored stays so.
    """
    kept: list[int] = []

    def stop(number: int, frame: object) -> NoReturn:
        raise Stopped(signal.Signals(number).name)

    def keep(number: int, frame: object) -> None:
        kept.append(number)

    handlers: dict[int, Any] = (
        {}
        if worker.is_child()
        else {
            **dict.fromkeys((signal.SIGTERM, signal.SIGINT, signal.SIGQUIT), stop),
            **dict.fromkeys((signal.SIGHUP, signal.SIGTTIN, signal.SIGTTOU), keep),
        }
    )
    old = {number: signal.getsignal(number) for number in handlers}
    for number, handler in old.items():
        if handler is not signal.SIG_IGN:
            signal.signal(number, handlers[number])
    try:
        yield kept
    finally:
        for number, handler in old.items():
            if handler is not None:  # None: not installed by Python
                signal.signal(number, handler)


def _server(config: Config) -> Any:
    from prefork.server import Server

    return Server(_app(config), **config.keywords(SERVER))


class Deferred:
    """A server whose app is loaded where it serves: in the worker."""

    def __init__(self, config: Config) -> None:
        self.config = config
        self.seat: tuple[Any, ...] = ()
        self.tls: Any = None

    def take_seat(self, *seat: Any) -> None:
        self.seat = seat

    def serve(self, sockets: list[socket.socket], **more: Any) -> None:
        server = _server(self.config)
        server.tls = self.tls
        if self.seat:
            server.take_seat(*self.seat)
        server.serve(sockets, **more)


def _configured(given: Mapping[str, Any], file: configfile.File | None) -> Config:
    config = Config.load(given, file=file)
    if config.app is None:
        raise ConfigError("app is missing: prefork MODULE:ATTR, like main:handler")
    if config.chdir is not None:
        _change_directory(config.chdir)
    return config


def _change_directory(path: str) -> None:
    try:
        os.chdir(path)
    except OSError as error:
        reason = (error.strerror or "").lower()
        raise ConfigError(
            f"chdir must be a directory to enter, not {path!r} ({reason})"
        ) from None


def _app(config: Config) -> Any:
    return worker.load_app(config.app, config.app_dir)


# ---- What goes wrong ---------------------------------------------------------------


def _run(command: click.Command, args: Sequence[str] | None) -> int:
    """The exit code; whatever was a mistake has been told on stderr, or our master."""
    try:
        return _main(command, args)
    except PreforkError as error:
        if worker.report_boot_failure(error):
            return error.exit_code
        return _tell_error(error)


def _main(command: click.Command, args: Sequence[str] | None) -> int:
    try:
        result = command.main(args, prog_name="prefork", standalone_mode=False)
        return result if isinstance(result, int) else 0
    except click.ClickException as error:
        return _tell(f"{error.format_message()} See prefork --help.", error.exit_code)
    except click.Abort:
        return _tell("interrupted", 130)
    except OSError as error:
        if isinstance(error, PreforkError):
            raise
        return _tell(_worded(error), EXIT_OS_ERROR)


def _tell_error(error: PreforkError) -> int:
    if isinstance(error, AppLoadError) and error.own:
        traceback.print_exception(*worker.told(error))
    if isinstance(error, WorkerBootError):
        sys.stderr.write(error.traceback)
        return _tell(f"worker {error.pid} failed to boot", error.exit_code)
    return _tell(str(error), error.exit_code)


def _tell(text: str, code: int) -> int:
    click.echo(f"prefork: {text}", err=True)
    return code


def _worded(error: OSError) -> str:
    text = error.strerror or str(error)
    return text if error.filename is None else f"{error.filename}: {text}"
