"""One training step of TIME (forward on the clip and on its shuffled frames, losses, backward,
AdamW), fast attention against the reference, at the mid size every machine can run."""

from typing import Any

import pytest
import torch

from timefast.config import OptimConfig
from timefast.data.batch import Batch
from timefast.methods.time_ssl import TimeMethod
from timefast.models import create_model
from timefast.optim import build_optimizer

FRAMES, SIZE, PATCH, CLASSES, CLIPS = 8, 112, 16, 174, 2


@pytest.mark.parametrize("impl", ["cpu", "reference"])
def bench_train_step_mid(benchmark: Any, impl: str) -> None:
    model = create_model(
        "timesformer",
        num_classes=CLASSES, frames=FRAMES, image_size=SIZE, patch_size=PATCH,
        dim=192, depth=4, heads=3, impl=impl,
    )  # fmt: skip
    method = TimeMethod(model)
    optimizer = build_optimizer(model, OptimConfig())
    patches = (SIZE // PATCH) ** 2
    batch = Batch(
        video=torch.randn(CLIPS, 3, FRAMES, SIZE, SIZE),
        label=torch.arange(CLIPS),
        sample=torch.arange(CLIPS),
        view=torch.zeros(CLIPS, dtype=torch.int64),
        flow_label=torch.randint(9, (CLIPS, FRAMES - 1, patches)),
    )
    order = torch.randperm(FRAMES)

    def step() -> torch.Tensor:
        optimizer.zero_grad(set_to_none=True)
        loss = method.training_loss(batch, order)["total"]
        loss.backward()
        optimizer.step()
        return loss.detach()

    benchmark.extra_info.update(
        op="train_step", impl=impl, case="mid", dtype="float32", direction="fwd+bwd", clips=CLIPS
    )
    loss = benchmark.pedantic(step, rounds=7, warmup_rounds=2)
    assert loss.isfinite()
