"""One training step, technique by technique: forward on the clip and on its shuffled frames,
losses, backward, AdamW.

Each row of a case adds one technique to the row above, down to what `timefast.train` does; the rows
after that are options of it. The published form (bench/published.py) runs between any two
measured steps, so that both see the same machine, and `speedup` is the ratio of the medians (per
clip: where the published form does not fit into the GPU it gets half of the clips, and half again).
Losses of three steps are compared with it first: a row whose losses are off is not recorded.

On a GPU: the models of the paper (ViT-B, 8 frames of 224) in bf16. On a CPU: a size in between.
"""

import functools
import statistics
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._inductor.exc import InductorError
from torch.utils.flop_counter import FlopCounterMode

from bench import published
from bench.conftest import ON_GPU, device_clock
from bench.memory import Allocations
from timefast.config import OptimConfig
from timefast.cuda_graph import GraphedMethod
from timefast.data.batch import Batch
from timefast.methods.time_ssl import TimeMethod
from timefast.models import VideoTransformer, create_model
from timefast.models.vit import AddNorm, checkpoint_activations
from timefast.optim import build_optimizer

BACKBONES = ("timesformer", "motionformer", "xvit")
FRAMES, CLASSES = 8, 174
DEVICE = "cuda" if ON_GPU else "cpu"
SIZES: dict[str, dict[str, Any]] = {
    "mid": {"image_size": 112, "dim": 192, "depth": 4, "heads": 3},
    "vit-b": {"image_size": 224, "dim": 768, "depth": 12, "heads": 12},
}
RUNS = [("vit-b", 8), ("vit-b", 64)] if ON_GPU else [("mid", 2)]  # size, clips
ROUNDS = 11
# largest relative difference of a loss in three steps
LIMITS = {"float32": 1e-4, "bfloat16": 3e-2}


@dataclass(frozen=True)
class Form:
    """How a step is computed."""

    own: bool = True  # this project's models; else the published form of the same
    impl: str = "auto"
    attend: published.Attend = published.materialised
    passes: str = "one"  # one, or two: the second "whole", or for "class" tokens only
    norms: str = "auto"  # implementation of residual sums with their LayerNorm
    fused: bool = True  # optimizer
    again: str | None = None  # what checkpoint_activations takes
    compiled: bool = False
    graphed: bool = False  # CUDA graphs
    bf16: bool = ON_GPU


WATERFALL: dict[str, Form] = {
    "published form": Form(own=False, fused=False),
    "token layout without copies": Form(
        impl="reference", norms="reference", passes="whole", fused=False
    ),
    "+ fused attention": Form(norms="reference", passes="whole", fused=False),
    "+ class tokens only, where nobody reads patches": Form(
        norms="reference", passes="class", fused=False
    ),
    "+ both passes as one": Form(norms="reference", fused=False),
    "+ residual and LayerNorm in one pass": Form(fused=False),
    "+ fused AdamW (timefast)": Form(),
}
if not ON_GPU:  # there the reference is all there is
    del WATERFALL["+ residual and LayerNorm in one pass"]
OPTIONS: dict[str, Form] = {
    "--checkpoint-activations gelu": Form(again="gelu"),
    "--checkpoint-activations mlp": Form(again="mlp"),
    "--checkpoint-activations blocks": Form(again="blocks"),
    "--compile": Form(compiled=True),
    "published form, SDPA": Form(own=False, attend=published.sdpa, fused=False),
    "published form, torch.compile": Form(own=False, compiled=True, fused=False),
}
if ON_GPU:
    OPTIONS["--cuda-graphs"] = Form(graphed=True)
else:
    OPTIONS["--precision bf16"] = Form(bf16=True)
    OPTIONS["--precision bf16 --compile"] = Form(bf16=True, compiled=True)
WITHOUT_TIME = ("published form", "+ fused AdamW (timefast)")


class Step:
    """A model of its own and an optimizer; calling it trains one step and returns the losses."""

    def __init__(self, backbone: str, size: str, clips: int, form: Form, time_losses: bool):
        torch.manual_seed(0)
        options = {"head_dropout": 0.0} if backbone == "xvit" else {}
        self.model = create_model(
            backbone, num_classes=CLASSES, frames=FRAMES, patch_size=16, drop_path=0.0,
            impl=form.impl, time_heads=time_losses, **SIZES[size], **options,
        ).to(DEVICE)  # fmt: skip
        for module in self.model.modules():
            if isinstance(module, AddNorm):
                module.impl = form.norms
        self.optimizer = build_optimizer(self.model, OptimConfig())
        if not form.fused:
            self.optimizer = published.optimizer(self.model, self.optimizer)
        if form.again:
            checkpoint_activations(self.model, form.again)
        self.batch, self.order = _batch(size, clips)
        self.losses = _losses(self.model, form, time_losses)
        if form.compiled:
            self.losses = torch.compile(self.losses)
        self.autocast = (
            functools.partial(torch.autocast, DEVICE, torch.bfloat16) if form.bf16 else nullcontext
        )
        if form.graphed:  # captured on a batch of its own: a run copies each batch there, too
            example, _ = _batch(size, clips)
            self.losses = GraphedMethod(TimeMethod(self.model), example, self.autocast)

    def __call__(self) -> dict[str, Tensor]:
        self.optimizer.zero_grad(set_to_none=True)
        with self.autocast():
            losses = self.losses(self.batch, self.order)
        losses["total"].backward()
        self.optimizer.step()
        return {name: value.detach() for name, value in losses.items()}

    def kept_bytes(self) -> int:
        """What is kept between forward and backward, parameters and video left out."""
        with Allocations() as made, self.autocast():
            losses = self.losses(self.batch, self.order)  # noqa: F841, holds what it keeps
        return made.alive()


def _batch(size: str, clips: int) -> tuple[Batch, Tensor]:
    draw = torch.Generator().manual_seed(1)
    side = SIZES[size]["image_size"]
    flow = torch.randint(9, (clips, FRAMES - 1, (side // 16) ** 2), generator=draw)
    batch = Batch(
        video=torch.randn(clips, 3, FRAMES, side, side, generator=draw),
        label=torch.randint(CLASSES, (clips,), generator=draw),
        sample=torch.arange(clips),
        view=torch.zeros(clips, dtype=torch.int64),
        flow_label=flow,
    )
    return batch.to(DEVICE), torch.randperm(FRAMES, generator=draw).to(DEVICE)


def _losses(model: VideoTransformer, form: Form, time_losses: bool) -> Callable[..., Any]:
    if not form.own:
        return functools.partial(published.losses, model, time=time_losses, attend=form.attend)
    weights = (1.0, 1.0, 1.0) if time_losses else (0.0, 0.0, 0.0)
    of = model if form.passes == "one" else _TwoPasses(model, form.passes == "whole")
    return TimeMethod(of, weights=weights).training_loss  # type: ignore[arg-type]


class _TwoPasses(nn.Module):
    """A model that takes original and shuffled clips one after the other."""

    def __init__(self, model: VideoTransformer, whole: bool):
        super().__init__()
        self.model, self.whole = model, whole
        self.time_outputs = model.time_outputs

    def paired_outputs(
        self, video: Tensor, permutation: Tensor, **heads: bool
    ) -> tuple[Any, Tensor]:
        shuffled = video.index_select(2, permutation)
        if self.whole:
            other = self.model.classify(self.model.features(shuffled).cls)
        else:
            other = self.model(shuffled)
        return self.model.time_outputs(video, **heads), other


@functools.cache
def _published_step(backbone: str, size: str, clips: int, time_losses: bool) -> Step:
    """The published form with as many of the clips as fit."""
    try:
        step = Step(backbone, size, clips, WATERFALL["published form"], time_losses)
        step()
    except torch.OutOfMemoryError:
        torch.cuda.empty_cache()
        return _published_step(backbone, size, clips // 2, time_losses)
    return step


@functools.cache
def _published_losses(backbone: str, size: str, time_losses: bool) -> list[dict[str, Tensor]]:
    return _three_losses(backbone, size, WATERFALL["published form"], time_losses)


def _three_losses(
    backbone: str, size: str, form: Form, time_losses: bool
) -> list[dict[str, Tensor]]:
    clips = min(c for s, c in RUNS if s == size)
    step = Step(backbone, size, clips, form, time_losses)
    return [step() for _ in range(3)]


@functools.cache
def _flops(backbone: str, size: str, time_losses: bool) -> int:
    """Of the published form, per clip, a multiplication with its addition as two."""
    with torch.device("meta"):
        model = create_model(backbone, num_classes=CLASSES, frames=FRAMES, **SIZES[size])
        side = SIZES[size]["image_size"]
        batch = Batch(
            torch.empty(1, 3, FRAMES, side, side), torch.zeros(1, dtype=torch.int64),
            torch.zeros(1), torch.zeros(1),
            torch.zeros(1, FRAMES - 1, (side // 16) ** 2, dtype=torch.int64),
        )  # fmt: skip
        order = torch.arange(FRAMES)
        with FlopCounterMode(display=False) as counter:
            published.losses(model, batch, order, time=time_losses)["total"].backward()
    return counter.get_total_flops()


@functools.cache
def _matmul_rate(dtype: torch.dtype) -> float:
    """Operations per second of one large matrix product: what utilisation is a share of."""
    n = 8192 if ON_GPU else 1536
    a, b = torch.randn(2, n, n, device=DEVICE).to(dtype)
    seconds = []
    for _ in range(8):
        start = device_clock()
        a @ b
        seconds.append(device_clock() - start)
    return 2 * n**3 / min(seconds[2:])


def _cases() -> list[Any]:
    cases = []
    for size, clips in RUNS:
        for backbone in BACKBONES:
            for time_losses in (True, False):
                forms = {**WATERFALL, **OPTIONS} if time_losses else WITHOUT_TIME
                for name in forms:
                    label = f"{backbone}-{size}-{clips}-{'time' if time_losses else 'plain'}-{name}"
                    cases.append(pytest.param(backbone, size, clips, time_losses, name, id=label))
    return cases


@pytest.mark.parametrize(("backbone", "size", "clips", "time_losses", "name"), _cases())
def bench_train_step(
    benchmark: Any, backbone: str, size: str, clips: int, time_losses: bool, name: str
) -> None:
    form = {**WATERFALL, **OPTIONS}[name]
    dtype = torch.bfloat16 if form.bf16 else torch.float32
    try:
        ours = _three_losses(backbone, size, form, time_losses)
        error = _difference(ours, _published_losses(backbone, size, time_losses))
        limit = LIMITS[str(dtype).removeprefix("torch.")]
        assert error <= limit, f"losses are off by {error:.1e}, more than {limit:.1e}"
        step = Step(backbone, size, clips, form, time_losses)
        rival = _published_step(backbone, size, clips, time_losses)
        # what graphs keep is theirs for good: a replay allocates nothing that could be counted
        memory = None if form.graphed else _peak_memory(step)
        seen = not (form.graphed or form.compiled)  # by what counts the bytes kept
        rival_seconds: list[float] = []

        def let_the_rival_go_first() -> None:
            start = device_clock()
            rival()
            rival_seconds.append(device_clock() - start)

        benchmark.pedantic(step, setup=let_the_rival_go_first, rounds=ROUNDS, warmup_rounds=2)
    except torch.OutOfMemoryError:
        torch.cuda.empty_cache()
        pytest.skip(f"{clips} clips do not fit into this GPU in this form")
    except InductorError as error:
        pytest.skip(f"torch.compile does not build this here: {str(error).splitlines()[0]}")
    benchmark.extra_info.update(
        op="train_step", impl=name, case=f"{backbone}{' + TIME' if time_losses else ''}, {size}",
        dtype=str(dtype).removeprefix("torch."), direction="fwd+bwd", clips=clips,
        speedup=statistics.median(rival_seconds[2:]) / len(rival.batch.label)
        / (benchmark.stats.stats.median / clips),
        peak_memory=memory, kept_memory=step.kept_bytes() if seen else None, error=error,
        flops=clips * _flops(backbone, size, time_losses), matmul_rate=_matmul_rate(dtype),
        technique=name in WATERFALL,
    )  # fmt: skip


def _difference(ours: list[dict[str, Tensor]], theirs: list[dict[str, Tensor]]) -> float:
    """Largest relative difference of any loss in any step."""
    return max(
        float((step[name] - expected).abs() / expected.abs())
        for step, reference in zip(ours, theirs, strict=True)
        for name, expected in reference.items()
    )


def _peak_memory(step: Step) -> int | None:
    if not ON_GPU:
        return None
    torch.cuda.reset_peak_memory_stats()
    step()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated()
