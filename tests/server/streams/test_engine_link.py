"""`EngineLink`: who hears what of the engine, and what is sent to it."""

from typing import Any

import pytest

from engine import wire
from server.backends.base import EngineEvent, EngineLost
from server.backends.fake import FakeBackend
from server.metrics import Metrics
from server.streams.engine_link import EngineLink

pytestmark = pytest.mark.anyio


class Listener:
    """Notes what it hears."""

    def __init__(self, heard: list[Any]) -> None:
        self._heard = heard

    def on_ready(self, ready: wire.Ready) -> None:
        self._heard.append(ready)

    def on_lost(self, lost: EngineLost) -> None:
        self._heard.append(lost)


async def started(backend: FakeBackend, heard: list[Any]) -> EngineLink:
    link = EngineLink(backend, Metrics())
    link.listen(Listener(heard))
    await link.start()
    assert await link.came_up()
    return link


async def test_a_stream_gets_its_own_messages_until_it_is_closed() -> None:
    backend, heard = FakeBackend(width=8, height=8), []
    link = await started(backend, heard)
    assert [type(each) for each in heard] == [wire.Ready]
    assert list(link.models) == ["mini"]
    got: dict[str, list[EngineEvent]] = {"a": [], "b": []}
    for name, messages in got.items():
        link.open(wire.Open(name, "mini", "a", 1), lambda message, _, messages=messages: messages.append(message))
    link.send(wire.Steer("a", 7, "b", "cut"))
    assert got == {"a": [wire.Steered("a", 7, 0)], "b": []}
    link.close("a")
    assert not link.is_open("a")
    assert len(got["a"]) == 1, "the engine's answer to `Close` goes to nobody"
    link.send(wire.Steer("a", 8, "c", "cut"))
    link.close("a")
    assert [type(message) for message in backend.sent] == [wire.Open, wire.Open, wire.Steer, wire.Close]
    backend.break_stream("b")
    assert [type(each) for each in got["b"]] == [wire.Fault]
    assert not link.is_open("b")
    await link.stop()


async def test_listeners_hear_of_a_loss_before_streams_do() -> None:
    backend, heard = FakeBackend(width=8, height=8, restart_after=0.01), []
    link = await started(backend, heard)
    link.open(wire.Open("a", "mini", "a", 1), lambda message, _: heard.append(("a", message)))
    backend.crash("gone")
    assert heard[1:] == [EngineLost("gone", True), ("a", EngineLost("gone", True))]
    assert not link.is_open("a")
    assert link.failure == ""
    await link.stop()


async def test_an_engine_that_is_given_up_is_a_failure_that_listeners_hear_alone() -> None:
    backend, heard = FakeBackend(width=8, height=8, restarts_left=0), []
    link = await started(backend, heard)
    link.open(wire.Open("a", "mini", "a", 1), lambda message, _: heard.append(("a", message)))
    backend.crash("gone")
    assert heard[1:] == [EngineLost("gone", False)]
    assert link.failure == "gone"
    assert not await link.came_up()
    await link.stop()
