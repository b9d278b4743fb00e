"""What a training clip costs before it reaches the model: decode, augment, crop, labels, and all of
it together; each beside the plain way of doing the same.

Clips per second are `extra_info["clips"] / median`. "ssv2" is a VP9 clip of the size most videos of
Something-Something v2 have, "demo" one of the demo data set. "published" is the form of the loader
that the paper's code uses, written anew: an external ffprobe and ffmpeg for each clip, all frames
decoded, all of them brought to Python, whole frames resized. Needs ffmpeg on the PATH.
"""

import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
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
    draw_rand_augment,
    jittered_short_side,
    random_crop,
    resize_crop,
    resized,
)
from timefast.data.batch import ClipSpec, Record, VideoSet
from timefast.data.rng import generator
from timefast.data.sampling import train_frames, view_frames
from timefast.demo_data import encode
from timefast.pipelines import dali_gpu
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
CLIPS_IN_SET = 8


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


def note(benchmark: Any, op: str, size: str, impl: str, clips: int = 1, **extra: Any) -> None:
    benchmark.extra_info.update(
        op=op, case=size, impl=impl, clips=clips, video=SIZES[size], frames=8,
        crop=SPECS[size].crop, threads=torch.get_num_threads(), **extra,
    )  # fmt: skip


def ffmpeg_frames(path: Path) -> np.ndarray:
    """All frames of a video, uint8 [n, height, width, 3], by the programs of FFmpeg."""
    ask = ["ffprobe", "-v", "error", "-show_streams", "-select_streams", "v", "-of", "json", path]
    stream = json.loads(subprocess.run(ask, capture_output=True, check=True).stdout)["streams"][0]
    read = ["ffmpeg", "-v", "error", "-i", path, "-f", "rawvideo", "-pix_fmt", "rgb24", "pipe:"]
    raw = subprocess.run(read, capture_output=True, check=True).stdout
    return np.frombuffer(raw, np.uint8).reshape(-1, stream["height"], stream["width"], 3)


def ffmpeg_or_skip() -> str:
    if shutil.which("ffmpeg") is None or shutil.which("ffprobe") is None:
        pytest.skip("ffmpeg and ffprobe are not installed")
    version = subprocess.run(["ffmpeg", "-version"], capture_output=True, text=True, check=True)
    return version.stdout.split()[2]


def dali_decoder() -> Any:
    """A function from the bytes of a video and frame numbers to frames, with one thread."""
    if reasons := dali_gpu.why_not(torch.device("cpu")):
        pytest.skip(reasons[0])
    import nvidia.dali.experimental.dynamic as ndd

    pool = ndd.ThreadPool(1)

    def decode(raw: np.ndarray, frames: list[int]) -> np.ndarray:
        with ndd.EvalContext(thread_pool=pool), ndd.EvalMode.sync_cpu:
            video = ndd.decoders.video(
                ndd.batch([raw], device="cpu"),
                frames=ndd.batch([np.array(frames, np.int32)], device="cpu"),
                device="cpu",
            )
            return np.asarray(video.tensors.tolist()[0])

    return decode


@contextmanager
def on_cores(count: int) -> Iterator[None]:
    """This process, and those it starts, on so many cores."""
    before = os.sched_getaffinity(0)
    if len(before) < count:
        pytest.skip(f"needs {count} cores")
    os.sched_setaffinity(0, sorted(before)[:count])
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


@pytest.mark.parametrize("impl", ["timefast", "all-frames", "published", "dali"])
def bench_decode(benchmark: Any, folder: Path, size: str, impl: str) -> None:
    """8 frames of a video on one core; "all-frames" makes every frame RGB first, with PyAV."""
    path = folder / f"{size}.webm"
    raw = np.fromfile(path, np.uint8)
    if impl == "dali":
        on_dali = dali_decoder()

    def all_frames() -> np.ndarray:
        with av.open(str(path)) as container:
            container.streams.video[0].codec_context.thread_count = 1
            frames = [f.to_ndarray(format="rgb24") for f in container.decode(video=0)]
        return np.stack([frames[i] for i in view_frames(len(frames), 8)])

    def published() -> np.ndarray:
        frames = ffmpeg_frames(path)
        return frames[view_frames(len(frames), 8)]

    def wanted() -> np.ndarray:
        return frames_of(folder, size)

    with on_cores(1):
        extra = {"ffmpeg": ffmpeg_or_skip()} if impl == "published" else {}
        run = {
            "timefast": wanted,
            "all-frames": all_frames,
            "published": published,
            "dali": lambda: on_dali(raw, view_frames(SIZES[size][0], 8)),
        }[impl]
        # other versions of FFmpeg, and DALI, interpolate chroma in their own way
        apart = np.abs(run().astype(int) - wanted()).mean()
        assert apart == 0 if impl in ("timefast", "all-frames") else apart < 5
        note(benchmark, "decode", size, impl, cores=1, **extra)
        benchmark(run)


@pytest.mark.parametrize("op", OPS)
def bench_rand_augment(benchmark: Any, folder: Path, op: str) -> None:
    """One operation at full strength on the 8 frames of an SSv2 clip."""
    frames = frames_of(folder, "ssv2")
    note(benchmark, "rand_augment", "ssv2", op)
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
    note(benchmark, "resize_crop", size, impl)
    benchmark(part if impl == "timefast" else whole)


def bench_labels(benchmark: Any, folder: Path, size: str) -> None:
    """Flow labels of one clip with the implementation that "auto" takes on this machine."""
    frames, spec = frames_of(folder, size), SPECS[size]
    new = resized(frames.shape[1], frames.shape[2], sum(spec.short_side) // 2)
    video = resize_crop(frames, new, 4, 6, spec)[None]
    note(benchmark, "labels", size, "auto")
    benchmark(clip_labels, video, spec)


class Published(torch.utils.data.Dataset[torch.Tensor]):
    """Clips as the published loader makes them, of one video, and their labels."""

    def __init__(self, path: Path, spec: ClipSpec):
        self.path, self.spec = path, spec

    def __getitem__(self, sample: int) -> torch.Tensor:
        spec = self.spec
        every = ffmpeg_frames(self.path)
        rng = generator(0, 0, sample, "frames")
        frames = every[train_frames(len(every), spec.frames, rng)]
        if spec.rand_augment is not None:
            drawn = draw_rand_augment(spec.rand_augment, generator(0, 0, sample, "augment"))
            frames = apply_augmentations(frames, drawn, (128, 128, 128))
        rng = generator(0, 0, sample, "crop")
        new = resized(frames.shape[1], frames.shape[2], jittered_short_side(*spec.short_side, rng))
        video = torch.from_numpy(frames).permute(0, 3, 1, 2).float().div(255).sub(0.5).div(0.5)
        video = torch.nn.functional.interpolate(video, new, mode="bilinear", align_corners=False)
        top, left = random_crop(*new, spec.crop, rng)
        clip = video[:, :, top : top + spec.crop, left : left + spec.crop].transpose(0, 1)
        clip_labels(clip[None], spec)
        return clip.contiguous()


@pytest.mark.parametrize("impl", ["timefast", "published"])
@pytest.mark.parametrize(
    ("size", "labels"), [("ssv2", True), ("ssv2", False), ("demo", True)],
    ids=["ssv2-labels", "ssv2-no-labels", "demo-labels"],
)  # fmt: skip
@pytest.mark.parametrize("cores", [1, 2])
def bench_loader(
    benchmark: Any, folder: Path, size: str, cores: int, labels: bool, impl: str
) -> None:
    """Training clips, decode to crop, on as many cores as processes; with flow labels, and without
    them as where a GPU makes them. The clips of both are the same ones."""
    spec = SPECS[size] if labels else replace(SPECS[size], flow_rule=None, flow_tau=None)
    path = folder / f"{size}.webm"
    record = Record("0", path, 0, "a class")
    videos = VideoSet("bench", "train", folder, (record,) * CLIPS_IN_SET, ("a class",))
    workers = cores if cores > 1 else 0
    with on_cores(cores):
        extra = {"ffmpeg": ffmpeg_or_skip()} if impl == "published" else {}
        ours = ClipLoader(videos, spec, train=True, batch_size=4, workers=workers, pipeline="cpu")
        theirs = torch.utils.data.DataLoader(
            Published(path, spec), batch_size=4, sampler=range(CLIPS_IN_SET), num_workers=workers,
            persistent_workers=workers > 0, multiprocessing_context="fork" if workers else None,
        )  # fmt: skip
        epochs = iter(range(10**6))
        run = {
            "timefast": lambda: list(ours.batches(next(epochs))),
            "published": lambda: list(theirs),
        }[impl]
        if impl == "published" and not workers:
            mine = {
                int(i): v for b in ours.batches(0) for i, v in zip(b.sample, b.video, strict=True)
            }
            made = torch.cat(list(theirs))
            apart = [(made[i] - v).abs().mean() * 127.5 for i, v in mine.items()]
            assert float(np.median(apart)) < 5
        what = f"clips {'with' if labels else 'without'} labels, {cores} cores"
        note(benchmark, what, size, impl, clips=CLIPS_IN_SET, cores=cores, **extra)
        benchmark.pedantic(run, rounds=3, iterations=1, warmup_rounds=1)
        ours.close()
