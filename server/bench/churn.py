"""Whether the gateway leaks or lags under churn: two hundred clients that open, steer, watch and close streams.

    python -m server.bench.churn --clients 200 --minutes 5

The gateway's fake engine has capacity for some of the clients. The others are refused, as the API documents, or watch
other clients' streams: over the WebSocket in every format, as MJPEG for an `<img>`, and some over WebRTC. Half
disconnect without closing. The gateway's resources are measured after a first round, which starts everything that stays
(threads, for example), and again at the end. The exit status is 1 if there was any fault, if the event loop lagged, or
if anything leaked.
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
from server.bench.clients import SOCKETS, Client, Outcomes
from server.bench.gateway import (
    Figure,
    Gateway,
    Sample,
    growth,
    leak_figures,
    quantile,
    report,
    running,
    settled_sample,
    take_sample,
)

LAG_SECONDS = 0.02
"""Limit for the event loop's lag, p99."""
GROWTH_MIB_PER_MINUTE = 1.0
CAPACITY = 24
"""Streams that the fake engine can run at once; `CHUNK_SECONDS` follows from it."""
FPS, CHUNK_FRAMES = 16, 12
CHUNK_SECONDS = 0.9 / CAPACITY * CHUNK_FRAMES / FPS
FORMATS = {"fmp4": 30, "mjpeg": 22, "rgb24": 15, "events": 15, "img": 10, "vp8": 4, "h264": 4}
"""Relative frequency of each format. A WebRTC handshake costs the clients' process more than everything else."""
ROUND_SECONDS = 20.0


async def run_client(client: Client, streams: list[dict[str, Any]], ends_at: float) -> None:
    """Until `ends_at`, open a stream or pick another client's, watch it, steer it, and close it."""
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
        client.outcomes.done["frames"] += frames
        if own:
            streams.remove(own)
            await client.close(own)
        await asyncio.sleep(random.uniform(0, 1))


async def run_clients(gateway: Gateway, clients: int, seconds: float) -> tuple[Outcomes, list[Sample]]:
    """Run all clients at once; returns their outcomes, and samples of the gateway taken meanwhile."""
    outcomes, samples, streams = Outcomes(), list[Sample](), list[dict[str, Any]]()
    ends_at = time.monotonic() + seconds
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=clients)

    async def sample() -> None:
        while time.monotonic() < ends_at:
            samples.append(await asyncio.to_thread(take_sample, gateway))
            await asyncio.sleep(2)

    async with httpx.AsyncClient(base_url=gateway.base, timeout=30, limits=limits) as http:
        await asyncio.gather(sample(), *(run_client(Client(http, outcomes), streams, ends_at) for _ in range(clients)))
        for stream in (await http.get("/v1/streams")).raise_for_status().json()["data"]:
            if stream["state"] not in ("ended", "failed"):
                await http.delete(f"/v1/streams/{stream['id']}")
    return outcomes, samples


async def measure(options: argparse.Namespace, gateway: Gateway) -> list[Figure]:
    """Run a first round and the measured one; returns the figures."""
    fresh = await asyncio.to_thread(take_sample, gateway)
    await run_clients(gateway, options.clients, ROUND_SECONDS)
    before, figures = await settled_sample(gateway, fresh), await asyncio.to_thread(gateway.figures)
    outcomes, samples = await run_clients(gateway, options.clients, 60 * options.minutes)
    after, later = await settled_sample(gateway, before), await asyncio.to_thread(gateway.figures)
    lag = [quantile(figures, later, "livereel_event_loop_lag_seconds", share) for share in (0.5, 0.99, 0.999)]
    slope = growth(samples, "resident")
    viewers_left = sum(later[f'livereel_viewers{{format="{format}"}}'] for format in (*SOCKETS, "vp8", "h264"))
    processor = later["process_cpu_seconds_total"] - figures["process_cpu_seconds_total"]
    late = quantile(figures, later, "livereel_frame_late_seconds", 0.99)
    stalls = later["livereel_stalls_total"] - figures["livereel_stalls_total"]
    return [
        ("done", dict(outcomes.done), True),
        ("refused, as stated", dict(outcomes.refused), True),
        ("faults", dict(outcomes.faults), not outcomes.faults),
        ("event loop lag, s, at most: p50 / p99 / p99.9", lag, lag[1] <= LAG_SECONDS),
        ("frames later than due, s, p99 at most", late, True),
        ("stalls", int(stalls), True),
        ("gateway, processor s a second", round(processor / (60 * options.minutes), 2), True),
        ("viewers left", int(viewers_left), viewers_left == 0),
        *leak_figures(before, after, samples),
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
    # Small pictures, because the fake engine draws them in the gateway's process here.
    backend = partial(
        FakeBackend, width=128, height=96, chunk_seconds=CHUNK_SECONDS, fps=FPS, chunk_frames=CHUNK_FRAMES
    )
    with running(backend, silent=not options.log, queue_limit=16) as gateway:
        os.nice(10)  # the clients need a whole core, and the gateway, which is measured, goes first
        return report(asyncio.run(measure(options, gateway)))


if __name__ == "__main__":
    sys.exit(main())
