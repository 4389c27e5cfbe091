"""The kernels between matrix products against their plain forms, on the GPU where there is one."""

from typing import Any

import pytest
import torch
from torch import Tensor

from engine.ops import fused, quant
from engine.ops.attention import pack_values, unpack_values
from engine.ops.fused import QKVProjection
from engine.ops.linear import fp8_rows_supported, quantised_linear
from engine.ops.quant import Activation, FixedScale, Format, KVScales, OutputFormat, QuantTensor, quantise
from engine.ops.rope import rope_angles, rotate

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
ON_GPU = DEVICE.type == "cuda"
# the interpreter knows no bfloat16 and rounds to float8 in another way
IN_8_BITS: list[Format] = ["int8", *(["fp8"] if ON_GPU else [])]
FIXED = torch.full((1,), 0.02, device=DEVICE)
FORMATS: list[OutputFormat | None] = [None, *IN_8_BITS, *(FixedScale(to, FIXED) for to in IN_8_BITS)]


def kernels() -> Any:
    from engine.ops.triton import fused as module

    return module


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed + sum(shape))).to(DEVICE)


def plain(name: str, *args: Any, **kwargs: Any) -> Any:
    """The twin on the CPU, whatever the arguments are on."""

    def home(x: Any) -> Any:
        if isinstance(x, FixedScale):
            return FixedScale(x.format, x.scale.cpu())
        if isinstance(x, KVScales | QKVProjection):
            return type(x)(**{name: home(part) for name, part in vars(x).items()})
        return x.cpu() if isinstance(x, Tensor) else x

    return getattr(quant if name == "quantise" else fused, name)(
        *map(home, args), **{key: home(value) for key, value in kwargs.items()}
    )


def same(found: Activation, expected: Activation) -> None:
    if isinstance(expected, QuantTensor):
        assert isinstance(found, QuantTensor)
        torch.testing.assert_close(found.scale.cpu(), expected.scale, rtol=1e-5, atol=1e-9)
        apart = (found.data.cpu().float() - expected.data.float()).abs()
        assert apart.max() <= (1.0 if expected.format == "int8" else 32.0)  # neighbouring values
        assert (apart > 0).float().mean() < 0.01
    else:
        assert isinstance(found, Tensor)
        torch.testing.assert_close(found.cpu(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("output_format", FORMATS)
@pytest.mark.parametrize("width", [96, 128])
@pytest.mark.parametrize("added", ["nothing", "y", "bias", "gate", "both"])
def test_add_norm(added: str, width: int, output_format: OutputFormat | None) -> None:
    x, y, bias = random(12, width), random(12, width, seed=1), random(width, seed=2)
    modulation = random(3, 6, width, seed=3)
    shift, scale, gate = modulation[:, 0], modulation[:, 1], modulation[:, 2]  # strided, as the model's are
    options: dict[str, Any] = {
        "y": None if added == "nothing" else y,
        "bias": bias if added in ("bias", "both") else None,
        "gate": gate if added in ("gate", "both") else None,
        "output_format": output_format,
    }
    total, out = kernels().add_norm(x, scale, shift, 1e-6, **options)
    expected_total, expected = plain("add_norm", x, scale, shift, 1e-6, **options)
    torch.testing.assert_close(total.cpu(), expected_total)
    same(out, expected)


def test_add_norm_with_one_affine_for_all_rows() -> None:
    x, weight, bias = random(7, 96), random(1, 96, seed=1), random(1, 96, seed=2)
    found = kernels().add_norm(x, weight, bias, 1e-6, y=None, bias=None, gate=None, output_format=None)
    same(found[1], plain("add_norm", x, weight, bias, 1e-6)[1])


@pytest.mark.parametrize("output_format", FORMATS)
@pytest.mark.parametrize("width", [64, 70, 96, 120])
@pytest.mark.parametrize("with_bias", [False, True])
def test_gelu(output_format: Format | None, width: int, with_bias: bool) -> None:
    x, bias = 3 * random(5, width), random(width, seed=1) if with_bias else None
    same(kernels().gelu(x, bias, output_format), plain("gelu", x, bias, output_format))


@pytest.mark.parametrize("output_format", [f for f in FORMATS if f])
def test_quantise(output_format: OutputFormat) -> None:
    x = random(6, 100)
    x[2] = 0
    x[4, 7] = -50  # beyond what the fixed scale holds
    same(kernels().quantise(x, output_format), plain("quantise", x, output_format))


@pytest.mark.parametrize("with_bias", [False, True])
def test_rms_norm(with_bias: bool) -> None:
    x, weight, bias = random(5, 192), random(192, seed=1), random(192, seed=2) if with_bias else None
    same(kernels().rms_norm(x, bias, weight, 1e-6), plain("rms_norm", x, bias, weight, 1e-6))


@pytest.mark.parametrize("raw", [False, True])
@pytest.mark.parametrize(("count", "size"), [(3, 64), (2, 128)])
def test_heads_go_to_their_slot(count: int, size: int, raw: bool) -> None:
    """Written into a span of a longer ring, whose neighbours stay untouched."""
    batch, tokens, width = 2, 24, count * size
    qkv, bias = random(batch, tokens, 3 * width), random(3 * width, seed=1)
    norms = random(width, seed=2), random(width, seed=3)
    angles = rope_angles(torch.arange(2) + 5, 3, 4, size).to(DEVICE)

    def run(function: Any, device: torch.device) -> list[Tensor]:
        rings = [torch.full((batch, 3 * tokens, count, size), 7.0, device=device) for _ in range(3)]
        keys, values, untouched = (ring[:, tokens : 2 * tokens] for ring in rings)
        inputs = [x.to(device) for x in (qkv, bias, *norms)]
        q = function(QKVProjection(*inputs, 1e-6, angles.to(device)), keys, values, raw_keys=untouched if raw else None)
        return [x.cpu() for x in (q, *rings)]

    found, expected = run(kernels().qk_norm_rope, DEVICE), run(fused.qk_norm_rope, torch.device("cpu"))
    for f, e in zip(found, expected, strict=True):
        torch.testing.assert_close(f, e, rtol=1e-5, atol=1e-5)
    assert (found[3][:, tokens : 2 * tokens] != 7).any() == raw
    assert (found[1][:, :tokens] == 7).all() and (found[1][:, 2 * tokens :] == 7).all()


def near_whole(found: Tensor, expected: Tensor) -> None:
    """The same int8 numbers, but that one in a hundred may be a neighbour."""
    assert found.dtype == expected.dtype == torch.int8
    apart = (found.cpu().float() - expected.float()).abs()
    assert apart.max() <= 1 and (apart > 0).float().mean() < 0.01


def calibrated(keys: Tensor, values: Tensor) -> KVScales:
    batch, _, *shape = keys.shape
    scales = KVScales(
        *(torch.zeros(batch, *shape, device=DEVICE) for _ in range(2)), torch.zeros(batch, shape[0], device=DEVICE)
    )
    scales.calibrate(keys.to(DEVICE), values.to(DEVICE))
    return scales


@pytest.mark.parametrize("eight", [False, True])
@pytest.mark.parametrize("count", [3, 4])
def test_turned_keys_are_stored(count: int, eight: bool) -> None:
    keys = random(2, 6, count, 16)
    found, expected = (
        torch.full((2, 9, count, 16), 7.0).to(device, torch.int8 if eight else torch.float32)
        for device in (DEVICE, "cpu")
    )
    angles = rope_angles(torch.arange(2, device=DEVICE), 1, 3, 16)
    scales = calibrated(keys, keys) if eight else None
    kernels().store_rotated(keys, angles, found[:, :6], scales)
    plain("store_rotated", keys, angles, expected_part := expected[:, :6], scales)
    assert expected_part.data_ptr() == expected.data_ptr() and (found[:, 6:] == 7).all()
    if eight:
        near_whole(found, expected)
    else:
        torch.testing.assert_close(found.cpu(), expected, rtol=1e-5, atol=1e-5)


def test_scales_hold_for_later_chunks() -> None:
    """Keys that stand far from 0 and have strong channels, as they turn with time; and values ten times as large."""
    frames, rows, columns, size = 3, 4, 4, 64
    strong = torch.where(torch.arange(size) % 5 == 0, 4.0, 1.0).to(DEVICE)
    raw = random(2, frames * rows * columns, 3, size) * strong + 3 * random(1, 1, 3, size, seed=1)
    values = random(2, raw.shape[1], 3, size, seed=2)
    first = rotate(raw, rope_angles(torch.arange(frames), rows, columns, size).to(DEVICE))
    scales = calibrated(first, values)
    for frame in (0, 40, 4000):
        keys = rotate(raw, rope_angles(torch.arange(frames) + frame, rows, columns, size).to(DEVICE))
        stored = torch.empty(keys.shape, dtype=torch.int8, device=DEVICE)
        scales.quantise_keys(keys, stored)
        assert stored.abs().max() < 127, "nothing is clipped"
        restored = stored.float() * scales.key_gain[:, None] + scales.key_mean[:, None]
        assert (restored - keys).norm() / keys.norm() < 0.012
    for larger in (1, 10):
        packed = pack_values(larger * values.cpu(), None, 0, scales.value.cpu())
        restored = unpack_values(packed, values.shape[1]).to(DEVICE).float() * scales.value[:, None, :, None]
        assert (restored - larger * values).norm() / (larger * values).norm() < 0.04


@pytest.mark.parametrize("raw", [False, True])
@pytest.mark.parametrize("batch", [1, 2])
def test_heads_in_8_bits(batch: int, raw: bool) -> None:
    """Into a slot of a ring, whose neighbours stay; and the scores are those of the exact heads."""
    tokens, count, size = 24, 3, 128
    width = count * size
    qkv, bias = random(batch, tokens, 3 * width), random(3 * width, seed=1)
    norms = random(width, seed=2), random(width, seed=3)
    angles = rope_angles(torch.arange(2) + 5, 3, 4, size).to(DEVICE)
    projection = QKVProjection(qkv, bias, *norms, 1e-6, angles)
    keys, values = (torch.empty(batch, tokens, count, size) for _ in range(2))
    q = plain("qk_norm_rope", projection, keys, values)
    scales = calibrated(keys, values)

    rings = [torch.full((batch, 3 * tokens, count, size), 7, dtype=torch.int8, device=x) for x in (DEVICE, "cpu")]
    spans = [ring[:, tokens : 2 * tokens] for ring in rings]
    kept = [torch.full(spans[0].shape, 7.0, device=x) for x in (DEVICE, "cpu")]
    q8, q_scale = kernels().qk_norm_rope_int8(projection, spans[0], scales, raw_keys=kept[0] if raw else None)
    right, right_scale = plain("qk_norm_rope_int8", projection, spans[1], scales, raw_keys=kept[1] if raw else None)
    near_whole(q8, right)
    near_whole(*rings)
    torch.testing.assert_close(q_scale.cpu(), right_scale, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(kept[0].cpu(), kept[1], rtol=1e-4, atol=1e-5)
    assert (rings[0][:, :tokens] == 7).all() and (rings[0][:, 2 * tokens :] == 7).all() and (kept[0] != 7).any() == raw
    scores = torch.einsum("bqhd,bkhd->bhqk", q, keys)
    scores8 = torch.einsum("bqhd,bkhd->bhqk", right * right_scale[..., None], spans[1].float())
    # but for what the mean key adds to all of a query's
    scores, scores8 = (x - x.mean(-1, keepdim=True) for x in (scores, scores8))
    assert (scores - scores8).norm() / scores.norm() < 0.03


@pytest.mark.parametrize("to", ["fp8", "int8"])
def test_quantised_linear_is_the_product_of_the_dequantised_rows(to: Format) -> None:
    x, weight, bias = random(32, 64), random(48, 64, seed=1), random(48, seed=2)
    rows, columns = quantise(x, to), quantise(weight, to)
    expected = rows.dequantise() @ columns.dequantise().t() + bias
    found = quantised_linear(rows, columns, bias, torch.bfloat16 if ON_GPU else torch.float32)
    assert (found.float() - expected).norm() / expected.norm() < (1e-2 if ON_GPU else 1e-5)
    exact = x @ weight.t() + bias
    assert (found.float() - exact).norm() / exact.norm() < {"fp8": 0.05, "int8": 0.02}[to]


@pytest.mark.gpu
def test_this_gpu_has_float8() -> None:
    assert fp8_rows_supported(DEVICE) == (torch.cuda.get_device_capability() >= (8, 9))
