"""TIME, and plain supervised training as the same with all weights 0."""

from collections.abc import Sequence

from torch import Tensor, nn

from timefast.data.batch import Batch
from timefast.losses import time_losses
from timefast.models import VideoTransformer


class TimeMethod(nn.Module):
    """Model and losses in one module, so that one wrapper (DDP, compile) holds a whole step.

    `weights` are those of the order, debias and flow loss; (0, 0, 0) is supervised training.
    `label_smoothing` is that of the class, order and flow loss.
    """

    def __init__(
        self,
        model: VideoTransformer,
        *,
        weights: Sequence[float] = (1.0, 1.0, 1.0),
        label_smoothing: float | Sequence[float] = 0.2,
    ):
        super().__init__()
        self.model, self.weights, self.label_smoothing = model, weights, label_smoothing

    def freeze_unread(self) -> None:
        """Let the heads whose loss has weight 0 ask for no gradient: processes that exchange
        gradients would wait for theirs."""
        if self.model.has_time_heads:
            order, _, flow = self.weights
            unread = () if order else self.model.order_heads()
            unread += () if flow else self.model.flow_heads()
            for head in unread:
                head.requires_grad_(False)

    def training_loss(self, batch: Batch, permutation: Tensor | None) -> dict[str, Tensor]:
        """Losses total, ce, order, debias, flow of a batch; `permutation` [T] is the order of
        frames of the debiasing pass, the same for all clips."""
        return time_losses(
            self.model, batch.video, batch.label, batch.flow_label, permutation,
            weights=self.weights, label_smoothing=self.label_smoothing,
        )  # fmt: skip

    def forward(self, batch: Batch, permutation: Tensor | None) -> dict[str, Tensor]:
        return self.training_loss(batch, permutation)
