"""Helper processes that run sandboxed: no secrets, no inherited descriptors, no project imports."""

import asyncio
import os
import sys
from pathlib import Path


async def start(program: Path, *arguments: str) -> asyncio.subprocess.Process:
    """Run a Python file that imports nothing from this project, connected by its standard input and output.

    It inherits no other file descriptor, no working directory, and of the environment (which holds secrets) only
    `LD_LIBRARY_PATH`. Its standard error is discarded. Raises OSError.
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
