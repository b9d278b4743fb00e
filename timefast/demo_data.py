"""The built-in demo data set: small VP9 webm files in the layout of Something-Something v2.

`python -m timefast.demo_data DIR` writes it. Twelve classes: four pairs that differ only in the
direction of time (the odd class of a pair is the even one run backwards) and four that a single
frame tells. The background of a temporal class carries a colour cue that agrees with the class in
nine of ten training videos and in half of the validation videos, so a model that reads the cue
instead of the order of frames is found out.

A video is a function of (seed, split, class, index, cue) alone, whatever else is made beside it.
"""

import argparse
import json
import logging
import math
import multiprocessing
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import av
import cv2
import numpy as np
from tqdm import tqdm

from timefast.cache import cache_folder
from timefast.errors import InputError
from timefast.log import to_console

logger = logging.getLogger("timefast")

VERSION = 1  # of the generator: raise it when the frames of an existing seed change
WIDTH, HEIGHT, FRAMES, FPS = 96, 72, 24, 12
Split = Literal["train", "validation"]

CLASSES = (
    "Moving [something] from left to right",
    "Moving [something] from right to left",
    "Lifting [something] up",
    "Letting [something] fall down",
    "Moving [something] towards the camera",
    "Moving [something] away from the camera",
    "Moving [something] and [something] closer to each other",
    "Moving [something] and [something] away from each other",
    "Showing [something] red",
    "Showing [something] green",
    "Showing [something] striped",
    "Showing [something] with a hole",
)
TEMPORAL = 8  # the first eight classes need the order of frames
_LEFT_RIGHT, _UP_DOWN, _CAMERA, _TOGETHER = range(4)  # class // 2 of the temporal classes
_RED, _GREEN, _STRIPED, _HOLE = range(8, 12)

# white, yellow, cyan, pink
_BRIGHT = ((235, 235, 235), (230, 210, 50), (60, 210, 220), (235, 120, 190))
_DARK = (35, 35, 35)
_AGREEING = {"train": 0.9, "validation": 0.5}  # share of temporal videos whose cue agrees


@dataclass(frozen=True)
class _Video:
    id: int
    split: Split
    label: int
    index: int  # within its split and class
    cue: int  # 1: warm background, 0: blue


@dataclass(frozen=True)
class _Shape:
    kind: str  # "disc", "square", "hexagon", "stripes", "ring"
    colour: tuple[float, float, float]
    radius: float  # pixels
    dot_angle: float  # where the dark dot sits, radians


def render(seed: int, split: Split, label: int, index: int, cue: int) -> np.ndarray:
    """The frames of one video before encoding: uint8 RGB [24, 72, 96, 3]."""
    rng = np.random.default_rng([seed, ("train", "validation").index(split), label, index])
    background = _background(rng, cue)
    shapes = [_shape(rng, label) for _ in range(2 if label // 2 == _TOGETHER else 1)]
    frames = [background.copy() for _ in range(FRAMES)]
    for shape, (x, y, scale, angle) in zip(shapes, _tracks(rng, label), strict=True):
        for t, frame in enumerate(frames):
            _draw(frame, shape, x[t], y[t], shape.radius * scale[t], angle[t])
    noise = rng.normal(0, 3, (FRAMES, HEIGHT, WIDTH, 3)).astype(np.float32)
    return np.clip(np.rint(np.stack(frames) + noise), 0, 255).astype(np.uint8)


def _background(rng: np.random.Generator, cue: int) -> np.ndarray:
    """Smooth colour noise around grey, tinted by the cue; uint8 [72, 96, 3]."""
    image = np.full((HEIGHT, WIDTH, 3), 110.0)
    for sigma, strength in ((6.0, 14.0), (1.5, 5.6)):
        noise = cv2.GaussianBlur(rng.normal(size=image.shape), (0, 0), sigma)
        image += strength * noise / noise.std(axis=(0, 1))
    tint = 30 * rng.uniform(0.7, 1.2) * (1 if cue else -1)
    image += np.array([tint, 0, -tint]) + rng.uniform(-12, 12)
    picture = np.clip(np.rint(image), 0, 255).astype(np.uint8)
    if rng.random() < 0.5:
        centre = rng.uniform(0, WIDTH), rng.uniform(0, HEIGHT)
        _disc(picture, *centre, rng.uniform(2, 4), _DARK)
    return picture


def _shape(rng: np.random.Generator, label: int) -> _Shape:
    kind = ("disc", "square", "hexagon")[rng.integers(3)]
    bright = np.array(_BRIGHT[rng.integers(len(_BRIGHT))])
    rgb = np.clip(bright + rng.uniform(-20, 20, 3), 0, 255)
    radius, dot_angle = rng.uniform(8, 12), rng.uniform(0, 2 * math.pi)
    if label == _RED:
        rgb = np.array([215, 35, 35])
    elif label == _GREEN:
        rgb = np.array([35, 190, 45])
    elif label == _STRIPED:
        kind = "stripes"
    elif label == _HOLE:
        kind = "ring"
    elif label // 2 == _TOGETHER:
        radius *= 0.75
    return _Shape(kind, tuple(rgb.tolist()), radius, dot_angle)


def _tracks(rng: np.random.Generator, label: int) -> Iterator[tuple[np.ndarray, ...]]:
    """Per object its x, y (pixels), scale of radius and angle (radians), each [24].

    An odd temporal class draws the track of the even class before it and runs it backwards, so
    that the frames of a pair have one distribution when their order is dropped.
    """
    low, high, bend = rng.uniform(0, 0.12), rng.uniform(0.88, 1), rng.uniform(0.85, 1.2)
    time = np.arange(FRAMES) / (FRAMES - 1)
    s = np.clip((time - low) / (high - low), 0, 1) ** bend - 0.5  # progress, -1/2 .. 1/2
    travel = rng.uniform(0.75, 1)
    x = WIDTH / 2 + rng.uniform(-9, 9) + np.cumsum(rng.normal(0, 0.2, FRAMES))
    y = HEIGHT / 2 + rng.uniform(-7, 7) + np.cumsum(rng.normal(0, 0.2, FRAMES))
    scale = np.ones(FRAMES)
    angle = rng.uniform(0, 2 * math.pi) + rng.uniform(-0.3, 0.3) * (time - 0.5)
    apart_x, apart_y = np.zeros(FRAMES), np.zeros(FRAMES)

    if label >= TEMPORAL:
        drift, direction = rng.uniform(0, 16), rng.uniform(0, 2 * math.pi)
        x += drift * math.cos(direction) * s
        y += drift * math.sin(direction) * s
        scale += rng.uniform(-0.15, 0.15) * s
    elif label // 2 == _LEFT_RIGHT:
        x += 46 * travel * s
    elif label // 2 == _UP_DOWN:
        y -= 36 * travel * s
    elif label // 2 == _CAMERA:
        scale *= np.exp(1.3 * travel * s)
    else:
        tilt = rng.uniform(-0.2, 0.2)  # the axis is nearly horizontal
        distance = 18 - 22 * travel * s
        apart_x, apart_y = distance * math.cos(tilt), distance * math.sin(tilt)

    step = -1 if label < TEMPORAL and label % 2 else 1
    for side in (-1, 1) if label // 2 == _TOGETHER else (0,):
        yield tuple(
            track[::step] for track in (x + side * apart_x, y + side * apart_y, scale, angle)
        )


def _draw(frame: np.ndarray, shape: _Shape, x: float, y: float, r: float, angle: float) -> None:
    if shape.kind in ("stripes", "ring"):
        mask = np.zeros(frame.shape[:2], np.uint8)
        _disc(mask, x, y, r, (255,))
        colour = np.broadcast_to(np.array(shape.colour), frame.shape)
        if shape.kind == "ring":
            _disc(mask, x, y, 0.5 * r, (0,))
        else:
            wave = np.sin((np.arange(HEIGHT) + 0.5 - y) * (2 * math.pi / 6))  # period 6 px
            light = np.clip(0.5 + 1.5 * wave, 0, 1)[:, None, None]
            colour = light * colour + (1 - light) * np.array(_DARK)
        alpha = mask[..., None] / 255
        frame[:] = np.rint(alpha * colour + (1 - alpha) * frame)
        return
    if shape.kind == "disc":
        _disc(frame, x, y, r, shape.colour)
    else:
        corners = 4 if shape.kind == "square" else 6
        turns = angle + np.arange(corners) * (2 * math.pi / corners)
        points = np.stack([x + r * np.cos(turns), y + r * np.sin(turns)], axis=-1)
        cv2.fillConvexPoly(
            frame, np.rint(points * 16).astype(np.int32), shape.colour, cv2.LINE_AA, 4
        )
    dot = shape.dot_angle + angle
    _disc(frame, x + 0.4 * r * math.cos(dot), y + 0.4 * r * math.sin(dot), 0.28 * r, _DARK)


def _disc(image: np.ndarray, x: float, y: float, r: float, colour: tuple[float, ...]) -> None:
    """Filled and antialiased, placed to a sixteenth of a pixel (4 fractional bits)."""
    centre = round(x * 16), round(y * 16)
    cv2.circle(image, centre, round(r * 16), colour, cv2.FILLED, cv2.LINE_AA, 4)


def encode(frames: np.ndarray, path: Path) -> None:
    """Write uint8 RGB frames [T, height, width, 3] as a VP9 webm file, byte for byte repeatable."""
    # without +bitexact the muxer writes random ids
    with av.open(str(path), "w", format="webm", options={"fflags": "+bitexact"}) as container:
        stream: Any = container.add_stream("libvpx-vp9", rate=FPS)
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = "yuv420p"
        stream.options = {
            "crf": "33",
            "b": "0",
            "deadline": "realtime",
            "cpu-used": "8",
            "lag-in-frames": "0",
            "threads": "1",
        }
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())


def _videos(train_per_class: int, val_per_class: int) -> Iterator[_Video]:
    number = 0
    for split, count in (("train", train_per_class), ("validation", val_per_class)):
        agreeing = round(_AGREEING[split] * count)
        for index in range(count):
            for label in range(len(CLASSES)):
                cue = index % 2
                if label < TEMPORAL:
                    cue = label % 2 if index < agreeing else 1 - label % 2
                yield _Video(number, split, label, index, cue)  # type: ignore[arg-type]
                number += 1


def _make(job: tuple[int, _Video, Path]) -> None:
    seed, video, folder = job
    frames = render(seed, video.split, video.label, video.index, video.cue)
    encode(frames, folder / f"{video.id}.webm")


def _one_thread() -> None:
    # 0, not 1: to shrink to 1 a forked process would wait for its parent's threads, for ever
    cv2.setNumThreads(0)


def write_demo_data(
    root: str | Path,
    *,
    seed: int = 0,
    train_per_class: int = 40,
    val_per_class: int = 20,
    workers: int | None = None,
) -> Path:
    """Write the demo data set to the folder `root` and return it.

    A folder that holds exactly this set (same generator version, seed and sizes) is left as it is;
    another demo set is replaced; any other folder that is not empty is refused. The files are
    written into a temporary folder beside `root`, which is renamed at the end: `root` is never
    half a data set, and two processes may make it at once. `workers` is a number of processes
    (None: one per core); it does not change a byte.

    Raises InputError if the folder cannot be written or holds something else, or a size is wrong.
    """
    for name, value, least in (
        ("seed", seed, 0),
        ("train_per_class", train_per_class, 1),
        ("val_per_class", val_per_class, 1),
    ):
        if value < least:
            raise InputError(f"{name}: expected at least {least}, got {value}")
    root = Path(root).expanduser().resolve()  # what a link leads to is replaced, not the link
    manifest = {
        "generator": "timefast.demo_data",
        "version": VERSION,
        "seed": seed,
        "train_per_class": train_per_class,
        "val_per_class": val_per_class,
        "width": WIDTH,
        "height": HEIGHT,
        "frames": FRAMES,
        "fps": FPS,
    }
    try:
        if _is_made(root, manifest):
            return root
        if root == Path.cwd():  # it is replaced, which would leave the shell nowhere
            raise InputError(f"{root} is the folder you are in; name one inside or beside it")
        root.parent.mkdir(parents=True, exist_ok=True)
        part = Path(tempfile.mkdtemp(prefix=f".tmp-{root.name}-", dir=root.parent))
        try:
            _write(part, manifest, workers)
            part.chmod(0o755)  # mkdtemp makes it private
            _put(part, root, manifest)
        finally:
            shutil.rmtree(part, ignore_errors=True)
    except OSError as error:
        raise InputError(
            f"cannot write the demo data set to {root}: {error.strerror or error}; "
            "choose a folder that can be written"
        ) from error
    return root


def _is_made(root: Path, manifest: dict[str, Any]) -> bool:
    """Whether `root` holds this very set; raises InputError if it holds something else."""
    if not root.exists():
        return False
    if not root.is_dir():
        raise InputError(f"{root} is a file, not a folder; choose another place")
    try:
        found = json.loads((root / "manifest.json").read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        found = None
    if isinstance(found, dict) and found.get("generator") == manifest["generator"]:
        return found == manifest
    if any(root.iterdir()):
        raise InputError(
            f"{root} is not empty and holds no demo data set (no manifest.json of one); "
            "nothing was written: choose another folder or empty this one"
        )
    return False


def _write(folder: Path, manifest: dict[str, Any], workers: int | None) -> None:
    videos = list(_videos(manifest["train_per_class"], manifest["val_per_class"]))
    (folder / "videos").mkdir()
    jobs = [(manifest["seed"], video, folder / "videos") for video in videos]
    workers = workers if workers is not None else len(os.sched_getaffinity(0))
    logger.info("making the demo data set: %d videos, %d processes", len(jobs), max(1, workers))
    bar = tqdm(total=len(jobs), desc="demo videos", unit="video", disable=None, leave=False)
    with bar:
        if workers <= 1:
            for job in jobs:
                _make(job)
                bar.update()
        else:
            # fork: the children need nothing but numpy, OpenCV and PyAV, and a script that calls
            # this without a main guard keeps working
            fork = multiprocessing.get_context("fork")
            with ProcessPoolExecutor(workers, mp_context=fork, initializer=_one_thread) as pool:
                for _ in pool.map(_make, jobs, chunksize=8):
                    bar.update()

    plain = [name.replace("[", "").replace("]", "") for name in CLASSES]
    labels = {name: str(label) for label, name in enumerate(plain)}
    _dump(folder / "something-something-v2-labels.json", labels)
    for split in ("train", "validation"):
        entries = [
            {
                "id": str(video.id),
                "label": plain[video.label].lower(),
                "template": CLASSES[video.label],
                "cue": video.cue,
                "aligned": int(video.cue == video.label % 2),  # says something of classes 0..7 only
            }
            for video in videos
            if video.split == split
        ]
        _dump(folder / f"something-something-v2-{split}.json", entries)
    _dump(folder / "subsets.json", {"temporal": plain[:TEMPORAL], "static": plain[TEMPORAL:]})
    _dump(folder / "manifest.json", manifest)


def _dump(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")


def _put(part: Path, root: Path, manifest: dict[str, Any]) -> None:
    """Rename the finished folder to its place, over an outdated demo set or an empty folder."""
    if root.exists() and any(root.iterdir()):
        if _is_made(root, manifest):
            return  # another process was faster
        old = Path(tempfile.mkdtemp(prefix=f".old-{root.name}-", dir=root.parent))
        try:
            root.rename(old)
        finally:
            shutil.rmtree(old, ignore_errors=True)
    try:
        part.rename(root)
    except OSError:
        if not _is_made(root, manifest):
            raise


def demo_data_folder() -> Path:
    """The demo data set in the user's cache folder, made when it is not there yet."""
    try:
        folder = write_demo_data(cache_folder() / f"demo-{VERSION}-seed0")
    except InputError as error:
        raise InputError(f"{error} (XDG_CACHE_HOME), or give your own data with --data") from error
    logger.info("demo data: %s", folder)
    return folder


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m timefast.demo_data",
        description="Write the demo data set: 720 small VP9 videos in Something-Something layout.",
    )
    parser.add_argument("dir", type=Path, help="folder to write (made if it is not there)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the videos (default: 0)")
    parser.add_argument("--train-per-class", type=int, default=40, help="default: 40")
    parser.add_argument("--val-per-class", type=int, default=20, help="default: 20")
    parser.add_argument("--workers", type=int, help="processes (default: one per core)")
    args = parser.parse_args(argv)
    to_console()
    try:
        root = write_demo_data(
            args.dir,
            seed=args.seed,
            train_per_class=args.train_per_class,
            val_per_class=args.val_per_class,
            workers=args.workers,
        )
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted; nothing was written", file=sys.stderr)
        return 130
    print(root)
    return 0


if __name__ == "__main__":
    sys.exit(main())
