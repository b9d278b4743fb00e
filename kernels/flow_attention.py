"""Attention of the flow head: the patches of frame t + 1 ask the patches of frame t.

    out = softmax(scale * q k^T) v      for every (clip, pair of neighbouring frames)

TIME (its flow-prediction head) uses one head as wide as the model, C = 768, where library kernels
end at 128 or 256. Letters: B clips, P = T - 1 frame pairs, N patches per frame, C width.
"""

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


@in_float32
def pairwise_attention_reference(q: Tensor, k: Tensor, v: Tensor, *, scale: float) -> Tensor:
    scores = scale * torch.einsum("bpnc,bpmc->bpnm", q, k)
    return torch.einsum("bpnm,bpmc->bpnc", scores.softmax(-1), v)


def pairwise_attention_cpu(q: Tensor, k: Tensor, v: Tensor, *, scale: float) -> Tensor:
    if native.takes(q, k, v, keys=q.shape[2], width=q.shape[3]):
        q, k, v = (x[:, :, None] for x in (q, k, v))  # one head
        return native.attention(q, k, v, scale, (0, 1, 2, 3, 4))[0][:, :, 0]
    return library_attention(q, k, v, scale)


def _triton(q: Tensor, k: Tensor, v: Tensor, *, scale: float) -> Tensor:
    from timefast.kernels.flow_attention_triton import pairwise_attention_op

    return pairwise_attention_op(q, k, v, scale)[0]


def _why_not_triton(q: Tensor, *others: Tensor, **kwargs: Any) -> list[str]:
    return why_not_triton(q, max_width=1024)


def _case(name: str, clips: int, pairs: int, *shape: int, size: str = "tiny") -> Case:
    def build(dtype: torch.dtype, device: str, generator: Generator) -> Any:
        q, k, v = torch.randn(3, clips, pairs + 1, *shape, generator=generator).to(device, dtype)
        return (q[:, 1:], k[:, :-1], v[:, :-1]), {}

    return Case(name, build, size)


PAIRWISE_ATTENTION = register(
    Op(
        "pairwise_attention",
        reference=pairwise_attention_reference,
        impls={
            "triton": Impl(_triton, _why_not_triton, triton_unavailable, auto=("cuda",)),
            "cpu": Impl(pairwise_attention_cpu),
        },
        cases=(
            _case("tiny-odd", 2, 2, 5, 24),
            _case("no-pairs", 2, 0, 5, 24),
            _case("two-tiles", 1, 2, 70, 48),
            _case("mid", 2, 7, 49, 192, size="mid"),
            _case("paper-ssv2", 8, 7, 196, 768, size="paper"),
            _case("paper-ssv2-b64", 64, 7, 196, 768, size="paper"),
        ),
    )
)


def pairwise_attention(
    q: Tensor, k: Tensor, v: Tensor, *, scale: float | None = None, impl: str = "auto"
) -> Tensor:
    """Patches of the later frame attend over the patches of the earlier one; one head of width C.

    Args:
        q: [B, P, N, C] from frames 1..P; k, v: [B, P, N, C] from frames 0..P-1 (clips, pairs of
            frames, patches per frame, width up to 1024). Any strided views, for example
            tokens[:, 1:] and tokens[:, :-1], of one dtype (float32, float16, bfloat16, float64) on
            one device. B and P may be 0.
        scale: factor on q . k before the softmax; C ** -0.5 by default.
        impl: "auto", "reference", "cpu", "triton"; `timefast.ops.implementations` lists them.

    Returns:
        [B, P, N, C] in the dtype of q (under autocast: of autocast).

    Raises:
        ValueError: a shape, dtype or device does not fit, or `impl` is unknown.
        NotImplementedError: the `impl` named cannot run on these inputs; all reasons are given.
    """
    if q.dim() != 4 or 0 in q.shape[2:] or not q.is_floating_point():
        raise ValueError(
            f"q: expected a floating [B, P, N, C], only B and P may be 0; "
            f"got {q.dtype} {list(q.shape)}"
        )
    check_like("q", q, "k", k, q.shape)
    check_like("q", q, "v", v, q.shape)
    q, k, v = autocast(q, k, v)
    scale = q.shape[-1] ** -0.5 if scale is None else float(scale)
    return dispatch(PAIRWISE_ATTENTION, impl, q, k, v, scale=scale)
