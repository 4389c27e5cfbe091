"""The attention kernel of `engine.ops.triton.attention`, written for Hopper with warps that have one task each.

One warp fetches tiles into rings of shared memory. Two groups of four warps attend for 64 queries each: the product
of the next keys is issued before the softmax of these, and the product with the values runs beside it, so that the
matrix unit has work while exponentials are taken (the schedule of FlashAttention-3, 2407.08608, inside a group).

Triton's interpreter does not know Gluon: this file is compiled ahead of time without a GPU, but it runs only on one.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)


@gluon.jit
def _segment(work, number):
    """Tile, first step, end and slot of a segment; see `plan`."""
    entry = work + number * 4
    return gl.load(entry), gl.load(entry + 1), gl.load(entry + 2), gl.load(entry + 3)


@gluon.jit
def _bounds(
    work, number, index, heads, tiles_q, listed, SPARSE: gl.constexpr,
):  # fmt: skip
    """Of a segment: batch, head, tile of queries, its list of blocks, first step, end, slot."""
    tile, first, end, slot = _segment(work, number)
    tile_q = tile % tiles_q
    head = (tile // tiles_q) % heads
    batch = tile // (tiles_q * heads)
    blocks = work
    if SPARSE:
        blocks = index + tile * listed
    return batch, head, tile_q, blocks, first, end, slot


@gluon.jit
def _token(blocks, step, keys, BN: gl.constexpr, SPARSE: gl.constexpr):
    """First key of a step. Without a list from the end, so that only a first step meets the end of the keys."""
    if SPARSE:
        return gl.load(blocks + step) * BN
    else:
        return ((keys + BN - 1) // BN - 1 - step) * BN


@gluon.jit
def _fetch(
    q_desc, k_desc, v_desc, q_ring, k_ring, v_ring,
    q_full, q_empty, k_full, k_empty, v_full, v_empty,
    work, index, heads, tiles_q, keys, listed, segments,
    BN: gl.constexpr, STAGES: gl.constexpr,
    PACKED: gl.constexpr, SPARSE: gl.constexpr,
):  # fmt: skip
    at_k = 0
    at_v = 0
    loaded = 0
    for i in range(segments):
        batch, head, tile_q, blocks, first, end, _ = _bounds(
            work, gl.program_id(0) * segments + i, index, heads, tiles_q, listed, SPARSE
        )
        if end > first:
            for group in gl.static_range(2):
                mbarrier.wait(q_empty.index(group), (loaded & 1) ^ 1)
                mbarrier.expect(q_full.index(group), q_desc.block_type.nbytes)
                tma.async_copy_global_to_shared(
                    q_desc, [batch, tile_q * 128 + group * 64, head, 0], q_full.index(group), q_ring.index(group)
                )
            loaded += 1
            before = 0
            for step in range(first, end):
                token = _token(blocks, step, keys, BN, SPARSE)
                stage = at_k % STAGES
                mbarrier.wait(k_empty.index(stage), ((at_k // STAGES) & 1) ^ 1)
                mbarrier.expect(k_full.index(stage), k_desc.block_type.nbytes)
                tma.async_copy_global_to_shared(
                    k_desc, [batch, token, head, 0], k_full.index(stage), k_ring.index(stage)
                )
                at_k += 1
                # values are wanted a step later than keys
                if step > first:
                    _fetch_values(v_desc, v_ring, v_full, v_empty, at_v, batch, before, head, STAGES, PACKED)
                    at_v += 1
                before = token
            _fetch_values(v_desc, v_ring, v_full, v_empty, at_v, batch, before, head, STAGES, PACKED)
            at_v += 1


@gluon.jit
def _fetch_values(
    v_desc, v_ring, v_full, v_empty, at_v, batch, token, head, STAGES: gl.constexpr, PACKED: gl.constexpr
):  # fmt: skip
    stage = at_v % STAGES
    mbarrier.wait(v_empty.index(stage), ((at_v // STAGES) & 1) ^ 1)
    mbarrier.expect(v_full.index(stage), v_desc.block_type.nbytes)
    if PACKED:
        tma.async_copy_global_to_shared(v_desc, [batch, head, 0, token], v_full.index(stage), v_ring.index(stage))
    else:
        tma.async_copy_global_to_shared(v_desc, [batch, token, head, 0], v_full.index(stage), v_ring.index(stage))


@gluon.jit
def _keys(k_ring, stage, BN: gl.constexpr, D: gl.constexpr):
    return k_ring.index(stage).reshape([BN, D]).permute([1, 0])


@gluon.jit
def _values(v_ring, stage, BN: gl.constexpr, D: gl.constexpr, PACKED: gl.constexpr):
    if PACKED:
        return v_ring.index(stage).reshape([D, BN]).permute([1, 0])
    else:
        return v_ring.index(stage).reshape([BN, D])


@gluon.jit
def _softmax(s, m, multiplier, SHIFT: gl.constexpr):
    """Powers of the scores, the new maximum, and what older sums shrink by."""
    new = gl.maximum(m, gl.max(s, 1))
    p = gl.exp2(s * gl.expand_dims(multiplier, 1) - gl.expand_dims(new * multiplier - SHIFT, 1))
    return p, new, gl.exp2((m - new) * multiplier)


@gluon.jit
def _row_sums(p, BN: gl.constexpr):
    """Sums over what one thread holds, [64, 4]: the four threads of a row meet at the very end."""
    return gl.sum(gl.sum(p.reshape([64, BN // 8, 4, 2]), 3), 1)


WHOLE: gl.constexpr = gl.constexpr(1.5 * 2**23)
"""Added to a float32, it leaves no room for fractions: the lowest bits are the nearest whole number."""


@gluon.jit
def _eighths(s, m, multiplier):
    """Products of 8-bit queries and keys as scores beside the maximum `m`, in whole eighths of an octave above `WHOLE`.

    `multiplier` and `m` are in eighths of an octave, `m` in whole ones.
    """
    # whole numbers below 2^24 stay exact
    return s.to(gl.float32) * gl.expand_dims(multiplier, 1) + gl.expand_dims(WHOLE - m, 1)


@gluon.jit
def _larger16(a, b):
    """The larger ones of two pairs of int16."""
    return gl.inline_asm_elementwise("max.s16x2 $0, $1, $2;", "=r,r,r", [a, b], dtype=gl.int32, is_pure=True, pack=1)


@gluon.jit
def _exp2_fp8(t, m, BN: gl.constexpr, FIRST: gl.constexpr):
    """Powers of two as float8 e4m3, the largest of all 2^8, four to an int32 [64, BN / 4]; the new maximum, and what
    older sums shrink by.

    In the bits of an e4m3 number eighths of an octave are counted: 8 (log2 p + 7). So the multiplication that scales a
    score also makes its power, with mantissas on a line from 1 to 2 instead of a curve (Schraudolph 1999, "A fast,
    compact approximation of the exponential function"). Beside what is lost by rounding to 3 bits of mantissa that is
    little: 3.2 % instead of 2.6 % of each power, and no exponential is taken.

    The low 16 bits of `t` are a score beside `m`, the maximum so far, both in whole eighths of an octave. From here on
    they are worked on in pairs. As separate bytes the result would take a register each, and a third of the loop's
    instructions to pack; in the order of packed values nothing moves between threads.
    """
    t = t.reshape([64, BN // 16, 2, 4, 2]).permute([0, 1, 3, 2, 4]).reshape([64, BN // 4, 2, 2])
    even, odd = gl.split(t)
    first, third = gl.split(even)
    second, fourth = gl.split(odd)
    low = gl.inline_asm_elementwise(
        "prmt.b32 $0, $1, $2, 0x5410;", "=r,r,r", [first, second], dtype=gl.int32, is_pure=True, pack=1
    )
    high = gl.inline_asm_elementwise(
        "prmt.b32 $0, $1, $2, 0x5410;", "=r,r,r", [third, fourth], dtype=gl.int32, is_pure=True, pack=1
    )
    pair = gl.reduce(_larger16(low, high), 1, _larger16)
    rise = gl.maximum((pair << 16) >> 16, pair >> 16)
    if not FIRST:
        rise = gl.maximum(rise, 0)
    down = (8 * (8 + 7) - rise) & 0xFFFF
    down = gl.expand_dims(down | (down << 16), 1)
    powers = gl.inline_asm_elementwise(
        """{
        .reg .b32 low, high, zero;
        mov.b32 zero, 0;
        add.s16x2 low, $1, $3;
        add.s16x2 high, $2, $3;
        max.relu.s16x2 low, low, zero;
        max.relu.s16x2 high, high, zero;
        prmt.b32 $0, low, high, 0x6420;
        }""",
        "=r,r,r,r",
        [low, high, down.broadcast_to(low.shape)],
        dtype=gl.int32,
        is_pure=True,
        pack=1,
    )
    risen = gl.convert_layout(rise.to(gl.float32), m.type.layout)
    return powers, m + risen, gl.exp2(risen * -0.125)


@gluon.jit
def _operand(held, zero, dtype: gl.constexpr, layout: gl.constexpr, BN: gl.constexpr, PACKED: gl.constexpr):
    """Probabilities as they are kept until their product, 8-bit ones four to an int32, as its left operand."""
    if PACKED:
        held = gl.convert_layout(
            gl.expand_dims(held, 2).broadcast_to([64, BN // 4, 4]).reshape([64, BN]), layout, assert_trivial=True
        )
        # With a plain move ptxas would give what is being made for the next product the registers that this one still
        # reads, and then run every product to its end. Of `zero` it does not know that it is 0.
        return gl.inline_asm_elementwise(
            "xor.b32 $0, $1, $5;",
            "=r,r,r,r,r,r,r,r,r",
            [held, gl.full([64, BN], zero, gl.int32, layout)],
            dtype=gl.float8e4nv,
            is_pure=False,
            pack=4,
        )
    else:
        return gl.convert_layout(held.to(dtype), layout, assert_trivial=True)


@gluon.jit
def _attend_group(
    GROUP: gl.constexpr, q_ring, k_ring, v_ring,
    q_full, q_empty, k_full, k_empty, v_full, v_empty, turn, ones,
    out, parts, stats, work, q_scale, k_scale, v_scale, out_scale, index,
    scale, heads, tiles_q, queries, keys, listed, segments,
    BN: gl.constexpr, D: gl.constexpr, STAGES: gl.constexpr, PACKED: gl.constexpr,
    SCALED_Q: gl.constexpr, SCALED_K: gl.constexpr, SCALED_V: gl.constexpr, SCALED_OUT: gl.constexpr,
    SPARSE: gl.constexpr, SHIFT: gl.constexpr, TURNS: gl.constexpr,
):  # fmt: skip
    dtype: gl.constexpr = k_ring.dtype
    score: gl.constexpr = gl.int32 if PACKED else gl.float32
    depth: gl.constexpr = 256 // dtype.primitive_bitwidth
    score_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BN, depth])
    out_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, depth])
    sum_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 8, depth])
    operand: gl.constexpr = gl.DotOperandLayout(0, out_layout, 32 // dtype.primitive_bitwidth)
    sum_operand: gl.constexpr = gl.DotOperandLayout(0, sum_layout, 32 // dtype.primitive_bitwidth)
    sum_rows: gl.constexpr = gl.SliceLayout(1, sum_layout)
    score_rows: gl.constexpr = gl.SliceLayout(1, score_layout)
    out_rows: gl.constexpr = gl.SliceLayout(1, out_layout)
    at = 0
    loaded = 0
    turns = 0
    q = q_ring.index(GROUP).reshape([64, D])
    for i in range(segments):
        batch, head, tile_q, blocks, first, end, slot = _bounds(
            work, gl.program_id(0) * segments + i, index, heads, tiles_q, listed, SPARSE
        )
        row = tile_q * 128 + GROUP * 64 + gl.arange(0, 64, score_rows)
        multiplier = gl.full([64], 1.0, gl.float32, score_rows) * scale
        if SCALED_K:
            multiplier = multiplier * gl.load(k_scale + batch * heads + head)
        if SCALED_Q:
            multiplier *= gl.load(q_scale + (batch * queries + row) * heads + head, mask=row < queries, other=1.0)
        if PACKED:
            multiplier *= 8.0
        m = gl.full([64], 0.0 if PACKED else -float("inf"), gl.float32, score_rows)
        acc = gl.zeros([64, D], gl.float32, out_layout)
        empty = gl.zeros([64, BN], score, score_layout)
        if PACKED:
            total = gl.zeros([64, 8], gl.float32, sum_layout)
        else:
            total = _row_sums(empty, BN)
        if end > first:
            token = _token(blocks, first, keys, BN, SPARSE)
            mbarrier.wait(q_full.index(GROUP), loaded & 1)
            loaded += 1
            stage = at % STAGES
            mbarrier.wait(k_full.index(stage), (at // STAGES) & 1)
            s = warpgroup_mma(q, _keys(k_ring, stage, BN, D), empty, use_acc=False, is_async=True)
            s = warpgroup_mma_wait(0, deps=[s])
            mbarrier.arrive(k_empty.index(stage))
            inside = token + gl.arange(0, BN, gl.SliceLayout(0, score_layout)) < keys
            if PACKED:
                t = _eighths(s, m, multiplier)
                # less than any score, and not so little that 16 bits could not hold it beside the largest
                t = gl.where(gl.expand_dims(inside, 0), t, WHOLE - 16384.0)
                held, m, alpha = _exp2_fp8(t, m, BN, True)
            else:
                s = gl.where(gl.expand_dims(inside, 0), s, -float("inf"))
                held, m, alpha = _softmax(s, m, multiplier, SHIFT)
                total = _row_sums(held, BN)
            # what `acc` shrinks by before the next product is added
            shrink = gl.full([64], 1.0, gl.float32, out_rows)
            for _ in range(first + 1, end):
                stage_v = at % STAGES
                phase_v = (at // STAGES) & 1
                at += 1
                stage = at % STAGES
                weights = _operand(held, queries >> 31, dtype, operand, BN, PACKED)
                mbarrier.wait(k_full.index(stage), (at // STAGES) & 1)
                if TURNS:
                    # one group's products run while the other is at its softmax
                    mbarrier.wait(turn.index(GROUP), (turns & 1) ^ (1 - GROUP))
                    turns += 1
                s = warpgroup_mma(q, _keys(k_ring, stage, BN, D), empty, use_acc=False, is_async=True)
                mbarrier.wait(v_full.index(stage_v), phase_v)
                values = _values(v_ring, stage_v, BN, D, PACKED)
                if PACKED:
                    # 8-bit products are added in few bits: each tile on its own, and the sums in float32
                    product = warpgroup_mma(
                        weights, values, gl.zeros([64, D], gl.float32, out_layout), use_acc=False, is_async=True
                    )
                    # the matrix unit sums the rows too: it takes ones for values
                    part = warpgroup_mma(
                        gl.convert_layout(weights, sum_operand, assert_trivial=True), ones.permute([1, 0]),
                        gl.zeros([64, 8], gl.float32, sum_layout), use_acc=False, is_async=True,
                    )  # fmt: skip
                else:
                    product = warpgroup_mma(weights, values, acc, is_async=True)
                if TURNS:
                    mbarrier.arrive(turn.index(1 - GROUP))
                s = warpgroup_mma_wait(2 if PACKED else 1, deps=[s])
                mbarrier.arrive(k_empty.index(stage))
                if PACKED:
                    held, m, alpha = _exp2_fp8(_eighths(s, m, multiplier), m, BN, False)
                else:
                    held, m, alpha = _softmax(s, m, multiplier, SHIFT)
                    total = total * gl.expand_dims(gl.convert_layout(alpha, gl.SliceLayout(1, total.type.layout)), 1)
                    total += _row_sums(held, BN)
                # ptxas would wait for the product before it takes the exponentials. It moves nothing over a branch, and
                # this one, on a barrier that has long been passed, costs a few cycles
                mbarrier.wait(q_full.index(GROUP), (loaded - 1) & 1)
                shrunk = gl.convert_layout(alpha, out_rows)
                if PACKED:
                    product, part, held = warpgroup_mma_wait(0, deps=[product, part, held])
                    mbarrier.arrive(v_empty.index(stage_v))
                    acc = acc * gl.expand_dims(shrink, 1) + product
                    total = total * gl.expand_dims(gl.convert_layout(shrink, sum_rows), 1) + part
                    shrink = shrunk
                else:
                    product, held = warpgroup_mma_wait(0, deps=[product, held])
                    mbarrier.arrive(v_empty.index(stage_v))
                    acc = product * gl.expand_dims(shrunk, 1)
            mbarrier.arrive(q_empty.index(GROUP))
            stage_v = at % STAGES
            mbarrier.wait(v_full.index(stage_v), (at // STAGES) & 1)
            at += 1
            values = _values(v_ring, stage_v, BN, D, PACKED)
            acc = acc * gl.expand_dims(shrink, 1)
            weights = _operand(held, queries >> 31, dtype, operand, BN, PACKED)
            product = warpgroup_mma(weights, values, acc, is_async=True)
            if PACKED:
                total = total * gl.expand_dims(gl.convert_layout(shrink, sum_rows), 1)
                part = warpgroup_mma(
                    gl.convert_layout(weights, sum_operand, assert_trivial=True), ones.permute([1, 0]), total,
                    is_async=True,
                )  # fmt: skip
                acc, total = warpgroup_mma_wait(0, deps=[product, part])
            else:
                acc = warpgroup_mma_wait(0, deps=[product])
            mbarrier.arrive(v_empty.index(stage_v))
        # with ones for values every column is the sum
        sums = gl.convert_layout(gl.max(total, 1) if PACKED else gl.sum(total, 1), out_rows)
        row_out = tile_q * 128 + GROUP * 64 + gl.arange(0, 64, out_rows)
        columns = gl.expand_dims(gl.arange(0, D, gl.SliceLayout(0, out_layout)), 0)
        if end > first:
            if slot < 0:
                factor = 1.0 / gl.where(sums > 0, sums, 1.0)
                if SCALED_V:
                    factor *= gl.load(v_scale + batch * heads + head)
                place = out + ((batch * queries + row_out).to(gl.int64) * heads + head) * D
                if SCALED_OUT:
                    factor /= gl.load(out_scale)
                value = acc * gl.expand_dims(factor, 1)
                if SCALED_OUT:
                    value = gl.minimum(gl.maximum(value, -448.0), 448.0)
                value = value.to(out.dtype.element_ty)
                gl.store(gl.expand_dims(place, 1) + columns, value, mask=gl.expand_dims(row_out < queries, 1))
            else:
                local = slot * 2 * 128 + GROUP * 64
                gl.store(stats + local + gl.arange(0, 64, score_rows), m * 0.125 if PACKED else m * multiplier)
                gl.store(stats + local + 128 + gl.arange(0, 64, out_rows), sums)
                target = parts + (slot * 128 + GROUP * 64 + gl.arange(0, 64, out_rows)) * D
                gl.store(gl.expand_dims(target, 1) + columns, acc)


@gluon.jit(do_not_specialize=["heads", "tiles_q", "queries", "keys", "listed", "segments"])
def attend(
    q_desc, k_desc, v_desc,
    out, parts, stats, work, q_scale, k_scale, v_scale, out_scale, index,
    scale, heads, tiles_q, queries, keys, listed, segments,
    BN: gl.constexpr, D: gl.constexpr, STAGES: gl.constexpr, PACKED: gl.constexpr,
    SCALED_Q: gl.constexpr, SCALED_K: gl.constexpr, SCALED_V: gl.constexpr, SCALED_OUT: gl.constexpr,
    SPARSE: gl.constexpr, SHIFT: gl.constexpr, TURNS: gl.constexpr,
):  # fmt: skip
    """Tiles of 128 queries; arguments as `_attend`'s of `engine.ops.triton.attention`. Runs with 4 warps."""
    q_ring = gl.allocate_shared_memory(q_desc.dtype, [2, 1, 64, 1, D], q_desc.layout)
    k_ring = gl.allocate_shared_memory(k_desc.dtype, [STAGES, 1, BN, 1, D], k_desc.layout)
    v_block: gl.constexpr = [STAGES, 1, 1, D, BN] if PACKED else [STAGES, 1, BN, 1, D]
    v_ring = gl.allocate_shared_memory(v_desc.dtype, v_block, v_desc.layout)
    q_full = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    q_empty = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    k_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    k_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    v_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    v_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    turn = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    ones_layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([8, BN], v_desc.dtype)
    ones = gl.allocate_shared_memory(v_desc.dtype, [8, BN], ones_layout)
    if PACKED:
        written: gl.constexpr = gl.BlockedLayout([1, 8], [2, 16], [4, 1], [1, 0])
        # the bits of 1.0: of a conversion ptxas 12.8 keeps only every other pair
        ones.store(gl.full([8, BN], 0x38, gl.uint8, written).to(v_desc.dtype, bitcast=True))
    for group in gl.static_range(2):
        mbarrier.init(turn.index(group), count=1)
        mbarrier.init(q_full.index(group), count=1)
        mbarrier.init(q_empty.index(group), count=1)
    for stage in gl.static_range(STAGES):
        mbarrier.init(k_full.index(stage), count=1)
        mbarrier.init(k_empty.index(stage), count=2)
        mbarrier.init(v_full.index(stage), count=1)
        mbarrier.init(v_empty.index(stage), count=2)
    # the copy engine must see the barriers too
    fence_async_shared()
    gl.warp_specialize(
        [
            (
                _attend_group,
                (
                    gl.constexpr(0), q_ring, k_ring, v_ring,
                    q_full, q_empty, k_full, k_empty, v_full, v_empty, turn, ones,
                    out, parts, stats, work, q_scale, k_scale, v_scale, out_scale, index,
                    scale, heads, tiles_q, queries, keys, listed, segments,
                    BN, D, STAGES, PACKED, SCALED_Q, SCALED_K, SCALED_V, SCALED_OUT,
                    SPARSE, SHIFT, TURNS,
                ),
            ),
            (
                _attend_group,
                (
                    gl.constexpr(1), q_ring, k_ring, v_ring,
                    q_full, q_empty, k_full, k_empty, v_full, v_empty, turn, ones,
                    out, parts, stats, work, q_scale, k_scale, v_scale, out_scale, index,
                    scale, heads, tiles_q, queries, keys, listed, segments,
                    BN, D, STAGES, PACKED, SCALED_Q, SCALED_K, SCALED_V, SCALED_OUT,
                    SPARSE, SHIFT, TURNS,
                ),
            ),
            (
                _fetch,
                (
                    q_desc, k_desc, v_desc, q_ring, k_ring, v_ring,
                    q_full, q_empty, k_full, k_empty, v_full, v_empty,
                    work, index, heads, tiles_q, keys, listed, segments,
                    BN, STAGES, PACKED, SPARSE,
                ),
            ),
        ],
        [4, 1],
        [240, 24],
    )  # fmt: skip
