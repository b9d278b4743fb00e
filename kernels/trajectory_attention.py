"""Trajectory attention: every patch looks into every frame, then along what it found there.

    x[i, s] = sum_n softmax_n(scale * q[i] . k[s, n]) v[s, n]           per head, for every frame s
    q2[i]   = w_q x[i, frame of i] + b_q       [k2 | v2][i, s] = w_kv x[i, s] + b_kv
    out[i]  = sum_s softmax_s(scale * q2[i] . k2[i, s]) u[i, s]                            per head

with u = x for values="trajectory", which is what the published Motionformer code does by default,
and u = v2 for values="projected", which is what its paper writes (Patrick et al. 2021, equations 3
to 6). The class token takes no part in this; it attends once over all tokens of the clip.

Only the reference forms k2 and v2, T times as large as the tokens. Elsewhere the projections move
to where there is one vector per patch: with w_k the rows of w_kv of one head,

    q2 . k2[s] = (w_k^T q2) . x[s] + a constant over s, which the softmax drops
    sum_s a[s] v2[s] = w_v (sum_s a[s] x[s]) + b_v

Letters: B clips, T frames, N patches per frame, S = T * N, H heads, D head width, C = H * D. Inputs
are any strided views, in particular slices of one fused qkv projection. The Triton kernels are in
trajectory_attention_triton.py; docs/kernels/trajectory_attention.md has derivation and tiling.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Generator, Tensor
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

from timefast.kernels import native
from timefast.kernels.op import (
    Case,
    Impl,
    Op,
    autocast,
    check_like,
    dispatch,
    in_float32,
    library_attention,
    register,
    triton_unavailable,
    why_not_triton,
)

# Bytes that the temporary tensors of the CPU's paths may take at once, in the forward as in the
# backward pass; they work through the queries in parts that keep to it. One frame of queries of one
# clip is the smallest part.
WORKSPACE = 1 << 27


@in_float32
def trajectory_attention_reference(
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
    *,
    values: str,
    scale: float,
) -> tuple[Tensor, Tensor]:
    scores = scale * torch.einsum("btnhd,bsmhd->btnhsm", q, k)
    x = torch.einsum("btnhsm,bsmhd->btnshd", scores.softmax(-1), v)
    out = attend_along(x, w_q, b_q, w_kv, b_kv, values=values, scale=scale)
    keys = torch.cat([cls_k[:, None], k.flatten(1, 2)], 1)  # [B, 1 + S, H, D]
    p = (scale * torch.einsum("bhd,bshd->bhs", cls_q, keys)).softmax(-1)
    return out, torch.einsum("bhs,bshd->bhd", p, torch.cat([cls_v[:, None], v.flatten(1, 2)], 1))


def attend_along(
    x: Tensor,
    w_q: Tensor,
    b_q: Tensor | None,
    w_kv: Tensor,
    b_kv: Tensor | None,
    *,
    values: str,
    scale: float,
) -> Tensor:
    """The second step as it is written: x [B, T, N, T, H, D], for every patch its answers from all
    frames, -> [B, T, N, H, D]."""
    heads = x.shape[4:]
    own = x.diagonal(dim1=1, dim2=3).permute(0, 4, 1, 2, 3)  # [B, T, N, H, D]
    q2 = F.linear(own.flatten(3), w_q, b_q).unflatten(-1, heads)
    k2, v2 = F.linear(x.flatten(4), w_kv, b_kv).unflatten(-1, (2, *heads)).unbind(4)
    along = (scale * torch.einsum("btnhd,btnshd->btnhs", q2, k2)).softmax(-1)
    return torch.einsum("btnhs,btnshd->btnhd", along, x if values == "trajectory" else v2)


def trajectory_attention_cpu(*args: Any, values: str, scale: float) -> tuple[Tensor, Tensor]:
    q, given = args[0], [x for x in args if x is not None]
    traced = torch.compiler.is_compiling()
    native_takes = not traced and native.takes(*given, keys=q.shape[2], width=q.shape[4])
    if native_takes and len(q) and q.shape[4] % native.lanes() == 0:
        return _Native.apply(*args, values == "projected", scale)
    return _portable(*args, projected=values == "projected", scale=scale)


def _trajectory_attention_triton(*args: Any, values: str, scale: float) -> tuple[Tensor, Tensor]:
    from timefast.kernels.trajectory_attention_triton import trajectory_attention_op

    return trajectory_attention_op(*args, values == "projected", scale)[:2]


def _why_not_trajectory_triton(q: Tensor, *others: Any, **kwargs: Any) -> list[str]:
    reasons = why_not_triton(q, max_width=128)
    if q.shape[1] > 64:
        reasons.append(f"q has {q.shape[1]} frames; triton takes 1 to 64")
    if q.shape[3] > 32:
        reasons.append(f"q has {q.shape[3]} heads; triton takes 1 to 32")
    return reasons


def _portable(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cls_q: Tensor,
    cls_k: Tensor,
    cls_v: Tensor,
    *weights: Tensor | None,
    projected: bool,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Both steps with PyTorch's functions; where gradients follow, parts are computed again."""
    parts = []
    for clips in _clip_parts(q):
        of_clips = []
        for frames in _frame_parts(q):
            args = q[clips, frames], k[clips], v[clips], *weights, frames.start, projected, scale
            if torch.is_grad_enabled():
                of_clips.append(checkpoint(_part, *args, use_reentrant=False))
            else:
                of_clips.append(_part(*args))
        parts.append(torch.cat(of_clips, 1))
    keys, values = (
        torch.cat([cls[:, :, None], x.permute(0, 3, 1, 2, 4).flatten(2, 3)], 2)  # [B, H, 1 + S, D]
        for cls, x in ((cls_k, k), (cls_v, v))
    )
    cls_out = library_attention(cls_q[:, :, None], keys, values, scale)
    return torch.cat(parts), cls_out[:, :, 0]


def _part(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    w_q: Tensor,
    b_q: Tensor | None,
    w_kv: Tensor,
    b_kv: Tensor | None,
    first: int,
    projected: bool,
    scale: float,
) -> Tensor:
    """Queries of frames from `first` on, q [A, F, N, H, D], and whole clips k, v -> like q."""
    dtype = q.dtype
    if dtype in (torch.float16, torch.bfloat16):
        q, k, v, w_q, w_kv = (x.float() for x in (q, k, v, w_q, w_kv))
        b_q, b_kv = (None if x is None else x.float() for x in (b_q, b_kv))
    clips, frames, patches, heads, width = q.shape
    queries = q.flatten(1, 2).transpose(1, 2)[:, None].expand(-1, k.shape[1], -1, -1, -1)
    x = library_attention(queries, k.transpose(2, 3), v.transpose(2, 3), scale)
    x = x.permute(0, 3, 1, 2, 4).flatten(0, 1)  # [M, T, H, D], M = A * F * N
    by_frame = x.view(clips, frames, patches, *x.shape[1:])
    own = by_frame.diagonal(first, 1, 3).permute(0, 4, 1, 2, 3).flatten(3)  # [A, F, N, C]
    q2 = F.linear(own, w_q, b_q).view(-1, heads, width)
    w_k, w_v = w_kv.view(2, heads, width, -1).unbind()
    absorbed = torch.einsum("mhd,hdc->mhc", q2, w_k)
    along = (scale * absorbed @ x.flatten(2).transpose(1, 2)).softmax(-1)  # [M, H, T]
    if projected:
        out = torch.einsum("mhc,hdc->mhd", along @ x.flatten(2), w_v)
    else:
        out = torch.einsum("mht,mthd->mhd", along, x)
    if b_kv is not None:  # times 0 where nothing depends on it, so that its gradient is zero
        out = out + int(projected) * b_kv.view(2, heads, width)[1]
    return out.view(clips, frames, patches, heads, width).to(dtype)


class _Weights(NamedTuple):
    """The two projections, the second one per head and in halves."""

    q: Tensor  # [C, C]
    q_bias: Tensor | None  # [C]
    k: Tensor  # [H, D, C]
    v: Tensor  # [H, D, C]
    v_bias: Tensor | None  # [H, 1, D]


class _Native(torch.autograd.Function):
    """Both steps by native.c, some queries at a time; the backward pass computes them again. x is
    written in the order of the second step."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
        *cls, w_q, b_q, w_kv, b_kv, projected, scale = rest
        ctx.save_for_backward(q, k, v, *cls, w_q, b_q, w_kv, b_kv)
        ctx.projected, ctx.scale = projected, scale
        out, cls_out = q.new_empty(q.shape), q.new_empty(cls[0].shape)
        weights = _split(w_q, b_q, w_kv, b_kv, q.shape[3])
        native.run_attention(*_class_step(cls[0], k, v, cls[1:], cls_out), scale, _ORDER)
        for clips, frames in _parts(q):
            x = _answers(q, k, v, clips, frames, scale)
            _, _, absorbed = _absorb(x, weights, q.shape, frames)
            _, along = native.run_along(x, absorbed, scale, projected, q.shape[3])
            if projected:
                along = torch.bmm(along, weights.v.transpose(1, 2))  # [H, M, D]
                along = along if weights.v_bias is None else along.add_(weights.v_bias)
                along = along.transpose(0, 1)
            here = out[clips, frames]
            here.copy_(along.reshape(here.shape))
        return out, cls_out

    @staticmethod
    @once_differentiable
    @torch.autocast("cpu", enabled=False)  # products keep float32 where the caller has it on
    def backward(ctx: Any, grad: Tensor, grad_cls: Tensor) -> Any:  # type: ignore[override]
        q, k, v, *cls, w_q, b_q, w_kv, b_kv = ctx.saved_tensors
        projected, scale, heads = ctx.projected, ctx.scale, q.shape[3]
        weights = _split(w_q, b_q, w_kv, b_kv, heads)
        totals = _Weights(*(None if w is None else torch.zeros_like(w) for w in weights))  # type: ignore[arg-type]
        dq, dk, dv = (q.new_empty(q.shape, dtype=torch.float32) for _ in range(3))
        d_cls = [dq.new_empty(cls[0].shape) for _ in range(3)]
        of_patches, of_class = _class_step(
            cls[0], k, v, cls[1:], grad_cls, d_cls[0], dk, dv, d_cls[1:]
        )
        native.run_attention(of_patches, of_class, scale, _ORDER)
        for clips, frames in _parts(q):
            kept = native.room_to_keep(_queries(q, clips, frames), k[clips], _ORDER)
            x = _answers(q, k, v, clips, frames, scale, kept)
            own, q2, absorbed = _absorb(x, weights, q.shape, frames)
            p, along = native.run_along(x, absorbed, scale, projected, heads)
            g = grad[clips, frames].flatten(0, 2).float()  # [M, H, D]
            if projected:
                g = g.transpose(0, 1)  # [H, M, D]
                totals.v.baddbmm_(g.transpose(1, 2), along)
                if totals.v_bias is not None:
                    totals.v_bias.add_(g.sum(1, keepdim=True))
                g = torch.bmm(g, weights.v)  # [H, M, C]
            dx, d_absorbed = native.run_along_backward(
                x, absorbed, scale, projected, p, g.resolve_neg().contiguous()
            )
            _absorb_grad(d_absorbed, own, q2, dx, weights, q.shape, frames, totals)
            some_dk, some_dv = torch.empty_like(dk[clips]), torch.empty_like(dv[clips])
            tensors = (
                _queries(q, clips, frames), k[clips], v[clips],
                _by_answering_frame(dx, q.shape, frames),
                _queries(dq, clips, frames), some_dk, some_dv,
            )  # fmt: skip
            native.run_attention(tensors, (), scale, _ORDER, shared=True, kept=kept)
            dk[clips] += some_dk
            dv[clips] += some_dv
        grads = (x.to(q.dtype) for x in (dq, dk, dv, *d_cls))
        return *grads, *_join(totals, w_q, b_q, w_kv, b_kv), None, None


_ORDER = (0, 1, 3, 2, 4)  # sequences of clips, frames and heads; in each, rows


def _queries(x: Tensor, clips: slice, frames: slice) -> Tensor:
    """[B, T, N, H, D] -> view [A, T, Q, H, D], the queries of some frames once for every frame."""
    return x[clips, frames].flatten(1, 2)[:, None].expand(-1, x.shape[1], -1, -1, -1)


def _by_answering_frame(x: Tensor, shape: tuple[int, ...], frames: slice) -> Tensor:
    """[M, T, C] -> view [A, T, Q, H, D]"""
    queries = (frames.stop - frames.start) * shape[2]
    return x.view(-1, queries, shape[1], *shape[3:]).transpose(1, 2)


def _answers(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    clips: slice,
    frames: slice,
    scale: float,
    kept: Tensor | None = None,
) -> Tensor:
    """x [M, T, C] of the queries of some frames, float32."""
    queries = _queries(q, clips, frames)
    shape = len(queries) * queries.shape[2], q.shape[1], q.shape[3] * q.shape[4]
    x = q.new_empty(shape, dtype=torch.float32)
    tensors = queries, k[clips], v[clips], _by_answering_frame(x, q.shape, frames)
    native.run_attention(tensors, (), scale, _ORDER, kept=kept)
    return x


def _class_step(
    cls_q: Tensor, k: Tensor, v: Tensor, cls_kv: list[Tensor], *others: Any
) -> tuple[list[Tensor], list[Tensor | None]]:
    """What run_attention takes for the class token, which asks itself and all patches: `others` is
    its output; or the gradients of that, of cls_q, of k and v, and of cls_k and cls_v in a list."""
    rows = [cls_q[:, None, None], *(x.flatten(1, 2)[:, None] for x in (k, v))]
    cls: list[Tensor | None] = [None, *cls_kv, None]
    rows += [x[:, None, None] for x in others[:2]]
    if len(others) > 1:
        rows += [x.flatten(1, 2)[:, None] for x in others[2:4]]
        cls += [None, *others[4]]
    return rows, cls


def _parts(q: Tensor) -> Iterator[tuple[slice, slice]]:
    return ((clips, frames) for clips in _clip_parts(q) for frames in _frame_parts(q))


def _split(w_q: Tensor, b_q: Any, w_kv: Tensor, b_kv: Any, heads: int) -> _Weights:
    wide = torch.promote_types(w_q.dtype, torch.float32)
    w_k, w_v = w_kv.to(wide).unflatten(0, (2, heads, -1)).unbind(0)
    q_bias = None if b_q is None else b_q.to(wide)
    v_bias = None if b_kv is None else b_kv.to(wide).view(2, heads, 1, -1)[1]
    return _Weights(w_q.to(wide), q_bias, w_k, w_v, v_bias)


def _join(totals: _Weights, w_q: Tensor, b_q: Any, w_kv: Tensor, b_kv: Any) -> list[Tensor | None]:
    """The gradients in the shapes of the parameters; zero where nothing depends on them."""
    joined: list[Tensor | None] = [totals.q, totals.q_bias]
    joined.append(torch.stack([totals.k, totals.v]).view(w_kv.shape))
    if totals.v_bias is None:
        joined.append(None)
    else:
        of_k = torch.zeros_like(totals.v_bias)  # the softmax over the frames drops the key bias
        joined.append(torch.stack([of_k, totals.v_bias]).view(b_kv.shape))
    return [None if x is None else x.to(w_q.dtype) for x in joined]


def _clip_parts(q: Tensor) -> Iterator[slice]:
    size = max(1, WORKSPACE // (_workspace_per_frame(q) * q.shape[1]))
    return (slice(i, i + size) for i in range(0, max(1, q.shape[0]), size))


def _frame_parts(q: Tensor) -> Iterator[slice]:
    frames = q.shape[1]
    size = min(frames, max(1, WORKSPACE // _workspace_per_frame(q)))
    return (slice(i, min(i + size, frames)) for i in range(0, frames, size))


def _workspace_per_frame(q: Tensor) -> int:
    """Bytes for the queries of one frame of one clip: two score matrices, four of x's size, four
    of the absorbed queries' size."""
    _, frames, patches, heads, width = q.shape
    per_query = 2 * frames * patches + 4 * frames * width + 4 * heads * width
    return 4 * heads * patches * per_query


def _own(x: Tensor, shape: tuple[int, ...], frames: slice) -> Tensor:
    """View [A, frames, N, C] of x [M, T, C]: each patch's answer from its own frame."""
    by_frame = x.view(-1, frames.stop - frames.start, shape[2], *x.shape[1:])
    return by_frame.diagonal(frames.start, 1, 3).permute(0, 3, 1, 2)


def _absorb(
    x: Tensor, weights: _Weights, shape: tuple[int, ...], frames: slice
) -> tuple[Tensor, Tensor, Tensor]:
    """Own answers [M, C], their queries [H, M, D], and these moved before the keys' projection,
    [H, M, C]."""
    own = _own(x, shape, frames).reshape(len(x), -1)
    q2 = F.linear(own, weights.q, weights.q_bias).view(len(x), *shape[3:]).transpose(0, 1)
    return own, q2, torch.bmm(q2, weights.k)


def _absorb_grad(
    d_absorbed: Tensor,
    own: Tensor,
    q2: Tensor,
    dx: Tensor,
    weights: _Weights,
    shape: tuple[int, ...],
    frames: slice,
    totals: _Weights,
) -> None:
    """From d_absorbed [H, M, C]: add to dx [M, T, C] and to the weights' gradients."""
    totals.k.baddbmm_(q2.transpose(1, 2), d_absorbed)
    dq2 = torch.bmm(d_absorbed, weights.k.transpose(1, 2))  # [H, M, D]
    dq2 = dq2.transpose(0, 1).reshape(own.shape)
    totals.q.addmm_(dq2.t(), own)
    if totals.q_bias is not None:
        totals.q_bias.add_(dq2.sum(0))
    mine = _own(dx, shape, frames)
    mine.add_((dq2 @ weights.q).view(mine.shape))


def _case(name: str, *shape: int, values: str = "trajectory", size: str = "tiny") -> Case:
    def build(dtype: torch.dtype, device: str, generator: Generator) -> Any:
        clips, frames, patches, heads, width = shape
        dim = heads * width

        def normal(*size: int, std: float = 1.0) -> Tensor:
            return (std * torch.randn(*size, generator=generator)).to(device, dtype)

        tokens = normal(clips, 1 + frames * patches, 3, heads, width)
        qkv = tokens[:, 1:].unflatten(1, (frames, patches)).unbind(3)
        # wide enough that the second attention is far from uniform
        w_q, w_kv = normal(dim, dim, std=1.5 * dim**-0.5), normal(2 * dim, dim, std=1.5 * dim**-0.5)
        args = (*qkv, *tokens[:, 0].unbind(1), w_q, normal(dim), w_kv, normal(2 * dim))
        return args, {"values": values}

    return Case(name, build, size)


TRAJECTORY_ATTENTION = register(
    Op(
        "trajectory_attention",
        reference=trajectory_attention_reference,
        impls={
            "triton": Impl(
                _trajectory_attention_triton,
                _why_not_trajectory_triton,
                triton_unavailable,
                auto=("cuda",),
            ),
            "cpu": Impl(trajectory_attention_cpu),
        },
        cases=(
            _case("tiny-odd", 1, 2, 3, 2, 16),
            _case("projected", 2, 2, 3, 3, 16, values="projected"),
            _case("one-frame", 2, 1, 3, 2, 32),
            _case("prime-width-48", 1, 3, 5, 1, 48),
            _case("empty-batch", 0, 4, 6, 2, 32),
            _case("mid", 2, 8, 49, 3, 64, size="mid"),
            _case("mid-projected", 2, 8, 49, 3, 64, values="projected", size="mid"),
            _case("vit-b-width", 4, 8, 49, 12, 64, size="mid"),
            _case("vit-b-width-projected", 4, 8, 49, 12, 64, values="projected", size="mid"),
            _case("paper-ssv2", 8, 8, 196, 12, 64, size="paper"),
            _case("paper-ssv2-b64", 64, 8, 196, 12, 64, size="paper"),
            _case("paper-projected", 8, 8, 196, 12, 64, values="projected", size="paper"),
            _case("paper-16-frames", 8, 16, 196, 12, 64, size="paper"),
            _case("paper-16-frames-b64", 64, 16, 196, 12, 64, size="paper"),
        ),
    )
)


def trajectory_attention(
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
    *,
    values: str = "trajectory",
    scale: float | None = None,
    impl: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Each patch attends within every frame, then over the T answers; the class token over all.

    With T = 3 and N = 2, the patch (1, 0) takes three separate averages of the tokens marked 0, 1
    and 2, and then one over these three; the class token c takes one average of the marked x:

                  c   (0,0) (0,1) (1,0) (1,1) (2,0) (2,1)
           (1,0)  .     0     0     1     1     2     2
             c    x     x     x     x     x     x     x

    Args:
        q, k, v: [B, T, N, H, D] (clips, frames, patches per frame, heads, head width), any strided
            views of one dtype (float32, float16, bfloat16, float64) on one device. B may be 0.
        cls_q, cls_k, cls_v: [B, H, D], the class token.
        w_q, b_q: [H*D, H*D] and [H*D] or None, as in torch's Linear: the query of the second
            attention from the patch's answer in its own frame.
        w_kv, b_kv: [2*H*D, H*D] and [2*H*D] or None: keys and values of the second attention.
        values: "trajectory": the second attention averages the answers themselves (the published
            default; the value half of w_kv and b_kv then gets zero gradients); "projected": it
            averages their projection.
        scale: factor on both q . k before the softmax; D ** -0.5 by default.
        impl: "auto", "reference", "cpu", "triton"; `timefast.ops.implementations` lists them.

    Returns:
        out [B, T, N, H, D] and cls_out [B, H, D] in the dtype of q (under autocast: of autocast),
        before the output projection.

    Raises:
        ValueError: a shape, dtype or device does not fit, or `impl` or `values` is unknown.
        NotImplementedError: the `impl` named cannot run on these inputs; all reasons are given.
    """
    if q.dim() != 5 or 0 in q.shape[1:] or not q.is_floating_point():
        raise ValueError(
            f"q: expected a floating [B, T, N, H, D], only B may be 0; "
            f"got {q.dtype} {list(q.shape)}"
        )
    if values not in ("trajectory", "projected"):
        raise ValueError(f"values: expected trajectory or projected, got {values!r}")
    clips, _, _, heads, width = q.shape
    dim = heads * width
    if scale is None:
        scale = width**-0.5
    tensors = {
        "q": q, "k": k, "v": v, "cls_q": cls_q, "cls_k": cls_k, "cls_v": cls_v,
        "w_q": w_q, "b_q": b_q, "w_kv": w_kv, "b_kv": b_kv,
    }  # fmt: skip
    given = {name: x for name, x in tensors.items() if x is not None}
    tensors.update(zip(given, autocast(*given.values()), strict=True))
    shapes = {
        "q": q.shape, "k": q.shape, "v": q.shape, "w_q": (dim, dim), "b_q": (dim,),
        "w_kv": (2 * dim, dim), "b_kv": (2 * dim,),
    }  # fmt: skip
    for name in given:
        x, model = tensors[name], tensors["q"]
        assert x is not None and model is not None
        check_like("q", model, name, x, shapes.get(name, (clips, heads, width)))
    return dispatch(TRAJECTORY_ATTENTION, impl, *tensors.values(), values=values, scale=scale)
