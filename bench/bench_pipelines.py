"""What a training clip costs before it reaches the model: decode, augment, crop, labels, and all of
it together; each beside the plain way of doing the same.

Clips per second are `extra_info["clips"] / median`. "ssv2" is a VP9 clip of the size most videos of
Something-Something v2 have, "demo" one of the demo data set.
"""

from pathlib import Path
from typing import Any

import av
import cv2
import numpy as np
import pytest
import torch

from timefast.data.augment import (
    OPS,
    Augmentation,
    apply_augmentations,
    resize_crop,
    resized,
)
from timefast.data.batch import ClipSpec, Record, VideoSet
from timefast.data.sampling import view_frames
from timefast.demo_data import encode
from timefast.pipelines.cpu_decode import decode
from timefast.pipelines.labels import clip_labels
from timefast.pipelines.loader import ClipLoader

SIZES = {"ssv2": (45, 240, 427), "demo": (24, 72, 96)}  # frames, height, width
SPECS = {
    "ssv2": ClipSpec(),
    "demo": ClipSpec(
        crop=64, short_side=(64, 76), test_short_side=64, rand_augment=None,
        flow_rule="tau", flow_tau=0.5,
    ),
}  # fmt: skip
CLIPS_IN_SET = 16


@pytest.fixture(scope="module", params=SIZES)
def size(request: Any) -> str:
    return request.param


@pytest.fixture(scope="module")
def folder(tmp_path_factory: Any) -> Path:
    """A video of each size: a texture that drifts, with noise."""
    root = tmp_path_factory.mktemp("videos")
    rng = np.random.default_rng(0)
    for name, (count, height, width) in SIZES.items():
        texture = cv2.GaussianBlur(rng.normal(size=(height, width, 3)), (0, 0), height / 24)
        texture = 110 + 40 * texture / texture.std()
        frames = np.stack([np.roll(texture, (t, 2 * t), axis=(0, 1)) for t in range(count)])
        noisy = frames + rng.normal(0, 3, frames.shape)
        encode(np.clip(noisy, 0, 255).astype(np.uint8), root / f"{name}.webm")
    return root


def frames_of(folder: Path, size: str) -> np.ndarray:
    return decode(folder / f"{size}.webm", lambda n: view_frames(n, 8), folder).frames


def note(benchmark: Any, size: str, impl: str, clips: int = 1) -> None:
    benchmark.extra_info.update(
        size=size, impl=impl, clips=clips, video=SIZES[size], frames=8, crop=SPECS[size].crop,
        threads=torch.get_num_threads(), versions={"av": av.__version__, "cv2": cv2.__version__},
    )  # fmt: skip


@pytest.mark.parametrize("impl", ["timefast", "all-frames"])
def bench_decode(benchmark: Any, folder: Path, size: str, impl: str) -> None:
    """8 frames of a video; "all-frames" makes every frame RGB first, as the published loader."""
    path = folder / f"{size}.webm"

    def all_frames() -> np.ndarray:
        with av.open(str(path)) as container:
            container.streams.video[0].codec_context.thread_count = 1
            frames = [f.to_ndarray(format="rgb24") for f in container.decode(video=0)]
        return np.stack([frames[i] for i in view_frames(len(frames), 8)])

    def wanted() -> np.ndarray:
        return frames_of(folder, size)

    assert np.array_equal(all_frames(), wanted())
    note(benchmark, size, impl)
    benchmark(wanted if impl == "timefast" else all_frames)


@pytest.mark.parametrize("op", OPS)
def bench_rand_augment(benchmark: Any, folder: Path, op: str) -> None:
    """One operation at full strength on the 8 frames of an SSv2 clip."""
    frames = frames_of(folder, "ssv2")
    note(benchmark, "ssv2", op)
    benchmark(apply_augmentations, frames, [Augmentation(op, 1.0, 3)], (128, 128, 128))


@pytest.mark.parametrize("impl", ["timefast", "whole-frames"])
def bench_resize_crop(benchmark: Any, folder: Path, size: str, impl: str) -> None:
    """uint8 frames to a normalised crop; "whole-frames" interpolates all pixels, then cuts."""
    frames, spec = frames_of(folder, size), SPECS[size]
    new = resized(frames.shape[1], frames.shape[2], sum(spec.short_side) // 2)

    def whole() -> torch.Tensor:
        video = torch.from_numpy(frames).permute(0, 3, 1, 2).float().div(255).sub(0.5).div(0.5)
        video = torch.nn.functional.interpolate(video, new, mode="bilinear", align_corners=False)
        return video[:, :, 4 : 4 + spec.crop, 6 : 6 + spec.crop].transpose(0, 1).contiguous()

    def part() -> torch.Tensor:
        return resize_crop(frames, new, 4, 6, spec)

    assert torch.allclose(whole(), part(), atol=1e-3)
    note(benchmark, size, impl)
    benchmark(part if impl == "timefast" else whole)


def bench_labels(benchmark: Any, folder: Path, size: str) -> None:
    """Flow labels of one clip with the implementation that "auto" takes on this machine."""
    frames, spec = frames_of(folder, size), SPECS[size]
    new = resized(frames.shape[1], frames.shape[2], sum(spec.short_side) // 2)
    video = resize_crop(frames, new, 4, 6, spec)[None]
    note(benchmark, size, "auto")
    benchmark(clip_labels, video, spec)


@pytest.mark.parametrize("workers", [0, 2])
def bench_loader(benchmark: Any, folder: Path, size: str, workers: int) -> None:
    """A training epoch of 16 clips, decode to labels."""
    record = Record("0", folder / f"{size}.webm", 0, "a class")
    videos = VideoSet("bench", "train", folder, (record,) * CLIPS_IN_SET, ("a class",))
    loader = ClipLoader(
        videos, SPECS[size], train=True, batch_size=4, workers=workers, pipeline="cpu"
    )
    epochs = iter(range(10**6))
    note(benchmark, size, f"workers={workers}", clips=CLIPS_IN_SET)
    benchmark.pedantic(
        lambda: list(loader.batches(next(epochs))), rounds=3, iterations=1, warmup_rounds=1
    )
