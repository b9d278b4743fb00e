"""The first half of an MLP: gelu(x W^T + b), with the exact GELU (not its tanh form).

On a CPU bias and GELU are one pass over the product, and in the backward pass GELU's derivative
and the sum for the bias are one more; the library's linear layer first copies the bias into every
row. On a GPU the library does it: cuBLAS adds the bias as it writes the product.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from timefast.kernels import native


def linear_gelu(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """gelu(x W^T + b) for x [..., C], weight [M, C] and bias [M] -> [..., M].

    Follows autocast as a linear layer does. On a CPU, in C loops where they can run, the result is
    within 2e-7 of the exact function in float32.
    """
    if bias.dtype == torch.float32 and native.takes(x, weight, bias):
        return _BiasGelu.apply(F.linear(x, weight), bias)
    return F.gelu(F.linear(x, weight, bias))


class _BiasGelu(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, bias: Tensor) -> Tensor:
        ctx.save_for_backward(x, bias)
        return native.run_bias_gelu(x, bias)[0]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        x, bias = ctx.saved_tensors
        dx, sums = native.run_bias_gelu(x, bias, grad.contiguous())
        return dx, sums.sum(0)
