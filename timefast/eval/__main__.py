"""Accuracy of a model on a data set: `python -m timefast.eval SOURCE --data DIR`.

SOURCE is a run folder of this project or a checkpoint file of any family `load_model` knows.
`--shuffled`, `--reversed` and `--single-frame` add what remains of the accuracy when the order of
frames is random, backwards, or when there is only one frame.
"""

import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from timefast.config import Parser
from timefast.errors import InputError
from timefast.eval.accuracy import predict, protocol, summarise, table
from timefast.eval.source import (
    account,
    add_loader_flags,
    add_source_flags,
    check_least,
    clips,
    exit_code,
    open_source,
    open_split,
    origin,
    parse_views,
    progress,
    refuse_not_finite,
    surroundings,
)
from timefast.log import to_console
from timefast.run_folder import write_json


def main(argv: Sequence[str] | None = None) -> int:
    parser = Parser(prog="python -m timefast.eval", description=__doc__)
    parser.add_argument("source", type=Path, help="run folder or checkpoint")
    parser.add_argument("--data", type=Path, help="data set folder (default: the run's own)")
    parser.add_argument("--split", default="validation", choices=("train", "validation"))
    parser.add_argument("--views", type=parse_views, metavar="TxS", help="temporal x spatial views")
    parser.add_argument("--shuffled", action="store_true", help="also with frames shuffled")
    parser.add_argument("--shuffles", type=int, default=3, help="random frame orders per video")
    parser.add_argument("--reversed", action="store_true", help="also with frames backwards")
    parser.add_argument(
        "--single-frame", action="store_true", help="also with the middle frame in all places"
    )
    parser.add_argument("--subset", help="temporal, static, or a file with one class name per line")
    parser.add_argument("--average", default="logits", choices=("logits", "softmax"))
    parser.add_argument(
        "--allow-missing", action="store_true", help="mark the numbers instead of refusing"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the numbers here")
    parser.add_argument("--seed", type=int, default=0, help="seed of the frame orders")
    add_loader_flags(parser)
    add_source_flags(parser)
    args = parser.parse_args(argv)
    to_console()
    return exit_code(lambda: evaluate(args))


def evaluate(args: Any) -> int:
    check_least(args, shuffles=1, seed=0)
    if args.json is not None and not args.json.parent.is_dir():
        raise InputError(f"--json {args.json}: there is no folder {args.json.parent}")
    source = open_source(args.source, args)
    views = args.views or source.views
    videos = open_split(source, args.data, args.split, args.subset)
    loader = clips(source, videos, args, views)
    predictions = predict(
        source.model,
        progress(loader.batches(0), len(loader), f"{args.split} videos"),
        views=views[0] * views[1],
        draws=args.shuffles if args.shuffled else 0,
        reverse=args.reversed,
        still=args.single_frame,
        seed=args.seed,
        average=args.average,
        device=source.device,
        autocast=source.autocast,
    )
    account(predictions.failures, predictions.notices, videos, args.allow_missing)
    refuse_not_finite(source, predictions.original)
    rows = {args.subset or "all": summarise(predictions, videos)}
    if args.subset is None:
        rows |= {name: summarise(predictions, videos, y) for name, y in videos.subsets.items()}
    spec = source.spec
    how = protocol(spec.frames, views, spec.crop, spec.test_short_side, args.average)
    print(f"{args.source} on {videos.root} ({videos.split})")
    print(f"{how}; {source.precision} on {source.device}")
    if args.shuffled:
        print(f"shuffled: mean of {args.shuffles} random frame orders per video, seed {args.seed}")
    print(table(rows))
    if args.json is not None:
        result = {
            **origin(source), "data": str(videos.root), "split": args.split,
            "videos": videos.fingerprint(), "subset": args.subset, "protocol": how,
            "average": args.average, "seed": args.seed,
            "shuffles": args.shuffles if args.shuffled else 0, "results": rows,
            "failures": [dataclasses.asdict(f) for f in predictions.failures], **surroundings(),
        }  # fmt: skip
        try:
            write_json(args.json, result)
        except OSError as error:
            raise InputError(f"--json {args.json}: cannot be written ({error.strerror})") from error
    return 0


if __name__ == "__main__":
    sys.exit(main())
