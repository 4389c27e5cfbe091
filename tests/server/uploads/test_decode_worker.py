"""What the decoding process makes of pictures and clips, and what it can still do once confined."""

import io
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from server.uploads import decode_worker
from tests.server.thread_limit import run_without_new_threads
from tests.server.uploads.samples import animation, clip, picture


def decoded(data: bytes, width: int = 16, height: int = 16, fps: int = 16) -> np.ndarray:
    return np.frombuffer(decode_worker.decode(data, width, height, fps), dtype=np.uint8).reshape(-1, height, width, 3)


@pytest.mark.parametrize("format", ["PNG", "JPEG", "WEBP", "GIF"])
def test_a_picture_becomes_one_frame_of_the_models_size(format: str) -> None:
    frames = decoded(picture(format=format))
    assert frames.shape == (1, 16, 16, 3)
    assert np.abs(frames.astype(int) - [200, 10, 30]).max() <= 6


def test_it_is_cut_about_its_middle_and_turned_upright() -> None:
    image = Image.new("RGB", (96, 32), (0, 0, 255))
    image.paste((255, 0, 0), (32, 0, 64, 32))
    out = io.BytesIO()
    image.save(out, "PNG")
    assert np.abs(decoded(out.getvalue())[0].astype(int) - [255, 0, 0]).max() < 20

    exif = Image.Exif()
    exif[0x0112] = 6  # turned a quarter: wide becomes tall
    image.save(out := io.BytesIO(), "JPEG", exif=exif, quality=95)
    tall = decoded(out.getvalue(), 16, 48)[0]
    assert tall[24, :, 0].mean() > 200
    assert tall[2, :, 0].mean() < 60


def test_what_is_transparent_is_black() -> None:
    assert decoded(picture(colour=(255, 255, 255, 0))).max() == 0


def test_an_animation_is_played_at_the_models_rate() -> None:
    frames = decoded(animation([(0, 0, 0), (120, 120, 120), (240, 240, 240)], duration=250))
    assert frames[:, 0, 0, 0].tolist() == [0] * 4 + [120] * 4 + [240] * 4


@pytest.mark.parametrize("format", ["mp4", "webm"])
def test_a_clip_is_played_at_the_models_rate_and_its_newest_frames_are_kept(format: str) -> None:
    levels = decoded(clip(8, 8, format=format))[:, 8, 8, 0].astype(int)
    assert 14 <= len(levels) <= 16
    assert (np.diff(levels) >= -2).all()
    assert levels[0] < 40 and levels[-1] > 200
    long = decoded(clip(120, 16, format=format))
    assert len(long) == decode_worker.KEPT_FRAMES
    assert long[-1].mean() > 200
    assert long[0].mean() > 140


def test_of_a_photograph_with_more_pictures_inside_the_first_counts() -> None:
    out = io.BytesIO()
    first, second = [Image.new("RGB", (32, 32), colour) for colour in ((200, 0, 0), (0, 0, 200))]
    first.save(out, "MPO", save_all=True, append_images=[second])
    assert decoded(out.getvalue()).shape[0] == 1


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere the limit on processes does not count threads")
@pytest.mark.parametrize("format", ["mp4", "webm"])
def test_a_clip_is_decoded_without_another_thread(format: str) -> None:
    """`confine` forbids threads to whoever is not root."""
    data = clip(8, 8, format=format)
    setup = "import threading; from server.uploads import decode_worker; decode_worker.confine()"
    run_without_new_threads(setup, f"decode_worker.decode({data!r}, 16, 16, 16)")


HOSTILE = {
    "files": "open('/etc/hostname')",
    "sockets": "import socket; socket.socket()",
    "writing": "import os; os.pipe()",
    "memory": "bytes(2 << 30)",
}
PRELUDE = """
import os, sys, socket, resource
sys.path.insert(0, {folder!r})
import decode_worker
decode_worker.CPU_SECONDS = 1
decode_worker.confine()
try:
    {act}
except (OSError, MemoryError, ValueError):
    os._exit(99)
os._exit(0)
"""


@pytest.mark.parametrize("name", HOSTILE)
def test_a_confined_process_can_open_nothing(name: str) -> None:
    script = PRELUDE.format(folder=str(Path(decode_worker.__file__).parent), act=HOSTILE[name])
    assert subprocess.run([sys.executable, "-I", "-c", script], check=False, timeout=30).returncode == 99


def test_processor_time_is_bounded() -> None:
    script = PRELUDE.format(folder=str(Path(decode_worker.__file__).parent), act="exec('while True: pass')")
    assert subprocess.run([sys.executable, "-I", "-c", script], check=False, timeout=30).returncode < 0
