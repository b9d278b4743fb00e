"""Labels for video files: `python -m timefast.predict SOURCE VIDEO...`.

The best classes of each video with their probabilities: a table on a terminal; elsewhere lines of
file, rank, probability and class, apart by tabs; or one JSON object. A video that cannot be used is
named and the others go on; the exit code is then 1.
"""

import argparse
import json
import logging
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from timefast.config import Parser
from timefast.eval.accuracy import predict, protocol
from timefast.eval.source import (
    add_loader_flags,
    add_source_flags,
    check_least,
    class_names,
    exit_code,
    open_source,
    origin,
    parse_views,
    progress,
    refuse_not_finite,
    surroundings,
    video_batches,
)
from timefast.log import to_console

logger = logging.getLogger("timefast")


def main(argv: Sequence[str] | None = None) -> int:
    parser = Parser(prog="python -m timefast.predict", description=__doc__)
    parser.add_argument("source", type=Path, help="run folder or checkpoint")
    parser.add_argument("videos", type=Path, nargs="+", metavar="VIDEO", help="video files")
    parser.add_argument(
        "--labels", type=Path, metavar="FILE",
        help="class names: the labels file of Something-Something v2, or one name per line "
        "(default: the names in the checkpoint)",
    )  # fmt: skip
    parser.add_argument("--top", type=int, default=5, metavar="N", help="classes per video")
    parser.add_argument("--views", type=parse_views, metavar="TxS", help="temporal x spatial views")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead")
    add_loader_flags(parser)
    add_source_flags(parser)
    args = parser.parse_args(argv)
    to_console()
    return exit_code(lambda: run(args))


def run(args: argparse.Namespace) -> int:
    check_least(args, top=1, batch_size=1)
    source = open_source(args.source, args)
    names = class_names(source.model, args.labels)
    views = args.views or source.views
    size = max(1, args.batch_size // (views[0] * views[1]))
    batches = video_batches(
        source, args.videos, views, batch_size=size, workers=args.workers, pipeline=args.pipeline
    )
    predictions = predict(
        source.model,
        progress(batches, -(-len(args.videos) // size), "videos"),
        views=views[0] * views[1],
        device=source.device,
        autocast=source.autocast,
    )
    refuse_not_finite(source, predictions.original)
    found: dict[int, list[dict[str, Any]]] = {}
    best = predictions.original.topk(min(args.top, source.model.num_classes), dim=1)
    for sample, values, labels in zip(
        predictions.sample.tolist(), best.values.tolist(), best.indices.tolist(), strict=True
    ):
        found[sample] = [
            {"label": label, "class": names[label], "probability": value}
            for label, value in zip(labels, values, strict=True)
        ]
    for notice in predictions.notices:
        logger.warning("used: %s: %s, %s", notice.path, notice.kind, notice.reason)
    if args.json:
        spec = source.spec
        record = {
            **origin(source),
            "protocol": protocol(spec.frames, views, spec.crop, spec.test_short_side, "logits"),
            "videos": [
                {"video": str(args.videos[i]), "classes": best} for i, best in found.items()
            ],
            "failures": [
                {"video": f.path, "kind": f.kind, "reason": f.reason} for f in predictions.failures
            ],
            **surroundings(),
        }
        print(json.dumps(record, indent=1))
    else:
        show = as_table if sys.stdout.isatty() else as_lines
        for i, classes in found.items():
            print(show(str(args.videos[i]), classes))
    for failure in predictions.failures:
        logger.warning("not predicted: %s: %s, %s", failure.path, failure.kind, failure.reason)
    return 1 if predictions.failures else 0


def as_table(video: str, classes: list[dict[str, Any]]) -> str:
    """For people: the video, under it a line per class with a bar as long as it is probable."""
    lines = [video]
    for row in classes:
        bar = "█" * round(20 * row["probability"])
        lines.append(f"  {100 * row['probability']:5.1f} %  {bar:20s}  {row['class']}")
    return "\n".join(lines)


def as_lines(video: str, classes: list[dict[str, Any]]) -> str:
    """For programs: file, rank from 1, probability, class, apart by tabs."""
    return "\n".join(
        f"{video}\t{rank}\t{row['probability']:.6f}\t{row['class']}"
        for rank, row in enumerate(classes, 1)
    )


if __name__ == "__main__":
    sys.exit(main())
