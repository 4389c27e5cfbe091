"""Merged LoRAs: the sum is right, removal is exact, and only what is touched changes."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from engine.checkpoints.lora import Lora, LoraLayer
from engine.transforms.lora import Adapters


def model(dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(0)
    made = nn.Sequential(nn.Linear(48, 64), nn.GELU(), nn.Linear(64, 40), nn.LayerNorm(40), nn.Linear(40, 8))
    return made.to(dtype).requires_grad_(False)


def lora(name: str, seed: int, layers: tuple[str, ...] = ("0", "2"), rank: int = 4) -> Lora:
    generator = torch.Generator().manual_seed(seed)
    sizes = {"0": (64, 48), "2": (40, 64), "4": (8, 40)}

    def factor(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator) / 8

    made = {layer: LoraLayer(factor(rank, sizes[layer][1]), factor(sizes[layer][0], rank), 0.5) for layer in layers}
    return Lora(name, made, {"3.bias": factor(40)})


def unmerged(base: nn.Module, active: list[tuple[Lora, float]], x: Tensor) -> Tensor:
    """The textbook form: a thin side path beside every linear layer."""
    for name, layer in base.named_children():
        y = layer(x)
        for one, strength in active:
            if name in one.layers:
                part = one.layers[name]
                y = y + strength * part.scale * F.linear(F.linear(x, part.down), part.up)
            if f"{name}.bias" in one.differences:
                y = y + strength * one.differences[f"{name}.bias"]
        x = y
    return x


def state(module: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in module.state_dict().items()}


def equal(a: dict[str, Tensor], b: dict[str, Tensor]) -> set[str]:
    return {name for name in a if torch.equal(a[name], b[name])}


def test_merged_is_unmerged() -> None:
    base, merged = model(), model()
    active = [(lora("a", 1), 0.7), (lora("b", 2, ("2", "4")), -1.3)]
    assert Adapters(merged).set(active)
    x = torch.randn(16, 48)
    expected = unmerged(base, active, x)
    assert (merged(x) - expected).abs().max() < 1e-5
    assert (base(x) - expected).abs().max() > 0.1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_removal_is_exact(dtype: torch.dtype) -> None:
    served = model(dtype)
    before, adapters = state(served), Adapters(served)
    a, b = lora("a", 1), lora("b", 2, ("2", "4"))
    for strengths in ([(a, 1.0)], [(a, 3.7), (b, -4.0)], [(b, 0.1)], [(a, 0.5)]):
        assert adapters.set(strengths)
    changed = before.keys() - equal(before, state(served))
    assert changed == {"0.weight", "2.weight", "3.bias"}
    assert adapters.set([])
    assert equal(before, state(served)) == before.keys()
    assert adapters.strengths == {}


def test_the_same_set_gives_the_same_bits() -> None:
    """However it was reached, and in whatever order it was given."""
    a, b, c = lora("a", 1), lora("b", 2), lora("c", 3)
    one, two = model(torch.bfloat16), model(torch.bfloat16)
    Adapters(one).set([(a, 0.3), (b, 0.9), (c, -0.7)])
    adapters = Adapters(two)
    for wanted in ([(c, 2.0)], [(b, 1.0), (a, 1.0)], [(c, -0.7), (b, 0.9), (a, 0.3)]):
        adapters.set(wanted)
    assert equal(state(one), state(two)) == state(one).keys()


def test_only_what_changes_is_written() -> None:
    served = model()
    adapters = Adapters(served)
    a, b = lora("a", 1, ("0",)), lora("b", 2, ("4",))
    addresses = {name: p.data_ptr() for name, p in served.named_parameters()}
    assert adapters.set([(a, 1.0), (b, 1.0)])
    versions = {name: p._version for name, p in served.named_parameters()}
    assert not adapters.set([(b, 1.0), (a, 1.0)])
    assert adapters.set([(a, 1.0), (b, 0.5)])
    assert {n for n, p in served.named_parameters() if p._version != versions[n]} == {"4.weight", "3.bias"}
    assert {name: p.data_ptr() for name, p in served.named_parameters()} == addresses


def test_strength_zero_is_kept_without_effect() -> None:
    served = model()
    before, adapters = state(served), Adapters(served)
    a = lora("a", 1)
    assert not adapters.set([(a, 0.0)])
    assert adapters.strengths == {"a": 0.0} and adapters.active["a"][0] is a
    assert adapters.set([(a, 1.0)]) and adapters.set([(a, 0.0)])
    assert equal(before, state(served)) == before.keys()


def test_a_failure_leaves_no_lora_applied(monkeypatch: pytest.MonkeyPatch) -> None:
    served = model()
    before, adapters = state(served), Adapters(served)
    adapters.set([(lora("a", 1), 1.0)])

    def out_of_memory(*_: object) -> Tensor:
        raise MemoryError

    wanted = [(lora("b", 2), 1.0)]
    monkeypatch.setattr(wanted[0][0].layers["2"].__class__, "delta", out_of_memory)
    with pytest.raises(MemoryError):
        adapters.set(wanted)
    assert equal(before, state(served)) == before.keys()
    assert adapters.strengths == {}
