"""The losses of TIME."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_models import clip, small

from timefast.losses import debias_loss, flow_loss, order_loss, time_losses
from timefast.models import BACKBONES


def smoothed(logits: torch.Tensor, target: int, e: float) -> torch.Tensor:
    """(1-e)(-log p_target) + e * mean_k(-log p_k) of one row."""
    nll = -(logits - logits.exp().sum().log())
    return (1 - e) * nll[target] + e * nll.mean()


@settings(max_examples=15, deadline=None)
@given(st.integers(1, 3), st.integers(1, 5), st.integers(0, 3), st.floats(0, 0.9))
def test_order_loss_is_smoothed_cross_entropy_to_the_position(B, T, more, e):
    logits = torch.randn(B, T, T + more)
    expected = sum(smoothed(logits[b, t], t, e) for b in range(B) for t in range(T)) / (B * T)
    torch.testing.assert_close(order_loss(logits, label_smoothing=e), expected)


@settings(max_examples=15, deadline=None)
@given(st.integers(1, 2), st.integers(1, 3), st.integers(1, 4), st.floats(0, 0.9))
def test_flow_loss_is_smoothed_cross_entropy_over_all_patches(B, P, N, e):
    logits, labels = torch.randn(B, P, N, 9), torch.randint(0, 9, (B, P, N))
    rows = zip(logits.flatten(0, 2), labels.flatten().tolist(), strict=True)
    expected = sum(smoothed(row, label, e) for row, label in rows) / labels.numel()
    torch.testing.assert_close(flow_loss(logits, labels, label_smoothing=e), expected)


@settings(max_examples=15, deadline=None)
@given(st.integers(2, 9))
def test_debias_loss_is_smallest_where_all_classes_are_equally_likely(K):
    uniform = debias_loss(torch.full((3, K), 0.7))
    assert math.isclose(uniform, math.log(K), rel_tol=1e-5)
    assert debias_loss(torch.randn(3, K)) > uniform


def test_losses_of_half_precision_logits_are_computed_in_float32():
    logits = torch.randn(2, 4, 4).half()
    assert order_loss(logits).dtype == torch.float32
    assert debias_loss(logits[:, 0]).dtype == torch.float32


def test_shape_mistakes_are_named():
    with pytest.raises(ValueError, match=r"flow_labels: expected \[2, 3, 4\].*got \[2, 3, 9\]"):
        flow_loss(torch.randn(2, 3, 4, 9), torch.zeros(2, 3, 9, dtype=torch.long))
    with pytest.raises(ValueError, match="8 frames, but the head tells 4"):
        order_loss(torch.randn(2, 8, 4))


def batch() -> tuple:
    return clip(), torch.tensor([1, 3]), torch.randint(0, 9, (2, 3, 4)), [2, 0, 3, 1]


def test_total_is_the_weighted_sum():
    model = small().eval()
    smoothing = {"ce": 0.1, "order": 0.2, "flow": 0.3}
    args = batch()
    losses = time_losses(model, *args, weights=(2, 3, 4), label_smoothing=smoothing)
    out = model.time_outputs(args[0])
    torch.testing.assert_close(losses["order"], order_loss(out.order, label_smoothing=0.2))
    torch.testing.assert_close(losses["flow"], flow_loss(out.flow, args[2], label_smoothing=0.3))
    torch.testing.assert_close(losses["debias"], debias_loss(model(args[0][:, :, [2, 0, 3, 1]])))
    total = losses["ce"] + 2 * losses["order"] + 3 * losses["debias"] + 4 * losses["flow"]
    torch.testing.assert_close(losses["total"], total)
    as_tuple = time_losses(model, *args, weights=(2, 3, 4), label_smoothing=(0.1, 0.2, 0.3))
    assert torch.equal(as_tuple["total"], losses["total"])
    with pytest.raises(ValueError, match="label_smoothing: expected ce, order, flow"):
        time_losses(model, *args, label_smoothing={"debias": 0.1})


def test_a_weight_of_zero_skips_the_work():
    model = small(time_heads=False)
    passes = []
    model.patch_embed.register_forward_hook(lambda *_: passes.append(1))
    video, labels, _, _ = batch()
    losses = time_losses(model, video, labels, None, None, weights=(0, 0, 0))
    assert len(passes) == 1
    assert torch.equal(losses["total"], losses["ce"])
    assert losses["order"] == losses["debias"] == losses["flow"] == 0
    losses["total"].backward()


def test_missing_labels_are_named():
    video, labels, flow, order = batch()
    with pytest.raises(ValueError, match="flow_labels: expected labels"):
        time_losses(small(), video, labels, None, order)
    with pytest.raises(ValueError, match="permutation: expected an order"):
        time_losses(small(), video, labels, flow, None)


@pytest.mark.parametrize("backbone", BACKBONES)
def test_losses_fall_in_a_few_steps(backbone):
    torch.manual_seed(0)
    model = small(backbone, drop_path=0.0, **({"head_dropout": 0.0} if backbone == "xvit" else {}))
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    args, totals = batch(), []
    for _ in range(12):
        losses = time_losses(model, *args)
        optimizer.zero_grad()
        losses["total"].backward()
        optimizer.step()
        totals.append({key: value.item() for key, value in losses.items()})
    assert all(totals[-1][key] < totals[0][key] for key in totals[0])
