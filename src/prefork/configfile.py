"""TOML files: what is in them, and on which line.

A file holds options at its top, or, if it is a pyproject.toml, in [tool.prefork]. Which
options there are is config's to know.
"""

from __future__ import annotations

import os
import re
import sys
from dataclasses import dataclass
from typing import Any

from prefork.errors import ConfigError

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

NAMES = ("prefork.toml", "pyproject.toml")  # looked for, in this order
TABLE = ("tool", "prefork")  # of a pyproject.toml


@dataclass(frozen=True)
class File:
    """The options that a file holds, unchecked."""

    path: str
    values: dict[str, Any]
    lines: dict[str, int]  # of keys, where that could be found

    def place(self, key: str) -> str:
        """file:line, as an error names it."""
        line = self.lines.get(key)
        return self.path if line is None else f"{self.path}:{line}"


def find(directory: str = ".") -> File | None:
    """The file that is read when none is named: the first of NAMES with options."""
    for name in NAMES:
        path = os.path.normpath(os.path.join(directory, name))
        if not os.path.exists(path):
            continue
        file = read(path)
        if name == "prefork.toml" or file.values:
            return file
    return None


def read(path: str | os.PathLike[str]) -> File:
    """Read a file; ConfigError if it cannot be read or is no TOML."""
    path = os.fspath(path)
    try:
        with open(path, encoding="utf-8") as stream:
            text = stream.read()
    except OSError as error:
        reason = (error.strerror or str(error)).lower()
        raise ConfigError(
            f"config must name a file to read, not {path!r} ({reason})"
        ) from None
    except UnicodeDecodeError:
        raise ConfigError(f"{path} must be UTF-8 text") from None
    try:
        values = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{path} is no valid TOML: {error}") from None
    tables = TABLE if os.path.basename(path) == "pyproject.toml" else ()
    for table in tables:
        values = values.get(table, {})
    return File(path, values, _lines(text, ".".join(tables)))


_HEADING = re.compile(r"\s*\[\s*([^\[\]]*?)\s*\]")
_KEY = re.compile(r"\s*[\"']?([\w-]+)[\"']?\s*=")


def _lines(text: str, table: str) -> dict[str, int]:
    """The line of each key of a table, as far as one line tells."""
    found: dict[str, int] = {}
    here = ""
    for number, line in enumerate(text.splitlines(), 1):
        heading, key = _HEADING.match(line), _KEY.match(line)
        if heading:
            here = re.sub(r"[\s\"']", "", heading[1])
        elif key and here == table:
            found.setdefault(key[1], number)
    return found
