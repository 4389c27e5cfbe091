"""Two hundred clients who open, steer, watch and close, and what that does to the gateway.

    python -m server.bench.churn --clients 200 --minutes 5

A gateway with a pretended engine that has places for some of them; the others are refused, as the API says, or watch
streams of others: over the WebSocket in every format, as JPEGs for an `<img>`, and some over WebRTC. Half leave without
a word. After a first round, which starts what stays, it is counted what the gateway holds, and again in the end. The
exit status is 1 when there was any fault, when the event loop lagged, or when anything was left.
"""

import argparse
import asyncio
import datetime
import os
import random
import sys
import time
from functools import partial
from typing import Any

import httpx

from server.backends.fake import FakeBackend
from server.bench.clients import SOCKETS, Client, Noted
from server.bench.gateway import Gateway, Sample, growth, look, quantile, report, running, settled

LAG_SECONDS = 0.02
"""Bar for the event loop's p99."""
GROWTH_MIB_PER_MINUTE = 1.0
PLACES = 24
"""Streams that the pretended engine takes at once: `CHUNK_SECONDS` is made for it."""
FPS, CHUNK_FRAMES = 16, 12
CHUNK_SECONDS = 0.9 / PLACES * CHUNK_FRAMES / FPS
FORMATS = {"fmp4": 30, "mjpeg": 22, "rgb24": 15, "events": 15, "img": 10, "vp8": 4, "h264": 4}
"""How often each is chosen. A handshake of WebRTC costs the clients' own process more than all the rest."""
ROUND_SECONDS = 20.0


async def live(client: Client, streams: list[dict[str, Any]], ends_at: float) -> None:
    """One client until then: opens a stream or takes another's, watches, steers, closes or just goes."""
    await asyncio.sleep(random.uniform(0, 3))
    while (left := ends_at - time.monotonic()) > 0.5:
        own = await client.open() if random.random() < 0.3 else None
        if own:
            streams.append(own)
        elif not streams:
            await asyncio.sleep(random.uniform(0.5, 1.5))
            continue
        stream = own or random.choice(streams)
        [format] = random.choices(list(FORMATS), list(FORMATS.values()))
        watching = asyncio.create_task(client.watch(stream, format, min(left, random.uniform(0.5, 8))))
        if random.random() < 0.5:
            await asyncio.sleep(random.uniform(0.1, 1))
            await client.steer(stream["id"])
        if own and random.random() < 0.2:
            await client.call("paused", "PATCH", f"/v1/streams/{own['id']}", json={"paused": True})
            await client.call("resumed", "PATCH", f"/v1/streams/{own['id']}", json={"paused": False})
        frames = await watching
        client.noted.done["frames"] += frames
        if own:
            streams.remove(own)
            await client.call("closed", "DELETE", f"/v1/streams/{own['id']}")
        await asyncio.sleep(random.uniform(0, 1))


async def churn(gateway: Gateway, clients: int, seconds: float) -> tuple[Noted, list[Sample]]:
    """All clients at once; returns what they noted, and what the gateway held meanwhile."""
    noted, samples, streams = Noted(), list[Sample](), list[dict[str, Any]]()
    ends_at = time.monotonic() + seconds
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=clients)

    async def sample() -> None:
        while time.monotonic() < ends_at:
            samples.append(await asyncio.to_thread(look, gateway))
            await asyncio.sleep(2)

    async with httpx.AsyncClient(base_url=gateway.base, timeout=30, limits=limits) as http:
        await asyncio.gather(sample(), *(live(Client(http, noted), streams, ends_at) for _ in range(clients)))
        for stream in (await http.get("/v1/streams")).raise_for_status().json()["data"]:
            if stream["state"] not in ("ended", "failed"):
                await http.delete(f"/v1/streams/{stream['id']}")
    return noted, samples


async def measure(options: argparse.Namespace, gateway: Gateway) -> list[tuple[str, object, bool]]:
    """What was found: name, figure, and whether that is as it should be."""
    fresh = await asyncio.to_thread(look, gateway)
    await churn(gateway, options.clients, ROUND_SECONDS)
    before, figures = await settled(gateway, fresh), await asyncio.to_thread(gateway.figures)
    noted, samples = await churn(gateway, options.clients, 60 * options.minutes)
    after, later = await settled(gateway, before), await asyncio.to_thread(gateway.figures)
    lag = [quantile(figures, later, "livereel_event_loop_lag_seconds", share) for share in (0.5, 0.99, 0.999)]
    slope = growth(samples, "resident")
    watching_yet = sum(later[f'livereel_viewers{{format="{format}"}}'] for format in (*SOCKETS, "vp8", "h264"))
    processor = later["process_cpu_seconds_total"] - figures["process_cpu_seconds_total"]
    late = quantile(figures, later, "livereel_frame_late_seconds", 0.99)
    stalls = later["livereel_stalls_total"] - figures["livereel_stalls_total"]
    return [
        ("done", dict(noted.done), True),
        ("refused, as stated", dict(noted.refused), True),
        ("faults", dict(noted.faults), not noted.faults),
        ("event loop lag, s, at most: p50 / p99 / p99.9", lag, lag[1] <= LAG_SECONDS),
        ("frames later than due, s, p99 at most", late, True),
        ("stalls", int(stalls), True),
        ("gateway, processor s a second", round(processor / (60 * options.minutes), 2), True),
        ("viewers left", int(watching_yet), watching_yet == 0),
        (
            "tasks before / most / after",
            [before.tasks, max(s.tasks for s in samples), after.tasks],
            after.tasks <= before.tasks,
        ),
        (
            "descriptors before / most / after",
            [before.descriptors, max(s.descriptors for s in samples), after.descriptors],
            after.descriptors <= before.descriptors,
        ),
        (
            "threads before / most / after",
            [before.threads, max(s.threads for s in samples), after.threads],
            after.threads <= before.threads,
        ),
        (
            "MiB before / most / after",
            [round(x / 2**20) for x in (before.resident, max(s.resident for s in samples), after.resident)],
            True,
        ),
        ("growth in MiB a minute, second half", round(slope, 2), slope < GROWTH_MIB_PER_MINUTE),
    ]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clients", type=int, default=200)
    parser.add_argument("--minutes", type=float, default=5)
    parser.add_argument("--log", action="store_true", help="show the gateway's log")
    options = parser.parse_args()
    print(f"{datetime.date.today()}, {os.cpu_count()} cores, {options.clients} clients for {options.minutes:g} minutes")
    # Small pictures: drawing them is the pretended engine's work, which is in the gateway's process here.
    backend = partial(
        FakeBackend, width=128, height=96, chunk_seconds=CHUNK_SECONDS, fps=FPS, chunk_frames=CHUNK_FRAMES
    )
    with running(backend, silent=not options.log, queue_limit=16) as gateway:
        os.nice(10)  # two hundred clients need a core of their own, and it is not them that are measured
        return report(asyncio.run(measure(options, gateway)))


if __name__ == "__main__":
    sys.exit(main())
