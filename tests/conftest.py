"""Fixtures of the tests over sockets."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any

import pytest
from live import Live, descriptors
from runs import mode, start  # noqa: F401 (fixtures)

from prefork.eventloop import factory_of

Serve = Callable[..., Live]

# libuv keeps a pipe for signals, from its first loop to the end of the process.
factory_of("auto")().close()


@pytest.fixture
def serve() -> Iterator[Serve]:
    """serve(app, **options): a Live; in the end nothing of it is left."""
    before = descriptors()
    with ExitStack() as stack:

        def start(app: Any, *args: Any, **options: Any) -> Live:
            return stack.enter_context(Live(app, *args, **options))

        yield start
    if descriptors() != before:
        gc.collect()  # a failed test's traceback may have held some
    assert descriptors() == before
