"""The assembled application: what it imports, and how it shuts down."""

import asyncio
import subprocess
import sys
from typing import Any

import pytest

pytestmark = pytest.mark.anyio


async def test_shutting_down_ends_the_streams_first(run_gateway: Any) -> None:
    async with run_gateway() as gateway:
        stream = await gateway.open()
        watching = asyncio.create_task(gateway.watch(stream))
        await gateway.until(lambda: len(gateway.stream_of(stream).audience.viewers) == 1)
    seen = await watching
    assert seen.of("ended")[0]["reason"] == "shutting_down"
    assert seen.close_code == 1000


def test_the_gateway_never_loads_torch() -> None:
    code = "import server.app, server.__main__, sys; assert not {'torch', 'numpy'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=30)
