"""Attention on a CPU by batched matrix products: many short sequences, probabilities kept.

Library attention is tuned for few long sequences. Here there are thousands of short ones: beside
the products of small matrices it is copies, and softmax over rows too narrow for vector registers,
that cost. Each input is copied once, the scale is folded into the products, and backward needs no
other layout. Letters: A sequences, S their length, D head width.
"""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

# Probabilities are kept for the backward pass, S * S per sequence: beyond this length SDPA, which
# keeps none, is the better trade.
MAX_LENGTH = 512
_NARROW = 16  # softmax over the last dimension walks rows one by one; below this it is slow


def plain_backward(backward: Callable[..., Any]) -> Callable[..., Any]:
    """For the backward of an autograd function: products keep their dtype even where the caller
    runs it under autocast, and a second derivative is an error."""

    @functools.wraps(backward)
    def run(ctx: Any, *grads: Tensor) -> Any:
        with torch.autocast(grads[0].device.type, enabled=False):
            return backward(ctx, *grads)

    return once_differentiable(run)


def rows(x: Tensor) -> Tensor:
    """A [..., S, D] view as contiguous [A, S, D], half precision widened (CPUs are slow in it)."""
    wide = x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
    return wide.reshape(x.shape[:-2].numel(), *x.shape[-2:]).contiguous()


def columns(x: Tensor) -> Tensor:
    """A [..., S, D] view as contiguous [A, D, S]."""
    return rows(x.transpose(-1, -2))


def attend(
    q: Tensor, k: Tensor, v: Tensor, scale: float, into: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """From [A, S, D] each: output [A, S, D], written to `into` if given, and probabilities
    [A, S, S]."""
    scores = _scaled_bmm(q, k.transpose(1, 2), scale)  # [A, S, S]
    if scores.shape[-1] < _NARROW:
        p = scores.permute(2, 0, 1).softmax(0).permute(1, 2, 0).contiguous()
    else:
        p = scores.softmax(-1)
    return torch.bmm(p, v, out=into), p


def attend_grad(
    grad: Tensor,
    saved: tuple[Tensor, Tensor, Tensor, Tensor],
    scale: float,
    into: tuple[Tensor | None, Tensor | None, Tensor | None] = (None, None, None),
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k, v, each [A, S, D], written to `into` if given; `saved` is q, k, v and
    the probabilities."""
    q, k, v, p = saved
    dv = torch.bmm(p.transpose(1, 2), grad, out=into[2])
    ds = torch.bmm(grad, v.transpose(1, 2)).mul_(p)  # P * dP
    ds.sub_(p * ds.sum(-1, keepdim=True))
    dq = _scaled_bmm(ds, k, scale, into[0])
    dk = _scaled_bmm(ds.transpose(1, 2), q, scale, into[1])
    return dq, dk, dv


def _scaled_bmm(a: Tensor, b: Tensor, scale: float, into: Tensor | None = None) -> Tensor:
    if into is None:
        into = a.new_empty(a.shape[0], a.shape[1], b.shape[2])
    return torch.baddbmm(into, a, b, beta=0, alpha=scale, out=into)


class MatmulAttention(torch.autograd.Function):
    """softmax(scale * q k^T) v over the last two dimensions of x.permute(order).

    Takes any strided views; output and gradients are permuted views of what the products wrote.
    """

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, scale: float, order: tuple[int, ...]
    ) -> Tensor:
        q, k, v = (x.permute(order) for x in (q, k, v))
        saved = rows(q), rows(k), rows(v)
        out, p = attend(*saved, scale)
        ctx.save_for_backward(*saved, p)
        ctx.scale, ctx.order, ctx.back, ctx.dtype = scale, order, _inverse(order), q.dtype
        return out.view(q.shape).permute(ctx.back).to(ctx.dtype)

    @staticmethod
    @plain_backward
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        grad = grad.permute(ctx.order)
        grads = attend_grad(rows(grad), ctx.saved_tensors, ctx.scale)
        back = (x.view(grad.shape).permute(ctx.back).to(ctx.dtype) for x in grads)
        return *back, None, None


def _inverse(order: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(order.index(i) for i in range(len(order)))
