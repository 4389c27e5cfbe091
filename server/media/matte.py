"""Transparency for players without alpha: the frame stacked on its matte, in a picture of twice the height.

The matte is white where the frame is opaque and black where it is transparent. It is keyed: pixels near one colour, or
dark pixels, count as background. A page combines the halves again (`clients/overlay`). Colours are not premultiplied.
"""

from dataclasses import dataclass
from typing import Literal

from PIL import Image, ImageChops, ImageColor


@dataclass(frozen=True, slots=True)
class Matte:
    """A chroma or luma key: which pixels are transparent.

    `chroma` compares Cb and Cr with those of `color`, so that shadows on the background count as background; the
    distance is the larger of the two differences, divided by 255. `luma` makes dark pixels transparent; the distance is
    the luma divided by 255. A pixel is transparent up to a distance of `tolerance`, opaque from
    `tolerance + softness` on, and linear in between.
    """

    mode: Literal["chroma", "luma"]
    color: str
    """#rrggbb; used by `chroma` only."""
    tolerance: float
    softness: float

    def opacity(self, rgb: memoryview, width: int, height: int) -> bytes:
        """The opacity of RGB24 pixels, height x width x 3 bytes: height x width bytes, 255 is opaque."""
        return self.opacity_image(Image.frombytes("RGB", (width, height), bytes(rgb))).tobytes()

    def opacity_image(self, picture: Image.Image) -> Image.Image:
        """The opacity of an RGB picture, as a greyscale (L) picture of the same size."""
        luma, *chroma = picture.convert("YCbCr").split()
        if self.mode == "luma":
            return luma.point(self._ramp())
        background = Image.new("RGB", (1, 1), ImageColor.getrgb(self.color)).convert("YCbCr").getpixel((0, 0))
        assert isinstance(background, tuple)
        cb, cr = (
            plane.point([abs(value - middle) for value in range(256)])
            for plane, middle in zip(chroma, background[1:], strict=True)
        )
        return ImageChops.lighter(cb, cr).point(self._ramp())

    def _ramp(self) -> list[int]:
        """Opacity (0 to 255) by distance (0 to 255)."""
        softness = max(self.softness, 1e-6)
        opacity = ((distance / 255 - self.tolerance) / softness for distance in range(256))
        return [round(255 * min(1.0, max(0.0, each))) for each in opacity]


def stack(rgb: memoryview, width: int, height: int, matte: Matte | None) -> memoryview:
    """Stack RGB24 pixels, height x width x 3 bytes, on their matte: twice as many bytes. No matte means opaque."""
    if matte is None:
        return memoryview(bytes(rgb) + b"\xff" * len(rgb))
    opacity = matte.opacity_image(Image.frombytes("RGB", (width, height), bytes(rgb)))
    return memoryview(bytes(rgb) + Image.merge("RGB", (opacity, opacity, opacity)).tobytes())
