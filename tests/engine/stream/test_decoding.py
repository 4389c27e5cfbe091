"""Frames as bytes, and work beside the current stream; `test_pipeline.py` has the decoders at work."""

import torch

from engine.stream.decoding import SideStream, to_bytes, to_host


def test_frames_are_clamped_and_rounded_to_bytes() -> None:
    frames = torch.tensor([-0.5, 0.0, 0.5, 1.0, 1.5, 0.25]).view(1, 1, 3, 1, 2)
    found = to_bytes(frames)
    assert found.dtype == torch.uint8 and found.shape == (1, 1, 1, 2, 3)
    assert found[0, 0, 0].tolist() == [[0, 128, 255], [0, 255, 64]]


def test_on_a_cpu_nothing_is_copied_or_deferred() -> None:
    x = torch.ones(3)
    assert to_host(x) is x
    with SideStream(torch.device("cpu"))(x):
        x += 1
    assert x.tolist() == [2, 2, 2]
