"""The arrows of the design, asserted: calls go down, only the bridge knows both worlds.

A rule is a function from source text to what breaks it, so each is tried twice: on the
files, and on a few lines that break it. A new C file or module gets a row in ROOMS or
MODULES; without one the tests fail.
"""

from __future__ import annotations

import ast
import keyword
import re
import textwrap
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
CSRC = ROOT / "csrc"
PACKAGE = ROOT / "src" / "prefork"

# Which rooms of csrc a room calls itself. What those call, it may call too.
ROOMS: dict[str, set[str]] = {
    "error": set(),
    "buffer": {"error"},
    "spill": set(),
    "cpu": set(),
    "scan": {"cpu"},
    "repeat": set(),
    "sha1": set(),
    "payload": {"cpu"},
    "http": {"buffer", "cpu", "payload", "repeat", "scan"},
    "deflate": {"buffer", "scan"},
    "websocket": {"buffer", "deflate", "error", "http", "payload", "sha1"},
    "trust": set(),
    "proxy": {"scan"},
    "response": {"http", "buffer", "scan"},
    "timer": set(),
    "peers": set(),
    "poller_epoll": set(),
    "mailbox": set(),
    "scoreboard": {"mailbox"},
    "crew": set(),
    "notices": {"session"},
    "tls": set(),
    "session": {"tls"},
    "output": {"buffer", "session"},
    "input": {"buffer", "http", "notices", "session", "spill", "websocket"},
    "conn": {
        *{"input", "output", "http", "response", "poller_epoll", "timer", "peers"},
        *{"scoreboard", "notices", "trust", "proxy", "spill", "websocket"},
        "session",
    },
    "request": {"conn", "session"},
    "channel": {"request", "response", "websocket", "output"},
    "loop": {"conn", "mailbox", "scoreboard", "tls"},
    "socket": {"error"},
    "files": set(),
    "process": {"error"},
}

# foo.c exports pf_foo_* and pf__foo_*, and these:
EXPORTS = {
    "poller_epoll": ("pf__poller_",),
    "loop": ("pf_options_",),
}

# Which modules of the package a module imports.
MODULES: dict[str, set[str]] = {
    "errors": set(),
    "log": set(),
    "signals": set(),
    "forwarded": {"errors"},
    "configfile": {"errors"},
    "config": {"configfile", "errors", "forwarded"},
    "_core": {"errors"},
    "_processes": {"_core"},
    "_listeners": {"_core"},
    "_files": {"_core"},
    "listeners": {"_listeners", "config", "errors"},
    "_tls": {"_core", "errors"},
    "certificates": {"_files", "_tls", "config", "errors", "log"},
    "_dispatch": {"_core", "errors"},
    "_native": {"_core", "_dispatch", "_tls", "errors"},
    "_blocks": {"_core"},
    "_watch": set(),
    "_wsgi": {"_core", "_blocks", "_dispatch", "_native", "_tls", "_watch", "errors"},
    "_waiting": set(),
    "_asgi": {
        *{"_core", "_blocks", "_dispatch", "_native", "_tls", "_waiting", "_watch"},
        *{"errors"},
    },
    "_websocket": {"_core", "_asgi", "_dispatch", "_waiting", "errors"},
    "_channel": {"_core", "_dispatch", "_waiting", "errors"},
    "eventloop": {"errors"},
    "websocket": {"_channel", "_core", "errors"},
    "native": {
        *{"_channel", "_core", "_native", "errors", "eventloop", "log", "websocket"}
    },
    "wsgi": {"_core", "_native", "_wsgi", "errors", "log", "native"},
    "asgi": {
        *{"native", "eventloop"},
        *{"_core", "_native", "_asgi", "_websocket", "errors", "log"},
    },
    "server": {
        *{"native", "wsgi", "asgi", "eventloop", "listeners", "certificates"},
        *{"_core", "_native", "_tls", "config", "errors", "forwarded", "log"},
    },
    "worker": {
        *{"server", "listeners", "native", "certificates"},
        *{"_core", "_listeners", "_native", "_processes", "config", "errors", "log"},
        "signals",
    },
    "slots": {"worker"},
    "queues": {"_core", "slots"},
    "recovery": {"config", "errors"},
    "renewal": {"_core", "certificates", "errors", "log"},
    "spawn": {"_core", "_processes", "errors", "log", "worker"},
    "reload": {"errors", "slots", "spawn"},
    "master": {
        *{"reload", "spawn", "slots", "queues", "recovery", "renewal", "worker"},
        *{"_core", "_processes", "config", "errors", "listeners", "signals"},
    },
    "prefork": {
        *{"master", "spawn", "slots", "worker", "listeners", "certificates"},
        *{"_core", "config", "errors", "log"},
    },
    "__init__": {
        *{"prefork", "worker", "server", "native"},
        *{"_core", "_native", "config", "errors", "log"},
    },
    "cli": {
        *{"__init__", "prefork", "worker", "server", "certificates"},
        *{"configfile", "config", "errors", "log"},
    },
    "__main__": {"cli"},
}

# The C functions that sleep, or make system calls by the dozen: prefork.h says which.
WITHOUT_GIL = {"pf_loop_wait", "pf_loop_flush", "pf_process_wait", "pf_crew_wait"}

ENDS_OR_PRINTS = re.compile(
    r"\b(?:v?f?printf|v?dprintf|puts|fputs|fwrite|putc|putchar|fputc|perror|psignal"
    r"|syslog|errx?|warnx?|exit|_exit|_Exit|quick_exit|abort|__builtin_trap)(?=\s*\()"
    r"|\bstdout\b|\bstderr\b"
)


# ---- reading C -----------------------------------------------------------------------

C_COMMENT = r"/\*.*?\*/|//[^\n]*"
C_LITERAL = r'"(?:\\.|[^"\\\n])*"|' + r"'(?:\\.|[^'\\\n])*'"


def blank(match: re.Match[str]) -> str:
    return re.sub(r"[^\n]", " ", match[0])


def c_directives(text: str) -> str:
    """C without comments."""

    def keep_literals(match: re.Match[str]) -> str:
        return match[0] if match[0][0] in "\"'" else blank(match)

    return re.sub(f"{C_LITERAL}|{C_COMMENT}", keep_literals, text, flags=re.S)


def c_code(text: str) -> str:
    """C without comments and literals."""
    return re.sub(f"{C_COMMENT}|{C_LITERAL}", blank, text, flags=re.S)


def prefixes(room: str) -> tuple[str, ...]:
    return (f"pf_{room}_", f"pf__{room}_", *EXPORTS.get(room, ()))


def owner(name: str) -> str | None:
    """The room that exports `name`."""
    return next((room for room in ROOMS if name.startswith(prefixes(room))), None)


def below(room: str) -> set[str]:
    """The rooms that `room` may call."""
    found: set[str] = set()
    ahead = {room}
    while ahead:
        ahead = set().union(*(ROOMS[r] for r in ahead)) - found
        found |= ahead
    return found


def types(header: str) -> set[str]:
    """The names of types in a header: data may be seen by all who share the header."""
    code = c_code(header)
    tags = re.findall(r"\b(?:struct|union|enum)\s+(\w+)", code)
    aliases = re.findall(r"\}\s*(\w+)\s*;|\btypedef\b[^;{}]*\b(\w+)\s*;", code)
    return {*tags, *(name for pair in aliases for name in pair if name)}


def sections(header: str) -> dict[str, str]:
    """The text under each heading of internal.h that names a C file."""
    parts = re.split(r"/\* -+ (\w+)\.c\b", header)
    return dict(zip(parts[1::2], (f"/*{part}" for part in parts[2::2]), strict=True))


def functions(text: str) -> list[tuple[str, bool]]:
    """The functions that C code defines: name, and whether it is static."""
    code = re.sub(r"^[ \t]*#(?:[^\n]*\\\n)*[^\n]*", "", c_code(text), flags=re.M)
    code = re.sub(r"__attribute__\s*\(\(.*?\)\)", "", code, flags=re.S)
    found = []
    depth = start = 0
    for mark in re.finditer(r"[{};]", code):
        if mark[0] == "{":
            head = code[start : mark.start()]
            name = re.search(r"(\w+)\s*\(", head)
            if depth == 0 and name and "=" not in head:
                found.append((name[1], bool(re.search(r"\bstatic\b", head))))
            depth += 1
            continue
        if mark[0] == "}":
            depth -= 1
        if depth == 0:
            start = mark.end()
    return found


# ---- the rules of csrc ---------------------------------------------------------------


def upward_calls(room: str, text: str, shared: set[str]) -> set[str]:
    """What `room` names of rooms that are not below it."""
    names = set(re.findall(r"\bpf_\w+", c_code(text))) - shared
    return {n for n in names if owner(n) not in {None, room, *below(room)}}


def misnamed(room: str, text: str) -> set[str]:
    """The functions that foo.c exports under names that do not begin with pf_foo_."""
    exported = {name for name, static in functions(text) if not static}
    return {name for name in exported if not name.startswith(prefixes(room))}


def includes_python(text: str) -> bool:
    return bool(re.search(r'#\s*include\s*[<"]Python\.h', c_directives(text)))


def ends_or_prints(text: str) -> set[str]:
    return set(ENDS_OR_PRINTS.findall(c_code(text)))


# ---- reading Python and Cython -------------------------------------------------------


DOCSTRING = r'"""(?:\\.|[^\\])*?"""|' + r"'''(?:\\.|[^\\])*?'''"


def py_code(text: str) -> str:
    """Python or Cython without comments and literals."""
    return re.sub(rf"{DOCSTRING}|{C_LITERAL}|#[^\n]*", blank, text, flags=re.S)


def import_lines(cython: str) -> str:
    """The imports and cimports of Cython code, as Python."""
    plain = r"c?import[ \t][^\n]*"
    names = r"from[ \t]+[\w.]+[ \t]+c?import\b(?:[ \t]*\([^)]*\)|[^\n]*)"
    lines = re.findall(rf"^[ \t]*({plain}|{names})", py_code(cython), flags=re.M)
    return "\n".join(re.sub(r"\bcimport\b", "import", line) for line in lines)


class Imports(ast.NodeVisitor):
    """Collects the modules of prefork that are imported; the package is __init__."""

    def __init__(self) -> None:
        self.found: set[str] = set()

    def visit_If(self, node: ast.If) -> None:
        test = ast.unparse(node.test)
        branches = node.orelse if test.endswith("TYPE_CHECKING") else [node]
        for branch in branches:
            self.generic_visit(branch) if branch is node else self.visit(branch)

    def visit_Import(self, node: ast.Import) -> None:
        for alias in node.names:
            package, _, rest = alias.name.partition(".")
            if package == "prefork":
                self.found.add(rest.split(".")[0] or "__init__")

    def visit_ImportFrom(self, node: ast.ImportFrom) -> None:
        path = "prefork." * bool(node.level) + (node.module or "")
        package, _, rest = path.rstrip(".").partition(".")
        if package != "prefork":
            return
        if rest:
            self.found.add(rest.split(".")[0])
            return
        names = {alias.name for alias in node.names}
        self.found |= {n if n in MODULES else "__init__" for n in names}


def imports(text: str, suffix: str) -> set[str]:
    visitor = Imports()
    visitor.visit(ast.parse(text if suffix == ".py" else import_lines(text)))
    return visitor.found


# ---- the rules of the package --------------------------------------------------------


def forbidden_imports(module: str, text: str, suffix: str = ".py") -> set[str]:
    return imports(text, suffix) - MODULES[module] - {module}


def names_core_header(text: str) -> bool:
    prose = rf"{DOCSTRING}|#[^\n]*"
    code = re.sub(prose, "", text, flags=re.S)
    return bool(re.search(r"\b(?:prefork|internal)\.h\b", code))


def takes_gil(text: str) -> bool:
    return bool(re.search(r"\bwith\s+gil\b", py_code(text)))


def calls_without_gil(text: str) -> list[set[str]]:
    """What is called in each `with nogil` of Cython code."""
    lines = py_code(text).split("\n")
    found = []
    for at, line in enumerate(lines):
        opening = re.search(r"\bwith\s+nogil\b[^:]*:(.*)", line)
        if not opening:
            continue
        indent = len(line) - len(line.lstrip())
        block = [opening[1]]
        for inner in lines[at + 1 :]:
            if inner.strip() and len(inner) - len(inner.lstrip()) <= indent:
                break
            block.append(inner)
        names = re.findall(r"(\w+)\s*\(", "\n".join(block))
        found.append({name for name in names if not keyword.iskeyword(name)})
    return found


def idle_nogil(text: str) -> list[set[str]]:
    """The `with nogil` blocks around anything else than a call that may sleep."""
    return [c for c in calls_without_gil(text) if not c or c - WITHOUT_GIL]


# ---- the files -----------------------------------------------------------------------


def read(path: Path) -> str:
    if not path.exists():
        pytest.skip(f"{path.relative_to(ROOT)} is not written yet")
    return path.read_text()


def files(directory: Path, *suffixes: str) -> list[Path]:
    found = (p for p in directory.rglob("*") if p.suffix in suffixes)
    return sorted(p for p in found if "__pycache__" not in p.parts)


def label(path: Path) -> str:
    return path.name


every_room = pytest.mark.parametrize("room", ROOMS)
every_module = pytest.mark.parametrize("module", MODULES)
every_c_file = pytest.mark.parametrize("path", files(CSRC, ".c", ".h"), ids=label)
every_cython_file = pytest.mark.parametrize(
    "path", files(PACKAGE, ".pyx", ".pxd"), ids=label
)
every_source = pytest.mark.parametrize(
    "path", files(PACKAGE, ".py", ".pyi", ".pyx", ".pxd"), ids=label
)


def test_every_c_file_has_a_row_and_is_built():
    names = {path.stem for path in files(CSRC, ".c")}
    built = re.findall(r"\bcsrc/(\w+)\.c\b", (ROOT / "CMakeLists.txt").read_text())
    assert names <= set(ROOMS)
    assert set(built) == set(ROOMS)


def test_every_module_has_a_row():
    names = {path.stem for path in files(PACKAGE, ".py", ".pyx", ".pxd")}
    assert names <= set(MODULES)


def test_the_tables_have_no_cycles():
    assert not [room for room in ROOMS if room in below(room)]
    rows = list(MODULES)
    order = {module: at for at, module in enumerate(rows)}
    assert not [(m, i) for m in rows for i in MODULES[m] if order[i] >= order[m]]


@every_room
def test_a_room_calls_only_rooms_below_it(room):
    shared = types(read(CSRC / "prefork.h")) | types(read(CSRC / "internal.h"))
    assert not upward_calls(room, read(CSRC / f"{room}.c"), shared)


@every_room
def test_a_room_s_section_of_internal_h_calls_only_rooms_below_it(room):
    header = read(CSRC / "internal.h")
    shared = types(read(CSRC / "prefork.h")) | types(header)
    assert not upward_calls(room, sections(header).get(room, ""), shared)


def test_every_section_of_internal_h_names_a_room():
    assert set(sections(read(CSRC / "internal.h"))) <= set(ROOMS)


@every_room
def test_a_room_exports_only_names_that_begin_with_its_own(room):
    assert not misnamed(room, read(CSRC / f"{room}.c"))


@every_c_file
def test_the_core_does_not_know_python(path):
    assert not includes_python(path.read_text())


@every_c_file
def test_the_core_never_prints_and_never_exits(path):
    assert not ends_or_prints(path.read_text())


@every_module
def test_a_module_imports_only_modules_below_it(module):
    paths = [PACKAGE / f"{module}{suffix}" for suffix in (".py", ".pyx", ".pxd")]
    found = [path for path in paths if path.exists()]
    for path in found or paths[:1]:
        assert not forbidden_imports(module, read(path), path.suffix), path.name


@every_source
def test_only_the_bridge_names_the_header_of_the_core(path):
    bridge = path.stem == "_core" and path.suffix in (".pyx", ".pxd")
    assert bridge or not names_core_header(path.read_text())


@every_cython_file
def test_nothing_calls_back_into_python(path):
    assert not takes_gil(path.read_text())


@every_cython_file
def test_the_gil_is_released_only_around_calls_that_may_sleep(path):
    assert not idle_nogil(path.read_text())


# ---- the rules catch what breaks them ------------------------------------------------


def test_a_call_upward_is_caught():
    text = "int f(void) { return pf__conn_open(0) + pf__buffer_grow(0); }"
    assert upward_calls("http", text, set()) == {"pf__conn_open"}
    assert upward_calls("loop", text, set()) == set()


def test_a_function_passed_upward_is_caught():
    assert upward_calls("timer", "x = pf_loop_wake;", set()) == {"pf_loop_wake"}


def test_a_type_a_comment_and_a_string_are_not_calls():
    text = '/* pf_loop_wait() */ pf_loop_stats *s = x("pf_loop_wait"); // pf_loop_wait'
    header = "typedef struct pf_loop_stats { int n; } pf_loop_stats;"
    assert upward_calls("buffer", text, types(header)) == set()


def test_an_inline_call_upward_is_caught():
    header = (
        "/* ---- timer.c: a wheel --*/\n"
        "static inline int\nset(void)\n{\n    return pf__conn_open();\n}\n"
        "/* ---- conn.c: one connection --*/\nint pf__conn_open();\n"
    )
    found = sections(header)
    assert set(found) == {"timer", "conn"}
    assert upward_calls("timer", found["timer"], set()) == {"pf__conn_open"}
    assert upward_calls("conn", found["conn"], set()) == set()


def test_a_misnamed_function_is_caught():
    text = """
        #define X(a) \\
            int a(void) { }
        static const struct { int n; } table[] = {{1}};
        static int
        bare(void)
        {
            if (1) { }
            return 0;
        }
        int
        pf__http_parse(void)
        {
            return sizeof(int);
        }
        __attribute__((noinline)) int
        parse_head(struct a { int b; } *p)
        {
            return 0;
        }
    """
    text = text.replace("struct a { int b; } *p", "int (*p)(int)")
    assert misnamed("http", text) == {"parse_head"}
    assert misnamed("loop", text) == {"parse_head", "pf__http_parse"}


@pytest.mark.parametrize("line", ["#include <Python.h>", '#  include "Python.h"'])
def test_an_include_of_python_is_caught(line):
    assert includes_python(f"/* */ int x;\n{line}\n")
    assert not includes_python(f"/* {line} */")


@pytest.mark.parametrize(
    "line",
    ["printf(x);", "fprintf (x);", "exit(1);", "abort();", "_exit(0);", "f(stderr);"],
)
def test_printing_and_exiting_are_caught(line):
    assert ends_or_prints(f"int main(void) {{ {line} }}")


def test_formatting_and_aborting_a_request_are_not_printing_and_exiting():
    text = 'snprintf(b, n, "exit(1)"); pf_request_abort(r); /* abort() */ at_exit(0);'
    assert not ends_or_prints(text)


@pytest.mark.parametrize(
    ("module", "line", "found"),
    [
        ("errors", "import prefork", {"__init__"}),
        ("errors", "from . import _core", {"_core"}),
        ("_core", "from prefork.config import Config", {"config"}),
        ("config", "def f():\n    from .master import Prefork", {"master"}),
        ("master", "import prefork.cli as c", {"cli"}),
        ("native", "from prefork import Server, _core", {"__init__"}),
        ("worker", "if x:\n    from prefork.prefork import Prefork", {"prefork"}),
    ],
)
def test_an_import_upward_is_caught(module, line, found):
    assert forbidden_imports(module, line) == found


def test_an_import_for_annotations_only_is_free():
    text = """
        if typing.TYPE_CHECKING:
            from prefork.prefork import Prefork
        else:
            from prefork import cli
    """
    assert imports(textwrap.dedent(text), ".py") == {"cli"}


def test_an_import_in_cython_is_caught():
    text = """
        # from prefork import log
        cimport cython
        from libc.stdint cimport uint16_t
        from prefork._core cimport (
            Loop,
            Request,
        )
        from prefork cimport _native
        def f():
            import prefork.server
            from .errors import ConfigError
    """
    found = {"_core", "_native", "server", "errors"}
    assert imports(text, ".pyx") == found
    assert forbidden_imports("_core", text, ".pyx") == {"_native", "server"}


def test_only_cli_s_own_entry_point_imports_cli():
    assert [module for module in MODULES if "cli" in MODULES[module]] == ["__main__"]


def test_a_name_of_the_core_s_header_is_caught():
    assert names_core_header('cdef extern from "prefork.h":')
    assert not names_core_header('"""See prefork.h."""\nn = 1  # as in prefork.h')


def test_taking_the_gil_is_caught():
    assert takes_gil("cdef void f() noexcept nogil:\n    with  gil:\n        pass")
    assert not takes_gil('"""with gil"""  # with gil\nwith nogil: pass')


@pytest.mark.parametrize(
    "block",
    [
        "with nogil: pf_request_end(r)",
        "with nogil:\n    pf_loop_wait(l)\n    n = work(l)",
        "with nogil:\n    n += 1",
    ],
)
def test_a_needless_release_of_the_gil_is_caught(block):
    assert idle_nogil(textwrap.indent(block, "    ") + "\n    other()\n")


def test_a_release_of_the_gil_around_a_wait_is_free():
    text = """
        def wait(self):
            with nogil:
                # sleep()
                n = pf_loop_wait(self.loop, &events[0], 64,
                                 timeout)

            return check(n)
    """
    assert calls_without_gil(text) == [{"pf_loop_wait"}]
    assert not idle_nogil(text)
