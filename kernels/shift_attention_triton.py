"""Shifted attention in Triton, imported when `shift_attention` is first asked for it.

Letters: B clips, T frames, S tokens per frame, H heads, D head width; DP: D rounded up to a power
of two. docs/kernels/shift_attention.md has the derivation.

The kernels are those of attention over space (divided_attention_triton.py) without a shared class
token: an online softmax forward, a kernel for dq and a kernel for dk, dv backward. Nothing is
shifted in memory. Where folds end at head borders (WHOLE_HEADS) a program reads its keys and values
from one frame, t - 1, t or t + 1; where that frame does not exist it writes zeros and is done.
Elsewhere the frame is a vector over the columns of the head, part of the address of each load, and
columns without a frame are masked.

Backward keeps the programs of forward: that of frame t has the gradients of the keys and values it
read, and writes them to where it read them. What nobody reads, the ends of the clip that a fold
points away from, gets its zeros from the programs that read beyond the other end: their frame is
counted around the ends, so that every element is written once, and without atomics.

All tensors are read through their strides with 64-bit offsets; outputs are contiguous. Products
take operands in the dtype of the inputs and accumulate in float32; everything else is float32.
"""

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from timefast.kernels.divided_attention_triton import (
    LOG2_E,
    _load,
    _load_statistics,
    _no_second_derivative,
    _space_dkv_step,
    _space_dq_step,
    _space_fwd_step,
    _space_launch,
    _space_setting,
    _space_tile,
    _store,
    _strides,
)


@triton.jit
def _source(t, T, h, fold, cols, D: tl.constexpr, WHOLE_HEADS: tl.constexpr, GROUP: tl.constexpr):
    """Frame that keys and values are read from in frame t, and whether there is such a frame: of
    the head if WHOLE_HEADS, else per column."""
    if WHOLE_HEADS:
        channel = h * D
        frame = t + tl.where(channel < fold, 1, tl.where(channel < 2 * fold, -1, 0))
        exists = (frame >= 0) & (frame < T)
    else:
        channel = h * D + cols
        frame = t + tl.where(channel < fold, 1, tl.where(channel < 2 * fold, -1, 0))
        exists = tl.max_constancy((frame >= 0) & (frame < T) & (cols < D), GROUP)
    return frame, exists


@triton.jit
def _columns(frame, stride_t, cols, stride_d, GROUP: tl.constexpr):
    """Offset of each column in its own frame. GROUP columns side by side are of one frame and
    begin at a multiple of GROUP elements, which lets them be one load."""
    return tl.max_contiguous(tl.multiple_of(frame * stride_t + cols * stride_d, GROUP), GROUP)


@triton.jit
def _load_shifted(
    ptr,
    offsets,
    valid,
    frame,
    exists,
    stride_t,
    cols,
    stride_d,
    D: tl.constexpr,
    DP: tl.constexpr,
    WHOLE_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
):
    """As _load, from the frames that `_source` gave."""
    if WHOLE_HEADS:
        x = _load(ptr + frame * stride_t, offsets, valid, cols, stride_d, D, DP)
    else:
        ptrs = ptr + offsets[:, None] + _columns(frame, stride_t, cols, stride_d, GROUP)[None, :]
        mask = exists[None, :] if valid is None else valid[:, None] & exists[None, :]
        x = tl.load(ptrs, mask=mask, other=0.0)
    return x


@triton.jit
def _store_shifted(
    ptr,
    offsets,
    valid,
    frame,
    exists,
    stride_t,
    cols,
    value,
    D: tl.constexpr,
    DP: tl.constexpr,
    WHOLE_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
):
    """As _store, to the frames that `_source` gave, counted around; zeros where none exists."""
    if WHOLE_HEADS:
        _store(ptr + frame * stride_t, offsets, valid, cols, value, D, DP)
    else:
        ptrs = ptr + offsets[:, None] + _columns(frame, stride_t, cols, 1, GROUP)[None, :]
        value = tl.where(exists[None, :], value, 0.0).to(ptr.dtype.element_ty)
        tl.store(ptrs, value, mask=valid[:, None] & (cols < D)[None, :])


@triton.jit
def _shift_attention_fwd_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    out_ptr,  # [B, T, S, H, D] contiguous
    lse_ptr,  # [B, T, H, S] float32, base 2
    q_stride_b,
    q_stride_t,
    q_stride_s,
    q_stride_h,
    q_stride_d,
    k_stride_b,
    k_stride_t,
    k_stride_s,
    k_stride_h,
    k_stride_d,
    v_stride_b,
    v_stride_t,
    v_stride_s,
    v_stride_h,
    v_stride_d,
    T,
    S,
    H,
    fold,
    scale_log2,
    WHOLE_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    D: tl.constexpr,
    DP: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
    TAIL_K: tl.constexpr,  # tile for the S % BLOCK_K keys left; 0: none, BLOCK_K: mask all tiles
    WIDEN: tl.constexpr,
):
    b, t, h, tile = _space_tile(T, H, tl.cdiv(S, BLOCK_Q))
    cols = tl.arange(0, DP).to(tl.int64)
    row = (tile * BLOCK_Q + tl.arange(0, BLOCK_Q)).to(tl.int64)
    out_rows = (((b * T + t) * S + row) * H + h) * D
    lse_rows = ((b * T + t) * H + h) * S + row
    acc = tl.zeros([BLOCK_Q, DP], tl.float32)
    best = tl.full([BLOCK_Q], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_Q], tl.float32)

    frame, exists = _source(t, T, h, fold, cols, D, WHOLE_HEADS, GROUP)
    if WHOLE_HEADS:  # noqa: SIM102 (the compiler evaluates both sides of `and`)
        if not exists:  # all scores are 0, and so are all values
            _store(out_ptr, out_rows, row < S, cols, acc, D, DP)
            tl.store(lse_ptr + lse_rows, tl.log2(total + S), mask=row < S)
            return

    q_rows = b * q_stride_b + t * q_stride_t + h * q_stride_h + row * q_stride_s
    q = _load(q_ptr, q_rows, row < S, cols, q_stride_d, D, DP)
    k_base = k_ptr + b * k_stride_b + h * k_stride_h
    v_base = v_ptr + b * v_stride_b + h * v_stride_h
    MASKED: tl.constexpr = TAIL_K == BLOCK_K
    whole = S // BLOCK_K * BLOCK_K
    for start in range(0, S if MASKED else whole, BLOCK_K):
        key = (start + tl.arange(0, BLOCK_K)).to(tl.int64)
        valid = key < S if MASKED else None
        k = _load_shifted(
            k_base, key * k_stride_s, valid, frame, exists, k_stride_t, cols, k_stride_d, D, DP,
            WHOLE_HEADS, GROUP,
        )  # fmt: skip
        v = _load_shifted(
            v_base, key * v_stride_s, valid, frame, exists, v_stride_t, cols, v_stride_d, D, DP,
            WHOLE_HEADS, GROUP,
        )  # fmt: skip
        best, total, acc = _space_fwd_step(
            q, k, v, valid, best, total, acc, scale_log2, MASKED, WIDEN
        )
    if TAIL_K > 0 and not MASKED:
        key = (whole + tl.arange(0, TAIL_K)).to(tl.int64)
        k = _load_shifted(
            k_base, key * k_stride_s, key < S, frame, exists, k_stride_t, cols, k_stride_d, D, DP,
            WHOLE_HEADS, GROUP,
        )  # fmt: skip
        v = _load_shifted(
            v_base, key * v_stride_s, key < S, frame, exists, v_stride_t, cols, v_stride_d, D, DP,
            WHOLE_HEADS, GROUP,
        )  # fmt: skip
        best, total, acc = _space_fwd_step(
            q, k, v, key < S, best, total, acc, scale_log2, True, WIDEN
        )
    _store(out_ptr, out_rows, row < S, cols, acc / total[:, None], D, DP)
    tl.store(lse_ptr + lse_rows, best + tl.log2(total), mask=row < S)


@triton.jit
def _shift_attention_bwd_dq_kernel(
    grad_ptr,
    q_ptr,
    k_ptr,
    v_ptr,
    out_ptr,  # [B, T, S, H, D] contiguous
    lse_ptr,  # [B, T, H, S] float32, base 2
    dq_ptr,  # [B, T, S, H, D] contiguous
    delta_ptr,  # [B, T, H, S] float32: the row sums of grad * out
    grad_stride_b,
    grad_stride_t,
    grad_stride_s,
    grad_stride_h,
    grad_stride_d,
    q_stride_b,
    q_stride_t,
    q_stride_s,
    q_stride_h,
    q_stride_d,
    k_stride_b,
    k_stride_t,
    k_stride_s,
    k_stride_h,
    k_stride_d,
    v_stride_b,
    v_stride_t,
    v_stride_s,
    v_stride_h,
    v_stride_d,
    T,
    S,
    H,
    fold,
    scale,
    scale_log2,
    WHOLE_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    D: tl.constexpr,
    DP: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
    TAIL_K: tl.constexpr,
    WIDEN: tl.constexpr,
):
    b, t, h, tile = _space_tile(T, H, tl.cdiv(S, BLOCK_Q))
    cols = tl.arange(0, DP).to(tl.int64)
    row = (tile * BLOCK_Q + tl.arange(0, BLOCK_Q)).to(tl.int64)
    out_rows = (((b * T + t) * S + row) * H + h) * D
    stat_rows = ((b * T + t) * H + h) * S + row
    dq = tl.zeros([BLOCK_Q, DP], tl.float32)

    frame, exists = _source(t, T, h, fold, cols, D, WHOLE_HEADS, GROUP)
    if WHOLE_HEADS:  # noqa: SIM102 (the compiler evaluates both sides of `and`)
        if not exists:  # the other kernel asks for no delta here
            _store(dq_ptr, out_rows, row < S, cols, dq, D, DP)
            return

    q_rows = b * q_stride_b + t * q_stride_t + h * q_stride_h + row * q_stride_s
    q = _load(q_ptr, q_rows, row < S, cols, q_stride_d, D, DP)
    grad_rows = b * grad_stride_b + t * grad_stride_t + h * grad_stride_h + row * grad_stride_s
    grad = _load(grad_ptr, grad_rows, row < S, cols, grad_stride_d, D, DP)
    out = _load(out_ptr, out_rows, row < S, cols, 1, D, DP)
    delta = tl.sum(grad.to(tl.float32) * out.to(tl.float32), 1)
    tl.store(delta_ptr + stat_rows, delta, mask=row < S)
    lse = tl.load(lse_ptr + stat_rows, mask=row < S, other=float("inf"))

    k_base = k_ptr + b * k_stride_b + h * k_stride_h
    v_base = v_ptr + b * v_stride_b + h * v_stride_h
    MASKED: tl.constexpr = TAIL_K == BLOCK_K
    whole = S // BLOCK_K * BLOCK_K
    for start in range(0, S if MASKED else whole, BLOCK_K):
        key = (start + tl.arange(0, BLOCK_K)).to(tl.int64)
        valid = key < S if MASKED else None
        k = _load_shifted(
            k_base, key * k_stride_s, valid, frame, exists, k_stride_t, cols, k_stride_d, D, DP,
            WHOLE_HEADS, GROUP,
        )  # fmt: skip
        v = _load_shifted(
            v_base, key * v_stride_s, valid, frame, exists, v_stride_t, cols, v_stride_d, D, DP,
            WHOLE_HEADS, GROUP,
        )  # fmt: skip
        dq = _space_dq_step(q, grad, k, v, valid, lse, delta, dq, scale, scale_log2, MASKED, WIDEN)
    if TAIL_K > 0 and not MASKED:
        key = (whole + tl.arange(0, TAIL_K)).to(tl.int64)
        k = _load_shifted(
            k_base, key * k_stride_s, key < S, frame, exists, k_stride_t, cols, k_stride_d, D, DP,
            WHOLE_HEADS, GROUP,
        )  # fmt: skip
        v = _load_shifted(
            v_base, key * v_stride_s, key < S, frame, exists, v_stride_t, cols, v_stride_d, D, DP,
            WHOLE_HEADS, GROUP,
        )  # fmt: skip
        dq = _space_dq_step(q, grad, k, v, key < S, lse, delta, dq, scale, scale_log2, True, WIDEN)
    _store(dq_ptr, out_rows, row < S, cols, dq, D, DP)


@triton.jit
def _shift_attention_bwd_dkv_kernel(
    grad_ptr,
    q_ptr,
    k_ptr,
    v_ptr,
    lse_ptr,  # [B, T, H, S] float32, base 2
    delta_ptr,  # [B, T, H, S] float32
    dk_ptr,  # dk, dv: [B, T, S, H, D] contiguous
    dv_ptr,
    grad_stride_b,
    grad_stride_t,
    grad_stride_s,
    grad_stride_h,
    grad_stride_d,
    q_stride_b,
    q_stride_t,
    q_stride_s,
    q_stride_h,
    q_stride_d,
    k_stride_b,
    k_stride_t,
    k_stride_s,
    k_stride_h,
    k_stride_d,
    v_stride_b,
    v_stride_t,
    v_stride_s,
    v_stride_h,
    v_stride_d,
    T,
    S,
    H,
    fold,
    scale,
    scale_log2,
    WHOLE_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    D: tl.constexpr,
    DP: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
    TAIL_Q: tl.constexpr,  # tile for the S % BLOCK_Q queries left; 0: none, BLOCK_Q: mask all
    WIDEN: tl.constexpr,
):
    """Frame t is that of the queries."""
    b, t, h, tile = _space_tile(T, H, tl.cdiv(S, BLOCK_K))
    cols = tl.arange(0, DP).to(tl.int64)
    key = (tile * BLOCK_K + tl.arange(0, BLOCK_K)).to(tl.int64)
    dk = tl.zeros([BLOCK_K, DP], tl.float32)
    dv = tl.zeros([BLOCK_K, DP], tl.float32)

    frame, exists = _source(t, T, h, fold, cols, D, WHOLE_HEADS, GROUP)
    to = (frame + T) % T * S  # rows of the other frames of this clip come before
    out_rows = ((b * T * S + key) * H + h) * D
    if WHOLE_HEADS:  # noqa: SIM102 (the compiler evaluates both sides of `and`)
        if not exists:
            _store_shifted(
                dk_ptr, out_rows, key < S, to, exists, H * D, cols, dk, D, DP, WHOLE_HEADS, GROUP
            )
            _store_shifted(
                dv_ptr, out_rows, key < S, to, exists, H * D, cols, dv, D, DP, WHOLE_HEADS, GROUP
            )
            return

    k = _load_shifted(
        k_ptr + b * k_stride_b + h * k_stride_h, key * k_stride_s, key < S, frame, exists,
        k_stride_t, cols, k_stride_d, D, DP, WHOLE_HEADS, GROUP,
    )  # fmt: skip
    v = _load_shifted(
        v_ptr + b * v_stride_b + h * v_stride_h, key * v_stride_s, key < S, frame, exists,
        v_stride_t, cols, v_stride_d, D, DP, WHOLE_HEADS, GROUP,
    )  # fmt: skip
    q_base = q_ptr + b * q_stride_b + t * q_stride_t + h * q_stride_h
    grad_base = grad_ptr + b * grad_stride_b + t * grad_stride_t + h * grad_stride_h
    lse_ptr += ((b * T + t) * H + h) * S
    delta_ptr += ((b * T + t) * H + h) * S
    MASKED: tl.constexpr = TAIL_Q == BLOCK_Q
    whole = S // BLOCK_Q * BLOCK_Q
    for start in range(0, S if MASKED else whole, BLOCK_Q):
        query = (start + tl.arange(0, BLOCK_Q)).to(tl.int64)
        valid = query < S if MASKED else None
        q = _load(q_base, query * q_stride_s, valid, cols, q_stride_d, D, DP)
        grad = _load(grad_base, query * grad_stride_s, valid, cols, grad_stride_d, D, DP)
        lse, delta = _load_statistics(lse_ptr, delta_ptr, query, valid)
        dk, dv = _space_dkv_step(k, v, q, grad, lse, delta, dk, dv, scale, scale_log2, WIDEN)
    if TAIL_Q > 0 and not MASKED:
        query = (whole + tl.arange(0, TAIL_Q)).to(tl.int64)
        left = query < S
        q = _load(q_base, query * q_stride_s, left, cols, q_stride_d, D, DP)
        grad = _load(grad_base, query * grad_stride_s, left, cols, grad_stride_d, D, DP)
        lse, delta = _load_statistics(lse_ptr, delta_ptr, query, left)
        dk, dv = _space_dkv_step(k, v, q, grad, lse, delta, dk, dv, scale, scale_log2, WIDEN)

    _store_shifted(
        dk_ptr, out_rows, key < S, to, exists, H * D, cols, dk, D, DP, WHOLE_HEADS, GROUP
    )
    _store_shifted(
        dv_ptr, out_rows, key < S, to, exists, H * D, cols, dv, D, DP, WHOLE_HEADS, GROUP
    )


def _outputs(q: Tensor) -> tuple[Tensor, Tensor]:
    clips, frames, tokens, heads, _ = q.shape
    return q.new_empty(q.shape), q.new_empty((clips, frames, heads, tokens), dtype=torch.float32)


def shift_constants(q: Tensor, k: Tensor, v: Tensor, fold: int) -> dict[str, Any]:
    """Whether each head reads one frame, and else how many columns side by side surely do."""
    width = q.shape[-1]
    if fold % width == 0:
        return {"WHOLE_HEADS": True, "GROUP": 1}
    dense = k.stride(-1) == v.stride(-1) == 1
    group = math.gcd(8, fold, width, k.stride(1), v.stride(1)) if dense else 1
    return {"WHOLE_HEADS": False, "GROUP": group}


def _shift_setting(
    name: str, q: Tensor, k: Tensor, v: Tensor, fold: int, over: str
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Compile-time constants, and options of the launch."""
    shift = shift_constants(q, k, v, fold)
    if not shift["WHOLE_HEADS"]:  # up to an address per column: smaller tiles
        name += "_by_column"
    constants, options = _space_setting(name, q, over)
    return {**constants, **shift}, options


@torch.library.custom_op("timefast::shift_attention", mutates_args=())
def shift_attention_op(
    q: Tensor, k: Tensor, v: Tensor, fold: int, scale: float
) -> tuple[Tensor, Tensor]:
    """-> out [B, T, S, H, D], and for the backward pass log-sum-exps (base 2) [B, T, H, S] in
    float32. Keys and values take `fold` channels from the next frame, as many from the previous."""
    out, lse = _outputs(q)
    if q.numel() == 0:
        return out, lse
    constants, options = _shift_setting("shift_attention_fwd", q, k, v, fold, over="keys")
    arguments = (q, k, v, out, lse, *_strides(q, k, v), *q.shape[1:4], fold, scale * LOG2_E)
    tiles = triton.cdiv(q.shape[2], constants["BLOCK_Q"])
    _space_launch(_shift_attention_fwd_kernel, q, tiles, arguments, **constants, **options)
    return out, lse


@shift_attention_op.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, fold: int, scale: float) -> tuple[Tensor, Tensor]:
    return _outputs(q)


@torch.library.custom_op("timefast::shift_attention_backward", mutates_args=())
def shift_attention_backward_op(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    fold: int,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    dq, dk, dv = (q.new_empty(q.shape) for _ in range(3))
    if q.numel() == 0:
        return dq, dk, dv
    delta = torch.empty_like(lse)
    strides = _strides(grad, q, k, v)
    sizes = (*q.shape[1:4], fold, scale, scale * LOG2_E)

    constants, options = _shift_setting("shift_attention_bwd_dq", q, k, v, fold, over="keys")
    arguments = (grad, q, k, v, out, lse, dq, delta, *strides, *sizes)
    tiles = triton.cdiv(q.shape[2], constants["BLOCK_Q"])
    kernel = _shift_attention_bwd_dq_kernel
    _space_launch(kernel, q, tiles, arguments, **constants, **options)

    constants, options = _shift_setting("shift_attention_bwd_dkv", q, k, v, fold, over="queries")
    arguments = (grad, q, k, v, lse, delta, dk, dv, *strides, *sizes)
    tiles = triton.cdiv(q.shape[2], constants["BLOCK_K"])
    kernel = _shift_attention_bwd_dkv_kernel
    _space_launch(kernel, q, tiles, arguments, **constants, **options)
    return dq, dk, dv


@shift_attention_backward_op.register_fake
def _(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    fold: int,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), q.new_empty(q.shape), q.new_empty(q.shape)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    q, k, v, ctx.fold, ctx.scale = inputs
    ctx.save_for_backward(q, k, v, *output)


def _backward(ctx: Any, grad: Tensor, grad_lse: Tensor) -> tuple[Tensor | None, ...]:
    return *shift_attention_backward_op(grad, *ctx.saved_tensors, ctx.fold, ctx.scale), None, None


shift_attention_op.register_autograd(_backward, setup_context=_setup)
shift_attention_backward_op.register_autograd(_no_second_derivative)
