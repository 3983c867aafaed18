"""The event loop that async handlers and ASGI apps run on: which one, and for how long.

This is the only place that knows uvloop.
"""

from __future__ import annotations

import asyncio
import math
import selectors
import sys
from collections.abc import Callable, Coroutine
from importlib.util import find_spec
from typing import Any

from prefork.errors import ConfigError

Factory = Callable[[], asyncio.AbstractEventLoop]

SELECTOR = "prefork_selector"  # an attribute of loops that have one


class CoreSelector(selectors.BaseSelector):
    """What an asyncio loop waits in: the core's own wait, and all else inside of it.

    Once attached, select() is a turn of the core, which handles what has come before it
    returns. The files of others (self-pipe, databases) are in a selector whose one fd
    the core watches.
    """

    def __init__(self) -> None:
        self.others = selectors.EpollSelector()
        self.turn: Callable[[int], object] | None = None
        self.others_ready = False

    def attach(
        self, turn: Callable[[int], object], watch: Callable[[int, Any], object]
    ) -> None:
        """turn(timeout_ms) waits from now on; watch(fd, callback) lets it watch one."""
        self.turn = turn
        watch(self.others.fileno(), self.on_others)

    def detach(self, unwatch: Callable[[int], object]) -> None:
        """The core is not there any more."""
        self.turn = None
        unwatch(self.others.fileno())

    def on_others(self) -> None:
        self.others_ready = True

    def select(self, timeout: float | None = None) -> list[Any]:
        if self.turn is None:
            return self.others.select(timeout)
        if timeout is None:
            self.turn(-1)
        else:
            self.turn(math.ceil(timeout * 1000) if timeout > 0 else 0)
        if not self.others_ready:
            return []
        self.others_ready = False
        return self.others.select(0)

    def register(self, fileobj: Any, events: int, data: Any = None) -> Any:
        return self.others.register(fileobj, events, data)

    def unregister(self, fileobj: Any) -> Any:
        return self.others.unregister(fileobj)

    def modify(self, fileobj: Any, events: int, data: Any = None) -> Any:
        return self.others.modify(fileobj, events, data)

    def get_map(self) -> Any:
        return self.others.get_map()

    def get_key(self, fileobj: Any) -> Any:
        return self.others.get_key(fileobj)

    def close(self) -> None:
        self.others.close()


def core_loop() -> asyncio.AbstractEventLoop:
    """asyncio's own loop, with a selector that the core can be attached to."""
    selector = CoreSelector()
    loop = asyncio.SelectorEventLoop(selector)
    setattr(loop, SELECTOR, selector)
    return loop


def core_selector_of(loop: asyncio.AbstractEventLoop) -> CoreSelector | None:
    """That selector; None of any other loop, which watches the core's fd instead."""
    return getattr(loop, SELECTOR, None)


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
        return core_loop
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
