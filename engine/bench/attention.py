"""Attention kernels at the shapes of a chunk: time, rate, ratio to cuDNN in the same run, and error.

    python -m engine.bench.attention                      the table
    python -m engine.bench.attention --tune --seconds 300 each mode's configurations, best first
    TRITON_INTERPRET=1 python -m engine.bench.attention --toy   the logic on a CPU; its times mean nothing

Each kernel first runs in a process of its own, because one that hangs or writes out of bounds would end the benchmark.
Times are medians of replays of a CUDA graph over two sets of inputs, after half a second of the same work, so that the
GPU is as warm as in a server. TFLOP/s count the blocks that are visited. Errors are ||out - exact|| / ||exact||
against float32 on the unquantised inputs, over the first head.
"""

import argparse
import itertools
import math
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from engine.ops import attention as reference
from engine.ops.attention import AttentionOperands, BlockLists
from engine.ops.quant import FORMAT_MAX, quantise, round_to_format
from engine.timing import milliseconds

Bind = Callable[["Inputs", int], Callable[[], Tensor]]
"""Binds a kernel to a set of inputs and its number."""
MODES = ("bf16 dense", "bf16 sparse", "8-bit dense", "8-bit sparse")


@dataclass
class Inputs:
    """One set of inputs in both precisions; v8 is packed."""

    q: Tensor
    k: Tensor
    v: Tensor
    q8: Tensor
    k8: Tensor
    v8: Tensor
    q_scale: Tensor
    k_scale: Tensor
    v_scale: Tensor


def make(batch: int, queries: int, keys: int, heads: int, dim: int, device: str, dtype: torch.dtype) -> Inputs:
    """Normal data with a few strong channels; k and v are views into a longer ring, as in a cache."""
    gain = torch.ones(3, heads, dim, device=device)
    for i in range(3):
        gain[i].view(-1)[torch.randperm(heads * dim, device=device)[: heads * dim // 32]] = 3.0
    q = torch.randn(batch, queries, heads, dim, device=device) * gain[0]
    ring = torch.randn(2, batch, keys + 64, heads, dim, device=device) * gain[1:, None, None]
    k, v = ring[0][:, :keys], ring[1][:, :keys]
    # as `KVScales` does: queries take the gain of the keys' channels
    channels = k.abs().amax(1)
    rows = quantise(q * channels[:, None], "int8")
    even = ring[0] / channels[:, None]
    k_scale = (even[:, :keys].abs().amax((1, 3)) / FORMAT_MAX["int8"]).contiguous()
    k8 = round_to_format(even, k_scale[:, None, :, None], "int8")
    v_scale = (v.abs().amax((1, 3)) / FORMAT_MAX["fp8"]).contiguous()
    v8 = round_to_format(v, v_scale[:, None, :, None], "fp8")
    ring = ring.to(dtype)
    return Inputs(
        q.to(dtype),
        ring[0][:, :keys],
        ring[1][:, :keys],
        rows.data,
        k8[:, :keys],
        reference.pack_values(v8),
        rows.scale[..., 0].contiguous(),
        k_scale,
        v_scale,
    )


def exact(x: Inputs, index: Tensor | None, head: int = 0) -> Tensor:
    """Float32 output of one head of the first batch, [Sq, dim]."""
    q, k, v = (t[0, :, head].float() for t in (x.q, x.k, x.v))
    scores = q @ k.T / math.sqrt(q.shape[-1])
    if index is not None:
        blocks = (k.shape[0] + 127) // 128
        kept = torch.zeros(index.shape[2], blocks, dtype=torch.bool, device=q.device)
        kept.scatter_(1, index[0, head].long(), True)
        mask = kept.repeat_interleave(128, 0)[: q.shape[0]].repeat_interleave(128, 1)[:, : k.shape[0]]
        scores.masked_fill_(~mask, -float("inf"))
    return scores.softmax(-1) @ v


def relative(out: Tensor, right: Tensor) -> float:
    """||out - right|| / ||right||."""
    return float((out.float() - right.float()).norm() / right.float().norm())


def operands(mode: str, x: Inputs, index: Tensor | None, visits: list[int] | None = None) -> AttentionOperands:
    """The operands of a mode, which reads the block lists if it is sparse."""
    blocks = BlockLists(index, visits) if index is not None and mode.endswith("sparse") else None
    if mode.startswith("8-bit"):
        return AttentionOperands(x.q8, x.k8, x.v8, x.q_scale, x.k_scale, x.v_scale, packed=True, blocks=blocks)
    return AttentionOperands(x.q, x.k, x.v, blocks=blocks)


def call(mode: str, x: Inputs, index: Tensor | None, config: Any = None) -> Tensor:
    """The kernel's result in a mode."""
    from engine.ops.triton import attention as kernels

    return kernels.attend_configured(operands(mode, x, index), config)


def random_lists(batch: int, heads: int, queries: int, keys: int, count: int, device: str) -> Tensor:
    scores = torch.rand(batch, heads, (queries + 127) // 128, (keys + 127) // 128, device=device)
    return scores.topk(count, -1).indices.sort(-1, descending=True).values.int().contiguous()


def candidates(mode: str) -> Iterator[Any]:
    """Configurations to try, the most promising first."""
    from engine.ops.triton.attention import Config

    eight = mode.startswith("8-bit")
    for persistent, turns, stages in itertools.product((True, False), (False, True), (4, 3, 2) if eight else (2,)):
        yield Config(specialized=True, persistent=persistent, stages=stages, turns=turns)
    if not mode.endswith("sparse"):
        for stages in (6, 4) if eight else (4, 3):
            yield Config(block_n=64, specialized=True, persistent=True, stages=stages)
    for bm, bn, warps, stages in [
        (128, 128, 8, 2),
        (128, 64, 8, 3),
        (128, 128, 8, 3),
        (64, 128, 4, 2),
        (64, 64, 4, 3),
        (128, 64, 8, 4),
    ]:
        for persistent in (False, True):
            yield Config(bm, bn, warps, stages, persistent)


def line(*cells: object) -> None:
    """Print a row of the table."""
    widths = (34, 10, 9, 8, 10)
    print(" ".join(f"{c!s:<{w}}" for c, w in zip(cells, widths, strict=False)), flush=True)


def check(mode: str, specialized: bool, device: str) -> None:
    """Compare small odd shapes with the reference, in memory filled with nan, so that unwritten results show."""
    from engine.ops.triton import attention as kernels

    eight = mode.startswith("8-bit")
    worst = 0.0
    shapes = [(2, 200, 600, 2, 128), (1, 4680, 4680, 3, 128), (1, 328, 1000, 2, 64)]
    if device == "cpu":
        shapes = [(2, 136, 200, 1, 64)]
    for batch, queries, keys, heads, dim in shapes:
        x = make(batch, queries, keys, heads, dim, device, torch.float16 if device == "cpu" else torch.bfloat16)
        index = random_lists(batch, heads, queries, keys, 2, device)
        shorter = [1 + head % 2 for head in range(heads)]
        for persistent in (False, True):
            config = kernels.Config(persistent=persistent, specialized=specialized, stages=2, turns=persistent)
            torch.full((1 << (14 if device == "cpu" else 26),), float("nan"), device=device)
            for visits in (None, shorter) if mode.endswith("sparse") else (None,):
                given = operands(mode, x, index, visits)
                out, right = kernels.attend_configured(given, config), reference.attend(given)
                worst = max(worst, relative(out, right))
    # in 8 bits the reference has the same inputs, so only the rounding of probabilities differs: the plain kernel does
    # it in another way
    limit = (0.1 if device == "cpu" else 4e-2 if specialized else 6e-2) if eight else 1e-2
    print(f"worst relative error {worst:.1e}, limit {limit}")
    if not worst < limit:
        raise SystemExit(1)


def trials(toy: bool) -> dict[tuple[str, bool], str]:
    """For each mode and kind of kernel, "" if `check` passes in a process of its own, otherwise the reason."""
    kinds = [(mode, specialized) for mode in MODES for specialized in ((False,) if toy else (True, False))]
    running = {
        kind: subprocess.Popen(
            [sys.executable, "-m", "engine.bench.attention", "--check", kind[0], *(["--specialized"] * kind[1])],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for kind in kinds
    }
    outcome = {}
    end = time.monotonic() + 150
    for kind, process in running.items():
        try:
            said, _ = process.communicate(timeout=max(1.0, end - time.monotonic()))
        except subprocess.TimeoutExpired:
            process.kill()
            said = "hangs"
        last = (said.strip().splitlines() or [""])[-1]
        outcome[kind] = "" if process.returncode == 0 else last[:300] or f"status {process.returncode}"
        print(f"check {kind[0]:<12} {'specialised' if kind[1] else 'plain':<12} {last[:200]}", flush=True)
    return outcome


def dense_sdpa(name: str) -> Callable[[Inputs], Callable[[], Tensor]]:
    """PyTorch's attention with one backend, `cudnn`, `flash` or `math`, to be bound to inputs."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    backend = {"cudnn": SDPBackend.CUDNN_ATTENTION, "flash": SDPBackend.FLASH_ATTENTION, "math": SDPBackend.MATH}[name]

    def bound(x: Inputs) -> Callable[[], Tensor]:
        def run() -> Tensor:
            with sdpa_kernel(backend):
                q, k, v = (t.transpose(1, 2) for t in (x.q, x.k, x.v))
                return F.scaled_dot_product_attention(q, k, v).transpose(1, 2)

        return run

    return bound


class Table:
    """One table: a row for each kernel on the same two sets of inputs, with its speed relative to cuDNN's."""

    def __init__(self, queries: int, keys: int, heads: int, device: str) -> None:
        self.device, self.queries, self.keys = device, queries, keys
        dim = 128 if device == "cuda" else 64
        dtype = torch.bfloat16 if device == "cuda" else torch.float16
        self.sets = [make(1, queries, keys, heads, dim, device, dtype) for _ in range(2)]
        self.blocks = math.ceil(keys / 128)
        self.flop = 4.0 * queries * keys * heads * dim
        past = (keys - queries) // 128
        self.current, self.keep = self.blocks - past, max(1, round(0.2 * past))
        self.always = torch.arange(self.blocks, device=device) >= past
        self.cudnn = 0.0
        """Milliseconds of the first row."""
        self._expected: dict[int, Tensor] = {}
        shape = f"q {queries}, kv {keys}, {heads} heads of {dim}"
        print(f"\n{shape}; {self.blocks} key blocks, {self.current} of the chunk itself")
        line("", "ms", "TFLOP/s", "x cuDNN", "error")

    def row(self, name: str, bind: Bind, lists: list[Tensor] | None = None) -> float:
        """Time and print one kernel; `lists` are the block lists of each set. Milliseconds, nan if it fails."""
        try:
            out = bind(self.sets[0], 0)()
            key = id(lists)
            if key not in self._expected:
                self._expected[key] = exact(self.sets[0], None if lists is None else lists[0])
            error = relative(out[0, :, 0], self._expected[key])
            ms = milliseconds([bind(x, i) for i, x in enumerate(self.sets)], self.device)
        except Exception as problem:
            line(name, f"{type(problem).__name__}: {str(problem).strip().splitlines()[-1:]}"[:200])
            return math.nan
        flop = self.flop * (1 if lists is None else lists[0].shape[-1] / self.blocks)
        ratio = f"{self.cudnn / ms:.2f}" if self.cudnn else ""
        line(name, f"{ms:.3f}", f"{flop / ms / 1e9:.0f}", ratio, f"{error:.1e}")
        return ms

    def baselines(self) -> None:
        """cuDNN, and on a GPU the two FlashAttention versions."""
        self.cudnn = self.row("SDPA cuDNN bf16", self.sdpa("cudnn"))
        if self.device != "cuda":
            return
        self.row("SDPA flash bf16", self.sdpa("flash"))
        try:
            from flash_attn.cute import flash_attn_func
        except ImportError as problem:
            line("FlashAttention-4", str(problem)[:80])
            return

        def fa4(x: Inputs) -> Tensor:
            out = flash_attn_func(x.q, x.k, x.v)
            return out[0] if isinstance(out, tuple) else out

        self.row("FlashAttention-4 bf16", lambda x, i: partial(fa4, x))

    def sdpa(self, backend: str) -> Bind:
        bound = dense_sdpa(backend if self.device == "cuda" else "math")
        return lambda x, i: bound(x)

    def kernels(self, broken: dict[tuple[str, bool], str]) -> None:
        """Our kernels in every mode, except those that failed `check`."""
        from engine.ops.triton import attention as kernels

        def choose(always: Tensor, keep: int, dense: int) -> list[Tensor]:
            pooled = [(kernels.pool_blocks(x.q), kernels.pool_blocks(x.k)) for x in self.sets]
            return [kernels.choose_blocks(q, k, always, keep, dense) for q, k in pooled]

        def bind(mode: str, config: Any, lists: list[Tensor] | None, x: Inputs, i: int) -> Callable[[], Tensor]:
            return partial(call, mode, x, None if lists is None else lists[i], config)

        sparse = {
            "80% of the past": choose(self.always, self.keep, self.current),
            "80% of all": choose(torch.zeros_like(self.always), round(0.2 * self.blocks), 0),
        }
        for mode in MODES:
            for specialized in (True, False) if self.device == "cuda" else (False,):
                kind = "specialised" if specialized else "plain"
                if broken[mode, specialized]:
                    line(f"{mode}, {kind}", f"left out: {broken[mode, specialized][:100]}")
                    continue
                config = kernels.CONFIGS[specialized, mode.startswith("8-bit"), mode.endswith("sparse")]
                if mode.endswith("dense"):
                    self.row(f"{mode}, {kind}", partial(bind, mode, config, None))
                    continue
                for what, lists in sparse.items():
                    self.row(f"{mode}, {what}, {kind}", partial(bind, mode, config, lists), lists)

    def costs(self) -> None:
        """The operators around sparse and 8-bit attention, and how often the kernel chooses the reference's blocks."""
        from engine.ops.triton import attention as kernels

        keep, current, start = self.keep, self.current, self.keys - self.queries
        pooled = [(kernels.pool_blocks(x.q), kernels.pool_blocks(x.k)) for x in self.sets]
        work: dict[str, list[Callable[[], Tensor]]] = {
            f"choose {keep} + {current} of {self.blocks}": [
                partial(kernels.choose_blocks, q, k, self.always, keep, current) for q, k in pooled
            ],
            "the same in torch": [
                partial(reference.choose_blocks, q, k, self.always, keep, current) for q, k in pooled
            ],
            "pool the chunk": [partial(kernels.pool_blocks, x.k[:, -self.queries :]) for x in self.sets],
            "pool all keys": [partial(kernels.pool_blocks, x.k) for x in self.sets],
            "pack the chunk's values in 8 bits": [
                partial(kernels.pack_values, x.v[:, -self.queries :], x.v8, start, x.v_scale) for x in self.sets
            ],
        }
        for name, calls in work.items():
            try:
                line(name, f"{milliseconds(calls, self.device):.4f}")
            except Exception as problem:
                line(name, f"{type(problem).__name__}: {str(problem)[:200]}")
        q, k = pooled[0]
        ours = kernels.choose_blocks(q, k, self.always, keep, current)
        same = float((ours == reference.choose_blocks(q, k, self.always, keep, current)).all(-1).float().mean())
        print(f"{100 * same:.1f}% of the lists equal the reference's")


def table(queries: int, keys: int, heads: int, device: str, broken: dict[tuple[str, bool], str]) -> None:
    """Print every row; `broken` says why a mode and kind of kernel failed `check`."""
    rows = Table(queries, keys, heads, device)
    rows.baselines()
    rows.kernels(broken)
    rows.costs()
    again = rows.row("SDPA cuDNN bf16, again", rows.sdpa("cudnn"))
    print(f"cuDNN moved by {100 * (again / rows.cudnn - 1):+.1f}% between first and last row")


def tune(
    queries: int, keys: int, heads: int, seconds: float, device: str, broken: dict[tuple[str, bool], str]
) -> dict[str, Any]:
    """Print each mode's configurations, best first, and return the best of each."""
    winners: dict[str, Any] = {}
    dim = 128 if device == "cuda" else 64
    sets = [make(1, queries, keys, heads, dim, device, torch.bfloat16 if device == "cuda" else torch.float16)] * 2
    blocks = math.ceil(keys / 128)
    index = random_lists(1, heads, queries, keys, max(1, blocks // 5), device)
    print(f"\ntuning at q {queries}, kv {keys}, {heads} heads; sparse visits {index.shape[-1]} of {blocks} blocks")
    for number, mode in enumerate(MODES):
        started = time.monotonic()
        right = exact(sets[0], index if mode.endswith("sparse") else None)
        flop = 4.0 * queries * keys * heads * dim * (index.shape[-1] / blocks if mode.endswith("sparse") else 1)
        found: list[tuple[float, float, Any]] = []
        left = 0
        for config in candidates(mode):
            if time.monotonic() - started > seconds / len(MODES):
                left += 1
                continue
            if broken.get((mode, config.specialized), ""):
                continue
            try:
                error = relative(call(mode, sets[0], index, config)[0, :, 0], right)
                work = [partial(call, mode, x, index, config) for x in sets]
                found.append((milliseconds(work, device, 0.15), error, config))
            except Exception as problem:
                print(f"  {mode} {config}: {type(problem).__name__} {str(problem).strip()[:120]!r}", flush=True)
        print(f"{number + 1}. {mode}: {len(found)} ran, {left} not reached")
        for ms, error, config in sorted(found, key=lambda f: f[0])[:8]:
            winners.setdefault(mode, config)
            print(f"  {ms:.3f} ms {flop / ms / 1e9:5.0f} TFLOP/s error {error:.1e} {config}", flush=True)
    return winners


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--toy", action="store_true", help="tiny shapes on a CPU, in Triton's interpreter")
    parser.add_argument("--tune", action="store_true", help="time configurations instead")
    parser.add_argument("--seconds", type=float, default=240, help="for all modes of --tune")
    parser.add_argument("--check", choices=MODES, help="one mode against the reference, and nothing else")
    parser.add_argument("--specialized", action="store_true", help="with --check: the Hopper kernel")
    options = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() and not options.toy else "cpu"
    if device == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
        raise SystemExit("without a GPU, set TRITON_INTERPRET=1")
    if options.check:
        check(options.check, options.specialized, device)
        return
    import triton

    where = torch.cuda.get_device_name() if device == "cuda" else "CPU, interpreted"
    print(f"{where}; torch {torch.__version__}, triton {triton.__version__}, {time.strftime('%Y-%m-%d')}")
    broken = trials(options.toy)
    shapes = [(4680, 18720, 12), (4680, 32760, 12), (4680, 18720, 40)] if device == "cuda" else [(136, 456, 2)]
    if options.tune:
        tune(*shapes[0], options.seconds, device, broken)
        return
    for shape in shapes:
        table(*shape, device, broken)


if __name__ == "__main__":
    main()
