"""Clients that come and go cause no fault."""

import asyncio
import random
import time
from typing import Any

import pytest

from server.backends.fake import FakeBackend
from server.bench import churn
from server.bench.clients import Client, Outcomes

pytestmark = pytest.mark.anyio


async def test_clients_churn_without_a_fault(run_gateway: Any) -> None:
    random.seed(4)
    outcomes, streams = Outcomes(), list[dict[str, Any]]()
    async with run_gateway(FakeBackend(width=64, height=48, chunk_seconds=0.3), queue_limit=1) as gateway:
        ends_at = time.monotonic() + 6
        await asyncio.gather(*(churn.run_client(Client(gateway.http, outcomes), streams, ends_at) for _ in range(12)))
    assert not outcomes.faults
    assert outcomes.done["opened"] > 2
    assert outcomes.done["closed"] > 0
    assert outcomes.refused["queue_full"] > 0
    assert outcomes.done["frames"] > 20
