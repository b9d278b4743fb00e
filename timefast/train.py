"""Train a video transformer: `python -m timefast.train --backbone timesformer`.

Without --data a small set of real encoded videos is generated once and the demo recipe trains on
it. Ctrl-C saves and stops; --resume continues as if nothing had happened.
"""

import dataclasses
import logging
import os
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import torch
from torch import nn
from tqdm import tqdm

from timefast import __version__
from timefast.checkpoint import (
    list_checkpoints,
    load_checkpoint,
    newest_checkpoint,
    prune,
    save_checkpoint,
)
from timefast.config import Parser, TrainConfig, add_flags, given_flags
from timefast.data import open_videos
from timefast.data.batch import Batch, ClipSpec, Failure
from timefast.data.rng import generator, torch_seed
from timefast.device import (
    autocast_for,
    check_impl,
    device_name,
    pick_device,
    share_cores_with_workers,
)
from timefast.errors import InputError, RunError
from timefast.eval.accuracy import predict, protocol, summarise, table
from timefast.failures import FailureLog
from timefast.kernels.op import OPS, first_choice
from timefast.log import JsonLines, read_json_lines, replace_json_lines, to_console
from timefast.meter import Curves, Progress, Window
from timefast.methods.time_ssl import TimeMethod
from timefast.models import VideoTransformer, create_model
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
MAX_SKIPPED_IN_A_ROW = 10  # steps whose gradients are not finite
MAX_FAILED_SAVES = 3


def main(argv: Sequence[str] | None = None) -> int:
    parser = Parser(
        prog="python -m timefast.train",
        description=__doc__,
        epilog="recipes:\n" + "\n".join(_recipe_line(name) for name in RECIPES),
    )
    parser.add_argument("--recipe", help="a named complete run (see below); flags replace values")
    parser.add_argument(
        "--resume", action="store_true", help="continue the run in --out, or the recipe's newest"
    )
    try:
        add_flags(parser)
        args = parser.parse_args(argv)
        to_console()
        config = resolve(args.recipe, args.resume, given_flags(args))
        with Interrupt() as interrupt:
            return Trainer(config, interrupt, resume=args.resume).run()
    except (InputError, NotImplementedError) as error:  # the latter: an --impl that cannot run
        print(f"error: {error}", file=sys.stderr)
        return 2
    except (RunError, torch.OutOfMemoryError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except OSError as error:  # a full disk, a run folder that went away
        print(f"error: {error}. Mend it and continue with --resume.", file=sys.stderr)
        return 1
    except RuntimeError as error:
        if "DataLoader worker" not in str(error):  # torch has no type of its own for it
            raise
        print(
            f"error: a decoding process ended: {error} If there was no memory left for it, use "
            "fewer --workers. Continue with --resume.",
            file=sys.stderr,
        )
        return 1


def _recipe_line(name: str) -> str:
    return f"  {name:28s} {(RECIPES[name].__doc__ or '').splitlines()[0]}"


def resolve(recipe: str | None, resume: bool, flags: dict[tuple[str, str], Any]) -> TrainConfig:
    """The complete configuration: recipe (or, resuming, the stored one) with flags on top."""
    base = get_recipe(recipe, flags.get(("model", "backbone")), bool(flags.get(("data", "root"))))
    out: Path | None = flags.get(("run", "out"))
    if resume:
        out = out or newest_run(base.recipe)
        if out is None:
            raise InputError(
                f"--resume: no run of recipe {base.recipe} in runs/; name it with --out"
            )
        stored = stored_config(out)
        if stored is not None:
            if recipe is not None and recipe != stored.recipe:
                raise InputError(f"{out} holds a run of recipe {stored.recipe}, not {recipe}")
            wanted = stored.replace({**flags, ("run", "out"): out})
            refuse_differences(stored, wanted, out)
            return wanted
    config = base.replace(flags)
    if out is None:
        out = new_run_name(config.recipe)
    elif not resume and (stored := stored_config(out)) is not None:
        refuse_differences(stored, config, out)
        raise InputError(f"{out} already holds this run; add --resume to continue it")
    return config.replace({("run", "out"): out})


class Interrupt:
    """Notes the first SIGINT or SIGTERM, for the loop to act on between steps; a second one exits.

    The exit code of an interrupted run is 128 + signal number.
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


class Trainer:
    """One run, from its configuration to its report."""

    def __init__(self, config: TrainConfig, interrupt: Interrupt, *, resume: bool = False):
        if config.data.root is None:
            from timefast.demo_data import demo_data_folder

            config = config.replace({("data", "root"): demo_data_folder()})
        assert config.data.root is not None and config.run.out is not None
        self.run_folder = config.run.out
        check_impl(config.run.impl)
        self.interrupt = interrupt
        self.device = pick_device(config.run.device)
        share_cores_with_workers(self.device)
        self.autocast, self.precision = autocast_for(self.device, config.run.precision)
        self.videos = open_videos(config.data.root, "train")
        self.validation = open_videos(config.data.root, "validation")
        # absolute, so that the run can be evaluated and continued from any folder
        self.config = config = config.replace({("data", "root"): self.videos.root})
        self.spec = clip_spec(config)
        goes_on = resume and bool(list_checkpoints(self.run_folder))
        self.model = build_model(config, len(self.videos.classes), initial_weights=not goes_on)
        self.model.to(self.device)
        self.method = TimeMethod(
            self.model,
            weights=config.method.weights(),
            label_smoothing=(
                config.method.smoothing_class,
                config.method.smoothing_order,
                config.method.smoothing_flow,
            ),
        )
        self.optimizer = build_optimizer(self.model, config.optim)
        # one path for all precisions: a scale of 1 changes no bit, but a gradient that is not
        # finite is found, and the fused optimizer leaves that step out without asking the host
        scale = 65536.0 if self.precision == "fp16" else 1.0
        self.scaler = torch.amp.GradScaler(self.device.type, init_scale=scale)
        self.loader = self._loader(train=True)
        self.batches_per_epoch = len(self.loader)
        self.steps_per_epoch = -(-self.batches_per_epoch // config.optim.accumulate)
        self.last_step = config.optim.epochs * self.steps_per_epoch
        if config.optim.max_steps is not None:
            self.last_step = min(self.last_step, config.optim.max_steps)

        make_run_folder(self.run_folder)
        self.lock = lock_run(self.run_folder)
        failures = self.run_folder / "failures.jsonl"
        videos = len(self.videos.records) + len(self.validation.records)
        self.failures = FailureLog(failures, videos, config.data.max_bad_fraction)
        # position: optimizer steps done, epoch, batches of it that are done
        self.step = self.epoch = self.batch = 0
        self.skipped_steps = 0
        self.failed_saves = 0
        self.noticed: set[tuple[str, str]] = set()
        if resume:
            self._restore()
        if config.run.compile:  # class logits come from calling the model, the rest from features
            self.model.compile()
            self.model.features = torch.compile(self.model.features)  # type: ignore[method-assign]

        path = self.run_folder / "metrics.jsonl"
        past = [m for m in read_json_lines(path) if {"kind", "step"} <= m.keys()]
        past = [line for line in past if line["step"] <= self.step]
        # the final evaluation comes again, even if its lines were written before a kill
        past = [m for m in past if m["kind"] != "eval" or m["step"] != self.last_step]
        replace_json_lines(path, past)
        self.evaluated_at = {line["step"] for line in past if line["kind"] == "eval"}
        self.metrics = JsonLines(path)
        self.curves = Curves(self.run_folder / "tensorboard", self.step)
        self.record = self._describe()
        write_json(self.run_folder / "config.json", self.record)

    def run(self) -> int:
        """Train, evaluate, report. 0, or 128 + signal number if interrupted."""
        window = Window()
        try:
            with Progress(self.last_step, self.step) as progress:
                while self.step < self.last_step:
                    self._evaluate_at_epoch_edge(window)
                    self._train_epoch(window, progress)
            rows = self.evaluate(self.config.run.views, self.config.run.shuffles)
        except Interrupted:
            logger.info(
                "interrupted at step %d; continue with --resume --out %s",
                self.step,
                self.run_folder,
            )
            return 128 + (self.interrupt.signal or 0)
        finally:
            self.loader.close()
            self.curves.close()
            self.metrics.close()
            self.lock.close()
        logger.info(
            "%s\nshuffled: mean of %d random frame orders per video\n%s",
            self._protocol(self.config.run.views), self.config.run.shuffles, table(rows),
        )  # fmt: skip
        if len(self.failures):
            logger.info("%d videos could not be used: %s", len(self.failures), self.failures.path)
        from timefast.report import write_report

        logger.info("report: %s", write_report(self.run_folder))
        return 0

    def _train_epoch(self, window: Window, progress: Progress) -> None:
        """Train to the end of this epoch, or to the last step; checkpoints on the way."""
        config, accumulate = self.config, self.config.optim.accumulate
        batches = self.loader.batches(self.epoch, self.batch)
        for index, batch in window.timed(enumerate(batches, self.batch)):
            self._note_failures(batch.failures, batch.notices)
            first = index // accumulate * accumulate
            end = min(first + accumulate, self.batches_per_epoch)
            # the mean over all clips of a step, however they are spread over batches
            share = len(batch.label) / self._clips_between(first, end)
            window.add(self._forward_backward(batch, index, share), share, batch)
            if index + 1 < end:
                continue

            lr = learning_rate(config.optim, self.step, self.steps_per_epoch)
            for group in self.optimizer.param_groups:
                group["lr"] = lr
            self.scaler.unscale_(self.optimizer)
            limit = config.optim.clip_grad or float("inf")
            window.end_step(nn.utils.clip_grad_norm_(self.model.parameters(), limit))
            self.scaler.step(self.optimizer)
            self.scaler.update(None if self.precision == "fp16" else 1.0)
            self.optimizer.zero_grad(set_to_none=True)
            self.step, self.batch = self.step + 1, index + 1
            progress.bar.update(1)

            # looked at once: a signal from here on is one for the next step, which is then saved
            interrupted = self.interrupt.signal is not None
            stop = interrupted or self.step == self.last_step
            if self.step % config.run.log_every == 0 or self.step == 1 or stop:
                self._log(window, progress, lr)
            at_edge = self.batch == self.batches_per_epoch
            if at_edge:
                self.epoch, self.batch = self.epoch + 1, 0
            if self.step % config.run.save_every == 0 or at_edge or stop:
                self.save()
            if interrupted:
                raise Interrupted
            if stop:
                return

    def _forward_backward(self, batch: Batch, index: int, share: float) -> dict[str, torch.Tensor]:
        """Losses and gradients of one batch; its random numbers are a function of its position."""
        seed = self.config.run.seed
        torch.manual_seed(torch_seed(seed, self.epoch, index, "stochastic depth"))
        order = generator(seed, self.epoch, index, "debias").permutation(self.spec.frames)
        try:
            batch = batch.to(self.device)
            with self.autocast():
                losses = self.method.training_loss(batch, torch.from_numpy(order).to(self.device))
            self.scaler.scale(losses["total"] * share).backward()
        except torch.OutOfMemoryError as error:
            peak = torch.cuda.max_memory_allocated() / 2**30
            raise torch.OutOfMemoryError(
                f"out of memory on a batch of {list(batch.video.shape)} in {self.precision}, peak "
                f"{peak:.1f} GiB. Halve --batch-size and double --accumulate (the same training), "
                f"use --precision bf16, or fewer --frames.\n{error}"
            ) from error
        return losses

    def _clips_between(self, first: int, end: int) -> int:
        """Clips in batches [first, end) of an epoch; only the last batch may be short."""
        size = self.config.optim.batch_size
        return min(end * size, len(self.videos.records)) - first * size

    def _log(self, window: Window, progress: Progress, lr: float) -> None:
        """One line of metrics.jsonl; the only place of the loop that waits for the device."""
        values, skipped = window.read()
        line = {"kind": "train", "step": self.step, "epoch": self.epoch, "lr": lr, **values}
        self._write_metrics(line)
        progress.show(line)
        self.curves.add({f"train/{key}": value for key, value in values.items()}, self.step)
        if not self.record["implementations"]:
            self.record["implementations"] = self._implementations()
            write_json(self.run_folder / "config.json", self.record)
        if skipped:
            self.skipped_steps += len(skipped)
            logger.warning(
                "left out %d steps: gradients not finite; videos %s", len(skipped), skipped
            )
        if window.skipped_in_a_row >= MAX_SKIPPED_IN_A_ROW:
            raise RunError(
                f"the gradients of {window.skipped_in_a_row} steps in a row were not finite "
                f"({self.precision}, lr {lr:.2g}). Lower --lr or use --precision bf16 or fp32; "
                "--resume continues from the last checkpoint."
            )

    def _write_metrics(self, *lines: dict[str, Any]) -> None:
        try:
            self.metrics.write(*lines)
        except OSError as error:  # what the disk did not take stays in the buffer
            logger.warning("%s: %s; written with the next line", self.metrics.path, error)

    def save(self) -> None:
        """Write a checkpoint. A full disk is a warning; the third in a row ends the run."""
        state = {
            "step": self.step,
            "epoch": self.epoch,
            "batch": self.batch,
            "skipped_steps": self.skipped_steps,
            "precision": self.precision,
            "data": self.videos.fingerprint(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "failures": self.failures.state(),
        }
        describe = {
            "config": self.model.config,
            "classes": self.record["classes"],
            "normalisation": {"mean": list(self.spec.mean), "std": list(self.spec.std)},
        }
        try:
            save_checkpoint(self.run_folder, self.step, self.model.state_dict(), state, describe)
            prune(self.run_folder, self.step, self.config.run.keep)
            self.failed_saves = 0
        except Exception as error:  # torch, safetensors and the system each raise their own
            self.failed_saves += 1
            logger.warning("checkpoint at step %d not written: %s", self.step, error)
            if self.failed_saves >= MAX_FAILED_SAVES:
                raise RunError(
                    f"{self.failed_saves} checkpoints in a row could not be written to "
                    f"{self.run_folder}: {error}. Make room and continue with --resume."
                ) from error

    def _restore(self) -> None:
        path = newest_checkpoint(self.run_folder)
        if path is None:
            logger.info("nothing to resume in %s: starting at step 0", self.run_folder)
            return
        found = load_checkpoint(path)
        then, now = found.state["data"], self.videos.fingerprint()
        if then != now:
            raise InputError(
                f"{self.videos.root} does not hold the training videos {self.run_folder} began "
                f"with: {then['videos']} then, {now['videos']} now, or other ids or labels. "
                "Continue with those (--data), or start a new run in another --out."
            )
        # "auto" means another precision on another device; a run keeps the one it began with
        self.autocast, self.precision = autocast_for(self.device, found.state["precision"])
        self.model.load_state_dict(found.weights)
        self.optimizer.load_state_dict(found.state["optimizer"])
        self.scaler.load_state_dict(found.state["scaler"])
        self.step, self.epoch, self.batch = (found.state[k] for k in ("step", "epoch", "batch"))
        self.skipped_steps = found.state["skipped_steps"]
        self.failures.restore(found.state["failures"])
        logger.info("resuming at step %d, epoch %d", self.step, self.epoch)

    def _evaluate_at_epoch_edge(self, window: Window) -> None:
        due = self.epoch > 0 and self.epoch % self.config.run.eval_every == 0
        if due and self.batch == 0 and self.step not in self.evaluated_at:
            before = time.perf_counter()
            rows = self.evaluate((1, 1), draws=1)
            window.leave_out(time.perf_counter() - before)
            logger.info("epoch %d, one clip per video\n%s", self.epoch, table(rows))

    def evaluate(self, views: tuple[int, int], draws: int) -> dict[str, dict[str, Any]]:
        """Accuracy on the validation videos, all and per subset; written to metrics.jsonl."""
        loader = self._loader(train=False, views=views)
        predictions = predict(
            self.model,
            self._until_interrupted(loader.batches(0), len(loader)),
            views=views[0] * views[1],
            draws=draws,
            seed=self.config.run.seed,
            device=self.device,
            autocast=self.autocast,
        )
        loader.close()
        self._note_failures(predictions.failures, predictions.notices)
        subsets = {"all": None, **self.validation.subsets}
        rows = {name: summarise(predictions, self.validation, y) for name, y in subsets.items()}
        place = {"kind": "eval", "step": self.step, "epoch": self.epoch, "split": "validation"}
        how = {"protocol": self._protocol(views), "shuffles": draws}
        self._write_metrics(
            *({**place, **how, "subset": name, **row} for name, row in rows.items())
        )
        for name, row in rows.items():
            shown = {f"eval/{name}/{key}": row[key] for key in ("top1", "shuffled_top1")}
            self.curves.add(shown, self.step)
        self.evaluated_at.add(self.step)
        return rows

    def _until_interrupted(self, batches: Iterator[Batch], total: int) -> Iterator[Batch]:
        for batch in tqdm(batches, "evaluating", total, disable=None, leave=False):
            if self.interrupt.signal is not None:
                raise Interrupted
            yield batch

    def _loader(self, *, train: bool, views: tuple[int, int] = (1, 1)) -> ClipLoader:
        config = self.config
        size, spec = config.optim.batch_size, self.spec
        if not train:
            size = max(1, size // (views[0] * views[1]))
            spec = dataclasses.replace(spec, flow_rule=None, flow_tau=None)
        return ClipLoader(
            self.videos if train else self.validation,
            spec,
            train=train,
            batch_size=size,
            seed=config.run.seed,
            workers=config.data.workers,
            pipeline=config.data.pipeline,
            device=self.device,
            views=views,
            max_bad_in_a_row=config.data.max_bad_in_a_row,
        )

    def _protocol(self, views: tuple[int, int]) -> str:
        return protocol(
            self.spec.frames, views, self.spec.crop, self.spec.test_short_side, "logits"
        )

    def _note_failures(self, failures: Sequence[Failure], notices: Sequence[Failure]) -> None:
        """Say once what is wrong with a video; count those that cannot be used."""
        for failure in self.failures.add(failures):
            logger.warning("not used: %s: %s, %s", failure.path, failure.kind, failure.reason)
        for notice in notices:
            if (notice.path, notice.kind) not in self.noticed:
                self.noticed.add((notice.path, notice.kind))
                logger.warning("used: %s: %s, %s", notice.path, notice.kind, notice.reason)

    def _implementations(self) -> dict[str, str]:
        """What each op of this run uses."""
        device = self.device.type
        used = {name: op.chosen[device] for name, op in OPS.items() if device in op.chosen}
        if self.spec.flow_rule is not None:  # decoding processes compute these on a CPU
            used |= {name: first_choice(name, device) for name in ("farneback", "flow_labels")}
        return used

    def _describe(self) -> dict[str, Any]:
        """The content of config.json; the first lines on the console say the same."""
        config, videos = self.config, self.videos
        size = sum(p.numel() for p in self.model.parameters()) / 1e6
        logger.info(
            "%s: %s, %.2f M parameters, losses %s, %s on %s",
            config.recipe, config.model.backbone, size,
            ", ".join(("class", *config.method.losses)), self.precision, device_name(self.device),
        )  # fmt: skip
        logger.info(
            "%d training and %d validation videos of %d classes in %s, decoded by %s",
            len(videos.records), len(self.validation.records), len(videos.classes), videos.root,
            self.loader.pipeline,
        )  # fmt: skip
        logger.info("%d steps, writing to %s", self.last_step, self.run_folder)
        return {
            "timefast": __version__,
            "created": datetime.now().astimezone().isoformat(timespec="seconds"),
            "recipe": config.recipe,
            "config": config.to_dict(),
            "model": self.model.config,
            "classes": list(videos.classes),
            "subsets": {name: list(labels) for name, labels in videos.subsets.items()},
            "videos": {v.split: v.fingerprint() for v in (videos, self.validation)},
            "clip": dataclasses.asdict(self.spec),
            "versions": versions(),
            "git_commit": git_commit(),
            "device": device_name(self.device),
            "total_steps": self.last_step,
            "precision": self.precision,
            "pipeline": self.loader.pipeline,
            "implementations": {},
        }


class Interrupted(Exception):
    """A signal asked the run to stop, and everything is saved."""


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


def build_model(
    config: TrainConfig, classes: int, *, initial_weights: bool = True
) -> VideoTransformer:
    """A new model; the seed decides every random value of it.

    Without `initial_weights` those of an image model are not read: a checkpoint replaces all.
    """
    torch.manual_seed(torch_seed(config.run.seed, 0, 0, "initial weights"))
    fields = dataclasses.asdict(config.model)
    weights = fields.pop("weights")
    model = create_model(
        **fields,
        num_classes=classes,
        impl=config.run.impl,
        time_heads=bool({"order", "flow"} & set(config.method.losses)),
    )
    if weights != "none" and initial_weights:
        from timefast.weights import load_imagenet

        load_imagenet(model, weights)
    return model


if __name__ == "__main__":
    sys.exit(main())
