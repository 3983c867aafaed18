"""What the micro-benchmarks share: the wire, and how a batch is timed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest

ROUNDS = 300


@pytest.fixture
def wire() -> Iterator[Callable[..., Any]]:
    """Opens wires, closed after the test: wire(handler), or wire(app, WsgiDesk)."""
    from wire import Wire

    opened = []

    def open_wire(*handler_and_desk: Callable[..., Any]) -> Wire:
        opened.append(Wire(*handler_and_desk))
        return opened[-1]

    yield open_wire
    for each in opened:
        each.close()


@pytest.fixture
def time_batches(benchmark: Any) -> Callable[..., None]:
    """Times run(*what prepare returns), a batch a round, and notes the cost of one."""

    def time(
        run: Callable[..., object], prepare: Callable[[], object], batch: int
    ) -> None:
        def setup() -> tuple[Any, dict[str, Any]]:
            prepared = prepare()
            return () if prepared is None else (prepared,), {}

        benchmark.pedantic(run, setup=setup, rounds=ROUNDS, warmup_rounds=10)
        if benchmark.stats:
            one = benchmark.stats.stats.median / batch * 1e9
            benchmark.stats.name += f" ({one:,.0f} ns each)"

    return time
