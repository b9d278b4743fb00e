"""Flow labels of clips of 8 frames at 224 x 224: clips a second are `extra_info["clips"] / median`.

"reference" is batched PyTorch on the same device, "cpu" OpenCV over all cores, "cv2" OpenCV pair
after pair on one thread, as the published training code computes its labels.
"""

from typing import Any

import pytest
import torch

from timefast.kernels.farneback import smooth_texture
from timefast.kernels.flow_labels import flow_labels
from timefast.kernels.op import implementations

ON_GPU = torch.cuda.is_available()
AGREEMENT = 0.995  # of the labels, with the reference in the same run


def clips_of_texture(clips: int, device: str) -> torch.Tensor:
    """[B, 3, 8, 224, 224]: a texture that drifts by (-2, 1) pixels a frame, under noise."""
    generator = torch.Generator(device).manual_seed(0)
    texture = smooth_texture((clips, 3, 1), 224, 224, generator, device) / 128
    video = torch.cat([texture.roll((t, -2 * t), dims=(-2, -1)) for t in range(8)], dim=2)
    return video + 0.02 * torch.randn(video.shape, generator=generator, device=device)


@pytest.mark.parametrize("clips", [1, 8, 64] if ON_GPU else [1])
@pytest.mark.parametrize("impl", ["triton", "reference", "cpu", "cv2"])
def bench_labels(benchmark: Any, impl: str, clips: int) -> None:
    if reasons := implementations("flow_labels")[impl]:
        pytest.skip("; ".join(reasons))
    if impl == "triton" and not ON_GPU:
        pytest.skip("the interpreter's time means nothing")
    device = "cuda" if ON_GPU and impl in ("triton", "reference") else "cpu"
    video = clips_of_texture(clips, device)

    def run() -> torch.Tensor:
        labels = flow_labels(video, impl=impl)
        if device == "cuda":
            torch.cuda.synchronize()
        return labels

    expected = flow_labels(video[:1], impl="reference")
    unequal = (run()[:1] != expected).float().mean().item()
    assert unequal <= 1 - AGREEMENT
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        benchmark.extra_info["peak_memory"] = torch.cuda.max_memory_allocated() - before
    benchmark.extra_info.update(
        op="flow_labels", impl=impl, case=f"{clips} x 8 x 224 x 224", dtype="float32",
        direction="fwd", clips=clips, error=unequal, shapes=[list(video.shape)],
        threads=torch.get_num_threads(), on=device,
    )  # fmt: skip
    benchmark.pedantic(run, rounds=20 if device == "cuda" else 5, warmup_rounds=2)
