"""An open loop of GETs at a steady rate, and their latencies, from when each was due.

python benchmarks/pace.py PORT RATE SECONDS
"""

from __future__ import annotations

import asyncio
import sys
import time

CONNECTIONS = 64
REQUEST = b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n"


async def send_on_time(
    port: int, first: float, period: float, until: float, latencies: list[float]
) -> None:
    """One kept connection: a request each period, or when the last is answered."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    due = first
    while due < until:
        await asyncio.sleep(max(0.0, due - time.monotonic()))
        writer.write(REQUEST)
        head = await reader.readuntil(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 200 "), head
        await reader.readexactly(13)
        latencies.append(time.monotonic() - due)
        due += period
    writer.close()


async def main(port: int, rate: float, seconds: float) -> None:
    latencies: list[float] = []
    start, period = time.monotonic() + 0.2, CONNECTIONS / rate
    await asyncio.gather(
        *(
            send_on_time(port, start + i / rate, period, start + seconds, latencies)
            for i in range(CONNECTIONS)
        )
    )
    latencies.sort()
    p50, p99 = (latencies[int(len(latencies) * part)] * 1000 for part in (0.5, 0.99))
    print(f"{len(latencies) / seconds:,.0f}/s, p50 {p50:.2f} ms, p99 {p99:.2f} ms")


if __name__ == "__main__":
    asyncio.run(main(int(sys.argv[1]), float(sys.argv[2]), float(sys.argv[3])))
