"""What shuffling takes from the confidence: `python -m timefast.confidence SOURCE --data DIR`.

Confidence is the largest class probability; the gap of a video is its confidence with the frames in
order minus that with the frames shuffled. Shows the share of videos in each of 20 bins of the gap
(figure 1c of the TIME paper). Writes confidence.json and confidence.png.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from timefast.charts import save_confidence
from timefast.config import Parser
from timefast.errors import InputError
from timefast.eval.accuracy import Predictions, predict, protocol
from timefast.eval.source import (
    Source,
    account,
    add_loader_flags,
    add_source_flags,
    check_least,
    clips,
    compare,
    exit_code,
    open_split,
    origin,
    parse_views,
    progress,
    refuse_not_finite,
    written,
)
from timefast.log import to_console

BINS = 20  # of equal width over all possible gaps, -1 to 1


def main(argv: Sequence[str] | None = None) -> int:
    parser = Parser(prog="python -m timefast.confidence", description=__doc__)
    parser.add_argument("source", type=Path, help="run folder or checkpoint")
    parser.add_argument(
        "--beside", type=Path, action="append", default=[], metavar="SOURCE",
        help="another model for the same chart; may be given again",
    )  # fmt: skip
    parser.add_argument("--data", type=Path, help="data set folder (default: the run's own)")
    parser.add_argument("--subset", help="temporal, static, or a file with one class name per line")
    parser.add_argument("--views", type=parse_views, metavar="TxS", help="temporal x spatial views")
    parser.add_argument("--shuffles", type=int, default=3, help="random frame orders per video")
    parser.add_argument("--seed", type=int, default=0, help="seed of the frame orders")
    parser.add_argument(
        "--allow-missing", action="store_true", help="go on without videos that do not decode"
    )
    parser.add_argument(
        "--out", type=Path, metavar="DIR", help="folder to write to (default: analysis/ of the run)"
    )
    add_loader_flags(parser)
    add_source_flags(parser)
    args = parser.parse_args(argv)
    to_console()
    return exit_code(lambda: run(args))


def run(args: argparse.Namespace) -> int:
    check_least(args, shuffles=1, seed=0)
    folder, record = compare("confidence", args, lambda source: measure(source, args))
    save_confidence(record, folder / "confidence.png")
    print(as_text(record))
    print(written(folder, [folder / "confidence.json", folder / "confidence.png"]))
    return 0


def measure(source: Source, args: argparse.Namespace) -> dict[str, Any]:
    """The record of one model."""
    videos = open_split(source, args.data, "validation", args.subset)
    views = args.views or source.views
    loader = clips(source, videos, args, views)
    predictions = predict(
        source.model,
        progress(loader.batches(0), len(loader), "validation videos"),
        views=views[0] * views[1],
        draws=args.shuffles,
        seed=args.seed,
        device=source.device,
        autocast=source.autocast,
    )
    loader.close()
    account(predictions.failures, predictions.notices, videos, args.allow_missing)
    refuse_not_finite(source, predictions.original)
    if not len(predictions.label):
        raise InputError(f"no video of {videos.root} can be decoded")
    spec = source.spec
    how = protocol(spec.frames, views, spec.crop, spec.test_short_side, "logits")
    return {
        **origin(source),
        "data": str(videos.root),
        "subset": args.subset,
        "protocol": f"{how}; {args.shuffles} random frame orders per video",
        "seed": args.seed,
        "shuffles": args.shuffles,
        "videos_expected": len(videos.records),
        "videos_evaluated": len(predictions.label),
        **histogram(predictions),
    }


def histogram(predictions: Predictions) -> dict[str, Any]:
    """Bins of the confidence gap. mass[i] is the share of videos, mean over frame orders, whose gap
    is in edges[i] <= gap < edges[i+1] (the last bin holds 1 too); mass_spread its sample standard
    deviation over frame orders, None with one."""
    original = predictions.original.double().amax(-1)  # [n]
    shuffled = predictions.shuffled.double().amax(-1)  # [draws, n]
    gap = original - shuffled
    place = ((gap + 1) / 2 * BINS).long().clamp(0, BINS - 1)
    mass = torch.stack([torch.bincount(row, minlength=BINS) / row.numel() for row in place])
    return {
        "edges": [round(2 * i / BINS - 1, 10) for i in range(BINS + 1)],
        "mass": mass.double().mean(0).tolist(),
        "mass_spread": mass.double().std(0).tolist() if len(mass) > 1 else None,
        "gap": gap.mean().item(),
        "confidence": original.mean().item(),
        "shuffled_confidence": shuffled.mean().item(),
    }


def as_text(record: dict[str, Any]) -> str:
    lines = []
    for model in record["models"]:
        lines.append(f"{model['source']}: {model['protocol']}")
        lines.append(
            f"  {model['videos_evaluated']}/{model['videos_expected']} videos, mean confidence "
            f"{model['confidence']:.3f} in order, {model['shuffled_confidence']:.3f} shuffled, "
            f"gap {model['gap']:+.3f}"
        )
        for low, high, mass in zip(
            model["edges"], model["edges"][1:], model["mass"], strict=False
        ):  # fmt: skip
            if mass:
                lines.append(f"  gap {low:+.1f} to {high:+.1f}  {100 * mass:5.1f} % of the videos")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
