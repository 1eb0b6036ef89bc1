"""A real S3 server on loopback, and a proxy before it that makes the way there long and narrow.

The proxy is a process of its own. What a client sends reaches the server a delay later, and the way there and the way
back carry a given number of bits a second each, which all connections share. So a request takes one round trip more; many
requests at once wait together, and a long body waits once, as on a connection whose window has grown. A new connection
takes one round trip more, too, unless only requests are to be slow. There are no losses and no TLS.

It counts round trips: what a client sends after it was sent something is a new one. Each request of HTTP/1.1 is one.
"""
from __future__ import annotations

import asyncio
import contextlib
import multiprocessing
import shutil
import socket
import subprocess
import time
from collections import deque
from pathlib import Path
from typing import Any, Iterator

from .measure import KIB, MIB, fail

PIECE = 256 * KIB
ACCESS, SECRET = "bench", "bench-secret"


@contextlib.contextmanager
def s3_server(directory: Path) -> Iterator[int]:
    """The port of versitygw, with an empty bucket `bucket` that is kept in a directory until the end."""
    data, port = directory / "s3", free_port()
    (data / "bucket").mkdir(parents=True)
    server = subprocess.Popen(["versitygw", "--access", ACCESS, "--secret", SECRET, "--port", f"127.0.0.1:{port}",
                               "--quiet", "posix", str(data)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        wait_for_port(port)
        yield port
    finally:
        server.kill()
        server.wait()
        shutil.rmtree(data)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def wait_for_port(port: int) -> None:
    for _ in range(100):
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port)):
            return
        time.sleep(0.05)
    fail(f"nothing listens on port {port}")


class Narrow:
    """One direction of the way, shared by all connections: who sends must wait until there is room."""

    def __init__(self, bits_per_second: float) -> None:
        self.rate, self.free_at = bits_per_second / 8, 0.0

    async def carry(self, length: int) -> None:
        if not self.rate:
            return
        now = time.monotonic()
        self.free_at = max(self.free_at, now) + length / self.rate
        # A timer is no finer than a millisecond, so less than two are owed instead.
        if self.free_at - now > 0.002:
            await asyncio.sleep(self.free_at - now)


class Proxy:
    def __init__(self, upstream: int, delay: float, bits_per_second: float, connecting: bool, counts: Any) -> None:
        self.upstream, self.delay, self.counts = upstream, delay, counts
        self.handshake = delay if connecting else 0
        self.up, self.down = Narrow(bits_per_second), Narrow(bits_per_second)
        # What is on its way: twice what fits on it, so that the sender is never the limit.
        self.room = max(MIB, int(2 * delay * (bits_per_second / 8 or GIGABYTE)))

    async def serve(self, port: int) -> None:
        server = await asyncio.start_server(self.connect, "127.0.0.1", port, limit=PIECE)
        await server.serve_forever()

    async def connect(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await asyncio.sleep(self.handshake)
        server, to_server = await asyncio.open_connection("127.0.0.1", self.upstream, limit=PIECE)
        turn = [True]  # whether the next bytes of the client begin a round trip
        await asyncio.gather(self.send(reader, to_server, turn), self.answer(server, writer, turn))

    async def send(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, turn: list[bool]) -> None:
        """From the client to the server, so much later."""
        late: deque[tuple[float, bytes]] = deque()
        changed, held = asyncio.Condition(), 0

        async def receive() -> None:
            nonlocal held
            while True:
                data = b""
                with contextlib.suppress(OSError):
                    data = await reader.read(PIECE)
                if data and turn[0]:
                    turn[0] = False
                    self.counts[0] += 1
                await self.up.carry(len(data))
                async with changed:
                    await changed.wait_for(lambda: held < self.room)
                    late.append((time.monotonic() + self.delay, data))
                    held += len(data)
                    changed.notify_all()
                if not data:
                    return

        receiver = asyncio.ensure_future(receive())
        with contextlib.suppress(OSError):
            while True:
                async with changed:
                    await changed.wait_for(lambda: bool(late))
                    due, data = late.popleft()
                    held -= len(data)
                    changed.notify_all()
                if (wait := due - time.monotonic()) > 0:
                    await asyncio.sleep(wait)
                if not data:
                    break
                self.counts[1] += len(data)
                writer.write(data)
                await writer.drain()
        receiver.cancel()
        writer.close()

    async def answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, turn: list[bool]) -> None:
        with contextlib.suppress(OSError):
            while data := await reader.read(PIECE):
                turn[0] = True
                self.counts[2] += len(data)
                await self.down.carry(len(data))
                writer.write(data)
                await writer.drain()
        writer.close()


GIGABYTE = 1_000_000_000


class Way:
    """A port that leads to another by a long and narrow way, and what went along it."""

    def __init__(self, port: int, counts: Any) -> None:
        self.port, self.counts = port, counts

    def reset(self) -> None:
        self.counts[:] = [0, 0, 0]

    @property
    def round_trips(self) -> int:
        return int(self.counts[0])

    @property
    def sent_bytes(self) -> int:
        return int(self.counts[1])

    @property
    def received_bytes(self) -> int:
        return int(self.counts[2])


@contextlib.contextmanager
def slow_way(upstream: int, delay: float, bits_per_second: float = 0, connecting: bool = True) -> Iterator[Way]:
    """A delay in seconds for each round trip, that of connecting too or not; no limit to the bits if they are 0."""
    context = multiprocessing.get_context("fork")
    counts, port = context.Array("q", 3, lock=False), free_port()

    def run() -> None:
        asyncio.run(Proxy(upstream, delay, bits_per_second, connecting, counts).serve(port))

    process = context.Process(target=run, daemon=True)
    process.start()
    try:
        wait_for_port(port)
        way = Way(port, counts)
        way.reset()
        yield way
    finally:
        process.kill()
        process.join()
