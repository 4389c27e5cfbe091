"""Events: every type that the server sends has a class with exactly its fields."""

import ast
import dataclasses
from pathlib import Path
from typing import Any

import pytest
from livereel import Client, StreamFailed, events
from livereel.events import KINDS, Event, parse_event

from server.backends.fake import FakeBackend

ROOT = Path(__file__).parents[3]
BASE = {"type", "seq", "ts"}


def own_fields(kind: type[Event]) -> set[str]:
    return {field.name for field in dataclasses.fields(kind)} - BASE - {"fields"}


def types_that_the_server_sends() -> set[str]:
    """The first argument of every call that makes an event, and the two that `Stream.attach` writes itself."""
    found: set[str] = {"stream.started"}
    for path in (ROOT / "server").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.args:
                first = node.args[0]
                if node.func.attr in ("event", "publish", "_publish") and isinstance(first, ast.Constant):
                    found.add(first.value)
    return found


def test_every_type_has_a_class() -> None:
    assert types_that_the_server_sends() == set(KINDS)


def test_unknown_types_are_kept() -> None:
    event = parse_event({"type": "sound", "seq": 3, "ts": 1.5, "loud": True})
    assert type(event) is Event and (event.type, event.seq, event.fields["loud"]) == ("sound", 3, True)


def test_fields_are_those_of_real_events(run_gateway_thread: Any) -> None:
    """A stream that is steered, stalls, changes quality, loses its engine and fails."""
    backend = FakeBackend(width=64, height=48, chunk_seconds=0.02)
    seen: dict[str, Event] = {}
    with run_gateway_thread(backend) as running, Client(running.url) as client:
        stream = client.stream("a red ball")
        steps = iter(
            [
                ("chunk", lambda: stream.steer("a blue ball")),
                ("prompt.applied", lambda: running.call(backend.crash)),
                ("engine.restarted", lambda: setattr(backend, "extra_seconds", 1.5)),
                ("stall", stream.pause),
                ("state", lambda: running.call(backend.break_stream, stream.id)),
            ]
        )
        awaited, action = next(steps)

        def play() -> None:
            nonlocal awaited, action
            for item in stream.watch():
                if isinstance(item, Event):
                    seen[item.type] = item
                    if item.type == awaited and not (awaited == "state" and stream.state != "paused"):
                        action()
                        awaited, action = next(steps, ("", lambda: None))

        with pytest.raises(StreamFailed):
            play()
    assert {"stream.started", "chunk", "prompt.applied", "engine.restarted", "stall", "error", "ended"} <= set(seen)
    for type, event in seen.items():
        sent = set(event.fields) - BASE - {"stream_id"}
        assert sent <= own_fields(KINDS[type]), type
        needed = {name for name in own_fields(KINDS[type]) if getattr(event, name) is not None}
        assert needed <= sent, type
    assert isinstance(seen["ended"], events.Ended) and seen["ended"].reason == "failed"
