"""What the compiler makes of every kernel that the launch parameters can choose: registers, spills,
shared memory, and which instructions. Needs no GPU.

    python -m bench.compile_table               writes docs/kernels/compiled.json and compiled.md
    python -m bench.compile_table --only space  the same for kernels of this name, the rest is kept
    python -m bench.compile_table --few         prints the readings of the paper's shapes instead
    python -m bench.compile_table --also        adds those of another Triton, the one installed

A launcher runs on CPU tensors while its launches are recorded instead of started; each variant of
the arguments (constants, dtypes, divisibility) is then compiled for the target and its machine code
read. What is compiled is therefore what would be launched. Needs a process without
TRITON_INTERPRET, since an interpreting Triton cannot compile.
"""

import argparse
import contextlib
import functools
import itertools
import json
import os
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

from timefast.kernels import tiles

DOCS = Path(__file__).resolve().parent.parent / "docs" / "kernels"
TARGETS = {80: "sm_80", 90: "sm_90", 100: "sm_90"}  # compute capability: table it runs with
SHARED_LIMIT = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}  # bytes per block
TYPES = {
    torch.float32: "fp32",
    torch.float64: "fp64",
    torch.float16: "fp16",
    torch.bfloat16: "bf16",
    torch.int64: "i64",
    torch.uint8: "u8",
}
FEATURES = {
    "mma.sync": r"\bmma\.sync",
    "wgmma": r"\bwgmma\.mma_async",
    "tcgen05": r"\btcgen05\.mma",
    "cp.async": r"\bcp\.async\.c[ag]",
    "128-bit loads": r"\bld\.global(\.\w+(::\w+)?)*\.v4\.b32|\bcp\.async\.cg",
    "atomics": r"\b(red|atom)\.global",
}
Launch = dict[str, Any]


# ---- what is launched


def time_step(frames: int, width: int, dtype: torch.dtype) -> None:
    """One call of the op and its backward pass, on slices of a fused projection; so are those
    below."""
    from timefast.kernels import divided_attention_triton as kernels

    if frames > 64 and dtype == torch.float32:
        return  # the kernels of shift_attention take those
    q, k, v = (
        torch.empty(1, 1 + frames * 7, 3, 12, width, dtype=dtype)[:, 1:]
        .unflatten(1, (frames, 7))
        .unbind(3)
    )
    out = kernels.time_attention_op(q, k, v, 1.0)
    kernels.time_attention_backward_op(out, q, k, v, 1.0)


def space_step(patches: int, width: int, dtype: torch.dtype) -> None:
    from timefast.kernels import divided_attention_triton as kernels

    tokens = torch.empty(1, 1 + 8 * patches, 3, 12, width, dtype=dtype)
    qkv = tokens[:, 1:].unflatten(1, (8, patches)).unbind(3)
    inputs = (*qkv, *tokens[:, 0].unbind(1))
    out, cls_out, lse = kernels.space_attention_op(*inputs, 1.0)
    kernels.space_attention_backward_op(out, cls_out, *inputs, out, cls_out, lse, 1.0)


def shift_step(tokens: int, width: int, shift_div: int, dtype: torch.dtype) -> None:
    from timefast.kernels import shift_attention_triton as kernels

    qkv = torch.empty(1, 8, tokens, 3, 12, width, dtype=dtype).unbind(3)
    out, lse = kernels.shift_attention_op(*qkv, 12 * width // shift_div, 1.0)
    kernels.shift_attention_backward_op(out, *qkv, out, lse, 12 * width // shift_div, 1.0)


def trajectory_step(
    frames: int, patches: int, heads: int, width: int, projected: bool, dtype: torch.dtype
) -> None:
    from timefast.kernels import trajectory_attention_triton as kernels

    dim = heads * width
    tokens = torch.empty(1, 1 + frames * patches, 3, heads, width, dtype=dtype)
    qkv = tokens[:, 1:].unflatten(1, (frames, patches)).unbind(3)
    shapes = ((dim, dim), (dim,), (2 * dim, dim), (2 * dim,))
    weights = [torch.empty(shape, dtype=dtype) for shape in shapes]
    inputs = (*qkv, *tokens[:, 0].unbind(1), *weights)
    out, cls_out, *saved = kernels.trajectory_attention_op(*inputs, projected, 1.0)
    kernels.trajectory_attention_backward_op(out, cls_out, *inputs, *saved, projected, 1.0)


def pairwise_step(patches: int, width: int, dtype: torch.dtype) -> None:
    from timefast.kernels import flow_attention_triton as kernels

    q, k, v = torch.empty(3, 1, 7, patches, width, dtype=dtype).unbind(0)
    out, lse = kernels.pairwise_attention_op(q, k, v, 1.0)
    long = out if patches > kernels.WHOLE else None
    kernels.pairwise_attention_backward_op(out, q, k, v, lse, 1.0, long)


def add_step(width: int, summed: bool, dtype: torch.dtype) -> None:
    """As in training, under autocast or without: the branch and its next input are of `dtype`."""
    from timefast.kernels import add_layer_norm_triton as kernels

    x, parameter = torch.empty(8000, width), torch.empty(width)
    branch, scale, branch_bias = None, None, None
    if summed:
        branch, scale, branch_bias = x.to(dtype), torch.empty(8000), parameter
    total, normed, moments = kernels.add_layer_norm_op(
        x, branch, parameter, parameter, scale, branch_bias, 1e-6, dtype
    )
    saved = (total if summed else x, parameter, scale, moments)
    kernels.add_layer_norm_backward_op(
        x if summed else None, normed, *saved, summed, 2 + summed, torch.float32, dtype
    )


WIDTHS = (64, 80, 128)  # of a head; 80 is held as 128
SHAPES: dict[Callable[..., None], list[tuple[Any, ...]]] = {
    time_step: list(itertools.product((8, 17, 64, 128), WIDTHS)),
    # left of the last tile of 32 or 64 is: a little, more than half, half, nothing
    space_step: [*itertools.product((196, 49), WIDTHS), (90, 64), (192, 64)],
    # folds at head borders, and inside heads: 8 columns, 1 column are sure to be of one frame
    shift_step: [*itertools.product((197, 50), WIDTHS, (4, 5)), (197, 64, 8)],
    # widths and what is left of the last tile; numbers of frames and heads
    trajectory_step: [
        *((*sizes, True) for sizes in ((8, 196, 12, 64), (32, 9, 24, 16), (64, 9, 32, 16))),
        *((*sizes, False) for sizes in ((8, 196, 12, 64), (32, 9, 24, 16), (64, 9, 32, 16))),
        *((2, patches, 2, width, False) for patches in (49, 192) for width in WIDTHS),
    ],
    pairwise_step: [(49, 768), (196, 768), (576, 768), (1024, 1024)],
    # a norm alone, and a sum of all there is to add
    add_step: list(itertools.product((192, 768, 1024, 2048, 3000, 8192), (False, True))),
}
PAPER: dict[Callable[..., None], list[tuple[Any, ...]]] = {
    time_step: [(8, 64)],
    space_step: [(196, 64)],
    shift_step: [(197, 64, 4)],
    trajectory_step: [(8, 196, 12, 64, False)],
    add_step: [(768, True)],
}


# ---- recording and compiling


@contextlib.contextmanager
def lookups() -> Iterator[list[dict[str, Any]]]:
    """The launch parameters looked up in the meantime, in order: for what, and which."""
    seen = []
    find = tiles.find

    def recorded(table: Any, entry: str, dtype: torch.dtype, width: int, length: int) -> Any:
        params = find(table, entry, dtype, width, length)
        seen.append({"entry": entry, "width": width, "length": length, "params": params})
        return params

    with patch.object(tiles, "find", recorded):
        yield seen


def launches(run: Callable[[], Any]) -> list[tuple[Any, Launch]]:
    """Every distinct (kernel, launch arguments) of `run`: types in place of run-time values, and
    the launch parameters that were looked up for it."""
    from triton.runtime.jit import JITFunction

    found: dict[str, tuple[Any, Launch]] = {}

    def record(kernel: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        options = {k: v for k, v in kwargs.items() if k not in kernel.arg_names}
        given = dict(zip(kernel.arg_names, args, strict=False))
        given |= {k: v for k, v in kwargs.items() if k in kernel.arg_names}
        launch: Launch = {
            "signature": {},
            "constants": {},
            "divisible": [],
            "options": options,
            "looked_up": seen[-1] if seen else {},
        }
        for parameter in kernel.params:
            _specialise(launch, parameter, given[parameter.name])
        found.setdefault(f"{kernel.__name__} {launch}", (kernel, launch))

    with patch.object(JITFunction, "run", record), lookups() as seen:
        run()
    return list(found.values())


def _specialise(launch: Launch, parameter: Any, value: Any) -> None:
    """As Triton's launcher does: 1 and None are constants, multiples of 16 are known as such."""
    name = parameter.name
    special = isinstance(value, int) and not parameter.do_not_specialize
    if parameter.is_constexpr or value is None or (special and value == 1):
        launch["signature"][name] = "constexpr"
        launch["constants"][name] = value
    elif isinstance(value, torch.Tensor):
        launch["signature"][name] = f"*{TYPES[value.dtype]}"
        launch["divisible"].append(name)
    elif isinstance(value, float):
        launch["signature"][name] = "fp32"
    else:
        launch["signature"][name] = "i32" if abs(value) < 2**31 else "i64"
        if special and value % 16 == 0:
            launch["divisible"].append(name)


def compiled(kernel: Any, launch: Launch, cc: int) -> dict[str, Any]:
    """Compile for compute capability `cc` (80, 90, ...) and read the machine code."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = kernel.arg_names
    source = ASTSource(
        fn=kernel,
        signature=launch["signature"],
        constexprs=launch["constants"],
        attrs={(names.index(n),): [["tt.divisibility", 16]] for n in launch["divisible"]},
    )
    result = triton.compile(source, target=GPUTarget("cuda", cc, 32), options=launch["options"])
    constants = launch["constants"].items()
    return {
        "kernel": kernel.__name__,
        "constants": {
            n: len(v) if isinstance(v, tuple) else v
            for n, v in constants
            if n.isupper() or v is None
        },
        "divisible": [n for n in launch["divisible"] if launch["signature"][n] == "i32"],
        "cc": cc,
        "warps": launch["options"].get("num_warps", 4),
        **_resources(result.asm["cubin"]),
        "shared": result.metadata.shared,
        "features": [f for f, pattern in FEATURES.items() if re.search(pattern, result.asm["ptx"])],
    }


def _resources(cubin: bytes) -> dict[str, int]:
    """Registers, stack bytes and spill instructions, by the cuobjdump inside Triton's wheel."""
    import triton

    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "kernel.cubin")
        path.write_bytes(cubin)
        usage, code = (
            subprocess.run([tool, flag, path], capture_output=True, text=True, check=True).stdout
            for flag in ("-res-usage", "-sass")
        )
    reading = {key: int(re.search(rf"{key}:(\d+)", usage)[1]) for key in ("REG", "STACK")}
    spills = len(re.findall(r"\b(?:LDL|STL)\b", code))
    return {"registers": reading["REG"], "stack": reading["STACK"], "spills": spills}


# ---- the table


def variants(
    shapes: dict[Callable[..., None], list[tuple[Any, ...]]],
    targets: Iterable[int],
    dtypes: Iterable[torch.dtype],
) -> Iterator[tuple[int, torch.dtype, Any, Launch]]:
    """Target, dtype, kernel and launch of everything that these shapes launch."""
    for cc, dtype in itertools.product(targets, dtypes):
        with patch.object(tiles, "table_for", functools.partial(_table_of, cc)):
            for step, sizes in shapes.items():
                for size in sizes:
                    for kernel, launch in launches(functools.partial(step, *size, dtype)):
                        yield cc, dtype, kernel, launch


def _table_of(cc: int, device: torch.device) -> dict[str, Any]:
    return tiles.table(TARGETS[cc])


def reading(variant: tuple[int, torch.dtype, Any, Launch]) -> dict[str, Any]:
    """A row of compiled.json."""
    cc, dtype, kernel, launch = variant
    found = compiled(kernel, launch, cc)
    known = ("D", "T", "WIDEN", "BLOCK_Q", "BLOCK_K")  # from the sizes and the parameters
    return {
        "cc": cc,
        "kernel": found["kernel"].strip("_").removesuffix("_kernel"),
        "dtype": str(dtype).removeprefix("torch."),
        **launch["looked_up"],
        "constants": {k: v for k, v in found["constants"].items() if k not in known},
        **{k: found[k] for k in ("registers", "stack", "spills", "shared", "features")},
    }


def main() -> None:
    import triton

    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--few", action="store_true", help="the paper's shapes, as JSON to stdout")
    parser.add_argument("--also", action="store_true", help="add the paper's shapes, this Triton")
    steps = {step.__name__.removesuffix("_step"): step for step in SHAPES}
    parser.add_argument("--only", choices=steps, help="one op; other rows are kept")
    args = parser.parse_args()
    if os.environ.pop("TRITON_INTERPRET", None):
        sys.exit(
            "bench.compile_table: unset TRITON_INTERPRET; an interpreting process cannot compile"
        )
    shapes, targets = (PAPER, (80, 90)) if args.few or args.also else (SHAPES, tuple(TARGETS))
    if args.only:
        shapes = {steps[args.only]: shapes[steps[args.only]]}
    dtypes = (torch.bfloat16,) if args.few else (torch.bfloat16, torch.float32)  # fp16 is as bf16
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        rows = list(pool.map(reading, variants(shapes, targets, dtypes)))
    if args.few:
        json.dump(rows, sys.stdout)
        return
    version = triton.__version__
    unique = {json.dumps(row): row for row in rows}
    rows = [{**row, "triton": version} for row in unique.values()]
    if args.only or args.also:
        before = json.loads((DOCS / "compiled.json").read_text("utf-8"))
        rows += [
            row
            for row in before
            if row["triton"] != version or not row["entry"].startswith(args.only or "")
        ]
    rows.sort(key=_order)
    lines = ",\n".join(json.dumps(row) for row in rows)
    (DOCS / "compiled.json").write_text(f"[\n{lines}\n]\n", encoding="utf-8")
    (DOCS / "compiled.md").write_text(_page(rows), encoding="utf-8")


def _order(row: dict[str, Any]) -> tuple[Any, ...]:
    return (
        row["cc"],
        row["kernel"],
        row["dtype"],
        row["width"],
        row["length"],
        str(row["constants"]),
    )


def _page(rows: list[dict[str, Any]]) -> str:
    """A line per kernel, dtype and launch parameters: smallest and largest reading."""
    main_version = Counter(row["triton"] for row in rows).most_common(1)[0][0]
    columns = ("kernel", "dtype", "width", "length", "parameters", "variants", *READINGS)
    text = [
        "# What the compiler makes of the kernels",
        "",
        f"Written by `python -m bench.compile_table` with Triton {main_version}; none of it was",
        "run on a GPU. Every variant stands in compiled.json. Spills count loads and stores of",
        "local memory; shared memory is in bytes per block (at most 166,912 on sm_80, 232,448 on",
        "sm_90 and sm_100). Width: of the model for pairwise_attention and add_layer_norm, of a",
        "head for the others. Length: T for kernels over time and along a trajectory, 1 for",
        "add_layer_norm, tokens or patches per frame for the others. float16 compiles like",
        "bfloat16, which for add_layer_norm is float32 with a branch and a result in bfloat16.",
    ]
    for cc in TARGETS:
        groups: dict[tuple[str, ...], list[dict[str, Any]]] = {}
        for r in (r for r in rows if (r["cc"], r["triton"]) == (cc, main_version)):
            params = ", ".join(f"{k} {v}" for k, v in r["params"].items())
            groups.setdefault((r["entry"], r["dtype"], params), []).append(r)
        lines = []
        for (entry, dtype, params), found in groups.items():
            sizes = [_range(found, key) for key in ("width", "length")]
            lines.append([entry, dtype, *sizes, params, str(len(found)), *_readings(found)])
        text += ["", f"## sm_{cc}", "", *_table(columns, lines)]
    columns = ("Triton", "target", "kernel", "dtype", *READINGS)
    others = [r for r in rows if r["triton"] != main_version]
    lines = [
        [r["triton"], f"sm_{r['cc']}", r["entry"], r["dtype"], *_readings([r])]
        for r in sorted(others, key=lambda r: r["triton"])
    ]
    text += ["", "## Other versions of Triton", ""]
    text += ["The paper's shapes; `python -m bench.compile_table --also` adds the installed one."]
    return "\n".join([*text, "", *_table(columns, lines)]) + "\n"


READINGS = ("registers", "spills", "shared", "uses")


def _readings(rows: list[dict[str, Any]]) -> list[str]:
    uses = [name for name in FEATURES if all(name in r["features"] for r in rows)]
    return [*(_range(rows, key) for key in READINGS[:-1]), ", ".join(uses)]


def _range(rows: list[dict[str, Any]], key: str) -> str:
    values = sorted(row[key] for row in rows)
    return str(values[0]) if values[0] == values[-1] else f"{values[0]}-{values[-1]}"


def _table(columns: tuple[str, ...], lines: list[list[str]]) -> list[str]:
    rule = "| --- " * len(columns) + "|"
    return [f"| {' | '.join(columns)} |", rule, *(f"| {' | '.join(line)} |" for line in lines)]


if __name__ == "__main__":
    main()
