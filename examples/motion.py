"""Frames as NumPy arrays: how much changes from each frame to the next, and the frame that changed most as a PNG.

The arrays are uint8 in RGB, (height, width, 3). OpenCV takes them as they are, but for its order of colours:
`cv2.cvtColor(frame.numpy(), cv2.COLOR_RGB2BGR)`.

    python motion.py "a red ball bouncing on grass" --seconds 5 -o liveliest.png
"""

import argparse

import numpy
from livereel import Client, Frame

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("prompt")
parser.add_argument("--seconds", type=float, default=5)
parser.add_argument("-o", "--output", default="liveliest.png")
options = parser.parse_args()

most, liveliest = -1.0, None
before: Frame | None = None
with Client() as client, client.stream(options.prompt, duration_s=options.seconds) as stream:
    for frame in stream.frames("rgb24"):
        if before is not None:
            change = float(numpy.abs(frame.numpy().astype(int) - before.numpy()).mean())
            print(f"{frame.seconds:6.2f} s {'#' * round(4 * change)}")
            if change > most:
                most, liveliest = change, frame
        before = frame
if liveliest is not None:
    liveliest.save(options.output)
    print(f"most changed at {liveliest.seconds:.2f} s: {options.output}")
