"""A chat that steers a stream: every line "name: prompt" on standard input is a wish, and the newest wish wins.

    some-chat-reader | python chat_steers.py "a red ball bouncing on grass" --seconds 10

At most one steer every --pause seconds; wishes with a blocked word are ignored.
"""

import argparse
import asyncio
import sys
from collections.abc import Iterator

from livereel import AsyncClient, AsyncStream, LivereelError

BLOCKED = {"blood", "gore"}


async def steer_by_chat(stream: AsyncStream, pause: float) -> None:
    """Steer by the newest line of standard input, until it ends."""
    lines: asyncio.Queue[str] = asyncio.Queue()
    loop = asyncio.get_running_loop()
    reading = loop.run_in_executor(
        None, lambda: [loop.call_soon_threadsafe(lines.put_nowait, each) for each in sys.stdin]
    )
    while not (reading.done() and lines.empty()):
        await asyncio.sleep(0.1)
        wishes = [wish for line in drain(lines) if (wish := wish_of(line))]
        if not wishes:
            continue
        name, prompt = wishes[-1]
        try:
            await stream.steer(prompt)
            print(f"{name} gets: {prompt}", flush=True)
        except LivereelError as error:
            print(f"{name}: {error}", file=sys.stderr)
        await asyncio.sleep(pause)


def drain(lines: "asyncio.Queue[str]") -> Iterator[str]:
    """The lines that have come so far."""
    while not lines.empty():
        yield lines.get_nowait()


def wish_of(line: str) -> tuple[str, str] | None:
    """Who wishes for what; None for a line that is no wish, or has a blocked word."""
    name, _, prompt = (each.strip() for each in line.partition(":"))
    return (name, prompt) if prompt and not BLOCKED & set(prompt.lower().split()) else None


async def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("prompt", help="what the stream begins with")
    parser.add_argument("--pause", type=float, default=5.0, help="seconds between two steers")
    parser.add_argument("--seconds", type=float, help="length of the stream")
    options = parser.parse_args()
    async with AsyncClient() as client, client.stream(options.prompt, duration_s=options.seconds) as stream:
        print(f"{client.url}/overlay/{stream.id}", flush=True)
        chat = asyncio.create_task(steer_by_chat(stream, options.pause))
        async for _ in stream.frames():  # somebody must watch: a stream that nobody watches pauses
            pass
        chat.cancel()


asyncio.run(main())
