"""Plot the real-time factor of a stream: the time that each chunk took over the time that it plays. Below 1 keeps up.

python real_time_factor.py "a red ball bouncing on grass" --seconds 20 -o factor.svg
"""

import argparse
from pathlib import Path

from livereel import Client, events

WIDTH, HEIGHT, MARGIN = 640, 240, 30


def svg(factors: list[float]) -> str:
    """A line chart with a mark at 1."""
    top = max(1.2, *factors)
    step = (WIDTH - 2 * MARGIN) / max(1, len(factors) - 1)

    def height(factor: float) -> float:
        return HEIGHT - MARGIN - factor / top * (HEIGHT - 2 * MARGIN)

    points = " ".join(f"{MARGIN + k * step:.1f},{height(factor):.1f}" for k, factor in enumerate(factors))
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" font-size="12">'
        f'<line x1="{MARGIN}" x2="{WIDTH - MARGIN}" y1="{height(1):.1f}" y2="{height(1):.1f}" stroke="red"/>'
        f'<text x="{MARGIN}" y="{height(1) - 4:.1f}">1: as fast as it plays</text>'
        f'<polyline points="{points}" fill="none" stroke="black"/>'
        f'<text x="{MARGIN}" y="{HEIGHT - 8}">{len(factors)} chunks</text></svg>'
    )


parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("prompt")
parser.add_argument("--seconds", type=float, default=20)
parser.add_argument("-o", "--output", type=Path, default=Path("factor.svg"))
options = parser.parse_args()

factors: list[float] = []
with Client() as client, client.stream(options.prompt, duration_s=options.seconds) as stream:
    for item in stream.watch():
        if isinstance(item, events.Chunk) and stream.info.fps:
            factors.append(item.gen_ms / 1e3 * stream.info.fps / item.frames)
options.output.write_text(svg(factors))
print(f"{len(factors)} chunks, mean factor {sum(factors) / len(factors):.2f}: {options.output}")
