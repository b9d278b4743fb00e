"""A residual connection and the LayerNorm behind it, in one pass over the tokens.

    total = x + branch_scale * branch + branch_bias
    normed = (total - mean) / sqrt(variance + eps) * weight + bias

with mean and variance over the last dimension. The backward pass is one more pass: it takes the
gradients of both results and gives those of x, branch, weight, bias and branch_bias.

Under autocast PyTorch's LayerNorm writes float32, and the linear layer behind it reads that again
to round it; here `normed` is written in the dtype of autocast at once. `total` is as without it.

Letters: M tokens (the product of all dimensions but the last), C model width.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from timefast.kernels.op import (
    Case,
    Impl,
    Op,
    autocast_dtype,
    check_like,
    dispatch,
    register,
    triton_unavailable,
    why_not_triton,
)

MAX_WIDTH = 8192


def add_layer_norm_reference(
    x: Tensor,
    branch: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    *,
    branch_scale: Tensor | None,
    branch_bias: Tensor | None,
    eps: float,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    total = x
    if branch is not None:
        as_returned = torch.promote_types(x.dtype, branch.dtype)
        total = _wide(branch) if branch_scale is None else _wide(branch_scale) * _wide(branch)
        total = _wide(x) + total
        if branch_bias is not None:
            total = total + _wide(branch_bias)
        total = total.to(as_returned)
    wide = _wide(total)
    normed = F.layer_norm(wide, wide.shape[-1:], weight.to(wide.dtype), bias.to(wide.dtype), eps)
    return total, normed.to(dtype)


def _wide(x: Tensor) -> Tensor:
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def per_token(scale: Tensor, x: Tensor) -> Tensor:
    """float32 [M] of a scale that broadcasts to [..., 1]."""
    return scale.detach().expand(*x.shape[:-1], 1).reshape(-1).float()


def _triton(
    x: Tensor,
    branch: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    *,
    branch_scale: Tensor | None,
    branch_bias: Tensor | None,
    eps: float,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    from timefast.kernels.add_layer_norm_triton import add_layer_norm_op

    scale = None if branch_scale is None else per_token(branch_scale, x)
    total, normed, _ = add_layer_norm_op(x, branch, weight, bias, scale, branch_bias, eps, dtype)
    return x if branch is None else total, normed


def _why_not_triton(
    x: Tensor, branch: Tensor | None, weight: Tensor, bias: Tensor, **kwargs: Any
) -> list[str]:
    reasons = why_not_triton(x, MAX_WIDTH, "x")
    for name, y in {"branch": branch, "weight": weight, "bias": bias, **kwargs}.items():
        if isinstance(y, Tensor) and y.dtype == torch.float64:
            reasons.append(f"{name} is torch.float64; triton takes float16, bfloat16, float32")
    return reasons


def _case(
    name: str, *shape: int, of: str = "branch", drop: tuple[int, ...] = (), size: str = "tiny"
) -> Case:
    """`of` "norm": no branch; "branch"; "branch and bias". `drop`: sizes of branch_scale."""

    def build(dtype: torch.dtype, device: str, generator: Generator) -> Any:
        def draw(*sizes: int) -> Tensor:
            return torch.randn(*sizes, generator=generator).to(device, dtype)

        x, branch = draw(*shape), None if of == "norm" else draw(*shape)
        weight, bias = 1 + 0.2 * draw(shape[-1]), draw(shape[-1])
        kwargs: dict[str, Any] = {"eps": 1e-6}
        if drop:
            kept = torch.rand(*drop, generator=generator) < 0.8
            kwargs["branch_scale"] = kept.to(device, dtype) / 0.8
        if of == "branch and bias":
            kwargs["branch_bias"] = draw(shape[-1])
        return (x, branch, weight, bias), kwargs

    return Case(name, build, size)


ADD_LAYER_NORM = register(
    Op(
        "add_layer_norm",
        reference=add_layer_norm_reference,
        impls={
            "triton": Impl(_triton, _why_not_triton, triton_unavailable, auto=("cuda",)),
            "cpu": Impl(add_layer_norm_reference),  # PyTorch's own functions
        },
        cases=(
            _case("norm-alone", 2, 3, 48, of="norm"),
            _case("branch", 3, 5, 33),
            _case("dropped-clips", 4, 2, 3, 16, drop=(4, 1, 1, 1)),
            _case("dropped-places-and-bias", 2, 3, 4, 40, of="branch and bias", drop=(2, 1, 4, 1)),
            _case("bias-of-the-branch", 7, 24, of="branch and bias"),
            _case("one-token", 1, 5),
            _case("many-rows", 700, 20, drop=(700, 1)),
            _case("empty-batch", 0, 3, 16, drop=(0, 1, 1)),
            _case("paper", 8, 8, 196, 768, drop=(8, 8, 1, 1), size="paper"),
            _case("paper-b64", 64, 8, 196, 768, drop=(64, 8, 1, 1), size="paper"),
        ),
    )
)


def add_layer_norm(
    x: Tensor,
    branch: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    *,
    branch_scale: Tensor | None = None,
    branch_bias: Tensor | None = None,
    eps: float = 1e-6,
    impl: str = "auto",
) -> tuple[Tensor, Tensor]:
    """total = x + branch_scale * branch + branch_bias, and its LayerNorm, in one pass.

        x --------(+)---- total ------>   the residual stream, on to the next sum
        branch ----'        `-- LayerNorm --> normed, into the next branch

    Args:
        x: [..., C] in float32, float16, bfloat16 or float64, any strides (copied unless
            contiguous). The leading dimensions may hold no element.
        branch: like x, of any floating dtype; None: total is x itself, the rest is plain LayerNorm.
        weight, bias: [C] of the norm, of any floating dtype.
        branch_scale: stochastic depth; broadcasts to [..., 1]. It gets no gradient.
        branch_bias: [C], of any floating dtype, added where the branch was dropped too.
        eps: added to the variance (biased, over C).
        impl: "auto", "reference", "cpu", "triton"; `timefast.ops.implementations` lists them.

    Returns:
        total [..., C] in the promoted dtype of x and branch, normed [..., C] in that dtype, or
        under autocast in the dtype of autocast (float64 stays). Moments are float32, or float64.

    Raises:
        ValueError: a shape, dtype or device does not fit, or `impl` is unknown.
        NotImplementedError: the `impl` named cannot run on these inputs; all reasons are given.
    """
    if not isinstance(x, Tensor):
        raise ValueError(f"x: expected a tensor [..., C], got {type(x).__name__}")
    if x.dim() == 0 or x.shape[-1] == 0 or not x.is_floating_point():
        raise ValueError(
            f"x: expected a floating [..., C] with C at least 1, got {x.dtype} {list(x.shape)}"
        )
    width = x.shape[-1:]
    check_like("x", x, "weight", weight, width, any_float=True)
    check_like("x", x, "bias", bias, width, any_float=True)
    if branch is not None:
        check_like("x", x, "branch", branch, x.shape, any_float=True)
    if branch_bias is not None:
        check_like("x", x, "branch_bias", branch_bias, width, any_float=True)
    if branch is None and not (branch_scale is None and branch_bias is None):
        raise ValueError("branch_scale, branch_bias: expected None where there is no branch")
    if branch_scale is not None:
        _check_scale(branch_scale, x)
        branch_scale = branch_scale.detach()
    dtype = x.dtype if branch is None else torch.promote_types(x.dtype, branch.dtype)
    if dtype != torch.float64:
        dtype = autocast_dtype(x.device.type) or dtype
    return dispatch(
        ADD_LAYER_NORM, impl, x, branch, weight, bias,
        branch_scale=branch_scale, branch_bias=branch_bias, eps=float(eps), dtype=dtype,
    )  # fmt: skip


def _check_scale(scale: Tensor, x: Tensor) -> None:
    per_row = (*x.shape[:-1], 1)
    if not isinstance(scale, Tensor):
        raise ValueError(
            f"branch_scale: expected a tensor that broadcasts to {list(per_row)}, got {scale!r}"
        )
    fits = scale.dim() == x.dim() and all(
        a in (1, b) for a, b in zip(scale.shape, per_row, strict=True)
    )
    if not fits or not scale.is_floating_point() or scale.device != x.device:
        raise ValueError(
            f"branch_scale: expected a floating tensor that broadcasts to {list(per_row)} on "
            f"{x.device}, got {scale.dtype} {list(scale.shape)} on {scale.device}"
        )
