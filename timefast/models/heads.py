"""The heads of TIME, written once for the three backbones, and the face all backbones share."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from timefast import ops
from timefast.models.vit import NORM_EPS, Features, TimeOutputs, merged
from timefast.profiling import part

FLOW_CLASSES = 9  # no motion, and eight directions of 45 degrees


class VideoTransformer(nn.Module):
    """Base of the backbones. A backbone gives `embed`, `run` and `classify`.

    The heads stand on the model itself and not in a part of their own, since the published
    checkpoints name them so.
    """

    backbone: str
    frames: int  # input frames of a training clip
    num_classes: int
    grid: tuple[int, int]  # patches along height and width of the position table
    impl: str  # implementation of the ops, as in timefast.ops
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

    def order_heads(self) -> tuple[nn.Module, ...]:
        """What only `order_logits` reads."""
        return (self.temp_head,)

    def flow_heads(self) -> tuple[nn.Module, ...]:
        """What only `flow_logits` reads."""
        attention = self.mlp_q, self.mlp_k, self.mlp_v, self.mlp_proj
        return *attention, self.mlp_norm, self.flow_head

    @property
    def has_time_heads(self) -> bool:
        return hasattr(self, "temp_head")

    def embed(self, video: Tensor) -> Tensor:
        """video [B, 3, T, height, width] -> patches [B, T, gh, gw, C], nothing that tells the time
        added yet (T: frames of tokens)."""
        raise NotImplementedError

    def run(self, x: Tensor, whole: int | None = None) -> tuple[Tensor, Tensor]:
        """What `embed` gives -> Features.cls of all clips, Features.tokens of the first `whole`.

        Of the clips after these (None: there are none) nothing is computed that only tokens need.
        """
        raise NotImplementedError

    def classify(self, cls: Tensor) -> Tensor:
        """Features.cls -> class logits [B, K]."""
        raise NotImplementedError

    def features(self, video: Tensor) -> Features:
        """video [B, 3, T, height, width], normalised -> class feature and tokens."""
        return Features(*self.run(self.embed(video)))

    def forward(self, video: Tensor) -> Tensor:
        """video [B, 3, T, height, width], normalised -> class logits [B, K]."""
        return self.classify(self.run(self.embed(video), 0)[0])

    def time_outputs(self, video: Tensor, *, order: bool = True, flow: bool = True) -> TimeOutputs:
        """Class, order and flow logits of video [B, 3, T, height, width] from one pass.

        Raises ValueError if a head is asked for and the model was made with time_heads=False.
        """
        features = self.features(video)
        return self._outputs(self.classify(features.cls), features.tokens, order, flow)

    def paired_outputs(
        self,
        video: Tensor,
        permutation: Tensor | Sequence[int],
        *,
        order: bool = True,
        flow: bool = True,
    ) -> tuple[TimeOutputs, Tensor]:
        """`time_outputs` of video, and class logits [B, K] of the same with its frames in the order
        `permutation` [T]: one pass over twice the clips, patches embedded once for both."""
        x, permutation = self.embed(video), torch.as_tensor(permutation, device=video.device)
        if x.shape[1] == video.shape[2]:
            shuffled = x.index_select(1, permutation)
        else:  # tubes, which now hold other frames together
            shuffled = self.embed(video.index_select(2, permutation))
        clips = x.shape[0]
        cls, tokens = self.run(torch.cat([x, shuffled]), clips)
        logits = self.classify(cls)
        return self._outputs(logits[:clips], tokens, order, flow), logits[clips:]

    def _outputs(self, logits: Tensor, tokens: Tensor, order: bool, flow: bool) -> TimeOutputs:
        if (order or flow) and not self.has_time_heads:
            raise ValueError(
                f"this {self.backbone} has no order and flow heads; create or load it with "
                "time_heads=True"
            )
        return TimeOutputs(
            logits=logits,
            order=self.order_logits(tokens) if order else None,
            flow=self.flow_logits(tokens) if flow else None,
            tokens=tokens,
        )

    @part("heads")
    def order_logits(self, tokens: Tensor) -> Tensor:
        """tokens [B, T, N, C] -> [B, T, L]: which position in the clip each frame has."""
        return self.temp_head(tokens.mean(2))

    @part("heads")
    def flow_logits(self, tokens: Tensor) -> Tensor:
        """tokens [B, T, N, C] -> [B, T-1, N, 9]: where each patch moves between two frames.

        Row (t, n) is queried by patch n of frame t+1 and looks at frame t. With one head as wide as
        the model the projection of keys goes into the queries, q . (W_k y + b_k) = (W_k^T q) . y
        and a constant that the softmax drops; those of values and of the output are one map, since
        the weights of an average add up to one. Keys and values are then the tokens themselves.
        """
        with torch.autocast(tokens.device.type, enabled=False):  # products of weights in float32
            key = self.mlp_k.weight.t()
            weight, bias = key @ self.mlp_q.weight, key @ self.mlp_q.bias
        out_weight, out_bias = merged(self.mlp_proj, self.mlp_v)
        # a gradient of zero, not none: optimizers and DDP make a difference between the two
        out_bias = out_bias + self.mlp_proj.bias + 0 * self.mlp_k.bias
        q = F.linear(tokens[:, 1:], weight, bias)
        seen = tokens[:, :-1].to(q.dtype)
        moved = ops.pairwise_attention(q, seen, seen, impl=self.impl)  # [B, T-1, N, C]
        return self.flow_head(self.mlp_norm(F.linear(moved, out_weight, out_bias)))
