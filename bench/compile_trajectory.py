"""Registers, spills and shared memory of the trajectory attention kernels. Needs no GPU.

python -m bench.compile_trajectory          # the table of docs/kernels/trajectory_attention.md
python -m bench.compile_trajectory --few    # the paper's shape, as one JSON object per kernel
"""

import argparse
import functools
import itertools
import json
from collections.abc import Callable
from typing import Any
from unittest.mock import patch

import torch

from bench.compile_flow import compiled, launches
from timefast.kernels import tiles

TABLES = {80: "sm_80", 90: "sm_90"}  # compute capability: launch parameters


def step(frames: int, patches: int, heads: int, width: int, dtype: torch.dtype, projected: bool):
    """One call of the op and its backward pass, on slices of a fused projection."""
    from timefast.kernels.trajectory_attention_triton import (
        trajectory_attention_backward_op,
        trajectory_attention_op,
    )

    dim = heads * width
    tokens = torch.empty(1, 1 + frames * patches, 3, heads, width, dtype=dtype)
    qkv = tokens[:, 1:].unflatten(1, (frames, patches)).unbind(3)
    weights = [
        torch.empty(*s, dtype=dtype) for s in ((dim, dim), (dim,), (2 * dim, dim), (2 * dim,))
    ]
    inputs = (*qkv, *tokens[:, 0].unbind(1), *weights)
    out, cls_out, *saved = trajectory_attention_op(*inputs, projected, width**-0.5)
    trajectory_attention_backward_op(out, cls_out, *inputs, *saved, projected, width**-0.5)


def readings(cc: int, run: Callable[[], Any]) -> list[dict[str, Any]]:
    with patch.object(tiles, "table_for", lambda device: tiles.table(TABLES[cc])):
        wanted = launches(run)
    return [compiled(kernel, launch, cc) for kernel, launch in wanted]


def print_table(runs: list[tuple[torch.dtype, Callable[[], Any]]]) -> None:
    """Per kernel, dtype and target the smallest and largest reading over all runs."""
    print(
        "| kernel | variants | registers | spills | stack | shared bytes |\n"
        "|---|---|---|---|---|---|"
    )
    for cc in TABLES:
        rows: dict[str, list[dict[str, Any]]] = {}
        for dtype, run in runs:
            for row in readings(cc, run):
                name = f"{row['kernel']}, {str(dtype).removeprefix('torch.')}"
                if row not in rows.setdefault(name, []):
                    rows[name].append(row)
        for name, found in rows.items():
            cells = []
            for key in ("registers", "spills", "stack", "shared"):
                values = [row[key] for row in found]
                cells.append("-".join(str(x) for x in sorted({min(values), max(values)})))
            print(f"| {name}, sm_{cc} | {len(found)} | {' | '.join(cells)} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--few", action="store_true", help="only the paper's shape, as JSON")
    if parser.parse_args().few:
        for cc in TABLES:
            for row in readings(cc, lambda: step(8, 196, 12, 64, torch.bfloat16, False)):
                print(json.dumps(row))
        return
    shapes = [
        (8, 196, 12, 64),
        (16, 196, 12, 64),
        (8, 49, 16, 80),
        (4, 17, 3, 32),
        (32, 64, 24, 128),
    ]
    variants = itertools.product(shapes, (torch.bfloat16, torch.float32), (False, True))
    print_table([(d, functools.partial(step, *s, d, p)) for s, d, p in variants])


if __name__ == "__main__":
    main()
