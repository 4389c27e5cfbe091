"""The fake server for users' tests. What it shares with the real gateway is tried in `test_client.py`."""

import pytest
from livereel import Client, LivereelError, NotFound
from livereel.testing import FakeServer


def test_what_was_sent_can_be_looked_at(fake: FakeServer) -> None:
    with Client(transport=fake.transport) as client, client.stream("a red ball", seed=7) as stream:
        stream.steer("a blue ball", transition="cut")
    opened, steered, ended = fake.requests
    assert (opened.method, opened.path, opened.json) == ("POST", "/v1/streams", {"prompt": "a red ball", "seed": 7})
    assert steered.json == {"prompt": "a blue ball", "transition": "cut"} and ended.method == "DELETE"


def test_time_does_not_pass(fake: FakeServer) -> None:
    with Client(transport=fake.transport) as client:
        with client.stream("a red ball", duration_s=60) as stream:
            assert sum(1 for _ in stream.frames()) == 960
        client.videos.wait(client.videos.create("a red ball").id)
    assert fake.slept


def test_waiting_for_what_never_comes_is_an_error(fake: FakeServer) -> None:
    with Client(transport=fake.transport) as client, client.stream("a red ball") as stream:
        stream.pause()
        with pytest.raises(AssertionError, match="resume"):
            next(stream.frames())
        assert stream.resume().state == "live"


def test_unknown_paths_ids_and_names(fake: FakeServer) -> None:
    with Client(transport=fake.transport) as client, client.stream("a red ball") as stream:
        for call in (
            lambda: client.loras.set({"oil": 1}),
            lambda: client.models.get("wan"),
            lambda: client.recordings.stop("rec_9"),
            lambda: client.videos.remix("video_9", "a blue ball"),
            lambda: stream.output("out_9"),
        ):
            with pytest.raises(NotFound):
                call()
        with pytest.raises(LivereelError):
            stream.record(alpha=True)
