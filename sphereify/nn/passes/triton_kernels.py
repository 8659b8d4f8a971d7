"""The Triton kernels of the angular map, for channels_last and contiguous tensors alike; `triton` launches them.

A tensor is read as samples of (rows, columns), where columns are channels and rows are pixels. In channels_last
(CHANNELS_LAST) and in a linear map all rows of the batch are one sample and columns are adjacent; otherwise rows are.
A program has BLOCK_ROWS rows of one sample. The start of its tile is a 64-bit number, places in the tile are 32-bit.

Sums over the channels of a group take GROUP_BLOCK groups at a time, COLUMN_BLOCK channels of each (DENSE: these are
adjacent, without a gap between groups). ALIGN, GROUP_ALIGN and ROW_ALIGN are powers of two that divide the channels of
a group, the groups and the rows; the compiler needs them to read 16 bytes at a time.
"""

import math

import triton
import triton.language as tl

_HALF_PI = tl.constexpr(math.pi / 2)
_QUARTER_PI = tl.constexpr(math.pi / 4)


# ---- Curves. Polynomials are minimax in the square of their argument, fitted for fp32.


@triton.jit
def asin(x):
    """arcsin over [-1, 1], through asin x = π/2 - 2 asin(sqrt((1 - x) / 2)) above one half."""
    size = tl.abs(x)
    steep = size > 0.5
    z = tl.where(steep, 0.5 - 0.5 * size, size * size)
    s = tl.where(steep, tl.sqrt(z), size)
    p = 0.02643335437 + z * 0.03832832316
    p = 0.1666667314 + z * (0.07498761607 + z * (0.04502021668 + z * p))
    s += s * z * p
    s = tl.where(steep, s * -2 + _HALF_PI, s)
    return tl.where(x < 0, -s, s)


@triton.jit
def tanh(x):
    """tanh of any number: a polynomial where 1 - 2 / (exp(2x) + 1) would cancel."""
    size = tl.abs(x)
    z = tl.minimum(size * size, 0.36)
    p = -0.0538763164 + z * (0.02112144991 - z * 0.006283659081)
    small = x + x * z * (-0.3333333053 + z * (0.1333293249 + z * p))
    large = 1 - 2 / (tl.exp(2 * tl.minimum(size, 20.0, propagate_nan=tl.PropagateNan.ALL)) + 1)
    return tl.where(size < 0.6, small, tl.where(x < 0, -large, large))


@triton.jit
def from_pole(half):
    """(cos 2h, sin 2h) for h in [0, π/4]: with 2h = π/2 - |a| these are sin |a| and cos a, exact close to the pole."""
    z = half * half
    s = half + half * z * (-0.1666666466 + z * (0.008332747111 - z * 0.0001958760063))
    c = 1 + z * (-0.4999999997 + z * (0.04166665059 + z * (-0.001388758587 + z * 2.446334223e-05)))
    return 1 - 2 * s * s, 2 * s * c


@triton.jit
def curve(cos, k, CURVE: tl.constexpr):
    """g of cos θ in [-1, 1]"""
    if CURVE == "cosine":
        return cos
    elif CURVE == "linear":
        return asin(cos) * (1 / _HALF_PI)
    else:
        return tanh(asin(cos) * (0.5 / k)) * (1 / tanh(1 / k * _QUARTER_PI))


@triton.jit
def slope(g, k, sin_floor, CURVE: tl.constexpr):
    """(cos θ, dg / dcos, dg / dk) from g, as `operators.Curve.slope`; the last is meaningful for sigmoids only."""
    if CURVE == "cosine":
        return g, tl.full(g.shape, 1, tl.float32), g
    elif CURVE == "linear":
        size, across = from_pole(tl.maximum(1 - tl.abs(g), 0.0, propagate_nan=tl.PropagateNan.ALL) * _QUARTER_PI)
        return tl.where(g < 0, -size, size), (1 / _HALF_PI) / tl.maximum(across, sin_floor), g
    else:
        top = tanh(1 / k * _QUARTER_PI)
        t = tl.abs(g) * top
        # For small k rounding takes t to 1 and the logarithm to infinity: the angle is then the pole.
        a = tl.where(t < 1, tl.minimum(k * tl.log((1 + t) / tl.maximum(1 - t, 1e-9)), _HALF_PI), _HALF_PI)
        size, across = from_pole(a * -0.5 + _QUARTER_PI)
        rest = (1 - t * t) * (0.5 / k)
        by_k = (g * ((1 - top * top) / k * _QUARTER_PI) - tl.where(g < 0, -a, a) * rest) * (1 / (k * top))
        return tl.where(g < 0, -size, size), rest * (1 / top) / tl.maximum(across, sin_floor), by_k


@triton.jit
def k_of(k, column, mask, LEARNED: tl.constexpr, SHARED: tl.constexpr):
    """The k of each column, from a number or from a tensor with one k for each column or for all."""
    if LEARNED:
        if SHARED:
            return tl.load(k).to(tl.float32)
        else:
            return tl.load(k + column, mask=mask, other=1.0)[None, :].to(tl.float32)
    else:
        return k


# ---- Addresses


@triton.jit
def rows_of(rows, BLOCK_ROWS: tl.constexpr):
    """(sample, first row, places of the rows behind it) of this program."""
    blocks = tl.cdiv(rows, BLOCK_ROWS)
    return tl.program_id(0) // blocks, (tl.program_id(0) % blocks) * BLOCK_ROWS, tl.arange(0, BLOCK_ROWS)


@triton.jit
def columns_of(start, per, groups, GROUP_BLOCK: tl.constexpr, COLUMN_BLOCK: tl.constexpr, DENSE: tl.constexpr):
    """(group, column, mask) of the tile's columns, which begin at channel `start` of each group.

    Where GROUP_BLOCK is 1, one group stands for all columns.
    """
    place = tl.arange(0, GROUP_BLOCK * COLUMN_BLOCK)
    if GROUP_BLOCK == 1:
        group = tl.program_id(1) + tl.arange(0, 1)
        column = tl.program_id(1) * per + start + place
        mask = start + place < per
    elif DENSE:
        group = tl.program_id(1) * GROUP_BLOCK + place // COLUMN_BLOCK
        column = tl.program_id(1) * GROUP_BLOCK * COLUMN_BLOCK + place
        mask = column < groups * COLUMN_BLOCK
    else:
        group = tl.program_id(1) * GROUP_BLOCK + place // COLUMN_BLOCK
        within = start + place % COLUMN_BLOCK
        column = group * per + within
        mask = (within < per) & (group < groups)
    return group, column, mask


@triton.jit
def at(tensor, sample, first, row, column, rows, columns, CHANNELS_LAST: tl.constexpr):
    """The addresses of (row, column), counted from the first row of the tile."""
    if CHANNELS_LAST:
        return tensor + first.to(tl.int64) * columns + (row[:, None] * columns + column[None, :])
    else:
        return tensor + (sample.to(tl.int64) * columns * rows + first) + (row[:, None] + column[None, :] * rows)


@triton.jit
def groups_of(column, per, inside, mask, GROUPED: tl.constexpr):
    """(group, mask) of each column, or of one column that stands for all where there is but one group."""
    if GROUPED:
        return column // per, mask
    else:
        return tl.arange(0, 1), inside


@triton.jit
def sum_groups(tile, BLOCK_ROWS: tl.constexpr, GROUP_BLOCK: tl.constexpr, COLUMN_BLOCK: tl.constexpr):
    """(rows, groups * channels) -> (rows, groups)"""
    if COLUMN_BLOCK == 1:
        return tile
    else:
        return tl.sum(tl.reshape(tile, (BLOCK_ROWS, GROUP_BLOCK, COLUMN_BLOCK)), axis=2)


# ---- Norms


@triton.jit(do_not_specialize=["rows"])
def square_sum(
    x, out, rows, per, groups, eps,
    ROOT: tl.constexpr, CHANNELS_LAST: tl.constexpr,
    ALIGN: tl.constexpr, GROUP_ALIGN: tl.constexpr, ROW_ALIGN: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, GROUP_BLOCK: tl.constexpr, COLUMN_BLOCK: tl.constexpr, DENSE: tl.constexpr,
):  # fmt: skip
    """out = the sum of squares over each group's channels; with ROOT sqrt(sum + eps)."""
    rows, per = rows // ROW_ALIGN * ROW_ALIGN, per // ALIGN * ALIGN
    groups = groups // GROUP_ALIGN * GROUP_ALIGN
    sample, first, row = rows_of(rows, BLOCK_ROWS)
    inside = (first + row < rows)[:, None]
    squares = tl.zeros((BLOCK_ROWS, GROUP_BLOCK * COLUMN_BLOCK), tl.float32)
    for start in range(0, per, COLUMN_BLOCK):
        _, column, mask = columns_of(start, per, groups, GROUP_BLOCK, COLUMN_BLOCK, DENSE)
        place = at(x, sample, first, row, column, rows, per * groups, CHANNELS_LAST)
        value = tl.load(place, mask=inside & mask[None, :], other=0.0).to(tl.float32)
        squares += value * value
    total = sum_groups(squares, BLOCK_ROWS, GROUP_BLOCK, COLUMN_BLOCK)
    if ROOT:
        total = tl.sqrt(total + eps)
    group = tl.program_id(1) * GROUP_BLOCK + tl.arange(0, GROUP_BLOCK)
    place = at(out, sample, first, row, group, rows, groups, CHANNELS_LAST)
    tl.store(place, total, mask=inside & (group < groups)[None, :])


@triton.jit
def window_sum(
    tensor, sample, pixel, column, mask, pixels, columns, from_h, from_w, to_w,
    SQUARE: tl.constexpr, CHANNELS_LAST: tl.constexpr,
    KERNEL_H: tl.constexpr, KERNEL_W: tl.constexpr, STRIDE_H: tl.constexpr, STRIDE_W: tl.constexpr,
    PAD_H: tl.constexpr, PAD_W: tl.constexpr, DILATION_H: tl.constexpr, DILATION_W: tl.constexpr,
):  # fmt: skip
    """(pixels, columns): the sum of a (from_h, from_w) map over the window of each pixel of a map `to_w` wide."""
    # In channels_last a pixel counts through the batch, otherwise through its sample.
    batch = (sample + pixel // pixels).to(tl.int64)[:, None] * (from_h * from_w) * columns
    h = (pixel % pixels // to_w * STRIDE_H - PAD_H)[:, None]
    w = (pixel % pixels % to_w * STRIDE_W - PAD_W)[:, None]
    total = tl.zeros((pixel.shape[0], column.shape[0]), tl.float32)
    for i in range(KERNEL_H):
        for j in tl.static_range(KERNEL_W):
            y, z = h + i * DILATION_H, w + j * DILATION_W
            there = (y >= 0) & (y < from_h) & (z >= 0) & (z < from_w) & mask
            place = y * from_w + z
            place = place * columns + column[None, :] if CHANNELS_LAST else place + column[None, :] * (from_h * from_w)
            value = tl.load(tensor + batch + place, mask=there, other=0.0).to(tl.float32)
            total += value * value if SQUARE else value
    return total


@triton.jit
def window_spread(
    tensor, sample, pixel, column, mask, pixels, columns, from_h, from_w, to_w, CHANNELS_LAST: tl.constexpr,
    KERNEL_H: tl.constexpr, KERNEL_W: tl.constexpr, STRIDE_H: tl.constexpr, STRIDE_W: tl.constexpr,
    PAD_H: tl.constexpr, PAD_W: tl.constexpr, DILATION_H: tl.constexpr, DILATION_W: tl.constexpr,
):  # fmt: skip
    """The adjoint of `window_sum`: the sum of a (from_h, from_w) map over the windows that contain each pixel."""
    batch = (sample + pixel // pixels).to(tl.int64)[:, None] * (from_h * from_w) * columns
    h = (pixel % pixels // to_w + PAD_H)[:, None]
    w = (pixel % pixels % to_w + PAD_W)[:, None]
    total = tl.zeros((pixel.shape[0], column.shape[0]), tl.float32)
    for i in range(KERNEL_H):
        for j in tl.static_range(KERNEL_W):
            y, z = h - i * DILATION_H, w - j * DILATION_W
            there = (y >= 0) & (z >= 0) & mask
            if STRIDE_H > 1:
                there &= y % STRIDE_H == 0
                y = y // STRIDE_H
            if STRIDE_W > 1:
                there &= z % STRIDE_W == 0
                z = z // STRIDE_W
            there &= (y < from_h) & (z < from_w)
            place = y * from_w + z
            place = place * columns + column[None, :] if CHANNELS_LAST else place + column[None, :] * (from_h * from_w)
            total += tl.load(tensor + batch + place, mask=there, other=0.0)
    return total


@triton.jit(do_not_specialize=["rows", "pixels", "from_h", "from_w", "to_w"])
def window_map(
    tensor, out, rows, columns, pixels, from_h, from_w, to_w, eps,
    SPREAD: tl.constexpr, SQUARE: tl.constexpr, ROOT: tl.constexpr, CHANNELS_LAST: tl.constexpr,
    KERNEL_H: tl.constexpr, KERNEL_W: tl.constexpr, STRIDE_H: tl.constexpr, STRIDE_W: tl.constexpr,
    PAD_H: tl.constexpr, PAD_W: tl.constexpr, DILATION_H: tl.constexpr, DILATION_W: tl.constexpr,
    ALIGN: tl.constexpr, BLOCK_ROWS: tl.constexpr, COLUMN_BLOCK: tl.constexpr,
):  # fmt: skip
    """out = the window sum, of squares with SQUARE, with ROOT sqrt(sum + eps); with SPREAD the adjoint of the sum."""
    columns = columns // ALIGN * ALIGN
    sample, first, row = rows_of(rows, BLOCK_ROWS)
    column = tl.program_id(1) * COLUMN_BLOCK + tl.arange(0, COLUMN_BLOCK)
    mask = (first + row < rows)[:, None] & (column < columns)[None, :]
    if SPREAD:
        total = window_spread(
            tensor, sample, first + row, column, mask, pixels, columns, from_h, from_w, to_w, CHANNELS_LAST,
            KERNEL_H, KERNEL_W, STRIDE_H, STRIDE_W, PAD_H, PAD_W, DILATION_H, DILATION_W,
        )  # fmt: skip
    else:
        total = window_sum(
            tensor, sample, first + row, column, mask, pixels, columns, from_h, from_w, to_w, SQUARE, CHANNELS_LAST,
            KERNEL_H, KERNEL_W, STRIDE_H, STRIDE_W, PAD_H, PAD_W, DILATION_H, DILATION_W,
        )  # fmt: skip
        if ROOT:
            total = tl.sqrt(total + eps)
    tl.store(at(out, sample, first, row, column, rows, columns, CHANNELS_LAST), total, mask=mask)


# ---- Passes over all filters


@triton.jit(do_not_specialize=["rows"])
def epilogue(
    dot, norm, k, beta, shift, g, y, rows, per, groups,
    CURVE: tl.constexpr, LEARNED: tl.constexpr, SHARED: tl.constexpr, GROUPED: tl.constexpr,
    CHANNELS_LAST: tl.constexpr, ALIGN: tl.constexpr, GROUP_ALIGN: tl.constexpr, ROW_ALIGN: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, COLUMN_BLOCK: tl.constexpr,
):  # fmt: skip
    """g = curve(clamp(dot / norm)); y = β·g + γ where there is a y. g may be dot."""
    rows, per = rows // ROW_ALIGN * ROW_ALIGN, per // ALIGN * ALIGN
    groups = groups // GROUP_ALIGN * GROUP_ALIGN
    sample, first, row = rows_of(rows, BLOCK_ROWS)
    column = tl.program_id(1) * COLUMN_BLOCK + tl.arange(0, COLUMN_BLOCK)
    real = column < per * groups
    inside = (first + row < rows)[:, None]
    mask = inside & real[None, :]
    group, known = groups_of(column, per, inside, mask, GROUPED)
    length = tl.load(at(norm, sample, first, row, group, rows, groups, CHANNELS_LAST), mask=known, other=1.0)
    dots = tl.load(at(dot, sample, first, row, column, rows, per * groups, CHANNELS_LAST), mask=mask, other=0.0)
    cos = tl.clamp(dots.to(tl.float32) * (1 / length), -1.0, 1.0, propagate_nan=tl.PropagateNan.ALL)
    value = curve(cos, k_of(k, column, real, LEARNED, SHARED), CURVE).to(g.dtype.element_ty)
    tl.store(at(g, sample, first, row, column, rows, per * groups, CHANNELS_LAST), value, mask=mask)
    if y is not None:
        out = value.to(tl.float32)
        if beta is not None:
            out *= tl.load(beta + column, mask=real, other=0.0)[None, :].to(tl.float32)
        if shift is not None:
            out += tl.load(shift + column, mask=real, other=0.0)[None, :].to(tl.float32)
        place = at(y, sample, first, row, column, rows, per * groups, CHANNELS_LAST)
        tl.store(place, out.to(y.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["rows"])
def prologue(
    grad, g, norm, k, beta, d_dot, radial, partial_k, partial_beta, partial_shift, rows, per, groups, sin_floor,
    CURVE: tl.constexpr, LEARNED: tl.constexpr, SHARED: tl.constexpr, CHANNELS_LAST: tl.constexpr,
    ALIGN: tl.constexpr, GROUP_ALIGN: tl.constexpr, ROW_ALIGN: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, GROUP_BLOCK: tl.constexpr, COLUMN_BLOCK: tl.constexpr, DENSE: tl.constexpr,
):  # fmt: skip
    """Set d_dot = d / norm and radial = the sum of d · cos over a group's filters / norm², with d = grad · β · dg/dcos.

    Where there is a `partial_k`, its row of this program takes each filter's sum of grad · β · dg/dk over the program's
    rows; `partial_beta` that of grad · g, and `partial_shift` that of grad.
    """
    rows, per = rows // ROW_ALIGN * ROW_ALIGN, per // ALIGN * ALIGN
    groups = groups // GROUP_ALIGN * GROUP_ALIGN
    sample, first, row = rows_of(rows, BLOCK_ROWS)
    inside = (first + row < rows)[:, None]
    along = tl.zeros((BLOCK_ROWS, GROUP_BLOCK * COLUMN_BLOCK), tl.float32)
    for start in range(0, per, COLUMN_BLOCK):
        group, column, real = columns_of(start, per, groups, GROUP_BLOCK, COLUMN_BLOCK, DENSE)
        mask = inside & real[None, :]
        known = inside if GROUP_BLOCK == 1 else mask
        length = tl.load(at(norm, sample, first, row, group, rows, groups, CHANNELS_LAST), mask=known, other=1.0)
        value = tl.load(at(g, sample, first, row, column, rows, per * groups, CHANNELS_LAST), mask=mask, other=0.0)
        upstream = tl.load(
            at(grad, sample, first, row, column, rows, per * groups, CHANNELS_LAST), mask=mask, other=0.0
        )
        upstream, value = upstream.to(tl.float32), value.to(tl.float32)
        partial = tl.program_id(0).to(tl.int64) * (per * groups) + column
        if partial_shift is not None:
            tl.store(partial_shift + partial, tl.sum(upstream, axis=0), mask=real)
        if beta is not None:
            tl.store(partial_beta + partial, tl.sum(upstream * value, axis=0), mask=real)
            upstream *= tl.load(beta + column, mask=real, other=0.0).to(tl.float32)[None, :]
        own_k = k_of(k, column, real, LEARNED, SHARED)
        cos, by_cos, by_k = slope(value, own_k, sin_floor, CURVE)
        d = upstream * by_cos
        along += d * cos
        place = at(d_dot, sample, first, row, column, rows, per * groups, CHANNELS_LAST)
        tl.store(place, (d * (1 / length)).to(d_dot.dtype.element_ty), mask=mask)
        if partial_k is not None:
            tl.store(partial_k + partial, tl.sum(upstream * by_k, axis=0), mask=real)
    total = sum_groups(along, BLOCK_ROWS, GROUP_BLOCK, COLUMN_BLOCK)
    group = tl.program_id(1) * GROUP_BLOCK + tl.arange(0, GROUP_BLOCK)
    mask = inside & (group < groups)[None, :]
    length = tl.load(at(norm, sample, first, row, group, rows, groups, CHANNELS_LAST), mask=mask, other=1.0)
    place = at(radial, sample, first, row, group, rows, groups, CHANNELS_LAST)
    tl.store(place, total / (length * length), mask=mask)


@triton.jit(do_not_specialize=["rows", "pixels", "from_h", "from_w", "to_w"])
def correct(
    grad_x, x, radial, rows, per, groups, pixels, from_h, from_w, to_w,
    GATHER: tl.constexpr, GROUPED: tl.constexpr, CHANNELS_LAST: tl.constexpr,
    KERNEL_H: tl.constexpr, KERNEL_W: tl.constexpr, STRIDE_H: tl.constexpr, STRIDE_W: tl.constexpr,
    PAD_H: tl.constexpr, PAD_W: tl.constexpr, DILATION_H: tl.constexpr, DILATION_W: tl.constexpr,
    ALIGN: tl.constexpr, GROUP_ALIGN: tl.constexpr, ROW_ALIGN: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, COLUMN_BLOCK: tl.constexpr,
):  # fmt: skip
    """grad_x -= x · spread(radial). Without GATHER `radial` is spread already, and has the places of x."""
    rows, per = rows // ROW_ALIGN * ROW_ALIGN, per // ALIGN * ALIGN
    groups = groups // GROUP_ALIGN * GROUP_ALIGN
    sample, first, row = rows_of(rows, BLOCK_ROWS)
    column = tl.program_id(1) * COLUMN_BLOCK + tl.arange(0, COLUMN_BLOCK)
    inside = (first + row < rows)[:, None]
    mask = inside & (column < per * groups)[None, :]
    group, known = groups_of(column, per, inside, mask, GROUPED)
    if GATHER:
        spread = window_spread(
            radial, sample, first + row, group, known, pixels, groups, from_h, from_w, to_w, CHANNELS_LAST,
            KERNEL_H, KERNEL_W, STRIDE_H, STRIDE_W, PAD_H, PAD_W, DILATION_H, DILATION_W,
        )  # fmt: skip
    else:
        spread = tl.load(at(radial, sample, first, row, group, rows, groups, CHANNELS_LAST), mask=known, other=0.0)
    value = tl.load(at(x, sample, first, row, column, rows, per * groups, CHANNELS_LAST), mask=mask, other=0.0)
    place = at(grad_x, sample, first, row, column, rows, per * groups, CHANNELS_LAST)
    new = tl.load(place, mask=mask, other=0.0).to(tl.float32) - value.to(tl.float32) * spread
    tl.store(place, new.to(grad_x.dtype.element_ty), mask=mask)


# ---- Filters: one program a row


@triton.jit
def normalize_rows(weight, unit, norm, fan_in, eps, BLOCK: tl.constexpr):
    """norm = sqrt(‖w‖² + eps), unit = w / norm for each row w."""
    start = tl.program_id(0).to(tl.int64) * fan_in
    place = tl.arange(0, BLOCK)
    squares = tl.zeros((BLOCK,), tl.float32)
    for i in range(0, fan_in, BLOCK):
        w = tl.load(weight + start + i + place, mask=i + place < fan_in, other=0.0).to(tl.float32)
        squares += w * w
    length = tl.sqrt(tl.sum(squares, axis=0) + eps)
    tl.store(norm + tl.program_id(0), length)
    for i in range(0, fan_in, BLOCK):
        w = tl.load(weight + start + i + place, mask=i + place < fan_in, other=0.0).to(tl.float32)
        tl.store(unit + start + i + place, (w / length).to(unit.dtype.element_ty), mask=i + place < fan_in)


@triton.jit
def project_rows(v, weight, norm, out, fan_in, BLOCK: tl.constexpr):
    """out = (v - ŵ (ŵ·v)) / norm, ŵ = w / norm, for each row v and w."""
    start = tl.program_id(0).to(tl.int64) * fan_in
    place = tl.arange(0, BLOCK)
    products = tl.zeros((BLOCK,), tl.float32)
    for i in range(0, fan_in, BLOCK):
        mask = i + place < fan_in
        w = tl.load(weight + start + i + place, mask=mask, other=0.0).to(tl.float32)
        products += w * tl.load(v + start + i + place, mask=mask, other=0.0).to(tl.float32)
    length = tl.load(norm + tl.program_id(0))
    inward = tl.sum(products, axis=0) / length
    for i in range(0, fan_in, BLOCK):
        mask = i + place < fan_in
        w = tl.load(weight + start + i + place, mask=mask, other=0.0).to(tl.float32)
        across = tl.load(v + start + i + place, mask=mask, other=0.0).to(tl.float32) - w / length * inward
        tl.store(out + start + i + place, (across / length).to(out.dtype.element_ty), mask=mask)
