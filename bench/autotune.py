"""Time launch parameters on this GPU and write kernels/tuned/<its name>.json, which from then on
goes before the defaults of its architecture (kernels/tiles.py).

    python -m bench.autotune                                  all ops with parameters, bfloat16
    python -m bench.autotune --op space_attention --dtype float32

For each kernel that the op's paper-sized cases launch: every combination of CHOICES, the rest of
the step unchanged. A row is written for shapes up to that of the case, in front of the others.
"""

import argparse
import datetime
import itertools
import json
from collections.abc import Callable, Iterable
from typing import Any
from unittest.mock import patch

import torch
import triton
from triton.runtime.errors import OutOfResources

from bench.compile_table import lookups
from timefast import ops
from timefast.kernels import tiles
from timefast.kernels.op import OPS

CHOICES = {
    "rows": (16, 32, 64),
    "block": (16, 32, 64),
    "block_q": (16, 32, 64, 128),
    "block_k": (16, 32, 64),
    "block_c": (32, 64, 128),
    "tile": (1024, 2048, 4096),
    "programs": (432, 540, 648, 528, 660, 792),  # 4 to 6 per multiprocessor of an A100, an H200
    "num_warps": (2, 4, 8),
    "num_stages": (1, 2, 3),
}
MARGIN = 0.98  # what the present parameters' time is multiplied with: noise is no reason to change
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
Params = dict[str, Any]


def candidates(present: Params) -> list[Params]:
    """The present parameters first, then every other combination for the same names."""
    names = [name for name in present if name in CHOICES]
    values = itertools.product(*(CHOICES[name] for name in names))
    others = ({**present, **dict(zip(names, v, strict=True))} for v in values)
    return [present, *(params for params in others if params != present)]


def fastest(options: Iterable[Params], time: Callable[[Params], float]) -> Params:
    """The first of `options` (the present ones) unless another takes clearly less; what a GPU has
    no room for is passed over."""
    present, *others = options
    best, least = present, MARGIN * time(present)
    for params in others:
        try:
            taken = time(params)
        except OutOfResources:
            continue
        if taken < least:
            best, least = params, taken
    return best


def tuned_row(dtype: torch.dtype, looked_up: dict[str, Any], best: Params) -> dict[str, Any]:
    half = "float" if dtype == torch.float32 else "half"
    sizes = {"width": looked_up["width"], "length": looked_up["length"]}
    return {"dtype": half, **sizes, **best}


def in_front(row: dict[str, Any], rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """`rows` with this one first: before what covers more, in the place of one for the same."""
    same = ("dtype", "width", "length")
    kept = [r for r in rows if any(r[key] != row[key] for key in same)]
    before = [r for r in kept if r["width"] <= row["width"] and r["length"] < row["length"]]
    return [*before, row, *(r for r in kept if r not in before)]


def time_with(entry: str, run: Callable[[], Any], params: Params) -> float:
    """Median time of `run` in milliseconds when this kernel takes these parameters."""
    find = tiles.find

    def chosen(table: Any, kernel: str, *about: Any) -> Params:
        return params if kernel == entry else find(table, kernel, *about)

    with patch.object(tiles, "find", chosen):
        return triton.testing.do_bench(run, return_mode="median")


def tune(name: str, dtype: torch.dtype, table: dict[str, Any]) -> None:
    """Put the fastest parameters of one op into `table`, each shape class by its first case."""
    done = set()
    for case in (case for case in OPS[name].cases if case.size == "paper"):
        args, kwargs = case.build(dtype, "cuda", torch.Generator().manual_seed(0))
        if name == "add_layer_norm":  # as in training under autocast: only the branch is rounded
            args = tuple(x if i == 1 else x.float() for i, x in enumerate(args))
        leaves = [x.detach().requires_grad_() for x in args]

        def step(leaves: Any = leaves, kwargs: Any = kwargs) -> None:
            with torch.autocast("cuda", dtype, enabled=dtype != torch.float32):
                out = getattr(ops, name)(*leaves, **kwargs, impl="triton")
            out = out if isinstance(out, tuple) else (out,)
            torch.autograd.grad(out, leaves, [torch.ones_like(x) for x in out])

        with lookups() as seen:
            step()
        for looked_up in {found["entry"]: found for found in seen}.values():
            entry, width, length = (looked_up[key] for key in ("entry", "width", "length"))
            if (entry, width, length) in done:
                continue
            done.add((entry, width, length))
            best = fastest(
                candidates(looked_up["params"]),
                lambda params, entry=entry, step=step: time_with(entry, step, params),
            )
            print(f"{case.name} {entry}: {looked_up['params']} -> {best}", flush=True)
            table[entry] = in_front(tuned_row(dtype, looked_up, best), table[entry])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    tuned = [name for name in OPS if name.endswith("attention") or name == "add_layer_norm"]
    parser.add_argument("--op", choices=tuned, action="append", help="default: all")
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error(
            "torch sees no CUDA device; launch parameters are timed on the GPU they are for "
            "(without one, kernels/tuned/sm_80.json and sm_90.json are used as they are)"
        )
    device = torch.cuda.current_device()
    table = dict(tiles.table_for(torch.device("cuda", device)))
    for name in args.op or tuned:
        tune(name, DTYPES[args.dtype], table)
    table["about"] = (
        f"Measured by python -m bench.autotune on {torch.cuda.get_device_name(device)}, torch "
        f"{torch.__version__}, triton {triton.__version__}, {datetime.date.today().isoformat()}; "
        "rows that cover more than the paper's shapes are the defaults of the architecture."
    )
    path = tiles.TABLES / f"{tiles.model_name(device)}.json"
    path.write_text(json.dumps(table, indent=1) + "\n", encoding="utf-8")
    print(f"wrote {path}; now run python -m pytest -m gpu")


if __name__ == "__main__":
    main()
