"""The kernels between matrix products against their plain forms, on the GPU where there is one."""

from typing import Any

import pytest
import torch
from torch import Tensor

from engine.ops import fused
from engine.ops.attention import pack_values, unpack_values
from engine.ops.fused import Activation, Scales
from engine.ops.linear import Fixed, Format, Into, Rows8, fp8_rows_supported, linear8, quantise
from engine.ops.rope import rope_angles

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
ON_GPU = DEVICE.type == "cuda"
# the interpreter knows no bfloat16 and rounds to float8 in another way
IN_8_BITS: list[Format] = ["int8", *(["fp8"] if ON_GPU else [])]
FIXED = torch.full((1,), 0.02, device=DEVICE)
FORMATS: list[Into | None] = [None, *IN_8_BITS, *(Fixed(form, FIXED) for form in IN_8_BITS)]


def kernels() -> Any:
    from engine.ops.triton import fused as module

    return module


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed + sum(shape))).to(DEVICE)


def plain(name: str, *args: Any, **kwargs: Any) -> Any:
    """The twin on the CPU, whatever the arguments are on."""

    def home(x: Any) -> Any:
        if isinstance(x, Fixed):
            return Fixed(x.format, x.scale.cpu())
        if isinstance(x, Scales):
            return Scales(*(part.cpu() for part in vars(x).values()))
        return x.cpu() if isinstance(x, Tensor) else x

    return getattr(fused, name)(*map(home, args), **{key: home(value) for key, value in kwargs.items()})


def same(found: Activation, expected: Activation) -> None:
    if isinstance(expected, Rows8):
        assert isinstance(found, Rows8)
        torch.testing.assert_close(found.scale.cpu(), expected.scale, rtol=1e-5, atol=1e-9)
        apart = (found.data.cpu().float() - expected.data.float()).abs()
        assert apart.max() <= (1.0 if expected.format == "int8" else 32.0)  # neighbouring values
        assert (apart > 0).float().mean() < 0.01
    else:
        assert isinstance(found, Tensor)
        torch.testing.assert_close(found.cpu(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("into", FORMATS)
@pytest.mark.parametrize("width", [96, 128])
@pytest.mark.parametrize("added", ["nothing", "y", "bias", "gate", "both"])
def test_add_norm(added: str, width: int, into: Into | None) -> None:
    x, y, bias = random(12, width), random(12, width, seed=1), random(width, seed=2)
    modulation = random(3, 6, width, seed=3)
    shift, scale, gate = modulation[:, 0], modulation[:, 1], modulation[:, 2]  # strided, as the model's are
    options: dict[str, Any] = {
        "y": None if added == "nothing" else y,
        "bias": bias if added in ("bias", "both") else None,
        "gate": gate if added in ("gate", "both") else None,
        "into": into,
    }
    total, out = kernels().add_norm(x, scale, shift, 1e-6, **options)
    expected_total, expected = plain("add_norm", x, scale, shift, 1e-6, **options)
    torch.testing.assert_close(total.cpu(), expected_total)
    same(out, expected)


def test_add_norm_with_one_affine_for_all_rows() -> None:
    x, weight, bias = random(7, 96), random(1, 96, seed=1), random(1, 96, seed=2)
    found = kernels().add_norm(x, weight, bias, 1e-6, y=None, bias=None, gate=None, into=None)
    same(found[1], plain("add_norm", x, weight, bias, 1e-6)[1])


@pytest.mark.parametrize("into", FORMATS)
@pytest.mark.parametrize("width", [64, 70, 96, 120])
@pytest.mark.parametrize("with_bias", [False, True])
def test_gelu(into: Format | None, width: int, with_bias: bool) -> None:
    x, bias = 3 * random(5, width), random(width, seed=1) if with_bias else None
    same(kernels().gelu(x, bias, into), plain("gelu", x, bias, into))


@pytest.mark.parametrize("into", [f for f in FORMATS if f])
def test_to_rows8(into: Into) -> None:
    x = random(6, 100)
    x[2] = 0
    x[4, 7] = -50  # beyond what the fixed scale holds
    same(kernels().to_rows8(x, into), plain("to_rows8", x, into))


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
        q = function(*inputs, 1e-6, angles.to(device), keys, values, raw_keys=untouched if raw else None)
        return [x.cpu() for x in (q, *rings)]

    found, expected = run(kernels().heads, DEVICE), run(fused.heads, torch.device("cpu"))
    for f, e in zip(found, expected, strict=True):
        torch.testing.assert_close(f, e, rtol=1e-5, atol=1e-5)
    assert (found[3][:, tokens : 2 * tokens] != 7).any() == raw
    assert (found[1][:, :tokens] == 7).all() and (found[1][:, 2 * tokens :] == 7).all()


def scales(batch: int, count: int, size: int, parts: int = 3) -> Scales:
    """Of keys that stand apart from 0, in channels of which some are strong."""
    return Scales(
        random(batch, count, size, seed=4),
        random(batch, count, size, seed=5).exp(),
        torch.full((batch, parts, count), 7.0, device=DEVICE),
        random(batch, count, seed=6).abs() + 0.01,
    )


def near_whole(found: Tensor, expected: Tensor) -> None:
    """The same int8 numbers, but that one in a hundred may be a neighbour."""
    assert found.dtype == expected.dtype == torch.int8
    apart = (found.cpu().float() - expected.float()).abs()
    assert apart.max() <= 1 and (apart > 0).float().mean() < 0.01


@pytest.mark.parametrize("eight", [False, True])
@pytest.mark.parametrize("count", [3, 4])
def test_turned_keys_are_stored(count: int, eight: bool) -> None:
    keys = random(2, 6, count, 16)
    found, expected = (
        torch.full((2, 9, count, 16), 7.0).to(device, torch.int8 if eight else torch.float32)
        for device in (DEVICE, "cpu")
    )
    angles = rope_angles(torch.arange(2, device=DEVICE), 1, 3, 16)
    own = scales(2, count, 16) if eight else None
    kernels().store_turned(keys, angles, found[:, :6], own, 1)
    there = None if own is None else Scales(*(x.cpu().clone() for x in vars(scales(2, count, 16)).values()))
    fused.store_turned(keys.cpu(), angles.cpu(), expected[:, :6], there, 1)
    assert (found[:, 6:] == 7).all()
    if own is None or there is None:
        torch.testing.assert_close(found.cpu(), expected, rtol=1e-5, atol=1e-5)
        return
    near_whole(found, expected)
    torch.testing.assert_close(own.key.cpu(), there.key)
    assert (own.key[:, [0, 2]] == 7).all() and (own.key[:, 1] != 7).all()
    restored = found[:, :6].float() * own.key[:, 1][:, None, :, None]
    assert (restored - own.even(fused.rotate(keys, angles))).norm() / restored.norm() < 0.02


def test_values_have_room_for_later_chunks() -> None:
    """Values ten times those that set the scale are rounded as well as these."""
    keys, values = random(2, 24, 3, 64) + 3, random(2, 24, 3, 64, seed=1)
    own = scales(2, 3, 64)
    own.calibrate(keys, values)
    torch.testing.assert_close(own.key_mean, keys.mean(1))
    even = own.even(keys)
    assert even.abs().amax(1).allclose(torch.ones(()).to(DEVICE)), "every channel is as strong as any other"
    for larger in (1, 10):
        values8 = pack_values(larger * values.cpu(), None, 0, own.value.cpu())
        restored = unpack_values(values8, 24).to(DEVICE).float() * own.value[:, None, :, None]
        assert (restored - larger * values).norm() / (larger * values).norm() < 0.04


@pytest.mark.parametrize("raw", [False, True])
@pytest.mark.parametrize("batch", [1, 2])
def test_heads_in_8_bits(batch: int, raw: bool) -> None:
    """Queries at once, keys when the largest of them is known, into a slot of a ring whose neighbours stay."""
    tokens, count, size = 24, 3, 128
    width = count * size
    qkv, bias = random(batch, tokens, 3 * width), random(3 * width, seed=1)
    norms = random(width, seed=2), random(width, seed=3)
    angles = rope_angles(torch.arange(2) + 5, 3, 4, size).to(DEVICE)

    def run(module: Any, device: str, own: Scales) -> tuple[fused.Operands, Tensor, Tensor]:
        ring = torch.full((batch, 3 * tokens, count, size), 7, dtype=torch.int8, device=device)
        untouched = torch.full((batch, tokens, count, size), 7.0, device=device)
        inputs = [x.to(device) for x in (qkv, bias, *norms)]
        made = module.heads8(*inputs, 1e-6, angles.to(device), own, raw_keys=untouched if raw else None)
        module.store_keys(made.keys, made.largest, ring[:, tokens : 2 * tokens], own.key[:, 1])
        return made, ring, untouched

    keys, values = (torch.empty(batch, tokens, count, size) for _ in range(2))
    q = fused.heads(qkv.cpu(), bias.cpu(), *(x.cpu() for x in norms), 1e-6, angles.cpu(), keys, values)
    own = scales(batch, count, size)
    own.calibrate(keys.to(DEVICE), values.to(DEVICE))
    there = Scales(*(x.cpu().clone() for x in vars(own).values()))
    made, ring, raw_keys = run(kernels(), DEVICE, own)
    made2, ring2, raw2 = run(fused, "cpu", there)
    near_whole(made.q, made2.q)
    near_whole(ring, ring2)
    for f, e in ((made.q_scale, made2.q_scale), (made.largest, made2.largest), (own.key, there.key), (raw_keys, raw2)):
        torch.testing.assert_close(f.cpu(), e, rtol=1e-4, atol=1e-5)
    assert (ring[:, :tokens] == 7).all() and (ring[:, 2 * tokens :] == 7).all() and (raw_keys != 7).any() == raw
    # the scores are those of the exact heads, but for what the mean key adds to all of a query's
    q8 = made2.q.float() * made2.q_scale[..., None]
    k8 = ring2[:, tokens : 2 * tokens].float() * there.key[:, 1][:, None, :, None]
    scores, scores8 = (torch.einsum("bqhd,bkhd->bhqk", a, b) for a, b in ((q, keys), (q8, k8)))
    scores, scores8 = (x - x.mean(-1, keepdim=True) for x in (scores, scores8))
    assert (scores - scores8).norm() / scores.norm() < 0.03


@pytest.mark.parametrize("form", ["fp8", "int8"])
def test_linear8_is_the_product_of_the_restored_rows(form: Format) -> None:
    x, weight, bias = random(32, 64), random(48, 64, seed=1), random(48, seed=2)
    rows, columns = quantise(x, form), quantise(weight, form)
    expected = rows.restore() @ columns.restore().t() + bias
    found = linear8(rows, columns, bias, torch.bfloat16 if ON_GPU else torch.float32)
    assert (found.float() - expected).norm() / expected.norm() < (1e-2 if ON_GPU else 1e-5)
    exact = x @ weight.t() + bias
    assert (found.float() - exact).norm() / exact.norm() < {"fp8": 0.05, "int8": 0.02}[form]


@pytest.mark.gpu
def test_this_gpu_has_float8() -> None:
    assert fp8_rows_supported(DEVICE) == (torch.cuda.get_device_capability() >= (8, 9))
