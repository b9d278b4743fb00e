"""Losses: tensors in, scalar out."""

from timefast.losses.time_ssl import debias_loss, flow_loss, order_loss, time_losses

__all__ = ["debias_loss", "flow_loss", "order_loss", "time_losses"]
