"""Nine-way motion label of every patch between consecutive frames: 0 still, 1..8 octants.

Label k > 0 says that the angle of the patch's mean flow lies in [45 (k - 1), 45 k) degrees, counted
from "right" towards "down" (clockwise on the screen, since y points down).

Letters: B clips, T frames, P = T - 1 pairs, N patches per frame (row-major); `height`, `width` in
pixels. The flow comes from `farneback`, in its default parameters, which are the published ones.

Two rules say which patches move. "minmax" is what the published training code does: within a pair,
magnitudes are scaled so that the slowest patch has 0 and the fastest 100, and a patch moves from 1
on. It is relative: without real motion the largest noise counts as motion, and under a camera pan
the slowest patch is still. "tau" is the rule of the paper (eq. 9, 10): a patch moves from tau
pixels on. The paper leaves open how pixels become a patch; here, as in the published code, vectors
are averaged first and polar coordinates are taken of the mean.
"""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from timefast.kernels.farneback import (
    PUBLISHED,
    check_size,
    farneback_cv2_cuda,
    farneback_reference,
    for_each,
    opencv_cuda_missing,
    opencv_missing,
    opencv_patch_means,
    smooth_texture,
    why_not_triton,
)
from timefast.kernels.op import Case, Impl, Op, dispatch, register, triton_unavailable

LUMA = (0.299, 0.587, 0.114)  # of red, green, blue
GAIN = 128.0  # the published code multiplies the normalised grey frame by this


def flow_labels(
    video: Tensor,
    *,
    patch_size: int = 16,
    rule: str = "minmax",
    tau: float | None = None,
    mean: Sequence[float] = (0.5, 0.5, 0.5),
    std: Sequence[float] = (0.5, 0.5, 0.5),
    impl: str = "auto",
) -> Tensor:
    """Motion labels int64 [B, T-1, N], values 0..8, of a video [B, 3, T, height, width].

    `video` is RGB as the model sees it: floating point, normalised with `mean` and `std` of frames
    in 0..1. Farnebäck flow depends on the contrast of its input, so whatever the normalisation, the
    frames are brought to the published one (mean and std 0.5) before the flow is computed. A
    uint8 video is taken as the frames themselves, 0..255, and needs no `mean` and `std`.

    A patch that moves has label 1..8, the octant of its mean flow clockwise from "right"; one that
    does not has 0. `rule` says which move: "minmax" (the published code) scales the lengths of a
    pair's flow so that its slowest patch has 0 and its fastest 100, and takes those from 1 on;
    "tau" (the paper) takes those from `tau` pixels on, at this resolution. `tau` goes with the
    second rule alone. A pair with a NaN in its flow has label 0 everywhere. The result carries no
    gradient.

    `impl` is "auto" ("triton" on CUDA, "cpu" on a CPU), "reference", "triton", "cpu" (OpenCV over a
    pool of threads), "cv2" (OpenCV on the calling thread) or "cv2_cuda" (OpenCV's CUDA class,
    whose results differ).

    Raises ValueError for wrong shapes or dtypes, a single frame, a height or width that is no
    multiple of `patch_size` or under 11 pixels, an unknown rule, a tau that is missing or does not
    belong; NotImplementedError with the reasons if the implementation named cannot run: those of
    `farneback`.
    """
    if video.dim() != 5 or video.shape[1] != 3:
        raise ValueError(f"video: expected [B, 3, T, height, width], got {list(video.shape)}")
    if video.shape[2] < 2:
        raise ValueError(
            f"video: expected two or more frames, since a label is about a pair of them; got T = "
            f"{video.shape[2]} in {list(video.shape)}"
        )
    if not (video.is_floating_point() or video.dtype == torch.uint8):
        raise ValueError(f"video: expected normalised floats or uint8 frames, got {video.dtype}")
    height, width = video.shape[-2:]
    if patch_size < 1 or height % patch_size or width % patch_size or not height or not width:
        raise ValueError(
            f"video: expected height and width to be multiples of patch_size={patch_size}, "
            f"got {height} x {width}"
        )
    check_size("video", height, width, PUBLISHED["poly_n"])
    if rule not in ("minmax", "tau"):
        raise ValueError(f'rule: expected "minmax" or "tau", got {rule!r}')
    if rule == "minmax" and tau is not None:
        raise ValueError(f'tau: rule "minmax" has no threshold, got tau={tau}; use rule="tau"')
    if rule == "tau" and tau is None:
        raise ValueError('tau: rule "tau" needs a threshold in pixels, e.g. tau=1.0; got None')
    if tau is not None and not 0 <= tau < math.inf:
        raise ValueError(f"tau: expected a number of pixels, 0 or more, got {tau}")
    mean, std = tuple(mean), tuple(std)
    if len(mean) != 3 or len(std) != 3 or min(std) <= 0:
        raise ValueError(f"mean, std: expected three numbers each, std > 0; got {mean} and {std}")
    return dispatch(
        flow_labels_op,
        impl,
        video.detach(),
        patch_size=patch_size,
        tau=tau,
        channels=grey_channels(video.dtype, mean, std),
    )


def grey_channels(
    dtype: torch.dtype, mean: Sequence[float], std: Sequence[float]
) -> tuple[float, float, float, float]:
    """Weights of red, green, blue and the offset that turn video values into flow input.

    weight . video + offset = GAIN * LUMA . (frame - 0.5) / 0.5, where frame = video * std + mean.
    """
    if dtype == torch.uint8:
        mean, std = (0.0,) * 3, (1 / 255,) * 3
    red, green, blue = (GAIN * luma * s / 0.5 for luma, s in zip(LUMA, std, strict=True))
    offset = GAIN * sum(luma * (m - 0.5) / 0.5 for luma, m in zip(LUMA, mean, strict=True))
    return red, green, blue, offset


def grey(video: Tensor, channels: tuple[float, float, float, float]) -> Tensor:
    """[B, 3, T, height, width] -> float32 [B, T, height, width] on the scale farneback expects."""
    red, green, blue = video.float().unbind(1)
    return red * channels[0] + green * channels[1] + blue * channels[2] + channels[3]


def _labels(flow: Tensor, patch_size: int, tau: float | None) -> Tensor:
    """[B, P, 2, height, width] -> int64 [B, P, N]"""
    *batch, _, height, width = flow.shape
    rows, columns = height // patch_size, width // patch_size
    patches = flow.view(*batch, 2, rows, patch_size, columns, patch_size)
    vectors = patches.mean((-3, -1)).flatten(-2)  # [B, P, 2, N]
    return label_vectors(vectors, tau)


def label_vectors(vectors: Tensor, tau: float | None) -> Tensor:
    """Mean flow of patches [..., 2, N] -> labels int64 [..., N]; tau None is the minmax rule."""
    dx, dy = vectors.unbind(-2)
    radius = (dx * dx + dy * dy).sqrt()
    if tau is None:
        low, high = radius.aminmax(dim=-1, keepdim=True)
        extent = high - low
        moving = (100 * (radius - low) / extent >= 1) & (extent >= torch.finfo(torch.float64).eps)
    else:
        moving = radius >= tau
    moving &= ~radius.isnan().any(-1, keepdim=True)
    return torch.where(moving, 1 + _octant(dx, dy), 0)


def _octant(dx: Tensor, dy: Tensor) -> Tensor:
    """floor(angle / 45 degrees) by comparisons: exact, where an arctangent rounds at the borders.

    The vector is turned by quarters into the first quadrant, where it is (along, across).
    """
    quarter = torch.where(dy > 0, (dx <= 0).long(), torch.where(dx < 0, 2, 3))
    quarter = torch.where((dy == 0) & (dx >= 0), 0, quarter)
    along = torch.where(quarter % 2 == 0, dx.abs(), dy.abs())
    across = torch.where(quarter % 2 == 0, dy.abs(), dx.abs())
    return 2 * quarter + ((across >= along) & (across > 0))


@torch.no_grad()
def flow_labels_reference(
    video: Tensor,
    *,
    patch_size: int,
    tau: float | None,
    channels: tuple[float, float, float, float],
) -> Tensor:
    """The definition: grey, flow of consecutive frames, mean of each patch, label."""
    frames = grey(video, channels)  # [B, T, height, width]
    flow = farneback_reference(frames[:, :-1], frames[:, 1:], **PUBLISHED)
    return _labels(flow, patch_size, tau)


def flow_labels_cpu(video: Tensor, **parameters: Any) -> Tensor:
    """OpenCV over a pool of threads, frame by frame and then pair by pair."""
    return _opencv(video, threads=torch.get_num_threads(), **parameters)


def flow_labels_cv2(video: Tensor, **parameters: Any) -> Tensor:
    """As the published code runs it: OpenCV's flow, pair after pair on the calling thread."""
    return _opencv(video, threads=1, **parameters)


def _opencv(
    video: Tensor,
    *,
    threads: int,
    patch_size: int,
    tau: float | None,
    channels: tuple[float, float, float, float],
) -> Tensor:
    if torch.compiler.is_compiling():
        torch._dynamo.graph_break()  # a decorator would import the compiler with this file
    clips, _, frames, height, width = video.shape
    rows, columns = height // patch_size, width // patch_size
    colours = video.float().numpy()
    greys = np.empty((clips, frames, height, width), np.float32)
    vectors = np.empty((clips, frames - 1, rows, columns, 2), np.float32)

    # NumPy here, since threads of PyTorch wait by spinning, on cores that the pool could use.
    def to_grey(i: int) -> None:
        red, green, blue = colours[i // frames, :, i % frames]
        grey = red * channels[0] + green * channels[1] + blue * channels[2] + channels[3]
        greys[i // frames, i % frames] = grey

    def to_vectors(i: int) -> None:
        clip, t = divmod(i, frames - 1)
        vectors[clip, t] = opencv_patch_means(greys[clip, t], greys[clip, t + 1], rows, columns)

    for_each(to_grey, clips * frames, threads)
    for_each(to_vectors, clips * (frames - 1), threads)
    return label_vectors(torch.from_numpy(vectors).flatten(2, 3).transpose(-2, -1), tau)


def flow_labels_cv2_cuda(
    video: Tensor,
    *,
    patch_size: int,
    tau: float | None,
    channels: tuple[float, float, float, float],
) -> Tensor:
    """As the reference, with the flow of OpenCV's CUDA class; its results differ."""
    frames = grey(video, channels)
    return _labels(farneback_cv2_cuda(frames[:, :-1], frames[:, 1:], **PUBLISHED), patch_size, tau)


def _flow_labels_triton(video: Tensor, **parameters: Any) -> Tensor:
    from timefast.kernels.farneback_triton import flow_labels_triton

    return flow_labels_triton(video, **parameters)


def _why_not_opencv(video: Tensor, **parameters: Any) -> list[str]:
    return [] if video.device.type == "cpu" else [f"video is on {video.device}; OpenCV takes CPU"]


def _case(name: str, clips: int, frames: int, height: int, width: int, size: str, **kwargs: Any):
    def build(
        dtype: torch.dtype, device: str, generator: torch.Generator
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        texture = smooth_texture((clips, 3, 1), height, width, generator, device) / 128
        moved = [texture.roll((t, -2 * t), dims=(-2, -1)) for t in range(frames)]
        return (torch.cat(moved, dim=2).to(dtype),), dict(kwargs)

    return Case(name, build, size)


flow_labels_op = register(
    Op(
        name="flow_labels",
        reference=flow_labels_reference,
        impls={
            "triton": Impl(_flow_labels_triton, why_not_triton, triton_unavailable, auto=("cuda",)),
            "cpu": Impl(flow_labels_cpu, _why_not_opencv, opencv_missing, auto=("cpu",)),
            "cv2": Impl(flow_labels_cv2, _why_not_opencv, opencv_missing, auto=()),
            "cv2_cuda": Impl(flow_labels_cv2_cuda, unavailable=opencv_cuda_missing, auto=()),
        },
        cases=(
            _case("8 x 112 x 112", 1, 8, 112, 112, "mid", rule="tau", tau=0.5),
            _case("8 x 224 x 224", 1, 8, 224, 224, "mid"),
            _case("8 x 224 x 224, 1 clip", 1, 8, 224, 224, "paper"),
            _case("8 x 224 x 224, 8 clips", 8, 8, 224, 224, "paper"),
            _case("8 x 224 x 224, 64 clips", 64, 8, 224, 224, "paper"),
        ),
    )
)
