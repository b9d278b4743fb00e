"""Registers, spills and shared memory of the flow kernels, for GPUs that need not be here.

    python -m bench.compile_flow                  # the table of docs/kernels/farneback.md
    python -m bench.compile_flow --json --cc 80   # one JSON object per variant
    python -m bench.compile_flow --json --one     # one variant per kernel: a quick look

What is compiled is what would be launched (bench/compile_table.py). Needs a process without
TRITON_INTERPRET, since an interpreting Triton cannot compile.
"""

import argparse
import json

import torch

from bench.compile_table import compiled, launches


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
