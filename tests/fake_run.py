"""A run directory as training leaves it, with made-up but plausible numbers."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import torch

from timefast.report_clips import ClipStrip, Guess, pictures, with_flow

CLASSES = (
    "Moving something from left to right",
    "Moving something from right to left",
    "Lifting something up",
    "Letting something fall down",
    "Moving something towards the camera",
    "Moving something away from the camera",
    "Moving something and something closer to each other",
    "Moving something and something away from each other",
    "Showing something red",
    "Showing something green",
    "Showing something striped",
    "Showing something with a hole",
)
SUBSETS = {"temporal": list(range(8)), "static": list(range(8, 12))}
PROTOCOL = "clip: 8 frames x 1 temporal views x 1 crops of 64 px, short side 64, logits averaged"
COUNTS = {"all": 240, "temporal": 160, "static": 80}


def fake_config(losses: tuple[str, ...] = ("order", "debias", "flow")) -> dict[str, Any]:
    model = {
        "backbone": "timesformer", "num_classes": 12, "frames": 8, "image_size": 64,
        "patch_size": 16, "dim": 64, "depth": 3, "heads": 4, "mlp_ratio": 4.0, "drop_path": 0.1,
        "init": "scratch", "time_heads": bool(losses),
    }  # fmt: skip
    clip = {
        "frames": 8, "crop": 64, "short_side": [64, 76], "test_short_side": 64,
        "rand_augment": None, "mean": [0.5, 0.5, 0.5], "std": [0.5, 0.5, 0.5],
        "flow_rule": "tau" if losses else None, "flow_tau": 0.5 if losses else None,
        "flow_impl": "auto", "patch_size": 16,
    }  # fmt: skip
    return {
        "timefast": "0.1.0",
        "created": "2026-11-20T16:42:07+00:00",
        "recipe": "demo" if losses else "baseline_demo",
        "config": {
            "model": {"backbone": "timesformer", "frames": 8, "image_size": 64, "weights": "none"},
            "data": {"root": "/data/demo", "pipeline": "auto", "max_bad_fraction": 0.01},
            "method": {"losses": list(losses), "weight_order": 1.0, "smoothing_class": 0.1},
            "optim": {"epochs": 16, "batch_size": 16, "lr": 0.002, "max_steps": None},
            "run": {"seed": 0, "device": "auto", "precision": "auto", "views": [1, 1]},
        },
        "model": model,
        "classes": list(CLASSES),
        "subsets": SUBSETS,
        "clip": clip,
        "versions": {"python": "3.11.7", "torch": "2.13.0", "triton": "3.7.1", "av": "18.1.0"},
        "git_commit": "0123456789ab+dirty",
        "device": "cpu",
        "implementations": {"time_attention": "cpu", "space_attention": "cpu", "farneback": "cv2"},
        "pipeline": "cpu (PyAV)",
        "total_steps": 480,
    }


def fake_train(steps: int = 480, losses: tuple[str, ...] = ("order", "debias", "flow")) -> list:
    rng = np.random.default_rng(0)
    lines = []
    for step in range(10, steps + 1, 10):
        fade = math.exp(-step / 170)
        parts = {
            "loss_ce": 0.95 + 1.5 * fade,
            "loss_order": 0.62 + 1.4 * math.exp(-step / 60) if "order" in losses else 0.0,
            "loss_debias": 2.55 + 0.35 * math.sin(step / 90) * fade if "debias" in losses else 0.0,
            "loss_flow": 0.9 + 0.6 * math.exp(-step / 90) if "flow" in losses else 0.0,
        }
        parts = {k: v + 0.05 * rng.standard_normal() if v else 0.0 for k, v in parts.items()}
        lines.append({
            "kind": "train", "step": step, "epoch": step / 30, "lr": 0.002 * (1 - step / 490),
            "loss": sum(parts.values()), **parts, "grad_norm": 1.3 + 0.2 * rng.standard_normal(),
            "clips_per_s": 96 + 4 * rng.standard_normal(), "data_s": 0.021, "step_s": 0.166,
        })  # fmt: skip
    return lines


def fake_evals(steps: tuple[int, ...] = (120, 240, 360, 480)) -> list[dict[str, Any]]:
    lines = []
    for step in steps:
        done = step / 480
        for subset, top, low in (("temporal", 84.4, 28.8), ("static", 92.5, 95.0)):
            rise = 1 - math.exp(-3.2 * done)
            lines.append({
                "kind": "eval", "step": step, "epoch": step / 30, "split": "validation",
                "protocol": PROTOCOL, "subset": subset, "shuffles": 3, "shuffled_top1_spread": 0.8,
                "videos_expected": COUNTS[subset], "videos_evaluated": COUNTS[subset],
                "videos_failed": 0, "top1": top * rise, "top5": min(100.0, top * rise + 9),
                "shuffled_top1": low * rise, "gap": (top - low) * rise,
                "confidence": 0.3 + 0.28 * rise, "shuffled_confidence": 0.34 - 0.08 * done,
            })  # fmt: skip
        temporal, static = lines[-2], lines[-1]
        mean = {
            k: (2 * temporal[k] + static[k]) / 3
            for k in temporal
            if isinstance(temporal[k], float) and k != "epoch"
        }
        counts = {"videos_expected": 240, "videos_evaluated": 240}
        lines.append({**static, "subset": "all", **mean, **counts})
    return lines


def fake_strips() -> list[ClipStrip]:
    """Two clips of a disc that moves to the right, with some wrong predictions."""
    rng = np.random.default_rng(3)
    strips = []
    for number, name in ((17, CLASSES[0]), (41, CLASSES[8])):
        shade = rng.normal(0, 0.08, (3, 8, 8)).repeat(8, 1).repeat(8, 2)  # [3, height, width]
        rows, columns = np.mgrid[:64, :64]
        frames = []
        for t in range(8):
            speed = 5 if number == 17 else 0
            disc = (rows - 34) ** 2 + (columns - 14 - speed * t) ** 2 < 110
            colour = np.array([0.9, 0.75, -0.2] if number == 17 else [0.7, -0.7, -0.7])
            frames.append(np.where(disc, colour[:, None, None], shade))
        video = np.stack(frames, 1)  # [3, T, height, width]
        truth = [
            [1 if number == 17 and n in (8 + t // 3, 9 + t // 3) else 0 for n in range(16)]
            for t in range(7)
        ]
        guess = [list(t) for t in truth]
        guess[2][5], guess[4][9], guess[6][11] = 3, 8, 0
        strip = ClipStrip(
            id=str(number),
            true_class=name,
            original=Guess(name, 0.83),
            shuffled=Guess(CLASSES[1], 0.21),
            size=(64, 64),
            columns=4,
            frames=pictures(torch.from_numpy(video), (0.5,) * 3, (0.5,) * 3),
            order=[0, 1, 2, 3, 5, 5, 6, 7],
        )
        strips.append(with_flow(strip, guess, truth))
    return strips


def write_fake_run(
    folder: Path,
    config: dict[str, Any] | None = None,
    metrics: list[dict[str, Any]] | None = None,
    failures: list[dict[str, Any]] | None = None,
) -> Path:
    """The files of a run, without checkpoint; metrics default to a finished run."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config or fake_config()))
    lines = fake_train() + fake_evals() if metrics is None else metrics
    (folder / "metrics.jsonl").write_text("".join(json.dumps(x) + "\n" for x in lines))
    (folder / "failures.jsonl").write_text("".join(json.dumps(x) + "\n" for x in failures or []))
    return folder
