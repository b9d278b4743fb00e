"""Where a model looks: `python -m timefast.gradcam SOURCE VIDEO`.

Grad-CAM of a class over all frames of a clip (figures 4 and 5 of the TIME paper). Writes
gradcam-<video>.png (a row of frames, a row of maps per model), .gif (the maps in motion) and .json.
"""

import argparse
import difflib
import logging
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from timefast.charts import model_names
from timefast.config import Parser
from timefast.data.batch import Batch
from timefast.errors import InputError
from timefast.eval.source import (
    Source,
    add_source_flags,
    analysis_folder,
    class_names,
    exit_code,
    open_source,
    origin,
    refuse_not_finite,
    surroundings,
    video_batches,
    written,
)
from timefast.eval.tokens import patch_tokens, watching
from timefast.log import to_console
from timefast.models import VideoTransformer
from timefast.run_folder import write_json

logger = logging.getLogger("timefast")
FRAME = 160  # pixels of a frame in the pictures


def main(argv: Sequence[str] | None = None) -> int:
    parser = Parser(prog="python -m timefast.gradcam", description=__doc__)
    parser.add_argument("source", type=Path, help="run folder or checkpoint")
    parser.add_argument("video", type=Path, help="video file")
    parser.add_argument(
        "--beside", type=Path, action="append", default=[], metavar="SOURCE",
        help="another model, its maps in the next row; may be given again",
    )  # fmt: skip
    parser.add_argument(
        "--class", dest="wanted", metavar="CLASS",
        help="name or number of the class (default: what the first model predicts)",
    )  # fmt: skip
    parser.add_argument(
        "--labels", type=Path, metavar="FILE",
        help="class names: the labels file of Something-Something v2, or one name per line",
    )  # fmt: skip
    parser.add_argument(
        "--block", type=int, metavar="N", help="block whose tokens count, from 1 (default: last)"
    )
    parser.add_argument(
        "--out", type=Path, metavar="DIR", help="folder to write to (default: analysis/ of the run)"
    )
    add_source_flags(parser)
    args = parser.parse_args(argv)
    to_console()
    return exit_code(lambda: run(args))


def run(args: argparse.Namespace) -> int:
    folder, label, rows, frames = None, None, [], None
    for path in (args.source, *args.beside):
        source = open_source(path, args)
        folder = folder or analysis_folder(source, args.out)
        names = class_names(source.model, args.labels)
        (batch,) = video_batches(source, [args.video], (1, 1))
        if batch.failures:
            failure = batch.failures[0]
            raise InputError(f"{failure.path}: {failure.kind}, {failure.reason}")
        for notice in batch.notices:
            logger.warning("used: %s: %s, %s", notice.path, notice.kind, notice.reason)
        if label is None and args.wanted is not None:
            label = _label(args.wanted, names)
        if frames is not None and len(frames) != source.spec.frames:
            raise InputError(
                f"{path} takes clips of {source.spec.frames} frames, {args.source} of "
                f"{len(frames)}; to see them side by side name one length with --frames"
            )
        record, cam = explain(source, batch, label, args.block)
        label = record["label"]
        record["class"] = names[label]
        rows.append((record, cam))
        if frames is None:
            frames = _pictures(batch.video[0], source)
    assert folder is not None and frames is not None
    stem = folder / f"gradcam-{args.video.stem}"
    # a token of a tube stands for all frames of it
    maps = [overlay(frames, cam.repeat_interleave(len(frames) // len(cam), 0)) for _, cam in rows]
    records = [record for record, _ in rows]
    titles = [
        f"{name}: {record['class']}, {100 * record['probability']:.1f} %"
        for record, name in zip(records, model_names({"models": records}), strict=True)
    ]
    strip = [(args.video.name, frames), *zip(titles, maps, strict=True)]
    save_strip(strip, stem.with_name(f"{stem.name}.png"))
    save_motion([frames, *maps], stem.with_name(f"{stem.name}.gif"))
    result = {
        "what": "gradcam", "video": str(args.video), "id": args.video.stem,
        "picture": f"{stem.name}.png", "models": records, **surroundings(),
    }  # fmt: skip
    write_json(stem.with_name(f"{stem.name}.json"), result)
    print("\n".join(titles))
    print(written(folder, [f"{stem}.png", f"{stem}.gif", f"{stem}.json"]))
    return 0


def explain(
    source: Source, batch: Batch, label: int | None, block: int | None
) -> tuple[dict[str, Any], Tensor]:
    """The record of one model and its map [T, gh, gw], 0..1, for a class (None: the predicted)."""
    model = source.model
    if label is not None and not 0 <= label < model.num_classes:
        raise InputError(
            f"--class {label}: {source.path} has {model.num_classes} classes, from 0 on"
        )
    depth = len(model.blocks)  # type: ignore[arg-type]
    if block is not None and not 1 <= block <= depth:
        raise InputError(f"--block {block}: {source.path} has blocks 1 to {depth}")
    number = block or depth
    with torch.enable_grad():
        logits, weights, cam = grad_cam(model, batch.video, label, number - 1)
    refuse_not_finite(source, logits)
    label = int(logits[0].argmax()) if label is None else label
    highest = cam.max()
    cam = cam[0] / highest if highest > 0 else cam[0]
    record = {
        **origin(source),
        "block": number,
        "label": label,
        "probability": logits[0].float().softmax(-1)[label].item(),
        "map": [[[round(v, 4) for v in row] for row in frame] for frame in cam.tolist()],
    }
    return record, cam


def grad_cam(
    model: VideoTransformer, video: Tensor, label: int | None, block: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Grad-CAM (Selvaraju et al. 2017) on the normalised tokens that a block attends over.

    video [B, 3, frames, height, width] -> class logits [B, K], channel weights [B, C] (the gradient
    of the class logit, averaged over frames and patches), map [B, T, gh, gw]: the positive part of
    the tokens' weighted sum. `label` None takes the predicted class of each clip. The last block's
    own output does not reach the class logit, so the tokens before its spatial attention are
    taken, as common for vision transformers; the paper says only that time is one more dimension.
    """
    kept: list[Tensor] = []

    def keep(_: int, output: Any) -> None:
        _, normed = output
        if patch_tokens(model, normed, video) is not None:
            kept.append(normed)

    with watching([model.blocks[block].norm1], keep):  # type: ignore[index,list-item,union-attr]
        logits = model(video)
    chosen = logits.argmax(-1) if label is None else torch.full((len(video),), label)
    score = logits.gather(1, chosen[:, None].to(logits.device)).sum()
    (at_tokens,) = torch.autograd.grad(score, kept[0])
    tokens = patch_tokens(model, kept[0].detach(), video)
    gradient = patch_tokens(model, at_tokens, video)
    assert tokens is not None and gradient is not None
    weights = gradient.float().mean((1, 2))  # [B, C]
    cam = torch.einsum("btnc,bc->btn", tokens.float(), weights).relu()
    patch = model.config["patch_size"]
    grid = video.shape[3] // patch, video.shape[4] // patch
    return logits.detach(), weights, cam.unflatten(2, grid)


def _label(text: str, names: Sequence[str]) -> int:
    plain = text.replace("[", "").replace("]", "")
    if plain in names:
        return names.index(plain)
    if text.isdecimal():
        return int(text)
    near = difflib.get_close_matches(plain, names, 3, 0.3)
    hint = f"near it: {', '.join(repr(n) for n in near)}" if near else f"e.g. {names[0]!r}"
    raise InputError(
        f"--class {text}: neither a class name nor a number from 0 to {len(names) - 1}; {hint}"
    )


def _pictures(video: Tensor, source: Source) -> np.ndarray:
    """Normalised video [3, frames, height, width] -> uint8 [frames, FRAME, FRAME, 3]."""
    mean, std = (torch.tensor(v).view(3, 1, 1, 1) for v in (source.spec.mean, source.spec.std))
    pixels = (video.cpu() * std + mean).transpose(0, 1)  # [frames, 3, height, width]
    pixels = F.interpolate(pixels, size=(FRAME, FRAME), mode="bilinear", align_corners=False)
    return (pixels.clamp(0, 1) * 255).round().byte().permute(0, 2, 3, 1).numpy()


def overlay(frames: np.ndarray, cam: Tensor) -> np.ndarray:
    """Frames uint8 [T, S, S, 3] under a map [T, gh, gw] in 0..1, as a heat map of that size."""
    import matplotlib

    size = frames.shape[1:3]
    heat = F.interpolate(cam[:, None].cpu(), size=size, mode="bilinear", align_corners=False)
    value = heat[:, 0].clamp(0, 1).numpy()
    colour = matplotlib.colormaps["inferno"](value)[..., :3] * 255
    share = (0.25 + 0.6 * value)[..., None]  # dark where it does not look, so that it stands out
    return ((1 - share) * frames + share * colour).round().astype(np.uint8)


def save_strip(rows: Sequence[tuple[str, np.ndarray]], path: Path) -> None:
    """Rows of a title and T pictures [T, S, S, 3] each, on white, as one PNG."""
    from PIL import Image, ImageDraw, ImageFont

    gap, title = 4, 22
    frames, size = rows[0][1].shape[:2]
    width, height = frames * (size + gap) - gap, len(rows) * (size + title + gap)
    canvas = Image.new("RGB", (width, height), "white")
    draw, font = ImageDraw.Draw(canvas), ImageFont.load_default(14)
    for y, (text, pictures) in enumerate(rows):
        top = y * (size + title + gap)
        draw.text((0, top + 3), text, fill="#14181f", font=font)
        for x, picture in enumerate(pictures):
            canvas.paste(Image.fromarray(picture), (x * (size + gap), top + title))
    canvas.save(path)


def save_motion(rows: Sequence[np.ndarray], path: Path) -> None:
    """The rows side by side, frame after frame, as an endless GIF."""
    from PIL import Image

    images = [Image.fromarray(np.concatenate(parts, 1)) for parts in zip(*rows, strict=True)]
    images[0].save(path, save_all=True, append_images=images[1:], duration=250, loop=0)


if __name__ == "__main__":
    sys.exit(main())
