"""Trajectory attention in Triton, imported when `trajectory_attention` is first asked for it.

Letters: B clips, T frames, N patches per frame, S = T * N, H heads, D head width, C = H * D;
DP, TP, HP: D, T and H rounded up to a power of two. docs/kernels/trajectory_attention.md has the
derivation.

    frames  forward: one program holds a tile of queries of one clip and head and runs over all
            frames, with an online softmax over each frame's keys. It writes x, the answers of
            every frame, and their log-sum-exps.
            backward: a kernel for dq that runs over frames and keys, a kernel for dk, dv that runs
            over queries. Probabilities are computed again from the log-sum-exps.
    along   one program per patch: scores against the absorbed queries, softmax over the frames,
            weighted sum, and the reverse. The absorbed queries [queries, H, C] come from matrix
            products in parts of WORKSPACE bytes.

The class token is one more query, the last row of x: an attention over all tokens is the sum of the
frames' answers weighted by their log-sum-exps, and a few sums of [B, H, T, D] do the rest.

Inputs are read through their strides with 64-bit offsets; outputs are contiguous. Nothing uses
atomics. Products take operands in the dtype of the inputs and accumulate in float32; everything
else is float32. Grids have one axis, since a second ends at 65,535 programs.
"""

import math
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from timefast.kernels.divided_attention_triton import (
    INTERPRETED,
    LOG2_E,
    _dot,
    _load,
    _load_row,
    _space_dkv_step,
    _space_dq_step,
    _space_fwd_step,
    _store,
    _strides,
)
from timefast.kernels.tiles import launch_parameters, power_of_two

# Bytes of absorbed queries [queries, H, C] at a time; the backward pass holds two such tensors, and
# four with projected values. The absorbed queries of one clip are the smallest part.
WORKSPACE = 1 << 28

# Whether x [B, S + 1, T, H, D], T times as large as q, is kept for the backward pass, or computed
# again there: two products more than the five of the first step, for most of what a layer keeps.
KEEP_X = False


@triton.jit
def _queries(
    q_ptr,
    cls_q_ptr,
    q_stride_b,
    q_stride_t,
    q_stride_n,
    q_stride_h,
    q_stride_d,
    cls_q_stride_b,
    cls_q_stride_h,
    cls_q_stride_d,
    b,
    h,
    row,
    cols,
    T,
    N,
    D: tl.constexpr,
    DP: tl.constexpr,
):
    """Rows 0 to S - 1 are the patches, row S is the class token; what comes after is zero."""
    patch = row < T * N
    t = (row // N).to(tl.int64)
    n = (row % N).to(tl.int64)
    rows = b * q_stride_b + h * q_stride_h + t * q_stride_t + n * q_stride_n
    q = _load(q_ptr, rows, patch, cols, q_stride_d, D, DP)
    cls_q = _load_row(cls_q_ptr + b * cls_q_stride_b + h * cls_q_stride_h, cols, cls_q_stride_d, D)
    return tl.where((row == T * N)[:, None], cls_q[None, :].to(q.dtype), q)


@triton.jit
def _trajectory_fwd_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    cls_q_ptr,
    x_ptr,  # [B, S + 1, T, H, D] contiguous
    lse_ptr,  # [B, H, T, S + 1] float32, base 2
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
    scale_log2,
    D: tl.constexpr,
    DP: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
    WIDEN: tl.constexpr,
):
    length = T * N + 1
    tiles = tl.cdiv(length, BLOCK_Q)
    tile = tl.program_id(0) % tiles
    h = ((tl.program_id(0) // tiles) % H).to(tl.int64)
    b = (tl.program_id(0) // (tiles * H)).to(tl.int64)
    cols = tl.arange(0, DP).to(tl.int64)
    row = tile * BLOCK_Q + tl.arange(0, BLOCK_Q)
    q = _queries(
        q_ptr, cls_q_ptr, q_stride_b, q_stride_t, q_stride_n, q_stride_h, q_stride_d,
        cls_q_stride_b, cls_q_stride_h, cls_q_stride_d, b, h, row, cols, T, N, D, DP,
    )  # fmt: skip
    k_base = k_ptr + b * k_stride_b + h * k_stride_h
    v_base = v_ptr + b * v_stride_b + h * v_stride_h
    best = tl.full([BLOCK_Q], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_Q], tl.float32)
    acc = tl.zeros([BLOCK_Q, DP], tl.float32)
    key_tiles = tl.cdiv(N, BLOCK_K)
    for i in range(0, T * key_tiles):
        t = (i // key_tiles).to(tl.int64)
        start = i % key_tiles * BLOCK_K
        key = start + tl.arange(0, BLOCK_K)
        valid = key < N
        k_rows = t * k_stride_t + key.to(tl.int64) * k_stride_n
        v_rows = t * v_stride_t + key.to(tl.int64) * v_stride_n
        k = _load(k_base, k_rows, valid, cols, k_stride_d, D, DP)
        v = _load(v_base, v_rows, valid, cols, v_stride_d, D, DP)
        best = tl.where(start == 0, float("-inf"), best)  # which also empties total and acc
        best, total, acc = _space_fwd_step(
            q, k, v, valid, best, total, acc, scale_log2, True, WIDEN
        )
        if start + BLOCK_K >= N:
            x_rows = (((b * length + row) * T + t) * H + h) * D
            _store(x_ptr, x_rows, row < length, cols, acc / total[:, None], D, DP)
            stats = ((b * H + h) * T + t) * length + row
            tl.store(lse_ptr + stats, best + tl.log2(total), mask=row < length)


@triton.jit
def _trajectory_bwd_dq_kernel(
    dx_ptr,  # dx, x: [B, S + 1, T, H, D] contiguous
    x_ptr,
    q_ptr,
    k_ptr,
    v_ptr,
    cls_q_ptr,
    lse_ptr,  # [B, H, T, S + 1] float32, base 2
    cls_dlse_ptr,  # [B, H, T] float32: gradient of the class token's log-sum-exps
    dq_ptr,  # [B, T, N, H, D] contiguous
    cls_dq_ptr,  # [B, H, D] float32
    delta_ptr,  # [B, H, T, S + 1] float32: the row sums of dx * x, less the gradient of lse
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
    WIDEN: tl.constexpr,
):
    length = T * N + 1
    tiles = tl.cdiv(length, BLOCK_Q)
    tile = tl.program_id(0) % tiles
    h = ((tl.program_id(0) // tiles) % H).to(tl.int64)
    b = (tl.program_id(0) // (tiles * H)).to(tl.int64)
    cols = tl.arange(0, DP).to(tl.int64)
    row = tile * BLOCK_Q + tl.arange(0, BLOCK_Q)
    is_class = row == T * N
    q = _queries(
        q_ptr, cls_q_ptr, q_stride_b, q_stride_t, q_stride_n, q_stride_h, q_stride_d,
        cls_q_stride_b, cls_q_stride_h, cls_q_stride_d, b, h, row, cols, T, N, D, DP,
    )  # fmt: skip
    k_base = k_ptr + b * k_stride_b + h * k_stride_h
    v_base = v_ptr + b * v_stride_b + h * v_stride_h
    dq = tl.zeros([BLOCK_Q, DP], tl.float32)
    lse = tl.zeros([BLOCK_Q], tl.float32)
    delta = tl.zeros([BLOCK_Q], tl.float32)
    key_tiles = tl.cdiv(N, BLOCK_K)
    for i in range(0, T * key_tiles):
        t = (i // key_tiles).to(tl.int64)
        start = i % key_tiles * BLOCK_K
        x_rows = (((b * length + row) * T + t) * H + h) * D
        dx = _load(dx_ptr, x_rows, row < length, cols, 1, D, DP)
        if start == 0:
            x = _load(x_ptr, x_rows, row < length, cols, 1, D, DP)
            stats = ((b * H + h) * T + t) * length + row
            lse = tl.load(lse_ptr + stats, mask=row < length, other=float("inf"))
            delta = tl.sum(dx.to(tl.float32) * x.to(tl.float32), 1)
            delta -= tl.where(is_class, tl.load(cls_dlse_ptr + (b * H + h) * T + t), 0.0)
            tl.store(delta_ptr + stats, delta, mask=row < length)
        key = start + tl.arange(0, BLOCK_K)
        valid = key < N
        k_rows = t * k_stride_t + key.to(tl.int64) * k_stride_n
        v_rows = t * v_stride_t + key.to(tl.int64) * v_stride_n
        k = _load(k_base, k_rows, valid, cols, k_stride_d, D, DP)
        v = _load(v_base, v_rows, valid, cols, v_stride_d, D, DP)
        dq = _space_dq_step(q, dx, k, v, valid, lse, delta, dq, scale, scale_log2, True, WIDEN)
    _store(dq_ptr, ((b * T * N + row) * H + h) * D, row < T * N, cols, dq, D, DP)
    _store(cls_dq_ptr, (b * H + h) * D + 0 * row, is_class, cols, dq, D, DP)


@triton.jit
def _trajectory_bwd_dkv_kernel(
    dx_ptr,  # [B, S + 1, T, H, D] contiguous
    q_ptr,
    k_ptr,
    v_ptr,
    cls_q_ptr,
    lse_ptr,  # [B, H, T, S + 1] float32, base 2
    delta_ptr,  # [B, H, T, S + 1] float32
    dk_ptr,  # dk, dv: [B, T, N, H, D] contiguous
    dv_ptr,
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
    WIDEN: tl.constexpr,
):
    """One tile of keys of one frame against all queries of the clip."""
    length = T * N + 1
    tiles = tl.cdiv(N, BLOCK_K)
    tile = tl.program_id(0) % tiles
    t = ((tl.program_id(0) // tiles) % T).to(tl.int64)
    h = ((tl.program_id(0) // (tiles * T)) % H).to(tl.int64)
    b = (tl.program_id(0) // (tiles * T * H)).to(tl.int64)
    cols = tl.arange(0, DP).to(tl.int64)
    key = (tile * BLOCK_K + tl.arange(0, BLOCK_K)).to(tl.int64)
    k_rows = b * k_stride_b + t * k_stride_t + h * k_stride_h + key * k_stride_n
    v_rows = b * v_stride_b + t * v_stride_t + h * v_stride_h + key * v_stride_n
    k = _load(k_ptr, k_rows, key < N, cols, k_stride_d, D, DP)
    v = _load(v_ptr, v_rows, key < N, cols, v_stride_d, D, DP)
    stats = ((b * H + h) * T + t) * length
    dk = tl.zeros([BLOCK_K, DP], tl.float32)
    dv = tl.zeros([BLOCK_K, DP], tl.float32)
    for start in range(0, length, BLOCK_Q):
        row = start + tl.arange(0, BLOCK_Q)
        q = _queries(
            q_ptr, cls_q_ptr, q_stride_b, q_stride_t, q_stride_n, q_stride_h, q_stride_d,
            cls_q_stride_b, cls_q_stride_h, cls_q_stride_d, b, h, row, cols, T, N, D, DP,
        )  # fmt: skip
        x_rows = (((b * length + row) * T + t) * H + h) * D
        dx = _load(dx_ptr, x_rows, row < length, cols, 1, D, DP)
        # lse infinite makes p = 0
        lse = tl.load(lse_ptr + stats + row, mask=row < length, other=float("inf"))
        delta = tl.load(delta_ptr + stats + row, mask=row < length, other=0.0)
        dk, dv = _space_dkv_step(k, v, q, dx, lse, delta, dk, dv, scale, scale_log2, WIDEN)
    out_rows = (((b * T + t) * N + key) * H + h) * D
    _store(dk_ptr, out_rows, key < N, cols, dk, D, DP)
    _store(dv_ptr, out_rows, key < N, cols, dv, D, DP)


@triton.jit
def _heads_of_one(vector, cols, D: tl.constexpr, HP: tl.constexpr):
    """[BLOCK_C] -> [HP, BLOCK_C]: each head keeps its own columns and has zeros elsewhere."""
    own = tl.arange(0, HP)[:, None] == (cols // D)[None, :]
    return tl.where(own, vector[None, :], 0.0)


@triton.jit
def _along_fwd_kernel(
    x_ptr,  # [B, S + 1, T, C] contiguous
    absorbed_ptr,  # [H, M, C] contiguous, M queries of whole clips
    along_ptr,  # [M, H, T] float32: the probabilities over the frames
    out_ptr,  # [M, C], or [H, M, C] if PROJECTED
    S,
    M,
    T,
    H,
    C,
    scale_log2,
    D: tl.constexpr,
    TP: tl.constexpr,
    HP: tl.constexpr,
    BLOCK_C: tl.constexpr,
    PROJECTED: tl.constexpr,
    WIDEN: tl.constexpr,
):
    m = tl.program_id(0).to(tl.int64)
    h = tl.arange(0, HP).to(tl.int64)
    t = tl.arange(0, TP).to(tl.int64)
    x_base = x_ptr + (m + m // S) * T * C  # one row more per clip: the class token's
    heads = (h * M + m) * C
    scores = tl.zeros([HP, TP], tl.float32)
    for start in range(0, C, BLOCK_C):
        cols = start + tl.arange(0, BLOCK_C)
        x_mask = (t < T)[:, None] & (cols < C)[None, :]
        h_mask = (h < H)[:, None] & (cols < C)[None, :]
        x = tl.load(x_base + (t * C)[:, None] + cols[None, :], mask=x_mask, other=0.0)
        q = tl.load(absorbed_ptr + heads[:, None] + cols[None, :], mask=h_mask, other=0.0)
        scores += _dot(q, tl.trans(x), WIDEN)
    scores = tl.where((t < T)[None, :], scores * scale_log2, float("-inf"))
    p = tl.exp2(scores - tl.max(scores, 1)[:, None])
    p = p / tl.sum(p, 1)[:, None]
    places = (m * H + h)[:, None] * T + t[None, :]
    tl.store(along_ptr + places, p, mask=(h < H)[:, None] & (t < T)[None, :])

    for start in range(0, C, BLOCK_C):
        cols = start + tl.arange(0, BLOCK_C)
        x_mask = (t < T)[:, None] & (cols < C)[None, :]
        x = tl.load(x_base + (t * C)[:, None] + cols[None, :], mask=x_mask, other=0.0)
        mixed = _dot(p.to(x.dtype), x, WIDEN)  # [HP, BLOCK_C]
        if PROJECTED:
            h_mask = (h < H)[:, None] & (cols < C)[None, :]
            mixed = mixed.to(out_ptr.dtype.element_ty)
            tl.store(out_ptr + heads[:, None] + cols[None, :], mixed, mask=h_mask)
        else:
            own = h[:, None] == (cols // D)[None, :]
            out = tl.sum(tl.where(own, mixed, 0.0), 0).to(out_ptr.dtype.element_ty)
            tl.store(out_ptr + m * C + cols, out, mask=cols < C)


@triton.jit
def _along_bwd_kernel(
    grad_ptr,  # [M, C], or its projection [H, M, C] if PROJECTED
    x_ptr,  # x, dx: [B, S + 1, T, C] contiguous
    absorbed_ptr,  # absorbed, d_absorbed, mixed: [H, M, C] contiguous
    along_ptr,  # [M, H, T] float32
    dx_ptr,
    d_absorbed_ptr,
    mixed_ptr,  # written if PROJECTED
    S,
    M,
    T,
    H,
    C,
    scale,
    D: tl.constexpr,
    TP: tl.constexpr,
    HP: tl.constexpr,
    BLOCK_C: tl.constexpr,
    PROJECTED: tl.constexpr,
    WIDEN: tl.constexpr,
):
    m = tl.program_id(0).to(tl.int64)
    h = tl.arange(0, HP).to(tl.int64)
    t = tl.arange(0, TP).to(tl.int64)
    x_base = (m + m // S) * T * C
    heads = (h * M + m) * C
    places = (m * H + h)[:, None] * T + t[None, :]
    valid = (h < H)[:, None] & (t < T)[None, :]
    p = tl.load(along_ptr + places, mask=valid, other=0.0)  # [HP, TP]
    dp = tl.zeros([HP, TP], tl.float32)
    for start in range(0, C, BLOCK_C):
        cols = start + tl.arange(0, BLOCK_C)
        x_mask = (t < T)[:, None] & (cols < C)[None, :]
        h_mask = (h < H)[:, None] & (cols < C)[None, :]
        x = tl.load(x_ptr + x_base + (t * C)[:, None] + cols[None, :], mask=x_mask, other=0.0)
        if PROJECTED:
            grad = tl.load(grad_ptr + heads[:, None] + cols[None, :], mask=h_mask, other=0.0)
        else:
            grad = tl.load(grad_ptr + m * C + cols, mask=cols < C, other=0.0)
            grad = _heads_of_one(grad, cols, D, HP)
        dp += _dot(grad, tl.trans(x), WIDEN)
    ds = p * (dp - tl.sum(p * dp, 1)[:, None]) * scale

    for start in range(0, C, BLOCK_C):
        cols = start + tl.arange(0, BLOCK_C)
        x_mask = (t < T)[:, None] & (cols < C)[None, :]
        h_mask = (h < H)[:, None] & (cols < C)[None, :]
        x_places = x_base + (t * C)[:, None] + cols[None, :]
        h_places = heads[:, None] + cols[None, :]
        x = tl.load(x_ptr + x_places, mask=x_mask, other=0.0)
        q = tl.load(absorbed_ptr + h_places, mask=h_mask, other=0.0)
        if PROJECTED:
            grad = tl.load(grad_ptr + h_places, mask=h_mask, other=0.0)
            mixed = _dot(p.to(x.dtype), x, WIDEN).to(mixed_ptr.dtype.element_ty)
            tl.store(mixed_ptr + h_places, mixed, mask=h_mask)
        else:
            grad = tl.load(grad_ptr + m * C + cols, mask=cols < C, other=0.0)
            grad = _heads_of_one(grad, cols, D, HP)
        dx = _dot(tl.trans(ds.to(q.dtype)), q, WIDEN) + _dot(tl.trans(p.to(q.dtype)), grad, WIDEN)
        tl.store(dx_ptr + x_places, dx.to(dx_ptr.dtype.element_ty), mask=x_mask)
        dq = _dot(ds.to(x.dtype), x, WIDEN).to(d_absorbed_ptr.dtype.element_ty)
        tl.store(d_absorbed_ptr + h_places, dq, mask=h_mask)


def frames_constants(
    patches: int, width: int, dtype: torch.dtype, params: dict[str, Any]
) -> dict[str, Any]:
    """Compile-time constants of the kernels of the first step."""
    return {
        "D": width,
        "DP": power_of_two(width, at_least=16),
        "BLOCK_Q": params["block_q"],
        "BLOCK_K": min(params["block_k"], power_of_two(patches, at_least=16)),
        "WIDEN": INTERPRETED and dtype == torch.bfloat16,
    }


def along_constants(
    frames: int, heads: int, width: int, dtype: torch.dtype, projected: bool, params: dict[str, Any]
) -> dict[str, Any]:
    """Compile-time constants of the kernels of the second step."""
    return {
        "D": width,
        "TP": power_of_two(frames, at_least=16),
        "HP": power_of_two(heads, at_least=16),
        "BLOCK_C": params["block_c"],
        "PROJECTED": projected,
        "WIDEN": INTERPRETED and dtype == torch.bfloat16,
    }


def _launch_frames(
    name: str, q: Tensor, arguments: tuple[Any, ...], *, over_keys: bool = True
) -> None:
    """One program per tile of queries, head and clip; or of keys, frame, head and clip."""
    clips, frames, patches, heads, width = q.shape
    params = launch_parameters(f"trajectory_attention_{name}", q, length=patches)
    constants = frames_constants(patches, width, q.dtype, params)
    if over_keys:
        tiles = triton.cdiv(frames * patches + 1, constants["BLOCK_Q"])
    else:
        tiles = frames * triton.cdiv(patches, constants["BLOCK_K"])
    kernel = _FRAMES_KERNELS[name]
    options = {key: params[key] for key in ("num_warps", "num_stages")}
    with torch.cuda.device_of(q):
        kernel[(clips * heads * tiles,)](*arguments, **constants, **options, enable_fp_fusion=True)


_FRAMES_KERNELS = {
    "fwd": _trajectory_fwd_kernel,
    "bwd_dq": _trajectory_bwd_dq_kernel,
    "bwd_dkv": _trajectory_bwd_dkv_kernel,
}


def _launch_along(
    kernel: Any, name: str, q: Tensor, queries: int, arguments: tuple[Any, ...], projected: bool
) -> None:
    """One program per query."""
    _, frames, _, heads, width = q.shape
    params = launch_parameters(f"trajectory_along_{name}", q, length=frames)
    constants = along_constants(frames, heads, width, q.dtype, projected, params)
    options = {key: params[key] for key in ("num_warps", "num_stages")}
    with torch.cuda.device_of(q):
        kernel[(queries,)](*arguments, **constants, **options, enable_fp_fusion=True)


def _parts(q: Tensor) -> Iterator[slice]:
    """Clips at a time, for which the absorbed queries take no more than WORKSPACE bytes."""
    clips, frames, patches, heads, width = q.shape
    per_clip = frames * patches * heads * heads * width * q.element_size()
    size = max(1, WORKSPACE // per_clip)
    return (slice(i, min(i + size, clips)) for i in range(0, clips, size))


def _own(x: Tensor, shape: tuple[int, ...]) -> Tensor:
    """View of x [A, S + 1, T, H, D]: the answers of each patch's own frame, [A, N, H, D, T]."""
    _, frames, patches, _, _ = shape
    return x[:, :-1].unflatten(1, (frames, patches)).diagonal(dim1=1, dim2=3)


def _queries_along(
    x: Tensor, w_q: Tensor, b_q: Tensor | None, w_k: Tensor, shape: tuple[int, ...]
) -> tuple[Tensor, Tensor, Tensor]:
    """-> own [M, C], q2 [H, M, D] and the absorbed queries [H, M, C] of the clips of x."""
    heads, width = shape[3:]
    own = _own(x, shape).permute(0, 4, 1, 2, 3).reshape(-1, heads * width)
    q2 = F.linear(own, w_q, b_q).view(-1, heads, width).transpose(0, 1).contiguous()
    return own, q2, torch.bmm(q2, w_k)


def _class_out(
    q: Tensor, cls: tuple[Tensor, ...], x: Tensor, lse: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """The class token from its row of x and lse: output [B, H, D], and the weights of itself
    [B, H, 1] and of the frames [B, H, T], in float32."""
    cls_q, cls_k, cls_v = (y.float() for y in cls)
    own = (cls_q * cls_k).sum(-1, keepdim=True) * scale
    weights = torch.cat([own, lse[..., -1] * math.log(2)], -1).softmax(-1)
    own, frames = weights[..., :1], weights[..., 1:]
    out = own * cls_v + torch.einsum("bht,bthd->bhd", frames, x[:, -1].float())
    return out, own, frames


@torch.library.custom_op("timefast::trajectory_attention", mutates_args=())
def trajectory_attention_op(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cls_q: Tensor,
    cls_k: Tensor,
    cls_v: Tensor,
    w_q: Tensor,
    b_q: Tensor | None,
    w_kv: Tensor,
    b_kv: Tensor | None,
    projected: bool,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """-> out [B, T, N, H, D], cls_out [B, H, D], and for the backward pass x [B, S + 1, T, H, D],
    log-sum-exps [B, H, T, S + 1] (base 2) and probabilities over the frames [B, S, H, T], the last
    two in float32."""
    out, cls_out, x, lse, along = _outputs(q)
    if q.numel() == 0:
        return out, cls_out, x, lse, along
    _, frames, patches, heads, width = q.shape
    _answers(q, k, v, cls_q, x, lse, scale)
    cls_out.copy_(_class_out(q, (cls_q, cls_k, cls_v), x, lse, scale)[0])

    w_k, w_v = w_kv.unflatten(0, (2, heads, width)).unbind(0)  # [H, D, C]
    for clips in _parts(q):
        _, _, absorbed = _queries_along(x[clips], w_q, b_q, w_k, q.shape)
        M = absorbed.shape[1]
        mixed = torch.empty_like(absorbed) if projected else out[clips]
        sizes = (frames * patches, M, frames, heads, heads * width, scale * LOG2_E)
        arguments = (x[clips], absorbed, along[clips], mixed, *sizes)
        _launch_along(_along_fwd_kernel, "fwd", q, M, arguments, projected)
        if projected:
            v2 = torch.bmm(mixed, w_v.transpose(1, 2)).transpose(0, 1)  # [M, H, D]
            bias = 0 if b_kv is None else b_kv[heads * width :].view(heads, width)
            out[clips] = (v2 + bias).view_as(out[clips])
    return out, cls_out, x, lse, along


def _answers(
    q: Tensor, k: Tensor, v: Tensor, cls_q: Tensor, x: Tensor, lse: Tensor, scale: float
) -> None:
    """The first step: writes x and lse."""
    inputs = (q, k, v, cls_q)
    arguments = (*inputs, x, lse, *_strides(*inputs), *q.shape[1:4], scale * LOG2_E)
    _launch_frames("fwd", q, arguments)


def _outputs(q: Tensor) -> tuple[Tensor, ...]:
    clips, frames, patches, heads, width = q.shape
    tokens = frames * patches
    return (
        q.new_empty(q.shape),
        q.new_empty((clips, heads, width)),
        q.new_empty((clips, tokens + 1, frames, heads, width)),
        q.new_empty((clips, heads, frames, tokens + 1), dtype=torch.float32),
        q.new_empty((clips, tokens, heads, frames), dtype=torch.float32),
    )


@trajectory_attention_op.register_fake
def _(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cls_q: Tensor,
    cls_k: Tensor,
    cls_v: Tensor,
    w_q: Tensor,
    b_q: Tensor | None,
    w_kv: Tensor,
    b_kv: Tensor | None,
    projected: bool,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    return _outputs(q)  # type: ignore[return-value]


@torch.library.custom_op("timefast::trajectory_attention_backward", mutates_args=())
def trajectory_attention_backward_op(
    grad: Tensor,
    grad_cls: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cls_q: Tensor,
    cls_k: Tensor,
    cls_v: Tensor,
    w_q: Tensor,
    b_q: Tensor | None,
    w_kv: Tensor,
    b_kv: Tensor | None,
    x: Tensor | None,
    lse: Tensor | None,
    along: Tensor,
    projected: bool,
    scale: float,
) -> list[Tensor]:
    """-> gradients of q, k, v, cls_q, cls_k, cls_v, w_q, b_q, w_kv, b_kv; those of the biases also
    where there are none. x and lse are computed again if they were not kept."""
    _, frames, patches, heads, width = q.shape
    dq, dk, dv, *cls_grads = _gradients(q)[:6]
    totals = _weight_gradients(q, torch.float32)
    if q.numel() == 0:
        return [dq, dk, dv, *cls_grads, *_weight_gradients(q, q.dtype)]
    if x is None or lse is None:
        _, _, x, lse, _ = _outputs(q)
        _answers(q, k, v, cls_q, x, lse, scale)
    dx = torch.empty_like(x)
    for clips in _parts(q):
        _along_backward(
            grad[clips], q, x[clips], along[clips], dx[clips], w_q, b_q, w_kv, totals, projected,
            scale,
        )  # fmt: skip

    cls = (cls_q, cls_k, cls_v)
    cls_out, own, weights = _class_out(q, cls, x, lse, scale)
    g, (fq, fk, fv) = grad_cls.float(), (y.float() for y in cls)
    delta = (g * cls_out).sum(-1, keepdim=True)  # [B, H, 1]
    d_own = own * ((g * fv).sum(-1, keepdim=True) - delta) * scale
    dlse = weights * (torch.einsum("bhd,bthd->bht", g, x[:, -1].float()) - delta)
    dx[:, -1] = torch.einsum("bht,bhd->bthd", weights, g)

    cls_dq = fq.new_empty(fq.shape)
    delta = torch.empty_like(lse)
    inputs = (q, k, v, cls_q)
    sizes = (*_strides(*inputs), frames, patches, heads, scale, scale * LOG2_E)
    results = (lse, dlse.contiguous(), dq, cls_dq, delta)
    _launch_frames("bwd_dq", q, (dx, x, *inputs, *results, *sizes))
    arguments = (dx, *inputs, lse, delta, dk, dv, *sizes)
    _launch_frames("bwd_dkv", q, arguments, over_keys=False)
    of_class = (cls_dq + d_own * fk, d_own * fq, own * g)
    for result, value in zip(cls_grads, of_class, strict=True):
        result.copy_(value)
    return [dq, dk, dv, *cls_grads, *(total.to(q.dtype) for total in totals)]


def _along_backward(
    grad: Tensor,
    q: Tensor,
    x: Tensor,
    along: Tensor,
    dx: Tensor,
    w_q: Tensor,
    b_q: Tensor | None,
    w_kv: Tensor,
    totals: list[Tensor],
    projected: bool,
    scale: float,
) -> None:
    """The second step of some clips: writes dx of the patches, adds to the weights' gradients."""
    _, frames, patches, heads, width = q.shape
    w_k, w_v = w_kv.unflatten(0, (2, heads, width)).unbind(0)  # [H, D, C]
    dw_q, db_q, dw_kv, db_kv = totals
    dw_k, dw_v = dw_kv.view(2, heads, width, -1).unbind(0)
    own, q2, absorbed = _queries_along(x, w_q, b_q, w_k, q.shape)
    M = absorbed.shape[1]
    d_absorbed = torch.empty_like(absorbed)
    mixed = torch.empty_like(absorbed) if projected else absorbed
    grad = grad.reshape(M, heads, width).contiguous()
    g_heads = grad.transpose(0, 1)  # [H, M, D]
    g = torch.bmm(g_heads, w_v) if projected else grad  # [H, M, C] or [M, H, D]
    sizes = (frames * patches, M, frames, heads, heads * width, scale)
    arguments = (g, x, absorbed, along, dx, d_absorbed, mixed, *sizes)
    _launch_along(_along_bwd_kernel, "bwd", q, M, arguments, projected)
    if projected:
        dw_v += torch.bmm(g_heads.transpose(1, 2), mixed)
        db_kv[heads * width :] += grad.float().sum(0).flatten()

    dw_k += torch.bmm(q2.transpose(1, 2), d_absorbed)
    dq2 = torch.bmm(d_absorbed, w_k.transpose(1, 2)).transpose(0, 1).reshape(M, -1)  # [M, C]
    dw_q += dq2.t() @ own
    db_q += dq2.float().sum(0)
    d_own = (dq2 @ w_q).view(-1, frames, patches, heads, width)
    _own(dx, q.shape).add_(d_own.permute(0, 2, 3, 4, 1))


def _gradients(q: Tensor) -> list[Tensor]:
    clips, _, _, heads, width = q.shape
    tokens = [q.new_empty(q.shape) for _ in range(3)]
    return [
        *tokens,
        *(q.new_empty((clips, heads, width)) for _ in range(3)),
        *_weight_gradients(q, q.dtype),
    ]


def _weight_gradients(q: Tensor, dtype: torch.dtype) -> list[Tensor]:
    dim = q.shape[3] * q.shape[4]
    return [q.new_zeros(s, dtype=dtype) for s in ((dim, dim), (dim,), (2 * dim, dim), (2 * dim,))]


@trajectory_attention_backward_op.register_fake
def _(
    grad: Tensor,
    grad_cls: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cls_q: Tensor,
    cls_k: Tensor,
    cls_v: Tensor,
    w_q: Tensor,
    b_q: Tensor | None,
    w_kv: Tensor,
    b_kv: Tensor | None,
    x: Tensor | None,
    lse: Tensor | None,
    along: Tensor,
    projected: bool,
    scale: float,
) -> list[Tensor]:
    return _gradients(q)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    *tensors, ctx.projected, ctx.scale = inputs
    ctx.set_materialize_grads(False)  # zeros for x would be as large as x
    _, _, x, lse, along = output
    ctx.save_for_backward(*tensors, *((x, lse) if KEEP_X else (None, None)), along)


def _backward(
    ctx: Any, grad: Tensor | None, grad_cls: Tensor | None, *unused: None
) -> tuple[Tensor | None, ...]:
    saved = ctx.saved_tensors
    grad = torch.zeros_like(saved[0]) if grad is None else grad
    grad_cls = torch.zeros_like(saved[3]) if grad_cls is None else grad_cls
    arguments = (grad, grad_cls, *saved, ctx.projected, ctx.scale)
    with torch.autocast(saved[0].device.type, enabled=False):  # its products keep their dtype
        grads = trajectory_attention_backward_op(*arguments)
    kept = (None if x is None else g for x, g in zip(saved[:10], grads, strict=True))
    return *kept, None, None


def _no_second_derivative(ctx: Any, *grads: Tensor) -> None:
    raise NotImplementedError(
        "the Triton kernels of trajectory_attention cannot be differentiated twice; use "
        'impl="reference" for second derivatives'
    )


trajectory_attention_op.register_autograd(_backward, setup_context=_setup)
trajectory_attention_backward_op.register_autograd(_no_second_derivative)
