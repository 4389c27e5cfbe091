"""Fixed scales of a whole pipeline."""

from collections.abc import Callable

import pytest
import torch

from engine.bench.errors import relative, run
from engine.config import Preset, QuantScheme
from engine.pipeline import Pipeline
from engine.transforms.apply import Speed
from engine.transforms.calibrate import calibrate
from engine.transforms.fused import FusedWan

Build = Callable[..., Pipeline]


def calibrated(build: Build, toy: Preset, form: QuantScheme) -> Pipeline:
    pipeline = build(toy, speed=Speed(fused=True, low_bit=form, fixed_scales=True))
    calibrate(pipeline.served, toy, [pipeline.encode_prompt("a blue cube"), pipeline.encode_prompt("a red ball")])
    return pipeline


@pytest.mark.parametrize("form", ["fp8", "fp8-tensor", "int8", "nvfp4"])
def test_every_projection_gets_a_scale_and_chunks_stay_right(build: Build, toy: Preset, form: QuantScheme) -> None:
    expected, _ = run(build(toy), 3)
    pipeline = calibrated(build, toy, form)
    model = pipeline.dit
    assert isinstance(model, FusedWan)
    scales = [p.scale for block in model.blocks for p in block.projections.values()]
    assert len(scales) == 6 * toy.dit.num_layers
    assert all(scale is not None and float(scale) > 0 for scale in scales)
    found, _ = run(pipeline, 3)
    dynamic, _ = run(build(toy, speed=Speed(fused=True, low_bit=form)), 3)
    apart, before = (relative(torch.cat(x), torch.cat(expected)) for x in (found, dynamic))
    assert 0 < apart < 3 * before + 0.01


def test_it_is_the_same_every_time(build: Build, toy: Preset) -> None:
    first, second = (run(calibrated(build, toy, "fp8"), 2)[0] for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_the_model_as_it_is_written_has_no_scales(build: Build, toy: Preset) -> None:
    pipeline = build(toy)
    with pytest.raises(ValueError, match="fused model"):
        calibrate(pipeline.served, toy, [pipeline.encode_prompt("a blue cube")])
