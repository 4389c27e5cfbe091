"""Record the moving pictures of the README and of the studio at rest: a stream of `mini` that is steered.

    python -m engine.bench.picture [--out docs/livereel.webp] [--sample clients/web/sample.webp]

Starts `python -m server` on a free loopback port, opens a stream, changes its prompt with `PATCH` while it plays, and
reads its frames from the WebSocket as RGB. Writes an animated WebP in which every frame has the prompt that made it as
a caption, and its first seconds without captions for the studio. Needs what `make serve` needs, and takes about a
minute.
"""

import argparse
import json
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont
from websockets.sync.client import connect

from engine.bench.serve import HEADER_BYTES, call, free_port, wait_ready

PROMPTS = (
    "a striped red cube bouncing on tiles at sunset, orbiting camera",
    "a shiny blue ring spinning on snow under an aurora, orbiting camera",
    "a striped orange ball bouncing on water at night, rising camera",
)
SECONDS = 4.0
"""How long each prompt plays before the next one is sent."""
EXTRA_SECONDS = 1.5
"""How much longer the last one plays: a steer shows at a chunk's boundary, about that long after it was sent."""
MAX_BYTES = 2_000_000
SAMPLE_SECONDS, SAMPLE_QUALITY = 3.0, 60
BACKGROUND, FOREGROUND, FADED = (17, 19, 24), (236, 238, 242), (128, 134, 146)


def record(base: str, prompts: Sequence[str], seconds: float, seed: int) -> tuple[list[tuple[Image.Image, str]], int]:
    """Play one stream under all prompts, `seconds` each.

    Returns its frames, each with the prompt that it was generated under, and the frame rate.
    """
    fields = {"prompt": prompts[0], "seed": seed, "duration_s": seconds * len(prompts) + EXTRA_SECONDS}
    stream = call(base, "POST", "/v1/streams", fields)
    size, path = (stream["width"], stream["height"]), f"/v1/streams/{stream['id']}"
    frames: list[tuple[Image.Image, str]] = []
    sent, shown = 0, prompts[0]
    with ThreadPoolExecutor(1) as steering, connect(stream["ws_url"] + "?format=rgb24", max_size=None) as viewer:
        for message in viewer:
            if isinstance(message, bytes):
                frames.append((Image.frombytes("RGB", size, message[HEADER_BYTES:]), shown))
            elif (event := json.loads(message))["type"] == "prompt.applied":
                shown = event["prompt"]
            if sent + 1 < len(prompts) and len(frames) >= (sent + 1) * seconds * stream["fps"]:
                sent += 1
                steering.submit(call, base, "PATCH", path, {"prompt": prompts[sent]})
    return frames, stream["fps"]


def caption(frame: Image.Image, prompt: str, scale: float) -> Image.Image:
    """The frame, `scale` times as large, above its prompt."""
    width, height = round(frame.width * scale), round(frame.height * scale)
    font = ImageFont.load_default(size=width / 28)
    line = round(width / 20)
    page = Image.new("RGB", (width, height + 3 * line), BACKGROUND)
    page.paste(frame.resize((width, height), Image.Resampling.LANCZOS))
    draw = ImageDraw.Draw(page)
    first, comma, rest = prompt.partition(", ")
    draw.text((line, height + 0.5 * line), first + comma, FOREGROUND, font)
    draw.text((line, height + 1.6 * line), rest, FADED, font)
    return page


def save(pages: Sequence[Image.Image], fps: int, path: Path, quality: int) -> None:
    """Write an animated WebP that loops."""
    # WebP counts in whole milliseconds: durations are differences of rounded times, so the sum stays exact.
    times = [round(1000 * number / fps) for number in range(len(pages) + 1)]
    durations = [after - before for before, after in pairwise(times)]
    pages[0].save(path, save_all=True, append_images=pages[1:], duration=durations, loop=0, quality=quality, method=6)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("docs/livereel.webp"))
    parser.add_argument("--sample", type=Path, default=Path("clients/web/sample.webp"))
    parser.add_argument("--prompt", action="append", help="a prompt to play; repeat it for a steer (three of our own)")
    parser.add_argument("--seconds", type=float, default=SECONDS, help="length of each prompt (%(default)s)")
    parser.add_argument("--seed", type=int, default=7)
    parser.add_argument("--scale", type=float, default=1.25, help="of the model's frames (%(default)s)")
    parser.add_argument("--quality", type=int, default=80, help="of the WebP, 0 to 100 (%(default)s)")
    options = parser.parse_args()
    port = free_port()
    base = f"http://127.0.0.1:{port}"
    server = subprocess.Popen([sys.executable, "-m", "server", "--port", str(port)])
    try:
        wait_ready(base, server, 120)
        frames, fps = record(base, options.prompt or PROMPTS, options.seconds, options.seed)
    finally:
        server.terminate()
        server.wait(timeout=20)
    pages = [caption(frame, prompt, options.scale) for frame, prompt in frames]
    save(pages, fps, options.out, options.quality)
    save([frame for frame, _ in frames[: round(SAMPLE_SECONDS * fps)]], fps, options.sample, SAMPLE_QUALITY)
    print(f"{options.out}: {len(pages)} frames, {pages[0].width}x{pages[0].height}, {options.out.stat().st_size} bytes")
    if options.out.stat().st_size > MAX_BYTES:
        sys.exit(f"that is more than {MAX_BYTES} bytes: lower --quality or --scale")


if __name__ == "__main__":
    main()
