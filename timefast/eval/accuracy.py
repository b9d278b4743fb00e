"""Accuracy on original videos, and on the same with frames shuffled, backwards or all alike, over
any number of views.

Nothing is ever substituted here: a video that cannot be decoded is missing from the numbers, is
counted, and marks them.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, fields
from typing import Any, Literal

import torch
from torch import nn

from timefast.data.batch import Batch, Failure, VideoSet
from timefast.data.rng import generator

Average = Literal["logits", "softmax"]


@dataclass(frozen=True)
class Predictions:
    """Class probabilities of n videos, views averaged."""

    sample: torch.Tensor  # int64 [n], index into VideoSet.records
    label: torch.Tensor  # int64 [n]
    original: torch.Tensor  # float32 [n, K]
    shuffled: torch.Tensor  # float32 [draws, n, K], each draw another frame order per video
    failures: tuple[Failure, ...] = ()
    notices: tuple[Failure, ...] = ()  # videos in the numbers, but short or with equal views
    reversed: torch.Tensor | None = None  # float32 [n, K], frames from last to first
    still: torch.Tensor | None = None  # float32 [n, K], the middle frame of the clip T times


def predict(
    model: nn.Module,
    batches: Iterable[Batch],
    *,
    views: int,
    draws: int = 0,
    reverse: bool = False,
    still: bool = False,
    seed: int = 0,
    average: Average = "logits",
    device: torch.device | str = "cpu",
    autocast: Callable[[], Any] | None = None,
) -> Predictions:
    """Run the model over evaluation batches.

    `views` clips of a video stand together in a batch. Each of the `draws` frame orders is a
    function of (seed, draw, video): it does not depend on the batch a video is in, and is the same
    for all views of a video. `reverse` and `still` ask for the frames from last to first, and for
    the middle frame alone. `average` says what is averaged over views.
    """
    was_training = model.training
    model.eval()
    samples, labels, failures, notices = [], [], [], []
    originals: list[torch.Tensor] = []
    shuffled: list[list[torch.Tensor]] = [[] for _ in range(draws)]
    backwards: list[torch.Tensor] = []
    stills: list[torch.Tensor] = []
    try:
        with torch.inference_mode():
            for batch in batches:
                failures += batch.failures
                notices += batch.notices
                if not len(batch.label):
                    continue
                batch = batch.to(device)

                def score(video: torch.Tensor) -> torch.Tensor:  # [B, 3, T, h, w] -> [B / V, K]
                    if autocast is None:
                        logits = model(video)
                    else:
                        with autocast():
                            logits = model(video)
                    logits = logits.float().unflatten(0, (-1, views))
                    if average == "logits":
                        return logits.mean(1).softmax(-1).cpu()
                    return logits.softmax(-1).mean(1).cpu()

                samples.append(batch.sample[::views].cpu())
                labels.append(batch.label[::views].cpu())
                originals.append(score(batch.video))
                for draw in range(draws):
                    shuffled[draw].append(score(_shuffle(batch, seed, draw)))
                if reverse:
                    backwards.append(score(batch.video.flip(2)))
                if still:
                    stills.append(score(_middle_frame(batch.video)))
    finally:
        model.train(was_training)
    classes = getattr(model, "num_classes", 0)

    def stacked(parts: list[torch.Tensor], *empty: int) -> torch.Tensor:
        return torch.cat(parts) if parts else torch.zeros(*empty)

    none = stacked(originals, 0, classes)
    return Predictions(
        sample=stacked(samples, 0).long(),
        label=stacked(labels, 0).long(),
        original=none,
        shuffled=torch.stack([stacked(s, 0, classes) for s in shuffled])
        if draws
        else none.new_zeros(0, *none.shape),
        failures=tuple(failures),
        notices=tuple(notices),
        reversed=stacked(backwards, 0, classes) if reverse else None,
        still=stacked(stills, 0, classes) if still else None,
    )


def joined(parts: Sequence[Predictions], videos: int) -> Predictions:
    """The predictions of all processes as one, without those on `stand_in` clips, whose number is
    that of no video."""
    values: dict[str, Any] = {}
    for name in (field.name for field in fields(Predictions)):
        of_all = []
        for part in parts:
            value = getattr(part, name)
            if isinstance(value, torch.Tensor):
                keep = part.sample < videos
                value = value[:, keep] if name == "shuffled" else value[keep]
            of_all.append(value)
        if isinstance(of_all[0], torch.Tensor):
            values[name] = torch.cat(of_all, 1 if name == "shuffled" else 0)
        else:
            values[name] = None if of_all[0] is None else sum(of_all, ())
    return Predictions(**values)


def _middle_frame(video: torch.Tensor) -> torch.Tensor:
    middle = (video.shape[2] - 1) // 2
    return video[:, :, middle : middle + 1].expand_as(video)


def _shuffle(batch: Batch, seed: int, draw: int) -> torch.Tensor:
    frames = batch.video.shape[2]
    orders = [
        torch.from_numpy(generator(seed, draw, int(i), "shuffle").permutation(frames))
        for i in batch.sample
    ]
    order = torch.stack(orders).to(batch.video.device)  # [B, T]
    rows = torch.arange(len(order), device=order.device)[:, None]
    return batch.video.transpose(1, 2)[rows, order].transpose(1, 2)


def summarise(
    predictions: Predictions, videos: VideoSet, labels: tuple[int, ...] | None = None
) -> dict[str, Any]:
    """Percentages over the videos whose class is in `labels` (None: all).

    Keys: videos_expected, videos_evaluated, videos_failed, top1, top5, confidence (mean largest
    probability, 0..1), and with draws shuffled_top1, shuffled_top1_spread (sample standard
    deviation over draws), shuffled_top5, shuffled_confidence, gap; reversed_top1 and still_top1 if
    they were asked for. Numbers of nothing are None, as is the confidence of a model whose answers
    are not finite.
    """
    wanted = set(range(len(videos.classes)) if labels is None else labels)
    keep = torch.tensor([int(y) in wanted for y in predictions.label], dtype=torch.bool)
    label = predictions.label[keep]
    expected = sum(r.label in wanted for r in videos.records)
    result: dict[str, Any] = {
        "videos_expected": expected,
        "videos_evaluated": len(label),
        "videos_failed": expected - len(label),
        "top1": None,
        "top5": None,
        "confidence": None,
        "shuffled_top1": None,
        "shuffled_top1_spread": None,
        "shuffled_top5": None,
        "shuffled_confidence": None,
        "gap": None,
        "reversed_top1": None,
        "still_top1": None,
    }
    if not len(label):
        return result
    original = predictions.original[keep]
    result["top1"] = _top(original, label, 1).item()
    result["top5"] = _top(original, label, 5).item()
    result["confidence"] = original.max(1).values.mean().item()
    if len(predictions.shuffled):
        shuffled = predictions.shuffled[:, keep]  # [draws, n, K]
        draws = _top(shuffled, label, 1)
        result["shuffled_top1"] = draws.mean().item()
        if len(draws) > 1:
            result["shuffled_top1_spread"] = draws.std().item()
        result["shuffled_top5"] = _top(shuffled, label, 5).mean().item()
        result["shuffled_confidence"] = shuffled.max(2).values.mean().item()
        result["gap"] = result["top1"] - result["shuffled_top1"]
    for name, changed in (("reversed", predictions.reversed), ("still", predictions.still)):
        if changed is not None:
            result[f"{name}_top1"] = _top(changed[keep], label, 1).item()
    return {k: v if v is not None and math.isfinite(v) else None for k, v in result.items()}


def _top(probabilities: torch.Tensor, label: torch.Tensor, k: int) -> torch.Tensor:
    """probabilities [..., n, K], label [n] -> percent [...] of videos with it among the best k."""
    best = probabilities.topk(min(k, probabilities.shape[-1]), dim=-1).indices
    return 100.0 * (best == label[:, None]).any(-1).double().mean(-1)


def protocol(
    frames: int, views: tuple[int, int], crop: int, short_side: int, average: Average
) -> str:
    """How a number was made, in the words of every results table.

    `paper` is the test protocol of the published recipe (one temporal view, three crops, logits);
    anything else is `clip`.
    """
    paper = views == (1, 3) and average == "logits"
    return (
        f"{'paper' if paper else 'clip'}: {frames} frames x {views[0]} temporal views x "
        f"{views[1]} crops of {crop} px, short side {short_side}, {average} averaged"
    )


def table(rows: dict[str, dict[str, Any]]) -> str:
    """A plain-text table of `summarise` results, one row per subset, without empty columns."""

    head = (
        "", "videos", "top-1", "top-5", "shuffled", "top-5", "gap", "reversed", "one frame",
        "confidence", "shuffled conf.",
    )  # fmt: skip
    lines = [head]
    for name, r in rows.items():
        mark = "" if not r["videos_failed"] else "*"

        def number(value: float | None, digits: int = 1, after: str = mark) -> str:
            return "" if value is None else f"{value:.{digits}f}{after}"

        spread = number(r["shuffled_top1_spread"])
        lines.append((
            name,
            f"{r['videos_evaluated']}/{r['videos_expected']}",
            number(r["top1"]) or f"-{mark}",
            number(r["top5"]) or f"-{mark}",
            f"{number(r['shuffled_top1'], after='')} ±{spread}" if spread
            else number(r["shuffled_top1"]),
            number(r["shuffled_top5"]),
            number(r["gap"]),
            number(r["reversed_top1"]),
            number(r["still_top1"]),
            number(r["confidence"], 2),
            number(r["shuffled_confidence"], 2),
        ))  # fmt: skip
    filled = [i for i in range(len(head)) if any(line[i] for line in lines[1:])]
    widths = [max(len(line[i]) for line in lines) for i in filled]
    text = [
        "  ".join(line[i].rjust(w) for i, w in zip(filled, widths, strict=True)) for line in lines
    ]
    if any(r["videos_failed"] for r in rows.values()):
        text.append("* some videos could not be decoded and are missing from this number")
    return "\n".join(text)
