"""Learning rate schedules at their edges, and which weights decay."""

import dataclasses

import pytest

from timefast.config import OptimConfig
from timefast.models import create_model
from timefast.optim import build_optimizer, learning_rate
from timefast.recipes import RECIPES


def test_published_rate_drops_to_a_tenth_at_epochs_20_and_30():
    config = RECIPES["time_timesformer_ssv2"]().optim
    rates = {e: learning_rate(config, e * 100, 100) for e in (0, 19, 20, 29, 30, 34)}
    expected = {0: 1e-4, 19: 1e-4, 20: 1e-5, 29: 1e-5, 30: 1e-6, 34: 1e-6}
    assert rates == pytest.approx(expected)
    assert learning_rate(config, 1999, 100) == 1e-4


def test_cosine_rises_over_the_warm_up_and_falls_to_nothing():
    config = RECIPES["demo"]().optim  # 16 epochs, 2 of warm-up
    rates = [learning_rate(config, step, 30) for step in range(480)]
    assert rates[0] == pytest.approx(config.lr / 60)
    assert rates[59] == rates[60] == config.lr == max(rates)
    assert all(a < b for a, b in zip(rates[:59], rates[1:60], strict=True))
    assert all(a > b for a, b in zip(rates[60:], rates[61:], strict=False))
    assert rates[60 + 210] == pytest.approx(config.lr / 2)
    assert 0 < rates[-1] < 1e-4 * config.lr
    assert learning_rate(config, 480, 30) == 0


def test_warm_up_shorter_than_a_step_starts_at_the_peak():
    config = OptimConfig(schedule="cosine", warmup_epochs=0.1)
    assert learning_rate(config, 0, 1) == config.lr


@pytest.mark.parametrize("embeddings", [True, False])
def test_vectors_never_decay_and_embeddings_as_configured(embeddings):
    model = create_model(
        "timesformer", num_classes=3, dim=16, depth=1, heads=2, image_size=32, frames=2
    )
    config = dataclasses.replace(RECIPES["demo"]().optim, decay_embeddings=embeddings)
    decayed, kept = build_optimizer(model, config).param_groups
    assert (decayed["weight_decay"], kept["weight_decay"]) == (0.05, 0.0)
    names = {id(p): name for name, p in model.named_parameters()}
    decayed, kept = ({names[id(p)] for p in group["params"]} for group in (decayed, kept))
    assert decayed | kept == set(names.values()) and not decayed & kept
    assert "blocks.0.attn.qkv.weight" in decayed and "patch_embed.proj.weight" in decayed
    assert {"blocks.0.norm1.weight", "head.bias"} <= kept
    assert {"cls_token", "pos_embed", "time_embed"} <= (decayed if embeddings else kept)
