"""Play one stream for some minutes as a viewer would, against the real server, and print what it kept up with.

    python -m engine.bench.serve --minutes 5 [--clips]

Starts `python -m server` on a free loopback port, opens a stream, reads its WebSocket, samples the memory of both
processes, and stops the server. The real-time factor is generation time over playback time: below 1 the model keeps
up. Playback itself is the reference: frames must arrive at 1:1 by the reader's own clock. With `--clips` there is
always a clip to be made, and the stream must not notice.
"""

import argparse
import json
import os
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path
from typing import Any

from websockets.sync.client import connect

HEADER_BYTES = 16
CLOCK = 90_000


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def call(base: str, method: str, path: str, body: dict[str, Any] | None = None) -> Any:
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(base + path, data, {"content-type": "application/json"}, method=method)
    with urllib.request.urlopen(request, timeout=30) as response:
        text = response.read()
    return json.loads(text) if text else None


def resident(pid: int) -> int:
    """Bytes in RAM of a process and its children."""
    total = 0
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        try:
            stat = (entry / "stat").read_text().rsplit(")", 1)[1].split()
            if int(entry.name) == pid or int(stat[1]) == pid:
                total += int((entry / "statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
        except (OSError, ValueError):
            continue
    return total


def wait_ready(base: str, server: subprocess.Popen[bytes], seconds: float) -> float:
    started = time.monotonic()
    while time.monotonic() - started < seconds:
        if server.poll() is not None:
            raise SystemExit(f"the server left with status {server.returncode}")
        try:
            call(base, "GET", "/readyz")
            return time.monotonic() - started
        except OSError:
            time.sleep(0.1)
    raise SystemExit(f"the server was not ready within {seconds:.0f} s")


def percentile(values: list[float], share: float) -> float:
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, round(share * (len(ordered) - 1)))]


def make_clips(base: str, prompt: str, done: threading.Event) -> float:
    """One clip after the other until the stream is over; returns their length in seconds, as far as they came."""
    made = 0.0
    while not done.is_set():
        id = call(base, "POST", "/v1/videos", {"prompt": prompt, "seconds": "10"})["id"]
        while (clip := call(base, "GET", f"/v1/videos/{id}"))["status"] in ("queued", "in_progress"):
            if done.wait(0.1):
                break
        made += clip["extra"]["frames_recorded"] / clip["extra"]["fps"]
        call(base, "DELETE", f"/v1/videos/{id}")
    return made


def play(base: str, pid: int, minutes: float, prompt: str, *, clips: bool) -> dict[str, Any]:
    warm = call(base, "POST", "/v1/streams", {"prompt": prompt, "duration_s": 2})
    while call(base, "GET", f"/v1/streams/{warm['id']}")["state"] not in ("ended", "failed"):
        time.sleep(0.2)
    opened = time.monotonic()
    stream = call(base, "POST", "/v1/streams", {"prompt": prompt, "seed": 1, "duration_s": minutes * 60})
    arrivals: list[float] = []
    pts: list[int] = []
    chunks: list[dict[str, Any]] = []
    events: dict[str, int] = {}
    memory: list[tuple[float, int]] = []
    done = threading.Event()

    def sample() -> None:
        while not done.wait(5):
            memory.append((time.monotonic() - opened, resident(pid)))

    sampler = threading.Thread(target=sample, daemon=True)
    sampler.start()
    maker = ThreadPoolExecutor(1)
    making = maker.submit(make_clips, base, prompt, done) if clips else None
    with connect(stream["ws_url"] + "?format=mjpeg", max_size=None) as viewer:
        for message in viewer:
            if isinstance(message, bytes):
                arrivals.append(time.monotonic())
                pts.append(int.from_bytes(message[8:HEADER_BYTES], "big"))
            else:
                event = json.loads(message)
                events[event["type"]] = events.get(event["type"], 0) + 1
                if event["type"] == "chunk":
                    chunks.append(event)
    done.set()
    sampler.join()
    final = call(base, "GET", f"/v1/streams/{stream['id']}")
    after_minute = [size for at, size in memory if at > 60] or [size for _, size in memory]
    gaps = [b - a for a, b in pairwise(arrivals)]
    seconds_of_clips = {"clips beside it, s": round(making.result(), 1)} if making else {}
    maker.shutdown()
    generated = sum(chunk["gen_ms"] for chunk in chunks) / 1000
    played = sum(chunk["frames"] for chunk in chunks) / stream["fps"]
    times = [chunk["gen_ms"] for chunk in chunks[3:]] or [0.0]
    return {
        "model": stream["model"],
        "size": f"{stream['width']}x{stream['height']} at {stream['fps']}/s",
        "frames received": len(arrivals),
        "frames expected": round(minutes * 60 * stream["fps"]),
        "first frame after POST, s": round(arrivals[0] - opened, 3),
        "real-time factor": round(generated / played, 3),
        "chunk ms p50 / p95 / p99": [round(percentile(times, share)) for share in (0.5, 0.95, 0.99)],
        "stalls": final["stalls"],
        **seconds_of_clips,
        "wall over media time": round((arrivals[-1] - arrivals[0]) / ((pts[-1] - pts[0]) / CLOCK), 4),
        "frame gap ms p50 / p99 / max": [
            round(1000 * x, 1) for x in (percentile(gaps, 0.5), percentile(gaps, 0.99), max(gaps))
        ],
        "memory MiB at 1 min / end / growth": [
            round(x / 2**20, 1) for x in (after_minute[0], after_minute[-1], after_minute[-1] - after_minute[0])
        ],
        "events": events,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=5.0)
    parser.add_argument("--prompt", default="a red metal cube bouncing on grass at sunset, orbiting camera")
    parser.add_argument("--clips", action="store_true", help="make clips meanwhile")
    options = parser.parse_args()
    port = free_port()
    base = f"http://127.0.0.1:{port}"
    server = subprocess.Popen([sys.executable, "-m", "server", "--port", str(port)])
    try:
        ready = wait_ready(base, server, 120)
        figures = {"ready after, s": round(ready, 1), "cpus": os.cpu_count()}
        figures |= play(base, server.pid, options.minutes, options.prompt, clips=options.clips)
    finally:
        server.terminate()
        server.wait(timeout=20)
    for name, value in figures.items():
        print(f"{name:38s} {value}")


if __name__ == "__main__":
    main()
