"""Attention on a CPU by batched matrix products: many short sequences, probabilities kept.

Library attention is tuned for few long sequences. Here there are thousands of short ones, and what
costs is not arithmetic but copies, products of small matrices with a transposed right operand, and
softmax over rows too narrow for vector registers. The order in which matrices are laid out here
avoids most of that, forward and backward. Letters: A sequences, S their length, D head width.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

# Probabilities are kept for the backward pass, S * S per sequence: beyond this length SDPA, which
# keeps none, is the better trade.
MAX_LENGTH = 512
_NARROW = 16  # softmax over the last dimension walks rows one by one; below this it is slow


def rows(x: Tensor) -> Tensor:
    """A [..., S, D] view as contiguous [A, S, D], half precision widened (CPUs are slow in it)."""
    wide = x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
    return wide.reshape(x.shape[:-2].numel(), *x.shape[-2:]).contiguous()


def columns(x: Tensor) -> Tensor:
    """A [..., S, D] view as contiguous [A, D, S]."""
    return rows(x.transpose(-1, -2))


def attend(
    tokens: tuple[Tensor, Tensor, Tensor], scale: float, into: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """From q rows, k columns, v rows: output [A, S, D], written to `into` if given, and
    probabilities [A, S, S]."""
    q_rows, k_columns, v_rows = tokens
    scores = torch.bmm(q_rows, k_columns).mul_(scale)  # [A, S, S]
    if scores.shape[-1] < _NARROW:
        p = scores.permute(2, 0, 1).softmax(0).permute(1, 2, 0)
    else:
        p = scores.softmax(-1)
    return torch.bmm(p, v_rows, out=into), p


def attend_grad(
    grad_rows: Tensor,
    saved: tuple[Tensor, Tensor, Tensor, Tensor],
    scale: float,
    into: tuple[Tensor | None, Tensor | None, Tensor | None] = (None, None, None),
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k, v, each [A, S, D], written to `into` if given; `saved` is what `attend`
    took, and probabilities."""
    q_rows, k_columns, v_rows, p = saved
    dv = torch.bmm(p.transpose(1, 2), grad_rows, out=into[2])
    ds = torch.bmm(grad_rows, columns(v_rows)).mul_(p)  # P * dP
    ds = ds.sub_(p * ds.sum(-1, keepdim=True)).mul_(scale)
    dq = torch.bmm(ds, k_columns.transpose(1, 2), out=into[0])
    dk = torch.bmm(ds.transpose(1, 2), q_rows, out=into[1])
    return dq, dk, dv


class MatmulAttention(torch.autograd.Function):
    """softmax(scale * q k^T) v over the last two dimensions of x.permute(order).

    Takes any strided views; output and gradients are permuted views of what the products wrote.
    """

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, scale: float, order: tuple[int, ...]
    ) -> Tensor:
        q, k, v = (x.permute(order) for x in (q, k, v))
        saved = rows(q), columns(k), rows(v)
        out, p = attend(saved, scale)
        ctx.save_for_backward(*saved, p)
        ctx.scale, ctx.order, ctx.back, ctx.dtype = scale, order, _inverse(order), q.dtype
        return out.view(q.shape).permute(ctx.back).to(ctx.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        grad = grad.permute(ctx.order)
        grads = attend_grad(rows(grad), ctx.saved_tensors, ctx.scale)
        back = (x.view(grad.shape).permute(ctx.back).to(ctx.dtype) for x in grads)
        return *back, None, None


def _inverse(order: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(order.index(i) for i in range(len(order)))
