"""Flow labels of clips of 8 frames: clips a second are `extra_info["clips"] / median`.

"reference" is batched PyTorch on the same device, "cpu" OpenCV over all cores, "cv2" OpenCV pair
after pair on one thread, as the published training code computes its labels, "cv2_cuda" OpenCV's
CUDA class where the installed OpenCV has it, each result waited for. The error is the share of
labels that differ from the reference; the CUDA class has other border rules than OpenCV's CPU code,
and its time is recorded whatever its labels are.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from bench.conftest import ON_GPU
from timefast.kernels.flow_labels import flow_labels, flow_labels_op
from timefast.kernels.op import Case, implementations

CASES = [c for c in flow_labels_op.cases if c.size == ("paper" if ON_GPU else "mid")]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
@pytest.mark.parametrize("impl", ["triton", "reference", "cpu", "cv2", "cv2_cuda"])
def bench_labels(measure: Callable[..., None], impl: str, case: Case) -> None:
    if reasons := implementations("flow_labels")[impl]:
        pytest.skip("; ".join(reasons))
    if impl == "triton" and not ON_GPU:
        pytest.skip("the interpreter's time means nothing")
    device = "cuda" if ON_GPU and impl not in ("cpu", "cv2") else "cpu"
    (video,), options = case.build(torch.float32, device, torch.Generator(device).manual_seed(0))

    def run() -> torch.Tensor:
        return flow_labels(video, **options, impl=impl)

    info: dict[str, Any] = {
        "op": "flow_labels",
        "impl": impl,
        "case": case.name,
        "shapes": [list(video.shape)],
        "dtype": "float32",
        "direction": "fwd",
        "clips": video.shape[0],
    }
    expected = flow_labels(video[:1], **options, impl="reference")
    unequal = (run()[:1] != expected).float().mean().item()
    measure(run, error=unequal, limit=1.0 if impl == "cv2_cuda" else 0.005, **info)
