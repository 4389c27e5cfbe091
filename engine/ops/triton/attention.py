"""Attention of a chunk's queries over the rolling cache, dense or over listed blocks, in 16 or 8 bits.

The references, which document the arguments, are the functions of the same names in `engine.ops.attention`.

`plan` divides the work: each program gets whole tiles of queries, and then an even share of the tiles that would have
filled the last round only partly. `_combine` sums a tile whose keys were shared among programs. With 444 tiles on 132
multiprocessors that takes 3.4 rounds instead of 4.

Softmax uses powers of two; the scales of 8-bit inputs are folded into its multiplier and into the final division, so
they cost nothing. 8-bit probabilities and their sum are scaled by 256. On Hopper they are computed without exponentials
(`engine.ops.triton.hopper`), from scores whose magnitude is below 2,000 powers of two.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from engine.ops.attention import BLOCK, AttentionOperands

PADDED_BLOCK = (64, 32)
"""Queries and keys in a tile of `padded_attention`."""
LOG2E = math.log2(math.e)


@dataclass(frozen=True)
class Config:
    """How a kernel runs: tile sizes, warps, pipeline stages, and whether programs process several tiles (persistent).

    specialized: use the warp-specialised kernel in `engine.ops.triton.hopper`, whose tiles have 128 queries.
    turns: its two warp groups take turns at the matrix unit.
    """

    block_m: int = 128
    block_n: int = 128
    warps: int = 8
    stages: int = 3
    persistent: bool = False
    specialized: bool = False
    turns: bool = False
    registers: int | None = None


CONFIGS: dict[tuple[bool, bool, bool], Config] = {
    # (Hopper, 8 bits, sparse)
    (True, False, False): Config(specialized=True, persistent=True, stages=2),
    (True, False, True): Config(specialized=True, persistent=True, stages=2, turns=True),
    (True, True, False): Config(specialized=True, persistent=True, stages=2, turns=True),
    (True, True, True): Config(specialized=True, persistent=True, stages=2, turns=True),
    (False, False, False): Config(stages=2),
    (False, False, True): Config(stages=2),
    (False, True, False): Config(stages=2),
    (False, True, True): Config(stages=2),
}


def plan(steps: Sequence[int], programs: int) -> tuple[list[list[list[int]]], list[list[int]]]:
    """Divide tiles among `programs`; `steps` has the number of steps of each tile.

    If all tiles are equal, each program gets the same number of whole tiles and an even share of the remaining steps;
    otherwise an even share of all steps.

    Returns:
        For each program, its segments [tile, first step, end, slot]; slot is -1 if the segment is a whole tile,
        otherwise the place of its partial sum. Every program has the same number of segments, padded with empty ones.
        And for each shared tile [tile, first slot, end of slots].
    """
    work: list[list[list[int]]] = [[] for _ in range(programs)]
    tiles, equal = len(steps), len(set(steps)) == 1
    whole = tiles // programs * programs if equal else 0
    for tile in range(whole):
        work[tile % programs].append([tile, 0, steps[tile], -1])
    shared = []
    slot, start, total = 0, 0, sum(steps[whole:])
    bounds = [total * i // programs for i in range(programs + 1)]
    for tile in range(whole, tiles):
        end = start + steps[tile]
        parts = [i for i in range(programs) if bounds[i] < end and bounds[i + 1] > start and bounds[i] < bounds[i + 1]]
        if len(parts) > 1:
            shared.append([tile, slot, slot + len(parts)])
        for i in parts:
            own = slot if len(parts) > 1 else -1
            work[i].append([tile, max(bounds[i], start) - start, min(bounds[i + 1], end) - start, own])
            slot += own >= 0
        start = end
    longest = max(len(segments) for segments in work)
    return [segments + [[0, 0, 0, -1]] * (longest - len(segments)) for segments in work], shared


@lru_cache(maxsize=256)
def _plan_on(
    device: torch.device, batch: int, heads: tuple[int, ...], tiles_q: int, programs: int | None
) -> tuple[Tensor, Tensor]:
    """`plan` as int32 tensors, for the steps per tile of each head; without `programs`, one program per tile.

    The first call copies from the host, so it must precede the capture of a CUDA graph.
    """
    steps = [count for count in heads for _ in range(tiles_q)] * batch
    work, shared = plan(steps, len(steps) if programs is None else min(programs, sum(steps)))
    return (
        torch.tensor(work, dtype=torch.int32, device=device),
        torch.tensor(shared, dtype=torch.int32, device=device).reshape(-1, 3),
    )


@triton.jit(do_not_specialize=["heads", "tiles_q", "queries", "keys", "listed", "segments"])
def _attend(
    q_desc,
    k_desc,
    v_desc,
    out,
    parts,
    stats,
    work,
    q_scale,
    k_scale,
    v_scale,
    out_scale,
    index,
    scale,
    heads,
    tiles_q,
    queries,
    keys,
    listed,
    segments,
    BM: tl.constexpr,
    BN: tl.constexpr,
    D: tl.constexpr,
    PACKED: tl.constexpr,
    SCALED_Q: tl.constexpr,
    SCALED_K: tl.constexpr,
    SCALED_V: tl.constexpr,
    SCALED_OUT: tl.constexpr,
    SPARSE: tl.constexpr,
    SHIFT: tl.constexpr,
):
    program = tl.program_id(0)
    HALVES: tl.constexpr = 128 // BN
    # the end of the keys can only be in these steps: the first one, or the block that is listed first
    EDGE: tl.constexpr = HALVES if SPARSE else 1
    rows = tl.arange(0, BM)
    columns = tl.arange(0, D)
    for segment in range(segments):
        entry = work + (program * segments + segment) * 4
        tile = tl.load(entry)
        first = tl.load(entry + 1)
        end = tl.load(entry + 2)
        slot = tl.load(entry + 3)
        if end > first:
            tile_q = tile % tiles_q
            head = (tile // tiles_q) % heads
            batch = tile // (tiles_q * heads)
            row = tile_q * BM + rows
            multiplier = tl.full([BM], 1.0, tl.float32) * scale
            if SCALED_K:
                multiplier = multiplier * tl.load(k_scale + batch * heads + head)
            if SCALED_Q:
                multiplier *= tl.load(q_scale + (batch * queries + row) * heads + head, mask=row < queries, other=1.0)
            blocks = index
            if SPARSE:
                listing = (batch * heads + head) * ((queries + 127) // 128) + tile_q * BM // 128
                blocks = index + listing * listed
            q = q_desc.load([batch, tile_q * BM, head, 0]).reshape(BM, D)
            m = tl.full([BM], -float("inf"), tl.float32)
            total = tl.zeros([BM], tl.float32)
            acc = tl.zeros([BM, D], tl.float32)
            edge = tl.minimum(first + EDGE, end)
            for step in range(first, edge):
                m, total, acc = _step(
                    q, k_desc, v_desc, blocks, step, keys, batch, head, multiplier, m, total, acc,
                    BN, D, PACKED, SPARSE, SHIFT, True,
                )  # fmt: skip
            for step in range(edge, end):
                m, total, acc = _step(
                    q, k_desc, v_desc, blocks, step, keys, batch, head, multiplier, m, total, acc,
                    BN, D, PACKED, SPARSE, SHIFT, False,
                )  # fmt: skip
            if slot < 0:
                acc = acc / tl.where(total > 0, total, 1.0)[:, None]
                if SCALED_V:
                    acc *= tl.load(v_scale + batch * heads + head)
                if SCALED_OUT:
                    acc = tl.minimum(tl.maximum(acc / tl.load(out_scale), -448.0), 448.0)
                at = ((batch * queries + row).to(tl.int64) * heads + head) * D
                inside = (row < queries)[:, None] & (columns < D)[None, :]
                tl.store(out + at[:, None] + columns[None, :], acc.to(out.dtype.element_ty), mask=inside)
            else:
                tl.store(stats + slot * 2 * BM + rows, m)
                tl.store(stats + slot * 2 * BM + BM + rows, total)
                tl.store(parts + slot * (BM * D) + rows[:, None] * D + columns[None, :], acc)


@triton.jit
def _step(
    q,
    k_desc,
    v_desc,
    blocks,
    step,
    keys,
    batch,
    head,
    multiplier,
    m,
    total,
    acc,
    BN: tl.constexpr,
    D: tl.constexpr,
    PACKED: tl.constexpr,
    SPARSE: tl.constexpr,
    SHIFT: tl.constexpr,
    MASKED: tl.constexpr,
):
    """Add one tile of keys to the running maximum m, sum and weighted sum of values."""
    BM: tl.constexpr = q.shape[0]
    if SPARSE:
        HALVES: tl.constexpr = 128 // BN
        at = (tl.load(blocks + step // HALVES) * HALVES + step % HALVES) * BN
    else:
        # backwards, so that only a first step meets the end of the keys
        at = ((keys + BN - 1) // BN - 1 - step) * BN
    k = k_desc.load([batch, at, head, 0]).reshape(BN, D)
    s = tl.dot(q, k.T).to(tl.float32) * multiplier[:, None]
    if MASKED:
        s = tl.where((at + tl.arange(0, BN) < keys)[None, :], s, -float("inf"))
    new = tl.maximum(m, tl.max(s, 1))
    p = tl.exp2(s - (new - SHIFT)[:, None])
    alpha = tl.exp2(m - new)
    total = total * alpha + tl.sum(p, 1)
    if PACKED:
        p = p.reshape(BM, BN // 16, 2, 4, 2).permute(0, 1, 3, 2, 4).reshape(BM, BN)
        v = v_desc.load([batch, head, 0, at]).reshape(D, BN).T
        # the hardware accumulates 8-bit products in few bits: sum each tile separately, and the sums in float32
        acc = acc * alpha[:, None] + tl.dot(p.to(v.dtype), v)
    else:
        v = v_desc.load([batch, at, head, 0]).reshape(BN, D)
        acc = tl.dot(p.to(v.dtype), v, acc * alpha[:, None])
    return new, total, acc


@triton.jit
def _combine(
    parts,
    stats,
    shared,
    v_scale,
    out_scale,
    out,
    heads,
    tiles_q,
    queries,
    BM: tl.constexpr,
    D: tl.constexpr,
    ROWS: tl.constexpr,
    SCALED_V: tl.constexpr,
    SCALED_OUT: tl.constexpr,
):
    """Sum the parts of one shared tile, ROWS rows per program."""
    entry = shared + tl.program_id(0) * 3
    tile = tl.load(entry)
    first = tl.load(entry + 1)
    end = tl.load(entry + 2)
    rows = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    columns = tl.arange(0, D)
    m = tl.full([ROWS], -float("inf"), tl.float32)
    for slot in range(first, end):
        m = tl.maximum(m, tl.load(stats + slot * 2 * BM + rows))
    # if no part had a key, every weight is 0, not NaN
    m = tl.where(m == -float("inf"), 0.0, m)
    total = tl.zeros([ROWS], tl.float32)
    acc = tl.zeros([ROWS, D], tl.float32)
    for slot in range(first, end):
        weight = tl.exp2(tl.load(stats + slot * 2 * BM + rows) - m)
        total += weight * tl.load(stats + slot * 2 * BM + BM + rows)
        acc += weight[:, None] * tl.load(parts + slot * (BM * D) + rows[:, None] * D + columns[None, :])
    head = (tile // tiles_q) % heads
    batch = tile // (tiles_q * heads)
    row = (tile % tiles_q) * BM + rows
    acc = acc / tl.where(total > 0, total, 1.0)[:, None]
    if SCALED_V:
        acc *= tl.load(v_scale + batch * heads + head)
    if SCALED_OUT:
        acc = tl.minimum(tl.maximum(acc / tl.load(out_scale), -448.0), 448.0)
    at = ((batch * queries + row).to(tl.int64) * heads + head) * D
    inside = (row < queries)[:, None] & (columns < D)[None, :]
    tl.store(out + at[:, None] + columns[None, :], acc.to(out.dtype.element_ty), mask=inside)


def attend(operands: AttentionOperands) -> Tensor:
    """See `engine.ops.attention.attend`. 8-bit values that are not packed are packed first, in a pass of its own."""
    return attend_configured(operands, None)


def attend_configured(operands: AttentionOperands, config: Config | None) -> Tensor:
    """`attend` with a given configuration, for benchmarks and tests; None for the fastest known one.

    Raises:
        ValueError: dtypes, shapes or the configuration are not supported; the message says which.
    """
    q, k, v = operands.q, operands.k, operands.v
    eight, packed, blocks = operands.eight_bit, operands.packed, operands.blocks
    batch, queries, heads, dim = q.shape
    keys = k.shape[1]
    if eight and not packed:
        v, packed = pack_values(v), True
    # the Hopper kernel has no float32 form
    hopper = _is_hopper(q.device) and q.element_size() < 4
    config = config or CONFIGS[hopper, eight, blocks is not None]
    _check(operands, v, packed, config)
    bm, bn = config.block_m, config.block_n
    tiles_q = triton.cdiv(queries, bm)
    steps = triton.cdiv(keys, bn) if blocks is None else blocks.index.shape[-1] * (BLOCK // bn)
    visits = None if blocks is None else blocks.visits
    per_head = (steps,) * heads if visits is None else tuple(count * (BLOCK // bn) for count in visits)
    if min(per_head) < 1 or max(per_head) > steps:
        raise ValueError(f"every head visits 1 to {steps // max(BLOCK // bn, 1)} blocks, got {visits}")
    programs = _multiprocessors(q.device) if config.persistent else None
    work, shared = _plan_on(q.device, batch, per_head, tiles_q, programs)
    slots = int(shared.shape[0]) + work.shape[0] if len(shared) else 1
    out = torch.empty(q.shape, dtype=operands.result_dtype, device=q.device)
    parts = torch.empty((slots, bm, dim), dtype=torch.float32, device=q.device)
    stats = torch.empty((slots, 2, bm), dtype=torch.float32, device=q.device)
    scales = {name: getattr(operands, name) for name in ("q_scale", "k_scale", "v_scale", "out_scale")}
    arguments = {"out": out, "parts": parts, "stats": stats, "work": work, **scales}
    arguments |= {"index": None if blocks is None else blocks.index, "scale": LOG2E / math.sqrt(dim)}
    arguments |= {"heads": heads, "tiles_q": tiles_q, "queries": queries, "keys": keys, "segments": work.shape[1]}
    arguments |= {"listed": 0 if blocks is None else blocks.index.shape[-1], "BN": bn, "D": dim, "PACKED": packed}
    arguments |= {f"SCALED_{name.removesuffix('_scale').upper()}": scale is not None for name, scale in scales.items()}
    arguments |= {"SPARSE": blocks is not None, "SHIFT": 8.0 if eight else 0.0}
    launch = _launch_specialized if config.specialized else _launch
    launch(config, (q, k, v), arguments)
    if len(shared):
        rows = 16
        _combine[(len(shared), bm // rows)](
            parts, stats, shared, scales["v_scale"], scales["out_scale"], out, heads, tiles_q, queries,
            BM=bm, D=dim, ROWS=rows, SCALED_V=arguments["SCALED_V"], SCALED_OUT=arguments["SCALED_OUT"], num_warps=4,
        )  # fmt: skip
    return out


def _check(operands: AttentionOperands, v: Tensor, packed: bool, config: Config) -> None:
    """Raises ValueError for what the kernels do not support; `v` are the values as they will be read."""
    q, k, blocks = operands.q, operands.k, operands.blocks
    if operands.eight_bit and (q.dtype, k.dtype, v.dtype) != (torch.int8, torch.int8, torch.float8_e4m3fn):
        raise ValueError(f"in 8 bits queries and keys are int8, values float8: got {q.dtype}, {k.dtype}, {v.dtype}")
    if packed and not operands.eight_bit:
        raise ValueError("packed values are for 8-bit attention")
    if config.specialized and (config.block_m != BLOCK or (blocks is not None and config.block_n != BLOCK)):
        raise ValueError(f"the specialised kernel has tiles of {BLOCK} queries, and visits whole blocks: {config}")
    if v.shape[-1 if packed else 1] < k.shape[1]:
        raise ValueError(f"{k.shape[1]} keys, but values {list(v.shape)}")
    for scale in (operands.q_scale, operands.k_scale, operands.v_scale, operands.out_scale):
        if scale is not None and not (scale.is_contiguous() and scale.dtype == torch.float32):
            raise ValueError("scales are contiguous float32")
    if blocks is not None and not (blocks.index.is_contiguous() and blocks.index.dtype == torch.int32):
        raise ValueError("index is contiguous int32")


def _blocks(config: Config, dim: int, packed: bool, rows: int) -> tuple[list[int], list[int], list[int]]:
    """Shapes of the tiles of q, k and v that one copy loads."""
    bn = config.block_n
    return [1, rows, 1, dim], [1, bn, 1, dim], [1, 1, dim, bn] if packed else [1, bn, 1, dim]


def _launch(config: Config, inputs: tuple[Tensor, Tensor, Tensor], arguments: dict[str, Any]) -> None:
    blocks = _blocks(config, arguments["D"], arguments["PACKED"], config.block_m)
    _attend[(arguments["work"].shape[0],)](
        *(TensorDescriptor(x, list(x.shape), list(x.stride()), block) for x, block in zip(inputs, blocks, strict=True)),
        **arguments,
        BM=config.block_m,
        num_warps=config.warps,
        num_stages=config.stages,
        **({} if config.registers is None else {"maxnreg": config.registers}),
    )


def _launch_specialized(config: Config, inputs: tuple[Tensor, Tensor, Tensor], arguments: dict[str, Any]) -> None:
    from triton.experimental.gluon import language as gl
    from triton.experimental.gluon.nvidia.hopper import TensorDescriptor as LaidOutDescriptor

    from engine.ops.triton import hopper

    element = {
        torch.bfloat16: gl.bfloat16,
        torch.float16: gl.float16,
        torch.float8_e4m3fn: gl.float8e4nv,
        torch.int8: gl.int8,
    }
    blocks = _blocks(config, arguments["D"], arguments["PACKED"], 64)
    unused = dict.fromkeys(("q_scale", "k_scale", "v_scale", "out_scale"), "stats") | {"index": "work"}
    pointers = {name: arguments[other] for name, other in unused.items() if arguments[name] is None}
    hopper.attend[(arguments["work"].shape[0],)](
        *(
            LaidOutDescriptor(
                x,
                list(x.shape),
                list(x.stride()),
                block,
                gl.NVMMASharedLayout.get_default_for(block, element[x.dtype]),
            )
            for x, block in zip(inputs, blocks, strict=True)
        ),
        **(arguments | pointers),
        STAGES=config.stages,
        TURNS=config.turns,
        num_warps=4,
    )


@lru_cache(maxsize=8)
def _is_hopper(device: torch.device) -> bool:
    return not triton.knobs.runtime.interpret and torch.cuda.get_device_capability(device)[0] == 9


@lru_cache(maxsize=8)
def _multiprocessors(device: torch.device) -> int:
    if triton.knobs.runtime.interpret:
        return 3
    return torch.cuda.get_device_properties(device).multi_processor_count


@triton.jit
def _padded_attention(
    q, k, v, out, lengths, out_scale, scale, queries, keys, heads, key_batch, key_token, value_batch, value_token,
    BM: tl.constexpr, BN: tl.constexpr, D: tl.constexpr, PRECISION: tl.constexpr, SCALED_OUT: tl.constexpr,
):  # fmt: skip
    head, batch = tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    row = tl.program_id(0) * BM + tl.arange(0, BM)
    column = tl.arange(0, D)
    # the padding is one more key, weighted by the number of padding tokens
    length = tl.load(lengths + batch)
    seen = tl.minimum(length + 1, keys)
    often = tl.log2(tl.maximum(keys - length, 1).to(tl.float32))
    first = (batch * queries * heads + head) * D
    at = row[:, None] * (heads * D) + column[None, :]
    inside = (row < queries)[:, None]
    x = tl.load(q + first + at, mask=inside, other=0.0)
    k += batch * key_batch + head * D
    v += batch * value_batch + head * D
    m = tl.full([BM], -float("inf"), tl.float32)
    total = tl.zeros([BM], tl.float32)
    acc = tl.zeros([BM, D], tl.float32)
    for start in range(0, seen, BN):
        token = start + tl.arange(0, BN)
        there = token < seen
        tile = tl.load(k + token[:, None] * key_token + column[None, :], mask=there[:, None], other=0.0)
        s = tl.dot(x, tile.T, input_precision=PRECISION) * scale
        s += tl.where(there, tl.where(token == length, often, 0.0), -float("inf"))[None, :]
        new = tl.maximum(m, tl.max(s, 1))
        p = tl.exp2(s - new[:, None])
        alpha = tl.exp2(m - new)
        total = total * alpha + tl.sum(p, 1)
        tile = tl.load(v + token[:, None] * value_token + column[None, :], mask=there[:, None], other=0.0)
        acc = tl.dot(p.to(tile.dtype), tile, acc * alpha[:, None], input_precision=PRECISION)
        m = new
    acc /= total[:, None]
    if SCALED_OUT:
        acc = tl.minimum(tl.maximum(acc / tl.load(out_scale), -448.0), 448.0)
    tl.store(out + first + at, acc.to(out.dtype.element_ty), mask=inside)


def padded_attention(q: Tensor, k: Tensor, v: Tensor, lengths: Tensor, out_scale: Tensor | None = None) -> Tensor:
    """See `engine.ops.attention.padded_attention`."""
    batch, queries, heads, dim = q.shape
    assert q.is_contiguous() and k.stride(3) == v.stride(3) == 1 and k.stride(2) == v.stride(2) == dim
    out = torch.empty_like(q, dtype=q.dtype if out_scale is None else torch.float8_e4m3fn)
    _padded_attention[(triton.cdiv(queries, PADDED_BLOCK[0]), heads, batch)](
        q, k, v, out, lengths, out_scale, LOG2E / math.sqrt(dim), queries, k.shape[1], heads,
        k.stride(0), k.stride(1), v.stride(0), v.stride(1),
        BM=PADDED_BLOCK[0], BN=PADDED_BLOCK[1], D=dim,
        PRECISION="ieee" if q.dtype == torch.float32 else "tf32", SCALED_OUT=out_scale is not None,
        num_warps=4, num_stages=2,
    )  # fmt: skip
    return out


@triton.jit(do_not_specialize=["tokens", "start"])
def _pack(
    v, bias, out, scale, batch_v, token_v, head_v, batch_o, head_o, dim_o, heads, tokens, start,
    D: tl.constexpr, TOKENS: tl.constexpr, BIAS: tl.constexpr, SCALED: tl.constexpr,
):  # fmt: skip
    """TOKENS columns of one head's packed values, transposed in registers and written as whole rows."""
    batch, head = tl.program_id(2).to(tl.int64), tl.program_id(1).to(tl.int64)
    # tiles begin at a multiple of 16 tokens, even if the chunk does not
    base = start // 16 * 16 + tl.program_id(0).to(tl.int64) * TOKENS
    token = base - start + tl.arange(0, TOKENS)
    columns = tl.arange(0, D)
    inside = ((token >= 0) & (token < tokens))[:, None] & (columns < D)[None, :]
    source = v + batch * batch_v + head * head_v + token.to(tl.int64)[:, None] * token_v + columns[None, :]
    x = tl.load(source, mask=inside, other=0)
    if BIAS:
        x = x.to(tl.float32) + tl.load(bias + head * D + columns).to(tl.float32)[None, :]
    if SCALED:
        x = x.to(tl.float32) / tl.load(scale + batch * heads + head)
        x = tl.minimum(tl.maximum(x, -448.0), 448.0).to(out.dtype.element_ty)
    x = x.T.reshape(D, TOKENS // 16, 2, 4, 2).permute(0, 1, 3, 2, 4).reshape(D, TOKENS)
    at = tl.arange(0, TOKENS)
    target = out + batch * batch_o + head * head_o + columns.to(tl.int64)[:, None] * dim_o + (base + at)[None, :]
    if (base >= start) & (base + TOKENS <= start + tokens):
        tl.store(target, x)
    else:
        # the token of each column: the inverse of the packing order
        mine = base - start + ((at & ~15) | ((at & 2) << 2) | ((at & 12) >> 1) | (at & 1))
        tl.store(target, x, mask=((mine >= 0) & (mine < tokens))[None, :] & (columns < D)[:, None])


def pack_values(
    v: Tensor,
    out: Tensor | None = None,
    start: int = 0,
    scale: Tensor | None = None,
    bias: Tensor | None = None,
) -> Tensor:
    """See `engine.ops.attention.pack_values`."""
    batch, tokens, heads, dim = v.shape
    if out is None:
        dtype = v.dtype if scale is None else torch.float8_e4m3fn
        size = triton.cdiv(start + tokens, 16) * 16
        out = torch.zeros((batch, heads, dim, size), dtype=dtype, device=v.device)
    if bias is not None and (scale is None or not bias.is_contiguous()):
        raise ValueError("a bias is contiguous, and added to values that are to be scaled")
    # 8-bit floats are copied as integers
    moved = scale is None and v.element_size() == 1
    size = 64
    _pack[(triton.cdiv(start % 16 + tokens, size), heads, batch)](
        v.view(torch.uint8) if moved else v, bias, out.view(torch.uint8) if moved else out, scale,
        v.stride(0), v.stride(1), v.stride(2), out.stride(0), out.stride(1), out.stride(2), heads, tokens, start,
        D=dim, TOKENS=size, BIAS=bias is not None, SCALED=scale is not None, num_warps=4,
    )  # fmt: skip
    return out


@triton.jit
def _pool_blocks(x, out, batch_x, token_x, head_x, tokens, heads, D: tl.constexpr, BLOCK: tl.constexpr):
    block, head, batch = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    token = block * BLOCK + tl.arange(0, BLOCK)
    columns = tl.arange(0, D)
    inside = (token < tokens)[:, None] & (columns < D)[None, :]
    source = x + batch * batch_x + head * head_x + token.to(tl.int64)[:, None] * token_x + columns[None, :]
    total = tl.sum(tl.load(source, mask=inside, other=0.0).to(tl.float32), 0)
    size = tl.minimum(tokens - block * BLOCK, BLOCK).to(tl.float32)
    tl.store(out + ((batch * tl.num_programs(0) + block) * heads + head) * D + columns, total / size)


def pool_blocks(x: Tensor, block: int = BLOCK) -> Tensor:
    """See `engine.ops.attention.pool_blocks`."""
    batch, tokens, heads, dim = x.shape
    blocks = triton.cdiv(tokens, block)
    out = torch.empty((batch, blocks, heads, dim), dtype=torch.float32, device=x.device)
    _pool_blocks[(blocks, heads, batch)](
        x, out, x.stride(0), x.stride(1), x.stride(2), tokens, heads, D=dim, BLOCK=block, num_warps=4
    )
    return out


@triton.jit
def _choose(
    pooled_q, pooled_k, always, out, heads, nq, nk, chosen,
    D: tl.constexpr, NK: tl.constexpr, DK: tl.constexpr,
):  # fmt: skip
    """One query block of one head. The lowest score that is kept is found bit by bit, by counting, in one warp, so that
    no count waits at a barrier."""
    row, head, batch = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    block = tl.arange(0, NK)
    score = tl.zeros([NK], tl.float32)
    for start in range(0, D, DK):
        d = start + tl.arange(0, DK)
        q = tl.load(pooled_q + ((batch * nq + row) * heads + head) * D + d)
        at = ((batch * nk + block) * heads + head)[:, None] * D + d[None, :]
        k = tl.load(pooled_k + at, mask=(block < nk)[:, None], other=0.0)
        score += tl.sum(k * q[None, :], 1)
    # an int32 that orders as the float does
    bits = score.to(tl.int32, bitcast=True)
    key = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    forced = tl.load(always + block, mask=block < nk, other=0) != 0
    key = tl.where(forced, 2147483647, key)
    key = tl.where(block < nk, key, -2147483648)
    last = tl.where(tl.sum((key >= 0).to(tl.int32), 0) >= chosen, 0, -2147483648)
    for i in range(31):
        trial = last + (1 << (30 - i))
        last = tl.where(tl.sum((key >= trial).to(tl.int32), 0) >= chosen, trial, last)
    above = key > last
    level = key == last
    room = chosen - tl.sum(above.to(tl.int32), 0)
    taken = above | (level & (tl.cumsum(level.to(tl.int32), 0) <= room))
    place = chosen - tl.cumsum(taken.to(tl.int32), 0)
    target = out + ((batch * heads + head) * nq + row) * chosen + place
    tl.store(target, block, mask=taken)


def choose_blocks(pooled_q: Tensor, pooled_k: Tensor, always: Tensor, keep: int, dense: int) -> Tensor:
    """See `engine.ops.attention.choose_blocks`. At most 1024 key blocks."""
    batch, nq, heads, dim = pooled_q.shape
    nk = pooled_k.shape[1]
    if dense + keep > nk:
        raise ValueError(f"{dense} + {keep} blocks are asked for, of {nk}")
    out = torch.empty((batch, heads, nq, dense + keep), dtype=torch.int32, device=pooled_q.device)
    size = max(32, triton.next_power_of_2(nk))
    _choose[(nq, heads, batch)](
        pooled_q,
        pooled_k,
        always,
        out,
        heads,
        nq,
        nk,
        dense + keep,
        D=dim,
        NK=size,
        DK=16,
        num_warps=max(1, size // 128),
    )
    return out
