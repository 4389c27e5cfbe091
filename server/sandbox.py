"""Programs of ours that run apart from the gateway, and are trusted with nothing that is the gateway's."""

import asyncio
import os
import sys
from pathlib import Path


async def start(program: Path, *arguments: str) -> asyncio.subprocess.Process:
    """Run a Python file of ours that imports nothing of ours, spoken to by its standard input and output.

    It inherits no other descriptor, no working directory, and of our environment, secrets included, only where the
    system's libraries are. What it says on standard error goes nowhere. Raises OSError.
    """
    environment = {name: os.environ[name] for name in ("LD_LIBRARY_PATH",) if name in os.environ}
    return await asyncio.create_subprocess_exec(
        sys.executable,
        "-I",
        str(program),
        *arguments,
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.DEVNULL,
        env=environment,
        cwd="/",
        start_new_session=True,
    )
