"""Clips and their files: full disks, removed films, ages. `tests/server/api/test_videos.py` makes whole ones."""

import asyncio
import errno
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from server.library.clip import Clip
from server.library.mp4 import ClipWriter
from tests.server.api.test_videos import create, done, film, small
from tests.server.library.disk import full_at

pytestmark = pytest.mark.anyio
DAYS = 3 * 86_400.0


async def content(gateway: Any, video: dict[str, Any], variant: str = "video") -> tuple[int, str | None]:
    response = await gateway.http.get(f"/v1/videos/{video['id']}/content", params={"variant": variant})
    return response.status_code, response.json()["error"]["code"] if response.status_code >= 400 else None


async def test_a_full_disk_fails_the_clip_and_not_the_next(run_gateway: Any, tmp_path: Path) -> None:
    async with run_gateway(small(), data=tmp_path / "data") as gateway:
        with full_at(2_000):
            failed = await done(gateway, await create(gateway, seconds="4"))
        assert (failed["status"], failed["error"]["code"]) == ("failed", "storage_full")
        assert not (tmp_path / "data" / f"{failed['id']}.mp4").exists()
        assert await content(gateway, failed) == (409, "video_failed")
        assert (await done(gateway, await create(gateway)))["status"] == "completed"


async def test_a_file_that_cannot_be_closed_or_deleted_holds_nothing_up(
    run_gateway: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: Any, **__: Any) -> None:
        raise OSError(errno.EIO, "Input/output error")

    async with run_gateway(small(), data=tmp_path / "data") as gateway:
        with monkeypatch.context() as patch:
            for name in ("add_rgb", "close"):
                patch.setattr(ClipWriter, name, broken)
            patch.setattr(Path, "unlink", broken)
            failed = await done(gateway, await create(gateway))
            assert (failed["status"], failed["error"]["code"]) == ("failed", "internal_error")
            response = await gateway.http.delete(f"/v1/videos/{failed['id']}")
            assert (response.status_code, response.json()["error"]["code"]) == (507, "storage_full")
        assert (await done(gateway, await create(gateway)))["status"] == "completed"
        assert (await gateway.http.delete(f"/v1/videos/{failed['id']}")).status_code == 200


async def test_a_film_that_is_removed_by_hand_is_gone(run_gateway: Any, tmp_path: Path) -> None:
    data = tmp_path / "data"
    async with run_gateway(small(), data=data) as gateway:
        removed, noticed, bare = [await done(gateway, await create(gateway)) for _ in range(3)]
        (data / f"{removed['id']}.mp4").unlink()
        assert await content(gateway, removed) == (410, "file_removed")
        assert await content(gateway, removed, "thumbnail") == (410, "file_removed")
        (data / f"{noticed['id']}.mp4").unlink()
        for video in (removed, noticed):
            found = (await gateway.http.get(f"/v1/videos/{video['id']}")).json()
            assert (found["status"], found["error"]["code"]) == ("failed", "file_removed")
        (data / f"{bare['id']}.webp").unlink()
        assert await content(gateway, bare, "thumbnail") == (410, "file_removed")
        assert await content(gateway, bare) == (200, None)
        (data / f"{bare['id']}.mp4").unlink()
    async with run_gateway(small(), data=data) as gateway:
        for video in (removed, noticed, bare):
            assert (await done(gateway, video))["error"]["code"] == "file_removed"
            assert await content(gateway, video) == (410, "file_removed")


async def test_the_list_notices_removed_films_too(
    run_gateway: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("server.streams.registry.HOUSEKEEPING_SECONDS", 0.02)
    async with run_gateway(small(), data=tmp_path / "data") as gateway:
        video = await done(gateway, await create(gateway))
        (tmp_path / "data" / f"{video['id']}.mp4").unlink()

        async def noticed() -> bool:
            (listed,) = (await gateway.http.get("/v1/videos")).json()["data"]
            return bool(listed["status"] == "failed")

        await gateway.until(noticed)


async def test_a_clock_that_is_set_ahead_deletes_nothing(
    run_gateway: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("server.streams.registry.HOUSEKEEPING_SECONDS", 0.02)
    right = time.time
    async with run_gateway(small(), data=tmp_path / "data", keep_hours=1) as gateway:
        video = await done(gateway, await create(gateway))
        monkeypatch.setattr(time, "time", lambda: right() + DAYS)
        store, rounds = gateway.streams._store, []
        monkeypatch.setattr(store, "measure", lambda: rounds.append(1))
        await gateway.until(lambda: len(rounds) > 2)
        kept = await done(gateway, video)
        assert kept["status"] == "completed"
        assert kept["expires_at"] == pytest.approx(video["expires_at"] + DAYS, abs=2)
        # one that is finished now is kept as long
        assert (await done(gateway, await create(gateway)))["expires_at"] == pytest.approx(time.time() + 3600, abs=5)
    async with run_gateway(small(), data=tmp_path / "data", keep_hours=1) as gateway:
        assert (await done(gateway, video))["status"] == "completed"
        assert await film(gateway, video)
    monkeypatch.setattr(time, "time", right)
    async with run_gateway(small(), data=tmp_path / "data", keep_hours=1) as gateway:
        assert (await done(gateway, video))["expires_at"] == pytest.approx(video["expires_at"], abs=2)


@pytest.mark.parametrize("restart", [False, True])
async def test_a_clock_that_is_set_back_keeps_nothing_for_ever(
    run_gateway: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, restart: bool
) -> None:
    monkeypatch.setattr("server.streams.registry.HOUSEKEEPING_SECONDS", 0.02)
    right, settings = time.time, {"data": tmp_path / "data", "keep_hours": 1.5 / 3600}

    async def gone(gateway: Any) -> None:
        async def over() -> bool:
            return (await gateway.http.get(f"/v1/videos/{video['id']}")).status_code == 404

        await gateway.until(over, 10)

    async with run_gateway(small(), **settings) as gateway:
        video = await done(gateway, await create(gateway))
        monkeypatch.setattr(time, "time", lambda: right() - DAYS)
        if not restart:
            await gone(gateway)
            return
    async with run_gateway(small(), **settings) as gateway:
        await gone(gateway)


async def test_a_clip_that_is_cancelled_while_it_is_stored_leaves_nothing(
    run_gateway: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with run_gateway(small(), data=tmp_path / "data") as gateway:
        store, saving, gate = gateway.streams._store, threading.Event(), threading.Event()
        save = store.save

        def slow(*arguments: Any) -> None:
            saving.set()
            assert gate.wait(5)
            save(*arguments)

        monkeypatch.setattr(store, "save", slow)
        values = {"model": "mini", "prompt": "a", "prompts": [], "seed": 1, "seconds": "1", "frames": 16}
        clip = Clip(id="video_a", **values, width=64, height=48, fps=16, created_at=0.0)
        creating = asyncio.create_task(gateway.streams.clips.create(clip, b"picture"))
        await gateway.until(saving.is_set)
        creating.cancel()
        await asyncio.sleep(0)
        gate.set()
        with pytest.raises(asyncio.CancelledError):
            await creating
        assert [path.name for path in (tmp_path / "data").iterdir()] == ["lock"]
