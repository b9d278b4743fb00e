"""Several processes that train as one; the only file that imports torch.distributed.

torchrun starts them and tells each by environment variables which one it is (docs/training.md).
Started any other way a process is alone, and every function here does what one process needs.
All processes call these functions in the same order.
"""

import contextlib
import os
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method
from torch.distributed.rendezvous import rendezvous
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

from timefast.errors import InputError, RunError

T = TypeVar("T")
_store: dist.Store | None = None
_agreed: set[str] = set()  # errors that all processes raise and the leader says


def world_size() -> int:
    """Processes of this run, over all machines."""
    return int(os.environ.get("WORLD_SIZE", 1))


def rank() -> int:
    """Number of this process, from 0: the leader, which alone writes the run folder."""
    return int(os.environ.get("RANK", 0)) if world_size() > 1 else 0


def local_rank() -> int:
    """Number of this process among those of its machine."""
    return int(os.environ.get("LOCAL_RANK", 0)) if world_size() > 1 else 0


@contextlib.contextmanager
def process_group(seconds: float) -> Iterator[None]:
    """Meet the other processes, and part from them at the end.

    A process that hears nothing of the others for `seconds` gives up. Tensors on a GPU travel by
    NCCL, everything else by Gloo, so that a message between hosts waits for no GPU.
    """
    global _store
    if world_size() == 1:
        yield
        return
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    wait = timedelta(seconds=seconds)
    _store, _, _ = next(rendezvous("env://", timeout=wait))
    dist.init_process_group(
        backend, store=dist.PrefixStore("timefast", _store), rank=rank(), world_size=world_size(),
        timeout=wait,
    )  # fmt: skip
    yield
    dist.destroy_process_group()  # not after an error: it may wait for a process that is gone


def lost_the_others(error: Exception) -> bool:
    """Whether an error says that another process is gone or silent, and nothing about this one."""
    transport = ("gloo/transport", "gloo::", "NCCL", "Connection reset by peer", "Broken pipe")
    return world_size() > 1 and (
        isinstance(error, dist.DistError) or any(word in str(error) for word in transport)
    )


def first_to_say(message: str) -> bool:
    """Whether no other process says this: what all of them find is said once."""
    if _store is None:
        return True
    if message in _agreed:
        return rank() == 0
    try:
        return _store.add(f"said/{message}", 1) == 1
    except RuntimeError:  # the process that keeps the store is gone
        return True


def from_leader(make: Callable[[], T]) -> T:
    """make() of the leader, for all; what it raises is raised by all."""
    if world_size() == 1:
        return make()
    said: list[Any] = [None, None]
    if rank() == 0:
        try:
            said[0] = make()
        except (InputError, RunError, NotImplementedError, OSError) as error:
            said[1] = error
    dist.broadcast_object_list(said)
    if said[1] is not None:
        _agreed.add(str(said[1]))
        raise said[1]
    return said[0]


def together(make: Callable[[], T]) -> T:
    """make() of this process; if it raises in any of them, the first of these errors is raised by
    all. `make` itself calls nothing of this module."""
    if world_size() == 1:
        return make()
    result, error = None, None
    try:
        result = make()
    except (InputError, RunError, NotImplementedError, OSError) as raised:
        error = raised
    for raised_there in gather(error):
        if raised_there is not None:
            _agreed.add(str(raised_there))
            raise raised_there
    return result  # type: ignore[return-value]


def first_on_each_machine(make: Callable[[], T]) -> T:
    """make() in one process of each machine and then in the others, which find in the cache what
    the first has downloaded or made."""
    first = together(make if local_rank() == 0 else lambda: None)
    rest = together(make if local_rank() != 0 else lambda: None)
    return first if local_rank() == 0 else rest  # type: ignore[return-value]


def gather(value: T) -> list[T]:
    """The values of all processes, in order of rank."""
    if world_size() == 1:
        return [value]
    values: list[Any] = [None] * world_size()
    dist.all_gather_object(values, value)
    return values


def largest(*values: int) -> tuple[int, ...]:
    """The largest of each of these numbers over all processes. No GPU is waited for."""
    if world_size() == 1:
        return values
    numbers = torch.tensor(values)
    dist.all_reduce(numbers, dist.ReduceOp.MAX)
    return tuple(numbers.tolist())


def total(values: Tensor) -> Tensor:
    """The sum of a CPU tensor over all processes."""
    if world_size() > 1:
        dist.all_reduce(values)
    return values


def replicate(method: nn.Module, device: torch.device) -> nn.Module:
    """The method with gradients averaged over the processes, all of which hold the whole model."""
    if world_size() == 1:
        return method
    ids = [device.index] if device.type == "cuda" else None
    return DistributedDataParallel(
        method, device_ids=ids, broadcast_buffers=False, gradient_as_bucket_view=True
    )


def shard(model: nn.Module, methods: tuple[str, ...]) -> None:
    """Spread weights, gradients and optimizer state over the processes, in place (FSDP2).

    Each of `model.blocks` is gathered when it is needed and let go after; `methods` are those of
    the model that are called from outside beside its forward.
    """
    device = next(model.parameters()).device.type
    mesh = init_device_mesh(device, (world_size(),))
    for block in model.blocks:  # type: ignore[union-attr]
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    for name in methods:
        register_fsdp_forward_method(model, name)


@contextlib.contextmanager
def gradient_exchange(method: nn.Module, wanted: bool) -> Iterator[None]:
    """Without `wanted` a backward pass only adds to this process's gradients: they are exchanged
    once per optimizer step, with those of the last batch."""
    if isinstance(method, DistributedDataParallel):
        with contextlib.nullcontext() if wanted else method.no_sync():
            yield
        return
    sharded = next((part for part in method.modules() if isinstance(part, FSDPModule)), None)
    if sharded is not None:  # the outermost speaks for all inside it
        sharded.set_requires_gradient_sync(wanted)
    yield


def whole(value: Any) -> Any:
    """A state dict or tensor with sharded tensors gathered, on the CPU of the leader (None on the
    others, which need not hold it)."""
    if isinstance(value, dict):
        return {key: whole(x) for key, x in value.items()}
    if isinstance(value, list):
        return [whole(x) for x in value]
    if isinstance(value, DTensor):
        gathered = value.full_tensor()
        return gathered.cpu() if rank() == 0 else None
    return value


def full(value: Tensor) -> Tensor:
    """A sharded tensor gathered on the device of each process; any other as it is."""
    return value.full_tensor() if isinstance(value, DTensor) else value


def part_of(value: Tensor, like: Tensor) -> Tensor:
    """What this process keeps of a whole tensor, sharded as the parameter `like` is."""
    if not isinstance(like, DTensor):
        return value
    mesh, placements = like.device_mesh, like.placements
    return distribute_tensor(value.to(like.device), mesh, placements, src_data_rank=None)
