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
    """-> [rows, DP], zero outside; `offsets` and `valid` are per row."""
    ptrs = ptr + offsets[:, None] + (cols * stride)[None, :]
    if D == DP:
        return tl.load(ptrs, mask=valid[:, None], other=0.0)
    return tl.load(ptrs, mask=valid[:, None] & (cols < D)[None, :], other=0.0)


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
def _time_probabilities(
    q, k, scale_log2, T: tl.constexpr, TP: tl.constexpr, ROWS: tl.constexpr, WIDEN: tl.constexpr
):
    """-> exp2(scores - row maximum) within each position's own frames, and its row sums."""
    scores = _dot(q, tl.trans(k), WIDEN) * scale_log2  # [ROWS, ROWS] float32
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
    WIDEN: tl.constexpr,
):
    b, h, n, t, valid = _time_tile(H, N, T, TP, POSITIONS)
    cols = tl.arange(0, DP).to(tl.int64)
    q_rows = b * q_stride_b + h * q_stride_h + n * q_stride_n + t * q_stride_t
    k_rows = b * k_stride_b + h * k_stride_h + n * k_stride_n + t * k_stride_t
    v_rows = b * v_stride_b + h * v_stride_h + n * v_stride_n + t * v_stride_t
    q = _load(q_ptr, q_rows, valid, cols, q_stride_d, D, DP)
    k = _load(k_ptr, k_rows, valid, cols, k_stride_d, D, DP)
    v = _load(v_ptr, v_rows, valid, cols, v_stride_d, D, DP)

    p, total = _time_probabilities(q, k, scale_log2, T, TP, POSITIONS * TP, WIDEN)
    out = _dot(p.to(v.dtype), v, WIDEN) / total[:, None]

    out_rows = (((b * T + t) * N + n) * H + h) * D
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
    WIDEN: tl.constexpr,
):
    b, h, n, t, valid = _time_tile(H, N, T, TP, POSITIONS)
    cols = tl.arange(0, DP).to(tl.int64)
    grad_rows = b * grad_stride_b + h * grad_stride_h + n * grad_stride_n + t * grad_stride_t
    q_rows = b * q_stride_b + h * q_stride_h + n * q_stride_n + t * q_stride_t
    k_rows = b * k_stride_b + h * k_stride_h + n * k_stride_n + t * k_stride_t
    v_rows = b * v_stride_b + h * v_stride_h + n * v_stride_n + t * v_stride_t
    out_rows = (((b * T + t) * N + n) * H + h) * D
    q = _load(q_ptr, q_rows, valid, cols, q_stride_d, D, DP)
    k = _load(k_ptr, k_rows, valid, cols, k_stride_d, D, DP)
    v = _load(v_ptr, v_rows, valid, cols, v_stride_d, D, DP)
    grad = _load(grad_ptr, grad_rows, valid, cols, grad_stride_d, D, DP)

    p, total = _time_probabilities(q, k, scale_log2, T, TP, POSITIONS * TP, WIDEN)
    p = p / total[:, None]
    # Rows that do not exist have grad = 0, hence dp = ds = 0: they add nothing below.
    dv = _dot(tl.trans(p.to(grad.dtype)), grad, WIDEN)
    _store(dv_ptr, out_rows, valid, cols, dv, D, DP)
    dp = _dot(grad, tl.trans(v), WIDEN)
    ds = (p * (dp - tl.sum(p * dp, 1)[:, None]) * scale).to(q.dtype)
    dq = _dot(ds, k, WIDEN)
    _store(dq_ptr, out_rows, valid, cols, dq, D, DP)
    dk = _dot(tl.trans(ds), q, WIDEN)
    _store(dk_ptr, out_rows, valid, cols, dk, D, DP)


def _time_launch(kernel: Any, name: str, q: Tensor, arguments: tuple[Any, ...]) -> None:
    """One program per (clip, block of positions, head)."""
    if q.numel() == 0:
        return
    clips, frames, patches, heads, width = q.shape
    params = launch_parameters(name, q, length=frames)
    constants = time_constants(frames, width, q.dtype, params.pop("rows"))
    blocks = triton.cdiv(patches, constants["POSITIONS"])
    with torch.cuda.device_of(q):
        kernel[(clips * blocks * heads,)](*arguments, **constants, **params, enable_fp_fusion=True)


def time_constants(frames: int, width: int, dtype: torch.dtype, rows: int) -> dict[str, Any]:
    frames_padded = power_of_two(frames)
    return {
        "T": frames,
        "TP": frames_padded,
        "POSITIONS": max(1, rows // frames_padded),
        "D": width,
        "DP": power_of_two(width, at_least=16),
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
def _(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), q.new_empty(q.shape), q.new_empty(q.shape)


def _time_setup(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    q, k, v, ctx.scale = inputs
    ctx.save_for_backward(q, k, v)


def _time_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    return *time_attention_backward_op(grad, *ctx.saved_tensors, ctx.scale), None


time_attention_op.register_autograd(_time_backward, setup_context=_time_setup)


def _no_second_derivative(ctx: Any, *grads: Tensor) -> None:
    raise NotImplementedError(
        "the Triton kernels of time_attention and space_attention cannot be differentiated twice; "
        'use impl="reference" for second derivatives'
    )


time_attention_backward_op.register_autograd(_no_second_derivative)


def time_attention_triton(q: Tensor, k: Tensor, v: Tensor, *, scale: float) -> Tensor:
    return time_attention_op(q, k, v, scale)
