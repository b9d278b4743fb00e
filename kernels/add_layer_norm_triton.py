"""A residual sum and its LayerNorm in Triton, imported when `add_layer_norm` is first asked for it.

Letters: M tokens, C model width; BLOCK_C: C rounded up to a power of two. A row is one token.
docs/kernels/add_layer_norm.md has the derivation.

    forward     a program takes ROWS rows and holds them in registers: sum, mean, squared deviations
                and result from one read.
    backward    a number of programs that fills the GPU runs over all rows. Each adds up the
                gradients of weight, bias and branch_bias of its own rows in registers and writes
                them out once; one sum over programs, in a fixed order, finishes them. No atomics.

Both passes see the total as it was rounded to its dtype. Every tensor may be of another dtype (in
training under autocast: the stream float32, the branch and `normed` bfloat16); arithmetic is
float32. Tensors are contiguous, offsets have 64 bits, grids one axis.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from timefast.kernels.tiles import launch_parameters, power_of_two


@triton.jit
def _tile(start, M, ROWS: tl.constexpr, C: tl.constexpr, BLOCK_C: tl.constexpr):
    """Rows from `start` on, their elements' offsets, and which of these exist."""
    row = (start + tl.arange(0, ROWS)).to(tl.int64)
    cols = tl.arange(0, BLOCK_C)
    return row, row[:, None] * C + cols[None, :], (row < M)[:, None] & (cols < C)[None, :]


@triton.jit
def _load(ptr, offsets, mask):
    """-> float32, zero outside."""
    return tl.load(ptr + offsets, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def _store(ptr, offsets, value, mask):
    tl.store(ptr + offsets, value.to(ptr.dtype.element_ty), mask=mask)


@triton.jit
def _add_layer_norm_fwd_kernel(
    x_ptr,  # [M, C], as branch, total, normed
    branch_ptr,  # None: no branch, scale, branch_bias, total
    scale_ptr,  # [M] float32, or None
    branch_bias_ptr,  # [C], or None
    weight_ptr,  # [C]
    bias_ptr,  # [C]
    total_ptr,
    normed_ptr,
    moments_ptr,  # [M, 2] float32
    M,
    eps,
    C: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    row, offsets, inside = _tile(tl.program_id(0).to(tl.int64) * ROWS, M, ROWS, C, BLOCK_C)
    cols = tl.arange(0, BLOCK_C)
    total = _load(x_ptr, offsets, inside)
    if branch_ptr is not None:
        branch = _load(branch_ptr, offsets, inside)
        if scale_ptr is not None:
            branch *= _load(scale_ptr, row, row < M)[:, None]
        total += branch
        if branch_bias_ptr is not None:
            total += _load(branch_bias_ptr, cols, cols < C)[None, :]
        rounded = total.to(total_ptr.dtype.element_ty)
        tl.store(total_ptr + offsets, rounded, mask=inside)
        total = rounded.to(tl.float32)

    mean = tl.sum(total, 1) / C
    centred = tl.where((cols < C)[None, :], total - mean[:, None], 0.0)
    rstd = tl.rsqrt(tl.sum(centred * centred, 1) / C + eps)
    weight = _load(weight_ptr, cols, cols < C)
    bias = _load(bias_ptr, cols, cols < C)
    normed = centred * rstd[:, None] * weight[None, :] + bias[None, :]
    _store(normed_ptr, offsets, normed, inside)
    tl.store(moments_ptr + 2 * row, mean, mask=row < M)
    tl.store(moments_ptr + 2 * row + 1, rstd, mask=row < M)


@triton.jit
def _add_layer_norm_bwd_kernel(
    d_total_ptr,  # [M, C] as d_normed, total, dx, d_branch; None: not used, it adds nothing
    d_normed_ptr,  # None: not used
    total_ptr,
    weight_ptr,  # [C]
    scale_ptr,  # [M] float32, or None
    moments_ptr,  # [M, 2] float32
    dx_ptr,
    d_branch_ptr,  # None: no branch, or its gradient is dx
    sums_ptr,  # [programs, 2 or 3, C] float32: of weight, bias, branch_bias
    M,
    C: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_C: tl.constexpr,
    SUMS: tl.constexpr,
    STAGES: tl.constexpr,
):
    cols = tl.arange(0, BLOCK_C)
    weight = _load(weight_ptr, cols, cols < C)[None, :]
    d_weight = tl.zeros([ROWS, BLOCK_C], tl.float32)
    d_bias = tl.zeros([ROWS, BLOCK_C], tl.float32)
    d_branch_bias = tl.zeros([ROWS, BLOCK_C], tl.float32)

    first, step = tl.program_id(0) * ROWS, tl.num_programs(0) * ROWS
    for start in tl.range(first, M, step, num_stages=STAGES):
        row, offsets, inside = _tile(start, M, ROWS, C, BLOCK_C)
        dt = tl.zeros([ROWS, BLOCK_C], tl.float32)
        if d_normed_ptr is not None:
            # Where a row or column does not exist dy is zero, and so is what the sums get.
            dy = _load(d_normed_ptr, offsets, inside)
            mean = _load(moments_ptr, 2 * row, row < M)[:, None]
            rstd = _load(moments_ptr, 2 * row + 1, row < M)[:, None]
            xhat = (_load(total_ptr, offsets, inside) - mean) * rstd
            d_weight += dy * xhat
            d_bias += dy
            dy *= weight
            along_ones = tl.sum(dy, 1)[:, None] / C
            along_xhat = tl.sum(dy * xhat, 1)[:, None] / C
            dt = (dy - along_ones - xhat * along_xhat) * rstd
        if d_total_ptr is not None:
            dt += _load(d_total_ptr, offsets, inside)
        _store(dx_ptr, offsets, dt, inside)
        if d_branch_ptr is not None:
            d_branch = dt
            if scale_ptr is not None:
                d_branch = dt * _load(scale_ptr, row, row < M)[:, None]
            _store(d_branch_ptr, offsets, d_branch, inside)
        if SUMS == 3:
            d_branch_bias += dt

    sums_ptr += tl.program_id(0).to(tl.int64) * SUMS * C
    tl.store(sums_ptr + cols, tl.sum(d_weight, 0), mask=cols < C)
    tl.store(sums_ptr + C + cols, tl.sum(d_bias, 0), mask=cols < C)
    if SUMS == 3:
        tl.store(sums_ptr + 2 * C + cols, tl.sum(d_branch_bias, 0), mask=cols < C)


def _setting(entry: str, like: Tensor) -> tuple[dict[str, Any], dict[str, Any]]:
    """Compile-time constants for rows as wide as those of `like`, and the launch parameters."""
    params = launch_parameters(entry, like, length=1)
    width = like.shape[-1]
    block = power_of_two(width)
    return {"C": width, "ROWS": max(1, params["tile"] // block), "BLOCK_C": block}, params


def _dense(*tensors: Tensor | None) -> tuple[Tensor | None, ...]:
    return tuple(None if x is None else x.contiguous() for x in tensors)


def _outputs(x: Tensor, branch: Tensor | None, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    if branch is None:
        total = x.new_empty(0)
    else:
        total = x.new_empty(x.shape, dtype=torch.promote_types(x.dtype, branch.dtype))
    normed = x.new_empty(x.shape, dtype=dtype)
    return total, normed, x.new_empty((x.numel() // x.shape[-1], 2), dtype=torch.float32)


@torch.library.custom_op("timefast::add_layer_norm", mutates_args=())
def add_layer_norm_op(
    x: Tensor,
    branch: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    scale: Tensor | None,
    branch_bias: Tensor | None,
    eps: float,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:
    """-> total [..., C] in the promoted dtype of x and branch (empty where there is no branch, and
    it is x), normed [..., C] in `dtype`, and for the backward pass mean and reciprocal standard
    deviation of each row [M, 2] in float32. scale: [M] float32, without a gradient."""
    total, normed, moments = _outputs(x, branch, dtype)
    rows = len(moments)
    if rows == 0:
        return total, normed, moments
    constants, params = _setting("add_layer_norm_fwd", normed)
    inputs = _dense(x, branch, scale, branch_bias, weight, bias)
    to = None if branch is None else total
    with torch.cuda.device_of(x):
        _add_layer_norm_fwd_kernel[(triton.cdiv(rows, constants["ROWS"]),)](
            *inputs, to, normed, moments, rows, eps, **constants, num_warps=params["num_warps"]
        )
    return total, normed, moments


@add_layer_norm_op.register_fake
def _(
    x: Tensor,
    branch: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    scale: Tensor | None,
    branch_bias: Tensor | None,
    eps: float,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:
    return _outputs(x, branch, dtype)


def _gradients(
    total: Tensor, own: bool, sums: int, dtype: torch.dtype, branch_dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    dx = total.new_empty(total.shape, dtype=dtype)
    d_branch = total.new_empty(total.shape if own else 0, dtype=branch_dtype)
    return dx, d_branch, total.new_empty((sums, total.shape[-1]), dtype=torch.float32)


@torch.library.custom_op("timefast::add_layer_norm_backward", mutates_args=())
def add_layer_norm_backward_op(
    d_total: Tensor | None,
    d_normed: Tensor | None,
    total: Tensor,
    weight: Tensor,
    scale: Tensor | None,
    moments: Tensor,
    own: bool,
    sums: int,
    dtype: torch.dtype,
    branch_dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:
    """-> dx in `dtype`, the branch's gradient in `branch_dtype` if it has one of its `own` (else
    empty: it is dx, or there is no branch), and in float32 the gradients of weight, bias and, if
    `sums` is 3, branch_bias [sums, C]."""
    dx, d_branch, _ = _gradients(total, own, sums, dtype, branch_dtype)
    rows = len(moments)
    like = total if d_normed is None else d_normed
    constants, params = _setting("add_layer_norm_bwd", like)
    programs = min(params["programs"], triton.cdiv(rows, constants["ROWS"]))
    parts = moments.new_empty((programs, sums, total.shape[-1]))
    if rows > 0:
        inputs = _dense(d_total, d_normed, total, weight, scale, moments)
        to = d_branch if own else None
        with torch.cuda.device_of(total):
            _add_layer_norm_bwd_kernel[(programs,)](
                *inputs, dx, to, parts, rows, **constants,
                SUMS=sums, STAGES=params["num_stages"], num_warps=params["num_warps"],
            )  # fmt: skip
    return dx, d_branch, parts.sum(0)


@add_layer_norm_backward_op.register_fake
def _(
    d_total: Tensor | None,
    d_normed: Tensor | None,
    total: Tensor,
    weight: Tensor,
    scale: Tensor | None,
    moments: Tensor,
    own: bool,
    sums: int,
    dtype: torch.dtype,
    branch_dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:
    return _gradients(total, own, sums, dtype, branch_dtype)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    x, branch, weight, bias, scale, branch_bias, _, _ = inputs
    total, _, moments = output
    ctx.set_materialize_grads(False)  # the gradient of an unused output is no tensor of zeros
    ctx.mark_non_differentiable(*((moments,) if branch is not None else (total, moments)))
    ctx.save_for_backward(x if branch is None else total, weight, scale, moments)
    ctx.dtype, ctx.bias_dtype = x.dtype, bias.dtype
    ctx.branch_dtype = None if branch is None else branch.dtype
    ctx.branch_bias_dtype = None if branch_bias is None else branch_bias.dtype


def _backward(
    ctx: Any, d_total: Tensor | None, d_normed: Tensor | None, _: None
) -> tuple[Tensor | None, ...]:
    total, weight, scale, moments = ctx.saved_tensors
    branch_dtype = ctx.branch_dtype or ctx.dtype
    own = scale is not None or branch_dtype != ctx.dtype
    sums = 2 if ctx.branch_bias_dtype is None else 3
    dx, d_branch, (d_weight, d_bias, *d_branch_bias) = add_layer_norm_backward_op(
        d_total, d_normed, total, weight, scale, moments, own, sums, ctx.dtype, branch_dtype
    )
    of_branch = d_branch if own else dx
    normed_is_read = d_normed is not None
    return (
        dx, None if ctx.branch_dtype is None else of_branch,
        d_weight.to(weight.dtype) if normed_is_read else None,
        d_bias.to(ctx.bias_dtype) if normed_is_read else None, None,
        d_branch_bias[0].to(ctx.branch_bias_dtype) if d_branch_bias else None, None, None,
    )  # fmt: skip


def _no_second_derivative(ctx: Any, *grads: Tensor) -> None:
    raise NotImplementedError(
        "the Triton kernels of add_layer_norm cannot be differentiated twice; "
        'use impl="reference" for second derivatives'
    )


add_layer_norm_op.register_autograd(_backward, setup_context=_setup)
add_layer_norm_backward_op.register_autograd(_no_second_derivative)
