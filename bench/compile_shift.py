"""Registers, spills and shared memory of the shifted attention kernels. Needs no GPU.

python -m bench.compile_shift          # the table of docs/kernels/shift_attention.md
python -m bench.compile_shift --few    # the paper's shape, as one JSON object per kernel
"""

import argparse
import functools
import itertools
import json

import torch

from bench.compile_trajectory import TABLES, print_table, readings


def step(frames: int, tokens: int, heads: int, width: int, shift_div: int, dtype: torch.dtype):
    """One call of the op and its backward pass, on slices of a fused projection."""
    from timefast.kernels.shift_attention_triton import (
        shift_attention_backward_op,
        shift_attention_op,
    )

    qkv = torch.empty(1, frames, tokens, 3, heads, width, dtype=dtype).unbind(3)
    fold, scale = heads * width // shift_div, width**-0.5
    out, lse = shift_attention_op(*qkv, fold, scale)
    shift_attention_backward_op(out, *qkv, out, lse, fold, scale)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--few", action="store_true", help="only the paper's shape, as JSON")
    if parser.parse_args().few:
        for cc, shift_div in itertools.product(TABLES, (4, 8)):  # 3 heads; 1.5 heads
            run = functools.partial(step, 8, 197, 12, 64, shift_div, torch.bfloat16)
            for row in readings(cc, run):
                print(json.dumps(row))
        return
    shapes = [
        (8, 197, 12, 64, 4),
        (8, 197, 12, 64, 8),
        (16, 257, 16, 80, 4),
        (8, 50, 4, 128, 4),
        (4, 1, 3, 16, 3),
    ]
    variants = itertools.product(shapes, (torch.bfloat16, torch.float32))
    print_table([(d, functools.partial(step, *s, d)) for s, d in variants])


if __name__ == "__main__":
    main()
