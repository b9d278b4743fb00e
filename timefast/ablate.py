"""What each loss of TIME does: `python -m timefast.ablate --data DIR`.

Trains every combination of the order, debias and flow losses (the eight rows of table 3 of the
paper) with every seed, measures accuracy on original and shuffled frames, and writes the table with
its spread over seeds to ablation.md and ablation.json in --out.

A run has the folder <out>/<losses>-<seed>. One that is finished is not trained again, one that was
interrupted goes on, one with another configuration is refused. All flags of timefast.train hold for
every run. Without --data the demo set is made and used.
"""

import dataclasses
import json
import logging
import shlex
import statistics
import sys
import time
from argparse import Namespace
from collections.abc import Sequence
from datetime import date
from pathlib import Path
from typing import Any

import torch

from timefast import distributed
from timefast.checkpoint import newest_checkpoint
from timefast.config import Parser, TrainConfig, add_flags, given_flags
from timefast.data import ssv2
from timefast.data.annotation import read_json
from timefast.data.batch import VideoSet
from timefast.errors import InputError
from timefast.eval.accuracy import Predictions, predict, protocol, summarise
from timefast.eval.source import (
    Source,
    account,
    add_loader_flags,
    add_source_flags,
    clips,
    exit_code,
    open_source,
    open_split,
    progress,
    surroundings,
)
from timefast.log import to_console
from timefast.recipes import get_recipe
from timefast.run_folder import refuse_differences, stored_config, write_json
from timefast.train import main as train

logger = logging.getLogger("timefast")

ROWS = (  # in the order of table 3
    "none", "order", "debias", "order,debias", "flow", "order,flow", "debias,flow",
    "order,debias,flow",
)  # fmt: skip
Flags = dict[tuple[str, str], Any]


def main(argv: Sequence[str] | None = None) -> int:
    parser = Parser(prog="python -m timefast.ablate", description=__doc__)
    parser.add_argument("--recipe", help="recipe of every run (default: as timefast.train)")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], metavar="SEED")
    parser.add_argument(
        "--rows", nargs="+", choices=ROWS, default=list(ROWS), metavar="LOSSES",
        help="only these rows, for example none order,flow",
    )  # fmt: skip
    parser.add_argument(
        "--plan", action="store_true",
        help="train nothing: print the command of every run that is not finished, for a batch "
        "system or torchrun",
    )  # fmt: skip
    parser.add_argument(
        "--record", type=Path, metavar="DIR",
        help="also write <recipe>-losses_<device>_<date>_<commit>.json there",
    )  # fmt: skip
    add_flags(parser)
    args = parser.parse_args(argv)
    to_console()
    return exit_code(lambda: run(args), interrupted="the same command goes on from here")


def run(args: Namespace) -> int:
    flags = given_flags(args)
    for section, name in (("method", "losses"), ("run", "seed")):
        if (section, name) in flags:
            raise InputError(f"--{name}: every row and seed sets its own; see --rows and --seeds")
    if any(seed < 0 for seed in args.seeds):
        raise InputError(f"--seeds: expected 0 or more, got {min(args.seeds)}")
    for name in ("seeds", "rows"):
        given = getattr(args, name)
        if len(set(given)) < len(given):
            listed = " ".join(map(str, given))
            raise InputError(f"--{name}: expected each at most once, got {listed}")
    if distributed.world_size() > 1 and not args.plan:
        raise InputError(
            "one process trains run after run here; with torchrun start the commands that --plan "
            "prints, then this command on one process to measure them"
        )
    if args.record is not None and not args.record.is_dir():
        raise InputError(f"--record {args.record}: there is no such folder")
    given_out = flags.pop(("run", "out"), None)  # says where, and is no part of what was run
    config = recipe_with(args.recipe, flags)
    out = given_out or Path("runs") / f"ablate-{config.recipe}"
    plans = [
        Plan.of(config, flags, losses, seed, out)
        for seed in args.seeds
        for losses in ROWS
        if losses in args.rows
    ]
    if args.plan:
        for plan in plans:
            if not plan.finished():
                print(shlex.join(["python", "-m", "timefast.train", *plan.arguments]))
        return 0
    rows: list[dict[str, Any]] = []
    for number, plan in enumerate(plans, 1):
        started = None
        if not plan.finished():
            logger.info("run %d of %d: %s", number, len(plans), plan.folder)
            started = None if plan.folder.exists() else time.perf_counter()
            code = train(plan.arguments)
            if code:
                return code
        seconds = None if started is None else time.perf_counter() - started
        rows.append(measured(plan, seconds))
        write(rows, config, out, None)
    write(rows, config, out, args.record)
    print(table(rows))
    print(f"{out / 'ablation.json'}, {out / 'ablation.md'}")
    return 0


def recipe_with(recipe: str | None, flags: Flags) -> TrainConfig:
    has_data = bool(flags.get(("data", "root")))
    return get_recipe(recipe, flags.get(("model", "backbone")), has_data).replace(flags)


@dataclasses.dataclass(frozen=True)
class Plan:
    """One run of the table."""

    losses: str
    seed: int
    folder: Path
    config: TrainConfig
    arguments: list[str]  # of timefast.train

    @classmethod
    def of(cls, base: TrainConfig, flags: Flags, losses: str, seed: int, out: Path) -> "Plan":
        folder = out / f"{losses.replace(',', '-')}-{seed}"
        chosen = () if losses == "none" else tuple(losses.split(","))
        own = {
            ("method", "losses"): chosen, ("run", "seed"): seed, ("run", "out"): folder,
            # a run that is resumed would keep the number it was begun with
            ("optim", "max_steps"): base.optim.max_steps,
        }  # fmt: skip
        arguments = ["--recipe", base.recipe, *as_flags({**flags, **own}), "--resume"]
        return cls(losses, seed, folder, base.replace(own), arguments)

    def finished(self) -> bool:
        """Whether this run is there and has taken its last step.

        Raises InputError if the folder holds a run of another configuration.
        """
        stored = stored_config(self.folder)
        if stored is None:
            return False
        refuse_differences(stored, self.config, self.folder)
        if stored.optim.max_steps != self.config.optim.max_steps:
            return False
        newest = newest_checkpoint(self.folder)
        last = read_json(self.folder / "config.json")["total_steps"]
        return newest is not None and newest.name == f"step-{last}"


def as_flags(changes: Flags) -> list[str]:
    """What `given_flags` makes of a command line, as a command line."""
    flags = []
    for (section, name), value in changes.items():
        flag = f"{section}.{name.replace('_', '-')}"
        if isinstance(value, bool):
            flags.append(f"--{flag}" if value else f"--no-{flag}")
            continue
        parts = value if isinstance(value, tuple) else () if value is None else (value,)
        flags.append(f"--{flag}={','.join(map(str, parts)) or 'none'}")
    return flags


def measured(plan: Plan, seconds: float | None) -> dict[str, Any]:
    """The row of a finished run; kept in its folder, since measuring takes long on much data."""
    kept = plan.folder / "ablation-row.json"
    checkpoint = newest_checkpoint(plan.folder)
    assert checkpoint is not None
    weights = read_json(checkpoint / "index.json")["sha256"]["model.safetensors"]
    if kept.is_file():
        row = json.loads(kept.read_text("utf-8"))
        same = row["views"] == list(plan.config.run.views)
        if same and (row["weights_sha256"], row["shuffles"]) == (weights, plan.config.run.shuffles):
            return row
    row = measure(plan.folder, plan.config.run.views, plan.config.run.shuffles)
    row |= {"losses": plan.losses, "seed": plan.seed, "seconds": seconds}
    write_json(kept, row)
    return row


def measure(run: Path, views: tuple[int, int], shuffles: int) -> dict[str, Any]:
    """Accuracies of a run on its validation videos, in percent: of each class subset the original
    one, that on shuffled frames and the gap; of the demo set also those where the planted cue
    agrees with the class and where it conflicts."""
    parser = Parser()
    add_source_flags(parser)
    add_loader_flags(parser)
    args = parser.parse_args([])
    source = open_source(run, args)
    videos = open_split(source, None, "validation", None)
    loader = clips(source, videos, args, views)
    predictions = predict(
        source.model, progress(loader.batches(0), len(loader), "validation videos"),
        views=views[0] * views[1], draws=shuffles,
        device=source.device, autocast=source.autocast,
    )  # fmt: skip
    loader.close()
    account(predictions.failures, predictions.notices, videos, allow_missing=False)
    row: dict[str, Any] = {
        "weights_sha256": source.model.load_report.sha256,
        "videos": videos.fingerprint(),
        "views": list(views),
        "shuffles": shuffles,
        "protocol": _protocol(source, views, shuffles),
    }
    for subset, labels in {"all": None, **videos.subsets}.items():
        result = summarise(predictions, videos, labels)
        row |= {
            f"{subset}_original": result["top1"],
            f"{subset}_shuffled": result["shuffled_top1"],
            f"{subset}_gap": result["gap"],
        }
        if subset == "all":
            keys = ("confidence", "shuffled_confidence")
            row |= {key: result[key] for key in keys}
    return row | cue(predictions, videos)


def _protocol(source: Source, views: tuple[int, int], shuffles: int) -> str:
    spec = source.spec
    how = protocol(spec.frames, views, spec.crop, spec.test_short_side, "logits")
    return f"{how}; shuffled: mean of {shuffles} random frame orders per video"


def cue(predictions: Predictions, videos: VideoSet) -> dict[str, float]:
    """Percent right of the temporal videos whose cue agrees with their class, and of those whose
    cue conflicts. Empty for a data set whose annotation knows no cue."""
    file = ssv2.find(videos.root, "validation")
    entries = read_json(file) if file is not None else []
    agrees = {str(e["id"]): bool(e["aligned"]) for e in entries if "aligned" in e}
    temporal = videos.subsets.get("temporal", ())
    hits: dict[bool, list[bool]] = {True: [], False: []}
    best = predictions.original.argmax(1)
    for sample, guess in zip(predictions.sample.tolist(), best.tolist(), strict=True):
        record = videos.records[sample]
        if record.id in agrees and record.label in temporal:
            hits[agrees[record.id]].append(guess == record.label)
    names = {True: "aligned", False: "conflict"}
    return {
        names[agreed]: 100 * torch.tensor(right).double().mean().item()
        for agreed, right in hits.items()
        if right
    }


def write(rows: list[dict[str, Any]], config: TrainConfig, out: Path, record: Path | None) -> None:
    """ablation.json and ablation.md of the rows so far; with `record` also its named copy."""
    if len({row["videos"]["sha256"] for row in rows}) > 1:
        raise InputError(f"the runs in {out} were measured on different videos; use another --out")
    about = surroundings()
    device = stored_device(out, rows[0])
    result = {
        "what": f"{config.recipe}-losses",
        "device": device,
        "date": date.today().isoformat(),
        "commit": about["git_commit"],
        "versions": about["versions"],
        "protocol": f"{rows[0]['protocol']}; {rows[0]['videos']['videos']} validation videos",
        "config": config.to_dict(),
        "rows": rows,
    }
    write_json(out / "ablation.json", result)
    (out / "ablation.md").write_text(table(rows) + "\n", "utf-8")
    if record is not None:
        commit = (about["git_commit"] or "none")[:12]
        name = f"{result['what']}_{device.replace(' ', '-')}_{result['date']}_{commit}.json"
        write_json(record / name, result)


def stored_device(out: Path, row: dict[str, Any]) -> str:
    folder = out / f"{row['losses'].replace(',', '-')}-{row['seed']}"
    return read_json(folder / "config.json")["device"]


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Markdown in the form of table 3: losses on or off, then per subset original, shuffled, gap as
    mean ± sample standard deviation over seeds."""
    subsets = [key.removesuffix("_gap") for key in rows[0] if key.endswith("_gap")]
    head = ["order", "debias", "flow"]
    for subset in subsets:
        head += [f"{subset}: original", "shuffled", "gap"]
    lines = [head, ["---"] * len(head)]
    for losses in ROWS:
        runs = [row for row in rows if row["losses"] == losses]
        if not runs:
            continue
        marks = ["✓" if name in losses.split(",") else "" for name in head[:3]]
        keys = [f"{s}_{part}" for s in subsets for part in ("original", "shuffled", "gap")]
        lines.append(marks + [spread([run[key] for run in runs]) for key in keys])
    seeds = sorted({row["seed"] for row in rows})
    text = "".join("| " + " | ".join(line) + " |\n" for line in lines)
    return f"{text}\nTop-1 in percent; seeds {', '.join(map(str, seeds))}. {rows[0]['protocol']}."


def spread(values: Sequence[float]) -> str:
    """Mean ± sample standard deviation; a single value has none."""
    mean = f"{statistics.fmean(values):.1f}"
    return f"{mean} ± {statistics.stdev(values):.1f}" if len(values) > 1 else mean


if __name__ == "__main__":
    sys.exit(main())
