"""The products of a transformer block in every form that `engine.transforms.low_bit` has: time, rate and error.

    python -m engine.bench.linear                          self-forcing-1.3b and krea-14b; mini on a CPU
    python -m engine.bench.linear ti2v-5b --tokens 4096

Each form is timed as it serves, on the tokens of a chunk: `us` is the product alone, on an input that the kernel before
has rounded already, `whole` has that rounding as a pass of its own, as after attention. TFLOP/s count all products of
2:4 weights, the left-out ones too. Beside it the share of the rate of a large bfloat16 product, measured in this run,
and the time of bfloat16 over this one. `error` is ||out - exact|| / ||exact||, exact in float32 on the operands before
rounding; for 2:4 on the pruned weight, since what pruning costs is the model's to learn. The last column says why the
device has no such product; then it is emulated, and its time means nothing.

The second table is for products that wait for their weights: a text encoder's, for prompts of various lengths.
"""

import argparse
import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from engine.assemble import best_device, best_dtype
from engine.bench.rollout import ceiling
from engine.config import PRESETS, Preset, QuantScheme
from engine.models.config import DiTConfig, TextConfig
from engine.ops.linear import first_line
from engine.ops.quant import Sparse24, tensors_of
from engine.ops.sparse import prune
from engine.timing import milliseconds
from engine.transforms.low_bit import Projection, WeightFormat, unsupported_reason
from engine.transforms.sparse_weights import faster_roles

FORMATS: tuple[tuple[str, WeightFormat, bool], ...] = (
    ("as it is", WeightFormat(), False),
    ("fp8, a scale a row", WeightFormat("fp8"), False),
    ("fp8, fixed input scale", WeightFormat("fp8"), True),
    ("fp8, a scale a tensor", WeightFormat("fp8-tensor"), False),
    ("fp8-tensor, fixed", WeightFormat("fp8-tensor"), True),
    ("int8", WeightFormat("int8"), False),
    ("2:4", WeightFormat(None, sparse=True), False),
    ("2:4 fp8", WeightFormat("fp8", sparse=True), False),
    ("2:4 fp8, fixed", WeightFormat("fp8", sparse=True), True),
    ("fp8 weights alone", WeightFormat("fp8-weights"), False),
    ("int8 weights alone", WeightFormat("int8-weights"), False),
    ("mxfp8", WeightFormat("mxfp8"), False),
    ("nvfp4", WeightFormat("nvfp4"), False),
)
"""Name, how the weight is held, whether the input's scale is fixed."""
SECONDS, WARM = 0.1, 0.1
"""What each figure takes on a GPU."""


@dataclass(frozen=True)
class Row:
    """One form at one shape: times in microseconds of a call, nan where it failed."""

    name: str
    us: float
    whole: float
    error: float
    fault: str | None

    def rate(self, flop: float) -> float:
        return flop / self.us * 1e6


def shapes(dit: DiTConfig) -> dict[str, tuple[int, int, int]]:
    """(K, N, how many of a block) by the roles that share a shape."""
    return {
        "qkv": (dit.dim, 3 * dit.dim, 1),
        "o, cross_q, cross_o": (dit.dim, dit.dim, 3),
        "up": (dit.dim, dit.ffn_dim, 1),
        "down": (dit.ffn_dim, dit.dim, 1),
    }


def text_shapes(text: TextConfig) -> dict[str, tuple[int, int]]:
    return {
        "q, k, v": (text.dim, text.num_heads * text.head_dim),
        "wi": (text.dim, text.ffn_dim),
        "wo": (text.ffn_dim, text.dim),
    }


def chunk_tokens(preset: Preset) -> int:
    cache = preset.cache()
    return cache.chunk * cache.rows * cache.columns


def measure(
    name: str,
    weight_format: WeightFormat,
    fixed: bool,
    weights: list[Tensor],
    inputs: list[Tensor],
    exact: Tensor | None = None,
) -> Row:
    """Time and error of a form over sets of operands; the first are exact's. Whatever fails is told, not raised."""
    device = inputs[0].device
    fault: str | None = None
    nan = float("nan")
    us, whole, error = nan, nan, nan
    try:
        projections = [Projection.from_weight(weight, weight_format) for weight in weights]
        fault = unsupported_reason(weight_format, device)
        if isinstance(first := projections[0].weight, Sparse24) and not first.compressed:
            fault = fault or "not in this shape or dtype"
        if fixed:
            for projection, x in zip(projections, inputs, strict=True):
                projection.start_calibration()
                projection(x)
                projection.finish_calibration()
        if exact is None:
            kept = prune(weights[0].float()) if weight_format.sparse else weights[0].float()
            exact = inputs[0][:512].float() @ kept.t()
        out = projections[0](inputs[0])[: len(exact)].float()
        error = float((out - exact).norm() / exact.norm())
        del out
        rounded = [
            p.quantised(x) if weight_format.input_format else x for p, x in zip(projections, inputs, strict=True)
        ]
        us = 1e3 * _time(projections, rounded)
        whole = 1e3 * _time(projections, inputs) if weight_format.input_format else us
    except Exception as problem:  # a compiler's, a library's: whatever it is, the table goes on
        fault = f"{type(problem).__name__}: {first_line(problem)}"
    return Row(name, us, whole, error, fault)


def _time(projections: list[Projection], inputs: list[Any]) -> float:
    work: list[Callable[[], Any]] = [partial(p, x) for p, x in zip(projections, inputs, strict=True)]
    return milliseconds(work, inputs[0].device if isinstance(inputs[0], Tensor) else inputs[0].data.device,
                        SECONDS, WARM)  # fmt: skip


def operands(tokens: int, depth: int, width: int, device: torch.device, dtype: torch.dtype) -> list[list[Tensor]]:
    """Weights and inputs, as many sets as the caches of a GPU do not hold."""
    size = (tokens * depth + width * depth) * dtype.itemsize
    count = max(1, min(6, round(150e6 / size))) if device.type == "cuda" else 1
    weights = [torch.randn(width, depth, device=device, dtype=dtype) / depth**0.5 for _ in range(count)]
    return [weights, [torch.randn(tokens, depth, device=device, dtype=dtype) for _ in range(count)]]


@torch.inference_mode()
def block(dit: DiTConfig, tokens: int, device: torch.device, dtype: torch.dtype, best: float) -> dict[str, list[Row]]:
    """Print and return every form at every shape of a block."""
    found: dict[str, list[Row]] = {}
    for roles, (depth, width, _) in shapes(dit).items():
        flop = 2.0 * tokens * depth * width
        weights, inputs = operands(tokens, depth, width, device, dtype)
        print(f"\n{roles}: {tokens} x {depth} -> {width}")
        print(f"{'':24}{'us':>9}{'whole':>9}{'TFLOP/s':>9}{'ceiling':>9}{'speed-up':>9}{'error':>9}")
        rows = []
        for name, weight_format, fixed in FORMATS:
            row = measure(name, weight_format, fixed, weights, inputs)
            rows.append(row)
            rate = row.rate(flop)
            print(
                f"{name:24}{row.us:9.1f}{row.whole:9.1f}{rate / 1e12:9.1f}{100 * rate / best:8.0f}%"
                f"{rows[0].us / row.us:8.2f}x{row.error:9.4f}  {row.fault or ''}",
                flush=True,
            )
        found[roles] = rows
    print("\nall six of a block, us: product, and with the rounding of what the kernel before cannot (o, cross_o)")
    for index, (name, weight_format, fixed) in enumerate(FORMATS):
        product = sum(count * found[roles][index].us for roles, (_, _, count) in shapes(dit).items())
        # no kernel before can round by the largest value of a whole matrix that is not known yet
        apart = (
            {"o, cross_q, cross_o": 2}
            if weight_format.scheme != "fp8-tensor" or fixed
            else {r: s[2] for r, s in shapes(dit).items()}
        )
        passes = sum(count * (found[roles][index].whole - found[roles][index].us) for roles, count in apart.items())
        print(f"{name:24}{product:9.1f}{product + passes:9.1f}")
    choices: tuple[tuple[str, QuantScheme | None, bool], ...] = (
        ("2:4", None, False), ("2:4 fp8", "fp8", False), ("2:4 fp8, fixed", "fp8", True),
    )  # fmt: skip
    for name, scheme, fixed in choices:
        faster = faster_roles(dit, tokens, scheme, device, dtype, fixed=fixed)
        print(f"`--sparse-weights` would keep {name} for: {', '.join(sorted(faster)) or 'none'}")
    return found


@torch.inference_mode()
def small(text: TextConfig, device: torch.device, dtype: torch.dtype) -> dict[str, list[Row]]:
    """Print and return weights alone in 8 bits against bfloat16, where the weights are most of what is read."""
    found: dict[str, list[Row]] = {}
    schemes: tuple[QuantScheme | None, ...] = (None, "fp8-weights", "int8-weights")
    print("\nproducts that wait for their weights, us (and GB/s of weights)")
    print(f"{'':30}" + "".join(f"{scheme or 'as it is':>20}" for scheme in schemes))
    lengths = (1, 16, 64, text.length) if device.type == "cuda" else (1, 16)
    for name, (depth, width) in text_shapes(text).items():
        for tokens in lengths:
            weights, inputs = operands(tokens, depth, width, device, dtype)
            rows = [measure(scheme or "as it is", WeightFormat(scheme), False, weights, inputs) for scheme in schemes]
            found[f"{name}, {tokens} tokens"] = rows
            sizes = [
                sum(x.nbytes for x in tensors_of(Projection.from_weight(weights[0], WeightFormat(scheme)).weight))
                for scheme in schemes
            ]
            cells = [f"{row.us:9.1f} ({size / row.us / 1e3:6.0f})" for row, size in zip(rows, sizes, strict=True)]
            print(f"{f'{name}: {tokens} x {depth} -> {width}':30}" + "".join(f"{x:>20}" for x in cells), flush=True)
            for row in rows:
                if row.fault:
                    print(f"    {row.name}: {row.fault}")
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("presets", nargs="*", metavar="preset", help=", ".join(sorted(PRESETS)))
    parser.add_argument("--tokens", type=int, help="rows (default: of a chunk)")
    parser.add_argument("--json", type=Path, help="write every figure here")
    options = parser.parse_args()
    if unknown := [name for name in options.presets if name not in PRESETS]:
        parser.error(f"there is no preset {', '.join(unknown)}: choose from {', '.join(sorted(PRESETS))}")
    if options.tokens is not None and options.tokens < 1:
        parser.error("--tokens must be at least 1")
    device = best_device()
    dtype, gpu = best_dtype(device), device.type == "cuda"
    names = options.presets or (["self-forcing-1.3b", "krea-14b"] if gpu else ["mini"])
    where = torch.cuda.get_device_name(device) if gpu else "CPU"
    best = ceiling(device, dtype, 1.0 if gpu else 0.1)
    print(f"{where}, {dtype}, torch {torch.__version__}, {time.strftime('%Y-%m-%d')}")
    print(f"ceiling, a large product: {best / 1e12:.3g} TFLOP/s")
    report: dict[str, Any] = {"device": where, "ceiling": best}
    for name in names:
        preset = PRESETS[name]
        print(f"\n{name}")
        rows = block(preset.dit, options.tokens or chunk_tokens(preset), device, dtype, best)
        report[name] = {roles: [asdict(row) for row in rows] for roles, rows in rows.items()}
    text = PRESETS[names[0]].text
    report["text"] = {roles: [asdict(row) for row in rows] for roles, rows in small(text, device, dtype).items()}
    if options.json:
        options.json.write_text(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
