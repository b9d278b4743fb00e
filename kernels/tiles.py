"""Launch parameters of the kernels, looked up in tables: kernels/tuned/<name>.json.

A table belongs to an architecture (`sm_80`, `sm_90`: defaults for every GPU) or to a GPU model
(`<name>` is torch.cuda.get_device_name in lower case with dashes), whose kernels replace those of
the architecture; `python -m bench.autotune` measures and writes such a table. A kernel has a list
of rows {"dtype", "width", "length", parameters...}; the first that covers the inputs is taken.
Nothing is measured or tuned during a run: ranks that tuned for themselves would differ in rounding
and in when they reach the first collective.
"""

import functools
import json
from pathlib import Path
from typing import Any

import torch

TABLES = Path(__file__).with_name("tuned")


def power_of_two(size: int, at_least: int = 1) -> int:
    return max(at_least, 1 << (size - 1).bit_length())


def launch_parameters(kernel: str, like: torch.Tensor, length: int) -> dict[str, Any]:
    """Parameters for inputs like `like` (dtype, device, last dimension), sequences of `length`."""
    return find(table_for(like.device), kernel, like.dtype, like.shape[-1], length)


def find(
    table: dict[str, Any], kernel: str, dtype: torch.dtype, width: int, length: int
) -> dict[str, Any]:
    half = "float" if dtype == torch.float32 else "half"
    for row in table[kernel]:
        if row["dtype"] == half and width <= row["width"] and length <= row["length"]:
            return {k: v for k, v in row.items() if k not in ("dtype", "width", "length")}
    raise ValueError(f"{kernel}: no launch parameters for {half}, width {width}, length {length}")


def table_for(device: torch.device) -> dict[str, Any]:
    if device.type != "cuda":
        return table("sm_80")
    index = torch.cuda.current_device() if device.index is None else device.index
    return _table_of_gpu(index)


@functools.cache
def _table_of_gpu(index: int) -> dict[str, Any]:
    major, _ = torch.cuda.get_device_capability(index)
    of_architecture = table("sm_90" if major >= 9 else "sm_80")
    model = model_name(index)
    if not (TABLES / f"{model}.json").exists():
        return of_architecture
    return {**of_architecture, **table(model)}


def model_name(index: int) -> str:
    return torch.cuda.get_device_name(index).lower().replace(" ", "-")


@functools.cache
def table(name: str) -> dict[str, Any]:
    return json.loads((TABLES / f"{name}.json").read_text(encoding="utf-8"))
