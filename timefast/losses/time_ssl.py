"""The losses of TIME: class, frame order, debiasing on shuffled frames, motion direction.

Letters: B clips, T frames, N patches per frame, K classes, L order classes.
"""

from collections.abc import Mapping, Sequence
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from timefast.profiling import during


class _Outputs(Protocol):
    logits: Tensor
    order: Tensor | None
    flow: Tensor | None


class _Model(Protocol):
    def time_outputs(self, video: Tensor, *, order: bool, flow: bool) -> _Outputs: ...

    def paired_outputs(
        self, video: Tensor, permutation: Tensor | Sequence[int], *, order: bool, flow: bool
    ) -> tuple[_Outputs, Tensor]: ...


def order_loss(order_logits: Tensor, *, label_smoothing: float = 0.0) -> Tensor:
    """Cross entropy of each frame's position; the target of row t is t.

    order_logits [B, T, L] with T <= L -> scalar, the mean over B*T rows. The published runs smooth
    the targets by 0.2; the paper writes the plain cross entropy.
    """
    B, T, L = order_logits.shape
    if T > L:
        raise ValueError(f"order_logits: {T} frames, but the head tells {L} positions apart")
    target = torch.arange(T, device=order_logits.device).repeat(B)
    return F.cross_entropy(
        order_logits.flatten(0, 1).float(), target, label_smoothing=label_smoothing
    )


def debias_loss(shuffled_logits: Tensor) -> Tensor:
    """Cross entropy of the prediction on shuffled frames to the uniform distribution.

    shuffled_logits [B, K] -> scalar, mean over clips, smallest (ln K) where all classes are equally
    likely. The published code computes this; the paper's KL(U || P) is ln K less and has the same
    gradient.
    """
    return -F.log_softmax(shuffled_logits.float(), dim=-1).mean()


def flow_loss(flow_logits: Tensor, flow_labels: Tensor, *, label_smoothing: float = 0.0) -> Tensor:
    """Cross entropy of each patch's motion direction.

    flow_logits [B, T-1, N, 9], flow_labels int [B, T-1, N] with values 0..8 -> scalar, the mean
    over all patches of all pairs.
    """
    if flow_labels.shape != flow_logits.shape[:-1]:
        raise ValueError(
            f"flow_labels: expected {list(flow_logits.shape[:-1])} like flow_logits, "
            f"got {list(flow_labels.shape)}; is the patch size of the labels the model's?"
        )
    return F.cross_entropy(
        flow_logits.flatten(0, 2).float(),
        flow_labels.flatten().long(),
        label_smoothing=label_smoothing,
    )


def time_losses(
    model: _Model,
    video: Tensor,
    labels: Tensor,
    flow_labels: Tensor | None,
    permutation: Tensor | Sequence[int] | None,
    *,
    weights: Sequence[float] = (1, 1, 1),
    label_smoothing: float | Sequence[float] | Mapping[str, float] = 0.0,
) -> dict[str, Tensor]:
    """All losses of one training step: total = ce + w_order*order + w_debias*debias + w_flow*flow.

    video [B, 3, T, height, width]; labels int [B]; flow_labels int [B, T-1, N] (None allowed when
    flow has weight 0); permutation: order of the frames of the debiasing pass, one for all clips
    (None allowed when debias has weight 0). `weights` are those of order, debias and flow; a weight
    of 0 skips the computation (debias: the pass over shuffled frames) and reports 0.
    `label_smoothing` is one value, or those of ce, order and flow as a tuple or by name; debias
    has none. The parts are reported without their weights.
    """
    w_order, w_debias, w_flow = weights
    s_ce, s_order, s_flow = _smoothing(label_smoothing)
    heads = {"order": w_order != 0, "flow": w_flow != 0}
    if w_debias == 0:
        out = model.time_outputs(video, **heads)
    elif permutation is None:
        raise ValueError("permutation: expected an order of the frames, got None")
    else:
        out, shuffled = model.paired_outputs(video, permutation, **heads)
    with during("losses"):
        ce = F.cross_entropy(out.logits.float(), labels, label_smoothing=s_ce)
        order = debias = flow = ce.new_zeros(())
        if out.order is not None:
            order = order_loss(out.order, label_smoothing=s_order)
        if w_debias != 0:
            debias = debias_loss(shuffled)
        if out.flow is not None:
            if flow_labels is None:
                raise ValueError("flow_labels: expected labels [B, T-1, N], got None")
            flow = flow_loss(out.flow, flow_labels, label_smoothing=s_flow)
        total = ce + w_order * order + w_debias * debias + w_flow * flow
    return {"total": total, "ce": ce, "order": order, "debias": debias, "flow": flow}


def _smoothing(value: float | Sequence[float] | Mapping[str, float]) -> tuple[float, float, float]:
    if isinstance(value, Mapping):
        unknown = set(value) - {"ce", "order", "flow"}
        if unknown:
            raise ValueError(f"label_smoothing: expected ce, order, flow, got {sorted(unknown)}")
        return value.get("ce", 0.0), value.get("order", 0.0), value.get("flow", 0.0)
    if isinstance(value, Sequence):
        ce, order, flow = value
        return ce, order, flow
    return value, value, value
