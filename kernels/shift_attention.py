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
from torch.autograd.function import once_differentiable

from timefast.kernels.matmul_attention import (
    MAX_LENGTH,
    MatmulAttention,
    attend,
    attend_grad,
    columns,
    rows,
)
from timefast.kernels.op import (
    Case,
    Impl,
    Op,
    autocast,
    check_like,
    dispatch,
    in_float32,
    register,
    triton_unavailable,
    why_not_triton,
)

Index = tuple[slice, ...]


@in_float32
def shift_attention_reference(
    q: Tensor, k: Tensor, v: Tensor, *, shift_div: int, scale: float
) -> Tensor:
    k, v = _shifted(k, shift_div), _shifted(v, shift_div)
    scores = scale * torch.einsum("btnhd,btmhd->bthnm", q, k)
    return torch.einsum("bthnm,btmhd->btnhd", scores.softmax(-1), v)


def shift_attention_cpu(q: Tensor, k: Tensor, v: Tensor, *, shift_div: int, scale: float) -> Tensor:
    frames, tokens, heads, width = q.shape[1:]
    by_matmul = q.device.type == "cpu" and tokens <= MAX_LENGTH
    fold = heads * width // shift_div
    if fold % width:
        k, v = _shifted(k, shift_div), _shifted(v, shift_div)
        if by_matmul:
            return MatmulAttention.apply(q, k, v, scale, (0, 1, 3, 2, 4))  # as [B, T, H, S, D]
        return _by_sdpa(q, k, v, scale)
    if by_matmul:
        return _MatmulShift.apply(q, k, v, fold // width, scale)
    pieces = []
    for asking, asked in _pieces(frames, heads, fold // width):
        out = _by_sdpa(q[asking], k[asked], v[asked], scale)
        pieces.append(F.pad(out, (0, 0, 0, 0, 0, 0, asking[1].start, frames - asking[1].stop)))
    return torch.cat(pieces, dim=3)


def _by_sdpa(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """Attention within each frame of [B, T, S, H, D]."""
    frames = q.shape[:2]
    q, k, v = (x.flatten(0, 1).transpose(1, 2) for x in (q, k, v))  # [B*T, H, S, D]
    out = F.scaled_dot_product_attention(q, k, v, scale=scale)
    return out.transpose(1, 2).unflatten(0, frames)


def _pieces(frames: int, heads: int, fold: int) -> list[tuple[Index, Index]]:
    """Where queries are and where the keys and values that they see, in [B, T, S, H, D]: the heads
    that look ahead, those that look back and the others. A fold is a number of heads here."""
    pieces = []
    everything = slice(None)
    borders = (0, fold, min(2 * fold, heads), heads)
    for start, end, offset in zip(borders[:-1], borders[1:], (1, -1, 0), strict=True):
        ahead, back = max(0, offset), max(0, -offset)
        for_heads = slice(start, end)
        asking = (everything, slice(back, max(back, frames - ahead)), everything, for_heads)
        asked = (everything, slice(ahead, max(ahead, frames - back)), everything, for_heads)
        if start < end:
            pieces.append((asking, asked))
    return pieces


class _MatmulShift(torch.autograd.Function):
    """As MatmulAttention, with the shift in the copies that are made anyway: a piece of the heads
    at a time, from one frame to another. What no piece writes to is zero."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, fold: int, scale: float) -> Tensor:
        ctx.pieces, ctx.scale = _pieces(q.shape[1], q.shape[3], fold), scale
        out = q.new_zeros(q.shape)
        saved = []
        for asking, asked in ctx.pieces:
            tokens = (
                rows(_heads_first(q, asking)),
                columns(_heads_first(k, asked)),
                rows(_heads_first(v, asked)),
            )
            values, p = attend(tokens, scale)
            _write(out, asking, values)
            saved += [*tokens, p]
        ctx.save_for_backward(*saved)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        grads = [grad.new_zeros(grad.shape) for _ in range(3)]
        for i, (asking, asked) in enumerate(ctx.pieces):
            saved = ctx.saved_tensors[4 * i : 4 * i + 4]
            found = attend_grad(rows(_heads_first(grad, asking)), saved, ctx.scale)
            for x, index, piece in zip(grads, (asking, asked, asked), found, strict=True):
                _write(x, index, piece)
        return *grads, None, None


def _heads_first(x: Tensor, piece: Index) -> Tensor:
    return x[piece].transpose(2, 3)  # [B, T, H, S, D]


def _write(x: Tensor, piece: Index, value: Tensor) -> None:
    place = _heads_first(x, piece)
    place.copy_(value.view(place.shape))


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
