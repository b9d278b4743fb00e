"""Which device, precision and implementations of ops a command computes with."""

import contextlib
import os
from collections.abc import Callable
from typing import Any

import torch

from timefast.errors import InputError
from timefast.kernels.op import OPS


def pick_device(name: str) -> torch.device:
    """The device named; "auto" is CUDA where torch sees it. Raises InputError for one not here."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    expected = f"--device {name}: expected auto, cpu, cuda or cuda:<number>"
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise InputError(expected) from error
    if device.type not in ("cpu", "cuda"):
        raise InputError(expected)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise InputError(
            f"--device {name}: torch {torch.__version__} sees no CUDA device here; "
            "`python -m timefast.info` says what is missing"
        )
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise InputError(
            f"--device {name}: there are {torch.cuda.device_count()} CUDA devices here"
        )
    return device


def check_impl(name: str) -> None:
    """Raise InputError, before any work is done, for an implementation that not every op of the
    models has, or that cannot run on this machine."""
    asked = f"--impl {name}"
    if name == "auto":
        name = os.environ.get("TIMEFAST_IMPL", "auto")
        asked = f"TIMEFAST_IMPL={name}"
    ops = [op.all_impls() for key, op in OPS.items() if key not in ("farneback", "flow_labels")]
    known = set(ops[0]).intersection(*ops[1:])
    if name != "auto" and name not in known:
        raise InputError(f"{asked}: expected {', '.join(['auto', *sorted(known)])}")
    for reason in [] if name == "auto" else ops[0][name].unavailable():
        raise InputError(f"{asked}: {reason}. Without it each op takes the fastest that runs here")


def autocast_for(device: torch.device, precision: str) -> tuple[Callable[[], Any], str]:
    """A maker of autocast contexts, and the precision's name ("auto": bf16 on a GPU, else fp32)."""
    if precision == "auto":
        precision = "bf16" if device.type == "cuda" else "fp32"
    if precision == "fp32":
        return contextlib.nullcontext, precision
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}[precision]
    return lambda: torch.autocast(device.type, dtype=dtype), precision


def cores_of_this_process() -> int:
    """Cores that this process may use, shared with the other processes that torchrun started on
    this machine."""
    cores = len(os.sched_getaffinity(0))
    return max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE", 1)))


def share_cores_with_workers(device: torch.device) -> None:
    """On a CPU leave half of the cores to the decoding processes.

    The number of threads decides the order of sums, so it must not follow the number of workers: a
    run continued with other workers is to compute the same bits.
    """
    if device.type == "cpu":
        cores = cores_of_this_process()
        torch.set_num_threads(max(1, cores - cores // 2))


def device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
