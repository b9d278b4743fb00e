"""X-ViT: attention within a frame whose keys and values come in part from the neighbouring frames.

    out[t] = softmax(scale * q[t] k'[t]^T) v'[t]        for every (clip, frame, head)
    k'[t] = channels [0, fold) of k[t+1], [fold, 2 fold) of k[t-1], the rest of k[t]; v' alike

with fold = H * D // shift_div and channels counted head by head; beyond the first and last frame
stand zeros (Bulat et al. 2021, "space-time mixing attention"; as the published code does, class
token included). A head whose channels are all shifted therefore gives 0 in the frame that has no
neighbour. Where folds end at head borders, which is so in the published models, nothing is shifted:
the head reads the other frame.

Letters: B clips, T frames, S tokens per frame with its class token, H heads, D head width.
"""

from typing import Any

import torch
import torch.nn.functional as F
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


@in_float32
def shift_attention_reference(
    q: Tensor, k: Tensor, v: Tensor, *, shift_div: int, scale: float
) -> Tensor:
    k, v = _shifted(k, shift_div), _shifted(v, shift_div)
    scores = scale * torch.einsum("btnhd,btmhd->bthnm", q, k)
    return torch.einsum("bthnm,btmhd->btnhd", scores.softmax(-1), v)


def shift_attention_cpu(q: Tensor, k: Tensor, v: Tensor, *, shift_div: int, scale: float) -> Tensor:
    tokens, heads, width = q.shape[2:]
    fold = heads * width // shift_div
    if native.takes(q, k, v, keys=tokens, width=width):
        return native.attention(q, k, v, scale, (0, 1, 3, 2, 4), fold)[0]
    k, v = _shifted(k, shift_div), _shifted(v, shift_div)
    frames = q.shape[:2]
    q, k, v = (x.flatten(0, 1).transpose(1, 2) for x in (q, k, v))  # [B*T, H, S, D]
    out = library_attention(q, k, v, scale)
    return out.transpose(1, 2).unflatten(0, frames)


def _shifted(x: Tensor, shift_div: int) -> Tensor:
    channels = x.flatten(3)  # [B, T, S, H*D]
    fold = channels.shape[-1] // shift_div
    after = F.pad(channels[:, 1:, :, :fold], (0, 0, 0, 0, 0, 1))
    before = F.pad(channels[:, :-1, :, fold : 2 * fold], (0, 0, 0, 0, 1, 0))
    return torch.cat([after, before, channels[..., 2 * fold :]], -1).unflatten(3, x.shape[3:])


def _triton(q: Tensor, k: Tensor, v: Tensor, *, shift_div: int, scale: float) -> Tensor:
    from timefast.kernels.shift_attention_triton import shift_attention_op

    fold = q.shape[3] * q.shape[4] // shift_div
    return shift_attention_op(q, k, v, fold, scale)[0]


def _why_not_triton(q: Tensor, *others: Tensor, **kwargs: Any) -> list[str]:
    return why_not_triton(q, max_width=128)


def _case(name: str, *shape: int, shift_div: int = 4, size: str = "tiny") -> Case:
    def build(dtype: torch.dtype, device: str, generator: Generator) -> Any:
        clips, frames, tokens, heads, width = shape
        qkv = torch.randn(clips, frames, tokens, 3, heads, width, generator=generator)
        return qkv.to(device, dtype).unbind(3), {"shift_div": shift_div}

    return Case(name, build, size)


SHIFT_ATTENTION = register(
    Op(
        "shift_attention",
        reference=shift_attention_reference,
        impls={
            "triton": Impl(_triton, _why_not_triton, triton_unavailable, auto=("cuda",)),
            "cpu": Impl(shift_attention_cpu),
        },
        cases=(
            _case("tiny-odd", 2, 2, 5, 3, 16, shift_div=3),
            _case("folds-inside-heads", 1, 3, 5, 3, 16),
            _case("one-frame", 1, 1, 4, 4, 16),
            _case("all-heads-shifted", 1, 3, 5, 2, 32, shift_div=2),
            _case("nothing-shifted", 1, 3, 5, 2, 16, shift_div=64),
            _case("two-tiles-width-80", 1, 2, 70, 3, 80, shift_div=3),
            _case("empty-batch", 0, 4, 6, 4, 16),
            _case("mid", 2, 8, 50, 4, 64, size="mid"),
            _case("paper-ssv2", 8, 8, 197, 12, 64, size="paper"),
            _case("paper-ssv2-b64", 64, 8, 197, 12, 64, size="paper"),
            _case("paper-16-frames", 8, 16, 197, 12, 64, size="paper"),
            _case("paper-16-frames-b64", 64, 16, 197, 12, 64, size="paper"),
        ),
    )
)


def shift_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    shift_div: int = 4,
    scale: float | None = None,
    impl: str = "auto",
) -> Tensor:
    """Attention within each frame; some channels of keys and values are the neighbours'.

    With 12 heads and shift_div 4, heads 0-2 of frame t read keys and values of frame t+1, heads
    3-5 of frame t-1 and heads 6-11 of frame t itself. A run of frames that must not exchange
    anything with the next one is a clip of its own here.

    Args:
        q, k, v: [B, T, S, H, D] (clips, frames, tokens per frame with the frame's class token,
            heads, head width), any strided views of one dtype (float32, float16, bfloat16,
            float64) on one device. B may be 0.
        shift_div: H * D // shift_div channels come from the next frame, as many from the one
            before; at least 1.
        scale: factor on q . k before the softmax; D ** -0.5 by default.
        impl: "auto", "reference", "cpu", "triton"; `timefast.ops.implementations` lists them.

    Returns:
        [B, T, S, H, D] in the dtype of q (under autocast: of autocast).

    Raises:
        ValueError: a shape, dtype or device does not fit, or `impl` is unknown.
        NotImplementedError: the `impl` named cannot run on these inputs; all reasons are given.
    """
    if q.dim() != 5 or 0 in q.shape[1:] or not q.is_floating_point():
        raise ValueError(
            f"q: expected a floating [B, T, S, H, D], only B may be 0; "
            f"got {q.dtype} {list(q.shape)}"
        )
    if shift_div < 1:
        raise ValueError(f"shift_div: expected at least 1, got {shift_div}")
    check_like("q", q, "k", k, q.shape)
    check_like("q", q, "v", v, q.shape)
    q, k, v = autocast(q, k, v)
    scale = q.shape[-1] ** -0.5 if scale is None else float(scale)
    return dispatch(SHIFT_ATTENTION, impl, q, k, v, shift_div=shift_div, scale=scale)
