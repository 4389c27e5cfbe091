"""The data folder: who may use it, what is in it after a crash, and when it is full."""

import os
import stat
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest

from server.errors import ApiError
from server.library.store import Store, check_folder


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
