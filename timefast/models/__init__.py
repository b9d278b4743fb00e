"""The backbones by name."""

import difflib
import inspect
from typing import Any

from timefast.models.heads import VideoTransformer
from timefast.models.motionformer import Motionformer
from timefast.models.timesformer import TimeSformer
from timefast.models.xvit import XViT

BACKBONES: dict[str, type[VideoTransformer]] = {
    "timesformer": TimeSformer,
    "motionformer": Motionformer,
    "xvit": XViT,
}


def keywords(backbone: str) -> dict[str, Any]:
    """The keywords `create_model` takes for this backbone, with their published defaults."""
    if backbone not in BACKBONES:
        raise ValueError(f"backbone: expected one of {', '.join(BACKBONES)}, got {backbone!r}")
    parameters = inspect.signature(BACKBONES[backbone].__init__).parameters
    return {name: p.default for name, p in parameters.items() if name != "self"}


def create_model(backbone: str, **config: Any) -> VideoTransformer:
    """A video transformer with the heads of TIME.

    Takes, all by keyword, for every backbone: num_classes=174, frames=8 (input frames of a
    training clip), image_size=224 (pixels, int or (height, width)), patch_size=16, dim=768,
    depth=12, heads=12, mlp_ratio=4.0, drop_path (the backbone's published rate), time_heads=True
    (order and flow heads), init="published" (made for ImageNet weights) or "scratch",
    time_embed_every_block=False (adds the time embedding again before every block) and impl="auto"
    (implementation of the ops). Beside these `keywords(backbone)` lists what one
    backbone takes alone.

    The model maps video [B, 3, T, height, width], float, normalised, to class logits [B, K] in
    training and evaluation alike; `features` and `time_outputs` give the rest. `model.config`
    rebuilds it: `create_model(**model.config)`.

    Raises ValueError for an unknown backbone, a keyword that does not apply, an impossible size.
    """
    known = keywords(backbone)
    for name in config:
        if name not in known:
            near = difflib.get_close_matches(name, known, 1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise ValueError(
                f"create_model({backbone!r}) takes no keyword {name!r}{hint} "
                f"(it takes {', '.join(known)})"
            )
    full = {**known, **config}
    full = {k: list(v) if isinstance(v, (tuple, range)) else v for k, v in full.items()}
    model = BACKBONES[backbone](**full)
    model.config = {"backbone": backbone, **full}
    return model


__all__ = ["BACKBONES", "VideoTransformer", "create_model", "keywords"]
