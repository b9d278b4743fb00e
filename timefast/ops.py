"""The public ops: each function's file in timefast.kernels says what it computes."""

from timefast.kernels.add_layer_norm import add_layer_norm
from timefast.kernels.divided_attention import space_attention, time_attention
from timefast.kernels.farneback import farneback
from timefast.kernels.flow_attention import pairwise_attention
from timefast.kernels.flow_labels import flow_labels
from timefast.kernels.op import implementations
from timefast.kernels.shift_attention import shift_attention
from timefast.kernels.trajectory_attention import trajectory_attention

__all__ = [
    "add_layer_norm",
    "farneback",
    "flow_labels",
    "implementations",
    "pairwise_attention",
    "shift_attention",
    "space_attention",
    "time_attention",
    "trajectory_attention",
]
