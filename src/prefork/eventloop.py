"""The event loop that async handlers and ASGI apps run on: which one, and for how long.

This is the only place that knows uvloop.
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Callable, Coroutine
from importlib.util import find_spec
from typing import Any

from prefork.errors import ConfigError

Factory = Callable[[], asyncio.AbstractEventLoop]


def check(name: str) -> None:
    """Raise ConfigError if there is no loop of this name here."""
    if name == "uvloop" and find_spec("uvloop") is None:
        raise ConfigError(
            "loop must be asyncio or auto, not 'uvloop', which is not installed: "
            "pip install uvloop"
        )


def factory_of(name: str) -> Factory:
    """What makes the loop of this name: "asyncio", "uvloop", or "auto".

    auto is uvloop where it is installed.
    """
    if name == "asyncio" or find_spec("uvloop") is None:
        return asyncio.new_event_loop
    import uvloop

    found: Factory = uvloop.new_event_loop
    return found


def run(main: Coroutine[Any, Any, None], factory: Factory) -> None:
    """Run it on a loop of its own; whatever is left of it is cancelled at the end."""
    if sys.version_info >= (3, 11):
        with asyncio.Runner(loop_factory=factory) as runner:
            runner.run(main)
    else:
        _run(main, factory())


def _run(main: Coroutine[Any, Any, None], loop: asyncio.AbstractEventLoop) -> None:
    """What Python 3.10 does in asyncio.run(), which takes no factory."""
    asyncio.set_event_loop(loop)
    try:
        loop.run_until_complete(main)
    finally:
        try:
            loop.run_until_complete(_cancel_all(asyncio.all_tasks(loop)))
            loop.run_until_complete(loop.shutdown_asyncgens())
            loop.run_until_complete(loop.shutdown_default_executor())
        finally:
            asyncio.set_event_loop(None)
            loop.close()


async def _cancel_all(tasks: set[asyncio.Task[Any]]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
