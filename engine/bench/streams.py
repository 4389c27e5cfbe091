"""How many live streams does one device keep at playback's pace? Through the scheduler, against the clock.

    python -m engine.bench.streams self-forcing-1.3b --streams 5 --minutes 2

Random weights. Every stream's viewer plays its chunks one after another from the moment the first one arrives; a chunk
is due when the one before it has been played. The engine serves the stream that runs dry first and keeps each at most
one chunk ahead, as it does for the gateway. A chunk that arrives late is a miss; the clock of its stream then starts
anew, as a stalled viewer's does.
"""

import argparse
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median

import torch
from torch import Tensor, nn

from engine.assemble import best_device, best_dtype
from engine.bench.rollout import PROMPT_TOKENS, add_preset, chosen, describe_speed, random_model, random_prompt
from engine.config import Preset
from engine.pipeline import Pipeline
from engine.scheduler import Demand, batch_with, pick
from engine.transforms.apply import Speed, accelerate
from engine.transforms.calibrate import calibrate
from engine.warmup import warm
from engine.worker import RECENT_STEPS

START = 10.0
"""All streams open in the same instant: what is late by then is of the opening, and told apart."""


class NoWords:
    """Prompts are not read: their encoding is no part of a chunk."""

    def encode(self, text: str, length: int) -> list[int]:
        return [0] * length


class RandomText(nn.Module):
    """Encodes every prompt to the same noise."""

    def __init__(self, preset: Preset, device: torch.device) -> None:
        super().__init__()
        self.text = random_prompt(preset, PROMPT_TOKENS, 1, device, torch.float32)

    def forward(self, ids: Tensor) -> Tensor:
        return self.text


@dataclass
class Played:
    """What the viewer of one stream saw."""

    arrivals: list[tuple[float, float]]
    """Of each chunk but the first: when, in seconds from the start of all, and its slack; below 0 it came late."""
    runs_dry: float = 0.0
    """When what has arrived will have been played."""


def play(
    pipeline: Pipeline,
    streams: int,
    seconds: float,
    clock: Callable[[], float],
    rest: Callable[[float], None],
    batch: int = 1,
) -> list[Played]:
    """Serve `streams` streams for `seconds` of `clock`, up to `batch` at once; `rest` waits while all of them are a
    chunk ahead."""
    length = pipeline.preset.chunk_frames / pipeline.preset.fps
    states = [pipeline.open("", seed=index) for index in range(streams)]
    seen = [Played([]) for _ in states]
    start = clock()
    end = start + seconds
    steps: deque[float] = deque(maxlen=RECENT_STEPS)
    while (now := clock()) < end:
        demands = {
            str(i): Demand(
                state.chunk,
                state.chunk + (shown.runs_dry - now <= length),
                shown.runs_dry,
                opened=None if shown.runs_dry else start,
            )
            for i, (state, shown) in enumerate(zip(states, seen, strict=True))
        }
        step_seconds = max(steps, default=0.0)
        name = pick(demands, now, step_seconds)
        if name is None:
            rest(min(shown.runs_dry for shown in seen) - now - length)
            continue
        kind = pipeline.kind(states[int(name)])
        alike = [str(i) for i, state in enumerate(states) if pipeline.kind(state) == kind]
        served = [int(each) for each in (name, *batch_with(demands, name, alike, now, step_seconds, batch))]
        together = [states[i] for i in served]
        for i, chunk in zip(served, pipeline.next_chunks(together), strict=True):
            if isinstance(chunk, Exception):
                raise chunk
            arrived, shown = clock(), seen[i]
            if shown.runs_dry:
                shown.arrivals.append((arrived - start, shown.runs_dry - arrived))
            shown.runs_dry = max(shown.runs_dry, arrived) + len(chunk.frames) / pipeline.preset.fps
        pipeline.commit(*together)
        steps.append((clock() - now) / len(served))
    for state in states:
        pipeline.close(state)
    return seen


def build(preset: Preset, speed: Speed, device: torch.device, dtype: torch.dtype) -> Pipeline:
    wan, decoder = random_model(preset, "light", device, dtype)
    pipeline = Pipeline(preset, NoWords(), RandomText(preset, device), accelerate(wan, decoder, preset, speed))
    if speed.fixed_scales:
        calibrate(pipeline.served, preset, [pipeline.encode_prompt("")])
    return pipeline


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_preset(parser)
    parser.add_argument("--streams", type=int, nargs="+", required=True, help="one or more numbers to try")
    parser.add_argument("--minutes", type=float, default=2.0)
    parser.add_argument("--batch", type=int, default=1, help="of so many streams at once, if that is faster")
    options = parser.parse_args()
    device = best_device()
    preset, speed = chosen(parser, options, device)
    pipeline = build(preset, speed, device, best_dtype(device))
    warmup = warm(pipeline, max(options.streams), options.batch)
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    print(f"{preset.name} on {where}, window {preset.window} ({preset.sink} sink), {len(preset.steps)} steps")
    print(describe_speed(preset, speed))
    length = preset.chunk_frames / preset.fps
    print(f"a chunk of {1e3 * length:.0f} ms takes {1e3 * warmup.chunk_seconds:.0f} ms; {warmup.batch} at once")
    for count in options.streams:
        seen = play(pipeline, count, 60 * options.minutes, time.monotonic, time.sleep, warmup.batch)
        arrivals = [arrival for shown in seen for arrival in shown.arrivals]
        slack = sorted(value for _, value in arrivals)
        late = [at for at, value in arrivals if value < 0]
        print(
            f"{count} streams: {len(late)} of {len(slack)} chunks late, {sum(at > START for at in late)} of them after "
            f"the first {START:.0f} s; slack ms: least {1e3 * slack[0]:.0f}, "
            f"1st percentile {1e3 * slack[len(slack) // 100]:.0f}, median {1e3 * median(slack):.0f}",
            flush=True,
        )


if __name__ == "__main__":
    main()
