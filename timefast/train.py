"""Train a video transformer: `python -m timefast.train --backbone timesformer`.

Without --data a small set of real encoded videos is generated once and the demo recipe trains on
it. Ctrl-C saves and stops; --resume continues as if nothing had happened.
"""

import dataclasses
import logging
import sys
import time
from collections.abc import Iterator, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import torch
from torch import nn
from tqdm import tqdm

from timefast import __version__, distributed
from timefast.build import build_model, clip_spec, look_up, refuse_other_videos
from timefast.checkpoint import (
    Checkpoint,
    load_checkpoint,
    newest_checkpoint,
    prune,
    save_checkpoint,
)
from timefast.config import Parser, RunConfig, TrainConfig, add_flags, given_flags
from timefast.cuda_graph import GraphedMethod, check_cuda_graphs
from timefast.data.batch import Batch, Failure, stand_in
from timefast.data.rng import generator, torch_seed
from timefast.device import autocast_for, device_name
from timefast.errors import InputError, RunError
from timefast.eval.accuracy import joined, predict, protocol, summarise, table
from timefast.failures import FailureLog
from timefast.interrupt import Interrupt, Interrupted
from timefast.kernels.op import OPS, first_choice
from timefast.log import JsonLines, read_json_lines, replace_json_lines, to_console
from timefast.meter import Curves, Progress, Window
from timefast.methods.time_ssl import TimeMethod
from timefast.models.vit import checkpoint_activations
from timefast.optim import build_optimizer, learning_rate
from timefast.pipelines.loader import ClipLoader
from timefast.profiling import StepProfiler, during
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
        to_console(logging.ERROR if distributed.rank() else logging.INFO)
        flags = given_flags(args)
        timeout = flags.get(("run", "timeout"), RunConfig().timeout)
        with distributed.process_group(timeout), Interrupt() as interrupt:
            config = distributed.from_leader(lambda: resolve(args.recipe, args.resume, flags))
            return Trainer(config, interrupt, resume=args.resume).run()
    except (InputError, NotImplementedError) as error:  # the latter: an --impl that cannot run
        return _failed(error, 2)
    except (RunError, torch.OutOfMemoryError) as error:
        return _failed(error, 1)
    except OSError as error:  # a full disk, a run folder that went away
        return _failed(f"{error}. Mend it and continue with --resume.", 1)
    except RuntimeError as error:
        if not distributed.lost_the_others(error):
            raise
        return _failed(
            "another process of this run ended or fell silent, its own message says why. "
            "Continue with --resume.",
            1,
        )


def _failed(error: Exception | str, code: int) -> int:
    """Say it, unless another process of the run has said the same; the exit code."""
    if distributed.first_to_say(str(error)):
        where = f" (process {distributed.rank()})" if distributed.rank() else ""
        print(f"error{where}: {error}", file=sys.stderr)
    return code


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
    elif not resume and newest_checkpoint(out) and (stored := stored_config(out)) is not None:
        refuse_differences(stored, config, out)
        raise InputError(f"{out} already holds this run; add --resume to continue it")
    return config.replace({("run", "out"): out})


class Trainer:
    """One run, from its configuration to its report."""

    def __init__(self, config: TrainConfig, interrupt: Interrupt, *, resume: bool = False):
        if config.data.root is None:
            from timefast.demo_data import demo_data_folder

            root = distributed.first_on_each_machine(demo_data_folder)
            config = config.replace({("data", "root"): root})
        assert config.run.out is not None
        self.run_folder = config.run.out
        self.interrupt = interrupt
        self.leads = distributed.rank() == 0  # the leader alone writes the run folder
        self.device, self.videos, self.validation = distributed.together(lambda: look_up(config))
        check_cuda_graphs(config.run.cuda_graphs, self.device)
        refuse_other_videos(self.videos)
        # absolute, so that the run can be evaluated and continued from any folder
        self.config = config = config.replace({("data", "root"): self.videos.root})
        self.spec = clip_spec(config)

        path = distributed.from_leader(lambda: self._newest() if resume else None)
        found = None if path is None else distributed.together(lambda: self._read(path))
        # "auto" means another precision on another device; a run keeps the one it began with
        precision = config.run.precision if found is None else found.state["precision"]
        self.autocast, self.precision = autocast_for(self.device, precision)
        self.model = distributed.first_on_each_machine(
            lambda: build_model(config, len(self.videos.classes), initial_weights=found is None)
        )
        if found is not None:
            self.model.load_state_dict(found.weights)
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
        self.method.freeze_unread()
        if config.run.checkpoint_activations != "none":
            checkpoint_activations(self.model, config.run.checkpoint_activations)
        self.sharded = config.run.shard and distributed.world_size() > 1
        if self.sharded:
            distributed.shard(self.model, ("time_outputs", "paired_outputs"))
            self.parallel: nn.Module = self.method
        elif config.run.cuda_graphs:  # before other threads turn to the device, as the loader's do
            example = stand_in(self.spec, self._clips_between(0, 1), 0).to(self.device)
            self.parallel = GraphedMethod(self.method, example, self.autocast)
        else:
            self.parallel = distributed.replicate(self.method, self.device)
        self.optimizer = build_optimizer(self.model, config.optim)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=self.precision == "fp16")
        self.loader = self._loader(train=True)
        self.batches_per_epoch = len(self.loader)
        self.steps_per_epoch = -(-self.batches_per_epoch // config.optim.accumulate)
        self.last_step = config.optim.epochs * self.steps_per_epoch
        if config.optim.max_steps is not None:
            self.last_step = min(self.last_step, config.optim.max_steps)

        distributed.from_leader(self._take_folder)
        failures = self.run_folder / "failures.jsonl"
        videos = len(self.videos.records) + len(self.validation.records)
        self.failures = FailureLog(
            failures, videos, config.data.max_bad_fraction, writes=self.leads
        )
        # position: optimizer steps done, epoch, batches of it that are done
        self.step = self.epoch = self.batch = 0
        self.skipped_steps = 0
        self.failed_saves = 0
        self.news: list[tuple[list[Failure], list[Failure]]] = []  # not yet told the others
        self.noticed: set[tuple[str, str]] = set()
        if found is not None:
            self._continue(found)
        elif resume:
            logger.info("nothing to resume in %s: starting at step 0", self.run_folder)
        if config.run.compile:  # all that every pass consists of, in training and evaluation
            self.model.embed = torch.compile(self.model.embed)  # type: ignore[method-assign]
            self.model.run = torch.compile(self.model.run)  # type: ignore[method-assign]

        self.record = self._describe()
        self.evaluated_at = distributed.from_leader(self._open_files)
        trace = self.run_folder / "profile" if config.run.profile and self.leads else None
        self.profiler = StepProfiler(trace, self.device)
        self.curves = Curves(self.run_folder / "tensorboard", self.step)

    def _take_folder(self) -> None:
        make_run_folder(self.run_folder)
        self.lock = lock_run(self.run_folder)

    def _open_files(self) -> set[int]:
        """Cut metrics.jsonl back to this step and write config.json; the steps evaluated at."""
        path = self.run_folder / "metrics.jsonl"
        past = [m for m in read_json_lines(path) if {"kind", "step"} <= m.keys()]
        past = [line for line in past if line["step"] <= self.step]
        # the final evaluation comes again, even if its lines were written before a kill
        past = [m for m in past if m["kind"] != "eval" or m["step"] != self.last_step]
        replace_json_lines(path, past)
        self.metrics = JsonLines(path)
        write_json(self.run_folder / "config.json", self.record)
        return {line["step"] for line in past if line["kind"] == "eval"}

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
            self.profiler.close()
            self.loader.close()
            self.curves.close()
            if self.leads:
                self.metrics.close()
                self.lock.close()
        logger.info(
            "%s\nshuffled: mean of %d random frame orders per video\n%s",
            self._protocol(self.config.run.views), self.config.run.shuffles, table(rows),
        )  # fmt: skip
        if len(self.failures):
            logger.info("%d videos could not be used: %s", len(self.failures), self.failures.path)
        if self.leads:
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
            # the mean over all clips of a step, however they are spread over batches and processes
            share = len(batch.label) / self._clips_between(first, end)
            last = index + 1 == end
            window.add(self._forward_backward(batch, index, share, last), share, batch)
            if not last:
                continue

            lr = learning_rate(config.optim, self.step, self.steps_per_epoch)
            with during("optimizer"):
                window.end_step(self._optimizer_step(lr))
            self.step, self.batch = self.step + 1, index + 1
            progress.bar.update(1)
            self.profiler.end_step()

            # looked at once: a signal from here on is one for the next step, which is then saved
            interrupted = self._agree()
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

    def _optimizer_step(self, lr: float) -> torch.Tensor:
        """-> the norm of the gradients. A step whose gradients are not finite is left out by the
        fused optimizer, on the device: nobody asks it for the norm."""
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.scaler.unscale_(self.optimizer)
        parameters = [p for p in self.model.parameters() if p.grad is not None]
        norm = nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
        if self.config.optim.clip_grad is not None:
            nn.utils.clip_grads_with_norm_(parameters, self.config.optim.clip_grad, norm)
        norm = distributed.full(norm)
        if not self.scaler.is_enabled():  # which would say it to the optimizer by this name
            self.optimizer.found_inf = (~norm.isfinite()).float()  # type: ignore[attr-defined]
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        return norm

    def _agree(self) -> bool:
        """What processes tell each other between two steps: bad videos, a wish to stop."""
        wish, news = distributed.largest(self.interrupt.signal or 0, len(self.news))
        if news:
            told = [entry for part in distributed.gather(self.news) for entry in part]
            self.news = []
            for failures, notices in told:
                self._tell(failures, notices)
        if wish:
            self.interrupt.signal = wish
        return bool(wish)

    def _forward_backward(
        self, batch: Batch, index: int, share: float, last: bool
    ) -> dict[str, torch.Tensor]:
        """Losses and gradients of one batch; its random numbers are a function of its position.

        `share` is the weight of these clips in the step. With the `last` batch of a step gradients
        are exchanged between the processes.
        """
        seed, rank = self.config.run.seed, distributed.rank()
        purpose = f"stochastic depth {rank}" if rank else "stochastic depth"
        torch.manual_seed(torch_seed(seed, self.epoch, index, purpose))
        order = generator(seed, self.epoch, index, "debias").permutation(self.spec.frames)
        if not share:  # fewer clips than processes: one that stands in, with weight 0
            batch = stand_in(self.spec, 1, 0)
        try:
            batch = batch.to(self.device)
            order_here = torch.from_numpy(order).to(self.device, non_blocking=True)
            with distributed.gradient_exchange(self.parallel, last):
                with self.autocast(), during("forward"):
                    losses = self.parallel(batch, order_here)
                # processes average their gradients, and shares are of all their clips together
                weight = share * distributed.world_size()
                with during("backward"):
                    self.scaler.scale(losses["total"] * weight).backward()
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
            if self.leads:
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
        if not self.leads:
            return
        try:
            self.metrics.write(*lines)
        except OSError as error:  # what the disk did not take stays in the buffer
            logger.warning("%s: %s; written with the next line", self.metrics.path, error)

    def save(self) -> None:
        """Write a checkpoint. A full disk is a warning; the third in a row ends the run."""
        weights = distributed.whole(self.model.state_dict())
        state = {
            "step": self.step,
            "epoch": self.epoch,
            "batch": self.batch,
            "skipped_steps": self.skipped_steps,
            "precision": self.precision,
            "world_size": distributed.world_size(),
            "data": self.videos.fingerprint(),
            "optimizer": distributed.whole(self.optimizer.state_dict()),
            "scaler": self.scaler.state_dict(),
            "failures": self.failures.state(),
        }
        error = distributed.from_leader(lambda: self._write(weights, state))
        self.failed_saves = 0 if error is None else self.failed_saves + 1
        if self.failed_saves >= MAX_FAILED_SAVES:
            raise RunError(
                f"{self.failed_saves} checkpoints in a row could not be written to "
                f"{self.run_folder}: {error}. Make room and continue with --resume."
            )

    def _write(self, weights: dict[str, torch.Tensor], state: dict[str, Any]) -> str | None:
        """-> what went wrong; None if the checkpoint is there."""
        describe = {
            "config": self.model.config,
            "classes": self.record["classes"],
            "normalisation": {"mean": list(self.spec.mean), "std": list(self.spec.std)},
        }
        try:
            save_checkpoint(self.run_folder, self.step, weights, state, describe)
            prune(self.run_folder, self.step, self.config.run.keep)
        except Exception as error:  # torch, safetensors and the system each raise their own
            logger.warning("checkpoint at step %d not written: %s", self.step, error)
            return str(error)
        return None

    def _newest(self) -> Path | None:
        return newest_checkpoint(self.run_folder)

    def _read(self, path: Path) -> Checkpoint:
        """The checkpoint to go on from; refused if the run began with other videos."""
        found = load_checkpoint(path)
        then, now = found.state["data"], self.videos.fingerprint()
        if then != now:
            raise InputError(
                f"{self.videos.root} does not hold the training videos {self.run_folder} began "
                f"with: {then['videos']} then, {now['videos']} now, or other ids or labels. "
                "Continue with those (--data), or start a new run in another --out."
            )
        return found

    def _continue(self, found: Checkpoint) -> None:
        state = found.state
        parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        for index, values in state["optimizer"]["state"].items():
            like = parameters[index]
            for name, value in values.items():
                if value.shape == like.shape:
                    values[name] = distributed.part_of(value, like)
        self.optimizer.load_state_dict(state["optimizer"])
        self.scaler.load_state_dict(state["scaler"])
        self.step, self.epoch, self.batch = (state[k] for k in ("step", "epoch", "batch"))
        self.skipped_steps = state["skipped_steps"]
        self.failures.restore(state["failures"])
        logger.info("resuming at step %d, epoch %d", self.step, self.epoch)
        then, now = state.get("world_size", 1), distributed.world_size()
        if then != now:
            logger.info(
                "the checkpoint is of %d processes, this run has %d: the same batches, but other "
                "draws of stochastic depth and another order of sums", then, now,
            )  # fmt: skip

    def _evaluate_at_epoch_edge(self, window: Window) -> None:
        due = self.epoch > 0 and self.epoch % self.config.run.eval_every == 0
        if due and self.batch == 0 and self.step not in self.evaluated_at:
            before = time.perf_counter()
            rows = self.evaluate((1, 1), draws=1)
            window.leave_out(time.perf_counter() - before)
            logger.info("epoch %d, one clip per video\n%s", self.epoch, table(rows))

    def evaluate(self, views: tuple[int, int], draws: int) -> dict[str, dict[str, Any]]:
        """Accuracy on the validation videos, all and per subset; written to metrics.jsonl."""
        self.profiler.close()  # of training steps only
        loader = self._loader(train=False, views=views)
        own = predict(
            self.model,
            self._until_interrupted(loader.batches(0), len(loader), views[0] * views[1]),
            views=views[0] * views[1],
            draws=draws,
            seed=self.config.run.seed,
            device=self.device,
            autocast=self.autocast,
        )
        loader.close()
        predictions = joined(distributed.gather(own), len(self.validation.records))
        self._tell(predictions.failures, predictions.notices)
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

    def _until_interrupted(
        self, batches: Iterator[Batch], total: int, views: int
    ) -> Iterator[Batch]:
        hidden = None if self.leads else True
        for batch in tqdm(batches, "evaluating", total, disable=hidden, leave=False):
            if self._agree():
                raise Interrupted
            if self.sharded and not len(batch.label):
                # all processes must run a sharded model, also one without clips in this batch
                nobody = len(self.validation.records)
                empty = stand_in(self.spec, views, nobody)
                batch = dataclasses.replace(empty, failures=batch.failures, notices=batch.notices)
            yield batch

    def _loader(self, *, train: bool, views: tuple[int, int] = (1, 1)) -> ClipLoader:
        config = self.config
        size, spec = config.optim.batch_size, self.spec
        if not train:
            size = max(distributed.world_size(), size // (views[0] * views[1]))
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
            rank=distributed.rank(),
            world_size=distributed.world_size(),
        )

    def _protocol(self, views: tuple[int, int]) -> str:
        return protocol(
            self.spec.frames, views, self.spec.crop, self.spec.test_short_side, "logits"
        )

    def _note_failures(self, failures: list[Failure], notices: list[Failure]) -> None:
        if failures or notices:
            self.news.append((failures, notices))

    def _tell(self, failures: Sequence[Failure], notices: Sequence[Failure]) -> None:
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
            "processes": distributed.world_size(),
            "pipeline": self.loader.pipeline,
            "implementations": {},
        }


if __name__ == "__main__":
    sys.exit(main())
