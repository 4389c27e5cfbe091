"""From a loaded model to one that serves: every transform, in the one legal order.

Sparse weights, low-bit, fused (with its KV cache and sparse attention), compile, CUDA graphs. `Speed` says which, and
checks which may be combined; `accelerate` applies them. Fixed scales are calibrated afterwards, see `calibrate.py`.
"""

import argparse
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
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
    """Which transforms to apply. `Speed()` is the model as written.

    Raises:
        ValueError: options that cannot be combined; the message names them.
    """

    fused: bool = False
    """What lies between matrix products runs in fused passes, on a GPU by kernels."""
    low_bit: QuantScheme | None = None
    """Quantise the projections of the blocks."""
    kv_cache: KVPrecision = "exact"
    """Precision of past keys and values. With `int8-fp8` attention computes in 8 bits, too."""
    keep: float = 1.0
    """Share of the past that each block of queries attends to. Below 1, the model should have been trained for it."""
    graphs: bool = False
    """Run forwards and decoding as CUDA graphs, and compile the decoder."""
    context_pass: bool = True
    """If false, later chunks attend to the K and V that the last denoising step wrote."""
    sparse_weights: frozenset[Role] | Literal["faster"] = frozenset()
    """Projections whose weights become 2:4 sparse, or those that this makes faster on this device. The model should
    have been trained for it."""
    fixed_scales: bool = False
    """Find the scales of the projections' inputs once, by `calibrate`, instead of for every input."""
    pruned_heads: Heads = frozenset()
    """Heads of self-attention that attend to the sink and the current chunk only."""

    def __post_init__(self) -> None:
        if not 0 < self.keep <= 1:
            raise ValueError(f"keep must be above 0 and at most 1, got {self.keep}")
        needs_fused = {
            "low_bit": self.low_bit is not None,
            "kv_cache": self.kv_cache == "int8-fp8",
            "keep": self.keep < 1,
            "graphs": self.graphs,
            "sparse_weights": bool(self.sparse_weights),
            "fixed_scales": self.fixed_scales,
            "pruned_heads": bool(self.pruned_heads),
        }
        if not self.fused and (names := [name for name, used in needs_fused.items() if used]):
            raise ValueError(f"{', '.join(names)} can only be used together with the fused model")
        if self.fused and self.kv_cache in ("fp8", "int8"):
            raise ValueError(
                f"a KV cache in {self.kv_cache} needs the unfused model (--plain); --low-bit-attention halves the "
                "fused model's cache"
            )
        if self.sparse_weights:
            WeightFormat(self.low_bit, sparse=True)
        if self.fixed_scales and (self.low_bit is None or not WeightFormat(self.low_bit).scales_inputs):
            raise ValueError(f"fixed_scales need low_bit to round inputs by a scale, got low_bit {self.low_bit}")


def fastest_exact(device: torch.device) -> Speed:
    """The transforms that lose no precision beyond rounding, for this device."""
    gpu = device.type == "cuda"
    return Speed(fused=gpu, graphs=gpu)


def from_arguments(options: argparse.Namespace, device: torch.device, dit: DiTConfig) -> Speed:
    """The transforms that the options of `engine.options.add_speed` ask for.

    Raises:
        ValueError: they contradict each other, the device or the model's configuration.
    """
    exact = Speed() if options.plain else fastest_exact(device)
    if device.type == "cuda" and options.low_bit in ("fp8", "fp8-tensor"):
        capability = torch.cuda.get_device_capability(device)
        if capability < (8, 9):
            raise ValueError(f"{options.low_bit} needs compute capability 8.9, this GPU has {capability}: use int8")
    if options.low_bit_attention and options.kv_cache != "exact":
        raise ValueError("--low-bit-attention and --kv-cache exclude each other: both set the cache's precision")
    roles = options.sparse_weights  # None without the option, empty without names after it
    sparse: frozenset[Role] | Literal["faster"] = "faster" if roles == [] else frozenset(roles or ())
    pruned = frozenset() if options.pruned_heads is None else heads.load(options.pruned_heads, dit)
    lossy = options.low_bit is not None or options.low_bit_attention or options.keep != 1 or bool(sparse or pruned)
    return Speed(
        fused=exact.fused or (lossy and not options.plain),
        low_bit=options.low_bit,
        kv_cache="int8-fp8" if options.low_bit_attention else options.kv_cache,
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
    """The model as written, which holds the weights."""
    dit: Transformer
    """What is run instead of it, or itself."""
    decoder: Decoder
    new_cache: Callable[[], KVCache]
    """Makes a cache for `dit`."""
    context_pass: bool = True
    fused: FusedWan | None = None
    """The fused model, where there is one: itself, not its CUDA graphs."""
    policy: Policy = field(default_factory=Policy)
    """The formats of its projections."""


def accelerate(
    wan: CausalWan, decoder: Decoder, preset: Preset, speed: Speed, *, keep_on_host: bool = False, batch: int = 1
) -> Served:
    """Apply `speed` to a loaded model.

    Weights that become 2:4 sparse are pruned in place, and those that are quantised leave the device; `keep_on_host`
    then keeps them in host memory, so that LoRAs can change them. `batch` is the number of rows of a cache.

    Raises:
        ValueError: CUDA graphs without a GPU, pruned heads that the model does not have, or no context pass where the
            preset recomputes its context.
    """
    weight = wan.patch_embedding.weight
    device, dtype, config = weight.device, weight.dtype, preset.dit
    if speed.graphs and device.type != "cuda":
        raise ValueError(f"CUDA graphs need a GPU, and the model is on the {device.type.upper()}")
    if not speed.context_pass and preset.context == "recompute":
        raise ValueError(f"{preset.name} recomputes its context before every chunk: leave out --no-context-pass")
    heads.check(speed.pruned_heads, config)
    new_cache = partial(_new_cache, preset, speed, batch, device, dtype)
    if not speed.fused:
        return Served(wan, wan, decoder, new_cache, speed.context_pass)

    sparse = speed.sparse_weights
    if sparse == "faster":
        cache = preset.cache()
        rows = batch * cache.chunk * cache.rows * cache.columns
        sparse = faster_roles(config, rows, speed.low_bit, device, dtype, fixed=speed.fixed_scales)
    policy = Policy(speed.low_bit, sparse=sparse)
    prune_weights(wan, policy)
    fused = FusedWan(wan, policy, keep_on_host=keep_on_host)
    dit: Transformer = fused
    if speed.graphs:
        decoder.network.compile(dynamic=False)
        dit, decoder = GraphedWan(fused), GraphedDecoder(decoder)
    return Served(wan, dit, decoder, new_cache, speed.context_pass, fused, policy)


def _new_cache(preset: Preset, speed: Speed, batch: int, device: torch.device, dtype: torch.dtype) -> KVCache:
    config = preset.dit
    if not speed.fused:
        assert speed.kv_cache != "int8-fp8"
        return KVCache(
            preset.cache(),
            layers=config.num_layers,
            heads=config.num_heads,
            head_dim=config.head_dim,
            batch=batch,
            device=device,
            dtype=dtype,
            precision=speed.kv_cache,
        )
    return FusedCache(
        preset.cache(),
        config,
        batch=batch,
        device=device,
        dtype=dtype,
        low_bit=speed.kv_cache == "int8-fp8",
        keep=speed.keep,
        pruned=speed.pruned_heads,
    )
