"""Every op of a model in each implementation, beside what else one could use: torch.compile of the
reference; for attention the form of the published code (permute, keep the probabilities), SDPA with
the permutes it needs, xformers; for add_layer_norm a sum and PyTorch's norm. Forward, backward and
both; on a GPU the paper's shapes in bfloat16, without one mid sizes in float32. Shapes are the
cases of the op's record, named once for tests and benches: size "paper" has 8 and 64 clips of 8 and
16 frames.
"""

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
import torch._functorch.config
import torch.nn.functional as F
from torch import Tensor

from bench.conftest import LIMITS, ON_GPU
from timefast import ops
from timefast.kernels.op import OPS, Case

DEVICE = "cuda" if ON_GPU else "cpu"
DTYPE = torch.bfloat16 if ON_GPU else torch.float32
ELSEWHERE = ("farneback", "flow_labels")  # bench_flow measures those
Op = Callable[..., Any]


def _by_position(x: Tensor) -> Tensor:
    clips, frames, patches, heads, width = x.shape
    return x.permute(0, 2, 3, 1, 4).reshape(clips * patches, heads, frames, width)


def _time(attention: Op, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Around an attention of [sequences, H, T, D]: one sequence per clip and position."""
    out = attention(*(_by_position(x) for x in (q, k, v)))
    return out.unflatten(0, (q.shape[0], q.shape[2])).permute(0, 3, 1, 2, 4)


def _space(attention: Op, *tokens: Tensor, frame_weight: None = None) -> tuple[Tensor, Tensor]:
    """Around an attention of [sequences, H, S, D]: one sequence per frame, class token repeated."""
    frames = tokens[0].shape[:2]
    with_class = (
        torch.cat([cls[:, None, None].expand(-1, frames[1], -1, -1, -1), x], 2)
        for x, cls in zip(tokens[:3], tokens[3:], strict=True)
    )
    out = attention(*(x.flatten(0, 1).transpose(1, 2) for x in with_class))
    out = out.transpose(1, 2).unflatten(0, frames)
    return out[:, :, 1:], out[:, :, 0].mean(1)


def _shift(attention: Op, q: Tensor, k: Tensor, v: Tensor, *, shift_div: int) -> Tensor:
    """Around an attention of [sequences, H, S, D]: one sequence per frame, keys and values copied
    with channels of other frames. The published form turns them to tokens last before that."""
    heads = q.shape[3:]
    fold = heads.numel() // shift_div

    def shifted(x: Tensor) -> Tensor:
        x = x.flatten(3)  # [B, T, S, C]
        if attention is _materialised:
            x = x.transpose(2, 3).contiguous().transpose(2, 3)
        out = torch.zeros_like(x)
        out[:, :-1, :, :fold] = x[:, 1:, :, :fold]
        out[:, 1:, :, fold : 2 * fold] = x[:, :-1, :, fold : 2 * fold]
        out[..., 2 * fold :] = x[..., 2 * fold :]
        return out.unflatten(3, heads)

    frames = (x.flatten(0, 1).transpose(1, 2) for x in (q, shifted(k), shifted(v)))
    return attention(*frames).transpose(1, 2).unflatten(0, q.shape[:2])


def _materialised(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return ((q @ k.transpose(-2, -1)) * q.shape[-1] ** -0.5).softmax(-1) @ v


def _xformers(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    from xformers.ops import memory_efficient_attention

    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return memory_efficient_attention(q, k, v).transpose(1, 2)


def _eager(
    x: Tensor, branch: Tensor, weight: Tensor, bias: Tensor, *, branch_scale: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """A sum and PyTorch's norm, which writes float32 under autocast; the linear layer behind it
    rounds that."""
    total = x + branch_scale * branch
    return total, F.layer_norm(total, weight.shape, weight, bias, eps).to(DTYPE)


FORMS = {
    "published": _materialised,
    "sdpa": F.scaled_dot_product_attention,
    "xformers": _xformers,
}
AROUND = {
    "time_attention": _time,
    "space_attention": _space,
    "shift_attention": _shift,
    "pairwise_attention": lambda attention, *tokens: attention(*tokens),
}


torch._functorch.config.donated_buffer = False  # backward runs more than once per forward


@functools.cache
def _compiled_reference(name: str) -> Op:
    return torch.compile(functools.partial(getattr(ops, name), impl="reference"))


def _function(name: str, impl: str) -> Op:
    if impl == "compiled reference":
        return _compiled_reference(name)
    if impl in FORMS:
        return functools.partial(AROUND[name], FORMS[impl])
    if impl == "eager":
        return _eager
    return functools.partial(getattr(ops, name), impl=impl)


def _inputs(name: str, case: Case) -> tuple[list[Tensor], dict[str, Any]]:
    """Of add_layer_norm only the branch is rounded, as it is in training under autocast."""
    args, kwargs = case.build(DTYPE, DEVICE, torch.Generator().manual_seed(0))
    if name == "add_layer_norm":
        args = tuple(x if i == 1 else x.float() for i, x in enumerate(args))
    return [x.detach().requires_grad_() for x in args], kwargs


def _points() -> Iterator[Any]:
    for name, op in OPS.items():
        if name in ELSEWHERE:
            continue
        impls = [*op.impls, "reference", "compiled reference"]
        impls += [form for form in FORMS if name in AROUND and form not in impls]
        impls += ["eager"] if name == "add_layer_norm" else []
        for case in op.cases:
            if case.size == ("paper" if ON_GPU else "mid"):
                for impl in impls:
                    yield pytest.param(name, case, impl, id=f"{name}-{case.name}-{impl}")


def _why_skip(name: str, impl: str) -> str:
    if impl == "triton" and not ON_GPU:
        return "the interpreter's time means nothing"
    known = ops.implementations(name)
    if impl in known:
        return "; ".join(known[impl])
    if impl == "xformers":
        return "; ".join(ops.implementations("space_attention")["xformers"])
    return ""


@contextlib.contextmanager
def skipped_unless_it_fits() -> Iterator[None]:
    """Some rivals ask for more than a GPU has."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        pytest.skip(str(error).partition(" GPU")[0])


@pytest.mark.parametrize("direction", ["fwd", "bwd", "fwd+bwd"])
@pytest.mark.parametrize("name, case, impl", list(_points()))
@skipped_unless_it_fits()
def bench_op(
    measure: Callable[..., None], name: str, case: Case, impl: str, direction: str
) -> None:
    if reason := _why_skip(name, impl):
        pytest.skip(reason)
    inputs, kwargs = _inputs(name, case)
    function = _function(name, impl)
    autocast = ON_GPU and name == "add_layer_norm"

    def forward() -> tuple[Tensor, ...]:
        with torch.autocast(DEVICE, DTYPE, enabled=autocast):
            out = function(*inputs, **kwargs)
        return out if isinstance(out, tuple) else (out,)

    outputs = forward()
    generator = torch.Generator().manual_seed(1)
    upstream = [torch.randn(x.shape, generator=generator).to(DEVICE, x.dtype) for x in outputs]

    def backward(outputs: tuple[Tensor, ...] = outputs) -> tuple[Tensor, ...]:
        return torch.autograd.grad(outputs, inputs, upstream, retain_graph=True)

    error = error_of((*outputs, *backward()), name, inputs, kwargs, upstream)
    runs = {"fwd": forward, "bwd": backward, "fwd+bwd": lambda: backward(forward())}
    passes = {"fwd": 1.0, "bwd": 2.5, "fwd+bwd": 3.5}[direction]  # 2 products forward, 5 backward
    work = _flops(name, inputs)
    # backward reads the inputs again, or of the sum only its total, and writes their gradients
    again = outputs[:1] if name == "add_layer_norm" else inputs
    moved = _bytes(inputs) * ("fwd" in direction)
    moved += (_bytes(again) + _bytes(inputs)) * ("bwd" in direction)
    moved += _bytes(outputs) * len(direction.split("+"))
    measure(
        runs[direction], error=error, limit=LIMITS[DTYPE], op=name, impl=impl, case=case.name,
        shapes=[list(x.shape) for x in inputs], dtype=str(DTYPE).removeprefix("torch."),
        direction=direction, bytes=moved, flops=None if work is None else passes * work,
    )  # fmt: skip


def error_of(
    got: tuple[Tensor, ...], name: str, inputs: list[Tensor], kwargs: Any, upstream: list[Tensor]
) -> float:
    """The largest relative error of outputs and gradients against the float32 reference, which
    takes two clips at a time: of all of them at once it might not fit."""
    wide = [x.detach().float().requires_grad_() for x in inputs]
    clips = len(inputs[0])
    outputs = []
    for start in range(0, clips, 2):
        some = slice(start, start + 2)
        part = [x[some] if len(x) == clips else x for x in wide]
        also = {k: x[some] if isinstance(x, Tensor) else x for k, x in kwargs.items()}
        out = getattr(ops, name)(*part, **also, impl="reference")
        out = out if isinstance(out, tuple) else (out,)
        torch.autograd.backward(out, [g[some].float() for g in upstream])
        outputs.append([x.detach() for x in out])
    true = [*(torch.cat(x) for x in zip(*outputs, strict=True)), *(x.grad for x in wide)]
    # A gradient that is zero but for rounding is measured against the others.
    scale = [t.norm().clamp(min=1e-2 * max(x.norm() for x in true)) for t in true]
    return max(
        ((g.float() - t).norm() / s).item() for g, t, s in zip(got, true, scale, strict=True)
    )


def _flops(name: str, args: Sequence[Tensor]) -> float | None:
    """Of the two products forward, a multiply-add as 2."""
    if name == "add_layer_norm":
        return None
    if name == "pairwise_attention":
        clips, pairs, patches, width = args[0].shape
        return 4.0 * clips * pairs * patches**2 * width
    clips, frames, patches, heads, width = args[0].shape
    if name == "time_attention":
        return 4.0 * clips * patches * heads * frames**2 * width
    if name == "space_attention":
        return 4.0 * clips * frames * heads * (1 + patches) ** 2 * width
    if name == "shift_attention":  # its patches are all tokens
        return 4.0 * clips * frames * heads * patches**2 * width
    return None


def _bytes(tensors: Any) -> int:
    """What has to be read or written once, caches aside."""
    return sum(x.numel() * x.element_size() for x in tensors)
