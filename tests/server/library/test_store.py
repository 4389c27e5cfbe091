"""The folder of clips and recordings."""

from pathlib import Path

import pytest

from server.library.store import Store


def test_a_folder_has_one_server(tmp_path: Path) -> None:
    store, other = Store(tmp_path / "data", 1, 1.0), Store(tmp_path / "data", 1, 1.0)
    store.open()
    with pytest.raises(OSError, match="in use by another server"):
        other.open()
    store.close()
    other.open()
    other.close()


def test_a_folder_that_nobody_named_goes_with_the_server() -> None:
    store = Store(None, 1000, 1.0)
    store.open()
    path = store.create("x", ".mp4")
    store.save("x", ".bin", bytes(1000))
    store.measure()
    assert store.full and path.exists()
    store.close()
    assert not path.parent.exists()
