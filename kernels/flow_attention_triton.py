"""Attention of the flow head in Triton: the kernels of `pairwise_attention`, imported when it is
first asked for its Triton implementation.

Letters: B clips, P frame pairs, N patches per frame, NP: N rounded up to a power of two, C width.

One head is as wide as the model, too wide to hold. But all N keys of a frame are few: scores of a
tile of queries with all of them accumulate over chunks of C, softmax is over whole rows at once,
and each chunk of the output is formed and stored. Backward likewise: a kernel per tile of queries
gives dq and the row sums of P * dP, a kernel per tile of keys gives dk and dv.

Frames of more than WHOLE patches go through the `long` kernels: tiles of keys in a loop, with an
online softmax as in FlashAttention-2. There a program holds one part of the output's columns, and
the programs of the other parts form the same scores again (docs/kernels/flow_attention.md).

All tensors are read through their strides with 64-bit offsets; outputs are contiguous. No atomics.
Products take operands in the dtype of the inputs and accumulate in float32.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from timefast.kernels.divided_attention_triton import (
    INTERPRETED,
    LOG2_E,
    _dot,
    _load,
    _store,
    _strides,
)
from timefast.kernels.tiles import launch_parameters, power_of_two

WHOLE = 256  # patches of a frame that the kernels hold at once


@triton.jit
def _pair_tile(P, N, BLOCK: tl.constexpr):
    """Clip and pair of this program, and the patches of its tile."""
    pid = tl.program_id(0)
    tiles = tl.cdiv(N, BLOCK)
    b = (pid // (tiles * P)).to(tl.int64)
    p = ((pid // tiles) % P).to(tl.int64)
    return b, p, ((pid % tiles) * BLOCK + tl.arange(0, BLOCK)).to(tl.int64)


@triton.jit
def _pairwise_attention_fwd_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    out_ptr,  # [B, P, N, C] contiguous
    lse_ptr,  # [B, P, N] float32, base 2
    q_stride_b,
    q_stride_p,
    q_stride_n,
    q_stride_d,
    k_stride_b,
    k_stride_p,
    k_stride_n,
    k_stride_d,
    v_stride_b,
    v_stride_p,
    v_stride_n,
    v_stride_d,
    P,
    N,
    scale_log2,
    C: tl.constexpr,
    CP: tl.constexpr,  # C rounded up to whole chunks
    CHUNK: tl.constexpr,
    BLOCK: tl.constexpr,
    NP: tl.constexpr,
    WIDEN: tl.constexpr,
):
    b, pair, query = _pair_tile(P, N, BLOCK)
    key = tl.arange(0, NP).to(tl.int64)
    q_rows = b * q_stride_b + pair * q_stride_p + query * q_stride_n
    k_rows = b * k_stride_b + pair * k_stride_p + key * k_stride_n
    v_rows = b * v_stride_b + pair * v_stride_p + key * v_stride_n

    scores = tl.zeros([BLOCK, NP], tl.float32)
    for start in range(0, CP, CHUNK):
        cols = (start + tl.arange(0, CHUNK)).to(tl.int64)
        q = _load(q_ptr, q_rows, query < N, cols, q_stride_d, C, CP)
        k = _load(k_ptr, k_rows, key < N, cols, k_stride_d, C, CP)
        scores += _dot(q, tl.trans(k), WIDEN)
    scores = tl.where((key < N)[None, :], scores * scale_log2, float("-inf"))
    best = tl.max(scores, 1)
    p = tl.exp2(scores - best[:, None])
    total = tl.sum(p, 1)
    out_rows = (b * P + pair) * N + query
    tl.store(lse_ptr + out_rows, best + tl.log2(total), mask=query < N)

    for start in range(0, CP, CHUNK):
        cols = (start + tl.arange(0, CHUNK)).to(tl.int64)
        v = _load(v_ptr, v_rows, key < N, cols, v_stride_d, C, CP)
        out = _dot(p.to(v.dtype), v, WIDEN) / total[:, None]
        _store(out_ptr, out_rows * C, query < N, cols, out, C, CP)


@triton.jit
def _pairwise_attention_bwd_dq_kernel(
    grad_ptr,
    q_ptr,
    k_ptr,
    v_ptr,
    lse_ptr,  # [B, P, N] float32, base 2
    dq_ptr,  # [B, P, N, C] contiguous
    delta_ptr,  # [B, P, N] float32: the row sums of P * dP
    grad_stride_b,
    grad_stride_p,
    grad_stride_n,
    grad_stride_d,
    q_stride_b,
    q_stride_p,
    q_stride_n,
    q_stride_d,
    k_stride_b,
    k_stride_p,
    k_stride_n,
    k_stride_d,
    v_stride_b,
    v_stride_p,
    v_stride_n,
    v_stride_d,
    P,
    N,
    scale,
    scale_log2,
    C: tl.constexpr,
    CP: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK: tl.constexpr,
    NP: tl.constexpr,
    WIDEN: tl.constexpr,
):
    b, pair, query = _pair_tile(P, N, BLOCK)
    key = tl.arange(0, NP).to(tl.int64)
    grad_rows = b * grad_stride_b + pair * grad_stride_p + query * grad_stride_n
    q_rows = b * q_stride_b + pair * q_stride_p + query * q_stride_n
    k_rows = b * k_stride_b + pair * k_stride_p + key * k_stride_n
    v_rows = b * v_stride_b + pair * v_stride_p + key * v_stride_n
    out_rows = (b * P + pair) * N + query

    scores = tl.zeros([BLOCK, NP], tl.float32)
    dp = tl.zeros([BLOCK, NP], tl.float32)
    for start in range(0, CP, CHUNK):
        cols = (start + tl.arange(0, CHUNK)).to(tl.int64)
        q = _load(q_ptr, q_rows, query < N, cols, q_stride_d, C, CP)
        k = _load(k_ptr, k_rows, key < N, cols, k_stride_d, C, CP)
        scores += _dot(q, tl.trans(k), WIDEN)
        grad = _load(grad_ptr, grad_rows, query < N, cols, grad_stride_d, C, CP)
        v = _load(v_ptr, v_rows, key < N, cols, v_stride_d, C, CP)
        dp += _dot(grad, tl.trans(v), WIDEN)
    lse = tl.load(lse_ptr + out_rows, mask=query < N, other=float("inf"))
    p = tl.exp2(scores * scale_log2 - lse[:, None])
    p = tl.where((key < N)[None, :], p, 0.0)
    delta = tl.sum(p * dp, 1)
    tl.store(delta_ptr + out_rows, delta, mask=query < N)
    ds = p * (dp - delta[:, None]) * scale

    for start in range(0, CP, CHUNK):
        cols = (start + tl.arange(0, CHUNK)).to(tl.int64)
        k = _load(k_ptr, k_rows, key < N, cols, k_stride_d, C, CP)
        dq = _dot(ds.to(k.dtype), k, WIDEN)
        _store(dq_ptr, out_rows * C, query < N, cols, dq, C, CP)


@triton.jit
def _pairwise_attention_bwd_dkv_kernel(
    grad_ptr,
    q_ptr,
    k_ptr,
    v_ptr,
    lse_ptr,  # [B, P, N] float32, base 2
    delta_ptr,  # [B, P, N] float32
    dk_ptr,  # dk, dv: [B, P, N, C] contiguous
    dv_ptr,
    grad_stride_b,
    grad_stride_p,
    grad_stride_n,
    grad_stride_d,
    q_stride_b,
    q_stride_p,
    q_stride_n,
    q_stride_d,
    k_stride_b,
    k_stride_p,
    k_stride_n,
    k_stride_d,
    v_stride_b,
    v_stride_p,
    v_stride_n,
    v_stride_d,
    P,
    N,
    scale,
    scale_log2,
    C: tl.constexpr,
    CP: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK: tl.constexpr,
    NP: tl.constexpr,
    WIDEN: tl.constexpr,
):
    b, pair, key = _pair_tile(P, N, BLOCK)
    query = tl.arange(0, NP).to(tl.int64)
    grad_rows = b * grad_stride_b + pair * grad_stride_p + query * grad_stride_n
    q_rows = b * q_stride_b + pair * q_stride_p + query * q_stride_n
    k_rows = b * k_stride_b + pair * k_stride_p + key * k_stride_n
    v_rows = b * v_stride_b + pair * v_stride_p + key * v_stride_n

    scores = tl.zeros([BLOCK, NP], tl.float32)  # transposed: [keys, queries]
    dp = tl.zeros([BLOCK, NP], tl.float32)
    for start in range(0, CP, CHUNK):
        cols = (start + tl.arange(0, CHUNK)).to(tl.int64)
        q = _load(q_ptr, q_rows, query < N, cols, q_stride_d, C, CP)
        k = _load(k_ptr, k_rows, key < N, cols, k_stride_d, C, CP)
        scores += _dot(k, tl.trans(q), WIDEN)
        grad = _load(grad_ptr, grad_rows, query < N, cols, grad_stride_d, C, CP)
        v = _load(v_ptr, v_rows, key < N, cols, v_stride_d, C, CP)
        dp += _dot(v, tl.trans(grad), WIDEN)
    stats = (b * P + pair) * N + query
    lse = tl.load(lse_ptr + stats, mask=query < N, other=float("inf"))  # makes p = 0
    delta = tl.load(delta_ptr + stats, mask=query < N, other=0.0)
    p = tl.exp2(scores * scale_log2 - lse[None, :])
    ds = p * (dp - delta[None, :]) * scale

    out_rows = ((b * P + pair) * N + key) * C
    for start in range(0, CP, CHUNK):
        cols = (start + tl.arange(0, CHUNK)).to(tl.int64)
        q = _load(q_ptr, q_rows, query < N, cols, q_stride_d, C, CP)
        dk = _dot(ds.to(q.dtype), q, WIDEN)
        _store(dk_ptr, out_rows, key < N, cols, dk, C, CP)
        grad = _load(grad_ptr, grad_rows, query < N, cols, grad_stride_d, C, CP)
        dv = _dot(p.to(grad.dtype), grad, WIDEN)
        _store(dv_ptr, out_rows, key < N, cols, dv, C, CP)


@triton.jit
def _part_tile(P, N, C: tl.constexpr, BLOCK: tl.constexpr, WIDTH: tl.constexpr):
    """Clip and pair of this program, the patches of its tile, and the columns of its part."""
    parts: tl.constexpr = (C + WIDTH - 1) // WIDTH
    part = tl.program_id(0) % parts
    pid = tl.program_id(0) // parts
    tiles = tl.cdiv(N, BLOCK)
    b = (pid // (tiles * P)).to(tl.int64)
    p = ((pid // tiles) % P).to(tl.int64)
    rows = ((pid % tiles) * BLOCK + tl.arange(0, BLOCK)).to(tl.int64)
    return b, p, rows, part, (part * WIDTH + tl.arange(0, WIDTH)).to(tl.int64)


@triton.jit
def _products(
    a_ptr,
    a_rows,
    a_valid,
    a_stride_d,
    b_ptr,
    b_rows,
    b_valid,
    b_stride_d,
    C: tl.constexpr,
    CP: tl.constexpr,
    CHUNK: tl.constexpr,
    A: tl.constexpr,
    B: tl.constexpr,
    WIDEN: tl.constexpr,
):
    """-> [A, B]: each of the rows of a times each of those of b."""
    total = tl.zeros([A, B], tl.float32)
    for start in range(0, CP, CHUNK):
        cols = (start + tl.arange(0, CHUNK)).to(tl.int64)
        a = _load(a_ptr, a_rows, a_valid, cols, a_stride_d, C, CP)
        b = _load(b_ptr, b_rows, b_valid, cols, b_stride_d, C, CP)
        total += _dot(a, tl.trans(b), WIDEN)
    return total


@triton.jit
def _pairwise_attention_long_fwd_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    out_ptr,  # [B, P, N, C] contiguous
    lse_ptr,  # [B, P, N] float32, base 2
    q_stride_b,
    q_stride_p,
    q_stride_n,
    q_stride_d,
    k_stride_b,
    k_stride_p,
    k_stride_n,
    k_stride_d,
    v_stride_b,
    v_stride_p,
    v_stride_n,
    v_stride_d,
    P,
    N,
    scale_log2,
    C: tl.constexpr,
    CP: tl.constexpr,  # C rounded up to whole chunks
    CHUNK: tl.constexpr,
    BLOCK: tl.constexpr,
    STEP: tl.constexpr,  # keys at a time
    WIDTH: tl.constexpr,  # columns of a part
    WP: tl.constexpr,  # C rounded up to whole parts
    WIDEN: tl.constexpr,
):
    b, pair, query, part, mine = _part_tile(P, N, C, BLOCK, WIDTH)
    q_rows = b * q_stride_b + pair * q_stride_p + query * q_stride_n
    k_ptr += b * k_stride_b + pair * k_stride_p
    v_ptr += b * v_stride_b + pair * v_stride_p

    best = tl.full([BLOCK], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK], tl.float32)
    out = tl.zeros([BLOCK, WIDTH], tl.float32)
    for first in range(0, N, STEP):
        key = (first + tl.arange(0, STEP)).to(tl.int64)
        scores = _products(
            q_ptr, q_rows, query < N, q_stride_d, k_ptr, key * k_stride_n, key < N, k_stride_d,
            C, CP, CHUNK, BLOCK, STEP, WIDEN,
        )  # fmt: skip
        scores = tl.where((key < N)[None, :], scores * scale_log2, float("-inf"))
        before = best
        best = tl.maximum(before, tl.max(scores, 1))  # finite: each tile has a key
        p = tl.exp2(scores - best[:, None])
        shrink = tl.exp2(before - best)
        total = total * shrink + tl.sum(p, 1)
        v = _load(v_ptr, key * v_stride_n, key < N, mine, v_stride_d, C, WP)
        out = out * shrink[:, None] + _dot(p.to(v.dtype), v, WIDEN)

    out_rows = (b * P + pair) * N + query
    _store(out_ptr, out_rows * C, query < N, mine, out / total[:, None], C, WP)
    if part == 0:
        tl.store(lse_ptr + out_rows, best + tl.log2(total), mask=query < N)


@triton.jit
def _pairwise_attention_long_bwd_dq_kernel(
    grad_ptr,
    q_ptr,
    k_ptr,
    v_ptr,
    out_ptr,  # [B, P, N, C] contiguous
    lse_ptr,  # [B, P, N] float32, base 2
    dq_ptr,  # [B, P, N, C] contiguous
    delta_ptr,  # [B, P, N] float32: the row sums of grad * out, which are those of P * dP
    grad_stride_b,
    grad_stride_p,
    grad_stride_n,
    grad_stride_d,
    q_stride_b,
    q_stride_p,
    q_stride_n,
    q_stride_d,
    k_stride_b,
    k_stride_p,
    k_stride_n,
    k_stride_d,
    v_stride_b,
    v_stride_p,
    v_stride_n,
    v_stride_d,
    P,
    N,
    scale,
    scale_log2,
    C: tl.constexpr,
    CP: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK: tl.constexpr,
    STEP: tl.constexpr,
    WIDTH: tl.constexpr,
    WP: tl.constexpr,
    WIDEN: tl.constexpr,
):
    b, pair, query, part, mine = _part_tile(P, N, C, BLOCK, WIDTH)
    grad_rows = b * grad_stride_b + pair * grad_stride_p + query * grad_stride_n
    q_rows = b * q_stride_b + pair * q_stride_p + query * q_stride_n
    k_ptr += b * k_stride_b + pair * k_stride_p
    v_ptr += b * v_stride_b + pair * v_stride_p
    out_rows = (b * P + pair) * N + query

    delta = tl.zeros([BLOCK], tl.float32)
    for start in range(0, CP, CHUNK):
        cols = (start + tl.arange(0, CHUNK)).to(tl.int64)
        grad = _load(grad_ptr, grad_rows, query < N, cols, grad_stride_d, C, CP)
        out = _load(out_ptr, out_rows * C, query < N, cols, 1, C, CP)
        delta += tl.sum(grad.to(tl.float32) * out.to(tl.float32), 1)
    if part == 0:
        tl.store(delta_ptr + out_rows, delta, mask=query < N)
    lse = tl.load(lse_ptr + out_rows, mask=query < N, other=float("inf"))  # makes p = 0

    dq = tl.zeros([BLOCK, WIDTH], tl.float32)
    for first in range(0, N, STEP):
        key = (first + tl.arange(0, STEP)).to(tl.int64)
        scores = _products(
            q_ptr, q_rows, query < N, q_stride_d, k_ptr, key * k_stride_n, key < N, k_stride_d,
            C, CP, CHUNK, BLOCK, STEP, WIDEN,
        )  # fmt: skip
        dp = _products(
            grad_ptr, grad_rows, query < N, grad_stride_d,
            v_ptr, key * v_stride_n, key < N, v_stride_d, C, CP, CHUNK, BLOCK, STEP, WIDEN,
        )  # fmt: skip
        p = tl.exp2(scores * scale_log2 - lse[:, None])
        ds = tl.where((key < N)[None, :], p * (dp - delta[:, None]) * scale, 0.0)
        k = _load(k_ptr, key * k_stride_n, key < N, mine, k_stride_d, C, WP)
        dq += _dot(ds.to(k.dtype), k, WIDEN)
    _store(dq_ptr, out_rows * C, query < N, mine, dq, C, WP)


@triton.jit
def _pairwise_attention_long_bwd_dkv_kernel(
    grad_ptr,
    q_ptr,
    k_ptr,
    v_ptr,
    lse_ptr,  # [B, P, N] float32, base 2
    delta_ptr,  # [B, P, N] float32
    dk_ptr,  # dk, dv: [B, P, N, C] contiguous
    dv_ptr,
    grad_stride_b,
    grad_stride_p,
    grad_stride_n,
    grad_stride_d,
    q_stride_b,
    q_stride_p,
    q_stride_n,
    q_stride_d,
    k_stride_b,
    k_stride_p,
    k_stride_n,
    k_stride_d,
    v_stride_b,
    v_stride_p,
    v_stride_n,
    v_stride_d,
    P,
    N,
    scale,
    scale_log2,
    C: tl.constexpr,
    CP: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK: tl.constexpr,
    STEP: tl.constexpr,
    WIDTH: tl.constexpr,
    WP: tl.constexpr,
    WIDEN: tl.constexpr,
):
    b, pair, key, part, mine = _part_tile(P, N, C, BLOCK, WIDTH)
    k_rows = b * k_stride_b + pair * k_stride_p + key * k_stride_n
    v_rows = b * v_stride_b + pair * v_stride_p + key * v_stride_n
    q_ptr += b * q_stride_b + pair * q_stride_p
    grad_ptr += b * grad_stride_b + pair * grad_stride_p
    stats = (b * P + pair) * N

    dk = tl.zeros([BLOCK, WIDTH], tl.float32)
    dv = tl.zeros([BLOCK, WIDTH], tl.float32)
    for first in range(0, N, STEP):
        query = (first + tl.arange(0, STEP)).to(tl.int64)
        scores = _products(  # transposed: [keys, queries]
            k_ptr, k_rows, key < N, k_stride_d, q_ptr, query * q_stride_n, query < N, q_stride_d,
            C, CP, CHUNK, BLOCK, STEP, WIDEN,
        )  # fmt: skip
        dp = _products(
            v_ptr, v_rows, key < N, v_stride_d,
            grad_ptr, query * grad_stride_n, query < N, grad_stride_d,
            C, CP, CHUNK, BLOCK, STEP, WIDEN,
        )  # fmt: skip
        lse = tl.load(lse_ptr + stats + query, mask=query < N, other=float("inf"))  # makes p = 0
        delta = tl.load(delta_ptr + stats + query, mask=query < N, other=0.0)
        p = tl.exp2(scores * scale_log2 - lse[None, :])
        ds = p * (dp - delta[None, :]) * scale
        grad = _load(grad_ptr, query * grad_stride_n, query < N, mine, grad_stride_d, C, WP)
        dv += _dot(p.to(grad.dtype), grad, WIDEN)
        q = _load(q_ptr, query * q_stride_n, query < N, mine, q_stride_d, C, WP)
        dk += _dot(ds.to(q.dtype), q, WIDEN)
    out_rows = (stats + key) * C
    _store(dk_ptr, out_rows, key < N, mine, dk, C, WP)
    _store(dv_ptr, out_rows, key < N, mine, dv, C, WP)


def pairwise_constants(
    patches: int, width: int, dtype: torch.dtype, params: dict[str, Any]
) -> dict[str, Any]:
    """Compile-time constants of the kernels, those of long frames if `params` are for them."""
    everything = power_of_two(patches, at_least=16)
    constants = {
        "C": width,
        "CP": triton.cdiv(width, params["chunk"]) * params["chunk"],
        "CHUNK": params["chunk"],
        "BLOCK": min(params["block"], everything),
        "WIDEN": INTERPRETED and dtype == torch.bfloat16,
    }
    if "part" not in params:
        return {**constants, "NP": everything}
    part = min(params["part"], power_of_two(width, at_least=16))
    return {
        **constants,
        "STEP": min(params["step"], everything),
        "WIDTH": part,
        "WP": triton.cdiv(width, part) * part,
    }


def _launch(kernel: Any, name: str, q: Tensor, arguments: tuple[Any, ...]) -> None:
    """One program per (clip, pair, tile of patches), and per part of the columns if there are."""
    clips, pairs, patches, width = q.shape
    params = launch_parameters(f"pairwise_attention_{name}", q, length=patches)
    constants = pairwise_constants(patches, width, q.dtype, params)
    options = {key: params[key] for key in ("num_warps", "num_stages")}
    parts = triton.cdiv(width, constants.get("WIDTH", width))
    grid = (clips * pairs * triton.cdiv(patches, constants["BLOCK"]) * parts,)
    with torch.cuda.device_of(q):
        kernel[grid](*arguments, **constants, **options, enable_fp_fusion=True)


@torch.library.custom_op("timefast::pairwise_attention", mutates_args=())
def pairwise_attention_op(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """-> output [B, P, N, C], and [B, P, N] log-sum-exps (base 2) for the backward pass."""
    out, lse = _outputs(q)
    if q.numel():
        sizes = (q.shape[1], q.shape[2], scale * LOG2_E)
        arguments = (q, k, v, out, lse, *_strides(q, k, v), *sizes)
        if q.shape[2] <= WHOLE:
            _launch(_pairwise_attention_fwd_kernel, "fwd", q, arguments)
        else:
            _launch(_pairwise_attention_long_fwd_kernel, "long_fwd", q, arguments)
    return out, lse


def _outputs(q: Tensor) -> tuple[Tensor, Tensor]:
    return q.new_empty(q.shape), q.new_empty(q.shape[:3], dtype=torch.float32)


@pairwise_attention_op.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    return _outputs(q)


@torch.library.custom_op("timefast::pairwise_attention_backward", mutates_args=())
def pairwise_attention_backward_op(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lse: Tensor,
    scale: float,
    out: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """`out`, the result of the forward pass, is read for long frames only."""
    dq, dk, dv = q.new_empty(q.shape), q.new_empty(q.shape), q.new_empty(q.shape)
    if q.numel():
        delta = torch.empty_like(lse)
        tokens = (grad, q, k, v)
        rest = (*_strides(*tokens), q.shape[1], q.shape[2], scale, scale * LOG2_E)
        of_keys = (*tokens, lse, delta, dk, dv, *rest)
        if out is None:
            of_queries: tuple[Any, ...] = (*tokens, lse, dq, delta, *rest)
            _launch(_pairwise_attention_bwd_dq_kernel, "bwd_dq", q, of_queries)
            _launch(_pairwise_attention_bwd_dkv_kernel, "bwd_dkv", q, of_keys)
        else:
            of_queries = (*tokens, out.contiguous(), lse, dq, delta, *rest)
            _launch(_pairwise_attention_long_bwd_dq_kernel, "long_bwd_dq", q, of_queries)
            _launch(_pairwise_attention_long_bwd_dkv_kernel, "long_bwd_dkv", q, of_keys)
    return dq, dk, dv


@pairwise_attention_backward_op.register_fake
def _(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lse: Tensor,
    scale: float,
    out: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), q.new_empty(q.shape), q.new_empty(q.shape)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tokens, ctx.scale = inputs
    out, lse = output
    ctx.save_for_backward(*tokens, lse, out if out.shape[2] > WHOLE else None)


def _backward(ctx: Any, grad: Tensor, grad_lse: Tensor) -> tuple[Tensor | None, ...]:
    *saved, out = ctx.saved_tensors
    return *pairwise_attention_backward_op(grad, *saved, ctx.scale, out), None


def _no_second_derivative(ctx: Any, *grads: Tensor) -> None:
    raise NotImplementedError(
        "the Triton kernels of pairwise_attention cannot be differentiated twice; "
        'use impl="reference" for second derivatives'
    )


pairwise_attention_op.register_autograd(_backward, setup_context=_setup)
pairwise_attention_backward_op.register_autograd(_no_second_derivative)
