"""The heads of TIME, written once for the three backbones, and the face all backbones share."""

from typing import Any

from torch import Tensor, nn

from timefast import ops
from timefast.models.vit import NORM_EPS, Features, TimeOutputs

FLOW_CLASSES = 9  # no motion, and eight directions of 45 degrees


class VideoTransformer(nn.Module):
    """Base of the backbones. A backbone gives `features` and `forward`, and `classify`.

    The heads stand on the model itself and not in a part of their own, since the published
    checkpoints name them so.
    """

    backbone: str
    frames: int  # input frames of a training clip
    num_classes: int
    grid: tuple[int, int]  # patches along height and width of the position table
    impl: str  # implementation of the attention ops, as in timefast.ops
    config: dict[str, Any]  # keywords of create_model that rebuild this model
    # what the clips are normalised with: TIME, Motionformer and X-ViT 0.5, TimeSformer 0.45/0.225
    normalisation: dict[str, list[float]]
    classes: list[str] | None = None  # names, where the weights came with them
    load_report: Any = None  # timefast.weights.LoadReport of the weights it was loaded from

    def __init__(self, num_classes: int, frames: int, impl: str):
        super().__init__()
        self.num_classes, self.frames, self.impl = num_classes, frames, impl
        self.config = {}
        self.normalisation = {"mean": [0.5] * 3, "std": [0.5] * 3}

    def add_time_heads(self, dim: int, frames: int) -> None:
        """Order head over `frames` positions and flow head over 9 directions."""
        self.temp_head = nn.Linear(dim, frames)
        self.mlp_q = nn.Linear(dim, dim)
        self.mlp_k = nn.Linear(dim, dim)
        self.mlp_v = nn.Linear(dim, dim)
        self.mlp_proj = nn.Linear(dim, dim)
        self.mlp_norm = nn.LayerNorm(dim, eps=NORM_EPS)
        self.flow_head = nn.Linear(dim, FLOW_CLASSES)

    @property
    def has_time_heads(self) -> bool:
        return hasattr(self, "temp_head")

    def features(self, video: Tensor) -> Features:
        """video [B, 3, T, height, width], normalised -> class feature and tokens."""
        raise NotImplementedError

    def classify(self, cls: Tensor) -> Tensor:
        """Features.cls -> class logits [B, K]."""
        raise NotImplementedError

    def forward(self, video: Tensor) -> Tensor:
        """video [B, 3, T, height, width], normalised -> class logits [B, K]."""
        raise NotImplementedError

    def time_outputs(self, video: Tensor, *, order: bool = True, flow: bool = True) -> TimeOutputs:
        """Class, order and flow logits of video [B, 3, T, height, width] from one pass.

        Raises ValueError if a head is asked for and the model was made with time_heads=False.
        """
        if (order or flow) and not self.has_time_heads:
            raise ValueError(
                f"this {self.backbone} has no order and flow heads; create or load it with "
                "time_heads=True"
            )
        features = self.features(video)
        return TimeOutputs(
            logits=self.classify(features.cls),
            order=self.order_logits(features.tokens) if order else None,
            flow=self.flow_logits(features.tokens) if flow else None,
            tokens=features.tokens,
        )

    def order_logits(self, tokens: Tensor) -> Tensor:
        """tokens [B, T, N, C] -> [B, T, L]: which position in the clip each frame has."""
        return self.temp_head(tokens.mean(2))

    def flow_logits(self, tokens: Tensor) -> Tensor:
        """tokens [B, T, N, C] -> [B, T-1, N, 9]: where each patch moves between two frames.

        Row (t, n) is queried by patch n of frame t+1 and looks at frame t.
        """
        q = self.mlp_q(tokens[:, 1:])
        k, v = self.mlp_k(tokens[:, :-1]), self.mlp_v(tokens[:, :-1])
        moved = ops.pairwise_attention(q, k, v, impl=self.impl)  # [B, T-1, N, C]
        return self.flow_head(self.mlp_norm(self.mlp_proj(moved)))
