"""Recorded forwards and decoding against the same ones launched kernel by kernel: on a GPU alone."""

from dataclasses import replace
from typing import get_args

import pytest
import torch
from torch import Tensor

from engine.config import ROLES, CacheConfig, QuantScheme
from engine.models.config import DiTConfig, LatentStatistics, LightVAEConfig
from engine.models.dit import CausalWan
from engine.models.light_vae import LightDecoder
from engine.ops import attention as references
from engine.ops import dispatch
from engine.stream.decoding import LightDecoding
from engine.stream.fused_cache import FusedCache
from engine.stream.kv_cache import KVCache
from engine.stream.pruned_heads import Heads
from engine.transforms.cuda_graphs import GraphedDecoder, GraphedWan
from engine.transforms.fused import FusedWan
from engine.transforms.low_bit import Policy

pytestmark = pytest.mark.gpu
DIT = DiTConfig(dim=384, ffn_dim=1024, num_heads=3, num_layers=2, text_dim=32, in_channels=4, out_channels=4)
CONFIG = CacheConfig(chunk=3, window=12, sink=3, rows=12, columns=18)
PRUNED: Heads = frozenset({(0, 1), (1, 0), (1, 1), (1, 2)})
"""One head of the first layer, and all of the second."""


def wan() -> CausalWan:
    torch.manual_seed(0)
    model = CausalWan(DIT)
    torch.nn.init.normal_(model.head.head.weight, std=0.1)
    return model.requires_grad_(False).to("cuda", torch.bfloat16)


@torch.inference_mode()
def roll(model: CausalWan | FusedWan | GraphedWan, caches: list[KVCache], chunks: int = 7) -> list[Tensor]:
    """Streams in turn, each with a text of its own, which changes half way."""
    generator = torch.Generator().manual_seed(1)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to("cuda", torch.bfloat16)

    contexts = [model.encode_text(normal(1, 5, DIT.text_dim)) for _ in caches]
    out = []
    for chunk in range(chunks):
        for index, cache in enumerate(caches):
            if chunk == 4:
                contexts[index] = model.encode_text(normal(1, 5, DIT.text_dim))
            x = normal(1, 4, 3, 24, 36)
            for t in (700.0, 0.0):
                out.append(model(x, torch.full((1, 3), t, device="cuda"), contexts[index], cache).float().cpu())
            cache.advance()
    return out


def caches(**options: object) -> list[KVCache]:
    return [FusedCache(CONFIG, DIT, device="cuda", dtype=torch.bfloat16, **options) for _ in range(2)]  # type: ignore[arg-type]


def error(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


def exact_caches() -> list[KVCache]:
    return [KVCache(CONFIG, layers=2, heads=3, head_dim=128, device="cuda", dtype=torch.bfloat16) for _ in range(2)]


def test_fused_kernels_give_the_models_flow() -> None:
    expected, found = roll(wan(), exact_caches()), roll(FusedWan(wan()), caches())
    assert max(error(f, e) for f, e in zip(found, expected, strict=True)) < 2e-2


@pytest.mark.parametrize(
    ("form", "options", "limit"),
    [
        ("fp8", {}, 0.08),
        ("int8", {}, 0.05),
        ("fp8-tensor", {}, 0.08),
        ("mxfp8", {}, 0.08),
        ("nvfp4", {}, 0.25),
        ("fp8-weights", {}, 0.06),
        ("int8-weights", {}, 0.04),
        (None, {"low_bit": True}, 0.08),
        (None, {"keep": 0.5}, 0.5),
        (None, {"pruned": PRUNED}, 0.5),
        ("fp8", {"low_bit": True, "keep": 0.5}, 0.5),
        ("fp8", {"low_bit": True, "keep": 0.5, "pruned": PRUNED}, 0.5),
    ],
)
def test_transforms_alone_and_together(form: str | None, options: dict[str, object], limit: float) -> None:
    expected = roll(wan(), exact_caches())
    found = roll(FusedWan(wan(), Policy(form)), caches(**options))  # type: ignore[arg-type]
    worst = max(error(f, e) for f, e in zip(found, expected, strict=True))
    assert 1e-4 < worst < limit


@pytest.mark.parametrize("options", [{}, {"low_bit": True}, {"keep": 0.5}, {"low_bit": True, "keep": 0.5}])
def test_kernels_see_with_pruned_heads_what_the_references_see(
    options: dict[str, object], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Up to the choice between blocks of nearly the same score, which rounding may turn."""
    found = roll(FusedWan(wan()), caches(pruned=PRUNED, **options))
    plain = caches(pruned=PRUNED, **options)
    for name in ("attend", "pool_blocks", "choose_blocks", "pack_values"):
        monkeypatch.setattr(dispatch, name, getattr(references, name))
    expected = roll(FusedWan(wan()), plain)
    worst = max(error(f, e) for f, e in zip(found, expected, strict=True))
    assert worst < (0.2 if "keep" in options else 3e-2)


@pytest.mark.parametrize(
    "policy",
    [
        *(Policy(form) for form in get_args(QuantScheme)),
        Policy(sparse=frozenset(ROLES)),
        Policy("fp8", sparse=frozenset(ROLES)),
    ],
)
def test_every_form_can_be_recorded(policy: Policy) -> None:
    model = FusedWan(wan(), policy)
    expected, found = roll(model, caches()), roll(GraphedWan(model), caches())
    assert all(torch.equal(f, e) for f, e in zip(found, expected, strict=True))


@pytest.mark.parametrize("options", [{}, {"low_bit": True}, {"keep": 0.5}, {"low_bit": True, "keep": 0.5}])
@pytest.mark.parametrize("pruned", [frozenset(), PRUNED])
def test_graphs_repeat_what_they_recorded(options: dict[str, object], pruned: Heads) -> None:
    model = FusedWan(wan(), Policy("fp8"))
    options = options | {"pruned": pruned}
    expected, found = roll(model, caches(**options)), roll(GraphedWan(model), caches(**options))
    assert all(torch.equal(f, e) for f, e in zip(found, expected, strict=True))


def test_a_cache_is_used_again() -> None:
    model = GraphedWan(FusedWan(wan()))
    places = caches()
    first = roll(model, places)
    for cache in places:
        cache.reset(0)
    assert all(torch.equal(a, b) for a, b in zip(first, roll(model, places), strict=True))


@torch.inference_mode()
def test_decoder() -> None:
    torch.manual_seed(0)
    config = replace(LightVAEConfig(), latent_channels=4)
    network = LightDecoder(config).to("cuda", torch.bfloat16).requires_grad_(False)
    plain = LightDecoding(network, LatentStatistics((0.0,) * 4, (1.0,) * 4))
    graphed = GraphedDecoder(plain)
    for _ in range(2):
        memories, carried = None, None
        for _ in range(3):
            latents = torch.randn(1, 4, 3, 16, 16, device="cuda")
            expected, memories = plain(latents, memories)
            found, carried = graphed(latents, carried)
            assert expected.shape == found.shape
            assert (expected.int() - found.int()).abs().max() <= 1
