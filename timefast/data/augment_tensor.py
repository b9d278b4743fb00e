"""The operations of augment.py on a clip that lies on a device, for what a GPU has decoded.

The same arithmetic as Pillow's, so that a clip looks the same whatever decoded it; at most single
pixels differ by a level, where a value falls between two levels. Nothing waits for the device.
"""

import math
from collections.abc import Sequence

import torch
from PIL import Image

from timefast.data.augment import Augmentation

_LUMA = (19595, 38470, 7471)  # 65536 times 0.299, 0.587, 0.114


def augment_tensor(
    frames: torch.Tensor, drawn: Sequence[Augmentation], fill: tuple[int, int, int]
) -> torch.Tensor:
    """The operations in turn on uint8 [T, height, width, 3], the same shape out; `fill` is the
    colour of pixels that geometric operations bring in."""
    for augmentation in drawn:
        frames = _apply(frames, augmentation.name, augmentation.level, augmentation.resample, fill)
    return frames


def _apply(
    x: torch.Tensor, name: str, level: float, resample: int, fill: tuple[int, int, int]
) -> torch.Tensor:
    if name == "AutoContrast":
        return _stretch(x)
    if name == "Equalize":
        return _equalize(x)
    if name == "Invert":
        return 255 - x
    if name == "Posterize":
        return x & (0xFF00 >> (4 - int(level * 4)) & 0xFF)
    if name == "Solarize":
        return torch.where(x.int() < 256 - int(level * 256), x, 255 - x)
    if name == "SolarizeAdd":
        added = (x.int() + int(level * 110)).clamp(max=255).to(torch.uint8)
        return torch.where(x < 128, added, x)
    factor = max(0.1, 1 + 0.9 * level)
    if name == "Brightness":
        return _blend(torch.zeros_like(x), x, factor)
    if name == "Color":
        return _blend(_luma(x).expand_as(x), x, factor)
    if name == "Contrast":
        mean = _luma(x).double().mean((1, 2, 3), keepdim=True).add(0.5).to(torch.uint8)
        return _blend(mean.expand_as(x), x, factor)
    if name == "Sharpness":
        return _blend(_smooth(x), x, factor)
    height, width = x.shape[1:3]
    if name == "Rotate":
        return _affine(x, _rotation(30 * level, height, width), resample, fill)
    matrix = {
        "ShearX": (1, 0.3 * level, 0, 0, 1, 0),
        "ShearY": (1, 0, 0, 0.3 * level, 1, 0),
        "TranslateXRel": (1, 0, 0.45 * level * width, 0, 1, 0),
        "TranslateYRel": (1, 0, 0, 0, 1, 0.45 * level * height),
    }[name]
    return _affine(x, matrix, resample, fill)


def _look_up(x: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
    """Replace values by table [T, 3, 256], clamped to 0..255."""
    places = x.permute(0, 3, 1, 2).flatten(2).long()  # [T, 3, pixels]
    found = table.clamp(0, 255).to(torch.uint8).gather(2, places)
    return found.view(x.shape[0], 3, *x.shape[1:3]).permute(0, 2, 3, 1)


def _stretch(x: torch.Tensor) -> torch.Tensor:
    """Each channel of each frame to the full range, unless it has one value only."""
    low, high = (f(x, (1, 2)).double()[..., None] for f in (torch.amin, torch.amax))  # [T, 3, 1]
    levels = torch.arange(256, dtype=torch.float64, device=x.device)
    scale = 255 / (high - low)
    table = torch.where(high > low, levels * scale - low * scale, levels)
    return _look_up(x, table)


def _equalize(x: torch.Tensor) -> torch.Tensor:
    places = x.permute(0, 3, 1, 2).flatten(2).long()
    counts = torch.zeros(x.shape[0], 3, 256, dtype=torch.int64, device=x.device)
    counts.scatter_add_(2, places, torch.ones_like(places))
    most = counts.gather(2, x.amax((1, 2)).long()[..., None])  # pixels of the highest level
    step = (counts.sum(2, keepdim=True) - most) // 255
    before = counts.cumsum(2) - counts
    levels = torch.arange(256, device=x.device).expand_as(counts)
    table = torch.where(step > 0, (step // 2 + before) // step.clamp(min=1), levels)
    return _look_up(x, table)


def _luma(x: torch.Tensor) -> torch.Tensor:
    """Brightness, uint8 [T, height, width, 1]."""
    red, green, blue = (weight * x[..., i].int() for i, weight in enumerate(_LUMA))
    return ((red + green + blue + 0x8000) >> 16).to(torch.uint8)[..., None]


def _blend(zero: torch.Tensor, one: torch.Tensor, factor: float) -> torch.Tensor:
    base = zero.float()
    return torch.add(base, one.float() - base, alpha=factor).clamp(0, 255).to(torch.uint8)


def _smooth(x: torch.Tensor) -> torch.Tensor:
    """A mean of each pixel (5 of 13) and its eight neighbours; the border stays as it is."""
    if min(x.shape[1:3]) < 3:
        return x
    wide = x.int()
    rows = wide[:, :-2] + wide[:, 1:-1] + wide[:, 2:]
    total = rows[:, :, :-2] + rows[:, :, 1:-1] + rows[:, :, 2:] + 4 * wide[:, 1:-1, 1:-1]
    result = x.clone()
    result[:, 1:-1, 1:-1] = ((2 * total + 13) // 26).to(torch.uint8)
    return result


def _rotation(degrees: float, height: int, width: int) -> tuple[float, ...]:
    """Where a pixel of the picture turned counter-clockwise about its centre comes from."""
    angle = -math.radians(degrees)
    a, b = round(math.cos(angle), 15), round(math.sin(angle), 15)
    x, y = width / 2, height / 2
    return a, b, x - a * x - b * y, -b, a, y + b * x - a * y


def _affine(
    x: torch.Tensor, matrix: Sequence[float], resample: int, fill: tuple[int, int, int]
) -> torch.Tensor:
    """Each pixel from the place (a x + b y + c, d x + e y + f) of the old picture."""
    a, b, c, d, e, f = matrix
    frames, height, width, _ = x.shape
    down = torch.arange(height, dtype=torch.float64, device=x.device)[:, None] + 0.5
    across = torch.arange(width, dtype=torch.float64, device=x.device) + 0.5
    from_x, from_y = a * across + b * down + c, d * across + e * down + f  # [height, width]
    inside = (from_x >= 0) & (from_x < width) & (from_y >= 0) & (from_y < height)
    left, top = (from_x - 0.5).floor(), (from_y - 0.5).floor()
    weights_x, weights_y = (
        _weights((place - 0.5 - low).float(), resample)
        for place, low in ((from_x, left), (from_y, top))
    )
    flat = x.flatten(1, 2)  # [T, pixels, 3]
    first = -(len(weights_x) // 2 - 1)  # taps begin here, relative to left and top
    total = torch.zeros(frames, height * width, 3, device=x.device)
    for j, weight_y in enumerate(weights_y):
        row = (top + (first + j)).clamp(0, height - 1).long() * width
        line = torch.zeros_like(total)
        for i, weight_x in enumerate(weights_x):
            column = (left + (first + i)).clamp(0, width - 1).long()
            pixels = flat.index_select(1, (row + column).flatten())
            line += weight_x.flatten()[:, None] * pixels
        total += weight_y.flatten()[:, None] * line
    moved = total.clamp(0, 255).to(torch.uint8).view_as(x)
    colour = torch.tensor(fill, dtype=torch.uint8).to(x.device, non_blocking=True)
    return torch.where(inside[..., None], moved, colour)


def _weights(part: torch.Tensor, resample: int) -> list[torch.Tensor]:
    """Of the 2 (bilinear) or 4 (bicubic, parameter -1) neighbours on one axis."""
    if resample == Image.Resampling.BILINEAR:
        return [1 - part, part]
    squared, cubed = part**2, part**3
    return [
        -part + 2 * squared - cubed,
        1 - 2 * squared + cubed,
        part + squared - cubed,
        cubed - squared,
    ]
