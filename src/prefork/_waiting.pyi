import asyncio
from collections.abc import Coroutine
from typing import Any

class Waiter:
    def __init__(self, loop: asyncio.AbstractEventLoop) -> None: ...

class Stay(Waiter):
    def __init__(
        self, coroutine: Coroutine[Any, Any, Any], loop: asyncio.AbstractEventLoop
    ) -> None: ...
