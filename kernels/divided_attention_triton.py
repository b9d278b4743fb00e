"""Divided attention in Triton: the kernels of `time_attention` and `space_attention`, imported when
one of them is first asked for its Triton implementation.

Letters: B clips, T frames, N patches per frame, S = 1 + N, H heads, D head width; DP, TP: D and T
rounded up to a power of two. docs/kernels/divided_attention.md has derivation and drawings.

    time    one program: one clip, one head, a few positions with all their frames. Every token
            belongs to one tile, so that backward recomputes from q, k, v and needs no second pass.
    space   forward: an online softmax over one frame, as in FlashAttention-2.
            backward: a kernel for dq that runs over keys, a kernel for dk, dv that runs over
            queries. The class token is a row of the first query tile; as a key, and as a query of
            the second backward kernel, it is a vector beside the tiles. What it collects from
            frames and tiles is written out in parts and summed in a fixed order.

All tensors are read through their strides with 64-bit offsets; outputs are contiguous. Nothing uses
atomics. Products take operands in the dtype of the inputs and accumulate in float32; everything
else is float32. Grids have one axis, since a second ends at 65,535 programs.
"""

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from timefast.kernels.tiles import launch_parameters, power_of_two

LOG2_E = math.log2(math.e)  # softmax in base 2: exp2 is what the hardware has
INTERPRETED = triton.knobs.runtime.interpret  # bfloat16 products are wrong in the interpreter


@triton.jit
def _dot(a, b, WIDEN: tl.constexpr):
    if WIDEN:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, input_precision="ieee")


@triton.jit
def _load(ptr, offsets, valid, cols, stride, D: tl.constexpr, DP: tl.constexpr):
    """-> [rows, DP], zero outside; `offsets` and `valid` are per row, None: all exist."""
    ptrs = ptr + offsets[:, None] + (cols * stride)[None, :]
    if valid is None and D == DP:
        x = tl.load(ptrs)
    elif valid is None:
        x = tl.load(ptrs, mask=(cols < D)[None, :], other=0.0)
    elif D == DP:
        x = tl.load(ptrs, mask=valid[:, None], other=0.0)
    else:
        x = tl.load(ptrs, mask=valid[:, None] & (cols < D)[None, :], other=0.0)
    return x


@triton.jit
def _store(ptr, offsets, valid, cols, value, D: tl.constexpr, DP: tl.constexpr):
    """Into a tensor whose last dimension is contiguous, in its dtype."""
    ptrs = ptr + offsets[:, None] + cols[None, :]
    value = value.to(ptr.dtype.element_ty)
    if D == DP:
        tl.store(ptrs, value, mask=valid[:, None])
    else:
        tl.store(ptrs, value, mask=valid[:, None] & (cols < D)[None, :])


@triton.jit
def _load_row(ptr, cols, stride, D: tl.constexpr):
    """-> [DP] float32."""
    return tl.load(ptr + cols * stride, mask=cols < D, other=0.0).to(tl.float32)


@triton.jit
def _time_tile(H, N, T: tl.constexpr, TP: tl.constexpr, POSITIONS: tl.constexpr):
    """Clip, head, and for each row its position, frame and whether it exists; rows n * TP + t."""
    pid = tl.program_id(0)
    blocks = tl.cdiv(N, POSITIONS)
    h = (pid % H).to(tl.int64)
    block = (pid // H) % blocks
    b = (pid // (H * blocks)).to(tl.int64)
    row = tl.arange(0, POSITIONS * TP)
    t = (row % TP).to(tl.int64)
    n = (block * POSITIONS + row // TP).to(tl.int64)
    return b, h, n, t, (n < N) & (t < T)


@triton.jit
def _time_probabilities(scores, T: tl.constexpr, TP: tl.constexpr, ROWS: tl.constexpr):
    """-> exp2(scores - row maximum) within each position's own frames, and its row sums."""
    row = tl.arange(0, ROWS)[:, None]
    col = tl.arange(0, ROWS)[None, :]
    scores = tl.where((row // TP == col // TP) & (col % TP < T), scores, float("-inf"))
    p = tl.exp2(scores - tl.max(scores, 1)[:, None])
    return p, tl.sum(p, 1)


@triton.jit
def _time_attention_fwd_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    out_ptr,  # [B, T, N, H, D] contiguous
    q_stride_b,
    q_stride_t,
    q_stride_n,
    q_stride_h,
    q_stride_d,
    k_stride_b,
    k_stride_t,
    k_stride_n,
    k_stride_h,
    k_stride_d,
    v_stride_b,
    v_stride_t,
    v_stride_n,
    v_stride_h,
    v_stride_d,
    N,
    H,
    scale_log2,
    T: tl.constexpr,
    TP: tl.constexpr,
    POSITIONS: tl.constexpr,
    D: tl.constexpr,
    DP: tl.constexpr,
    CHUNK: tl.constexpr,  # of D, at a time
    WIDEN: tl.constexpr,
):
    b, h, n, t, valid = _time_tile(H, N, T, TP, POSITIONS)
    q_rows = b * q_stride_b + h * q_stride_h + n * q_stride_n + t * q_stride_t
    k_rows = b * k_stride_b + h * k_stride_h + n * k_stride_n + t * k_stride_t
    v_rows = b * v_stride_b + h * v_stride_h + n * v_stride_n + t * v_stride_t
    out_rows = (((b * T + t) * N + n) * H + h) * D
    ROWS: tl.constexpr = POSITIONS * TP

    scores = tl.zeros([ROWS, ROWS], tl.float32)
    for start in range(0, DP, CHUNK):
        cols = (start + tl.arange(0, CHUNK)).to(tl.int64)
        q = _load(q_ptr, q_rows, valid, cols, q_stride_d, D, DP)
        k = _load(k_ptr, k_rows, valid, cols, k_stride_d, D, DP)
        scores += _dot(q, tl.trans(k), WIDEN)
    p, total = _time_probabilities(scores * scale_log2, T, TP, ROWS)
    for start in range(0, DP, CHUNK):
        cols = (start + tl.arange(0, CHUNK)).to(tl.int64)
        v = _load(v_ptr, v_rows, valid, cols, v_stride_d, D, DP)
        out = _dot(p.to(v.dtype), v, WIDEN) / total[:, None]
        _store(out_ptr, out_rows, valid, cols, out, D, DP)


@triton.jit
def _time_attention_bwd_kernel(
    grad_ptr,
    q_ptr,
    k_ptr,
    v_ptr,
    dq_ptr,  # dq, dk, dv: [B, T, N, H, D] contiguous
    dk_ptr,
    dv_ptr,
    grad_stride_b,
    grad_stride_t,
    grad_stride_n,
    grad_stride_h,
    grad_stride_d,
    q_stride_b,
    q_stride_t,
    q_stride_n,
    q_stride_h,
    q_stride_d,
    k_stride_b,
    k_stride_t,
    k_stride_n,
    k_stride_h,
    k_stride_d,
    v_stride_b,
    v_stride_t,
    v_stride_n,
    v_stride_h,
    v_stride_d,
    N,
    H,
    scale,
    scale_log2,
    T: tl.constexpr,
    TP: tl.constexpr,
    POSITIONS: tl.constexpr,
    D: tl.constexpr,
    DP: tl.constexpr,
    CHUNK: tl.constexpr,  # of D, at a time
    WIDEN: tl.constexpr,
):
    b, h, n, t, valid = _time_tile(H, N, T, TP, POSITIONS)
    grad_rows = b * grad_stride_b + h * grad_stride_h + n * grad_stride_n + t * grad_stride_t
    q_rows = b * q_stride_b + h * q_stride_h + n * q_stride_n + t * q_stride_t
    k_rows = b * k_stride_b + h * k_stride_h + n * k_stride_n + t * k_stride_t
    v_rows = b * v_stride_b + h * v_stride_h + n * v_stride_n + t * v_stride_t
    out_rows = (((b * T + t) * N + n) * H + h) * D
    ROWS: tl.constexpr = POSITIONS * TP

    scores = tl.zeros([ROWS, ROWS], tl.float32)
    dp = tl.zeros([ROWS, ROWS], tl.float32)
    for start in range(0, DP, CHUNK):
        cols = (start + tl.arange(0, CHUNK)).to(tl.int64)
        q = _load(q_ptr, q_rows, valid, cols, q_stride_d, D, DP)
        k = _load(k_ptr, k_rows, valid, cols, k_stride_d, D, DP)
        scores += _dot(q, tl.trans(k), WIDEN)
        v = _load(v_ptr, v_rows, valid, cols, v_stride_d, D, DP)
        grad = _load(grad_ptr, grad_rows, valid, cols, grad_stride_d, D, DP)
        dp += _dot(grad, tl.trans(v), WIDEN)
    p, total = _time_probabilities(scores * scale_log2, T, TP, ROWS)
    p = p / total[:, None]
    # Rows that do not exist have grad = 0, hence dp = ds = 0: they add nothing below.
    ds = p * (dp - tl.sum(p * dp, 1)[:, None]) * scale
    for start in range(0, DP, CHUNK):
        cols = (start + tl.arange(0, CHUNK)).to(tl.int64)
        q = _load(q_ptr, q_rows, valid, cols, q_stride_d, D, DP)
        k = _load(k_ptr, k_rows, valid, cols, k_stride_d, D, DP)
        grad = _load(grad_ptr, grad_rows, valid, cols, grad_stride_d, D, DP)
        dv = _dot(tl.trans(p.to(grad.dtype)), grad, WIDEN)
        dq = _dot(ds.to(k.dtype), k, WIDEN)
        dk = _dot(tl.trans(ds.to(q.dtype)), q, WIDEN)
        _store(dv_ptr, out_rows, valid, cols, dv, D, DP)
        _store(dq_ptr, out_rows, valid, cols, dq, D, DP)
        _store(dk_ptr, out_rows, valid, cols, dk, D, DP)


def _time_launch(kernel: Any, name: str, q: Tensor, arguments: tuple[Any, ...]) -> None:
    """One program per (clip, block of positions, head)."""
    if q.numel() == 0:
        return
    clips, frames, patches, heads, width = q.shape
    params = launch_parameters(name, q, length=frames)
    constants = time_constants(frames, width, q.dtype, params)
    blocks = triton.cdiv(patches, constants["POSITIONS"])
    with torch.cuda.device_of(q):
        kernel[(clips * blocks * heads,)](
            *arguments, **constants, num_warps=params["num_warps"], enable_fp_fusion=True
        )


def time_constants(
    frames: int, width: int, dtype: torch.dtype, params: dict[str, Any]
) -> dict[str, Any]:
    """Compile-time constants of the time kernels."""
    frames_padded = power_of_two(frames)
    width_padded = power_of_two(width, at_least=16)
    return {
        "T": frames,
        "TP": frames_padded,
        "POSITIONS": max(1, params["rows"] // frames_padded),
        "D": width,
        "DP": width_padded,
        "CHUNK": min(params["chunk"], width_padded),
        "WIDEN": INTERPRETED and dtype == torch.bfloat16,
    }


@torch.library.custom_op("timefast::time_attention", mutates_args=())
def time_attention_op(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    out = q.new_empty(q.shape)
    strides = (*q.stride(), *k.stride(), *v.stride())
    sizes = (q.shape[2], q.shape[3], scale * LOG2_E)
    arguments = (q, k, v, out, *strides, *sizes)
    _time_launch(_time_attention_fwd_kernel, "time_attention_fwd", q, arguments)
    return out


@time_attention_op.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    return q.new_empty(q.shape)


@torch.library.custom_op("timefast::time_attention_backward", mutates_args=())
def time_attention_backward_op(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    dq, dk, dv = q.new_empty(q.shape), q.new_empty(q.shape), q.new_empty(q.shape)
    strides = (*grad.stride(), *q.stride(), *k.stride(), *v.stride())
    sizes = (q.shape[2], q.shape[3], scale, scale * LOG2_E)
    arguments = (grad, q, k, v, dq, dk, dv, *strides, *sizes)
    _time_launch(_time_attention_bwd_kernel, "time_attention_bwd", q, arguments)
    return dq, dk, dv


@time_attention_backward_op.register_fake
def _(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), q.new_empty(q.shape), q.new_empty(q.shape)


def _time_setup(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    q, k, v, ctx.scale = inputs
    ctx.save_for_backward(q, k, v)


def _time_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    return *time_attention_backward_op(grad, *ctx.saved_tensors, ctx.scale), None


time_attention_op.register_autograd(_time_backward, setup_context=_time_setup)


def _no_second_derivative(ctx: Any, *grads: Tensor) -> None:
    raise NotImplementedError(
        "the Triton kernels of attention cannot be differentiated twice; "
        'use impl="reference" for second derivatives'
    )


time_attention_backward_op.register_autograd(_no_second_derivative)


@triton.jit
def _space_tile(T, H, tiles):
    """Clip, frame, head and tile of this program; the tiles of a frame and head are neighbours."""
    pid = tl.program_id(0)
    tile = pid % tiles
    h = ((pid // tiles) % H).to(tl.int64)
    t = ((pid // (tiles * H)) % T).to(tl.int64)
    b = (pid // (tiles * H * T)).to(tl.int64)
    return b, t, h, tile


@triton.jit
def _space_fwd_step(
    q,
    k,
    v,
    valid,
    best,
    total,
    acc,
    scale_log2,
    LAST: tl.constexpr,
    WIDEN: tl.constexpr,
):
    """One tile of keys in the online softmax."""
    scores = _dot(q, tl.trans(k), WIDEN) * scale_log2
    if LAST:
        scores = tl.where(valid[None, :], scores, float("-inf"))
    higher = tl.maximum(best, tl.max(scores, 1))
    shrink = tl.exp2(best - higher)
    p = tl.exp2(scores - higher[:, None])
    total = total * shrink + tl.sum(p, 1)
    acc = acc * shrink[:, None] + _dot(p.to(v.dtype), v, WIDEN)
    return higher, total, acc


@triton.jit
def _space_attention_fwd_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    cls_q_ptr,
    cls_k_ptr,
    cls_v_ptr,
    out_ptr,  # [B, T, N, H, D] contiguous
    cls_out_ptr,  # [B, T, H, D] float32
    lse_ptr,  # [B, T, H, S] float32, base 2
    q_stride_b,
    q_stride_t,
    q_stride_n,
    q_stride_h,
    q_stride_d,
    k_stride_b,
    k_stride_t,
    k_stride_n,
    k_stride_h,
    k_stride_d,
    v_stride_b,
    v_stride_t,
    v_stride_n,
    v_stride_h,
    v_stride_d,
    cls_q_stride_b,
    cls_q_stride_h,
    cls_q_stride_d,
    cls_k_stride_b,
    cls_k_stride_h,
    cls_k_stride_d,
    cls_v_stride_b,
    cls_v_stride_h,
    cls_v_stride_d,
    T,
    N,
    H,
    scale_log2,
    D: tl.constexpr,
    DP: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
    TAIL_K: tl.constexpr,  # tile for the N % BLOCK_K keys left; 0: none, BLOCK_K: mask all tiles
    WIDEN: tl.constexpr,
):
    b, t, h, tile = _space_tile(T, H, tl.cdiv(N + 1, BLOCK_Q))
    cols = tl.arange(0, DP).to(tl.int64)
    row = tile * BLOCK_Q + tl.arange(0, BLOCK_Q)  # 0 is the class token, 1 + n is patch n
    patch = (row > 0) & (row <= N)
    n = (row - 1).to(tl.int64)

    q_rows = b * q_stride_b + t * q_stride_t + h * q_stride_h + n * q_stride_n
    q = _load(q_ptr, q_rows, patch, cols, q_stride_d, D, DP)
    cls_q = _load_row(cls_q_ptr + b * cls_q_stride_b + h * cls_q_stride_h, cols, cls_q_stride_d, D)
    q = tl.where((row == 0)[:, None], cls_q[None, :].to(q.dtype), q)

    cls_k = _load_row(cls_k_ptr + b * cls_k_stride_b + h * cls_k_stride_h, cols, cls_k_stride_d, D)
    cls_v = _load_row(cls_v_ptr + b * cls_v_stride_b + h * cls_v_stride_h, cols, cls_v_stride_d, D)
    # The class token is the first key, so that the running maximum is finite from the start.
    best = tl.sum(q.to(tl.float32) * cls_k[None, :], 1) * scale_log2  # [BLOCK_Q]
    total = tl.full([BLOCK_Q], 1.0, tl.float32)
    acc = tl.zeros([BLOCK_Q, DP], tl.float32) + cls_v[None, :]

    k_base = k_ptr + b * k_stride_b + t * k_stride_t + h * k_stride_h
    v_base = v_ptr + b * v_stride_b + t * v_stride_t + h * v_stride_h
    MASKED: tl.constexpr = TAIL_K == BLOCK_K
    whole = N // BLOCK_K * BLOCK_K
    for start in range(0, N if MASKED else whole, BLOCK_K):
        key = (start + tl.arange(0, BLOCK_K)).to(tl.int64)
        valid = key < N if MASKED else None
        k = _load(k_base, key * k_stride_n, valid, cols, k_stride_d, D, DP)
        v = _load(v_base, key * v_stride_n, valid, cols, v_stride_d, D, DP)
        best, total, acc = _space_fwd_step(
            q, k, v, valid, best, total, acc, scale_log2, MASKED, WIDEN
        )
    if TAIL_K > 0 and not MASKED:
        key = (whole + tl.arange(0, TAIL_K)).to(tl.int64)
        k = _load(k_base, key * k_stride_n, key < N, cols, k_stride_d, D, DP)
        v = _load(v_base, key * v_stride_n, key < N, cols, v_stride_d, D, DP)
        best, total, acc = _space_fwd_step(
            q, k, v, key < N, best, total, acc, scale_log2, True, WIDEN
        )

    out = acc / total[:, None]
    frame = b * T + t
    _store(out_ptr, ((frame * N + n) * H + h) * D, patch, cols, out, D, DP)
    _store(cls_out_ptr, (frame * H + h) * D + 0 * n, row == 0, cols, out, D, DP)
    lse = best + tl.log2(total)
    tl.store(lse_ptr + (frame * H + h) * (N + 1) + row, lse, mask=row <= N)


@triton.jit
def _space_dq_step(
    q,
    grad,
    k,
    v,
    valid,
    lse,
    delta,
    dq,
    scale,
    scale_log2,
    LAST: tl.constexpr,
    WIDEN: tl.constexpr,
):
    """One tile of keys."""
    p = tl.exp2(_dot(q, tl.trans(k), WIDEN) * scale_log2 - lse[:, None])
    if LAST:
        p = tl.where(valid[None, :], p, 0.0)
    dp = _dot(grad, tl.trans(v), WIDEN)
    ds = p * (dp - delta[:, None]) * scale
    return dq + _dot(ds.to(k.dtype), k, WIDEN)


@triton.jit
def _space_attention_bwd_dq_kernel(
    grad_ptr,
    grad_cls_ptr,
    q_ptr,
    k_ptr,
    v_ptr,
    cls_q_ptr,
    cls_k_ptr,
    cls_v_ptr,
    out_ptr,  # [B, T, N, H, D] contiguous
    cls_out_ptr,  # [B, T, H, D] float32
    lse_ptr,  # [B, T, H, S] float32, base 2
    dq_ptr,  # [B, T, N, H, D] contiguous
    cls_dq_ptr,  # [B, T, H, D] float32
    cls_dk_ptr,  # [B, T, tiles, H, D] float32
    cls_dv_ptr,  # [B, T, tiles, H, D] float32
    delta_ptr,  # [B, T, H, S] float32: the row sums of grad * out
    grad_stride_b,
    grad_stride_t,
    grad_stride_n,
    grad_stride_h,
    grad_stride_d,
    grad_cls_stride_b,
    grad_cls_stride_t,
    grad_cls_stride_h,
    grad_cls_stride_d,
    q_stride_b,
    q_stride_t,
    q_stride_n,
    q_stride_h,
    q_stride_d,
    k_stride_b,
    k_stride_t,
    k_stride_n,
    k_stride_h,
    k_stride_d,
    v_stride_b,
    v_stride_t,
    v_stride_n,
    v_stride_h,
    v_stride_d,
    cls_q_stride_b,
    cls_q_stride_h,
    cls_q_stride_d,
    cls_k_stride_b,
    cls_k_stride_h,
    cls_k_stride_d,
    cls_v_stride_b,
    cls_v_stride_h,
    cls_v_stride_d,
    T,
    N,
    H,
    scale,
    scale_log2,
    D: tl.constexpr,
    DP: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
    TAIL_K: tl.constexpr,
    WIDEN: tl.constexpr,
):
    tiles = tl.cdiv(N + 1, BLOCK_Q)
    b, t, h, tile = _space_tile(T, H, tiles)
    cols = tl.arange(0, DP).to(tl.int64)
    row = tile * BLOCK_Q + tl.arange(0, BLOCK_Q)
    patch = (row > 0) & (row <= N)
    first = (row == 0)[:, None]
    n = (row - 1).to(tl.int64)
    frame = b * T + t
    out_rows = ((frame * N + n) * H + h) * D
    cls_row = (frame * H + h) * D
    stat_rows = (frame * H + h) * (N + 1) + row

    q_rows = b * q_stride_b + t * q_stride_t + h * q_stride_h + n * q_stride_n
    q = _load(q_ptr, q_rows, patch, cols, q_stride_d, D, DP)
    cls_q = _load_row(cls_q_ptr + b * cls_q_stride_b + h * cls_q_stride_h, cols, cls_q_stride_d, D)
    q = tl.where(first, cls_q[None, :].to(q.dtype), q)

    grad_rows = b * grad_stride_b + t * grad_stride_t + h * grad_stride_h + n * grad_stride_n
    grad = _load(grad_ptr, grad_rows, patch, cols, grad_stride_d, D, DP)
    out = _load(out_ptr, out_rows, patch, cols, 1, D, DP)
    delta = tl.sum(grad.to(tl.float32) * out.to(tl.float32), 1)
    grad_cls_base = (
        grad_cls_ptr + b * grad_cls_stride_b + t * grad_cls_stride_t + h * grad_cls_stride_h
    )
    grad_cls = _load_row(grad_cls_base, cols, grad_cls_stride_d, D)
    cls_out = _load_row(cls_out_ptr + cls_row, cols, 1, D)
    delta = tl.where(row == 0, tl.sum(grad_cls * cls_out, 0), delta)
    tl.store(delta_ptr + stat_rows, delta, mask=row <= N)
    grad = tl.where(first, grad_cls[None, :].to(grad.dtype), grad)
    lse = tl.load(lse_ptr + stat_rows, mask=row <= N, other=float("inf"))

    # The class token as a key: in float32, and what it collects from this tile goes to the parts.
    cls_k = _load_row(cls_k_ptr + b * cls_k_stride_b + h * cls_k_stride_h, cols, cls_k_stride_d, D)
    cls_v = _load_row(cls_v_ptr + b * cls_v_stride_b + h * cls_v_stride_h, cols, cls_v_stride_d, D)
    p = tl.exp2(tl.sum(q.to(tl.float32) * cls_k[None, :], 1) * scale_log2 - lse)  # [BLOCK_Q]
    dp = tl.sum(grad.to(tl.float32) * cls_v[None, :], 1)
    ds = p * (dp - delta) * scale
    part = ((frame * tiles + tile) * H + h) * D + cols
    tl.store(cls_dv_ptr + part, tl.sum(p[:, None] * grad.to(tl.float32), 0), mask=cols < D)
    tl.store(cls_dk_ptr + part, tl.sum(ds[:, None] * q.to(tl.float32), 0), mask=cols < D)
    dq = ds[:, None] * cls_k[None, :]

    k_base = k_ptr + b * k_stride_b + t * k_stride_t + h * k_stride_h
    v_base = v_ptr + b * v_stride_b + t * v_stride_t + h * v_stride_h
    MASKED: tl.constexpr = TAIL_K == BLOCK_K
    whole = N // BLOCK_K * BLOCK_K
    for start in range(0, N if MASKED else whole, BLOCK_K):
        key = (start + tl.arange(0, BLOCK_K)).to(tl.int64)
        valid = key < N if MASKED else None
        k = _load(k_base, key * k_stride_n, valid, cols, k_stride_d, D, DP)
        v = _load(v_base, key * v_stride_n, valid, cols, v_stride_d, D, DP)
        dq = _space_dq_step(q, grad, k, v, valid, lse, delta, dq, scale, scale_log2, MASKED, WIDEN)
    if TAIL_K > 0 and not MASKED:
        key = (whole + tl.arange(0, TAIL_K)).to(tl.int64)
        k = _load(k_base, key * k_stride_n, key < N, cols, k_stride_d, D, DP)
        v = _load(v_base, key * v_stride_n, key < N, cols, v_stride_d, D, DP)
        dq = _space_dq_step(q, grad, k, v, key < N, lse, delta, dq, scale, scale_log2, True, WIDEN)

    _store(dq_ptr, out_rows, patch, cols, dq, D, DP)
    _store(cls_dq_ptr, cls_row + 0 * n, row == 0, cols, dq, D, DP)


@triton.jit
def _load_statistics(lse_ptr, delta_ptr, rows, valid):
    """Of queries; where there is none, an infinite log-sum-exp makes its probabilities 0."""
    if valid is None:
        lse = tl.load(lse_ptr + rows)
        delta = tl.load(delta_ptr + rows)
    else:
        lse = tl.load(lse_ptr + rows, mask=valid, other=float("inf"))
        delta = tl.load(delta_ptr + rows, mask=valid, other=0.0)
    return lse, delta


@triton.jit
def _space_dkv_step(k, v, q, grad, lse, delta, dk, dv, scale, scale_log2, WIDEN: tl.constexpr):
    """One tile of queries; scores are transposed, [BLOCK_K, queries]."""
    p = tl.exp2(_dot(k, tl.trans(q), WIDEN) * scale_log2 - lse[None, :])
    dv += _dot(p.to(grad.dtype), grad, WIDEN)
    dp = _dot(v, tl.trans(grad), WIDEN)
    ds = p * (dp - delta[None, :]) * scale
    dk += _dot(ds.to(q.dtype), q, WIDEN)
    return dk, dv


@triton.jit
def _space_attention_bwd_dkv_kernel(
    grad_ptr,
    grad_cls_ptr,
    q_ptr,
    k_ptr,
    v_ptr,
    cls_q_ptr,
    lse_ptr,  # [B, T, H, S] float32, base 2
    delta_ptr,  # [B, T, H, S] float32
    dk_ptr,  # dk, dv: [B, T, N, H, D] contiguous
    dv_ptr,
    grad_stride_b,
    grad_stride_t,
    grad_stride_n,
    grad_stride_h,
    grad_stride_d,
    grad_cls_stride_b,
    grad_cls_stride_t,
    grad_cls_stride_h,
    grad_cls_stride_d,
    q_stride_b,
    q_stride_t,
    q_stride_n,
    q_stride_h,
    q_stride_d,
    k_stride_b,
    k_stride_t,
    k_stride_n,
    k_stride_h,
    k_stride_d,
    v_stride_b,
    v_stride_t,
    v_stride_n,
    v_stride_h,
    v_stride_d,
    cls_q_stride_b,
    cls_q_stride_h,
    cls_q_stride_d,
    T,
    N,
    H,
    scale,
    scale_log2,
    D: tl.constexpr,
    DP: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
    TAIL_Q: tl.constexpr,  # tile for the N % BLOCK_Q queries left; 0: none, BLOCK_Q: mask all
    WIDEN: tl.constexpr,
):
    b, t, h, tile = _space_tile(T, H, tl.cdiv(N, BLOCK_K))
    cols = tl.arange(0, DP).to(tl.int64)
    key = (tile * BLOCK_K + tl.arange(0, BLOCK_K)).to(tl.int64)
    k_rows = b * k_stride_b + t * k_stride_t + h * k_stride_h + key * k_stride_n
    v_rows = b * v_stride_b + t * v_stride_t + h * v_stride_h + key * v_stride_n
    k = _load(k_ptr, k_rows, key < N, cols, k_stride_d, D, DP)
    v = _load(v_ptr, v_rows, key < N, cols, v_stride_d, D, DP)
    frame = b * T + t
    lse_ptr += (frame * H + h) * (N + 1)
    delta_ptr += (frame * H + h) * (N + 1)

    # The class token as a query, in float32.
    cls_q = _load_row(cls_q_ptr + b * cls_q_stride_b + h * cls_q_stride_h, cols, cls_q_stride_d, D)
    grad_cls_base = (
        grad_cls_ptr + b * grad_cls_stride_b + t * grad_cls_stride_t + h * grad_cls_stride_h
    )
    grad_cls = _load_row(grad_cls_base, cols, grad_cls_stride_d, D)
    scores = tl.sum(k.to(tl.float32) * cls_q[None, :], 1) * scale_log2  # [BLOCK_K]
    p = tl.exp2(scores - tl.load(lse_ptr))
    dp = tl.sum(v.to(tl.float32) * grad_cls[None, :], 1)
    ds = p * (dp - tl.load(delta_ptr)) * scale
    dk = ds[:, None] * cls_q[None, :]
    dv = p[:, None] * grad_cls[None, :]

    q_base = q_ptr + b * q_stride_b + t * q_stride_t + h * q_stride_h
    grad_base = grad_ptr + b * grad_stride_b + t * grad_stride_t + h * grad_stride_h
    MASKED: tl.constexpr = TAIL_Q == BLOCK_Q
    whole = N // BLOCK_Q * BLOCK_Q
    for start in range(0, N if MASKED else whole, BLOCK_Q):
        query = (start + tl.arange(0, BLOCK_Q)).to(tl.int64)
        valid = query < N if MASKED else None
        q = _load(q_base, query * q_stride_n, valid, cols, q_stride_d, D, DP)
        grad = _load(grad_base, query * grad_stride_n, valid, cols, grad_stride_d, D, DP)
        lse, delta = _load_statistics(lse_ptr, delta_ptr, 1 + query, valid)
        dk, dv = _space_dkv_step(k, v, q, grad, lse, delta, dk, dv, scale, scale_log2, WIDEN)
    if TAIL_Q > 0 and not MASKED:
        query = (whole + tl.arange(0, TAIL_Q)).to(tl.int64)
        left = query < N
        q = _load(q_base, query * q_stride_n, left, cols, q_stride_d, D, DP)
        grad = _load(grad_base, query * grad_stride_n, left, cols, grad_stride_d, D, DP)
        lse, delta = _load_statistics(lse_ptr, delta_ptr, 1 + query, left)
        dk, dv = _space_dkv_step(k, v, q, grad, lse, delta, dk, dv, scale, scale_log2, WIDEN)

    out_rows = ((frame * N + key) * H + h) * D
    _store(dk_ptr, out_rows, key < N, cols, dk, D, DP)
    _store(dv_ptr, out_rows, key < N, cols, dv, D, DP)


def space_constants(
    patches: int, width: int, dtype: torch.dtype, params: dict[str, Any], over: str
) -> dict[str, Any]:
    """Compile-time constants of a kernel that loops over "keys" or over "queries"."""
    whole = power_of_two(patches, at_least=16)
    tiles = {
        "BLOCK_Q": min(params["block_q"], power_of_two(patches + 1, at_least=16)),
        "BLOCK_K": min(params["block_k"], whole),
    }
    rest = patches % tiles["BLOCK_K" if over == "keys" else "BLOCK_Q"]
    tail = power_of_two(rest, at_least=16) if rest else 0
    return {
        "D": width,
        "DP": power_of_two(width, at_least=16),
        **tiles,
        "TAIL_K" if over == "keys" else "TAIL_Q": tail,
        "WIDEN": INTERPRETED and dtype == torch.bfloat16,
    }


def _space_launch(
    kernel: Any, q: Tensor, tiles: int, arguments: tuple[Any, ...], **constants: Any
) -> None:
    """One program per (clip, frame, head, tile)."""
    clips, frames, _, heads, _ = q.shape
    with torch.cuda.device_of(q):
        kernel[(clips * frames * heads * tiles,)](*arguments, **constants, enable_fp_fusion=True)


def _space_setting(name: str, q: Tensor, over: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """Compile-time constants, and options of the launch."""
    params = launch_parameters(name, q, length=q.shape[2])
    constants = space_constants(q.shape[2], q.shape[4], q.dtype, params, over)
    return constants, {k: params[k] for k in ("num_warps", "num_stages")}


def _strides(*tensors: Tensor) -> tuple[int, ...]:
    return tuple(stride for x in tensors for stride in x.stride())


@torch.library.custom_op("timefast::space_attention", mutates_args=())
def space_attention_op(
    q: Tensor, k: Tensor, v: Tensor, cls_q: Tensor, cls_k: Tensor, cls_v: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """-> out [B, T, N, H, D], the class token's outputs per frame [B, T, H, D], and [B, T, H, S]
    log-sum-exps (base 2) for the backward pass, the last two in float32."""
    out, cls_out, lse = _space_outputs(q)
    if q.numel() == 0:
        return out, cls_out, lse
    constants, options = _space_setting("space_attention_fwd", q, over="keys")
    inputs = (q, k, v, cls_q, cls_k, cls_v)
    sizes = (*q.shape[1:4], scale * LOG2_E)
    arguments = (*inputs, out, cls_out, lse, *_strides(*inputs), *sizes)
    tiles = triton.cdiv(q.shape[2] + 1, constants["BLOCK_Q"])
    _space_launch(_space_attention_fwd_kernel, q, tiles, arguments, **constants, **options)
    return out, cls_out, lse


def _space_outputs(q: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    clips, frames, patches, heads, width = q.shape
    return (
        q.new_empty(q.shape),
        q.new_empty((clips, frames, heads, width), dtype=torch.float32),
        q.new_empty((clips, frames, heads, 1 + patches), dtype=torch.float32),
    )


@space_attention_op.register_fake
def _(
    q: Tensor, k: Tensor, v: Tensor, cls_q: Tensor, cls_k: Tensor, cls_v: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    return _space_outputs(q)


def _space_gradients(q: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    clips, _, _, heads, width = q.shape
    dq, dk, dv = q.new_empty(q.shape), q.new_empty(q.shape), q.new_empty(q.shape)
    cls_dq, cls_dk, cls_dv = (q.new_empty((clips, heads, width)) for _ in range(3))
    return dq, dk, dv, cls_dq, cls_dk, cls_dv


@torch.library.custom_op("timefast::space_attention_backward", mutates_args=())
def space_attention_backward_op(
    grad: Tensor,
    grad_cls: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cls_q: Tensor,
    cls_k: Tensor,
    cls_v: Tensor,
    out: Tensor,
    cls_out: Tensor,
    lse: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    clips, frames, patches, heads, width = q.shape
    dq, dk, dv, *cls_grads = grads = _space_gradients(q)
    if q.numel() == 0:
        return grads
    sizes = (frames, patches, heads, scale, scale * LOG2_E)

    constants, options = _space_setting("space_attention_bwd_dq", q, over="keys")
    tiles = triton.cdiv(patches + 1, constants["BLOCK_Q"])
    cls_dq = torch.empty_like(cls_out)
    cls_dk = q.new_empty((clips, frames, tiles, heads, width), dtype=torch.float32)
    cls_dv, delta = torch.empty_like(cls_dk), torch.empty_like(lse)
    tokens = (grad, grad_cls, q, k, v, cls_q, cls_k, cls_v)
    results = (out, cls_out, lse, dq, cls_dq, cls_dk, cls_dv, delta)
    arguments = (*tokens, *results, *_strides(*tokens), *sizes)
    _space_launch(_space_attention_bwd_dq_kernel, q, tiles, arguments, **constants, **options)

    constants, options = _space_setting("space_attention_bwd_dkv", q, over="queries")
    tiles = triton.cdiv(patches, constants["BLOCK_K"])
    fewer = (grad, grad_cls, q, k, v, cls_q)
    arguments = (*fewer, lse, delta, dk, dv, *_strides(*fewer), *sizes)
    _space_launch(_space_attention_bwd_dkv_kernel, q, tiles, arguments, **constants, **options)

    parts = (cls_dq.sum(1), cls_dk.sum((1, 2)), cls_dv.sum((1, 2)))
    for grad_of_class, part in zip(cls_grads, parts, strict=True):
        grad_of_class.copy_(part)
    return grads


@space_attention_backward_op.register_fake
def _(
    grad: Tensor,
    grad_cls: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cls_q: Tensor,
    cls_k: Tensor,
    cls_v: Tensor,
    out: Tensor,
    cls_out: Tensor,
    lse: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    return _space_gradients(q)


def _space_setup(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    *tokens, ctx.scale = inputs
    ctx.save_for_backward(*tokens, *output)


def _space_backward(
    ctx: Any, grad: Tensor, grad_cls: Tensor, grad_lse: Tensor
) -> tuple[Tensor | None, ...]:
    return *space_attention_backward_op(grad, grad_cls, *ctx.saved_tensors, ctx.scale), None


space_attention_op.register_autograd(_space_backward, setup_context=_space_setup)
space_attention_backward_op.register_autograd(_no_second_derivative)
