"""Divided space-time attention: over time for each patch position, over space for each frame.

    time:   out[t] = sum_s softmax_s(scale * q[t] . k[s]) v[s]      for every (clip, position, head)
    space:  the same over a frame's class token and N patches       for every (clip, frame, head)

TimeSformer (Bertasius et al. 2021, section 4, "divided space-time") as TIME uses it: the class
token takes no part in attention over time, is the same for all frames in attention over space, and
its outputs are averaged over the frames.

Letters: B clips, T frames, N patches per frame, S = 1 + N, H heads, D head width. Inputs are any
strided views, in particular slices of one fused qkv projection: the Triton kernels
(divided_attention_triton.py) read and write token order directly and never hold a class token per
frame. docs/kernels/divided_attention.md has derivation and tiling.
"""

import importlib.util
from typing import Any

import torch
from torch import Generator, Tensor

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

_HAS_XFORMERS = importlib.util.find_spec("xformers") is not None


@in_float32
def time_attention_reference(q: Tensor, k: Tensor, v: Tensor, *, scale: float) -> Tensor:
    scores = scale * torch.einsum("btnhd,bsnhd->bnhts", q, k)
    return torch.einsum("bnhts,bsnhd->btnhd", scores.softmax(-1), v)


def time_attention_cpu(q: Tensor, k: Tensor, v: Tensor, *, scale: float) -> Tensor:
    if native.takes(q, k, v, keys=q.shape[1], width=q.shape[4]):
        return native.attention(q, k, v, scale, (0, 2, 3, 1, 4))[0]
    # Positions and heads share a dimension: a batch of B * N can exceed a CUDA grid's 65,535.
    places = q.shape[2:4]
    q, k, v = (x.flatten(2, 3).transpose(1, 2) for x in (q, k, v))  # [B, N*H, T, D]
    out = library_attention(q, k, v, scale)
    return out.transpose(1, 2).unflatten(2, places)


@in_float32
def space_attention_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cls_q: Tensor,
    cls_k: Tensor,
    cls_v: Tensor,
    *,
    frame_weight: Tensor | None,
    scale: float,
) -> tuple[Tensor, Tensor]:
    q, k, v = _with_class(q, cls_q), _with_class(k, cls_k), _with_class(v, cls_v)
    scores = scale * torch.einsum("btnhd,btmhd->bthnm", q, k)
    out = torch.einsum("bthnm,btmhd->btnhd", scores.softmax(-1), v)
    return out[:, :, 1:], _over_frames(out[:, :, 0], frame_weight)


def space_attention_cpu(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cls_q: Tensor,
    cls_k: Tensor,
    cls_v: Tensor,
    *,
    frame_weight: Tensor | None,
    scale: float,
) -> tuple[Tensor, Tensor]:
    if native.takes(q, k, v, cls_q, cls_k, cls_v, keys=1 + q.shape[2], width=q.shape[4]):
        cls = cls_q, cls_k, cls_v
        out, cls_frames = native.attention(q, k, v, scale, (0, 1, 3, 2, 4), cls=cls)
    else:
        frames = q.shape[:2]
        tokens = (_with_class(*pair) for pair in ((q, cls_q), (k, cls_k), (v, cls_v)))
        q, k, v = (x.flatten(0, 1).transpose(1, 2) for x in tokens)  # [B*T, H, S, D]
        both = library_attention(q, k, v, scale).transpose(1, 2)
        both = both.unflatten(0, frames)  # [B, T, S, H, D]
        wide = torch.promote_types(both.dtype, torch.float32)
        out, cls_frames = both[:, :, 1:], both[:, :, 0].to(wide)
    return out, _over_frames(cls_frames, frame_weight).to(q.dtype)


def space_attention_xformers(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cls_q: Tensor,
    cls_k: Tensor,
    cls_v: Tensor,
    *,
    frame_weight: Tensor | None,
    scale: float,
) -> tuple[Tensor, Tensor]:
    from xformers.ops import memory_efficient_attention

    frames = q.shape[:2]
    tokens = (_with_class(*pair) for pair in ((q, cls_q), (k, cls_k), (v, cls_v)))
    q, k, v = (x.flatten(0, 1) for x in tokens)  # [B*T, S, H, D]
    both = memory_efficient_attention(q, k, v, scale=scale).unflatten(0, frames)
    return both[:, :, 1:], _over_frames(both[:, :, 0].float(), frame_weight).to(q.dtype)


def _no_xformers() -> list[str]:
    if not _HAS_XFORMERS:
        return ["xformers is not installed; `pip install xformers` provides it"]
    return [] if torch.cuda.is_available() else ["torch sees no CUDA device"]


def _why_not_xformers(q: Tensor, *others: Tensor, **kwargs: Any) -> list[str]:
    reasons = []
    if q.device.type != "cuda":
        reasons.append(f"q is on {q.device}; xformers takes CUDA")
    if q.dtype not in (torch.float16, torch.bfloat16, torch.float32):
        reasons.append(f"q is {q.dtype}; xformers takes float16, bfloat16, float32")
    if q.shape[-1] % 8:
        reasons.append(f"heads are {q.shape[-1]} wide; xformers takes multiples of 8")
    sequences = q.shape[0] * q.shape[1]
    if not 0 < sequences <= 65_535:
        reasons.append(f"there are {sequences} frames in all; xformers takes 1 to 65,535")
    return reasons


def _with_class(x: Tensor, cls: Tensor) -> Tensor:
    """-> [B, T, S, H, D], the class token repeated in front of every frame's patches."""
    return torch.cat([cls[:, None, None].expand(-1, x.shape[1], -1, -1, -1), x], dim=2)


def _over_frames(cls_frames: Tensor, frame_weight: Tensor | None) -> Tensor:
    """Mean over the frames, or sum with weights, of [B, T, H, D]."""
    if frame_weight is None:
        return cls_frames.mean(1)
    return (frame_weight.to(cls_frames.dtype)[:, :, None, None] * cls_frames).sum(1)


def _time_triton(q: Tensor, k: Tensor, v: Tensor, *, scale: float) -> Tensor:
    from timefast.kernels.divided_attention_triton import time_attention_op
    from timefast.kernels.shift_attention_triton import shift_attention_op

    if q.shape[1] <= (64 if q.dtype == torch.float32 else 128):
        return time_attention_op(q, k, v, scale)
    # A program cannot hold the scores of that many frames: tiles of keys, and positions in the
    # place of frames, of which nothing is shifted.
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))  # [B, N, T, H, D]
    return shift_attention_op(q, k, v, 0, scale)[0].transpose(1, 2)


def _space_triton(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cls_q: Tensor,
    cls_k: Tensor,
    cls_v: Tensor,
    *,
    frame_weight: Tensor | None,
    scale: float,
) -> tuple[Tensor, Tensor]:
    from timefast.kernels.divided_attention_triton import space_attention_op

    out, cls_frames, _ = space_attention_op(q, k, v, cls_q, cls_k, cls_v, scale)
    return out, _over_frames(cls_frames, frame_weight).to(q.dtype)


def _why_not_triton(q: Tensor, *others: Tensor, **kwargs: Any) -> list[str]:
    return why_not_triton(q, max_width=128)


def _qkv(shape: tuple[int, ...], dtype: torch.dtype, device: str, generator: Generator) -> Any:
    """q, k, v and the class token's, as slices of one fused projection [B, 1 + T*N, 3, H, D]."""
    clips, frames, patches, heads, width = shape
    tokens = torch.randn(clips, 1 + frames * patches, 3, heads, width, generator=generator)
    tokens = tokens.to(device, dtype)
    qkv = tokens[:, 1:].unflatten(1, (frames, patches)).unbind(3)
    return qkv, tokens[:, 0].unbind(1)


def _time_case(name: str, *shape: int, size: str = "tiny") -> Case:
    def build(dtype: torch.dtype, device: str, generator: Generator) -> Any:
        return _qkv(shape, dtype, device, generator)[0], {}

    return Case(name, build, size)


def _space_case(name: str, *shape: int, weighted: bool = False, size: str = "tiny") -> Case:
    def build(dtype: torch.dtype, device: str, generator: Generator) -> Any:
        qkv, cls = _qkv(shape, dtype, device, generator)
        weight = torch.rand(shape[:2], generator=generator).to(device, dtype)
        return (*qkv, *cls), {"frame_weight": weight if weighted else None}

    return Case(name, build, size)


TIME_ATTENTION = register(
    Op(
        "time_attention",
        reference=time_attention_reference,
        impls={
            "triton": Impl(_time_triton, _why_not_triton, triton_unavailable, auto=("cuda",)),
            "cpu": Impl(time_attention_cpu),
        },
        cases=(
            _time_case("tiny-odd", 2, 3, 5, 2, 16),
            _time_case("one-frame", 1, 1, 4, 1, 32),
            _time_case("prime-frames-width-48", 1, 17, 3, 3, 48),
            _time_case("empty-batch", 0, 4, 6, 2, 32),
            _time_case("mid", 2, 8, 49, 3, 64, size="mid"),
            _time_case("mid-16-frames", 2, 16, 49, 3, 64, size="mid"),
            _time_case("paper-ssv2", 8, 8, 196, 12, 64, size="paper"),
            _time_case("paper-ssv2-b64", 64, 8, 196, 12, 64, size="paper"),
            _time_case("paper-16-frames", 8, 16, 196, 12, 64, size="paper"),
            _time_case("paper-16-frames-b64", 64, 16, 196, 12, 64, size="paper"),
        ),
    )
)
SPACE_ATTENTION = register(
    Op(
        "space_attention",
        reference=space_attention_reference,
        impls={
            "triton": Impl(_space_triton, _why_not_triton, triton_unavailable, auto=("cuda",)),
            "cpu": Impl(space_attention_cpu),
            "xformers": Impl(space_attention_xformers, _why_not_xformers, _no_xformers, auto=()),
        },
        cases=(
            _space_case("tiny-odd", 2, 3, 5, 2, 16),
            _space_case("weighted", 2, 4, 9, 2, 32, weighted=True),
            _space_case("one-patch-one-frame", 1, 1, 1, 1, 32),
            _space_case("two-tiles-width-80", 1, 2, 70, 1, 80, weighted=True),
            _space_case("empty-batch", 0, 4, 6, 2, 32, weighted=True),
            _space_case("mid", 2, 8, 49, 3, 64, size="mid"),
            _space_case("mid-16-frames", 2, 16, 49, 3, 64, size="mid"),
            _space_case("paper-ssv2", 8, 8, 196, 12, 64, size="paper"),
            _space_case("paper-ssv2-b64", 64, 8, 196, 12, 64, size="paper"),
            _space_case("paper-16-frames", 8, 16, 196, 12, 64, size="paper"),
            _space_case("paper-16-frames-b64", 64, 16, 196, 12, 64, size="paper"),
        ),
    )
)


def time_attention(
    q: Tensor, k: Tensor, v: Tensor, *, scale: float | None = None, impl: str = "auto"
) -> Tensor:
    """Each patch position attends over its own frames; no class token takes part.

    With T = 3 and N = 2, token (t, n) of a head sees the tokens marked x:

                  (0,0) (0,1) (1,0) (1,1) (2,0) (2,1)
           (1,0)    x     .     x     .     x     .
           (1,1)    .     x     .     x     .     x

    Args:
        q, k, v: [B, T, N, H, D] (clips, frames, patches per frame, heads, head width), any strided
            views of one dtype (float32, float16, bfloat16, float64) on one device. B may be 0.
        scale: factor on q . k before the softmax; D ** -0.5 by default.
        impl: "auto", "reference", "cpu", "triton"; `timefast.ops.implementations` lists them.

    Returns:
        [B, T, N, H, D] in the dtype of q (under autocast: of autocast).

    Raises:
        ValueError: a shape, dtype or device does not fit, or `impl` is unknown.
        NotImplementedError: the `impl` named cannot run on these inputs; all reasons are given.
    """
    q, k, v = autocast(q, k, v)
    _check(q, k, v)
    return dispatch(TIME_ATTENTION, impl, q, k, v, scale=_scale(q, scale))


def space_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cls_q: Tensor,
    cls_k: Tensor,
    cls_v: Tensor,
    *,
    frame_weight: Tensor | None = None,
    scale: float | None = None,
    impl: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Each frame's class token and patches attend within the frame.

    With T = 2 and N = 2, a token of a head sees the tokens marked x; c is the class token, one per
    clip, which asks once in every frame and gets the (weighted) mean of the answers:

                          c   (0,0) (0,1) (1,0) (1,1)
             (0,1)        x     x     x     .     .
             (1,0)        x     .     .     x     x
             c, frame 0   x     x     x     .     .

    Args:
        q, k, v: [B, T, N, H, D] (clips, frames, patches per frame, heads, head width), any strided
            views of one dtype (float32, float16, bfloat16, float64) on one device. B may be 0.
        cls_q, cls_k, cls_v: [B, H, D], the class token, the same for all frames of a clip.
        frame_weight: [B, T] floating, weights of the frames in cls_out; 1 / T each by default.
            Stochastic depth per frame passes mask / (T * keep).
        scale: factor on q . k before the softmax; D ** -0.5 by default.
        impl: "auto", "reference", "cpu", "triton", "xformers".

    Returns:
        out [B, T, N, H, D] and cls_out [B, H, D] in the dtype of q (under autocast: of autocast):
        the patches' outputs, and sum over t of frame_weight[b, t] * the class token's output.

    Raises:
        ValueError: a shape, dtype or device does not fit, or `impl` is unknown.
        NotImplementedError: the `impl` named cannot run on these inputs; all reasons are given.
    """
    q, k, v, cls_q, cls_k, cls_v = autocast(q, k, v, cls_q, cls_k, cls_v)
    _check(q, k, v)
    clips, frames, _, heads, width = q.shape
    for name, x in (("cls_q", cls_q), ("cls_k", cls_k), ("cls_v", cls_v)):
        check_like("q", q, name, x, (clips, heads, width))
    if frame_weight is not None:
        check_like("q", q, "frame_weight", frame_weight, (clips, frames), any_float=True)
    tensors = (q, k, v, cls_q, cls_k, cls_v)
    scale = _scale(q, scale)
    return dispatch(SPACE_ATTENTION, impl, *tensors, frame_weight=frame_weight, scale=scale)


def _check(q: Tensor, k: Tensor, v: Tensor) -> None:
    if q.dim() != 5 or 0 in q.shape[1:] or not q.is_floating_point():
        raise ValueError(
            f"q: expected a floating [B, T, N, H, D], only B may be 0; "
            f"got {q.dtype} {list(q.shape)}"
        )
    check_like("q", q, "k", k, q.shape)
    check_like("q", q, "v", v, q.shape)


def _scale(q: Tensor, scale: float | None) -> float:
    return q.shape[-1] ** -0.5 if scale is None else float(scale)
