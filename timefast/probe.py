"""How much each block knows of the order of frames: `python -m timefast.probe SOURCE --data DIR`.

A linear classifier is trained on the frozen output of every block, averaged over the patches of a
frame, to tell which place that frame has in its clip (figure 1b of the TIME paper). The model sees
every video once for all blocks. Writes probe.json and probe.png.
"""

import argparse
import dataclasses
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from timefast.charts import save_probe
from timefast.config import Parser
from timefast.data.batch import VideoSet
from timefast.data.rng import generator
from timefast.errors import InputError
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
    progress,
    refuse_not_finite,
    written,
)
from timefast.eval.tokens import frame_features
from timefast.log import to_console

DECAY = 1e-3  # of the classifiers' weights, on standardised features


def main(argv: Sequence[str] | None = None) -> int:
    parser = Parser(prog="python -m timefast.probe", description=__doc__)
    parser.add_argument("source", type=Path, help="run folder or checkpoint")
    parser.add_argument(
        "--beside", type=Path, action="append", default=[], metavar="SOURCE",
        help="another model for the same chart; may be given again",
    )  # fmt: skip
    parser.add_argument("--data", type=Path, help="data set folder (default: the run's own)")
    parser.add_argument("--subset", help="temporal, static, or a file with one class name per line")
    parser.add_argument(
        "--train-videos", type=int, default=4000, metavar="N",
        help="train the classifiers on this many training videos, drawn at random (default 4000)",
    )  # fmt: skip
    parser.add_argument("--seed", type=int, default=0, help="seed of that draw")
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
    check_least(args, train_videos=1, seed=0)
    folder, record = compare("probe", args, lambda source: probe(source, args))
    save_probe(record, folder / "probe.png")
    print(as_text(record))
    print(written(folder, [folder / "probe.json", folder / "probe.png"]))
    return 0


def probe(source: Source, args: argparse.Namespace) -> dict[str, Any]:
    """The record of one model: accuracy of the order classifier of each block, in percent."""
    train = open_split(source, args.data, "train", args.subset)
    validation = open_split(source, args.data, "validation", args.subset)
    if len(train.records) > args.train_videos:
        drawn = generator(args.seed, 0, 0, "probe").permutation(len(train.records))
        chosen = sorted(int(i) for i in drawn[: args.train_videos])
        train = dataclasses.replace(train, records=tuple(train.records[i] for i in chosen))
    features = torch.cat(list(_features(source, train, args)), 1)
    trained, frames = features.shape[1:3]
    classifiers = fit(features)
    fitted, _ = accuracy(classifiers, [features])
    del features
    measured, evaluated = accuracy(classifiers, _features(source, validation, args))
    return {
        **origin(source),
        "data": str(train.root),
        "subset": args.subset,
        "protocol": f"linear classifier of {frames} positions per block on patch means, clips of "
        f"{source.spec.frames} frames, one view of {source.spec.crop} px; trained on {trained} "
        "training videos, measured on the validation videos",
        "seed": args.seed,
        "train_videos": trained,
        "videos_expected": len(validation.records),
        "videos_evaluated": evaluated,
        "frames": frames,
        "chance": 100 / frames,
        "accuracy": measured,
        "train_accuracy": fitted,
    }


def _features(source: Source, videos: VideoSet, args: argparse.Namespace) -> Iterator[Tensor]:
    """Frame features of all videos, batch by batch, float32 [blocks, n, T, C].

    Raises InputError at the end if a video did not decode, unless the user allows it.
    """
    loader = clips(source, videos, args, (1, 1))
    failures, notices, found = [], [], 0
    for batch in progress(loader.batches(0), len(loader), f"{videos.split} videos"):
        failures += batch.failures
        notices += batch.notices
        if len(batch.label):
            found += len(batch.label)
            with source.autocast():
                features = frame_features(source.model, batch.video).cpu()
            refuse_not_finite(source, features)
            yield features
    loader.close()
    account(failures, notices, videos, args.allow_missing)
    if not found:
        raise InputError(f"no {videos.split} video of {videos.root} can be decoded")


@dataclasses.dataclass(frozen=True)
class Classifiers:
    """One linear classifier per block, on standardised features."""

    mean: Tensor  # [blocks, C]
    std: Tensor  # [blocks, C]
    weight: Tensor  # [blocks, T, C]
    bias: Tensor  # [blocks, T]

    def logits(self, block: int, features: Tensor) -> Tensor:
        """features [n, T, C] of a block -> [n, T, T]: which position each frame has."""
        x = (features - self.mean[block]) / self.std[block]
        return F.linear(x, self.weight[block], self.bias[block])


def fit(features: Tensor) -> Classifiers:
    """Cross entropy over the frames of features [blocks, n, T, C], eq. 7 of the TIME paper, with a
    little weight decay; solved by L-BFGS, so that nothing depends on a learning rate or an order
    of videos."""
    blocks, _, T, C = features.shape
    mean, std = torch.empty(blocks, C), torch.empty(blocks, C)
    weights, biases = torch.zeros(blocks, T, C), torch.zeros(blocks, T)
    for i in range(blocks):
        x = features[i]
        mean[i], std[i] = x.mean((0, 1)), x.std((0, 1)).clamp_min(1e-6)
        x = ((x - mean[i]) / std[i]).flatten(0, 1)  # [n*T, C]
        target = torch.arange(T).repeat(features.shape[1])
        weight = torch.zeros(T, C, requires_grad=True)
        bias = torch.zeros(T, requires_grad=True)
        solver = torch.optim.LBFGS([weight, bias], max_iter=200, line_search_fn="strong_wolfe")

        def loss(x=x, target=target, weight=weight, bias=bias, solver=solver) -> Tensor:
            solver.zero_grad()
            value = F.cross_entropy(F.linear(x, weight, bias), target)
            value = value + 0.5 * DECAY * weight.square().sum()
            value.backward()
            return value

        solver.step(loss)
        weights[i], biases[i] = weight.detach(), bias.detach()
    return Classifiers(mean, std, weights, biases)


def accuracy(classifiers: Classifiers, parts: Iterable[Tensor]) -> tuple[list[float], int]:
    """Percent of the frames of features [blocks, n, T, C], given in parts, whose position is told,
    per block; and how many videos these are."""
    hits, videos, frames = torch.zeros(len(classifiers.mean)), 0, 1
    for features in parts:
        videos, frames = videos + features.shape[1], features.shape[2]
        place = torch.arange(frames)
        hits += torch.stack(
            [(classifiers.logits(i, x).argmax(-1) == place).sum() for i, x in enumerate(features)]
        )
    return (100 * hits.double() / (videos * frames)).tolist(), videos


def as_text(record: dict[str, Any]) -> str:
    """The numbers of a record as a plain table, a row per block."""
    lines = []
    for model in record["models"]:
        lines.append(f"{model['source']}: {model['protocol']}")
        lines.append(
            f"  {model['videos_evaluated']}/{model['videos_expected']} videos, frame order told, "
            f"percent (chance {model['chance']:.1f}):"
        )
        lines += [
            f"  block {i:2d}  {value:5.1f}   (training videos {fitted:5.1f})"
            for i, (value, fitted) in enumerate(
                zip(model["accuracy"], model["train_accuracy"], strict=True), 1
            )
        ]
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
