"""Which decoding pipeline feeds the model: `python -m timefast.info --pipeline DIR`.

Both pipelines make training batches of the videos in DIR on this machine, and the model trains on
clips that are there already; the rates say who waits for whom.
"""

import itertools
import logging
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, get_args

import torch

from timefast.data import open_videos
from timefast.data.batch import Batch, ClipSpec
from timefast.device import autocast_for, cores_of_this_process, device_name, pick_device
from timefast.pipelines.loader import ClipLoader

logger = logging.getLogger("timefast")

SECONDS = 20.0  # for each pipeline, after its first batch
BATCH = 16
Pipeline = Literal["cpu", "dali"]


def feeding(
    root: Path,
    *,
    spec: ClipSpec | None = None,
    seconds: float = SECONDS,
    model: Callable[[torch.device, ClipSpec], float] | None = None,
) -> dict[str, Any]:
    """Clips per second of each pipeline on the training videos in `root`, and of the model.

    `spec` is the recipe's for Something-Something v2 if none is given. Raises InputError.
    """
    device = pick_device("auto")
    spec = spec or ClipSpec()
    rates: dict[str, Any] = {}
    for pipeline in get_args(Pipeline):
        try:
            rates[pipeline] = _rate(root, spec, pipeline, device, seconds)
        except NotImplementedError as error:
            rates[pipeline] = {"problem": str(error)}
    return {
        "videos": str(root),
        "device": device_name(device),
        "cores": cores_of_this_process(),
        "clip": f"{spec.frames} frames of {spec.crop} x {spec.crop}",
        "pipelines": rates,
        "model": (model or model_rate)(device, spec),
    }


def _rate(
    root: Path, spec: ClipSpec, pipeline: Pipeline, device: torch.device, seconds: float
) -> dict[str, Any]:
    loader = ClipLoader(
        open_videos(root, "train"), spec, train=True, batch_size=BATCH, workers=None,
        pipeline=pipeline, device=device,
    )  # fmt: skip
    clips, begin, bad = 0, 0.0, 0
    for batch in itertools.chain.from_iterable(map(loader.batches, itertools.count())):
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        if not begin:  # the first pays for starting workers and reading libraries
            begin = time.perf_counter()
            continue
        clips += len(batch.label)
        bad += len(batch.failures)
        if (spent := time.perf_counter() - begin) > seconds:
            break
    loader.close()
    found = {"name": loader.pipeline, "workers": loader.workers, "clips_per_s": clips / spent}
    return {**found, "bad": bad}


def model_rate(device: torch.device, spec: ClipSpec) -> float:
    """Clips per second of training steps of TimeSformer-B with the losses of TIME."""
    from timefast.methods.time_ssl import TimeMethod
    from timefast.models import create_model

    clips, steps = (8, 6) if device.type == "cuda" else (1, 2)
    model = create_model(
        "timesformer", frames=spec.frames, image_size=spec.crop, patch_size=spec.patch_size,
        time_heads=True,
    ).to(device)  # fmt: skip
    method = TimeMethod(model)
    autocast, _ = autocast_for(device, "auto")
    patches = (spec.crop // spec.patch_size) ** 2
    batch = Batch(
        video=torch.randn(clips, 3, spec.frames, spec.crop, spec.crop),
        label=torch.zeros(clips, dtype=torch.int64),
        sample=torch.arange(clips),
        view=torch.zeros(clips, dtype=torch.int64),
        flow_label=torch.zeros(clips, spec.frames - 1, patches, dtype=torch.int64),
    ).to(device)
    order = torch.arange(spec.frames, device=device).flip(0)
    begin = 0.0
    for step in range(steps):
        if step == steps // 2:  # kernels are compiled by now
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            begin = time.perf_counter()
        with autocast():
            loss = method.training_loss(batch, order)["total"]
        loss.backward()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return clips * (steps - steps // 2) / (time.perf_counter() - begin)


def as_text(found: dict[str, Any]) -> str:
    """The rates, and which pipeline to take."""
    lines = [
        "", f"who feeds the model: training clips of {found['clip']} from {found['videos']}, "
        f"{found['device']}, {found['cores']} cores",
    ]  # fmt: skip
    rates = {}
    for pipeline, rate in found["pipelines"].items():
        if "problem" in rate:
            lines.append(f"  {pipeline:<8}{rate['problem']}")
            continue
        rates[pipeline] = rate["clips_per_s"]
        bad = f", {rate['bad']} videos could not be used" if rate["bad"] else ""
        lines.append(
            f"  {pipeline:<8}{rate['clips_per_s']:8.3g} clips/s   {rate['name']}, "
            f"{rate['workers']} worker processes{bad}"
        )
    lines.append(
        f"  {'model':<8}{found['model']:8.3g} clips/s   TimeSformer-B with TIME, forward and "
        "backward"
    )
    best = max(rates, key=rates.__getitem__)
    enough = [pipeline for pipeline, rate in rates.items() if rate >= found["model"]]
    if enough:
        # of two that feed it the one that leaves the GPU to the model
        take = "cpu" if "cpu" in enough else enough[0]
        lines.append(f"  take --pipeline {take}: it makes clips faster than the model takes them")
    else:
        lines.append(
            f"  take --pipeline {best}, the faster one; the model will wait for it "
            f"{1 - rates[best] / found['model']:.0%} of the time"
        )
    return "\n".join(lines)
