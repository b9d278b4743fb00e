"""Farnebäck flow and flow labels of a whole batch on the GPU: the kernels of `farneback` and
`flow_labels`, imported when one of them is first asked for its Triton implementation.

Letters: F frames, P pairs of consecutive frames, N patches per frame (row-major). All planes are
float32 and contiguous; only the video is read through strides.

    per scale     shrink rows, shrink columns    frames -> one plane per frame
                  expand rows, expand columns    -> 5 planes per frame, shared by its two pairs
    per update    match                          -> 2 x 2 systems, summed over the box's rows
                  solve                          sum over the box's columns -> flow
    labels        patch means                    in place of the last solve: flow is not stored
                  label                          one program per pair

Each frame is expanded once, though it belongs to two pairs. Nothing waits for the device, and each
launch parameter follows from shapes and Python numbers: side streams and CUDA graphs may run this.
Sums keep the order of the reference, divisions and roots are rounded correctly, and
multiply-adds are not fused (`enable_fp_fusion=False`): static pixels sit exactly on the edge of
what counts as inside, where a residue of 1e-9 instead of 0 changes labels. There is no matrix
product in here, hence no TF32.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from timefast.kernels.farneback import PUBLISHED, Basis, basis, pyramid

ROWS = 16  # output rows of a match program, held in registers
COLS = 64
TILE_ROWS = 4  # rows of a program of the other kernels
WORKSPACE = 1 << 31  # bytes of planes, about: larger batches are worked through in parts
ZERO, COARSER, STORED = 0, 1, 2  # where the flow before an update comes from


@triton.jit
def _source_position(i, old_size, new_size):
    """Where sample i of `new_size` lies among `old_size` (half-pixel centres): low index and
    fraction. In integers, so that the fraction is rounded once."""
    numerator = tl.maximum((2 * i + 1) * old_size - new_size, 0)
    low = numerator // (2 * new_size)
    fraction = tl.div_rn((numerator % (2 * new_size)).to(tl.float32), 2.0 * new_size)
    last = low >= old_size - 1
    return tl.where(last, old_size - 1, low), tl.where(last, 0.0, fraction)


@triton.jit
def _mirror(i, size):
    i = tl.abs(i)
    return tl.maximum(tl.minimum(i, 2 * (size - 1) - i), 0)


@triton.jit
def _tile(height, width, TILE_ROWS: tl.constexpr, COLS: tl.constexpr):
    """Program id -> (plane number, rows [TILE_ROWS, 1], columns [1, COLS])."""
    tiles_x = tl.cdiv(width, COLS)
    tiles = tiles_x * tl.cdiv(height, TILE_ROWS)
    tile = tl.program_id(0) % tiles
    y = (tile // tiles_x) * TILE_ROWS + tl.arange(0, TILE_ROWS)[:, None]
    x = (tile % tiles_x) * COLS + tl.arange(0, COLS)[None, :]
    return (tl.program_id(0) // tiles).to(tl.int64), y, x


@triton.jit
def _shrink_kernel(
    source_ptr,
    out_ptr,  # [F, height, width]
    stride_clip,
    stride_frame,
    stride_channel,
    stride_y,
    stride_x,
    frames_per_clip,
    old_size,  # of the source along the blurred axis
    height,
    width,
    red,
    green,
    blue,
    offset,
    TAPS: tl.constexpr,
    VERTICAL: tl.constexpr,
    COLOURS: tl.constexpr,
    RESIZE: tl.constexpr,
    TILE_ROWS: tl.constexpr,
    COLS: tl.constexpr,
):
    """Grey, Gaussian blur along one axis with a mirrored border, bilinear samples of the result."""
    frame, y, x = _tile(height, width, TILE_ROWS, COLS)
    mask = (y < height) & (x < width)
    source_ptr += frame // frames_per_clip * stride_clip + frame % frames_per_clip * stride_frame
    if VERTICAL:
        at, new_size, stride_along = y, height, stride_y
        source_ptrs = source_ptr + x.to(tl.int64) * stride_x
    else:
        at, new_size, stride_along = x, width, stride_x
        source_ptrs = source_ptr + y.to(tl.int64) * stride_y
    if RESIZE:
        low, fraction = _source_position(at, old_size, new_size)
    else:
        low, fraction = at, 0.0
    radius: tl.constexpr = len(TAPS) // 2
    here = tl.zeros([TILE_ROWS, COLS], tl.float32)  # blurred at low, and at low + 1
    beside = tl.zeros([TILE_ROWS, COLS], tl.float32)
    for j in tl.static_range(len(TAPS) + RESIZE):
        ptrs = source_ptrs + _mirror(low + (j - radius), old_size).to(tl.int64) * stride_along
        value = tl.load(ptrs, mask=mask, other=0.0).to(tl.float32)
        if COLOURS:
            g = tl.load(ptrs + stride_channel, mask=mask, other=0.0).to(tl.float32)
            b = tl.load(ptrs + 2 * stride_channel, mask=mask, other=0.0).to(tl.float32)
            value = value * red + g * green + b * blue + offset
        if j < len(TAPS):
            here += TAPS[j] * value
        if RESIZE and j > 0:
            beside += TAPS[j - 1] * value
    if RESIZE:
        here = here + fraction * (beside - here)
    tl.store(out_ptr + frame * height * width + y * width + x, here, mask=mask)


@triton.jit
def _clamp(i, size):
    return tl.minimum(tl.maximum(i, 0), size - 1)


@triton.jit
def _expand_rows_kernel(
    image_ptr,  # [F, height, width]
    out_ptr,  # [F, 3, height, width]: sums over rows of g, i g, i i g
    height,
    width,
    WEIGHTS: tl.constexpr,
    TILE_ROWS: tl.constexpr,
    COLS: tl.constexpr,
):
    frame, y, x = _tile(height, width, TILE_ROWS, COLS)
    mask = (y < height) & (x < width)
    plane = height * width
    image_ptr += frame * plane
    zeroth = WEIGHTS[0] * tl.load(image_ptr + y * width + x, mask=mask, other=0.0)
    first = tl.zeros([TILE_ROWS, COLS], tl.float32)
    second = tl.zeros([TILE_ROWS, COLS], tl.float32)
    for i in tl.static_range(1, len(WEIGHTS)):
        after = tl.load(image_ptr + _clamp(y + i, height) * width + x, mask=mask, other=0.0)
        before = tl.load(image_ptr + _clamp(y - i, height) * width + x, mask=mask, other=0.0)
        zeroth += WEIGHTS[i] * (after + before)
        first += (i * WEIGHTS[i]) * (after - before)
        second += (i * i * WEIGHTS[i]) * (after + before)
    out_ptrs = out_ptr + frame * 3 * plane + y * width + x
    tl.store(out_ptrs, zeroth, mask=mask)
    tl.store(out_ptrs + plane, first, mask=mask)
    tl.store(out_ptrs + 2 * plane, second, mask=mask)


# Were the width known to be a multiple of 16, the stores would be vectors of four columns a thread,
# and each shifted load of a warp would touch four times the cache lines.
@triton.jit(do_not_specialize=["height", "width"])
def _expand_columns_kernel(
    sums_ptr,  # [F, 3, height, width]
    out_ptr,  # [F, 5, height, width]: coefficients of y, x, yy, xx, xy
    height,
    width,
    linear,
    constant,
    square,
    mixed,
    WEIGHTS: tl.constexpr,
    TILE_ROWS: tl.constexpr,
    COLS: tl.constexpr,
):
    frame, y, x = _tile(height, width, TILE_ROWS, COLS)
    mask = (y < height) & (x < width)
    plane = height * width
    v0_ptr = sums_ptr + frame * 3 * plane + y * width
    v1_ptr = v0_ptr + plane
    v2_ptr = v1_ptr + plane
    one = WEIGHTS[0] * tl.load(v0_ptr + x, mask=mask, other=0.0)
    y1 = WEIGHTS[0] * tl.load(v1_ptr + x, mask=mask, other=0.0)
    yy = WEIGHTS[0] * tl.load(v2_ptr + x, mask=mask, other=0.0)
    x1 = tl.zeros([TILE_ROWS, COLS], tl.float32)
    xx = tl.zeros([TILE_ROWS, COLS], tl.float32)
    xy = tl.zeros([TILE_ROWS, COLS], tl.float32)
    for i in tl.static_range(1, len(WEIGHTS)):
        right = _clamp(x + i, width)
        left = _clamp(x - i, width)
        after = tl.load(v0_ptr + right, mask=mask, other=0.0)
        before = tl.load(v0_ptr + left, mask=mask, other=0.0)
        one += WEIGHTS[i] * (after + before)
        x1 += (i * WEIGHTS[i]) * (after - before)
        xx += (i * i * WEIGHTS[i]) * (after + before)
        after = tl.load(v1_ptr + right, mask=mask, other=0.0)
        before = tl.load(v1_ptr + left, mask=mask, other=0.0)
        y1 += WEIGHTS[i] * (after + before)
        xy += (i * WEIGHTS[i]) * (after - before)
        after = tl.load(v2_ptr + right, mask=mask, other=0.0)
        before = tl.load(v2_ptr + left, mask=mask, other=0.0)
        yy += WEIGHTS[i] * (after + before)
    out_ptrs = out_ptr + frame * 5 * plane + y * width + x
    tl.store(out_ptrs, y1 * linear, mask=mask)
    tl.store(out_ptrs + plane, x1 * linear, mask=mask)
    tl.store(out_ptrs + 2 * plane, one * constant + yy * square, mask=mask)
    tl.store(out_ptrs + 3 * plane, one * constant + xx * square, mask=mask)
    tl.store(out_ptrs + 4 * plane, xy * mixed, mask=mask)


@triton.jit
def _edge_weight(i, size):
    near = tl.where(i < 2, 0.14, tl.where(i < 5, 0.4472, 1.0))
    i = size - 1 - i
    return near * tl.where(i < 2, 0.14, tl.where(i < 5, 0.4472, 1.0))


@triton.jit
def _sample(ptr, a, b, c, d, weight_a, weight_b, weight_c, weight_d, mask):
    """Weighted sum of the four corners a, b, c, d of a plane; 0 where masked out."""
    value = weight_a * tl.load(ptr + a, mask=mask, other=0.0)
    value += weight_b * tl.load(ptr + b, mask=mask, other=0.0)
    value += weight_c * tl.load(ptr + c, mask=mask, other=0.0)
    return value + weight_d * tl.load(ptr + d, mask=mask, other=0.0)


@triton.jit
def _resized(ptr, left, right, down, fx, fy, mask):
    """Bilinear sample of the row at `ptr` and the one `down` elements further."""
    a = tl.load(ptr + left, mask=mask, other=0.0)
    a += fy * (tl.load(ptr + left + down, mask=mask, other=0.0) - a)
    b = tl.load(ptr + right, mask=mask, other=0.0)
    b += fy * (tl.load(ptr + right + down, mask=mask, other=0.0) - b)
    return a + fx * (b - a)


@triton.jit(do_not_specialize=["frames_per_clip", "coarse_height", "coarse_width"])
def _match_kernel(
    expansion_ptr,  # [F, 5, height, width]
    flow_ptr,  # [P, 2, height, width], or [P, 2, coarse_height, coarse_width] of the scale above
    sums_ptr,  # [P, 5, height, width]: the systems of the pixels, summed over 2 RADIUS + 1 rows
    frames_per_clip,
    height,
    width,
    coarse_height,
    coarse_width,
    magnify,
    START: tl.constexpr,
    RADIUS: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
):
    """The system of each pixel in one row of the image at a time, added to every output row whose
    box covers it: systems are never stored, and each sum is direct."""
    pair, y_out, x = _tile(height, width, ROWS, COLS)
    plane = height * width
    frame = pair // (frames_per_clip - 1) * frames_per_clip + pair % (frames_per_clip - 1)
    before_ptr = expansion_ptr + frame * 5 * plane
    after_ptr = before_ptr + 5 * plane
    in_row = x < width
    weight_x = _edge_weight(x, width)
    row = tl.arange(0, ROWS)[:, None]
    y_first = (tl.program_id(0) // tl.cdiv(width, COLS)) % tl.cdiv(height, ROWS) * ROWS - RADIUS

    g11 = tl.zeros([ROWS, COLS], tl.float32)
    g12 = tl.zeros([ROWS, COLS], tl.float32)
    g22 = tl.zeros([ROWS, COLS], tl.float32)
    h1 = tl.zeros([ROWS, COLS], tl.float32)
    h2 = tl.zeros([ROWS, COLS], tl.float32)
    for i in range(ROWS + 2 * RADIUS):
        y = _clamp(y_first + i, height)
        if START == 0:
            dx = tl.zeros([1, COLS], tl.float32)
            dy = tl.zeros([1, COLS], tl.float32)
        elif START == 1:
            coarse_plane = coarse_height * coarse_width
            top, fy = _source_position(y, coarse_height, height)
            left, fx = _source_position(x, coarse_width, width)
            right = tl.minimum(left + 1, coarse_width - 1)
            down = (tl.minimum(top + 1, coarse_height - 1) - top) * coarse_width
            ptr = flow_ptr + pair * 2 * coarse_plane + top * coarse_width
            dx = _resized(ptr, left, right, down, fx, fy, in_row) * magnify
            dy = _resized(ptr + coarse_plane, left, right, down, fx, fy, in_row) * magnify
        else:
            ptr = flow_ptr + pair * 2 * plane + y * width + x
            dx = tl.load(ptr, mask=in_row, other=0.0)
            dy = tl.load(ptr + plane, mask=in_row, other=0.0)

        at_x = x.to(tl.float32) + dx
        at_y = y.to(tl.float32) + dy
        left_x = tl.floor(at_x)
        top_y = tl.floor(at_y)
        inside = (left_x >= 0) & (left_x < width - 1) & (top_y >= 0) & (top_y < height - 1)
        inside &= in_row
        a = tl.where(inside, top_y, 0.0).to(tl.int32) * width
        a += tl.where(inside, left_x, 0.0).to(tl.int32)
        b = a + 1
        c = a + width
        d = c + 1
        fx = at_x - left_x
        fy = at_y - top_y
        wa = (1 - fx) * (1 - fy)
        wb = fx * (1 - fy)
        wc = (1 - fx) * fy
        wd = fx * fy

        ptr = before_ptr + y * width + x
        by = tl.load(ptr, mask=in_row, other=0.0)
        bx = tl.load(ptr + plane, mask=in_row, other=0.0)
        yy = tl.load(ptr + 2 * plane, mask=in_row, other=0.0)
        xx = tl.load(ptr + 3 * plane, mask=in_row, other=0.0)
        xy = tl.load(ptr + 4 * plane, mask=in_row, other=0.0)
        by = (by - _sample(after_ptr, a, b, c, d, wa, wb, wc, wd, inside)) * 0.5
        bx = (bx - _sample(after_ptr + plane, a, b, c, d, wa, wb, wc, wd, inside)) * 0.5
        halve = tl.where(inside, 0.5, 1.0)
        yy = (yy + _sample(after_ptr + 2 * plane, a, b, c, d, wa, wb, wc, wd, inside)) * halve
        xx = (xx + _sample(after_ptr + 3 * plane, a, b, c, d, wa, wb, wc, wd, inside)) * halve
        xy = (xy + _sample(after_ptr + 4 * plane, a, b, c, d, wa, wb, wc, wd, inside)) * halve * 0.5
        by = by + yy * dy + xy * dx
        bx = bx + xy * dy + xx * dx
        weight = _edge_weight(y, height) * weight_x
        by *= weight
        bx *= weight
        yy *= weight
        xx *= weight
        xy *= weight

        covers = (row <= i) & (i <= row + 2 * RADIUS)
        g11 += tl.where(covers, yy * yy + xy * xy, 0.0)
        g12 += tl.where(covers, (yy + xx) * xy, 0.0)
        g22 += tl.where(covers, xx * xx + xy * xy, 0.0)
        h1 += tl.where(covers, yy * by + xy * bx, 0.0)
        h2 += tl.where(covers, xy * by + xx * bx, 0.0)

    out_ptrs = sums_ptr + pair * 5 * plane + y_out * width + x
    mask = (y_out < height) & in_row
    tl.store(out_ptrs, g11, mask=mask)
    tl.store(out_ptrs + plane, g12, mask=mask)
    tl.store(out_ptrs + 2 * plane, g22, mask=mask)
    tl.store(out_ptrs + 3 * plane, h1, mask=mask)
    tl.store(out_ptrs + 4 * plane, h2, mask=mask)


@triton.jit
def _flow_at(row_ptrs, x, plane, width, scale, mask, RADIUS: tl.constexpr):
    """Sums over the box's columns, and the solution of the 2 x 2 systems."""
    left = _clamp(x - RADIUS, width)
    g11 = tl.load(row_ptrs + left, mask=mask, other=0.0)
    g12 = tl.load(row_ptrs + plane + left, mask=mask, other=0.0)
    g22 = tl.load(row_ptrs + 2 * plane + left, mask=mask, other=0.0)
    h1 = tl.load(row_ptrs + 3 * plane + left, mask=mask, other=0.0)
    h2 = tl.load(row_ptrs + 4 * plane + left, mask=mask, other=0.0)
    for i in range(1 - RADIUS, RADIUS + 1):
        ptrs = row_ptrs + _clamp(x + i, width)
        g11 += tl.load(ptrs, mask=mask, other=0.0)
        g12 += tl.load(ptrs + plane, mask=mask, other=0.0)
        g22 += tl.load(ptrs + 2 * plane, mask=mask, other=0.0)
        h1 += tl.load(ptrs + 3 * plane, mask=mask, other=0.0)
        h2 += tl.load(ptrs + 4 * plane, mask=mask, other=0.0)
    g11 *= scale
    g12 *= scale
    g22 *= scale
    h1 *= scale
    h2 *= scale
    inverse = tl.div_rn(1.0, g11 * g22 - g12 * g12 + 1e-3)
    return (g11 * h2 - g12 * h1) * inverse, (g22 * h1 - g12 * h2) * inverse


@triton.jit(do_not_specialize=["height", "width"])
def _solve_kernel(
    sums_ptr,  # [P, 5, height, width]
    flow_ptr,  # [P, 2, height, width]
    height,
    width,
    scale,  # 1 / winsize squared
    RADIUS: tl.constexpr,
    TILE_ROWS: tl.constexpr,
    COLS: tl.constexpr,
):
    pair, y, x = _tile(height, width, TILE_ROWS, COLS)
    mask = (y < height) & (x < width)
    plane = height * width
    row_ptrs = sums_ptr + pair * 5 * plane + y * width
    dx, dy = _flow_at(row_ptrs, x, plane, width, scale, mask, RADIUS)
    out_ptrs = flow_ptr + pair * 2 * plane + y * width + x
    tl.store(out_ptrs, dx, mask=mask)
    tl.store(out_ptrs + plane, dy, mask=mask)


@triton.jit
def _patch_means_kernel(
    sums_ptr,  # [P, 5, height, width]
    vectors_ptr,  # [P, 2, N]
    height,
    width,
    scale,
    RADIUS: tl.constexpr,
    PATCH: tl.constexpr,
    SIDE: tl.constexpr,  # of the tiles a patch is worked through in
):
    """The last solve at full resolution, straight to the mean vector of one patch."""
    columns = width // PATCH
    patches = columns * (height // PATCH)
    patch = tl.program_id(0) % patches
    pair = (tl.program_id(0) // patches).to(tl.int64)
    plane = height * width
    sum_x = tl.zeros([SIDE, SIDE], tl.float32)
    sum_y = tl.zeros([SIDE, SIDE], tl.float32)
    for y_tile in range(0, PATCH, SIDE):
        for x_tile in range(0, PATCH, SIDE):
            y = y_tile + tl.arange(0, SIDE)[:, None]
            x = x_tile + tl.arange(0, SIDE)[None, :]
            mask = (y < PATCH) & (x < PATCH)
            y += patch // columns * PATCH
            x += patch % columns * PATCH
            row_ptrs = sums_ptr + pair * 5 * plane + y * width
            dx, dy = _flow_at(row_ptrs, x, plane, width, scale, mask, RADIUS)
            sum_x += tl.where(mask, dx, 0.0)
            sum_y += tl.where(mask, dy, 0.0)
    area: tl.constexpr = PATCH * PATCH
    out_ptr = vectors_ptr + pair * 2 * patches + patch
    tl.store(out_ptr, tl.div_rn(tl.sum(sum_x), area * 1.0))
    tl.store(out_ptr + patches, tl.div_rn(tl.sum(sum_y), area * 1.0))


@triton.jit
def _label_kernel(
    vectors_ptr,  # [P, 2, N]
    labels_ptr,  # int64 [P, N]
    patches,
    tau,
    MINMAX: tl.constexpr,
    BLOCKS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    pair = tl.program_id(0).to(tl.int64)
    vectors_ptr += pair * 2 * patches
    low = float("inf")
    high = 0.0
    broken = 0
    for block in range(BLOCKS):
        n = block * BLOCK + tl.arange(0, BLOCK)
        mask = n < patches
        dx = tl.load(vectors_ptr + n, mask=mask, other=0.0)
        dy = tl.load(vectors_ptr + patches + n, mask=mask, other=0.0)
        radius = tl.sqrt_rn(dx * dx + dy * dy)
        low = tl.minimum(low, tl.min(tl.where(mask, radius, float("inf"))))
        high = tl.maximum(high, tl.max(radius))
        broken = tl.maximum(broken, tl.max((radius != radius).to(tl.int32)))
    extent = high - low
    for block in range(BLOCKS):
        n = block * BLOCK + tl.arange(0, BLOCK)
        mask = n < patches
        dx = tl.load(vectors_ptr + n, mask=mask, other=0.0)
        dy = tl.load(vectors_ptr + patches + n, mask=mask, other=0.0)
        radius = tl.sqrt_rn(dx * dx + dy * dy)
        if MINMAX:
            percent = tl.div_rn(100 * (radius - low), extent)
            moving = tl.where(extent >= 2.220446049250313e-16, percent, 0.0) >= 1
        else:
            moving = radius >= tau
        # the vector turned by quarters into the first quadrant, where it is (along, across)
        quarter = tl.where(dy > 0, tl.where(dx <= 0, 1, 0), tl.where(dx < 0, 2, 3))
        quarter = tl.where((dy == 0) & (dx >= 0), 0, quarter)
        even = quarter % 2 == 0
        along = tl.where(even, tl.abs(dx), tl.abs(dy))
        across = tl.where(even, tl.abs(dy), tl.abs(dx))
        octant = 2 * quarter + tl.where((across >= along) & (across > 0), 1, 0)
        label = tl.where(broken == 0, tl.where(moving, octant + 1, 0), 0)
        tl.store(labels_ptr + pair * patches + n, label.to(tl.int64), mask=mask)


def _tiles(height: int, width: int, rows: int) -> int:
    return math.ceil(height / rows) * math.ceil(width / COLS)


def _shrunk(
    video: Tensor,
    height: int,
    width: int,
    taps: tuple[float, ...],
    channels: tuple[float, float, float, float],
) -> Tensor:
    """Blurred and sampled grey frames [F, height, width] of a video [B, 1 or 3, T, ., .]."""
    clips, colours, frames_per_clip, old_height, old_width = video.shape
    frames = clips * frames_per_clip
    constants: dict[str, Any] = {"TAPS": taps, "TILE_ROWS": TILE_ROWS, "COLS": COLS}
    options: dict[str, Any] = {"num_warps": 4, "enable_fp_fusion": False}
    rows = video.new_empty((frames, height, old_width), dtype=torch.float32)
    _shrink_kernel[(frames * _tiles(height, old_width, TILE_ROWS),)](
        video,
        rows,
        *(video.stride(dim) for dim in (0, 2, 1, 3, 4)),
        frames_per_clip,
        old_height,
        height,
        old_width,
        *channels,
        VERTICAL=True,
        COLOURS=colours == 3,
        RESIZE=height != old_height,
        **constants,
        **options,
    )
    out = rows.new_empty((frames, height, width))
    _shrink_kernel[(frames * _tiles(height, width, TILE_ROWS),)](
        rows,
        out,
        *(rows.stride(0), 0, 0, rows.stride(1), 1),  # each frame as a clip of its own
        1,
        old_width,
        height,
        width,
        *channels,
        VERTICAL=False,
        COLOURS=False,
        RESIZE=width != old_width,
        **constants,
        **options,
    )
    return out


def _expanded(image: Tensor, weights: Basis) -> Tensor:
    """[F, height, width] -> coefficients [F, 5, height, width]"""
    frames, height, width = image.shape
    grid = (frames * _tiles(height, width, TILE_ROWS),)
    options: dict[str, Any] = {"num_warps": 4, "enable_fp_fusion": False}
    constants: dict[str, Any] = {"WEIGHTS": weights.weights, "TILE_ROWS": TILE_ROWS, "COLS": COLS}
    sums = image.new_empty((frames, 3, height, width))
    _expand_rows_kernel[grid](image, sums, height, width, **constants, **options)
    out = image.new_empty((frames, 5, height, width))
    _expand_columns_kernel[grid](
        sums,
        out,
        height,
        width,
        weights.linear,
        weights.constant,
        weights.square,
        weights.mixed,
        **constants,
        **options,
    )
    return out


def _run(
    video: Tensor,
    out: Tensor,
    *,
    channels: tuple[float, float, float, float],
    pyr_scale: float,
    levels: int,
    winsize: int,
    iterations: int,
    poly_n: int,
    poly_sigma: float,
    patch_size: int = 0,
) -> None:
    """Flow between consecutive frames of a video [B, 1 or 3, T, height, width] into `out`:
    [P, 2, height, width], or with a patch size the means over patches [P, 2, N]."""
    clips, _, frames_per_clip = video.shape[:3]
    pairs = clips * (frames_per_clip - 1)
    weights = basis(poly_n, poly_sigma)
    scales = pyramid(video.shape[-2], video.shape[-1], pyr_scale, levels)
    radius = winsize // 2
    shared: dict[str, Any] = {"RADIUS": radius, "enable_fp_fusion": False}
    flow = coarser = out
    for scale in scales:
        height, width, taps = scale
        expansion = _expanded(_shrunk(video, height, width, taps, channels), weights)
        sums = expansion.new_empty((pairs, 5, height, width))
        full = scale is scales[-1]
        flow = out if full and not patch_size else sums.new_empty((pairs, 2, height, width))
        for iteration in range(iterations):
            before = ZERO if scale is scales[0] else COARSER
            start = STORED if iteration else before
            _match_kernel[(pairs * _tiles(height, width, ROWS),)](
                expansion,
                coarser if start == COARSER else flow,
                sums,
                frames_per_clip,
                height,
                width,
                *coarser.shape[-2:],
                1 / pyr_scale,
                START=start,
                ROWS=ROWS,
                COLS=COLS,
                num_warps=2,
                **shared,
            )
            if full and patch_size and iteration == iterations - 1:
                _patch_means_kernel[(out[:, 0].numel(),)](
                    sums,
                    out,
                    height,
                    width,
                    1 / winsize**2,
                    PATCH=patch_size,
                    SIDE=min(16, triton.next_power_of_2(patch_size)),
                    num_warps=4,
                    **shared,
                )
            else:
                _solve_kernel[(pairs * _tiles(height, width, TILE_ROWS),)](
                    sums,
                    flow,
                    height,
                    width,
                    1 / winsize**2,
                    TILE_ROWS=TILE_ROWS,
                    COLS=COLS,
                    num_warps=4,
                    **shared,
                )
        coarser = flow


def _in_parts(video: Tensor, out: Tensor, **parameters: Any) -> None:
    """`_run` over as many clips at a time as the workspace holds; some fifteen planes a frame are
    alive at once. `out` [B, T-1, ...]"""
    frames_per_clip, height, width = video.shape[2:]
    clips = max(1, WORKSPACE // (15 * 4 * frames_per_clip * height * width))
    with torch.cuda.device_of(video):  # Triton launches on the current device
        for part, part_out in zip(video.split(clips), out.split(clips), strict=True):
            if part_out.numel():
                _run(part, part_out.flatten(0, 1), **parameters)


@torch.library.custom_op("timefast::farneback", mutates_args=())
def farneback_triton(
    prev: Tensor,
    next: Tensor,
    pyr_scale: float,
    levels: int,
    winsize: int,
    iterations: int,
    poly_n: int,
    poly_sigma: float,
) -> Tensor:
    """[..., height, width] twice -> [..., 2, height, width]; every pair is a clip of two frames."""
    *batch, height, width = prev.shape
    pairs = [image.reshape(math.prod(batch), height, width).float() for image in (prev, next)]
    flow = pairs[0].new_empty((math.prod(batch), 1, 2, height, width))
    _in_parts(
        torch.stack(pairs, dim=1).unsqueeze(1),
        flow,
        channels=(1.0, 0.0, 0.0, 0.0),
        pyr_scale=pyr_scale,
        levels=levels,
        winsize=winsize,
        iterations=iterations,
        poly_n=poly_n,
        poly_sigma=poly_sigma,
    )
    return flow.view(*batch, 2, height, width)


@farneback_triton.register_fake
def _(prev: Tensor, next: Tensor, *parameters: Any) -> Tensor:
    *batch, height, width = prev.shape
    return prev.new_empty((*batch, 2, height, width), dtype=torch.float32)


def labelled(vectors: Tensor, tau: float | None) -> Tensor:
    """Contiguous mean vectors [P, 2, N] -> int64 [P, N]; tau None is the minmax rule."""
    pairs, _, patches = vectors.shape
    labels = vectors.new_empty((pairs, patches), dtype=torch.int64)
    block = min(1024, triton.next_power_of_2(patches))
    if pairs:
        with torch.cuda.device_of(vectors):
            _label_kernel[(pairs,)](
                vectors,
                labels,
                patches,
                0.0 if tau is None else tau,
                MINMAX=tau is None,
                BLOCKS=math.ceil(patches / block),
                BLOCK=block,
                num_warps=4,
                enable_fp_fusion=False,
            )
    return labels


@torch.library.custom_op("timefast::flow_labels", mutates_args=())
def flow_labels_triton(
    video: Tensor, patch_size: int, tau: float | None, channels: Sequence[float]
) -> Tensor:
    """[B, 3, T, height, width] -> int64 [B, T-1, N]; tau None is the minmax rule."""
    clips, _, frames, height, width = video.shape
    patches = (height // patch_size) * (width // patch_size)
    vectors = video.new_empty((clips, frames - 1, 2, patches), dtype=torch.float32)
    _in_parts(video, vectors, channels=tuple(channels), patch_size=patch_size, **PUBLISHED)
    return labelled(vectors.flatten(0, 1), tau).view(clips, frames - 1, patches)


@flow_labels_triton.register_fake
def _(video: Tensor, patch_size: int, tau: float | None, channels: Sequence[float]) -> Tensor:
    clips, _, frames, height, width = video.shape
    patches = (height // patch_size) * (width // patch_size)
    return video.new_empty((clips, frames - 1, patches), dtype=torch.int64)
