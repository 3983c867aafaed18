"""Measure servers beside the physical limit, in interleaved rounds.

    python benchmarks/run.py --setup-peers
    python benchmarks/run.py --rounds 5 --seconds 5 --out benchmarks/RESULTS.md

Timings drift from minute to minute, ratios hardly do: in every round each server is
started afresh and measured once, in an order of its own, and compared with the limit of
that round.
"""

from __future__ import annotations

import argparse
import datetime
import os
import platform
import random
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Callable, Collection
from pathlib import Path

import cpu
import load
import profiler
import servers
import table
from programs import BUILD, KEYS, ROOT, ProgramError

DEFAULT_SERVERS = (
    "limit,core,prefork,nginx,fastpysgi-wsgi,bjoern,granian-wsgi,granian-asgi,"
    "granian-rsgi,uvicorn,gunicorn,uwsgi"
)
DEFAULT_SCENARIOS = "ka64,ka512,pipe16,close,idle10k"
FAILURES = (load.LoadError, ProgramError, profiler.ProfileError, servers.Unavailable)


def main() -> int:
    options = parse(sys.argv[1:])
    try:
        if options.setup_peers:
            servers.setup_peers(options.python, options.peers)
            return 0
        return bench(options)
    except FAILURES as error:
        print(f"run.py: {error}", file=sys.stderr)
        return 1


def parse(args: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--rounds", type=int, default=3)
    add("--seconds", type=int, default=3, help="for which wrk loads a server")
    add(
        "--servers",
        type=names(servers.SERVERS),
        default=DEFAULT_SERVERS,
        help=f"of {', '.join(servers.SERVERS)}",
    )
    add(
        "--scenarios",
        type=names(load.SCENARIOS),
        default=DEFAULT_SCENARIOS,
        help=f"of {', '.join(load.SCENARIOS)}",
    )
    add(
        "--key",
        choices=KEYS,
        default="ec",
        help="of the certificate of TLS: P-256, the default, or RSA-2048",
    )
    add(
        "--python",
        type=Path,
        default=Path(sys.executable),
        help="the interpreter that has prefork",
    )
    add(
        "--peers",
        type=Path,
        default=BUILD / "peers",
        help="the virtual environment that has the peers",
    )
    add("--setup-peers", action="store_true", help="install them there, and stop")
    add("--profile", action="store_true", help="run perf on each, measure nothing")
    add("--out", type=Path, help="write the tables to this file")
    options = parser.parse_args(args)
    if options.rounds < 1 or options.seconds < 1:
        parser.error("--rounds and --seconds must be at least 1")
    return options


def names(known: Collection[str]) -> Callable[[str], list[str]]:
    """Reads a list of them, separated by commas."""

    def read(text: str) -> list[str]:
        wanted = [name.strip() for name in text.split(",")]
        for name in wanted:
            if name not in known:
                raise argparse.ArgumentTypeError(
                    f"{name!r} is not one of {', '.join(known)}"
                )
        return wanted

    return read


# ---- Rounds ------------------------------------------------------------------------


def bench(options: argparse.Namespace) -> int:
    load.check(options.scenarios)
    if options.profile:
        profiler.check()
    available = find(options)
    samples: table.Samples = {
        name: {server: [] for server in there} for name, there in available.items()
    }
    for number in range(1 if options.profile else options.rounds):
        for name, there in available.items():
            for server in random.sample(there, len(there)):
                samples[name][server].append(attempt(options, name, server, number))
    if not options.profile:
        publish(options, samples, available)
    return 0


def find(options: argparse.Namespace) -> dict[str, list[str]]:
    """For each scenario the servers that can be run here; of the others, why not."""
    available: dict[str, list[str]] = {}
    for name in options.scenarios:
        available[name] = []
        for server in options.servers:
            with tempfile.TemporaryDirectory() as scratch:
                site = site_of(options, Path(scratch), load.SCENARIOS[name])
                try:
                    servers.SERVERS[server].start(site)
                except (servers.Unavailable, ProgramError) as error:
                    say(f"{name} without {server}: {error}")
                else:
                    available[name].append(server)
    return available


def site_of(
    options: argparse.Namespace, scratch: Path, scenario: load.Scenario
) -> servers.Site:
    # Not resolved: a virtual environment's python is a link.
    return servers.Site(
        Path(os.path.abspath(options.python)),
        Path(os.path.abspath(options.peers)),
        scratch,
        servers.free_port(),
        scenario,
        options.key,
    )


def attempt(
    options: argparse.Namespace, name: str, server: str, number: int
) -> load.Sample | None:
    """One server under one load; a failure is told and leaves a gap."""
    try:
        sample = measure(options, name, server)
    except (servers.ServerError, load.LoadError) as error:
        say(f"{number + 1} {name:8} {server:16} {error}")
        return None
    if sample:
        say(
            f"{number + 1} {name:8} {server:16} {sample.cpu_us:9.2f} µs/request"
            f" {sample.rate:11,.0f}/s  foreign {sample.usage.foreign:.2f}"
            + (f"  errors {sample.errors}" if sample.errors else "")
        )
    return sample


def measure(options: argparse.Namespace, name: str, server: str) -> load.Sample | None:
    """Start it, load it, stop it; with --profile, print what perf saw instead."""
    scenario = load.SCENARIOS[name]
    server_core, load_core = cpu.cores()
    if scenario.run is load.run_idle:
        load.raise_limit(scenario.connections)
    with tempfile.TemporaryDirectory() as directory:
        scratch = Path(directory)
        site = site_of(options, scratch, scenario)
        with servers.running(servers.SERVERS[server], site, server_core) as up:
            target = load.Target(up.pids, up.port, options.seconds, load_core)
            if options.profile:
                say(f"\n{server}, {name}:")
                say(profiler.profile(scenario, target, scratch))
                return None
            return scenario.run(scenario, target)


def say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


# ---- The document ------------------------------------------------------------------


def publish(
    options: argparse.Namespace,
    samples: table.Samples,
    available: dict[str, list[str]],
) -> None:
    names = {server for there in available.values() for server in there}
    text = table.document(facts(options, names), samples)
    if options.out:
        options.out.write_text(text)
    print(text, end="")


def facts(options: argparse.Namespace, names: set[str]) -> list[tuple[str, str]]:
    today = datetime.datetime.now(datetime.timezone.utc).date()
    system = f"{platform.system()} {platform.release()}"
    arguments = [shown(argument) for argument in sys.argv[1:]]
    return [
        ("machine", f"{cpu.model()}, {os.cpu_count()} CPUs, {system}"),
        ("Python", output(str(options.python), "-c", VERSION)),
        ("commit", commit()),
        ("peers", peer_versions(options, names)),
        *tls_facts(options),
        ("date", str(today)),
        ("command", f"`{shlex.join(['python', 'benchmarks/run.py', *arguments])}`"),
    ]


def tls_facts(options: argparse.Namespace) -> list[tuple[str, str]]:
    if not any(load.SCENARIOS[name].tls for name in options.scenarios):
        return []
    key = {"ec": "ECDSA P-256", "rsa": "RSA-2048"}[options.key]
    version = " ".join(output("openssl", "version").split()[:2])
    return [("TLS", f"TLSv1.3, {servers.CIPHER}, a certificate of {key}, {version}")]


VERSION = "import platform as p; print(p.python_implementation(), p.python_version())"


def shown(argument: str) -> str:
    """An argument without the directories of this machine."""
    path = Path(argument)
    if not path.is_absolute():
        return argument
    try:
        return str(path.relative_to(ROOT))
    except ValueError:
        return path.name


def commit() -> str:
    text = output("git", "-C", str(ROOT), "describe", "--always", "--dirty")
    return text or "none yet"


VERSIONS = """
import importlib.metadata as metadata, sys
for name in sys.argv[1:]:
    try: print(name, metadata.version(name))
    except metadata.PackageNotFoundError: pass
"""


def peer_versions(options: argparse.Namespace, names: set[str]) -> str:
    packages = {part for name in names for part in name.split("-")}
    if "uvicorn" in packages:
        packages |= {"uvloop", "httptools", "websockets"}
    python = options.peers / "bin" / "python"
    lines = output(str(python), "-c", VERSIONS, *sorted(packages)).splitlines()
    if "nginx" in packages:
        lines.append(output("nginx", "-v").partition(": ")[2].replace("/", " "))
    lines.append(" ".join(output("wrk", "-v").split()[:2]))
    return ", ".join(filter(None, lines))


def output(*command: str) -> str:
    """What a command prints; nothing if it fails (wrk does, after its version)."""
    try:
        done = subprocess.run(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
    except FileNotFoundError:
        return ""
    failed = done.returncode and "wrk" not in command[0]
    return "" if failed else done.stdout.strip()


if __name__ == "__main__":
    sys.exit(main())
