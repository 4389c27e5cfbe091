"""The README's moving picture: captions here, the picture itself in `tests/docs`."""

from PIL import Image

from engine.bench.picture import PROMPTS, caption


def test_a_caption_stands_under_the_scaled_frame() -> None:
    page = caption(Image.new("RGB", (256, 256), (255, 0, 0)), PROMPTS[0], 1.25)
    assert page.size == (320, 320 + 3 * 16)
    assert page.crop((0, 0, 320, 320)).getcolors() == [(320 * 320, (255, 0, 0))]
    below = page.crop((0, 320, 320, page.height)).getcolors(1 << 16)
    assert below is not None and len(below) > 2  # text of two shades on the background
