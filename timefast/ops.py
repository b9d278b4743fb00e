"""The public ops: each function's file in timefast.kernels says what it computes."""

from timefast.kernels.divided_attention import space_attention, time_attention
from timefast.kernels.farneback import farneback
from timefast.kernels.flow_attention import pairwise_attention
from timefast.kernels.flow_labels import flow_labels
from timefast.kernels.op import implementations

__all__ = [
    "farneback",
    "flow_labels",
    "implementations",
    "pairwise_attention",
    "space_attention",
    "time_attention",
]
