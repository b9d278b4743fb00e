"""What the compiler makes of every kernel variant that the launch parameters can choose: registers,
spills, shared memory, and which instructions. Needs no GPU.

    python -m bench.compile_table           writes docs/kernels/compiled.json and compiled.md
    python -m bench.compile_table --json    prints the readings instead
    python -m bench.compile_table --few     prints those of the paper's shapes in bfloat16
"""

import argparse
import itertools
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

DOCS = Path(__file__).resolve().parent.parent / "docs" / "kernels"
TARGETS = {80: "sm_80", 90: "sm_90", 100: "sm_90"}  # compute capability: table it runs with
SHARED_LIMIT = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}  # bytes per block
TYPES = {torch.bfloat16: "*bf16", torch.float32: "*fp32"}  # float16 compiles like bfloat16
FEATURES = {
    "mma.sync": r"\bmma\.sync",
    "wgmma": r"\bwgmma\.mma_async",
    "tcgen05": r"\btcgen05\.mma",
    "cp.async": r"\bcp\.async\.c[ag]",
    "128-bit loads": r"\bld\.global(\.\w+(::\w+)?)*\.v4\.b32|\bcp\.async\.cg",
    "atomics": r"\b(red|atom)\.global",
}
FLOAT32 = {"cls_out_ptr", "lse_ptr", "delta_ptr", "grad_cls_ptr"} | {f"cls_d{x}_ptr" for x in "qkv"}

Variant = dict[str, Any]


def variants(few: bool) -> Iterator[Variant]:
    """Kernel, target, dtype and sizes; `few` takes bfloat16 and the paper's sizes."""
    widths = (64,) if few else (64, 80, 128)
    dtypes = (torch.bfloat16,) if few else tuple(TYPES)
    frames = (8,) if few else (8, 17, 64, 128)
    patches = (196,) if few else (49, 196)
    kernels = [(f"time_attention_{x}", frames) for x in ("fwd", "bwd")]
    kernels += [(f"pairwise_attention_{x}", patches) for x in ("fwd", "bwd_dq", "bwd_dkv")]
    kernels += [(f"space_attention_{x}", patches) for x in ("fwd", "bwd_dq", "bwd_dkv")]
    for cc in (80, 90) if few else TARGETS:
        for kernel, lengths in kernels:
            for dtype, width, length in itertools.product(
                dtypes, (768,) if kernel.startswith("pairwise") else widths, lengths
            ):
                if (cc, kernel, dtype) == (80, "time_attention_bwd", torch.float32) and length > 64:
                    continue  # refused: more shared memory than this architecture has
                values = (cc, kernel, dtype, width, length)
                yield dict(zip(("cc", "kernel", "dtype", "width", "length"), values, strict=True))


def compiled(variant: Variant, params: dict[str, Any] | None = None) -> dict[str, Any]:
    """The readings of one variant, with these launch parameters or those that its table gives."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from timefast.kernels import divided_attention_triton, flow_attention_triton
    from timefast.kernels.tiles import find, table

    cc, name, dtype, width, length = variant.values()
    params = params or find(table(TARGETS[cc]), name, dtype, width, length)
    if name.startswith("time"):
        kernels: Any = divided_attention_triton
        constants = kernels.time_constants(length, width, dtype, params)
    elif name.startswith("pairwise"):
        kernels = flow_attention_triton
        constants = kernels.pairwise_constants(length, width, dtype, params)
    else:
        kernels = divided_attention_triton
        over = "queries" if name.endswith("dkv") else "keys"
        constants = kernels.space_constants(length, width, dtype, params, over)
    kernel = getattr(kernels, f"_{name}_kernel")

    types, aligned = {}, []
    for i, argument in enumerate(kernel.arg_names):
        if argument in constants:
            types[argument] = "constexpr"
        elif argument.endswith("_stride_d"):
            types[argument] = "constexpr"  # what a launch makes of an integer that is 1
            constants[argument] = 1
        elif argument.endswith("_ptr"):
            types[argument] = "*fp32" if argument in FLOAT32 else TYPES[dtype]
            aligned.append(i)
        elif "_stride_" in argument:
            types[argument] = "i32"
            aligned.append(i)
        else:
            types[argument] = "fp32" if argument.startswith("scale") else "i32"
    source = ASTSource(
        fn=kernel,
        signature=types,
        constexprs=constants,
        attrs={(i,): [["tt.divisibility", 16]] for i in aligned},
    )
    options = {k: v for k, v in params.items() if k.startswith("num_")}
    built = triton.compile(
        source, target=GPUTarget("cuda", cc, 32), options={**options, "enable_fp_fusion": True}
    )
    found = [f for f, pattern in FEATURES.items() if re.search(pattern, built.asm["ptx"])]
    return {
        **variant,
        "dtype": str(dtype).removeprefix("torch."),
        "params": params,
        **_resources(built.asm["cubin"]),
        "shared": built.metadata.shared,
        "loads": len(re.findall(r"\bld\.global", built.asm["ptx"])),
        "features": found,
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--few", action="store_true", help="only the paper's shapes, to stdout")
    parser.add_argument("--json", action="store_true", help="everything, to stdout")
    args = parser.parse_args()
    if os.environ.pop("TRITON_INTERPRET", None):
        sys.exit(
            "bench.compile_table: unset TRITON_INTERPRET; an interpreting process cannot compile"
        )
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        rows = list(pool.map(compiled, variants(args.few)))
    if args.few or args.json:
        json.dump(rows, sys.stdout)
    else:
        lines = ",\n".join(json.dumps(row) for row in rows)
        (DOCS / "compiled.json").write_text(f"[\n{lines}\n]\n", encoding="utf-8")
        (DOCS / "compiled.md").write_text(_page(rows), encoding="utf-8")


def _page(rows: list[dict[str, Any]]) -> str:
    import triton

    head = "| kernel | dtype | D | T or N | parameters | registers | spills | shared | uses |"
    text = [
        "# What the compiler makes of the attention kernels",
        "",
        f"Written by `python -m bench.compile_table` with Triton {triton.__version__}; none of it "
        "was run on a GPU.",
        "Spills count loads and stores of local memory; shared memory is in bytes per block",
        "(at most 166,912 on sm_80, 232,448 on sm_90 and sm_100). T for time, N for space.",
    ]
    for cc in TARGETS:
        text += ["", f"## sm_{cc}", "", head, "| --- " * head.count(" | ") + "| --- |"]
        for r in (r for r in rows if r["cc"] == cc):
            params = ", ".join(f"{k} {v}" for k, v in r["params"].items())
            text.append(
                f"| {r['kernel']} | {r['dtype']} | {r['width']} | {r['length']} | {params} "
                f"| {r['registers']} | {r['spills']} | {r['shared']} | {', '.join(r['features'])} |"
            )
    return "\n".join(text) + "\n"


if __name__ == "__main__":
    main()
