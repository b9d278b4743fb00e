"""The heads of TIME, the same for all backbones."""

import pytest
import torch
from test_models import clip, small


def tokens() -> torch.Tensor:
    return torch.randn(2, 4, 4, 32)


def test_order_head_reads_the_mean_of_a_frames_patches():
    model, y = small(), tokens()
    shuffled = y[:, :, [2, 3, 1, 0]]
    torch.testing.assert_close(model.order_logits(y), model.order_logits(shuffled))
    changed = y.clone()
    changed[:, 2] += 1
    differs = (model.order_logits(y) != model.order_logits(changed)).any(-1)
    assert differs.tolist() == [[False, False, True, False]] * 2


def test_flow_row_is_queried_by_its_patch_of_the_later_frame():
    model, y = small(), tokens()
    before = model.flow_logits(y)
    later = y.clone()
    later[:, 2, 1] += 1  # patch 1 of frame 2: the query of pair 1, a key of pair 2
    differs = (model.flow_logits(later) != before).any(-1)[0]  # [T-1, N]
    assert differs.tolist() == [[False] * 4, [False, True, False, False], [True] * 4]


def test_a_model_without_time_heads_says_so():
    model = small(time_heads=False)
    assert not any("flow_head" in key or "mlp_q" in key for key in model.state_dict())
    assert model(clip()).shape == (2, 5)
    assert model.time_outputs(clip(), order=False, flow=False).order is None
    with pytest.raises(ValueError, match="no order and flow heads.*time_heads=True"):
        model.time_outputs(clip())


def test_heads_not_asked_for_are_not_computed(monkeypatch):
    model = small()
    monkeypatch.setattr(model, "flow_logits", lambda tokens: pytest.fail("computed"))
    out = model.time_outputs(clip(), flow=False)
    assert out.flow is None and out.order is not None
