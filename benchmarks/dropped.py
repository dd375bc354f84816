"""Does a server forget the streams that are dropped? Connections are broken off at random points; what is left counts.

A `declaim serve` of its own is asked by --clients at a time, as mp3, pcm and SSE over HTTP and by both WebSockets.
Each stream is dropped before its first byte, somewhere in it, or right after its end; half of the drops close the
connection, half reset it. After --warm-up streams, which set up what later ones find, and after every further hundred,
the server is left alone until it is idle, and its memory, threads and file handles are noted.

What must hold: no block, stream, window, connection or request is left; threads and handles are as many as after the
warm-up, but for pools. What is alive of its memory, malloc's blocks and Python's, is no more than 3 MB and 1 % above
what it was after the warm-up, the whole of the KV cache counted from the start. Resident memory may rise by --growth
MB, for what malloc keeps, and by what the KV cache takes: a page of it is resident from when it is first written.

    python benchmarks/dropped.py [--streams 500] [--clients 16] [--vocoder ray|inline] [--growth 12]
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import struct
import tempfile
import time
from asyncio.trsock import TransportSocket
from collections import Counter
from dataclasses import asdict, dataclass
from socket import SO_LINGER, SOL_SOCKET

import aiohttp
import machine
import psutil
from own_server import gauges, left_over, own_server
from texts import text_of_length

QUESTION = "Streams dropped at random points: what is left of them"
KINDS = ("mp3", "pcm", "sse", "live", "deepgram")
POINTS = ("before", "within", "after")
STREAMS_PER_ROUND = 100
MOST_WAIT_S = 0.4  # before a drop that comes before the first byte
SETTLE_S = 20.0
# Pools that grow with the crowd they once had and stay so: worker threads, connections to the database.
SLACK = {"threads": 4, "handles": 16}
MEMORY_GB = "0.43"  # for a small KV cache
HEAP_GROWTH_MB, PYTHON_GROWTH = 3.0, 0.01  # of what is alive: caches of a bounded size that still fill


@dataclass(frozen=True, slots=True)
class Drop:
    """One stream and its end. wait_s: before a drop of point "before". num_bytes: read before one "within"."""

    kind: str
    point: str
    text: str
    wait_s: float
    num_bytes: int
    is_reset: bool

    @classmethod
    def draw(cls, rng: random.Random) -> Drop:
        return cls(
            kind=rng.choice(KINDS),
            point=rng.choice(POINTS),
            text=text_of_length(rng.choice((8, 25, 50)), skip=rng.randrange(20)),
            wait_s=rng.uniform(0.0, MOST_WAIT_S),
            num_bytes=rng.randrange(1, 20_000),
            is_reset=rng.random() < 0.5,
        )


@dataclass(frozen=True, slots=True)
class Left:
    """The idle server. heap_mb: what malloc has handed out. python_blocks: of Python's own heap. left: what is not at
    nothing and should be. cache_mb: the KV cache, written or not."""

    num_streams: int
    rss_mb: float
    heap_mb: float
    cache_mb: float
    python_blocks: float
    threads: int
    handles: int
    left: dict[str, float]


async def ask(url: str, drop: Drop) -> str:
    """One stream over a connection of its own, and its drop. Returns what became of it."""
    connector = aiohttp.TCPConnector(force_close=True)
    async with aiohttp.ClientSession(connector=connector) as session:
        try:
            if drop.kind in ("live", "deepgram"):
                return await _by_socket(session, url, drop)
            return await _by_http(session, url, drop)
        except aiohttp.ClientError as error:
            return type(error).__name__


async def _by_http(session: aiohttp.ClientSession, url: str, drop: Drop) -> str:
    body = {
        "model": "tts-1",
        "voice": "alloy",
        "input": drop.text,
        "response_format": "pcm" if drop.kind == "sse" else drop.kind,
        "stream_format": "sse" if drop.kind == "sse" else "audio",
    }
    post = asyncio.ensure_future(session.post(url + "/v1/audio/speech", json=body))
    if drop.point == "before":
        done, _ = await asyncio.wait({post}, timeout=drop.wait_s)
        if not done:
            post.cancel()  # closes its connection
            await asyncio.wait({post})
            return "before"
    answer = await post
    try:
        if answer.status != 200:
            return f"http {answer.status}"
        num_bytes = 0
        async for piece in answer.content.iter_any():
            num_bytes += len(piece)
            if drop.point != "after" and num_bytes >= drop.num_bytes:
                break
        end = "after" if answer.content.at_eof() else "within"
        if drop.is_reset and answer.connection is not None and answer.connection.transport is not None:
            _reset(answer.connection.transport.get_extra_info("socket"))
        return end
    finally:
        answer.close()


async def _by_socket(session: aiohttp.ClientSession, url: str, drop: Drop) -> str:
    is_live = drop.kind == "live"
    path = "/v1/audio/speech/stream" if is_live else "/v1/speak?encoding=linear16"
    socket = await session.ws_connect(url + path)
    if is_live:
        await socket.send_json({"type": "session.config", "response_format": "pcm", "stream_audio": True})
        messages = [{"type": "input.text", "text": drop.text}, {"type": "input.done"}]
    else:
        messages = [{"type": "Speak", "text": drop.text}, {"type": "Flush"}]
    for message in messages:
        await socket.send_json(message)
    end = await _listen(socket, drop)
    if drop.is_reset:
        _reset(socket.get_extra_info("socket"))
        return end  # its session is closed next, and the connection with it
    await socket.close()
    return end


def _reset(transport_socket: TransportSocket) -> None:
    """Make closing the connection reset it."""
    transport_socket.setsockopt(SOL_SOCKET, SO_LINGER, struct.pack("ii", 1, 0))


async def _listen(socket: aiohttp.ClientWebSocketResponse, drop: Drop) -> str:
    """Read up to the point of the drop."""
    if drop.point == "before":
        await asyncio.sleep(drop.wait_s)
        return "before"
    num_bytes = 0
    async for message in socket:
        if message.type is aiohttp.WSMsgType.BINARY:
            num_bytes += len(message.data)
            if drop.point == "within" and num_bytes >= drop.num_bytes:
                return "within"
        elif message.type is aiohttp.WSMsgType.TEXT and json.loads(message.data)["type"] in ("session.done", "Flushed"):
            return "after"
    return f"closed {socket.close_code}"


async def settle(session: aiohttp.ClientSession, url: str, process: psutil.Process, *, num_streams: int) -> Left:
    """The server once nothing runs and no connection but ours is open."""
    left = await left_over(session, url)
    until_s = time.monotonic() + SETTLE_S
    while time.monotonic() < until_s:
        if sum(connection.status == "ESTABLISHED" for connection in process.net_connections("tcp")) <= 1:
            break
        await asyncio.sleep(0.2)
    told = await gauges(session, url)
    return Left(
        num_streams,
        rss_mb=process.memory_info().rss / 1e6,
        heap_mb=told["declaim_heap_used_bytes"] / 1e6,
        cache_mb=told["declaim_kv_cache_bytes"] / 1e6,
        python_blocks=told["declaim_python_blocks"],
        threads=process.num_threads(),
        handles=process.num_fds(),
        left=left,
    )


async def run(arguments: argparse.Namespace, url: str, process: psutil.Process) -> tuple[list[Left], Counter[str]]:
    """What is left after the warm-up and after each round; how the streams ended."""
    rng = random.Random(arguments.seed)
    ends: Counter[str] = Counter()
    left: list[Left] = []
    places = asyncio.Semaphore(arguments.clients)

    async def one(drop: Drop) -> None:
        async with places:
            ends[f"{drop.kind} {await ask(url, drop)}"] += 1

    async with aiohttp.ClientSession() as session:
        num_streams = 0
        while num_streams < arguments.streams + arguments.warm_up:
            most = STREAMS_PER_ROUND if left else arguments.warm_up
            count = min(most, arguments.streams + arguments.warm_up - num_streams)
            await asyncio.gather(*(one(Drop.draw(rng)) for _ in range(count)))
            num_streams += count
            left.append(await settle(session, url, process, num_streams=num_streams))
            machine.CONSOLE.print(f"{left[-1]}", soft_wrap=True)
    return left, ends


def faults_of(left: list[Left], *, most_growth_mb: float) -> list[str]:
    """What is wrong: the end against the end of the warm-up."""
    begin, end = left[0], left[-1]
    faults = [f"{name} is left: {value:g}" for name, value in end.left.items()]
    for name, slack in SLACK.items():
        if getattr(end, name) > getattr(begin, name) + slack:
            faults.append(f"{name}: {getattr(begin, name)} after the warm-up, {getattr(end, name)} at the end")
    if end.rss_mb - begin.rss_mb > most_growth_mb + end.cache_mb:
        faults.append(f"resident memory grew by {end.rss_mb - begin.rss_mb:.1f} MB")
    if end.heap_mb - begin.heap_mb > HEAP_GROWTH_MB:
        faults.append(f"what malloc has handed out grew by {end.heap_mb - begin.heap_mb:.1f} MB")
    if end.python_blocks > (1 + PYTHON_GROWTH) * begin.python_blocks:
        faults.append(f"Python held {begin.python_blocks:.0f} blocks and holds {end.python_blocks:.0f}")
    return faults


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--streams", type=int, default=500)
    parser.add_argument("--warm-up", type=int, default=300, help="streams dropped before these")
    parser.add_argument("--clients", type=int, default=16)
    parser.add_argument("--vocoder", choices=("ray", "inline"), default="ray")
    parser.add_argument("--growth", type=float, default=12.0, help="MB of resident memory beside the cache")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    document = machine.begin(QUESTION, vars(arguments))
    with tempfile.TemporaryDirectory(prefix="declaim-dropped-") as folder:
        options = ["--vocoder", arguments.vocoder, "--no-auth", "--database-url", f"sqlite:///{folder}/declaim.db"]
        with own_server("dropped", [*options, "--memory-gb", MEMORY_GB]) as (url, process):
            left, ends = asyncio.run(run(arguments, url, process))
    faults = faults_of(left, most_growth_mb=arguments.growth)
    machine.print_table(
        "the idle server",
        ["after streams", "RSS MB", "malloc MB", "Python blocks", "threads", "handles"],
        [[str(at.num_streams), at.rss_mb, at.heap_mb, at.python_blocks, at.threads, at.handles] for at in left],
    )
    machine.print_table("how streams ended", ["end", "streams"], sorted(ends.items()))
    verdict = "; ".join(faults) or "nothing is left"
    machine.CONSOLE.print(verdict, soft_wrap=True)
    machine.end(document, {"left": [asdict(moment) for moment in left], "ends": dict(ends), "faults": faults})
    if faults:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
