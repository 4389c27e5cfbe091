"""Clips over HTTP: made, read while they are made, kept and deleted."""

import asyncio
import io
import json
import stat
from pathlib import Path
from typing import Any

import av
import httpx
import pytest
from PIL import Image, ImageChops, ImageStat

from engine import wire
from server.auth import keys
from server.backends.fake import FakeBackend

pytestmark = pytest.mark.anyio


def small(**settings: Any) -> FakeBackend:
    return FakeBackend(**{"width": 64, "height": 48, "chunk_seconds": 0.02, **settings})


async def create(gateway: Any, **fields: Any) -> dict[str, Any]:
    response = await gateway.http.post("/v1/videos", json={"prompt": "a red ball", "seconds": "1", **fields})
    assert response.status_code == 200, response.text
    return dict(response.json())


async def done(gateway: Any, video: dict[str, Any]) -> dict[str, Any]:
    async with asyncio.timeout(10):
        while (found := (await gateway.http.get(f"/v1/videos/{video['id']}")).json())["status"] not in OVER:
            await asyncio.sleep(0.01)
    return dict(found)


OVER = ("completed", "failed")


async def film(gateway: Any, video: dict[str, Any]) -> bytes:
    response = await gateway.http.get(f"/v1/videos/{video['id']}/content")
    assert (response.status_code, response.headers["content-type"]) == (200, "video/mp4")
    return bytes(response.content)


def frames(data: bytes) -> list[av.VideoFrame]:
    with av.open(io.BytesIO(data)) as container:
        return list(container.decode(container.streams.video[0]))


def made_of(backend: FakeBackend, prompt: str, seed: int, index: int) -> Image.Image:
    """What the pretended engine draws."""
    opened = wire.Open("x", "mini", prompt, seed)
    stream = type("Drawn", (), {"opened": opened, "prompt": prompt})
    return Image.frombytes("RGB", (backend.width, backend.height), backend._picture(stream, index))


def gap(one: Image.Image, other: Image.Image) -> float:
    return sum(ImageStat.Stat(ImageChops.difference(one, other)).mean) / 3


async def test_every_frame_is_in_the_file(run_gateway: Any) -> None:
    backend = small(width=132, height=98)  # rows that need padding
    async with run_gateway(backend) as gateway:
        video = await create(gateway, seconds="2.5", size="132x98", extra={"seed": 7})
        assert set(video) == {
            *("id", "object", "model", "status", "progress", "created_at", "completed_at", "expires_at", "prompt"),
            *("size", "seconds", "remixed_from_video_id", "error", "extra"),
        }
        assert (video["object"], video["size"], video["seconds"]) == ("video", "132x98", "2.5")
        assert video["status"] in ("queued", "in_progress")
        finished = await done(gateway, video)
        assert (finished["status"], finished["progress"]) == ("completed", 100)
        assert finished["expires_at"] == pytest.approx(finished["completed_at"] + 24 * 3600, abs=1)
        data = await film(gateway, video)
        with av.open(io.BytesIO(data)) as container:
            stream = container.streams.video[0]
            assert (stream.codec_context.name, stream.average_rate) == ("h264", 16)
            assert container.duration == pytest.approx(2.5e6, abs=1)
            shown = list(container.decode(stream))
            assert [frame.pts for frame in shown] == [5625 * k for k in range(40)]
            assert {frame.duration for frame in shown} == {5625}
            assert [k for k, frame in enumerate(shown) if frame.key_frame] == [0, 32]
            container.seek(round(2.2 * 90000), stream=stream)
            assert next(container.decode(stream)).pts == 32 * 5625
        for index in range(40):
            assert gap(shown[index].to_image(), made_of(backend, "a red ball", 7, index)) < 5
        still = await gateway.http.get(f"/v1/videos/{video['id']}/content?variant=thumbnail")
        assert still.headers["content-type"] == "image/webp"
        assert gap(Image.open(io.BytesIO(still.content)).convert("RGB"), shown[0].to_image()) < 5


async def test_ranges_of_a_complete_clip(run_gateway: Any) -> None:
    async with run_gateway() as gateway:
        video = await create(gateway)
        await done(gateway, video)
        data = await film(gateway, video)
        path = f"/v1/videos/{video['id']}/content"
        part = await gateway.http.get(path, headers={"range": "bytes=100-199"})
        assert (part.status_code, part.content) == (206, data[100:200])
        assert part.headers["content-range"] == f"bytes 100-199/{len(data)}"
        past = await gateway.http.get(path, headers={"range": f"bytes={len(data)}-"})
        assert past.status_code == 416


async def test_a_clip_is_read_while_it_is_made(run_gateway: Any) -> None:
    async with run_gateway(small(chunk_seconds=0.15)) as gateway:
        video = await create(gateway, seconds="4")
        data, first = b"", None
        await gateway.until(lambda: gateway.streams.clips.get(video["id"]).status == "in_progress")
        async with gateway.http.stream("GET", f"/v1/videos/{video['id']}/content") as response:
            assert (response.status_code, response.headers.get("content-length")) == (200, None)
            async for part in response.aiter_bytes():
                data += part
                if first is None and b"mdat" in data:
                    first = (await gateway.http.get(f"/v1/videos/{video['id']}")).json()
                    assert len(frames(data)) >= 16, "a player has something to show"
        assert first is not None and first["status"] == "in_progress" and 0 < first["progress"] < 60
        assert (await done(gateway, video))["status"] == "completed"
        assert len(frames(data)) == 64
        whole = await film(gateway, video)
        assert len(whole) == len(data)
        assert [frame.pts for frame in frames(whole)] == [frame.pts for frame in frames(data)]


async def test_prompts_change_where_they_should(run_gateway: Any) -> None:
    backend = small()
    async with run_gateway(backend) as gateway:
        prompts = [{"at_s": 0.5, "prompt": "b"}, {"at_s": 1.5, "prompt": "c", "transition": "cut"}]
        video = await create(gateway, seconds="3", extra={"seed": 1, "prompts": prompts})
        finished = await done(gateway, video)
        assert [each["prompt"] for each in finished["extra"]["prompts"]] == ["a red ball", "b", "c"]
        shown = frames(await film(gateway, video))
        # Chunks begin at frames 0, 9, 21, 33: the changes at 8 and 24 take effect at 9 and 21.
        expected = ["a red ball"] * 9 + ["b"] * 12 + ["c"] * 27
        for index, prompt in enumerate(expected):
            assert gap(shown[index].to_image(), made_of(backend, prompt, 1, index)) < 6, index


async def test_a_remix_is_the_same_clip_but_for_the_prompt(run_gateway: Any) -> None:
    backend = small()
    async with run_gateway(backend) as gateway:
        video = await create(gateway, seconds="2", extra={"seed": 5, "prompts": [{"at_s": 0.5, "prompt": "b"}]})
        path = f"/v1/videos/{video['id']}/remix"
        early = await gateway.http.post(path, json={"prompt": "x"})
        assert (early.status_code, early.json()["error"]["code"]) == (409, "video_not_completed")
        await done(gateway, video)
        whole = (await gateway.http.post(path, json={"prompt": "x"})).json()
        late = (await gateway.http.post(path, json={"prompt": "y", "extra": {"at_s": 1.5}})).json()
        assert whole["remixed_from_video_id"] == late["remixed_from_video_id"] == video["id"]
        assert (whole["prompt"], whole["seconds"], whole["extra"]["seed"]) == ("x", "2", 5)
        assert [each["prompt"] for each in whole["extra"]["prompts"]] == ["x"]
        assert [each["prompt"] for each in late["extra"]["prompts"]] == ["a red ball", "b", "y"]
        for remixed in (whole, late):
            assert (await done(gateway, remixed))["status"] == "completed"
        shown = frames(await film(gateway, late))
        for index, prompt in enumerate(["a red ball"] * 9 + ["b"] * 12 + ["y"] * 11):
            assert gap(shown[index].to_image(), made_of(backend, prompt, 5, index)) < 6, index
        refused = await gateway.http.post(path, json={"prompt": "y", "extra": {"at_s": 2.0}})
        assert (refused.status_code, refused.json()["error"]["param"]) == (400, "extra")


async def test_a_clip_starts_from_a_picture_and_so_does_its_remix(run_gateway: Any) -> None:
    async with run_gateway() as gateway:
        Image.new("RGB", (64, 48), (200, 10, 10)).save(out := io.BytesIO(), "PNG")
        response = await gateway.http.post(
            "/v1/videos",
            data={"prompt": "a", "seconds": "1", "extra[seed]": "9"},
            files={"input_reference": ("a.png", out.getvalue(), "image/png")},
        )
        assert response.status_code == 200, response.text
        video = response.json()
        assert video["extra"]["seed"] == 9
        await done(gateway, video)
        remixed = (await gateway.http.post(f"/v1/videos/{video['id']}/remix", json={"prompt": "b"})).json()
        await done(gateway, remixed)
        opened = [message for message in gateway.backend.sent if isinstance(message, wire.Open)]
        assert [len(each.picture) for each in opened] == [64 * 48 * 3] * 2
        assert opened[0].picture == opened[1].picture
        assert {each.background for each in opened} == {True}


async def test_the_list_comes_in_pages(run_gateway: Any) -> None:
    async with run_gateway() as gateway:
        ids = [(await create(gateway, seconds="0.5"))["id"] for _ in range(5)]
        get = gateway.http.get
        page = (await get("/v1/videos?limit=2")).json()
        assert ([each["id"] for each in page["data"]], page["has_more"]) == (ids[:2:-1], True)
        assert (page["object"], page["first_id"], page["last_id"]) == ("list", ids[4], ids[3])
        page = (await get(f"/v1/videos?limit=3&after={ids[3]}")).json()
        assert ([each["id"] for each in page["data"]], page["has_more"]) == (ids[2::-1], False)
        page = (await get("/v1/videos?order=asc")).json()
        assert [each["id"] for each in page["data"]] == ids
        for query in ("limit=0", "limit=101", "limit=x", "order=up", "after=video_none"):
            response = await get(f"/v1/videos?{query}")
            error = response.json()["error"]
            assert (response.status_code, error["param"]) == (400, query.partition("=")[0]), query
            assert "must be" in error["message"]


BAD: list[tuple[dict[str, Any], str, str]] = [
    ({}, "missing_field", "prompt"),
    ({"prompt": " "}, "prompt_empty", "prompt"),
    *(
        ({"prompt": "a", "seconds": seconds}, "invalid_value", "seconds")
        for seconds in (0, 601, 2.5, True, "0", "-1", "601", "nan", "1e2", "", "\uff14", None)
    ),
    ({"prompt": "a", "size": "1280x720"}, "invalid_value", "size"),
    ({"prompt": "a", "model": "sora-2"}, "model_not_found", "model"),
    ({"prompt": "a", "path": "/etc"}, "unknown_field", "path"),
    ({"prompt": "a", "input_reference": "http://x/a.png"}, "invalid_image", "input_reference"),
    ({"prompt": "a", "input_reference": {"image_url": "file:///etc/passwd"}}, "invalid_image", "input_reference"),
    ({"prompt": "a", "input_reference": {"file_id": "x"}}, "invalid_value", "input_reference"),
    ({"prompt": "a", "extra": {"seed": -1}}, "invalid_value", "extra"),
    ({"prompt": "a", "extra": {"prompts": [{"at_s": 1}]}}, "invalid_value", "extra"),
    ({"prompt": "a", "extra": {"prompts": [{"at_s": 4, "prompt": "b"}]}}, "invalid_value", "extra"),
    ({"prompt": "a", "extra": {"prompts": [{"at_s": 1, "prompt": "b"}] * 2}}, "at_s_order", "extra"),
    ({"prompt": "a", "extra": {"prompts": [{"at_s": 1, "prompt": "b"}] * 33}}, "invalid_value", "extra"),
]


async def test_bad_input_names_the_field_and_the_fix(run_gateway: Any) -> None:
    async with run_gateway() as gateway:
        for fields, code, param in BAD:
            response = await gateway.http.post("/v1/videos", json=fields)
            error = response.json()["error"]
            assert (error["code"], error["param"]) == (code, param), (fields, error)
            assert response.status_code == (404 if code == "model_not_found" else 400)
            assert f"`{param}`" in error["message"]
        assert (await gateway.http.get("/v1/videos")).json()["data"] == []
        for path in ("/v1/videos/video_x", "/v1/videos/..%2F..%2Fetc", "/v1/videos/video_x/content"):
            response = await gateway.http.get(path)
            assert response.status_code == 404
        video = await create(gateway)
        await done(gateway, video)
        response = await gateway.http.get(f"/v1/videos/{video['id']}/content?variant=spritesheet")
        assert (response.status_code, response.json()["error"]["param"]) == (400, "variant")


async def test_a_live_stream_goes_first(run_gateway: Any) -> None:
    """Two clips keep the engine busy, and the stream plays as if they were not there."""
    async with run_gateway(small(chunk_seconds=0.3, fps=24)) as gateway:
        videos = [await create(gateway, seconds="6") for _ in range(2)]
        stream = await gateway.open(duration_s=3)
        assert stream["state"] == "starting", "a clip takes nobody's place"
        await gateway.watch(stream)
        record = await gateway.get(stream)
        assert (record["frames_shown"], record["stalls"]) == (72, 0)
        shown = [(await gateway.http.get(f"/v1/videos/{video['id']}")).json() for video in videos]
        assert shown[0]["progress"] > 0, "it gets what the stream leaves"
        assert [each["extra"]["queue_position"] for each in shown] == [None, 1]
        for video in videos:
            await gateway.http.delete(f"/v1/videos/{video['id']}")


async def test_the_queue_of_clips_is_bounded(run_gateway: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("server.library.clip_maker.MAX_QUEUED", 2)
    async with run_gateway(small(chunk_seconds=0.5)) as gateway:
        for _ in range(3):
            await create(gateway)
        response = await gateway.http.post("/v1/videos", json={"prompt": "a"})
        assert (response.status_code, response.json()["error"]["code"]) == (429, "queue_full")
        assert int(response.headers["retry-after"]) > 0
        assert (await gateway.open())["state"] == "starting"


async def test_delete(run_gateway: Any, tmp_path: Path) -> None:
    data = tmp_path / "data"
    async with run_gateway(small(chunk_seconds=0.1), data=data) as gateway:
        queued, running = await create(gateway, seconds="60"), await create(gateway, seconds="1")
        queued, running = running, queued
        await gateway.until(lambda: gateway.streams.clips.get(running["id"]).recorded > 0)
        for video in (queued, running):
            response = await gateway.http.delete(f"/v1/videos/{video['id']}")
            assert response.json() == {"id": video["id"], "object": "video.deleted", "deleted": True}
            assert (await gateway.http.delete(f"/v1/videos/{video['id']}")).status_code == 404
        assert [path.name for path in data.iterdir()] == ["lock"]
        assert isinstance(gateway.backend.sent[-1], wire.Close)
        # And the engine is free for the next one.
        assert (await done(gateway, await create(gateway)))["status"] == "completed"


async def test_who_reads_a_clip_that_is_given_up_is_cut_off(run_gateway: Any) -> None:
    async with run_gateway(small(chunk_seconds=0.05)) as gateway:
        video = await create(gateway, seconds="60")
        await gateway.until(lambda: gateway.streams.clips.get(video["id"]).recorded > 30)

        async def read() -> None:
            async with gateway.http.stream("GET", f"/v1/videos/{video['id']}/content") as response:
                async for _ in response.aiter_bytes():
                    pass

        reading = asyncio.create_task(read())
        await asyncio.sleep(0.2)
        await gateway.http.delete(f"/v1/videos/{video['id']}")
        with pytest.raises(httpx.ReadError):
            await reading


async def test_the_data_folder_is_private_and_survives(run_gateway: Any, tmp_path: Path) -> None:
    data = tmp_path / "data"
    async with run_gateway(data=data) as gateway:
        video = await create(gateway)
        await done(gateway, video)
        before = await film(gateway, video)
        assert stat.S_IMODE(data.stat().st_mode) == 0o700
        assert {stat.S_IMODE(path.stat().st_mode) for path in data.iterdir()} == {0o600}
        unfinished = await create(gateway, seconds="600")
    (data / "video_orphan.mp4").write_bytes(b"x")
    (data / "video_damaged.json").write_bytes(b"{")
    async with run_gateway(data=data) as gateway:
        assert (await done(gateway, video))["status"] == "completed"
        assert await film(gateway, video) == before
        assert not (data / "video_orphan.mp4").exists()
        failed = await done(gateway, unfinished)
        assert (failed["status"], failed["error"]["code"]) == ("failed", "shutting_down")
        assert failed["extra"]["retryable"] is True
        assert len((await gateway.http.get("/v1/videos")).json()["data"]) == 2
        response = await gateway.http.get(f"/v1/videos/{unfinished['id']}/content")
        assert (response.status_code, response.json()["error"]["code"]) == (409, "video_failed")


async def test_a_server_that_was_killed_says_so(run_gateway: Any, tmp_path: Path) -> None:
    data = tmp_path / "data"
    async with run_gateway(small(chunk_seconds=0.5), data=data) as gateway:
        video = await create(gateway)
        record = json.loads((data / f"{video['id']}.json").read_text())
    (data / f"{video['id']}.json").write_text(json.dumps({**record, "status": "in_progress"}))
    async with run_gateway(data=data) as gateway:
        failed = await done(gateway, video)
        assert (failed["status"], failed["error"]["code"]) == ("failed", "server_restarted")


async def test_what_is_old_goes(run_gateway: Any, tmp_path: Path) -> None:
    async with run_gateway(data=tmp_path / "data", keep_hours=0.5 / 3600) as gateway:
        video = await create(gateway)

        async def gone() -> bool:
            return (await gateway.http.get(f"/v1/videos/{video['id']}")).status_code == 404

        await gateway.until(gone)
        assert [path.name for path in (tmp_path / "data").iterdir()] == ["lock"]


async def test_what_is_full_takes_nothing_more(run_gateway: Any, tmp_path: Path) -> None:
    async with run_gateway(data=tmp_path / "data", data_limit_gb=20e-6) as gateway:
        video = await create(gateway, seconds="600")
        failed = await done(gateway, video)
        assert (failed["status"], failed["error"]["code"]) == ("failed", "storage_full")
        (tmp_path / "data" / "big").write_bytes(bytes(30_000))
        await gateway.until(lambda: gateway.streams._store.full)
        response = await gateway.http.post("/v1/videos", json={"prompt": "a"})
        assert (response.status_code, response.json()["error"]["code"]) == (507, "storage_full")


@pytest.mark.parametrize("losses", [1, 2])
async def test_a_clip_survives_one_engine(run_gateway: Any, losses: int) -> None:
    backend = small(chunk_seconds=0.1, restart_after=0.1)
    async with run_gateway(backend) as gateway:
        video = await create(gateway, seconds="9", extra={"seed": 3, "prompts": [{"at_s": 1.0, "prompt": "b"}]})
        clip = gateway.streams.clips.get(video["id"])
        for loss in range(losses):
            # The second one dies over what the first had not come to.
            await gateway.until(lambda recorded=9 + 24 * loss: clip.recorded > recorded)
            backend.crash()
            await gateway.until(lambda: backend.health().ready)
        finished = await done(gateway, video)
        if losses == 2:
            assert (finished["status"], finished["error"]["code"]) == ("failed", "engine_failed")
            assert finished["extra"]["retryable"] is True
            return
        assert finished["status"] == "completed"
        shown = frames(await film(gateway, video))
        assert len(shown) == 144
        for index in range(0, 144, 5):
            prompt = "a red ball" if index < 21 else "b"
            assert gap(shown[index].to_image(), made_of(backend, prompt, 3, index)) < 6, index


async def test_an_engine_that_stays_dead_fails_every_clip(run_gateway: Any) -> None:
    backend = small(chunk_seconds=0.1, restarts_left=0)
    async with run_gateway(backend) as gateway:
        videos = [await create(gateway, seconds="3") for _ in range(2)]
        backend.crash()
        for video in videos:
            failed = await done(gateway, video)
            assert (failed["status"], failed["error"]["code"]) == ("failed", "engine_failed")
        response = await gateway.http.post("/v1/videos", json={"prompt": "a"})
        assert (response.status_code, response.json()["error"]["code"]) == (503, "engine_failed")


async def test_a_clip_that_breaks_leaves_the_next_alone(run_gateway: Any) -> None:
    async with run_gateway(small(chunk_seconds=0.1)) as gateway:
        broken, fine = await create(gateway, seconds="9"), await create(gateway)
        await gateway.until(lambda: gateway.streams.clips.get(broken["id"]).recorded > 0)
        gateway.backend.break_stream(broken["id"])
        assert (await done(gateway, broken))["error"]["code"] == "numeric"
        assert (await done(gateway, fine))["status"] == "completed"


async def test_before_the_engine_is_up(run_gateway: Any) -> None:
    async with run_gateway(FakeBackend(ready_after=30), ready=False) as gateway:
        response = await gateway.http.post("/v1/videos", json={"prompt": "a"})
        assert (response.status_code, response.json()["error"]["code"]) == (503, "engine_starting")
        assert response.headers["retry-after"] == "5"


async def test_a_clip_that_is_asked_for_twice_is_made_once(run_gateway: Any) -> None:
    async with run_gateway() as gateway:
        post, again = gateway.http.post, {"idempotency-key": "one"}
        body = {"prompt": "a", "seconds": "1"}
        first = await post("/v1/videos", json=body, headers=again)
        second = await post("/v1/videos", json=body, headers=again)
        assert first.json()["id"] == second.json()["id"]
        assert second.headers["idempotent-replayed"] == "true"
        other = await post("/v1/videos", json={**body, "prompt": "b"}, headers=again)
        assert (other.status_code, other.json()["error"]["code"]) == (422, "idempotency_key_reused")
        await done(gateway, first.json())
        path = f"/v1/videos/{first.json()['id']}/remix"
        remixes = [(await post(path, json={"prompt": "b"}, headers={"idempotency-key": "two"})).json() for _ in "ab"]
        assert remixes[0]["id"] == remixes[1]["id"] != first.json()["id"]
        assert len((await gateway.http.get("/v1/videos")).json()["data"]) == 2


async def test_a_key_that_goes_takes_its_unfinished_clips_along(run_gateway: Any, tmp_path: Path) -> None:
    path = tmp_path / "keys.toml"
    root = {"authorization": f"Bearer {keys.add_key(path, 'root', 'root', ['admin'], 4, 1000)}"}
    kept = path.read_text()
    lost = {"authorization": f"Bearer {keys.add_key(path, 'lost', 'lost', ['control'], 4, 1000)}"}
    async with run_gateway(small(chunk_seconds=0.05), keys=path) as gateway:
        call = gateway.http.request
        whole = (await call("POST", "/v1/videos", headers=lost, json={"prompt": "a", "seconds": "0.5"})).json()["id"]
        half = (await call("POST", "/v1/videos", headers=lost, json={"prompt": "a", "seconds": "600"})).json()["id"]
        await gateway.until(lambda: gateway.streams.clips.get(half).recorded > 16)

        async def read(key: dict[str, str]) -> None:
            async with gateway.http.stream("GET", f"/v1/videos/{half}/content", headers=key) as response:
                async for _ in response.aiter_bytes():
                    pass

        reading = [asyncio.create_task(read(key)) for key in (lost, root)]
        await asyncio.sleep(0.3)
        path.write_text(kept)
        for each in reading:
            with pytest.raises(httpx.ReadError):
                await each

        async def revoked() -> bool:
            found = (await call("GET", f"/v1/videos/{half}", headers=root)).json()
            return found["status"] == "failed" and found["error"]["code"] == "revoked"

        await gateway.until(revoked)
        assert (await call("GET", f"/v1/videos/{whole}", headers=root)).json()["status"] == "completed"
        assert (await call("GET", f"/v1/videos/{whole}", headers=lost)).status_code == 401


async def test_clips_of_others_do_not_exist(run_gateway: Any, holders: Any, tmp_path: Path) -> None:
    path = tmp_path / "keys.toml"
    made = holders(
        path,
        ("studio", "studio", "control"),
        ("guest", "studio", "view"),
        ("other", "other", "control"),
        ("root", "root", "admin"),
    )
    async with run_gateway(keys=path) as gateway:
        call = gateway.http.request
        body = {"json": {"prompt": "a", "seconds": "1"}}
        assert (await call("POST", "/v1/videos", **body)).status_code == 401
        assert (await call("POST", "/v1/videos", headers=made["guest"], **body)).status_code == 403
        video = (await call("POST", "/v1/videos", headers=made["studio"], **body)).json()
        at = f"/v1/videos/{video['id']}"
        async with asyncio.timeout(5):
            while (await call("GET", at, headers=made["studio"])).json()["status"] != "completed":
                await asyncio.sleep(0.02)
        for method, path_ in (("GET", at), ("GET", f"{at}/content"), ("DELETE", at), ("POST", f"{at}/remix")):
            theirs = await call(method, path_, headers=made["other"], json=body["json"] if method == "POST" else None)
            assert (theirs.status_code, theirs.json()["error"]["code"]) == (404, "video_not_found")
            assert (await call(method, path_)).status_code == 401
        assert (await call("GET", "/v1/videos", headers=made["other"])).json()["data"] == []
        for name in ("guest", "root"):
            assert (await call("GET", f"{at}/content", headers=made[name])).status_code == 200
        assert (await call("DELETE", at, headers=made["guest"])).status_code == 403
        stream = (await call("POST", "/v1/streams", headers=made["studio"], json={"prompt": "a"})).json()
        token = (await call("POST", f"/v1/streams/{stream['id']}/tokens", headers=made["studio"], json={})).json()
        assert (await call("GET", at, params={"token": token["token"]})).status_code == 404
        assert (await call("GET", "/v1/videos", params={"token": token["token"]})).status_code == 403


async def test_seconds_may_be_an_integer(run_gateway: Any) -> None:
    async with run_gateway(small()) as gateway:
        for given, seconds, frames in ((2, "2", 32), (1.0, "1", 16)):
            video = await create(gateway, seconds=given)
            assert video["seconds"] == seconds
            assert gateway.streams.clips.get(video["id"]).frames == frames
