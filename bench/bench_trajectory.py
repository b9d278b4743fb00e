"""Trajectory attention beside its rivals: the form of the published code, the same compiled, and
one that uses SDPA for the first step. Forward, backward and both, with peak memory and what is kept
in between; on a GPU the paper's shapes in bfloat16, without one mid sizes in float32.
"""

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

from bench.bench_ops import DEVICE, DTYPE, _bytes, error_of, skipped_unless_it_fits
from bench.conftest import LIMITS, ON_GPU
from timefast import ops
from timefast.kernels import native
from timefast.kernels.op import OPS, Case


def _by_head(x: Tensor) -> Tensor:
    """[B, T, N, H, D] -> [B, H, S, D]"""
    return x.permute(0, 3, 1, 2, 4).flatten(2, 3)


def _materialised_frames(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """All probabilities of the clip at once: q, k, v [B, T, N, H, D] -> x [B, S, T, C]."""
    clips, frames, patches, heads, width = q.shape
    q, k, v = _by_head(q), _by_head(k), _by_head(v)
    scores = (q * width**-0.5) @ k.transpose(2, 3)  # [B, H, S, S]
    p = scores.unflatten(3, (frames, patches)).softmax(-1)
    x = torch.einsum("bhqsn,bhsnd->bhqsd", p, v.unflatten(2, (frames, patches)))
    return x.permute(0, 2, 3, 1, 4).flatten(3)


def _sdpa_frames(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """One SDPA call per frame."""
    queries = _by_head(q)
    answers = []
    for s in range(q.shape[1]):
        keys, values = k[:, s].transpose(1, 2), v[:, s].transpose(1, 2)  # [B, H, N, D]
        answers.append(F.scaled_dot_product_attention(queries, keys, values))
    return torch.stack([x.transpose(1, 2).flatten(2) for x in answers], 2)


def _whole(frames_step: Callable[..., Tensor], *args: Tensor, values: str) -> tuple[Tensor, Tensor]:
    """The module of the published code around a first step, between the two outer projections."""
    q, k, v, cls_q, cls_k, cls_v, w_q, b_q, w_kv, b_kv = args
    clips, frames, patches, heads, width = q.shape
    keys, all_values = (
        torch.cat([cls[:, :, None], _by_head(x)], 2) for cls, x in ((cls_k, k), (cls_v, v))
    )
    scores = (cls_q[:, :, None] * width**-0.5) @ keys.transpose(2, 3)
    cls_out = (scores.softmax(-1) @ all_values)[:, :, 0]

    x = frames_step(q, k, v)  # [B, S, T, C]
    by_frame = x.unflatten(1, (frames, patches))
    own = by_frame.diagonal(dim1=1, dim2=3).permute(0, 3, 1, 2).flatten(1, 2)  # [B, S, C]
    q2 = F.linear(own, w_q, b_q).unflatten(-1, (heads, width)).transpose(1, 2) * width**-0.5
    k2, v2 = F.linear(x, w_kv, b_kv).unflatten(-1, (2, heads, width)).unbind(3)
    k2 = k2.permute(0, 3, 1, 2, 4)  # [B, H, S, T, D]
    along = torch.einsum("bhqd,bhqsd->bhqs", q2, k2).softmax(-1)
    averaged = x.unflatten(-1, (heads, width)) if values == "trajectory" else v2
    out = torch.einsum("bhqs,bqshd->bqhd", along, averaged)
    return out.unflatten(1, (frames, patches)), cls_out


@functools.cache
def _compiled() -> Callable[..., tuple[Tensor, Tensor]]:
    return torch.compile(functools.partial(_whole, _materialised_frames))


def _function(form: str) -> Callable[..., tuple[Tensor, Tensor]]:
    if form == "published":
        return functools.partial(_whole, _materialised_frames)
    if form == "published compiled":
        return _compiled()
    if form == "sdpa":
        return functools.partial(_whole, _sdpa_frames)
    return functools.partial(ops.trajectory_attention, impl=form)


def _points() -> Iterator[Any]:
    for case in OPS["trajectory_attention"].cases:
        if case.size == ("paper" if ON_GPU else "mid"):
            for form in ("published", "published compiled", "sdpa", "cpu", "triton"):
                if form != "triton" or ON_GPU:  # the interpreter's time means nothing
                    yield pytest.param(case, form, id=f"{case.name}-{form}")


@pytest.mark.parametrize("direction", ["fwd", "bwd", "fwd+bwd"])
@pytest.mark.parametrize("case, form", list(_points()))
@skipped_unless_it_fits()
def bench_trajectory(measure: Callable[..., None], case: Case, form: str, direction: str) -> None:
    args, kwargs = case.build(DTYPE, DEVICE, torch.Generator().manual_seed(0))
    inputs = [x.detach().requires_grad_() for x in args]
    function = _function(form)
    with FlopCounterMode(display=False) as counter, native.disabled():  # products it can count
        function(*inputs, **kwargs)
    with kept_for_backward() as kept:
        outputs = function(*inputs, **kwargs)
    if form in ("published", "cpu"):
        expected = forward_flops(args[0].shape, form, kwargs["values"])
        assert abs(counter.get_total_flops() / expected - 1) < 0.02
    generator = torch.Generator().manual_seed(1)
    upstream = [torch.randn(x.shape, generator=generator).to(DEVICE, DTYPE) for x in outputs]

    def forward() -> tuple[Tensor, ...]:
        return function(*inputs, **kwargs)

    def backward(outputs: tuple[Tensor, ...] = outputs) -> tuple[Tensor, ...]:
        return torch.autograd.grad(outputs, inputs, upstream, retain_graph=True)

    error = error_of((*outputs, *backward()), "trajectory_attention", inputs, kwargs, upstream)
    runs = {"fwd": forward, "bwd": backward, "fwd+bwd": lambda: backward(forward())}
    kind = "published" if form in ("published", "published compiled", "sdpa") else form
    flops = forward_flops(args[0].shape, kind, kwargs["values"])
    passes = {"fwd": 1, "bwd": 2, "fwd+bwd": 3}[direction]  # recomputation is not counted
    memory = {"kept_memory": sum(kept.values())}
    if not ON_GPU:
        memory["peak_memory_cpu"] = peak_memory(runs[direction])
    measure(
        runs[direction], error=error, limit=LIMITS[DTYPE], op="trajectory_attention", impl=form,
        case=case.name, shapes=[list(x.shape) for x in args], direction=direction,
        dtype=str(DTYPE).removeprefix("torch."), bytes=passes * _bytes((*inputs, *outputs)),
        flops=passes * flops, **memory,
    )  # fmt: skip


def forward_flops(shape: tuple[int, ...], form: str, values: str) -> float:
    """Products of the forward pass, a multiply-add as 2."""
    clips, frames, patches, heads, width = shape
    queries, tokens, dim = clips * frames * patches, frames * patches, heads * width
    both = 4.0 * queries * tokens * dim + 4.0 * clips * (tokens + 1) * dim + 2.0 * queries * dim**2
    if form == "published":
        return both + queries * frames * (4 * dim**2 + 4 * dim)
    halves = 1 if values == "trajectory" else 2
    return both + halves * queries * (2 * dim**2 + 2 * heads * frames * dim)


@contextlib.contextmanager
def kept_for_backward() -> Iterator[dict[int, int]]:
    """Bytes of each storage, inputs among them, that autograd keeps of what runs in it."""
    kept: dict[int, int] = {}

    def pack(x: Tensor) -> Tensor:
        kept[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        yield kept


def peak_memory(run: Callable[[], Any]) -> int:
    """Most bytes that `run` holds at once on the CPU, above what was there before."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        run()
    now = peak = 0
    events = [e for e in recorded.profiler.kineto_results.events() if e.name() == "[memory]"]
    for event in sorted(events, key=lambda e: e.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    return peak
