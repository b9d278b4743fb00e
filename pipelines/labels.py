"""Flow labels inside the pipeline: computed from the cropped clip, so that they describe the pixels
the model sees."""

import torch

from timefast.data.batch import ClipSpec
from timefast.ops import flow_labels


def clip_labels(video: torch.Tensor, spec: ClipSpec) -> torch.Tensor | None:
    """Labels int64 [B, T-1, N] of a normalised video [B, 3, T, height, width]; None: no rule."""
    if spec.flow_rule is None:
        return None
    return flow_labels(
        video,
        patch_size=spec.patch_size,
        rule=spec.flow_rule,
        tau=spec.flow_tau,
        mean=spec.mean,
        std=spec.std,
        impl=spec.flow_impl,
    )
