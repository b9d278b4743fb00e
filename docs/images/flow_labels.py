"""Draws flow_labels.png: frames of demo videos, their flow as colour, their labels as arrows.

python docs/images/flow_labels.py
"""

import math
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import torch

matplotlib.use("Agg")
from matplotlib import colors
from matplotlib import pyplot as plt

from timefast import demo_data
from timefast.ops import farneback, flow_labels

PATCH = 8
TAU = 0.4  # pixels
LABELS = {0: "left to right", 2: "lifting", 4: "towards the camera", 7: "apart"}
FRAME = 11  # and the one after it


def colour_of(flow: np.ndarray) -> np.ndarray:
    """Flow [2, height, width] -> RGB: the direction is the hue, the speed the saturation."""
    dx, dy = flow
    speed = np.hypot(dx, dy)
    hue = np.arctan2(dy, dx) / (2 * math.pi) % 1
    saturation = np.clip(speed / max(np.quantile(speed, 0.99), 1.0), 0, 1)
    return colors.hsv_to_rgb(np.stack([hue, saturation, np.full_like(hue, 0.95)], axis=-1))


def arrows(axis: Any, labels: np.ndarray) -> None:
    """One arrow per moving patch [rows, columns], along the middle of its octant."""
    for (row, column), label in np.ndenumerate(labels):
        if label:
            angle = (label - 0.5) * math.pi / 4
            dx, dy = 0.46 * PATCH * math.cos(angle), 0.46 * PATCH * math.sin(angle)
            x, y = (column + 0.5) * PATCH - 0.5, (row + 0.5) * PATCH - 0.5
            tint = colors.hsv_to_rgb((angle / (2 * math.pi), 1, 0.95))
            axis.arrow(
                x - dx, y - dy, 2 * dx, 2 * dy, width=0.9, head_width=3.8, head_length=3.2,
                length_includes_head=True, facecolor=tint, edgecolor="white", linewidth=0.3,
            )  # fmt: skip


def draw(path: Path) -> None:
    figure, axes = plt.subplots(3, len(LABELS), figsize=(8.6, 5.1), layout="constrained")
    for column, (label, title) in enumerate(LABELS.items()):
        frames = demo_data.render(0, "validation", label, 0, 1)[FRAME : FRAME + 2]
        video = torch.from_numpy(frames.copy()).permute(3, 0, 1, 2)[None]  # uint8 [1, 3, 2, ., .]
        grey = video[0].float().mean(0)
        labels = flow_labels(video, patch_size=PATCH, rule="tau", tau=TAU)[0, 0]
        pictures = [frames[0], colour_of(farneback(grey[0], grey[1]).numpy()), frames[0] // 2 + 100]
        for axis, picture in zip(axes[:, column], pictures, strict=True):
            axis.imshow(picture)
            axis.set_xticks([])
            axis.set_yticks([])
        arrows(axes[2, column], labels.view(frames.shape[1] // PATCH, -1).numpy())
        axes[0, column].set_title(title, fontsize=10)
    for axis, name in zip(axes[:, 0], ("frame", "flow to the next", "labels"), strict=True):
        axis.set_ylabel(name, fontsize=10)
    figure.savefig(path, dpi=90)


if __name__ == "__main__":
    draw(Path(__file__).with_suffix(".png"))
