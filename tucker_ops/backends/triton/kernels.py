"""The Triton kernels: three kinds of matrix product over voxels, from which forward and gradient are made.

Activations are channels-last, so that a voxel is a row of channels; 2D is 3D of depth 1. Ranks and channels are padded
to blocks by masks. Products accumulate in fp32. Rows of an item and numbers of a line are counted in 32 bits, all else
in 64.

Channels and ranks are given in units, of 8 where they can be: Triton takes an argument for aligned if 16 divides it, or
not at all, and would read ranks like 24 and 40 number by number.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _nearest_tf32(value):
    """To the nearest; tensor cores drop the bits that TF32 lacks, which errs four times as much, and to one side."""
    return tl.inline_asm_elementwise(
        "cvt.rna.tf32.f32 $0, $1;", "=r,r", [value], dtype=tl.float32, is_pure=True, pack=1
    )


@triton.jit
def _multiply(
    a, b, accumulator, PRECISION: tl.constexpr, UPCAST: tl.constexpr, A_ROUNDED: tl.constexpr = False
):
    # Triton's interpreter returns garbage for a product of bf16 operands.
    if UPCAST:
        a, b = a.to(tl.float32), b.to(tl.float32)
    if PRECISION == "tf32":
        a, b = a if A_ROUNDED else _nearest_tf32(a), _nearest_tf32(b)
    return tl.dot(a, b, accumulator, input_precision=PRECISION)


@triton.jit
def _rounded(value, DTYPE: tl.constexpr, UPCAST: tl.constexpr):
    """fp32 to a narrower type, to the nearest; the interpreter cuts bf16 off instead, unless nothing is left to cut."""
    if UPCAST and DTYPE == tl.bfloat16:
        bits = value.to(tl.uint32, bitcast=True)
        nearest = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000
        value = tl.where(value == value, nearest.to(tl.float32, bitcast=True), value)
    return value.to(DTYPE)


@triton.jit
def _along_transposed(o, k, EXTENT, STRIDE: tl.constexpr, PADDING: tl.constexpr, DILATION: tl.constexpr):
    """The output that input o goes to through tap k, and whether there is one."""
    reach = o + PADDING - k * DILATION
    i = reach // STRIDE
    return i, (reach >= 0) & (i * STRIDE == reach) & (i < EXTENT)


@triton.jit
def _divided(a, b):
    """Quotient and remainder of what is not negative: unsigned, which takes half the instructions."""
    # An argument of 1 is no tensor.
    quotient = (a.to(tl.uint32) // tl.full((), b, tl.uint32)).to(tl.int32)
    return quotient, a - quotient * b


@triton.jit
def _within(i, EXTENT):
    """0 ≤ i < EXTENT, in one comparison."""
    return i.to(tl.uint32, bitcast=True) < tl.full((), EXTENT, tl.uint32)


@triton.jit
def _across(k, w0, CHANNELS, DILATION: tl.constexpr):
    """Of all taps of a row, channels side by side: how far from a row's first element k lies, and at which width."""
    tap = k // CHANNELS
    lane = k if DILATION == 1 else k + tap * ((DILATION - 1) * CHANNELS)
    return lane, w0[:, None] + tap[None, :] * DILATION


@triton.jit
def reduce_rows(
    x, matrix, expand, scale, shift, in_bias, partial, t,
    DEPTH, HEIGHT, WIDTH, CHANNELS, SOURCE_CHANNELS, RANK, T_CHANNELS, T_FIRST, slope,
    HAS_MATRIX: tl.constexpr, HAS_EXPAND: tl.constexpr, HAS_SCALE: tl.constexpr, HAS_SHIFT: tl.constexpr,
    HAS_BIAS: tl.constexpr, HAS_PARTIAL: tl.constexpr, ROUND_T: tl.constexpr, ACTIVATION: tl.constexpr,
    STEP_D: tl.constexpr, STEP_H: tl.constexpr, STEP_W: tl.constexpr,
    UNIT_C: tl.constexpr, UNIT_S: tl.constexpr, UNIT_R: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_R: tl.constexpr,
    PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """t[m, i] = Σ_c matrix[r, c] · act(scale[c] · (expand x)[m, c] + shift[c]) + partial[m, i] + in_bias[i].

    i is T_FIRST + r. ROUND_T: to TF32, where products are, so that those that read t need not.
    Program (block of rows, position in a cell and block of ranks, item). x [N, D·H·W, SOURCE_CHANNELS]; a source at
    1/STEP of the extents writes each of the STEP³ rows of its cell by a matrix of its own, [STEP³, RANK, CHANNELS].
    Without a matrix the activated channels are t. UNIT_C: of CHANNELS, UNIT_S of SOURCE_CHANNELS, UNIT_R of RANK and
    T_'s. scale, shift [N, CHANNELS] fp32; partial fp32, laid out as t.
    """
    CHANNELS, SOURCE_CHANNELS = CHANNELS * UNIT_C, SOURCE_CHANNELS * UNIT_S
    RANK, T_CHANNELS, T_FIRST = RANK * UNIT_R, T_CHANNELS * UNIT_R, T_FIRST * UNIT_R
    STEPS: tl.constexpr = STEP_D * STEP_H * STEP_W
    voxels = DEPTH * HEIGHT * WIDTH
    blocks_r = tl.cdiv(RANK, BLOCK_R)
    cell = tl.program_id(1) // blocks_r
    r = (tl.program_id(1) % blocks_r) * BLOCK_R + tl.arange(0, BLOCK_R)
    item = tl.program_id(2)
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    row_ok, r_ok = rows < voxels, r < RANK
    source = x + item.to(tl.int64) * voxels * SOURCE_CHANNELS + rows.to(tl.int64)[:, None] * SOURCE_CHANNELS

    if HAS_EXPAND:
        e = tl.arange(0, BLOCK_E)
        e_ok = e < SOURCE_CHANNELS
        narrow = tl.load(source + e[None, :], mask=row_ok[:, None] & e_ok[None, :], other=0.0)
    total = tl.zeros((BLOCK_M, BLOCK_R), tl.float32)
    first, last = 0, CHANNELS
    if not HAS_MATRIX:
        tl.static_assert(BLOCK_C == BLOCK_R)
        first = (tl.program_id(1) % blocks_r) * BLOCK_R
        last = first + 1
    for c0 in range(first, last, BLOCK_C):
        c = c0 + tl.arange(0, BLOCK_C)
        c_ok = c < CHANNELS
        if HAS_EXPAND:
            wide = tl.load(
                expand + c[None, :] * SOURCE_CHANNELS + e[:, None],
                mask=c_ok[None, :] & e_ok[:, None],
                other=0.0,
            )
            value = _multiply(narrow, wide, tl.zeros((BLOCK_M, BLOCK_C), tl.float32), PRECISION, UPCAST)
        else:
            value = tl.load(source + c[None, :], mask=row_ok[:, None] & c_ok[None, :], other=0.0)
        if HAS_SCALE:
            value = (
                value.to(tl.float32)
                * tl.load(scale + item.to(tl.int64) * CHANNELS + c, mask=c_ok, other=0.0)[None, :]
            )
        if HAS_SHIFT:
            value = (
                value.to(tl.float32)
                + tl.load(shift + item.to(tl.int64) * CHANNELS + c, mask=c_ok, other=0.0)[None, :]
            )
        if ACTIVATION:
            value = value.to(tl.float32)
            value = tl.where(value < 0, value * slope, value)
        if HAS_MATRIX:
            weights = tl.load(
                matrix + cell * RANK * CHANNELS + r[None, :] * CHANNELS + c[:, None],
                mask=r_ok[None, :] & c_ok[:, None], other=0.0,
            )  # fmt: skip
            total = _multiply(
                _rounded(value.to(tl.float32), x.dtype.element_ty, UPCAST), weights, total, PRECISION, UPCAST
            )
        else:
            total = value.to(tl.float32)

    if STEPS > 1:
        w, h, d = rows % WIDTH, rows // WIDTH % HEIGHT, rows // (WIDTH * HEIGHT)
        w = w * STEP_W + cell % STEP_W
        h = h * STEP_H + cell // STEP_W % STEP_H
        d = d * STEP_D + cell // (STEP_W * STEP_H)
        rows = (d * (HEIGHT * STEP_H) + h) * (WIDTH * STEP_W) + w
    at = (item.to(tl.int64) * (voxels * STEPS) + rows.to(tl.int64))[:, None] * T_CHANNELS + (T_FIRST + r)[
        None, :
    ]
    ok = row_ok[:, None] & r_ok[None, :]
    if HAS_PARTIAL:
        total += tl.load(partial + at, mask=ok, other=0.0)
    if HAS_BIAS:
        total += tl.load(in_bias + T_FIRST + r, mask=r_ok, other=0.0).to(tl.float32)[None, :]
    if ROUND_T and PRECISION == "tf32":
        total = _nearest_tf32(total)
    tl.store(t + at, _rounded(total, t.dtype.element_ty, UPCAST), mask=ok)


@triton.jit
def convolve_rows(
    t, core, u_out, bias, values, z, mean, m2, covariance,
    DEPTH, HEIGHT, WIDTH, OUT_DEPTH, OUT_HEIGHT, OUT_WIDTH, RANK_IN, RANK_OUT, CHANNELS,
    KERNEL_D: tl.constexpr, KERNEL_H: tl.constexpr, KERNEL_W: tl.constexpr,
    STRIDE_D: tl.constexpr, STRIDE_H: tl.constexpr, STRIDE_W: tl.constexpr,
    PADDING_D: tl.constexpr, PADDING_H: tl.constexpr, PADDING_W: tl.constexpr,
    DILATION_D: tl.constexpr, DILATION_H: tl.constexpr, DILATION_W: tl.constexpr,
    TRANSPOSED: tl.constexpr, HAS_U: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_Z: tl.constexpr,
    HAS_STATS: tl.constexpr, HAS_COVARIANCE: tl.constexpr,
    U_RANKS_LAST: tl.constexpr, CHANNELS_LAST: tl.constexpr,
    T_ROUNDED: tl.constexpr, UNIT_K: tl.constexpr, UNIT_R: tl.constexpr, UNIT_C: tl.constexpr, TOGETHER: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
    PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """z = core ∗ t, then values = u_out · z + bias in the same program, or z + bias where there is no u_out.

    Program (block of output rows, block of ranks, item); with u_out one block holds all ranks. t [N, D·H·W, RANK_IN];
    core [taps, RANK_IN, RANK_OUT]; u_out [CHANNELS, RANK_OUT] or the other way round; z channels-last, rounded as the
    second product reads it. T_ROUNDED: t came from ROUND_T. UNIT_K: of RANK_IN, UNIT_R of RANK_OUT, UNIT_C of CHANNELS.
    TRANSPOSED: the gradient of the convolution, D·H·W being the extents of its output. TOGETHER: taps along the width,
    one or all, whose channels are one block of the sum: they lie side by side in t, and so do their weights. mean, m2
    [N, blocks, CHANNELS] and covariance [N, blocks, CHANNELS, CHANNELS]: of the fp32 values of each block of rows; the
    latter without u_out only.
    """
    RANK_IN, RANK_OUT, CHANNELS = RANK_IN * UNIT_K, RANK_OUT * UNIT_R, CHANNELS * UNIT_C
    voxels, out_voxels = DEPTH * HEIGHT * WIDTH, OUT_DEPTH * OUT_HEIGHT * OUT_WIDTH
    item = tl.program_id(2)
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    row_ok = rows < out_voxels
    lines, ow = _divided(rows, OUT_WIDTH)
    od, oh = _divided(lines, OUT_HEIGHT)
    r = tl.program_id(1) * BLOCK_R + tl.arange(0, BLOCK_R)
    r_ok = r < RANK_OUT
    source = t + item.to(tl.int64) * voxels * RANK_IN

    total = tl.zeros((BLOCK_M, BLOCK_R), tl.float32)
    k = tl.arange(0, BLOCK_K)
    # What a row reads lies at a distance from its first position that is the same for all rows of a step. So addresses
    # are found once and, of taps read together, what of it is inside: a bit for each step.
    d0, h0, w0 = od * STRIDE_D - PADDING_D, oh * STRIDE_H - PADDING_H, ow * STRIDE_W - PADDING_W
    at = (d0 * HEIGHT + h0) * WIDTH + w0
    if TOGETHER > 1:
        lane, w = _across(k, w0, RANK_IN, DILATION_W)
        inside_h = tl.zeros((BLOCK_M,), tl.int32)
        for tap_h in tl.static_range(KERNEL_H):
            inside_h |= tl.where(_within(h0 + tap_h * DILATION_H, HEIGHT), 1 << tap_h, 0)
        inside_dh = tl.zeros((BLOCK_M,), tl.int32)
        for tap_d in tl.static_range(KERNEL_D):
            inside_dh |= tl.where(_within(d0 + tap_d * DILATION_D, DEPTH), inside_h << (tap_d * KERNEL_H), 0)
        reads = (row_ok[:, None] & (k < TOGETHER * RANK_IN)[None, :]) & _within(w, WIDTH)
        steps_inside = tl.where(reads, inside_dh[:, None], 0)
    else:
        lane = k
    first = source + at.to(tl.int64)[:, None] * RANK_IN + lane[None, :]
    # Taps and blocks of ranks in one loop, which Triton overlaps with its loads; of two it overlaps the inner one.
    blocks_k = 1 if TOGETHER > 1 else tl.cdiv(RANK_IN, BLOCK_K)
    for step in range(0, KERNEL_D * KERNEL_H * (KERNEL_W // TOGETHER) * blocks_k):
        tap, k0 = step // blocks_k * TOGETHER, step % blocks_k * BLOCK_K
        kw, kh, kd = tap % KERNEL_W, tap // KERNEL_W % KERNEL_H, tap // (KERNEL_W * KERNEL_H)
        k_ok = k < TOGETHER * RANK_IN - k0
        if TRANSPOSED:
            d, d_ok = _along_transposed(od, kd, DEPTH, STRIDE_D, PADDING_D, DILATION_D)
            h, h_ok = _along_transposed(oh, kh, HEIGHT, STRIDE_H, PADDING_H, DILATION_H)
            w, w_ok = _along_transposed(ow, kw, WIDTH, STRIDE_W, PADDING_W, DILATION_W)
            output = ((d * HEIGHT + h) * WIDTH + w).to(tl.int64) * RANK_IN + k0
            inside = (row_ok & d_ok & h_ok & w_ok)[:, None] & k_ok[None, :]
            part = tl.load(source + output[:, None] + k[None, :], mask=inside, other=0.0)
        else:
            if TOGETHER > 1:
                inside = ((steps_inside >> step) & 1) != 0
            else:
                inside = row_ok & _within(d0 + kd * DILATION_D, DEPTH) & _within(h0 + kh * DILATION_H, HEIGHT)
                inside = (inside & _within(w0 + kw * DILATION_W, WIDTH))[:, None] & k_ok[None, :]
            row = (kd * DILATION_D).to(tl.int64) * HEIGHT + kh * DILATION_H
            part = tl.load(first + ((row * WIDTH + kw * DILATION_W) * RANK_IN + k0), mask=inside, other=0.0)
        weights = tl.load(
            core + (tap * RANK_IN + k0 + k)[:, None] * RANK_OUT + r[None, :],
            mask=k_ok[:, None] & r_ok[None, :],
            other=0.0,
        )
        total = _multiply(part, weights, total, PRECISION, UPCAST, T_ROUNDED)

    first_row = item.to(tl.int64) * out_voxels
    if HAS_Z:
        z_at = (first_row + rows.to(tl.int64))[:, None] * RANK_OUT + r[None, :]
        tl.store(z + z_at, _rounded(total, z.dtype.element_ty, UPCAST), mask=row_ok[:, None] & r_ok[None, :])
    base = first_row * CHANNELS + rows.to(tl.int64)[:, None] * (CHANNELS if CHANNELS_LAST else 1)
    block = item.to(tl.int64) * tl.num_programs(0) + tl.program_id(0)
    count = tl.minimum(out_voxels - tl.program_id(0) * BLOCK_M, BLOCK_M).to(tl.float32)
    if HAS_U:
        narrow = _rounded(total, t.dtype.element_ty, UPCAST)
        for c0 in range(0, CHANNELS, BLOCK_C):
            c = c0 + tl.arange(0, BLOCK_C)
            c_ok = c < CHANNELS
            if U_RANKS_LAST:
                u_at = c[None, :] * RANK_OUT + r[:, None]
            else:
                u_at = r[:, None] * CHANNELS + c[None, :]
            wide = tl.load(
                u_out + u_at,
                mask=r_ok[:, None] & c_ok[None, :], other=0.0,
            )  # fmt: skip
            out = _multiply(narrow, wide, tl.zeros((BLOCK_M, BLOCK_C), tl.float32), PRECISION, UPCAST)
            if HAS_BIAS:
                out += tl.load(bias + c, mask=c_ok, other=0.0).to(tl.float32)[None, :]
            if HAS_STATS:
                _store_statistics(
                    out, row_ok, count, mean + block * CHANNELS + c, m2 + block * CHANNELS + c, c_ok
                )
            out_at = base + (c[None, :] if CHANNELS_LAST else c.to(tl.int64)[None, :] * out_voxels)
            tl.store(
                values + out_at,
                _rounded(out, values.dtype.element_ty, UPCAST),
                mask=row_ok[:, None] & c_ok[None, :],
            )
    else:
        if HAS_BIAS:
            total += tl.load(bias + r, mask=r_ok, other=0.0).to(tl.float32)[None, :]
        if HAS_STATS:
            deviation = _store_statistics(
                total, row_ok, count, mean + block * CHANNELS + r, m2 + block * CHANNELS + r, r_ok
            )
            if HAS_COVARIANCE:
                products = tl.dot(tl.trans(deviation), deviation, input_precision="tf32x3")
                cells = (block * CHANNELS + r)[:, None] * CHANNELS + r[None, :]
                tl.store(covariance + cells, products, mask=r_ok[:, None] & r_ok[None, :])
        out_at = base + (r[None, :] if CHANNELS_LAST else r.to(tl.int64)[None, :] * out_voxels)
        tl.store(
            values + out_at,
            _rounded(total, values.dtype.element_ty, UPCAST),
            mask=row_ok[:, None] & r_ok[None, :],
        )


@triton.jit
def _store_statistics(values, row_ok, count, mean_at, m2_at, channel_ok):
    """Mean and the sum of squared deviations, of one block of rows: two passes, over registers. Returns deviations."""
    mean = tl.sum(tl.where(row_ok[:, None], values, 0.0), 0) / count
    deviation = tl.where(row_ok[:, None], values - mean[None, :], 0.0)
    tl.store(mean_at, mean, mask=channel_ok)
    tl.store(m2_at, tl.sum(deviation * deviation, 0), mask=channel_ok)
    return deviation


@triton.jit
def outer_rows(
    a, b, partial,
    ITEMS, DEPTH, HEIGHT, WIDTH, OUT_DEPTH, OUT_HEIGHT, OUT_WIDTH, A_CHANNELS, B_CHANNELS, BLOCKS_EACH,
    KERNEL_D: tl.constexpr, KERNEL_H: tl.constexpr, KERNEL_W: tl.constexpr,
    STRIDE_D: tl.constexpr, STRIDE_H: tl.constexpr, STRIDE_W: tl.constexpr,
    PADDING_D: tl.constexpr, PADDING_H: tl.constexpr, PADDING_W: tl.constexpr,
    DILATION_D: tl.constexpr, DILATION_H: tl.constexpr, DILATION_W: tl.constexpr,
    UNIT_A: tl.constexpr, UNIT_B: tl.constexpr, TOGETHER: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_A: tl.constexpr, BLOCK_B: tl.constexpr,
    PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """partial[p, tap, i, j] = Σ over the p-th share of output voxels m of a[m, i] · b[what m reads through tap, j].

    Program (share of the rows, tap, block of i and j). a [N, output voxels, A_CHANNELS], b [N, D·H·W, B_CHANNELS].
    Rows come in blocks that are a line of the output or a piece of one, so that divisions are few and of scalars.
    TOGETHER: taps along the width, one or all, that are one tap here with the channels of b side by side, as they lie
    in memory. partial [shares, taps, A_CHANNELS, TOGETHER · B_CHANNELS] in fp32, to be added up in order: the same sum
    every time.
    """
    A_CHANNELS, B_CHANNELS = A_CHANNELS * UNIT_A, B_CHANNELS * UNIT_B
    COLUMNS = TOGETHER * B_CHANNELS
    blocks_b = tl.cdiv(COLUMNS, BLOCK_B)
    i = (tl.program_id(2) // blocks_b) * BLOCK_A + tl.arange(0, BLOCK_A)
    j = (tl.program_id(2) % blocks_b) * BLOCK_B + tl.arange(0, BLOCK_B)
    i_ok, j_ok = i < A_CHANNELS, j < COLUMNS
    TAPS_W: tl.constexpr = KERNEL_W // TOGETHER
    POINTWISE: tl.constexpr = (
        KERNEL_D * KERNEL_H * KERNEL_W * STRIDE_D * STRIDE_H * STRIDE_W == 1
        and PADDING_D + PADDING_H + PADDING_W == 0
    )
    tap = tl.program_id(1)
    kw, kh, kd = tap % TAPS_W, tap // TAPS_W % KERNEL_H, tap // (TAPS_W * KERNEL_H)
    pieces = tl.cdiv(OUT_WIDTH, BLOCK_M)
    total = tl.zeros((BLOCK_A, BLOCK_B), tl.float32)
    first = tl.program_id(0) * BLOCKS_EACH
    line, piece = _divided(first, pieces)
    plane, oh = _divided(line, OUT_HEIGHT)
    item, od = _divided(plane, OUT_DEPTH)
    for _ in range(first, tl.minimum(first + BLOCKS_EACH, ITEMS * OUT_DEPTH * OUT_HEIGHT * pieces)):
        ow = piece * BLOCK_M + tl.arange(0, BLOCK_M)
        line_a, line_b, row_ok = line, line, ow < OUT_WIDTH
        if not POINTWISE:
            d, h = od * STRIDE_D - PADDING_D + kd * DILATION_D, oh * STRIDE_H - PADDING_H + kh * DILATION_H
            line_b = (item * DEPTH + d) * HEIGHT + h
            row_ok = row_ok & (_within(d, DEPTH) & _within(h, HEIGHT))
        left = tl.load(
            a + line_a.to(tl.int64) * OUT_WIDTH * A_CHANNELS + (ow[None, :] * A_CHANNELS + i[:, None]),
            mask=row_ok[None, :] & i_ok[:, None], other=0.0,
        )  # fmt: skip
        w0 = ow * STRIDE_W - PADDING_W + kw * DILATION_W
        lane, w = _across(j, w0, B_CHANNELS, DILATION_W)
        inside = row_ok[:, None] & j_ok[None, :]
        if not POINTWISE:
            inside = inside & _within(w, WIDTH)
        right = tl.load(
            b + line_b.to(tl.int64) * WIDTH * B_CHANNELS + (w0[:, None] * B_CHANNELS + lane[None, :]),
            mask=inside, other=0.0,
        )  # fmt: skip
        total = _multiply(left, right, total, PRECISION, UPCAST)
        # To the next block, without a division.
        piece += 1
        over = (piece == pieces).to(tl.int32)
        piece, line, oh = piece * (1 - over), line + over, oh + over
        over = (oh == OUT_HEIGHT).to(tl.int32)
        oh, od = oh * (1 - over), od + over
        over = (od == OUT_DEPTH).to(tl.int32)
        od, item = od * (1 - over), item + over
    share = tl.program_id(0) * (KERNEL_D * KERNEL_H * TAPS_W) + tap
    at = (share.to(tl.int64) * A_CHANNELS + i)[:, None] * COLUMNS + j[None, :]
    tl.store(partial + at, total, mask=i_ok[:, None] & j_ok[None, :])
