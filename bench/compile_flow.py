"""Registers, spills and shared memory of the flow kernels, for GPUs that need not be here.

    python -m bench.compile_flow                  # the table of docs/kernels/farneback.md
    python -m bench.compile_flow --json --cc 80   # one JSON object per variant
    python -m bench.compile_flow --json --one     # one variant per kernel: a quick look

A launcher runs on CPU tensors while its launches are recorded instead of started; each variant of
the arguments (constants, dtypes, divisibility) is then compiled for the target and its machine code
read. What is compiled is therefore what would be launched. Needs a process without
TRITON_INTERPRET, since an interpreting Triton cannot compile.
"""

import argparse
import json
from collections.abc import Callable
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

from bench.compile_table import _resources

DTYPES = {
    torch.float32: "fp32",
    torch.float64: "fp64",
    torch.float16: "fp16",
    torch.bfloat16: "bf16",
    torch.int64: "i64",
    torch.uint8: "u8",
}


def launches(run: Callable[[], Any]) -> list[tuple[JITFunction, dict[str, Any]]]:
    """Every distinct (kernel, launch arguments) of `run`: types in place of run-time values."""
    found: dict[str, tuple[JITFunction, dict[str, Any]]] = {}

    def record(kernel: JITFunction, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        options = {k: v for k, v in kwargs.items() if k not in kernel.arg_names}
        given = dict(zip(kernel.arg_names, args, strict=False))
        given |= {k: v for k, v in kwargs.items() if k in kernel.arg_names}
        launch: dict[str, Any] = {
            "signature": {},
            "constants": {},
            "divisible": [],
            "options": options,
        }
        for parameter in kernel.params:
            _specialise(launch, parameter, given[parameter.name])
        found.setdefault(f"{kernel.__name__} {launch}", (kernel, launch))

    started, JITFunction.run = JITFunction.run, record
    try:
        run()
    finally:
        JITFunction.run = started
    return list(found.values())


def _specialise(launch: dict[str, Any], parameter: Any, value: Any) -> None:
    """As Triton's launcher does: 1 is a constant, multiples of 16 are known as such."""
    name = parameter.name
    special = isinstance(value, int) and not parameter.do_not_specialize
    if parameter.is_constexpr or (special and value == 1):
        launch["signature"][name] = "constexpr"
        launch["constants"][name] = value
    elif isinstance(value, torch.Tensor):
        launch["signature"][name] = f"*{DTYPES[value.dtype]}"
        launch["divisible"].append(name)
    elif isinstance(value, float):
        launch["signature"][name] = "fp32"
    else:
        launch["signature"][name] = "i32" if abs(value) < 2**31 else "i64"
        if special and value % 16 == 0:
            launch["divisible"].append(name)


def compiled(kernel: JITFunction, launch: dict[str, Any], cc: int) -> dict[str, Any]:
    """Compile for compute capability `cc` (80, 90, ...) and read the machine code."""
    names = kernel.arg_names
    source = ASTSource(
        fn=kernel,
        signature=launch["signature"],
        constexprs=launch["constants"],
        attrs={(names.index(n),): [["tt.divisibility", 16]] for n in launch["divisible"]},
    )
    target = GPUTarget("cuda", cc, 32)
    result = triton.compile(source, target=target, options=launch["options"])
    constants = launch["constants"].items()
    return {
        "kernel": kernel.__name__,
        "constants": {
            n: len(v) if isinstance(v, tuple) else v for n, v in constants if n.isupper()
        },
        "divisible": [n for n in launch["divisible"] if launch["signature"][n] == "i32"],
        "cc": cc,
        "warps": launch["options"].get("num_warps", 4),
        **_resources(result.asm["cubin"]),
        "shared": result.metadata.shared,
    }


def flow() -> None:
    """Labels at training size and of large frames; flow of odd sizes, other parameters."""
    from timefast.kernels.farneback_triton import farneback_triton, flow_labels_triton

    channels = (38.0, 75.0, 15.0, 0.0)
    for dtype in (torch.float32, torch.bfloat16, torch.uint8):
        video = torch.empty(2, 3, 8, 224, 224, dtype=dtype)
        flow_labels_triton(video, 16, None, channels)
    flow_labels_triton(torch.empty(1, 3, 2, 1088, 1904), 14, 0.5, channels)
    image = torch.empty(1, 97, 131)
    farneback_triton(image, image, 0.6, 5, 21, 2, 7, 1.5)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cc", type=int, nargs="*", default=[80, 90])
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--one", action="store_true", help="only one variant of each kernel")
    options = parser.parse_args()
    wanted = launches(flow)
    if options.one:
        wanted = list({kernel.__name__: (kernel, launch) for kernel, launch in wanted}.values())
    rows = [compiled(kernel, launch, cc) for kernel, launch in wanted for cc in options.cc]
    if options.json:
        for row in rows:
            print(json.dumps(row))
        return
    print("| kernel | variants | warps | registers | spills | stack | shared bytes |")
    print("|---|---|---|---|---|---|---|")
    for name in dict.fromkeys(row["kernel"] for row in rows):
        for cc in options.cc:
            mine = [row for row in rows if (row["kernel"], row["cc"]) == (name, cc)]
            numbers = (
                "-".join(
                    str(n) for n in sorted({f([row[key] for row in mine]) for f in (min, max)})
                )
                for key in ("warps", "registers", "spills", "stack", "shared")
            )
            print(f"| `{name}` sm_{cc} | {len(mine)} | " + " | ".join(numbers) + " |")


if __name__ == "__main__":
    main()
