"""What happens to the pixels of a clip: RandAugment, scale jitter, resize, crop. Each choice is
made once and applied to all frames of the clip, so that motion stays what it was.

Inside, a clip is uint8 [T, height, width, 3]; `resize_crop` turns it once into the model's
float32 [3, T, crop, crop] and computes no pixel outside the crop.
"""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image, ImageEnhance, ImageOps

from timefast.data.batch import ClipSpec
from timefast.errors import InputError

ENHANCE = {
    "Color": ImageEnhance.Color,
    "Contrast": ImageEnhance.Contrast,
    "Brightness": ImageEnhance.Brightness,
    "Sharpness": ImageEnhance.Sharpness,
}
GEOMETRY = ("Rotate", "ShearX", "ShearY", "TranslateXRel", "TranslateYRel")
OPS = (
    "AutoContrast",
    "Equalize",
    "Invert",
    "Posterize",
    "Solarize",
    "SolarizeAdd",
    *GEOMETRY,
    *ENHANCE,
)
_SPEC = re.compile(r"rand-m(?P<m>\d+(\.\d+)?)(-mstd(?P<std>\d+(\.\d+)?))?-inc1(-n(?P<n>\d+))?")


@dataclass(frozen=True)
class Augmentation:
    """One drawn operation, the same for all frames of a clip."""

    name: str
    level: float  # 0..1, negative where the operation has two directions
    resample: int  # PIL's bilinear or bicubic, for the geometric ones


def parse_rand_augment(spec: str) -> tuple[float, float, int]:
    """Magnitude, its standard deviation and the number of operations; InputError if malformed.

    The notation is the one of the published recipe, `rand-m20-mstd0.5-inc1`, optionally with `-n3`;
    `inc1` (operations that grow stronger with the magnitude) is the only form there is here.
    """
    match = _SPEC.fullmatch(spec)
    if match is None:
        raise InputError(
            f"RandAugment {spec!r} is not understood; expected rand-m<magnitude>-mstd<deviation>"
            "-inc1, for example rand-m20-mstd0.5-inc1"
        )
    return float(match["m"]), float(match["std"] or 0), int(match["n"] or 2)


def draw_rand_augment(spec: str, rng: np.random.Generator) -> tuple[Augmentation, ...]:
    """The operations for one clip; none in half of the draws.

    In the published code all operations of a frame share one coin, because the random state is set
    back before each; that is kept here, since it decides how strong the augmentation of the
    published numbers was (half of the clips stay as they are; with a coin per operation a quarter
    would). Its frame 0, which draws other operations than the rest of the clip, is not kept: it
    puts motion between frames 0 and 1 that is not there. A magnitude above 10 counts as 10 after
    the noise is added, so that the published magnitude 20 always means full strength.
    """
    magnitude, deviation, count = parse_rand_augment(spec)
    if rng.random() < 0.5:
        return ()
    drawn = []
    for name in rng.choice(OPS, count):
        level = min(max(rng.normal(magnitude, deviation), 0.0), 10.0) / 10
        if (name in GEOMETRY or name in ENHANCE) and rng.random() < 0.5:
            level = -level
        resample = (Image.Resampling.BILINEAR, Image.Resampling.BICUBIC)[rng.integers(2)]
        drawn.append(Augmentation(str(name), float(level), resample))
    return tuple(drawn)


def apply_augmentations(
    frames: np.ndarray, drawn: Sequence[Augmentation], fill: tuple[int, int, int]
) -> np.ndarray:
    """The operations in turn on every frame of uint8 [T, height, width, 3]; `fill` is the colour
    of pixels that geometric operations bring in."""
    if not drawn:
        return frames
    result = np.empty_like(frames)
    for t, frame in enumerate(frames):
        image = Image.fromarray(frame)
        for augmentation in drawn:
            image = _apply(image, augmentation, fill)
        result[t] = np.asarray(image)
    return result


def _apply(image: Image.Image, drawn: Augmentation, fill: tuple[int, int, int]) -> Image.Image:
    name, level = drawn.name, drawn.level
    if name == "AutoContrast":
        return ImageOps.autocontrast(image)
    if name == "Equalize":
        return ImageOps.equalize(image)
    if name == "Invert":
        return ImageOps.invert(image)
    if name == "Posterize":
        bits = 4 - int(level * 4)
        # no bits left is black; Pillow refuses to say so
        return ImageOps.posterize(image, bits) if bits else Image.new("RGB", image.size)
    if name == "Solarize":
        return ImageOps.solarize(image, 256 - int(level * 256))
    if name == "SolarizeAdd":
        add = int(level * 110)
        return image.point([min(255, v + add) if v < 128 else v for v in range(256)] * 3)
    if name in ENHANCE:
        return ENHANCE[name](image).enhance(max(0.1, 1 + 0.9 * level))
    resample = Image.Resampling(drawn.resample)
    if name == "Rotate":
        return image.rotate(30 * level, resample, fillcolor=fill)
    matrix = {
        "ShearX": (1, 0.3 * level, 0, 0, 1, 0),
        "ShearY": (1, 0, 0, 0.3 * level, 1, 0),
        "TranslateXRel": (1, 0, 0.45 * level * image.width, 0, 1, 0),
        "TranslateYRel": (1, 0, 0, 0, 1, 0.45 * level * image.height),
    }[name]
    return image.transform(image.size, Image.Transform.AFFINE, matrix, resample, fillcolor=fill)


def jittered_short_side(low: int, high: int, rng: np.random.Generator) -> int:
    """Short side in pixels, uniform in 1 / size between `low` and `high`, as published."""
    return round(1 / rng.uniform(1 / high, 1 / low))


def resized(height: int, width: int, short_side: int) -> tuple[int, int]:
    """Height and width when the short side becomes `short_side` (the long one is rounded down)."""
    if height < width:
        return short_side, math.floor(width / height * short_side)
    return math.floor(height / width * short_side), short_side


def random_crop(height: int, width: int, crop: int, rng: np.random.Generator) -> tuple[int, int]:
    """Top and left of a random crop; the last possible offset never comes, as published."""
    top = int(rng.integers(height - crop)) if height > crop else 0
    left = int(rng.integers(width - crop)) if width > crop else 0
    return top, left


def view_crop(height: int, width: int, crop: int, view: int, views: int) -> tuple[int, int]:
    """Top and left of one of 1 (centre) or 3 crops (both ends and centre of the long side)."""
    if views not in (1, 3) or not 0 <= view < views:
        raise ValueError(f"spatial view: expected one of 1 or of 3, got {view} of {views}")
    top, left = math.ceil((height - crop) / 2), math.ceil((width - crop) / 2)
    if views == 3 and view != 1:
        if height > width:
            top = 0 if view == 0 else height - crop
        else:
            left = 0 if view == 0 else width - crop
    return top, left


def resize_crop(
    frames: np.ndarray, size: tuple[int, int], top: int, left: int, spec: ClipSpec
) -> torch.Tensor:
    """A crop of the resized clip, normalised: uint8 [T, height, width, 3] -> float32 [3, T, S, S].

    The same as resizing to `size` (height, width) by bilinear interpolation without antialiasing
    (corners not aligned), cutting S = spec.crop pixels at (top, left) and normalising; but only
    the part of the source that the crop sees is touched, and it becomes floating point once.
    """
    y, weight_y = _interpolation(frames.shape[1], size[0], top, spec.crop)
    x, weight_x = _interpolation(frames.shape[2], size[1], left, spec.crop)
    source = torch.from_numpy(np.ascontiguousarray(frames[:, y, x].transpose(3, 0, 1, 2)))
    clip = weight_y @ (source.float() @ weight_x.T)  # [3, T, S, S]
    mean, std = (torch.tensor(v).view(3, 1, 1, 1) for v in (spec.mean, spec.std))
    return clip.mul_(1 / (255 * std)).sub_(mean / std)


def _interpolation(full: int, target: int, start: int, count: int) -> tuple[slice, torch.Tensor]:
    """Which source pixels count output pixels from `start` on need, and with which weights.

    Returns a slice of `full` source pixels and weights [count, length of the slice], for resizing
    `full` pixels to `target` with half-pixel centres.
    """
    position = (np.arange(start, start + count) + 0.5) * (full / target) - 0.5
    position = position.clip(0, full - 1)
    low = np.floor(position).astype(np.int64)
    high = np.minimum(low + 1, full - 1)
    first, end = int(low[0]), int(high[-1]) + 1
    weights = np.zeros((count, end - first), np.float32)
    rows = np.arange(count)
    weights[rows, low - first] += 1 - (position - low)
    weights[rows, high - first] += position - low
    return slice(first, end), torch.from_numpy(weights)
