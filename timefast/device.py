"""Which device and which precision a command computes with."""

import contextlib
from collections.abc import Callable
from typing import Any

import torch

from timefast.errors import InputError


def pick_device(name: str) -> torch.device:
    """The device named; "auto" is CUDA where torch sees it. Raises InputError for one not here."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise InputError(f"--device {name}: not a device torch knows") from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise InputError(
            f"--device {name}: torch {torch.__version__} sees no CUDA device here; "
            "`python -m timefast.info` says what is missing"
        )
    return device


def autocast_for(device: torch.device, precision: str) -> tuple[Callable[[], Any], str]:
    """A maker of autocast contexts, and the precision's name ("auto": bf16 on a GPU, else fp32)."""
    if precision == "auto":
        precision = "bf16" if device.type == "cuda" else "fp32"
    if precision == "fp32":
        return contextlib.nullcontext, precision
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}[precision]
    return lambda: torch.autocast(device.type, dtype=dtype), precision


def device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
