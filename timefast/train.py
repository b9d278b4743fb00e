"""Train a video transformer: `python -m timefast.train --backbone timesformer`.

Without --data a small set of real encoded videos is generated once and the demo recipe trains on
it. The loop reads from top to bottom; the only places where it waits for the device are marked.
"""

import contextlib
import dataclasses
import logging
import os
import signal
import sys
import time
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import torch
from torch import nn
from tqdm import tqdm

from timefast import __version__
from timefast.checkpoint import load_checkpoint, newest_checkpoint, prune, save_checkpoint
from timefast.config import Parser, TrainConfig, add_flags, given_flags
from timefast.data import open_videos
from timefast.data.batch import Batch, ClipSpec, Failure, VideoSet
from timefast.data.rng import generator, torch_seed
from timefast.errors import InputError, RunError
from timefast.eval.accuracy import predict, protocol, summarise, table
from timefast.failures import FailureLog
from timefast.kernels.op import OPS
from timefast.log import JsonLines, read_json_lines, to_console
from timefast.meter import Progress, Window
from timefast.methods.time_ssl import TimeMethod
from timefast.models import create_model
from timefast.optim import build_optimizer, learning_rate
from timefast.pipelines.loader import ClipLoader
from timefast.recipes import RECIPES, get_recipe
from timefast.run_folder import (
    git_commit,
    lock_run,
    make_run_folder,
    new_run_name,
    newest_run,
    refuse_differences,
    stored_config,
    versions,
    write_json,
)

logger = logging.getLogger("timefast")
MAX_SKIPPED_IN_A_ROW = 10  # steps with a loss or gradient that is not finite
MAX_FAILED_SAVES = 3


class Interrupt:
    """Notes the first SIGINT or SIGTERM, for the loop to act on between steps; a second one exits.

    Exit code of an interrupted run: 128 + signal number.
    """

    def __init__(self) -> None:
        self.signal: int | None = None

    def __enter__(self) -> "Interrupt":
        self._before = {s: signal.signal(s, self._note) for s in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *_: Any) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: Any) -> None:
        if self.signal is not None:
            os._exit(128 + number)
        self.signal = number


def main(argv: Sequence[str] | None = None) -> int:
    parser = Parser(
        prog="python -m timefast.train",
        description=__doc__,
        epilog="recipes:\n" + "\n".join(_recipe_line(name) for name in RECIPES),
    )
    parser.add_argument(
        "--recipe", help="a named complete run (see below); flags replace its values"
    )
    parser.add_argument(
        "--resume",
        action="store_true",
        help="continue the run in --out, or the newest of the recipe",
    )
    try:
        add_flags(parser)
        args = parser.parse_args(argv)
        to_console()
        config = resolve(args.recipe, args.resume, given_flags(args))
        return train(config, resume=args.resume)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except (RunError, torch.OutOfMemoryError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


def resolve(recipe: str | None, resume: bool, flags: dict[tuple[str, str], Any]) -> TrainConfig:
    """The complete configuration: recipe (or, resuming, the stored one) with flags on top."""
    backbone = flags.get(("model", "backbone"))
    has_data = flags.get(("data", "root")) is not None
    out = flags.get(("run", "out"))
    if resume:
        if out is None:
            name = get_recipe(recipe, backbone, has_data).recipe
            out = newest_run(name)
            if out is None:
                raise InputError(f"--resume: there is no run of recipe {name} in runs/; name --out")
        stored = stored_config(out)
        if stored is not None:
            wanted = stored.replace({**flags, ("run", "out"): out})
            if recipe is not None and recipe != stored.recipe:
                raise InputError(f"{out} holds a run of recipe {stored.recipe}, not {recipe}")
            refuse_differences(stored, wanted, out)
            return wanted
    config = get_recipe(recipe, backbone, has_data).replace(flags)
    if out is None:
        out = new_run_name(config.recipe)
    elif not resume and (stored_config(out) is not None or (out / "checkpoints").exists()):
        stored = stored_config(out)
        if stored is not None:
            refuse_differences(stored, config, out)
        raise InputError(f"{out} already holds a run; add --resume to continue it")
    return config.replace({("run", "out"): out})


def clip_spec(config: TrainConfig) -> ClipSpec:
    flow = "flow" in config.method.losses
    return ClipSpec(
        frames=config.model.frames,
        crop=config.model.image_size,
        short_side=config.data.short_side,
        test_short_side=config.data.test_short_side,
        rand_augment=config.data.rand_augment,
        flow_rule=config.method.flow_rule if flow else None,
        flow_tau=config.method.flow_tau if flow else None,
        patch_size=config.model.patch_size,
    )


def build_model(config: TrainConfig, classes: int) -> nn.Module:
    """A new model with its initial weights; the seed decides every random value of it."""
    torch.manual_seed(torch_seed(config.run.seed, 0, 0, "initial weights"))
    m = config.model
    model = create_model(
        m.backbone,
        num_classes=classes,
        frames=m.frames,
        image_size=m.image_size,
        patch_size=m.patch_size,
        dim=m.dim,
        depth=m.depth,
        heads=m.heads,
        mlp_ratio=m.mlp_ratio,
        drop_path=m.drop_path,
        impl=config.run.impl,
        init=m.init,
        time_heads=bool({"order", "flow"} & set(config.method.losses)),
    )
    if m.weights != "none":
        from timefast.weights import load_imagenet

        load_imagenet(model, m.weights)
    return model


def pick_device(name: str) -> torch.device:
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise InputError(f"--device {name}: not a device torch knows") from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise InputError(
            f"--device {name}: torch {torch.__version__} sees no CUDA device here; "
            "`python -m timefast.info` says why"
        )
    return device


def autocast_for(device: torch.device, precision: str) -> Any:
    """A function that makes the autocast context of a precision, and that precision's name."""
    if precision == "auto":
        precision = "bf16" if device.type == "cuda" else "fp32"
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": None}[precision]

    def context() -> Any:
        if dtype is None:
            return contextlib.nullcontext()
        return torch.autocast(device.type, dtype=dtype)

    return context, precision


def train(config: TrainConfig, *, resume: bool = False) -> int:
    """Run a configuration to its end; 0, or 128 + signal number if interrupted."""
    device = pick_device(config.run.device)
    autocast, precision = autocast_for(device, config.run.precision)
    if config.data.root is None:
        from timefast.demo_data import demo_data_folder

        config = config.replace({("data", "root"): demo_data_folder()})
    assert config.data.root is not None and config.run.out is not None
    videos = open_videos(config.data.root, "train")
    validation = open_videos(config.data.root, "validation")
    if videos.classes != validation.classes:
        raise InputError(f"{config.data.root}: train and validation do not have the same classes")

    run = config.run.out
    make_run_folder(run)
    lock = lock_run(run)
    model = build_model(config, len(videos.classes)).to(device)
    method = TimeMethod(
        model,
        weights=config.method.weights(),
        label_smoothing=(
            config.method.smoothing_class,
            config.method.smoothing_order,
            config.method.smoothing_flow,
        ),
    )
    if config.run.compile:
        model.features = torch.compile(model.features)
    optimizer = build_optimizer(model, config.optim)
    # one path for all precisions: a scale of 1 changes no bit, but a gradient that is not finite is
    # found, and the fused optimizer leaves that step out without asking the host
    scaler = torch.amp.GradScaler(
        device.type, init_scale=65536.0 if precision == "fp16" else 1.0, growth_interval=2000
    )
    spec = clip_spec(config)
    loader = ClipLoader(
        videos,
        spec,
        train=True,
        batch_size=config.optim.batch_size,
        seed=config.run.seed,
        workers=config.data.workers,
        pipeline=config.data.pipeline,
        device=device,
    )
    failures = FailureLog(run / "failures.jsonl", len(videos.records), config.data.max_bad_fraction)

    step = batch_index = epoch = 0
    skipped_total = 0
    found = newest_checkpoint(run) if resume else None
    if found is not None:
        checkpoint = load_checkpoint(found)
        state = checkpoint.state
        model.load_state_dict(checkpoint.weights)
        optimizer.load_state_dict(state["optimizer"])
        scaler.load_state_dict(state["scaler"])
        step, epoch, batch_index = state["step"], state["epoch"], state["batch"]
        skipped_total = state["skipped_steps"]
        failures.restore(state["failures"])
        logger.info("resuming %s at step %d (epoch %d)", run, step, epoch)
    elif resume:
        logger.info("nothing to resume in %s: starting at step 0", run)
    kept_metrics = [m for m in read_json_lines(run / "metrics.jsonl") if m["step"] <= step]
    write_lines(run / "metrics.jsonl", kept_metrics)
    metrics = JsonLines(run / "metrics.jsonl")
    board = tensorboard_writer(run, step)

    batches_per_epoch = len(loader)
    steps_per_epoch = -(-batches_per_epoch // config.optim.accumulate)
    last_step = config.optim.epochs * steps_per_epoch
    if config.optim.max_steps is not None:
        last_step = min(last_step, config.optim.max_steps)

    record = {
        "timefast": __version__,
        "created": datetime.now().astimezone().isoformat(timespec="seconds"),
        "recipe": config.recipe,
        "config": config.to_dict(),
        "model": model.config,
        "classes": list(videos.classes),
        "subsets": {name: list(labels) for name, labels in videos.subsets.items()},
        "clip": dataclasses.asdict(spec),
        "versions": versions(),
        "git_commit": git_commit(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "precision": precision,
        "pipeline": loader.pipeline,
        "implementations": {},
    }
    write_json(run / "config.json", record)
    describe = {
        "config": model.config,
        "classes": list(videos.classes),
        "normalisation": {"mean": list(spec.mean), "std": list(spec.std)},
    }
    parameters = sum(p.numel() for p in model.parameters())
    logger.info(
        "%s: %s, %.2f M parameters, losses %s, on %s in %s",
        config.recipe, config.model.backbone, parameters / 1e6,
        ", ".join(("class", *config.method.losses)), record["device"], precision,
    )  # fmt: skip
    logger.info(
        "%d training and %d validation videos of %d classes in %s, decoded by %s",
        len(videos.records), len(validation.records), len(videos.classes), videos.root,
        loader.pipeline,
    )  # fmt: skip
    logger.info("writing to %s", run)

    failed_saves = 0

    def save() -> None:
        nonlocal failed_saves
        state = {
            "step": step, "epoch": epoch, "batch": batch_index, "skipped_steps": skipped_total,
            "optimizer": optimizer.state_dict(), "scaler": scaler.state_dict(),
            "failures": failures.state(),
        }  # fmt: skip
        try:
            save_checkpoint(run, step, model.state_dict(), state, describe)
            prune(run, config.run.keep)
            failed_saves = 0
        except Exception as error:  # torch, safetensors and the system each raise their own
            failed_saves += 1
            logger.warning("checkpoint at step %d not written: %s", step, error)
            if failed_saves >= MAX_FAILED_SAVES:
                raise RunError(
                    f"{failed_saves} checkpoints in a row could not be written to {run} ({error}); "
                    "make room and continue with --resume"
                ) from error

    def note_failures(new: list[Failure]) -> None:
        for failure in failures.add(new):
            logger.warning("skipping %s: %s, %s", failure.path, failure.kind, failure.reason)

    evaluated = {
        (m["step"], m["protocol"], m.get("subset")) for m in kept_metrics if m["kind"] == "eval"
    }

    def evaluate(views: tuple[int, int], draws: int) -> dict[str, dict[str, Any]]:
        how = protocol(spec.frames, views, spec.crop, spec.test_short_side, "logits")
        eval_loader = ClipLoader(
            validation,
            dataclasses.replace(spec, flow_rule=None, flow_tau=None),
            train=False,
            batch_size=max(1, config.optim.batch_size // (views[0] * views[1])),
            seed=config.run.seed,
            workers=config.data.workers,
            pipeline=config.data.pipeline,
            device=device,
            views=views,
        )
        predictions = predict(
            model, tqdm(eval_loader.batches(0), "evaluating", len(eval_loader), disable=None, leave=False),
            views=views[0] * views[1], draws=draws, seed=config.run.seed, device=device,
            autocast=autocast,
        )  # fmt: skip
        note_failures(list(predictions.failures))
        rows = {"all": summarise(predictions, validation)}
        for name, labels in validation.subsets.items():
            rows[name] = summarise(predictions, validation, labels)
        for name, row in rows.items():
            line = {"kind": "eval", "step": step, "epoch": epoch, "split": "validation"}
            line |= {"protocol": how, "subset": name, "draws": draws} | row
            if (step, how, name, draws) not in evaluated:
                metrics.write(line)
                evaluated.add((step, how, name, draws))
            if board is not None and row["top1"] is not None:
                board.add_scalar(f"eval/top1_{name}", row["top1"], step)
        return rows

    window = Window()
    progress = Progress(last_step, step)
    with Interrupt() as interrupt, progress.bar:
        while step < last_step and interrupt.signal is None:
            for index, batch in window.timed(
                enumerate(loader.batches(epoch, batch_index), batch_index)
            ):
                note_failures(batch.failures)
                first = index // config.optim.accumulate * config.optim.accumulate
                end = min(first + config.optim.accumulate, batches_per_epoch)
                if index == first:
                    optimizer.zero_grad(set_to_none=True)
                share = len(batch.label) / clips_between(videos, config, first, end)
                losses = forward_backward(
                    method, batch, config, epoch, index, share, device, autocast, scaler
                )
                window.add(losses, share, batch)
                if index + 1 < end:
                    continue
                lr = learning_rate(config.optim, step, steps_per_epoch)
                for group in optimizer.param_groups:
                    group["lr"] = lr
                scaler.unscale_(optimizer)
                norm = nn.utils.clip_grad_norm_(
                    model.parameters(), config.optim.clip_grad or float("inf")
                )
                scaler.step(optimizer)
                scaler.update(None if precision == "fp16" else 1.0)
                window.end_step(norm)
                step += 1
                batch_index = index + 1
                progress.bar.update(1)
                last = step == last_step
                if step % config.run.log_every == 0 or step == 1 or last or interrupt.signal:
                    line, skipped = window.read()  # waits for the device
                    skipped_total += len(skipped)
                    line = {"kind": "train", "step": step, "epoch": epoch, "lr": lr, **line}
                    metrics.write(line)
                    progress.update(line)
                    if board is not None:
                        for key in line.keys() - {"kind", "step", "epoch"}:
                            if line[key] is not None:
                                board.add_scalar(f"train/{key}", line[key], step)
                    complain(skipped, window.skipped_in_a_row, spec, precision)
                    if not record["implementations"]:
                        record["implementations"] = implementations_used(device, config, spec)
                        write_json(run / "config.json", record)
                if batch_index == batches_per_epoch:
                    epoch, batch_index = epoch + 1, 0
                if (
                    step % config.run.save_every == 0
                    or batch_index == 0
                    or last
                    or interrupt.signal
                ):
                    save()
                if last or interrupt.signal:
                    break
            at_edge = batch_index == 0 and step < last_step and interrupt.signal is None
            if at_edge and epoch % config.run.eval_every == 0:
                before = time.perf_counter()
                rows = evaluate((1, 1), draws=1)
                window.leave_out(time.perf_counter() - before)
                logger.info("epoch %d, one clip per video:\n%s", epoch, table(rows))
    if interrupt.signal is not None:
        metrics.close()
        lock.close()
        logger.info("interrupted at step %d; continue with --resume --out %s", step, run)
        return 128 + interrupt.signal

    rows = evaluate(config.run.views, config.run.shuffles)
    metrics.close()
    logger.info("")
    how = protocol(spec.frames, config.run.views, spec.crop, spec.test_short_side, "logits")
    logger.info("%s; shuffled: mean of %d random frame orders per video", how, config.run.shuffles)
    logger.info("%s", table(rows))
    if len(failures):
        logger.info("%d videos could not be used: %s", len(failures), failures.path)
    from timefast.report import write_report

    logger.info("report: %s", write_report(run))
    lock.close()
    return 0


def forward_backward(
    method: TimeMethod,
    batch: Batch,
    config: TrainConfig,
    epoch: int,
    index: int,
    share: float,
    device: torch.device,
    autocast: Any,
    scaler: torch.amp.GradScaler,
) -> dict[str, torch.Tensor]:
    """One batch: losses and gradients. Its random numbers are a function of its position."""
    seed = config.run.seed
    torch.manual_seed(torch_seed(seed, epoch, index, "stochastic depth"))
    order = generator(seed, epoch, index, "debias").permutation(config.model.frames)
    try:
        batch = batch.to(device)
        with autocast():
            losses = method.training_loss(batch, torch.from_numpy(order).to(device))
        scaler.scale(losses["total"] * share).backward()
    except torch.OutOfMemoryError as error:
        shape = " x ".join(map(str, batch.video.shape))
        raise torch.OutOfMemoryError(
            f"out of memory on a batch of {shape} (peak "
            f"{torch.cuda.max_memory_allocated() / 2**30:.1f} GiB). Halve --batch-size and double "
            "--accumulate (same training), use --precision bf16, or fewer --frames.\n"
            f"{error}"
        ) from error
    return losses


def clips_between(videos: VideoSet, config: TrainConfig, first: int, end: int) -> int:
    """Clips in batches [first, end) of an epoch; only the last batch may be short."""
    size = config.optim.batch_size
    return min(end * size, len(videos.records)) - first * size


def complain(skipped: list[int], in_a_row: int, spec: ClipSpec, precision: str) -> None:
    if not skipped:
        return
    logger.warning("gradients were not finite; skipped the step(s) with videos %s", skipped)
    if in_a_row >= MAX_SKIPPED_IN_A_ROW:
        raise RunError(
            f"{in_a_row} steps in a row had gradients that are not finite (precision {precision}). "
            "Lower --lr, or use --precision bf16 or fp32; --resume continues from the last checkpoint."
        )


def implementations_used(
    device: torch.device, config: TrainConfig, spec: ClipSpec
) -> dict[str, str]:
    """Which implementation each op ran with: the one named, or what "auto" chose."""
    used = {}
    for name, op in OPS.items():
        if device.type in op.chosen:
            used[name] = op.chosen[device.type]
    return used


def tensorboard_writer(run: Path, step: int) -> Any:
    """A writer if the optional package is installed, else None."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        return None
    return SummaryWriter(str(run / "tensorboard"), purge_step=step + 1 if step else None)


def write_lines(path: Path, records: list[dict[str, Any]]) -> None:
    side = path.with_name(f".tmp-{path.name}")
    side.unlink(missing_ok=True)
    lines = JsonLines(side)
    for record in records:
        lines.write(record)
    lines.close()
    os.replace(side, path)


def _recipe_line(name: str) -> str:
    return f"  {name:28s} {(RECIPES[name].__doc__ or '').splitlines()[0]}"


if __name__ == "__main__":
    sys.exit(main())
