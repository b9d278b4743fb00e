"""Tokens inside a backbone, whatever its blocks return: the one place that knows their layouts.

Letters: B clips, T frames of tokens, N patches per frame, C model width.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from timefast.models import VideoTransformer
from timefast.models.vit import settled


def patch_tokens(model: VideoTransformer, value: Any, video: Tensor) -> Tensor | None:
    """The patches [B, T, N, C] among the tokens of this video, as a view of them, or in what a
    block returns for it: tokens, or a tuple that ends with tokens and their pending residual, which
    is added, into a new tensor.

    None for a class token alone. Layouts of tokens: patches apart from the class token
    [B, T, N, C]; all tokens of a clip in one sequence [B, 1+T*N, C]; a sequence per frame
    [B*T, 1+N, C]; X-ViT's [B, T, 1+N, C].
    """
    B, T = len(video), video.shape[2] // model.config.get("tube", 1)
    if isinstance(value, tuple):
        value = settled(*value[-2:])
    if value.ndim == 2:
        return None
    if value.ndim == 4:
        return value[:, :, 1:] if model.backbone == "xvit" else value
    if len(value) == B:
        return value[:, 1:].unflatten(1, (T, -1))
    return value[:, 1:].unflatten(0, (B, T))


@contextmanager
def watching(modules: Sequence[nn.Module], keep: Callable[[int, Any], None]) -> Iterator[None]:
    """Call keep(number of the module, its output) whenever one of the modules has run."""

    def hook(number: int) -> Callable[..., None]:
        return lambda _module, _inputs, output: keep(number, output)

    hooks = [module.register_forward_hook(hook(i)) for i, module in enumerate(modules)]
    try:
        yield
    finally:
        for handle in hooks:
            handle.remove()


def frame_features(model: VideoTransformer, video: Tensor) -> Tensor:
    """video [B, 3, frames, height, width] -> [blocks, B, T, C]: the output of every block averaged
    over the patches of each frame (eq. 6 of the TIME paper), from one pass."""
    means: dict[int, Tensor] = {}

    def keep(number: int, output: Any) -> None:
        tokens = patch_tokens(model, output, video)
        assert tokens is not None
        means[number] = tokens.float().mean(2)

    with watching(list(model.blocks), keep), torch.inference_mode():  # type: ignore[arg-type]
        model.features(video)
    return torch.stack([means[number] for number in range(len(means))])
