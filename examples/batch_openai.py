"""A batch of clips through OpenAI's own client: /v1/videos is its API. One prompt per line on standard input.

pip install openai
python batch_openai.py --seconds 4 --folder clips < prompts.txt
"""

import argparse
import asyncio
import os
import sys
from pathlib import Path

from openai import AsyncOpenAI


async def make(client: AsyncOpenAI, prompt: str, seconds: str, path: Path) -> None:
    """One clip, from prompt to file."""
    video = await client.videos.create(prompt=prompt, seconds=seconds)  # type: ignore[arg-type]  # any number, here
    while video.status in ("queued", "in_progress"):
        await asyncio.sleep(0.25)
        video = await client.videos.retrieve(video.id)
    if video.error:
        print(f"{prompt}: {video.error.message}", file=sys.stderr)
        return
    (await client.videos.download_content(video.id)).write_to_file(path)
    print(path, flush=True)


async def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", default="4")
    parser.add_argument("--folder", type=Path, default=Path("clips"))
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    url = os.environ.get("LIVEREEL_URL", "http://127.0.0.1:8000")
    key = os.environ.get("LIVEREEL_API_KEY", "unused")  # the server may have no keys, but the client wants one
    prompts = [line.strip() for line in sys.stdin if line.strip()]
    async with AsyncOpenAI(base_url=f"{url}/v1", api_key=key) as client, asyncio.TaskGroup() as group:
        for number, prompt in enumerate(prompts, 1):
            group.create_task(make(client, prompt, options.seconds, options.folder / f"{number:03d}.mp4"))


asyncio.run(main())
