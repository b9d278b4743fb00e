"""What a command looks at: a run folder of this project or a checkpoint of any family, and the
clips and data that belong to it. Shared by eval, probe, confidence, gradcam, predict and export.
"""

import argparse
import dataclasses
import json
import logging
import os
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from timefast.data import open_videos
from timefast.data.annotation import read_json, read_text
from timefast.data.batch import Batch, ClipSpec, Failure, Record, VideoSet
from timefast.data.subsets import labels_of, restrict
from timefast.device import autocast_for, check_impl, pick_device
from timefast.errors import InputError, RunError
from timefast.models import VideoTransformer
from timefast.pipelines.loader import ClipLoader
from timefast.run_folder import git_commit, versions, write_json
from timefast.weights import load_model

logger = logging.getLogger("timefast")


@dataclass(frozen=True)
class Source:
    """A model on its device, in evaluation mode, and how its clips are made."""

    path: Path
    model: VideoTransformer
    spec: ClipSpec  # without flow labels
    views: tuple[int, int]  # temporal x spatial
    run: Path | None  # the run folder it is or lies in
    root: Path | None  # the data set of that run
    few_classes: bool  # the run was trained on some of its classes alone, those in model.classes
    device: torch.device
    autocast: Callable[[], Any]
    precision: str


def add_source_flags(parser: argparse.ArgumentParser) -> None:
    """The flags that `open_source` reads."""
    add_model_flags(parser)
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, ...")
    parser.add_argument("--precision", default="auto", choices=("auto", "fp32", "bf16", "fp16"))
    parser.add_argument(
        "--impl",
        default="auto",
        help="implementation of the ops: auto, triton, cpu or reference",
    )


def add_model_flags(parser: argparse.ArgumentParser) -> None:
    """The flags that `model_keywords` reads."""
    group = parser.add_argument_group(
        "what the weights do not tell, or another size that their tables are resized to"
    )
    group.add_argument("--frames", type=int, metavar="N", help="input frames of a clip")
    group.add_argument("--image-size", type=int, nargs=2, metavar=("H", "W"), help="pixels")
    group.add_argument("--heads", type=int, help="attention heads, if their width is not 64")
    group.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE",
        help="any other keyword of timefast.load_model, for example shift_segments=8",
    )  # fmt: skip


def model_keywords(args: Any) -> dict[str, Any]:
    """Keywords of `load_model` from the flags of `add_model_flags`; those not given are absent."""
    told = {"frames": args.frames, "image_size": args.image_size, "heads": args.heads}
    for pair in args.set:
        key, equals, text = pair.partition("=")
        if not (key and equals):
            raise InputError(f"--set {pair}: expected KEY=VALUE, for example values=projected")
        if key in ("source", "impl"):
            raise InputError(f"--set {pair}: has its own place on the command line; see --help")
        try:
            told[key] = json.loads(text)
        except ValueError:
            told[key] = text
    return {key: value for key, value in told.items() if value is not None}


def add_loader_flags(parser: argparse.ArgumentParser) -> None:
    """The flags that `clips` reads."""
    parser.add_argument("--batch-size", type=int, default=16, help="clips per forward pass")
    parser.add_argument("--workers", type=int, help="decoding processes")
    parser.add_argument("--pipeline", default="auto", choices=("auto", "dali", "cpu"))


def check_least(args: Any, **least: int) -> None:
    """Raise InputError for a flag below its least value."""
    for flag, value in least.items():
        if getattr(args, flag) < value:
            name = flag.replace("_", "-")
            raise InputError(f"--{name}: expected at least {value}, got {getattr(args, flag)}")


def open_source(path: Path, args: Any) -> Source:
    """Load the model of `path`; `args` has the flags of `add_source_flags`.

    The heads of TIME are left out: nothing here asks for them, and they need not fit.
    Raises InputError for whatever does not go together.
    """
    check_impl(args.impl)
    device = pick_device(args.device)
    autocast, precision = autocast_for(device, args.precision)
    told = model_keywords(args)
    model = load_model(path, impl=args.impl, **{"time_heads": False, **told})
    spec, views, run, root, few = _as_trained(path, model)
    if "frames" in told:
        spec = dataclasses.replace(spec, frames=model.frames)
    if "image_size" in told:
        side = _square(model.config["image_size"], path)
        spec = dataclasses.replace(spec, crop=side, test_short_side=side)
    model = model.to(device).eval()
    return Source(path, model, spec, views, run, root, few, device, autocast, precision)


def _as_trained(
    path: Path, model: VideoTransformer
) -> tuple[ClipSpec, tuple[int, int], Path | None, Path | None, bool]:
    """Clip, views, folder, data of a run, and whether it took some classes alone; for a bare
    checkpoint what its model implies."""
    path = path.absolute()
    for folder in (path, *path.parents[:3]):  # RUN, RUN/checkpoints/step-<n>, a file in that
        stored = read_json(folder / "config.json") if (folder / "config.json").is_file() else None
        if isinstance(stored, dict) and "clip" in stored:
            clip: dict[str, Any] = {
                k: tuple(v) if isinstance(v, list) else v for k, v in stored["clip"].items()
            }
            spec = dataclasses.replace(ClipSpec(**clip), flow_rule=None, flow_tau=None)
            config = stored["config"]
            views, data = tuple(config["run"]["views"]), config["data"]
            return spec, views, folder, Path(data["root"]), data.get("subset") is not None
    size = _square(model.config["image_size"], path)
    colours: dict[str, Any] = {key: tuple(value) for key, value in model.normalisation.items()}
    spec = ClipSpec(
        frames=model.frames,
        crop=size,
        test_short_side=size,
        rand_augment=None,
        flow_rule=None,
        **colours,
    )
    return spec, (1, 3), None, None, False


def _square(size: Any, path: Path) -> int:
    height, width = (size, size) if isinstance(size, int) else size
    if height != width:
        raise InputError(
            f"{path} is made for {height}x{width} pixels, but clips are cut square; choose another "
            "grid with --image-size"
        )
    return height


def open_split(source: Source, data: Path | None, split: str, subset: str | None) -> VideoSet:
    """A split of the data folder `data`, or of the run's own; of `subset` only these videos.

    Raises InputError if there is no data, or its classes are not those of the model.
    """
    root = data or source.root
    if root is None:
        raise InputError(
            f"{source.path} does not say which data it belongs to; name it with --data"
        )
    videos = open_videos(root, split)  # type: ignore[arg-type]
    model = source.model
    if source.few_classes:
        unknown = [name for name in model.classes or () if name not in videos.classes]
        if unknown:
            raise InputError(f"{root} lacks classes that {source.path} was trained on: {unknown}")
        videos = restrict(videos, [videos.classes.index(name) for name in model.classes or ()])
    if len(videos.classes) != model.num_classes:
        raise InputError(
            f"{root} has {len(videos.classes)} classes, the model of {source.path} has "
            f"{model.num_classes}; evaluate on the data it was trained for"
        )
    if model.classes is not None and tuple(model.classes) != videos.classes:
        label = next(i for i, name in enumerate(videos.classes) if name != model.classes[i])
        raise InputError(
            f"{root} numbers its classes otherwise than the data {source.path} was trained on: "
            f"{label} is {videos.classes[label]!r} there, {model.classes[label]!r} in the model"
        )
    if subset is None:
        return videos
    labels = labels_of(videos, subset)
    kept = tuple(r for r in videos.records if r.label in labels)
    return dataclasses.replace(videos, records=kept)


def clips(source: Source, videos: VideoSet, args: Any, views: tuple[int, int]) -> ClipLoader:
    """Evaluation clips of `videos` as the model of `source` takes them."""
    if args.batch_size < 1:
        raise InputError(f"--batch-size: expected at least 1, got {args.batch_size}")
    return ClipLoader(
        videos,
        source.spec,
        train=False,
        batch_size=max(1, args.batch_size // (views[0] * views[1])),
        workers=args.workers,
        pipeline=args.pipeline,
        device=source.device,
        views=views,
    )


def progress(batches: Iterable[Batch], total: int, what: str) -> Iterator[Batch]:
    """The same batches under a progress bar; where no bar can be shown, with a plain line after
    every fifth of them."""
    bar = tqdm(batches, what, total, disable=None, leave=False)
    for number, batch in enumerate(bar, 1):
        yield batch
        if bar.disable and total > 1 and number % -(-total // 5) == 0:
            logger.info("%s: batch %d of %d", what, number, total)


def video_batches(
    source: Source,
    files: Sequence[Path],
    views: tuple[int, int],
    *,
    batch_size: int = 1,
    workers: int | None = 0,
    pipeline: Any = "auto",
) -> Iterator[Batch]:
    """Clips of single video files in their order; `Batch.sample` counts the files, labels mean
    nothing. `batch_size` counts files."""
    here = tuple(Record(file.stem, file.absolute(), 0, "") for file in files)
    # whoever names a file may read it wherever it lies
    videos = VideoSet("files", "validation", Path("/"), here, ())
    loader = ClipLoader(
        videos, source.spec, train=False, batch_size=batch_size, workers=workers,
        pipeline=pipeline, device=source.device, views=views,
    )  # fmt: skip
    try:
        yield from loader.batches(0)
    finally:
        loader.close()


def class_names(model: VideoTransformer, file: Path | None) -> list[str]:
    """Names of the model's classes: from a labels file, else from the checkpoint, else numbers.

    The file is the labels file of Something-Something v2 ({"name": "0", ...}), the same the other
    way round ({"0": "name", ...}), or a text with one name per line.
    """
    if file is None:
        return model.classes or [f"class {i}" for i in range(model.num_classes)]
    names = _read_names(file)
    if len(names) != model.num_classes:
        raise InputError(
            f"--labels {file}: has {len(names)} names, the model has {model.num_classes} classes"
        )
    return names


def _read_names(file: Path) -> list[str]:
    if file.suffix != ".json":
        return [line.strip() for line in read_text(file).splitlines() if line.strip()]
    found = read_json(file)
    if isinstance(found, dict) and all(str(value).isdecimal() for value in found.values()):
        turned = {str(value): name for name, value in found.items()}
        found = turned if len(turned) == len(found) else None  # a label given twice
    if not isinstance(found, dict) or found.keys() != {str(i) for i in range(len(found))}:
        raise InputError(
            f'--labels {file}: expected {{"name of class": "0", ...}} with the labels from 0 on, '
            "or a text file with one name per line"
        )
    return [str(found[str(i)]) for i in range(len(found))]


def account(
    failures: Sequence[Failure], notices: Sequence[Failure], videos: VideoSet, allow_missing: bool
) -> None:
    """Say which videos are missing or not quite as asked for; InputError if any is missing."""
    for failure in failures:
        logger.warning("not evaluated: %s: %s, %s", failure.path, failure.kind, failure.reason)
    _log_notices(notices)
    if failures and not allow_missing:
        raise InputError(
            f"{len(failures)} of {len(videos.records)} videos could not be decoded "
            "(listed above), so these numbers would not be comparable. Repair the files, or print "
            "marked numbers with --allow-missing."
        )


def _log_notices(notices: Sequence[Failure]) -> None:
    """Per kind how many videos are in the numbers but not quite as asked for, and the first."""
    for kind in dict.fromkeys(notice.kind for notice in notices):
        same = [notice for notice in notices if notice.kind == kind]
        logger.warning(
            "evaluated, but %s: %d videos, the first %s (%s)",
            kind, len(same), same[0].path, same[0].reason,
        )  # fmt: skip


def refuse_not_finite(source: Source, answers: torch.Tensor) -> None:
    """RunError if the model answers with something that is no number: no result follows of that."""
    if not answers.isfinite().all():
        raise RunError(
            f"{source.path} gives answers that are not finite, in {source.precision}: its weights "
            "are spoilt, or too large for that precision; try --precision fp32"
        )


def origin(source: Source) -> dict[str, Any]:
    """What a record of numbers says of the model they were measured with."""
    report = source.model.load_report
    return {
        "source": str(source.path),
        "backbone": source.model.backbone,
        "family": report.family,
        "weights_sha256": report.sha256,
        "precision": source.precision,
    }


def surroundings() -> dict[str, Any]:
    """What a record of numbers says of the software."""
    return {"versions": versions(), "git_commit": git_commit()}


def analysis_folder(source: Source, out: Path | None) -> Path:
    """Where charts go: `out`, else `analysis/` in the run folder or here. It is made.

    Raises InputError if nothing can be written there, before hours of work.
    """
    folder = out or (source.run or Path()) / "analysis"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"--out {folder}: cannot be made ({error.strerror})") from error
    try:
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise InputError(
            f"--out {folder}: nothing can be written there ({error.strerror}); name another folder"
        ) from error
    return folder


def compare(
    what: str, args: Any, measure: Callable[[Source], dict[str, Any]]
) -> tuple[Path, dict[str, Any]]:
    """measure() of the model named and of those beside it; the record is <folder>/<what>.json."""
    source = open_source(args.source, args)
    folder = analysis_folder(source, args.out)
    models = [measure(source)]
    models += [measure(open_source(path, args)) for path in args.beside]
    record = {"what": what, "models": models, **surroundings()}
    write_json(folder / f"{what}.json", record)
    return folder, record


def written(folder: Path, files: Sequence[Path | str]) -> str:
    """What was written, and for a run folder how it comes into its report."""
    said = ", ".join(map(str, files))
    if (folder.parent / "metrics.jsonl").is_file():
        said += f"\nin the run's report after: python -m timefast.report {folder.parent}"
    return said


def parse_views(text: str) -> tuple[int, int]:
    temporal, _, spatial = text.partition("x")
    if not (temporal.isdecimal() and int(temporal) and spatial in ("1", "3")):
        raise argparse.ArgumentTypeError(f"{text!r}: expected TxS like 1x3, with S 1 or 3")
    return int(temporal), int(spatial)


def exit_code(work: Callable[[], int], interrupted: str = "nothing was written") -> int:
    """Run the body of a command; turn what a user can cause into one message and an exit code."""
    try:
        code = work()
        sys.stdout.flush()
        return code
    except BrokenPipeError:  # whoever read the output, such as head, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (InputError, NotImplementedError) as error:  # the latter: an --impl that cannot run
        print(f"error: {error}", file=sys.stderr)
        return 2
    except RunError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except torch.OutOfMemoryError as error:
        print(
            f"error: out of memory. Use a smaller --batch-size, --precision bf16, or fewer views.\n"
            f"{error}",
            file=sys.stderr,
        )
        return 1
    except KeyboardInterrupt:
        print(f"interrupted; {interrupted}", file=sys.stderr)
        return 130
