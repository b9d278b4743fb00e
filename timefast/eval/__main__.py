"""Accuracy of a model on a data set: `python -m timefast.eval SOURCE --data DIR`.

SOURCE is a run folder of this project or a checkpoint file of any family `load_model` knows.
"""

import argparse
import dataclasses
import logging
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from timefast.config import Parser
from timefast.data import open_videos
from timefast.data.annotation import read_json, read_text
from timefast.data.batch import ClipSpec, Failure, VideoSet
from timefast.device import autocast_for, check_impl, pick_device
from timefast.errors import InputError
from timefast.eval.accuracy import predict, protocol, summarise, table
from timefast.log import to_console
from timefast.pipelines.loader import ClipLoader
from timefast.run_folder import write_json
from timefast.weights import load_model

logger = logging.getLogger("timefast")


def main(argv: Sequence[str] | None = None) -> int:
    parser = Parser(prog="python -m timefast.eval", description=__doc__)
    parser.add_argument("source", type=Path, help="run folder or checkpoint file")
    parser.add_argument("--data", type=Path, help="data set folder (default: the run's own)")
    parser.add_argument("--split", default="validation", choices=("train", "validation"))
    parser.add_argument("--views", type=_views, metavar="TxS", help="temporal x spatial views")
    parser.add_argument("--shuffled", action="store_true", help="also with frames shuffled")
    parser.add_argument("--shuffles", type=int, default=3, help="frame orders per video")
    parser.add_argument("--subset", help="temporal, static, or a file with one class name per line")
    parser.add_argument("--average", default="logits", choices=("logits", "softmax"))
    parser.add_argument(
        "--allow-missing", action="store_true", help="mark the numbers instead of refusing"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the numbers here")
    parser.add_argument("--batch-size", type=int, default=16, help="clips per forward pass")
    parser.add_argument("--workers", type=int, help="decoding processes")
    parser.add_argument("--pipeline", default="auto", choices=("auto", "dali", "cpu"))
    parser.add_argument("--device", default="auto")
    parser.add_argument("--precision", default="auto", choices=("auto", "fp32", "bf16", "fp16"))
    parser.add_argument("--impl", default="auto", help="implementation of the attention ops")
    parser.add_argument("--seed", type=int, default=0, help="seed of the frame orders")
    try:
        args = parser.parse_args(argv)
        to_console()
        return evaluate(args)
    except (InputError, NotImplementedError) as error:  # the latter: an --impl that cannot run
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted; nothing was written", file=sys.stderr)
        return 130


def evaluate(args: Any) -> int:
    for flag, least in (("batch_size", 1), ("shuffles", 1), ("seed", 0)):
        if getattr(args, flag) < least:
            name = flag.replace("_", "-")
            raise InputError(f"--{name}: expected at least {least}, got {getattr(args, flag)}")
    if args.json is not None and not args.json.parent.is_dir():
        raise InputError(f"--json {args.json}: there is no folder {args.json.parent}")
    check_impl(args.impl)
    device = pick_device(args.device)
    autocast, precision = autocast_for(device, args.precision)
    model = load_model(args.source, impl=args.impl).to(device).eval()
    spec, views, root = _as_trained(args.source, model)
    views = args.views or views
    root = args.data or root
    if root is None:
        raise InputError(
            f"{args.source} does not say which data it belongs to; name it with --data"
        )
    videos = open_videos(root, args.split)
    if len(videos.classes) != model.num_classes:
        raise InputError(
            f"{root} has {len(videos.classes)} classes, the model of {args.source} has "
            f"{model.num_classes}; evaluate on the data it was trained for"
        )
    if model.classes is not None and tuple(model.classes) != videos.classes:
        label = next(i for i, name in enumerate(videos.classes) if name != model.classes[i])
        raise InputError(
            f"{root} numbers its classes otherwise than the data {args.source} was trained on: "
            f"{label} is {videos.classes[label]!r} there, {model.classes[label]!r} in the model"
        )
    subset = None if args.subset is None else _subset(args.subset, videos)
    if subset is not None:  # only these videos are decoded
        kept = tuple(r for r in videos.records if r.label in subset)
        videos = dataclasses.replace(videos, records=kept)
    loader = ClipLoader(
        videos,
        spec,
        train=False,
        batch_size=max(1, args.batch_size // (views[0] * views[1])),
        seed=args.seed,
        workers=args.workers,
        pipeline=args.pipeline,
        device=device,
        views=views,
    )
    predictions = predict(
        model,
        tqdm(loader.batches(0), "evaluating", len(loader), disable=None, leave=False),
        views=views[0] * views[1],
        draws=args.shuffles if args.shuffled else 0,
        seed=args.seed,
        average=args.average,
        device=device,
        autocast=autocast,
    )
    for failure in predictions.failures:
        logger.warning("not evaluated: %s: %s, %s", failure.path, failure.kind, failure.reason)
    _log_notices(predictions.notices)
    if predictions.failures and not args.allow_missing:
        raise InputError(
            f"{len(predictions.failures)} of {len(videos.records)} videos could not be decoded "
            "(listed above), so these numbers would not be comparable. Repair the files, or print "
            "marked numbers with --allow-missing."
        )
    rows = {args.subset or "all": summarise(predictions, videos)}
    if args.subset is None:
        rows |= {name: summarise(predictions, videos, y) for name, y in videos.subsets.items()}
    how = protocol(spec.frames, views, spec.crop, spec.test_short_side, args.average)
    print(f"{args.source} on {videos.root} ({videos.split})\n{how}; {precision} on {device}")
    if args.shuffled:
        print(f"shuffled: mean of {args.shuffles} random frame orders per video, seed {args.seed}")
    print(table(rows))
    if args.json is not None:
        result = {
            "source": str(args.source), "data": str(root), "split": args.split, "protocol": how,
            "average": args.average, "precision": precision, "seed": args.seed,
            "shuffles": args.shuffles if args.shuffled else 0, "results": rows,
            "failures": [dataclasses.asdict(f) for f in predictions.failures],
        }  # fmt: skip
        try:
            write_json(args.json, result)
        except OSError as error:
            raise InputError(f"--json {args.json}: cannot be written ({error.strerror})") from error
    return 0


def _log_notices(notices: Sequence[Failure]) -> None:
    """Per kind how many videos are in the numbers but not quite as asked for, and the first."""
    for kind in dict.fromkeys(notice.kind for notice in notices):
        same = [notice for notice in notices if notice.kind == kind]
        logger.warning(
            "evaluated, but %s: %d videos, the first %s (%s)",
            kind, len(same), same[0].path, same[0].reason,
        )  # fmt: skip


def _as_trained(source: Path, model: Any) -> tuple[ClipSpec, tuple[int, int], Path | None]:
    """Clip, views and data folder of a run; for a bare checkpoint what its model implies."""
    source = source.absolute()
    for folder in (source, *source.parents[:3]):  # RUN, RUN/checkpoints/step-<n>, a file in that
        stored = read_json(folder / "config.json") if (folder / "config.json").is_file() else None
        if isinstance(stored, dict) and "clip" in stored:
            clip: dict[str, Any] = {
                k: tuple(v) if isinstance(v, list) else v for k, v in stored["clip"].items()
            }
            spec = dataclasses.replace(ClipSpec(**clip), flow_rule=None, flow_tau=None)
            config = stored["config"]
            return spec, tuple(config["run"]["views"]), Path(config["data"]["root"])
    size = model.config["image_size"]
    spec = ClipSpec(
        frames=model.frames,
        crop=size,
        test_short_side=size,
        rand_augment=None,
        mean=tuple(model.normalisation["mean"]),
        std=tuple(model.normalisation["std"]),
        flow_rule=None,
    )
    return spec, (1, 3), None


def _views(text: str) -> tuple[int, int]:
    temporal, _, spatial = text.partition("x")
    if not (temporal.isdigit() and spatial.isdigit() and int(temporal) and spatial in ("1", "3")):
        raise argparse.ArgumentTypeError(f"{text!r}: expected TxS like 1x3, with S 1 or 3")
    return int(temporal), int(spatial)


def _subset(name: str, videos: VideoSet) -> tuple[int, ...]:
    """Labels of a named subset, or of the class names in a file."""
    if name in videos.subsets:
        return videos.subsets[name]
    file = Path(name)
    if not file.is_file():
        known = ", ".join(videos.subsets) or "none here"
        raise InputError(f"--subset {name}: neither a file nor a subset of this data set ({known})")
    wanted = [line.strip() for line in read_text(file).splitlines() if line.strip()]
    labels = {name: i for i, name in enumerate(videos.classes)}
    unknown = [w for w in wanted if w not in labels]
    if unknown or not wanted:
        raise InputError(
            f"--subset {file}: not class names of {videos.root}: {unknown[:3] or 'empty file'}"
        )
    return tuple(labels[w] for w in wanted)


if __name__ == "__main__":
    sys.exit(main())
