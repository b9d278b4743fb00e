"""What a training loop shows of itself: losses and times of its last steps, a bar, curves."""

import contextlib
import logging
import math
import time
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from timefast import distributed
from timefast.data.batch import Batch
from timefast.profiling import during

logger = logging.getLogger("timefast")


class Progress:
    """A bar on a terminal, plain lines elsewhere; of several processes the leader shows it."""

    def __init__(self, total: int, done: int):
        hidden = True if distributed.rank() else None
        self.bar = tqdm(
            total=total, initial=done, unit="step", dynamic_ncols=True, disable=hidden, leave=True
        )
        self.total = total

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *_: Any) -> None:
        self.bar.close()

    def show(self, line: dict[str, Any]) -> None:
        parts = {k.removeprefix("loss_"): line[k] for k in line if k.startswith("loss_")}
        shown = {k: f"{v:.2f}" for k, v in parts.items() if v}
        rate = f"{line['clips_per_s']:.1f} clips/s"
        waits = f"data {line['data_s'] / max(line['step_s'], 1e-9):.0%}"
        loss = "not finite" if line["loss"] is None else f"{line['loss']:.3f}"
        if not self.bar.disable:
            self.bar.set_postfix_str(
                f"loss {loss} ({' '.join(f'{k} {v}' for k, v in shown.items())}) {rate} {waits}"
            )
        else:
            left = (self.total - line["step"]) * line["step_s"]
            logger.info(
                "step %d/%d  epoch %d  loss %s  %s  %s  %s  %d s left",
                line["step"], self.total, line["epoch"], loss,
                "  ".join(f"{k} {v}" for k, v in shown.items()), rate, waits, left,
            )  # fmt: skip


class Curves:
    """For TensorBoard, where that optional package is installed; else nothing is drawn.

    Of several processes the leader draws. A disk that refuses them ends the curves, not the run.
    """

    def __init__(self, folder: Path, step: int):
        self._writer: Any = None
        if distributed.rank():
            return
        with contextlib.suppress(ImportError):
            from torch.utils.tensorboard import SummaryWriter

            self._writer = SummaryWriter(str(folder), purge_step=step + 1 if step else None)

    def add(self, values: dict[str, float | None], step: int) -> None:
        if self._writer is None:
            return
        try:
            for name, value in values.items():
                if value is not None:
                    self._writer.add_scalar(name, value, step)
        except OSError as error:
            logger.warning("no curves for TensorBoard from here on: %s", error)
            self._writer = None

    def close(self) -> None:
        """Write what is still in memory: TensorBoard does so every two minutes only."""
        if self._writer is None:
            return
        try:
            self._writer.close()
        except OSError as error:
            logger.warning("the last points of the TensorBoard curves are lost: %s", error)


class Window:
    """Sums of losses and times since the last line of metrics; reading it waits for the device."""

    def __init__(self) -> None:
        self.skipped_in_a_row = 0
        self._clear()

    def _clear(self) -> None:
        self._sums: dict[str, torch.Tensor] = {}
        self._norms: list[torch.Tensor] = []  # one per step
        self._samples: list[list[torch.Tensor]] = [[]]  # one list per step
        self._clips = 0
        self._data_s = 0.0
        self._start = time.perf_counter()

    def leave_out(self, seconds: float) -> None:
        """Do not count this time (an evaluation, say) as training."""
        self._start += seconds

    def timed(self, batches: Any) -> Any:
        """The same batches; the time spent waiting for them is added up."""
        iterator = iter(batches)
        while True:
            before = time.perf_counter()
            with during("data"):
                item = next(iterator, None)
            self._data_s += time.perf_counter() - before
            if item is None:
                return
            yield item

    def add(self, losses: dict[str, torch.Tensor], share: float, batch: Batch) -> None:
        for name, value in losses.items():
            value = value.detach() * share
            self._sums[name] = self._sums[name] + value if name in self._sums else value
        self._samples[-1].append(batch.sample)
        self._clips += len(batch.label)

    def end_step(self, norm: torch.Tensor) -> None:
        self._norms.append(norm)
        self._samples.append([])

    def read(self) -> tuple[dict[str, Any], list[list[int]]]:
        """Means over the steps and sums over the processes, and the videos of each step whose
        gradients were not finite."""
        norms = torch.stack(self._norms).cpu()  # the same in all processes
        own = {k: float(v) for k, v in self._sums.items()}, self._clips, self._data_s
        gathered = distributed.gather(own)
        sums = {k: sum(part[0][k] for part in gathered) / len(norms) for k in own[0]}
        seconds = time.perf_counter() - self._start
        skipped: list[list[int]] = []
        for finite, samples in zip(norms.isfinite().tolist(), self._samples, strict=False):
            self.skipped_in_a_row = 0 if finite else self.skipped_in_a_row + 1
            if not finite:
                of_all = distributed.gather(torch.cat(samples).tolist())
                skipped.append([sample for part in of_all for sample in part])

        def finite_or_none(value: float) -> float | None:
            return value if math.isfinite(value) else None

        line = {"loss": finite_or_none(sums["total"])}
        line |= {f"loss_{k}": finite_or_none(v) for k, v in sums.items() if k != "total"}
        line |= {
            "grad_norm": finite_or_none(float(norms[-1])),
            "clips_per_s": sum(part[1] for part in gathered) / seconds,
            "data_s": max(part[2] for part in gathered) / len(norms),
            "step_s": seconds / len(norms),
        }
        self._clear()
        return line, skipped
