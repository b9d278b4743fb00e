"""The part of a run's report that shows videos: frames, flow directions, frame order, classes.

Everything is drawn from the newest checkpoint and the first validation videos of a few classes.

Legend: B clips, T frames, N patches per frame (row-major), K classes.
"""

import base64
import io
import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from timefast.checkpoint import list_checkpoints

logger = logging.getLogger("timefast")
CLIPS = 4  # videos shown


@dataclass(frozen=True)
class Guess:
    name: str
    probability: float


@dataclass(frozen=True)
class Arrows:
    """Flow directions of one frame as two SVG paths: those that agree with the truth, and not."""

    right: str
    wrong: str = ""


@dataclass(frozen=True)
class ClipStrip:
    """One video as the model sees it; lists have an entry per frame (flow: per frame pair)."""

    id: str
    true_class: str
    original: Guess
    shuffled: Guess
    size: tuple[int, int]  # height, width in pixels
    columns: int  # patches in a row
    frames: list[str]  # data URIs
    order: list[int] = field(default_factory=list)  # predicted position of each frame, from 0
    true_flow: list[Arrows] = field(default_factory=list)
    flow: list[Arrows] = field(default_factory=list)
    flow_right: float | None = None  # share of patches, in percent


def clip_strips(run_dir: Path, config: dict[str, Any]) -> tuple[list[ClipStrip], str | None]:
    """Frames and predictions of a few validation videos, or the reason why there are none."""
    if not list_checkpoints(run_dir):
        return [], f"There is no complete checkpoint in {run_dir / 'checkpoints'}."
    root = config.get("config", {}).get("data", {}).get("root")
    if not root or not Path(root).exists():
        return [], f"The videos are not here: {root} does not exist on this machine."
    # a page about a run must not be lost to what became of its files: the reason goes into the page
    try:
        with torch.inference_mode():
            strips = _predict_clips(run_dir, config, Path(root))
    except (OSError, ValueError, KeyError, ImportError, RuntimeError, SafetensorError) as error:
        logger.warning("report without clips: %s", error)
        return [], f"Checkpoint or videos could not be used: {type(error).__name__}: {error}"
    return strips, None if strips else f"No video of {root} could be read."


def _predict_clips(run_dir: Path, config: dict[str, Any], root: Path) -> list[ClipStrip]:
    from timefast import load_model, ops
    from timefast.data import open_videos
    from timefast.data.batch import ClipSpec
    from timefast.data.rng import generator
    from timefast.pipelines.loader import ClipLoader

    clip: dict[str, Any] = {
        k: tuple(v) if isinstance(v, list) else v for k, v in config["clip"].items()
    }
    spec = ClipSpec(**(clip | {"flow_rule": None, "flow_tau": None}))
    videos = open_videos(root, "validation")
    records = _choose(videos.records, config.get("subsets") or videos.subsets)
    model = load_model(run_dir, impl="auto").eval()
    trained = config["config"]["method"]["losses"]
    classes = config.get("classes") or videos.classes

    def guess(logits: torch.Tensor) -> Guess:  # [1, K]
        probability, label = logits[0].float().softmax(-1).max(-1)
        return Guess(classes[int(label)], float(probability))

    strips = []
    chosen = replace(videos, records=tuple(records))
    for batch in ClipLoader(chosen, spec, train=False, batch_size=1).batches(0):
        if not len(batch.label):
            continue
        video, sample = batch.video, int(batch.sample[0])  # [1, 3, T, height, width]
        shuffle = torch.as_tensor(generator(0, 0, sample, "report").permutation(video.shape[2]))
        strip = ClipStrip(
            id=records[sample].id,
            true_class=classes[records[sample].label],
            original=guess(model(video)),
            shuffled=guess(model(video[:, :, shuffle])),
            size=(video.shape[3], video.shape[4]),
            columns=video.shape[4] // spec.patch_size,
            frames=pictures(video[0], spec.mean, spec.std),
        )
        if "order" in trained or "flow" in trained:
            out = model.time_outputs(video)
            tube = video.shape[2] // out.tokens.shape[1]  # frames per token
            strip = replace(strip, frames=strip.frames[::tube])
        if "order" in trained and out.order is not None:
            strip = replace(strip, order=out.order[0].argmax(-1).tolist())
        if "flow" in trained and out.flow is not None:
            truth = ops.flow_labels(
                video[:, :, ::tube], patch_size=spec.patch_size, rule=clip["flow_rule"],
                tau=clip["flow_tau"], mean=spec.mean, std=spec.std,
            )[0].tolist()  # fmt: skip
            strip = with_flow(strip, out.flow[0].argmax(-1).tolist(), truth)
        strips.append(strip)
    return strips


def with_flow(
    strip: ClipStrip, predicted: Sequence[Sequence[int]], truth: Sequence[Sequence[int]]
) -> ClipStrip:
    """Add flow labels [T-1][N], 0..8, to a clip."""
    patch = strip.size[1] // strip.columns
    pairs = [pair for p, t in zip(predicted, truth, strict=True) for pair in zip(p, t, strict=True)]
    return replace(
        strip,
        true_flow=[arrows(t, t, strip.columns, patch) for t in truth],
        flow=[arrows(p, t, strip.columns, patch) for p, t in zip(predicted, truth, strict=True)],
        flow_right=100 * sum(p == t for p, t in pairs) / len(pairs),
    )


def _choose(records: Sequence[Any], subsets: Mapping[str, Sequence[int]]) -> list[Any]:
    """First videos of a few classes: two neighbouring temporal ones, another, a static one."""
    present = {r.label: r for r in reversed(records)}
    temporal = [label for label in subsets.get("temporal", ()) if label in present]
    static = [label for label in subsets.get("static", ()) if label in present]
    picks = [*temporal[:2], *temporal[len(temporal) // 2 :][:1], *static[:1]]
    labels = sorted(present)
    picks += labels[:: max(1, len(labels) // CLIPS)]
    return [present[label] for label in list(dict.fromkeys(picks))[:CLIPS]]


def pictures(video: Any, mean: Sequence[float], std: Sequence[float]) -> list[str]:
    """Normalised video [3, T, height, width] -> T JPEG pictures as data URIs."""
    from PIL import Image

    uris = []
    for frame in video.float().cpu().permute(1, 2, 3, 0).numpy():  # [height, width, 3]
        grey = ((frame * std + mean) * 255).round().clip(0, 255).astype("uint8")
        buffer = io.BytesIO()
        Image.fromarray(grey).save(buffer, "JPEG", quality=88)
        uris.append("data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode())
    return uris


def arrows(labels: Sequence[int], truth: Sequence[int], columns: int, patch: int) -> Arrows:
    """Draw N labels 0..8 of one frame: k is an arrow at 45 k - 22.5 degrees, y down.

    A still patch (0) is left empty, or gets a cross if it moves in truth.
    """
    drawn: dict[bool, list[str]] = {True: [], False: []}
    for n, (label, true) in enumerate(zip(labels, truth, strict=True)):
        x, y = (n % columns + 0.5) * patch, (n // columns + 0.5) * patch
        path = _cross(x, y, 0.1 * patch) if true else ""
        if label:
            tail, tip, left, right = (
                f"{x + reach * patch * math.cos(turn):.1f} {y + reach * patch * math.sin(turn):.1f}"
                for reach, turn in _arrow_points(math.radians(45 * label - 22.5))
            )
            path = f"M{tail}L{tip}M{left}L{tip}L{right}"
        drawn[label == true].append(path)
    return Arrows("".join(drawn[True]), "".join(drawn[False]))


def _cross(x: float, y: float, r: float) -> str:
    return (
        f"M{x - r:.1f} {y - r:.1f}l{2 * r:.1f} {2 * r:.1f}m0 {-2 * r:.1f}l{-2 * r:.1f} {2 * r:.1f}"
    )


def _arrow_points(angle: float) -> tuple[tuple[float, float], ...]:
    """Tail, tip and both barbs as (distance from the patch centre in patches, direction)."""
    return (0.36, angle + math.pi), (0.36, angle), (0.27, angle + 1.4), (0.27, angle - 1.4)
