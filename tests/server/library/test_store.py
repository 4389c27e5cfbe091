"""The data folder: who may use it, what is in it after a crash, and when it is full."""

import errno
import os
import stat
import time
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest

from server.errors import ApiError
from server.library.store import Store, check_folder
from tests.server.library.disk import full_at


class Record(msgspec.Struct):
    """A record as the library's rooms keep them."""

    title: str


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    store = Store(tmp_path / "data", 1000, 1.0)
    store.open()
    yield store
    store.close()


def test_a_folder_has_one_server(tmp_path: Path) -> None:
    store, other = Store(tmp_path / "data", 1, 1.0), Store(tmp_path / "data", 1, 1.0)
    store.open()
    with pytest.raises(OSError, match="in use by another server"):
        other.open()
    store.close()
    other.open()
    other.close()


def test_a_temporary_folder_is_deleted_with_the_server() -> None:
    store = Store(None, 1000, 1.0)
    store.open()
    path = store.create("x", ".mp4")
    store.save("x", ".bin", bytes(1000))
    store.measure()
    assert store.full and path.exists()
    store.close()
    assert not path.parent.exists()


def test_files_are_private(store: Store, tmp_path: Path) -> None:
    store.create("a", ".mp4")
    store.save("a", ".webp", b"picture")
    store.save_record("a", Record("one"))
    assert stat.S_IMODE((tmp_path / "data").stat().st_mode) == 0o700
    assert {stat.S_IMODE(path.stat().st_mode) for path in (tmp_path / "data").iterdir()} == {0o600}
    with pytest.raises(FileExistsError):
        store.create("a", ".mp4")
    store.remove("a")
    assert os.listdir(tmp_path / "data") == ["lock"]


def test_records_without_files_files_without_records_and_damaged_records(
    store: Store, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    store.save_record("clip_a", Record("one"))
    store.save_record("rec_b", Record("of another kind"))
    store.create("clip_orphan", ".mp4")
    (tmp_path / "data" / "clip_damaged.json").write_bytes(b"{")
    assert list(store.records("clip_", Record)) == [("clip_a", Record("one"))]
    assert "clip_damaged" in caplog.text
    assert not store.path("clip_orphan", ".mp4").exists()
    assert store.path("clip_damaged", ".json").exists()


def test_a_full_store_says_so(store: Store) -> None:
    store.save("a", ".mp4", bytes(1000))
    store.check_room()  # not measured yet
    store.measure()
    with pytest.raises(ApiError) as refused:
        store.check_room()
    assert (refused.value.status_code, refused.value.code) == (507, "storage_full")


def test_a_folder_that_others_can_read_is_refused(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir(mode=0o755)
    with pytest.raises(ValueError, match="chmod 700"):
        check_folder(tmp_path / "data")
    check_folder(tmp_path / "not made yet")


def test_a_full_disk_leaves_no_half_files(store: Store, tmp_path: Path) -> None:
    store.save("a", ".webp", b"old")
    with full_at(10), pytest.raises(OSError, match="too large"):
        store.save("a", ".webp", bytes(1000))
    assert sorted(os.listdir(tmp_path / "data")) == ["a.webp", "lock"]
    assert store.path("a", ".webp").read_bytes() == b"old"


def test_a_record_is_saved_on_a_full_disk_in_the_room_of_the_previous_one(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    store.save_record("rec_a", Record("one"))
    size = store.path("rec_a", ".json").stat().st_size
    monkeypatch.setattr(Store, "save", full)
    last = Record(400 * "x")
    store.save_record("rec_a", last)
    assert list(store.records("rec_", Record)) == [("rec_a", last)]
    assert store.path("rec_a", ".json").stat().st_size == size, "no more than it had"
    for id, record in (("rec_a", Record(2000 * "x")), ("rec_b", Record("without a previous one"))):
        with pytest.raises(OSError, match="No space left"):
            store.save_record(id, record)
    assert list(store.records("rec_", Record)) == [("rec_a", last)]


def test_files_that_cannot_be_deleted_are_logged_once(
    store: Store, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def read_only(*_: object, **__: object) -> None:
        raise OSError(errno.EROFS, "Read-only file system")

    store.save_record("a", Record("one"))
    with monkeypatch.context() as patch:
        patch.setattr(Path, "unlink", read_only)
        assert not store.discard("a") and not store.discard("a")
    assert len(caplog.records) == 1 and "Read-only" in caplog.text
    assert store.discard("a") and store.discard("a")
    assert not store.path("a", ".json").exists()


def test_a_file_that_was_removed_is_missed_unless_the_folder_is_away(store: Store, tmp_path: Path) -> None:
    path = store.create("a", ".mp4")
    store.measure()
    path.unlink()
    assert store.lacks("a", ".mp4") and not store.lacks("a", ".mp4", listed=True)
    store.measure()
    assert store.lacks("a", ".mp4", listed=True)
    (tmp_path / "data").rename(tmp_path / "away")
    assert not store.lacks("a", ".mp4")


def test_the_clock_goes_on_with_the_next_server(store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store.close()
    right = time.time
    monkeypatch.setattr(time, "time", lambda: right() - 86_400)
    later = Store(tmp_path / "data", 1000, 60.0)
    later.open()
    assert later.clock.now() == pytest.approx(right(), abs=1)
    assert later.latest_expiry(right() + 3600) == pytest.approx(right() + 3600, abs=1)
    later.close()
    (tmp_path / "data" / "lock").write_bytes(b"")
    unknown = Store(tmp_path / "data", 1000, 60.0)
    unknown.open()
    assert unknown.latest_expiry(right()) == pytest.approx(time.time() + 60, abs=1), "nothing stays for ever"
    unknown.close()
