"""Forward and backward pass of a training step as two CUDA graphs, captured once and replayed.

To the host a replay is one call, however many kernels it launches. A graph computes on the memory
and the shapes it was captured with, and no Python runs in it. Random numbers are drawn as ever:
a replay reads seed and offset of the generator and moves the offset on.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from timefast import distributed
from timefast.data.batch import Batch
from timefast.errors import InputError
from timefast.methods.time_ssl import TimeMethod


def check_cuda_graphs(asked: bool, device: torch.device) -> None:
    """Raise InputError if graphs are asked for where this run could not replay them."""
    if asked and distributed.world_size() > 1:
        raise InputError(
            f"--cuda-graphs: expected one process, got {distributed.world_size()}; leave it out"
        )
    if asked and device.type != "cuda":
        raise InputError(f"--cuda-graphs: expected a CUDA device, got {device}; leave it out")


class GraphedMethod(nn.Module):
    """`method`, which for batches of `example`'s shape replays graphs; any other batch goes through
    `method` as it is.

    The tensors of `example` become the graphs' inputs. The backward pass of a batch's `total`, the
    only loss that has one, must be over before the next batch comes: a replay overwrites what it
    needs. Raises torch.OutOfMemoryError if a step of this shape does not fit.
    """

    def __init__(self, method: TimeMethod, example: Batch, autocast: Callable[[], Any]):
        super().__init__()
        self.method, self.shape = method, example.video.shape
        self.step = _Step(method, autocast)
        frames = torch.arange(self.shape[2], device=example.video.device)
        try:
            with torch.cuda.device_of(example.video):
                self.replay: Any = torch.cuda.make_graphed_callables(
                    self.step, self._inputs(example, frames), allow_unused_input=True
                )
        except torch.OutOfMemoryError as error:
            raise torch.OutOfMemoryError(
                f"out of memory while the step was captured for batches of {list(self.shape)}. "
                "Halve --batch-size and double --accumulate (the same training), or leave "
                f"--cuda-graphs out.\n{error}"
            ) from error
        # while the capture's autograd graph lives, each gradient takes a detour to that stream
        self.step.captured["total"].detach_()

    def forward(self, batch: Batch, permutation: Tensor) -> dict[str, Tensor]:
        """What `TimeMethod.training_loss` gives."""
        if batch.video.shape != self.shape:
            return self.method(batch, permutation)
        # The gradients a replay leaves are its own buffers, and autograd takes them as they are.
        # Those that are still there, to be added to, move out before both graphs write again.
        for parameter in self.method.parameters():
            if parameter.grad is not None:
                parameter.grad = parameter.grad.clone()
        losses = self.replay(*self._inputs(batch, permutation))
        return {name: x.clone() for name, x in zip(self.step.captured, losses, strict=True)}

    def _inputs(self, batch: Batch, permutation: Tensor) -> tuple[Tensor, ...]:
        """The same number for every batch: flow labels where they are read, and only there."""
        inputs = batch.video, batch.label, permutation
        if self.method.weights[2] == 0:
            return inputs
        if batch.flow_label is None:
            raise ValueError("flow_labels: expected labels [B, T-1, N], got None")
        return *inputs, batch.flow_label


class _Step(nn.Module):
    """What is captured: a module, whose parameters get gradients, of tensors alone."""

    def __init__(self, method: TimeMethod, autocast: Callable[[], Any]):
        super().__init__()
        self.method, self.autocast = method, autocast
        self.captured: dict[str, Tensor] = {}

    def forward(
        self, video: Tensor, label: Tensor, permutation: Tensor, flow_label: Tensor | None = None
    ) -> tuple[Tensor, ...]:
        """-> the losses, scalars in the order of `captured`; gradients flow from `total` alone."""
        batch = Batch(video, label, sample=label, view=label, flow_label=flow_label)
        # entered in here, so that no cast of a weight outlives the pass that made it: a graph with
        # a cast from before its capture would go on computing with the weights of that time
        with self.autocast():
            losses = self.method(batch, permutation)
        self.captured = {k: x if k == "total" else x.detach() for k, x in losses.items()}
        return tuple(self.captured.values())
