"""From a loaded model to one that serves fast: every transform, in the one order that is legal.

Sparse weights, low-bit, fused with sparse attention, compile, CUDA graphs; scales are calibrated on what comes out
(`calibrate.py`).
"""

import argparse
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

import torch

from engine.config import KVPrecision, Preset, QuantScheme, Role
from engine.models.config import DiTConfig
from engine.models.dit import CausalWan
from engine.stream import pruned_heads as heads
from engine.stream.decoding import Decoder
from engine.stream.fused_cache import FusedCache
from engine.stream.kv_cache import KVCache
from engine.stream.pruned_heads import Heads
from engine.stream.rollout import Transformer
from engine.transforms.cuda_graphs import GraphedDecoder, GraphedWan
from engine.transforms.fused import FusedWan
from engine.transforms.low_bit import Policy, WeightFormat
from engine.transforms.sparse_weights import faster_roles, prune_weights


@dataclass(frozen=True)
class Speed:
    """What is done for speed. `Speed()` is the model as it is written."""

    fused: bool = False
    """The passes between matrix products fused, on a GPU by kernels; everything below needs it."""
    low_bit: QuantScheme | None = None
    """Projections of the blocks in fewer bits."""
    low_bit_attention: bool = False
    """Queries and keys in int8, values in float8."""
    keep: float = 1.0
    """Share of the past that each block of queries looks at; below 1, models should have been trained for it."""
    graphs: bool = False
    """Forwards and decoding as CUDA graphs, the decoder compiled."""
    context_pass: bool = True
    """Without it, what the last denoising step wrote is what later chunks see."""
    sparse_weights: frozenset[Role] | Literal["faster"] = frozenset()
    """Projections whose weights are 2:4 sparse, or those that are faster so on this device; models should have been
    trained for it."""
    fixed_scales: bool = False
    """Scales of the projections' inputs are found once, by `calibrate`, and not for every input."""
    pruned_heads: Heads = frozenset()
    """Heads of the self-attention that see the sink and the current chunk, and nothing of the past."""

    def __post_init__(self) -> None:
        if not 0 < self.keep <= 1:
            raise ValueError(f"keep must be above 0 and at most 1, got {self.keep}")
        needs = {
            "low_bit": self.low_bit is not None,
            "low_bit_attention": self.low_bit_attention,
            "keep": self.keep < 1,
            "graphs": self.graphs,
            "sparse_weights": bool(self.sparse_weights),
            "fixed_scales": self.fixed_scales,
            "pruned_heads": bool(self.pruned_heads),
        }
        if not self.fused and (asked := [name for name, used in needs.items() if used]):
            raise ValueError(f"{', '.join(asked)} can only be used together with the fused model")
        if self.sparse_weights:
            WeightFormat(self.low_bit, sparse=True)
        if self.fixed_scales and (self.low_bit is None or not WeightFormat(self.low_bit).scales_inputs):
            raise ValueError(f"fixed_scales need low_bit to round inputs by a scale, got low_bit {self.low_bit}")


def fastest_exact(device: torch.device) -> Speed:
    """What costs no exactness beyond rounding, for this device."""
    gpu = device.type == "cuda"
    return Speed(fused=gpu, graphs=gpu)


def from_arguments(options: argparse.Namespace, device: torch.device, dit: DiTConfig) -> Speed:
    """Raises ValueError where the options contradict each other, the device or the model's sizes."""
    exact = Speed() if options.plain else fastest_exact(device)
    if device.type == "cuda" and options.low_bit in ("fp8", "fp8-tensor"):
        capability = torch.cuda.get_device_capability(device)
        if capability < (8, 9):
            raise ValueError(f"{options.low_bit} needs compute capability 8.9, this GPU has {capability}: use int8")
    wanted = options.sparse_weights
    sparse: frozenset[Role] | Literal["faster"] = frozenset(wanted or ()) if wanted or wanted is None else "faster"
    pruned = frozenset() if options.pruned_heads is None else heads.load(options.pruned_heads, dit)
    coarse = options.low_bit is not None or options.low_bit_attention or options.keep != 1 or bool(sparse or pruned)
    return Speed(
        fused=exact.fused or (coarse and not options.plain),
        low_bit=options.low_bit,
        low_bit_attention=options.low_bit_attention,
        keep=options.keep,
        graphs=exact.graphs,
        context_pass=not options.no_context_pass,
        sparse_weights=sparse,
        fixed_scales=options.fixed_scales,
        pruned_heads=pruned,
    )


@dataclass(frozen=True)
class Served:
    """What a pipeline runs."""

    wan: CausalWan
    """The model as it is written, which holds the weights."""
    dit: Transformer
    """What is called in its place."""
    decoder: Decoder
    new_cache: Callable[[], KVCache]
    """Makes a cache for `dit`."""
    context_pass: bool = True
    policy: Policy = field(default_factory=Policy)
    """How the projections are held."""


def accelerate(
    wan: CausalWan,
    decoder: Decoder,
    preset: Preset,
    speed: Speed,
    *,
    kv_precision: KVPrecision = "exact",
    keep_on_host: bool = False,
    batch: int = 1,
) -> Served:
    """Apply `speed`. The model's weights may move, see `FusedWan`, and are pruned where they are to be sparse.

    Raises:
        ValueError: CUDA graphs without a GPU, two ways of keeping the cache at once, or pruned heads that the model
            does not have.
    """
    weight = wan.patch_embedding.weight
    device, dtype, config = weight.device, weight.dtype, preset.dit
    if not speed.fused:

        def new_cache() -> KVCache:
            return KVCache(
                preset.cache(),
                layers=config.num_layers,
                heads=config.num_heads,
                head_dim=config.head_dim,
                batch=batch,
                device=device,
                dtype=dtype,
                precision=kv_precision,
            )

        return Served(wan, wan, decoder, new_cache, speed.context_pass)
    if kv_precision != "exact":
        raise ValueError(f"a KV cache in {kv_precision} needs the unfused model: use low_bit_attention instead")
    if speed.graphs and device.type != "cuda":
        raise ValueError(f"CUDA graphs need a GPU, and the model is on the {device.type.upper()}")

    heads.check(speed.pruned_heads, config)

    def new_fused_cache() -> KVCache:
        return FusedCache(
            preset.cache(),
            config,
            batch=batch,
            device=device,
            dtype=dtype,
            low_bit=speed.low_bit_attention,
            keep=speed.keep,
            pruned=speed.pruned_heads,
        )

    sparse = speed.sparse_weights
    if sparse == "faster":
        cache = preset.cache()
        rows = batch * cache.chunk * cache.rows * cache.columns
        sparse = faster_roles(config, rows, speed.low_bit, device, dtype, fixed=speed.fixed_scales)
    policy = Policy(speed.low_bit, sparse=sparse)
    prune_weights(wan, policy)
    fused = FusedWan(wan, policy, keep_on_host=keep_on_host)
    if not speed.graphs:
        return Served(wan, fused, decoder, new_fused_cache, speed.context_pass, policy)
    decoder.network.compile(dynamic=False)
    return Served(wan, GraphedWan(fused), GraphedDecoder(decoder), new_fused_cache, speed.context_pass, policy)
