"""Pictures with transparency for players that know none: the colour above its matte, in a picture of twice the height.

The matte is white where the picture is opaque and black where it is not. It is keyed: what is near one colour, or dark,
is taken for the background. A page puts the halves together again (`clients/overlay`); colours are not multiplied.
"""

from dataclasses import dataclass
from typing import Literal

from PIL import Image, ImageChops, ImageColor


@dataclass(frozen=True, slots=True)
class Matte:
    """What is transparent.

    `chroma` compares with `color` in the plane of Cb and Cr, so that shadows on the background are background: the
    distance is the larger of the two differences, as a part of 255. `luma` takes dark for transparent: the distance is
    the luma, as a part of 255. Up to `tolerance` the picture is transparent, from `tolerance + softness` on opaque, and
    evenly between.
    """

    mode: Literal["chroma", "luma"]
    color: str
    """#rrggbb; for `chroma`."""
    tolerance: float
    softness: float

    def opacity(self, rgb: memoryview, width: int, height: int) -> bytes:
        """Of RGB24, height x width x 3 bytes: height x width bytes, 255 where it is opaque."""
        return self.of(Image.frombytes("RGB", (width, height), bytes(rgb))).tobytes()

    def of(self, picture: Image.Image) -> Image.Image:
        """Of an RGB picture: L, of the same size."""
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
        """Opacity by distance."""
        softness = max(self.softness, 1e-6)
        opacity = ((distance / 255 - self.tolerance) / softness for distance in range(256))
        return [round(255 * min(1.0, max(0.0, each))) for each in opacity]


def stack(rgb: memoryview, width: int, height: int, matte: Matte | None) -> memoryview:
    """RGB24, height x width x 3 bytes, above its matte: twice as many bytes. Without a matte everything is opaque."""
    if matte is None:
        return memoryview(bytes(rgb) + b"\xff" * len(rgb))
    opacity = matte.of(Image.frombytes("RGB", (width, height), bytes(rgb)))
    return memoryview(bytes(rgb) + Image.merge("RGB", (opacity, opacity, opacity)).tobytes())
