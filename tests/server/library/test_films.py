"""What is read from films that their writer did not finish, and what becomes of them."""

import random
from pathlib import Path

import av
import pytest

from server.library.films import FilmFormat, repair
from server.library.mp4 import ClipWriter
from server.library.recording_writer import WebmWriter
from tests.server.library.disk import full_at

FRAMES = 70


@pytest.fixture(scope="module", params=["mp4", "webm", "alpha"])
def film(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[bytes, bytes]:
    """A film as it is on disk while it is written, and when it is finished."""
    path = tmp_path_factory.mktemp("film") / f"film.{'mp4' if request.param == 'mp4' else 'webm'}"
    path.touch()
    noise = random.Random(7)
    pictures = [memoryview(noise.randbytes(64 * 48 * 3)) for _ in range(FRAMES)]
    if request.param == "mp4":
        clip = ClipWriter(path, 64, 48, 16)
        clip.add_rgb(pictures)
        growing = path.read_bytes()
        assert clip.size == len(growing)
        clip.finish()
    else:
        webm = WebmWriter(path, 64, 48, 16, alpha=request.param == "alpha")
        for index, rgb in enumerate(pictures):
            webm.add(rgb, 5625 * index, None)
        growing = path.read_bytes()
        assert webm.size == len(growing)
        webm.finish()
    return growing, path.read_bytes()


def format_of(data: bytes) -> FilmFormat:
    return "mp4" if data[4:8] == b"ftyp" else "webm"


def played(path: Path) -> tuple[int, float | None]:
    with av.open(str(path)) as container:
        duration = None if container.duration is None else container.duration / av.time_base
        return len(list(container.decode(video=0))), duration


def test_a_finished_film_stays_as_it_is(film: tuple[bytes, bytes], tmp_path: Path) -> None:
    path = tmp_path / "film"
    path.write_bytes(film[1])
    found = repair(path, format_of(film[1]))
    assert (found.frames, found.size) == (FRAMES, len(film[1]))
    assert found.seconds == pytest.approx(FRAMES / 16, abs=0.001)
    assert path.read_bytes() == film[1]


def test_a_film_is_on_disk_but_for_its_last_second(film: tuple[bytes, bytes], tmp_path: Path) -> None:
    path = tmp_path / "film"
    path.write_bytes(film[0])
    assert repair(path, format_of(film[0])).frames >= FRAMES - 16
    assert played(path)[0] >= FRAMES - 16


@pytest.mark.parametrize("part", [0.45, 0.6, 0.77, 0.9, 0.999])
@pytest.mark.parametrize("finished", [False, True])
def test_a_film_that_breaks_off_is_repaired(
    film: tuple[bytes, bytes], tmp_path: Path, part: float, finished: bool
) -> None:
    data, path = film[finished], tmp_path / "film"
    path.write_bytes(data[: round(part * len(data))])
    found = repair(path, format_of(data))
    frames, duration = played(path)
    assert found.frames == frames > 0
    assert duration is not None
    if not finished:  # a finished one states what it had
        assert duration == pytest.approx(found.seconds, abs=0.001) == pytest.approx(frames / 16, abs=0.001)
    assert found.size == path.stat().st_size
    whole = path.read_bytes()
    assert repair(path, format_of(data)) == found, "there is nothing left to repair"
    assert path.read_bytes() == whole


def test_what_is_no_film_has_no_frames(film: tuple[bytes, bytes], tmp_path: Path) -> None:
    path, noise = tmp_path / "film", random.Random(8)
    for data in (b"", film[0][:10], film[0][:300], bytes(1000), b"\xff" * 1000, noise.randbytes(5000)):
        path.write_bytes(data)
        assert repair(path, format_of(film[0])).frames == 0
    with pytest.raises(FileNotFoundError):
        repair(tmp_path / "none", format_of(film[0]))


def test_a_film_of_a_full_disk_is_cut(film: tuple[bytes, bytes], tmp_path: Path) -> None:
    path, part = tmp_path / "film", round(0.7 * len(film[0]))
    path.write_bytes(film[0][:part])
    with full_at(100):  # there is no room for an index
        found = repair(path, format_of(film[0]))
    assert found.frames == played(path)[0] > 0
    assert found.size == path.stat().st_size < part
