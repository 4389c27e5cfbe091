"""`Player`: shows frames at their time, announces what happens with them, and tells its stream."""

import asyncio
import contextvars
import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import pytest

from engine import wire
from server.media.frames import PictureEncoder
from server.media.viewer import Viewer
from server.metrics import Metrics
from server.streams.audience import Audience
from server.streams.playback import Playback
from server.streams.player import Player, PromptChange
from server.streams.session import Session
from server.tracing import Chunks, Tracing

pytestmark = pytest.mark.anyio
FPS = 48


@dataclass
class Listener:
    """Notes what the player tells, and ends the session as a stream would."""

    session: Session
    heard: list[str] = field(default_factory=list)
    over: asyncio.Event = field(default_factory=asyncio.Event)

    def on_first_packet(self) -> None:
        if self.session.time_to_first_frame_s is None:
            self.session.time_to_first_frame_s = 0.5
            self.heard.append("first packet")

    def on_first_shown(self) -> None:
        self.heard.append("first shown")

    def on_idle(self) -> None:
        pass

    def on_finished(self) -> None:
        self._end("finished")

    def on_player_error(self) -> None:
        self._end("error")

    def _end(self, what: str) -> None:
        self.heard.append(what)
        self.session.admit(0.0)
        self.session.end(what, 0.0)
        self.over.set()


@dataclass
class Stage:
    player: Player
    audience: Audience
    listener: Listener
    viewer: Viewer

    def chunk(self, index: int, frames: int) -> None:
        message = wire.Frames("st_1", index, self.player.playback.received * 1875, frames, 8, 8, 0.01)
        self.player.add(message, frames, bytes(frames * 8 * 8 * 3))

    async def play(self) -> list[dict[str, Any]]:
        """Play to the end; returns the events that the viewer got, frames as their times."""
        self.player.start(contextvars.copy_context())
        async with asyncio.timeout(10):
            await self.listener.over.wait()
            await self.player.stopped()
        self.viewer.finish(1000)
        items = []
        while (item := await self.viewer.next()) is not None:
            items.append(json.loads(item) if isinstance(item, str) else {"type": "frame"})
        return items


@pytest.fixture
def stage() -> Iterator[Stage]:
    metrics = Metrics()
    session = Session(id="st_1", model="mini", prompt="a", seed=1, duration_s=None, created_at=0.0, fps=FPS)
    playback = Playback(fps=FPS, chunk_frames=12, first_chunk_frames=9)
    listener = Listener(session)
    with ThreadPoolExecutor(1) as executor:
        audience = Audience(PictureEncoder(executor, metrics), 500, metrics, on_demand=lambda: None, now=0.0)
        viewer = Viewer("rgb24")
        audience.add(viewer)
        chunks = Chunks(Tracing(), session.id)
        yield Stage(Player(session, playback, audience, chunks, metrics, listener), audience, listener, viewer)


async def test_every_frame_is_shown_and_then_the_stream_finishes(stage: Stage) -> None:
    stage.chunk(0, 6)
    stage.player.playback.finish()
    began = asyncio.get_running_loop().time()
    items = await stage.play()
    assert asyncio.get_running_loop().time() - began >= 6 / FPS
    assert items == [{"type": "frame"}] * 6

    assert sorted(stage.listener.heard) == ["finished", "first packet", "first shown"]
    assert stage.audience.on_screen is not None
    assert stage.audience.on_screen.index == 5


async def test_a_prompt_change_is_announced_right_before_its_frame(stage: Stage) -> None:
    stage.chunk(0, 4)
    stage.player.announce(2, PromptChange("b", "cut", 0.0, 1))
    stage.player.playback.finish()
    items = await stage.play()
    assert [item["type"] for item in items] == ["frame", "frame", "prompt.applied", "frame", "frame"]
    assert (items[2]["prompt"], items[2]["transition"], items[2]["chunk_index"]) == ("b", "cut", 1)


async def test_a_stall_begins_and_ends_with_events(stage: Stage) -> None:
    stage.chunk(0, 2)
    playing = asyncio.create_task(stage.play())
    async with asyncio.timeout(5):
        while not stage.player.playback.stalls:
            await asyncio.sleep(0.005)
    stage.chunk(1, 2)
    stage.player.playback.finish()
    stage.player.wake()
    items = await playing
    assert [item.get("phase", "frame") for item in items] == ["frame", "frame", "began", "ended", "frame", "frame"]


async def test_a_paused_player_shows_nothing_until_it_resumes(stage: Stage) -> None:
    stage.chunk(0, 3)
    stage.player.playback.finish()
    stage.player.pause()
    playing = asyncio.create_task(stage.play())
    await asyncio.sleep(0.1)
    assert stage.player.playback.shown == 0
    stage.player.resume()
    assert len(await playing) == 3


async def test_a_player_that_fails_tells_its_stream(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    async def fail(*_: Any) -> None:
        raise RuntimeError("no")

    monkeypatch.setattr(stage.audience, "show", fail)
    stage.chunk(0, 2)
    await stage.play()
    assert "error" in stage.listener.heard


async def test_a_player_that_is_stopped_drops_its_frames(stage: Stage) -> None:
    stage.chunk(0, 9)
    stage.player.start(contextvars.copy_context())
    await asyncio.sleep(0)
    stage.player.stop()
    async with asyncio.timeout(1):
        await stage.player.stopped()
    assert not stage.player._frames
