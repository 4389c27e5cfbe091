"""The synchronous client, against the fake server of `livereel.testing` and against the real gateway alike."""

import inspect
import io
import itertools
import threading
from pathlib import Path
from typing import Any

import av
import livereel
import pytest
from livereel import Client, Matte, PromptChange, async_client, client, events
from PIL import Image

from server.auth.keys import add_key


def shown(path: Path) -> int:
    with av.open(str(path)) as film:
        return sum(1 for _ in film.decode(video=0))


def test_a_stream_from_open_to_end(client: Client) -> None:
    with client.stream("a red ball", seed=7) as stream:
        assert (stream.prompt, stream.info.seed, stream.info.model) == ("a red ball", 7, "mini")
        frames = list(itertools.islice(stream.frames(), 5))
        assert [frame.format for frame in frames] == ["mjpeg"] * 5
        times = [frame.pts for frame in frames]
        assert times == sorted(set(times))
        with Image.open(io.BytesIO(frames[0].data)) as picture:
            assert picture.format == "JPEG"
        assert stream.state == "live"
    assert client.attach(stream.id).info.ended_reason == "deleted"


def test_frames_come_until_the_stream_ends(client: Client) -> None:
    with client.stream("a red ball", duration_s=0.5) as stream:
        frames = list(stream.frames("rgb24"))
        assert len(frames) == 8
        assert all(len(frame.data) == frame.width * frame.height * 3 for frame in frames)
        assert stream.state == "ended" and stream.info.ended_reason == "finished"
    assert client.attach(stream.id).info.ended_reason == "finished"  # leaving the block changed nothing


def test_a_steer_is_followed_by_its_event(client: Client) -> None:
    with client.stream("a red ball") as stream:
        seen: list[events.Event] = []
        for item in stream.watch():
            if isinstance(item, events.Event):
                seen.append(item)
            elif not any(isinstance(event, events.PromptApplied) for event in seen):
                if stream.prompt != "a blue cube":
                    changed = stream.steer("a blue cube", transition="cut")
                    assert changed.chunk_index > 0 and stream.prompt == "a blue cube"
            else:
                break
        assert isinstance(seen[0], events.StreamStarted) and seen[0].stream.id == stream.id
        [applied] = [event for event in seen if isinstance(event, events.PromptApplied)]
        assert (applied.prompt, applied.transition) == ("a blue cube", "cut")
        assert applied.chunk_index == changed.chunk_index
        assert any(isinstance(event, events.Chunk) and event.frames > 0 for event in seen)


def test_pause_and_resume(client: Client) -> None:
    with client.stream("a red ball") as stream:
        frames = stream.frames()
        next(frames)
        assert stream.pause().pause_reason == "asked"
        assert stream.refresh().state == "paused"
        assert stream.resume().state == "live"
        assert next(frames).pts > 0


def test_events_end_with_the_stream(client: Client) -> None:
    stream = client.stream("a red ball")
    waiting = stream.events()
    assert isinstance(next(waiting), events.StreamStarted)
    client.attach(stream.id).end()
    last = list(waiting)[-1]
    assert isinstance(last, events.Ended) and last.reason == "deleted" and stream.info.over


def test_scheduled_prompts(client: Client) -> None:
    later = [PromptChange(60, "a green ring"), PromptChange(90.5, "a white cone", "soft")]
    with client.stream("a red ball", prompts=later) as stream:
        assert stream.info.prompts == later
        assert stream.schedule(later[1:]).prompts == later[1:]
        assert stream.schedule([]).prompts == []


def test_mattes(client: Client) -> None:
    with client.stream("a red ball") as stream:
        next(stream.frames())
        matte = Matte("luma", tolerance=0.25)
        assert stream.set_matte(matte).matte == matte
        assert stream.remove_matte().matte is None


def test_tokens(client: Client) -> None:
    with client.stream("a red ball") as stream:
        token = stream.token("control", expires_in_s=60)
        assert (token.stream_id, token.scope) == (stream.id, "control")
        assert "ws://" in token.ws_url and token.ws_url not in repr(token)


def test_recordings(client: Client, tmp_path: Path) -> None:
    with client.stream("a red ball") as stream:
        frames = stream.frames()
        next(frames)
        recording = stream.record()
        assert recording.status == "recording" and recording in stream.recordings()
        for _ in range(6):
            next(frames)
        stopped = client.recordings.stop(recording.id)
        assert (stopped.status, stopped.ended_reason) == ("completed", "stopped")
        assert stopped.id in [each.id for each in client.recordings.list()]
        path = client.recordings.download(recording.id, tmp_path / "take.mp4")
        assert path.stat().st_size == client.recordings.get(recording.id).bytes
        assert list(tmp_path.iterdir()) == [path]
        client.recordings.delete(recording.id)
        with pytest.raises(livereel.NotFound):
            client.recordings.get(recording.id)


def test_outputs(client: Client) -> None:
    with client.stream("a red ball") as stream:
        output = stream.push("rtmp://127.0.0.1:9/app/SECRET")
        assert (output.kind, output.stream_id) == ("rtmp", stream.id) and "SECRET" not in output.url
        assert [each.id for each in stream.outputs()] == [stream.output(output.id).id] == [output.id]
        stream.remove_output(output.id)
        assert stream.outputs() == []
        with pytest.raises(livereel.NotFound):
            stream.output(output.id)


def test_models_loras_and_readiness(client: Client) -> None:
    [model] = client.models.list()
    assert (model.id, model.default) == ("mini", True) and client.models.get("mini") == model
    assert client.readiness().ready
    assert [(lora.id, lora.strength) for lora in client.loras.list()] == [("watercolour", None)]
    assert client.loras.set({"watercolour": 0.5})[0].strength == 0.5
    assert client.loras.set({})[0].strength is None


def test_clips(client: Client, tmp_path: Path) -> None:
    video = client.videos.create("a red ball", seconds=0.5, seed=3, prompts=[PromptChange(0.25, "a blue ball")])
    progress = list(client.videos.progress(video.id))
    assert progress[-1].status == "completed" and progress[-1].progress == 100
    assert video.extra.seed == 3 and video.extra.prompts[1].prompt == "a blue ball"
    path = client.videos.download(video.id, tmp_path / "clip.mp4")
    assert path.read_bytes()[4:8] == b"ftyp"
    again = client.videos.remix(video.id, "a green ball")
    assert again.remixed_from_video_id == video.id and client.videos.wait(again.id).prompt == "a green ball"
    assert [each.id for each in client.videos.list(limit=2).data] == [again.id, video.id]
    page = client.videos.list(limit=1)
    assert page.has_more and client.videos.list(after=page.last_id, limit=1).data[0].id == video.id
    for each in (video, again):
        client.videos.delete(each.id)
    with pytest.raises(livereel.NotFound, match="video"):
        client.videos.get(video.id)


def test_generate(client: Client, tmp_path: Path) -> None:
    video = client.videos.generate("a red ball", tmp_path / "out.mp4", seconds=0.5)
    assert video.status == "completed" and (tmp_path / "out.mp4").stat().st_size > 0


def test_a_generated_film_plays(running: Any, tmp_path: Path) -> None:
    with Client(running.url) as client:
        video = client.videos.generate("a red ball", tmp_path / "out.mp4", seconds=1)
    assert shown(tmp_path / "out.mp4") == video.extra.frames == 16


def test_an_error_has_the_servers_fields(client: Client) -> None:
    with pytest.raises(livereel.InvalidRequest) as caught:
        client.stream("  ")
    error = caught.value
    assert (error.status, error.code, error.param) == (400, "prompt_empty", "prompt")
    assert error.request_id and "`prompt`" in str(error) and error.retry_after is None
    with pytest.raises(livereel.NotFound) as caught_other:
        client.attach("nobody")
    assert caught_other.value.code == "stream_not_found"
    stream = client.stream("a red ball")
    stream.end()
    stream.end()
    with pytest.raises(livereel.Conflict):
        stream.steer("a blue ball")


def test_ids_stay_within_their_path(client: Client) -> None:
    for id in ("../models", "a/b?c#d", "%2e%2e"):
        with pytest.raises(livereel.NotFound):
            client.attach(id)
    for id in ("", ".", ".."):
        with pytest.raises(livereel.LivereelError, match="no id"):
            client.attach(id)


def test_a_picture_to_continue_from(running: Any, tmp_path: Path) -> None:
    (path := tmp_path / "start.png").write_bytes(b"")
    Image.new("RGB", (64, 48), (200, 30, 30)).save(path)
    with Client(running.url) as client:
        for image in (path, str(path), path.read_bytes()):
            client.stream("a red ball", image=image).end()
        with pytest.raises(livereel.InvalidRequest) as caught:
            client.stream("a red ball", image=b"no picture")
        assert caught.value.param == "image"


def test_several_threads_share_a_client(running: Any) -> None:
    with Client(running.url) as client, client.stream("a red ball") as stream:
        steered = threading.Thread(target=lambda: stream.steer("a blue cube"))
        for item in stream.watch():
            if not isinstance(item, events.Event) and steered.ident is None:
                steered.start()
            if isinstance(item, events.PromptApplied):
                break
        steered.join(10)
        assert stream.prompt == "a blue cube"


def test_a_failed_stream_raises(running: Any) -> None:
    with Client(running.url) as client:
        stream = client.stream("a red ball")
        frames = stream.frames()
        next(frames)
        running.call(running.gateway.backend.break_stream, stream.id)
        with pytest.raises(livereel.StreamFailed, match="NaN") as caught:
            list(frames)
        assert caught.value.code == "numeric" and stream.state == "failed"


def test_keys(run_gateway_thread: Any, known_stream: Any, tmp_path: Path) -> None:
    key = add_key(tmp_path / "keys.toml", "studio", "studio", ["control"], 4, 1000)
    with run_gateway_thread(keys=tmp_path / "keys.toml") as running:
        with Client(running.url, api_key=key) as client, client.stream("a red ball") as stream:
            next(stream.frames())
            token = stream.token("view")
            with Client(running.url, api_key=token.token) as guest:
                watched = guest.attach(stream.id)
                next(watched.frames())
                with pytest.raises(livereel.PermissionDenied):
                    watched.steer("a blue ball")
        with Client(running.url, api_key="lr_wrong") as stranger:
            with pytest.raises(livereel.AuthenticationFailed):
                stranger.stream("a red ball")
            with pytest.raises(livereel.AuthenticationFailed):
                next(known_stream(stranger, stream.id).frames())


def test_both_clients_have_the_same_methods_and_signatures() -> None:
    names = ("Client", "Stream", "Videos", "Recordings", "Models", "Loras")
    for name in names:
        one, other = getattr(client, name), getattr(async_client, f"Async{name}")
        for method in {each for each in (*dir(one), *dir(other)) if not each.startswith("_")}:
            first, second = getattr(one, method), getattr(other, method)
            if callable(first):
                assert list(inspect.signature(first).parameters) == list(inspect.signature(second).parameters)
                assert inspect.getdoc(first) == inspect.getdoc(second), method
                assert inspect.getdoc(first), f"{name}.{method} has no documentation"
