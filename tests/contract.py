"""The contract with fasthttp's prefork, row by row: `python tests/contract.py`.

It prints docs/contract.md. Which tests show a row is read from the tests: they carry
@pytest.mark.contract("row", ...). test_contract.py fails when a row has no test, when a
test names no row, and when the page is not what is printed here.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

TESTS = Path(__file__).parent
PAGE = TESTS.parent / "docs" / "contract.md"


class Row(NamedTuple):
    """What was promised: its key, as tests name it, and its text."""

    key: str
    cells: tuple[str, ...]


def name(go: str, python: str, *more: str) -> Row:
    key = go.strip("`").partition("(")[0].partition(" ")[0]
    return Row(key, (go, python, *more))


# ---- The rows ------------------------------------------------------------------------

NAMES = [
    name("`New(s)`", "`Prefork(server, **options)`"),
    name("`Logger`", "`logger=`"),
    name("`ServeFunc(ln)`", "`serve_func=`"),
    name("`ServeTLSFunc(ln, certFile, keyFile)`", "`serve_tls_func=`"),
    name("`ServeTLSEmbedFunc(ln, certData, keyData)`", "`serve_tls_embed_func=`"),
    name("`Network`", "`network=`"),
    name("`RecoverThreshold`", "`recover_threshold=`"),
    name("`RecoverInterval`", "`recover_interval=`"),
    name("`ShutdownGracePeriod`", "`shutdown_grace_period=`"),
    name("`Reuseport`", "`reuseport=`"),
    name("`OnMasterDeath`", "`on_master_death=`"),
    name("`OnChildSpawn(pid) error`", "`on_child_spawn=`"),
    name("`OnMasterReady(pids) error`", "`on_master_ready=`"),
    name("`OnChildRecover(old, new)`", "`on_child_recover=`"),
    name("`CommandProducer(files)`", "`command_producer=`"),
    name("`ListenAndServe(addr)`", "`listen_and_serve(addr)`"),
    name(
        "`ListenAndServeTLS(addr, certKey, certFile)`",
        "`listen_and_serve_tls(addr, *, key_file, cert_file)`",
    ),
    name(
        "`ListenAndServeTLSEmbed(addr, certData, keyData)`",
        "`listen_and_serve_tls_embed(addr, *, cert_data, key_data)`",
    ),
    name("`IsChild()`", "`is_child()`"),
    name("`FASTHTTP_PREFORK_CHILD=1`", "`PREFORK_CHILD=1`"),
    name("`ErrOverRecovery`", "`OverRecoveryError`"),
    name("`ErrOnlyReuseportOnWindows`", "`OnlyReuseportOnWindowsError`"),
    name("`ErrCommandProducerNilCmd`", "`CommandProducerNoneError`"),
    name("`ErrCommandProducerNotStarted`", "`CommandProducerNotStartedError`"),
    name("`reuseport.ErrNoReusePort`", "`NoReuseportError`"),
    name("GOMAXPROCS children", "`workers=`"),
    Row("attributes", ("(fields)", "all options are attributes, checked at the start")),
]

KEPT = [
    Row(f"behaviour {number}", (str(number), text))
    for number, text in enumerate(
        [
            "order at the start: bind, children one by one with `on_child_spawn`, "
            "`on_master_ready`, supervision",
            "a failed start of child k tears down the others and raises",
            "T unplanned exits are recovered, one more is an `OverRecoveryError`",
            "recovery: threshold, spawn, `on_child_spawn`, `on_child_recover`",
            "the master keeps the socket and never accepts",
            "an executed child finds the listener at fd 3",
            "teardown on every path; nothing is left",
            "callbacks run in the master's main thread",
        ],
        1,
    )
]

BETTER = [
    Row(f"better: {key}", (there, here))
    for key, there, here in [
        (
            "signals",
            "SIGTERM to the master orphans the children",
            "TERM, INT drain, a second one kills; QUIT; HUP; TTIN, TTOU",
        ),
        (
            "drain",
            "SIGTERM kills a child at once",
            "it finishes, and idle connections have `drain_idle`",
        ),
        (
            "slots",
            "the master never binds with reuseport",
            "a socket for each slot: the true error, one port, nothing lost",
        ),
        ("certificates", "TLS files are read in the child", "in the master"),
        ("ready", '"ready" means started', '"ready" means every worker accepts'),
        (
            "exits",
            "exits count for life, clean ones too",
            "`recover_window`; planned exits never; boot failures are raised",
        ),
        (
            "lifeline",
            "the parent is polled every 500 ms",
            "a pipe: its death is noticed at once",
        ),
        ("two", "two Preforks collide on fd 3", "both work"),
        (
            "fork",
            "all before ListenAndServe runs N+1 times",
            '`spawn="fork"` runs it once, `spawn="exec"` as there',
        ),
        ("nothing", "a nil serve function panics", "TypeError before any spawn"),
        (
            "control",
            "no Shutdown, no address",
            "`shutdown()`, `reload()`, `scale()`, `address`, `workers`",
        ),
    ]
]

OPTIONS = [
    Row(f"option: {option}", (f"`{option}`",))
    for option in [
        *("name", "concurrency", "read_timeout", "header_timeout", "write_timeout"),
        *("idle_timeout", "max_conns_per_ip", "max_requests_per_conn"),
        *("max_request_body_size", "max_header_size", "tcp_keepalive"),
        *("disable_keepalive", "get_only", "stream_request_body", "continue_handler"),
        *("expect_handler", "header_received", "error_handler", "conn_state"),
        *("no_default_server_header", "no_default_date", "no_default_content_type"),
        *("close_on_shutdown", "log_all_errors", "no timeout is unlimited"),
    ]
]

SECTIONS = [
    ("Names", ("Go", "Python"), NAMES),
    ("Behaviour kept", ("", "behaviour"), KEPT),
    ("Better than there", ("there", "here"), BETTER),
    ("Options of the server", ("option",), OPTIONS),
]


# ---- The tests -----------------------------------------------------------------------


def marks() -> Iterator[tuple[str, str]]:
    """Row and test, for each mark; the tests are read, not imported."""
    for path in sorted(TESTS.glob("test_*.py")):
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                test = f"{path.name}::{node.name}"
                named = [row for mark in node.decorator_list for row in of(mark)]
                yield from ((row, test) for row in named)


def of(decorator: ast.expr) -> list[str]:
    """The rows that a decorator names."""
    if not isinstance(decorator, ast.Call):
        return []
    if ast.unparse(decorator.func) != "pytest.mark.contract":
        return []
    return [ast.literal_eval(argument) for argument in decorator.args]


def rows() -> list[Row]:
    return [row for _, _, section in SECTIONS for row in section]


# ---- The page ------------------------------------------------------------------------

HEAD = """\
# The contract

prefork does for Python what `github.com/valyala/fasthttp/prefork` does for Go.
Here is every promise, and the tests that show it. The page is generated from the tests:
`python tests/contract.py > docs/contract.md`.
"""


def page() -> str:
    tests: dict[str, list[str]] = {}
    for row, test in marks():
        tests.setdefault(row, []).append(test)
    parts = [HEAD]
    for title, heads, section in SECTIONS:
        lines = [
            f"\n## {title}\n",
            cells(*heads, "tests"),
            cells(*["---"] * (len(heads) + 1)),
        ]
        for row in section:
            shown = [f"`{test}`" for test in tests.get(row.key, [])]
            lines.append(cells(*row.cells, "<br>".join(shown)))
        parts.append("\n".join(lines) + "\n")
    return "".join(parts)


def cells(*texts: str) -> str:
    return f"| {' | '.join(texts)} |"


if __name__ == "__main__":
    print(page(), end="")
