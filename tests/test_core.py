"""The bridge by itself: how the core's errors become exceptions."""

from __future__ import annotations

import errno
import os
import re
from pathlib import Path

import pytest

from prefork import _core
from prefork.errors import ClientDisconnected, ProtocolError, RequestError

HEADER = Path(__file__).parent.parent / "csrc" / "prefork.h"
CODES = dict(re.findall(r"\bX\((\w+), (-\d+), \d+, ", HEADER.read_text()))
every_code = pytest.mark.parametrize(
    "code", [-errno.ENOSPC, *map(int, CODES.values())], ids=["ENOSPC", *CODES]
)


def test_an_error_of_the_system_has_its_number_and_its_words():
    error = _core.error(-errno.ENOSPC)
    assert isinstance(error, OSError) and error.errno == errno.ENOSPC
    assert error.strerror == os.strerror(errno.ENOSPC)


@every_code
def test_an_error_tells_why_as_whatever_it_is(code):
    """What a library says of an error is told with it, and changes nothing else."""
    bare, told = _core.error(code), _core.error(code, "record too long")
    assert type(told) is type(bare)
    assert str(told) == f"{bare} (record too long)"
    for name in ("errno", "status"):
        assert getattr(told, name, None) == getattr(bare, name, None)


@every_code
def test_an_error_s_kind_says_who_is_to_blame(code):
    error, status = _core.error(code), _core.error_status(code)
    if isinstance(error, RequestError):
        assert error.status == status > 0
    else:
        assert isinstance(error, (ProtocolError, ClientDisconnected, OSError))
