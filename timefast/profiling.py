"""Where the time of a training step goes: a trace, and a table of its parts.

`@part("mlp")` names what a method computes. While a profiler is watching, its time is added up
under that name; else the decorator costs one look at a flag, and torch.compile sees nothing of it.
"""

import contextlib
import functools
import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile, record_function

logger = logging.getLogger("timefast")
WARM_UP, MEASURED = 2, 5  # steps
PREFIX = "timefast: "


def part(name: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    def decorate(function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def named(*args: Any, **kwargs: Any) -> Any:
            if torch.compiler.is_compiling() or not torch.autograd._profiler_enabled():
                return function(*args, **kwargs)
            with record_function(PREFIX + name):
                return function(*args, **kwargs)

        return named

    return decorate


@contextlib.contextmanager
def during(name: str) -> Iterator[None]:
    """As `part`, for some lines."""
    if torch.autograd._profiler_enabled():
        with record_function(PREFIX + name):
            yield
    else:
        yield


class StepProfiler:
    """Watches some steps after the first ones and writes `trace.json` (for Perfetto or
    chrome://tracing) and `parts.txt` to `folder`, once. Without a folder it does nothing."""

    def __init__(self, folder: Path | None, device: torch.device):
        self.folder, self.cuda = folder, device.type == "cuda"
        self._steps = 0
        self._closed = False
        self._profile: Any = None

    def end_step(self) -> None:
        """Called between two steps."""
        self._steps += 1
        if self.folder is None or self._closed:
            return
        if self._steps == WARM_UP:
            activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * self.cuda
            self._profile = profile(activities=activities)
            self._profile.start()
        elif self._steps == WARM_UP + MEASURED:
            self.close()

    def close(self) -> None:
        """Called before evaluations and at the end: write what was seen, however few steps."""
        if self.folder is None or self._closed or not self._steps:
            return
        self._closed = True
        seen, self._profile = self._profile, None
        if seen is not None:
            seen.stop()
        steps = self._steps - WARM_UP
        if seen is None or not steps:
            logger.warning(
                "no profile was written: it needs at least %d steps before the first evaluation, "
                "there were %d", WARM_UP + 1, self._steps,
            )  # fmt: skip
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        seen.export_chrome_trace(str(self.folder / "trace.json"))
        text = table(seen, steps, self.cuda)
        (self.folder / "parts.txt").write_text(text + "\n", "utf-8")
        logger.info("profile of %d steps in %s\n%s", steps, self.folder, text)


def table(seen: Any, steps: int, cuda: bool) -> str:
    """Milliseconds per step of each part: on a GPU those its kernels took, else the host's.

    With --checkpoint-activations a part includes what the backward pass computes of it again.
    """
    unit = "device" if cuda else "cpu"
    parts = {
        event.key.removeprefix(PREFIX): getattr(event, f"{unit}_time_total") / steps / 1e3
        for event in seen.key_averages()
        # a range comes twice on a GPU: as the host saw it, and as a mark on the device's line
        if event.key.startswith(PREFIX) and event.device_type == DeviceType.CPU
    }
    around = {name: parts.pop(name, 0.0) for name in ("data", "backward", "optimizer")}
    forward = parts.pop("forward", 0.0)
    rest = forward - sum(parts.values())
    rows = {"data": around["data"], **parts, "rest of the forward pass": max(rest, 0.0)}
    rows |= {name: around[name] for name in ("backward", "optimizer")}
    step = forward + sum(around.values())
    lines = [f"{'part':24s} {'ms a step':>10s} {'share':>7s}"]
    lines += [f"{name:24s} {ms:10.2f} {ms / max(step, 1e-9):7.1%}" for name, ms in rows.items()]
    return "\n".join([*lines, f"{'step':24s} {step:10.2f} {1:7.1%}"])
