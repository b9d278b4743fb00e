"""Fused attention for models of other projects: `timefast.patch(model)`.

Modules are recognised by the names of their parts and never by their class, so neither Hugging Face
nor an original repository is imported. What is replaced is the `forward` of the recognised modules;
weights, names and hooks stay. Every replacement is compared with the original on a small random
input before it is put in place.

Letters: B clips, T frames, N patches per frame, S tokens per frame, H heads, C model width.
"""

import functools
import inspect
import logging
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from timefast import ops

logger = logging.getLogger("timefast")


def patch(model: nn.Module, *, impl: str = "auto") -> nn.Module:
    """Let a model of another project attend through `timefast.ops`, in place; returns the model.

    Recognised are the divided space-time layers of TimeSformer (`TimesformerModel` of Hugging Face
    and what contains it, the original repository, TIME), the trajectory attention of Motionformer
    and the shifted attention of X-ViT. Outputs and gradients are equal within rounding, in training
    too: stochastic depth draws the same numbers in the same order. What was replaced, and what was
    left as it is, is logged.

    Attention probabilities are never formed: a request for them (`output_attentions=True`, an
    approximation of Motionformer) raises NotImplementedError; Motionformer's second return value is
    None.

    Raises ValueError if nothing is recognised, or if a recognised module has something that the ops
    do not compute (dropout inside attention) or does not agree on the random input; the model is
    then unchanged.
    """
    found: dict[str, tuple[nn.Module, _Kind, Callable[..., Any]]] = {}
    known: list[str] = []  # prefixes of everything inside a recognised module
    problems: list[str] = []
    others: list[str] = []
    for name, module in model.named_modules():
        if any(name.startswith(prefix) for prefix in known):
            continue
        kind = next((k for k in _KINDS if k.has_parts(module)), None)
        if kind is None:
            if hasattr(module, "qkv"):
                others.append(f"{name} ({type(module).__name__})")
            continue
        known.append(f"{name}." if name else "")
        if isinstance(module.forward, functools.partial):
            continue  # patched before
        replacement, wrong = _replacement(kind, module, impl)
        problems += [f"  {name} ({kind.name}): {text}" for text in wrong]
        if replacement is not None:
            found[name] = module, kind, replacement
    if problems:
        raise ValueError("timefast.patch cannot replace:\n" + "\n".join(problems))
    if not known:
        seen = f"; attention of unknown form: {', '.join(others)}" if others else ""
        forms = "; ".join(kind.name for kind in _KINDS)
        raise ValueError(
            f"timefast.patch recognises no attention in this {type(model).__name__}{seen}. "
            f"It knows {forms}"
        )
    for module, _, replacement in found.values():
        module.forward = replacement  # type: ignore[method-assign]
    for kind in _KINDS:
        names = [name for name, (_, k, _) in found.items() if k is kind]
        if names:
            logger.info("timefast.patch: %s in %s", kind.name, ", ".join(names))
    if others:
        logger.info("timefast.patch: left as they are: %s", ", ".join(others))
    return model


@dataclass(frozen=True)
class _Kind:
    """One form of attention of another project."""

    name: str
    has_parts: Callable[[Any], bool]
    dropouts: Callable[[Any], list[nn.Module]]  # those the ops leave out
    arguments: tuple[str, ...]  # of the forward that is replaced
    forwards: tuple[Callable[..., Any], ...]  # (module, ..., impl=); the first that agrees
    sample: Callable[[Any], tuple[tuple[int, ...], dict[str, Any]]]  # shape, other arguments


def _replacement(
    kind: _Kind, module: nn.Module, impl: str
) -> tuple[Callable[..., Any] | None, list[str]]:
    """The new forward of a module, or the reasons why there is none."""
    names = tuple(inspect.signature(module.forward).parameters)
    if names != kind.arguments:
        return None, [f"forward takes ({', '.join(names)}), not ({', '.join(kind.arguments)})"]
    rates = [d.p for d in kind.dropouts(module) if isinstance(d, nn.Dropout) and d.p > 0]
    if rates:
        return None, [f"dropout {rates[0]} in attention, which the ops do not have; set its p to 0"]
    weight = next(module.parameters())
    shape, keywords = kind.sample(module)
    numbers = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    x = numbers.to(weight.device, weight.dtype)
    modes = {part: part.training for part in module.modules()}
    module.eval()
    tolerance = 1e-4 if weight.dtype in (torch.float32, torch.float64) else 5e-2
    try:
        with torch.no_grad():
            expected = _first(module.forward(x, **keywords))
            errors = []
            for forward in kind.forwards:
                new = functools.partial(forward, module, impl=impl)
                difference = (_first(new(x, **keywords)) - expected).abs().max()
                errors.append(float(difference / expected.abs().max()))
                if errors[-1] <= tolerance:
                    return new, []
    finally:
        for part, training in modes.items():
            part.training = training
    return None, [f"the outputs differ by {min(errors):.1e} of their size on a random input"]


def _first(output: Any) -> Tensor:
    return output[0] if isinstance(output, tuple) else output


def _has(module: nn.Module, *names: str) -> bool:
    return all(isinstance(getattr(module, name, None), nn.Module) for name in names)


# ---- TimeSformer


@dataclass(frozen=True)
class _DividedParts:
    """A divided space-time layer, whatever its parts are called."""

    time_norm: nn.Module
    time_qkv: nn.Module
    time_proj: nn.Module
    time_fc: nn.Module
    norm: nn.Module
    qkv: nn.Module
    proj: nn.Linear
    drop_path: nn.Module
    mlp: Callable[[Tensor], Tensor]  # with its norm
    heads: int
    scale: float


def _divided(parts: _DividedParts, z: Tensor, frames: int, time_major: bool, impl: str) -> Tensor:
    """z [B, 1 + T*N, C], patches ordered frame by frame (`time_major`) or patch by patch."""
    B, C = z.shape[0], z.shape[2]
    T, N = frames, (z.shape[1] - 1) // frames

    def grid(rows: Tensor) -> Tensor:  # [B, T*N, ...] -> [B, T, N, ...], a view
        return (
            rows.unflatten(1, (T, N)) if time_major else rows.unflatten(1, (N, T)).transpose(1, 2)
        )

    def rows(grid: Tensor) -> Tensor:
        return (grid if time_major else grid.transpose(1, 2)).flatten(1, 2)

    def heads(projected: Tensor) -> Tensor:  # [..., 3*C] -> [..., 3, H, D]
        return projected.unflatten(-1, (3, parts.heads, C // parts.heads))

    def keep(*shape: int) -> Tensor | None:
        """What the module's own stochastic depth multiplies each of its rows with."""
        if isinstance(parts.drop_path, nn.Identity) or not parts.drop_path.training:
            return None
        return parts.drop_path(z.new_ones(math.prod(shape), 1, 1)).view(shape)

    cls, x = z[:, :1], z[:, 1:]
    q, k, v = grid(heads(parts.time_qkv(parts.time_norm(x)))).unbind(3)  # [B, T, N, H, D]
    out = ops.time_attention(q, k, v, scale=parts.scale, impl=impl)
    out = parts.time_proj(rows(out.flatten(3)))  # [B, T*N, C]
    position = keep(B, N)
    if position is not None:
        out = out * rows(position[:, None, :, None].expand(B, T, N, 1))
    z = torch.cat([cls, x + parts.time_fc(out)], 1)

    qkv = heads(parts.qkv(parts.norm(z)))
    q, k, v = grid(qkv[:, 1:]).unbind(3)
    cls_qkv = qkv[:, 0].unbind(1)
    frame = keep(B, T)
    out, cls_out = ops.space_attention(
        q, k, v, *cls_qkv,
        frame_weight=None if frame is None else frame / T, scale=parts.scale, impl=impl,
    )  # fmt: skip
    out = parts.proj(torch.cat([cls_out.flatten(1)[:, None], rows(out.flatten(3))], 1))
    if frame is not None:
        # the mean over frames of w (W o + b) is W (mean w o) + b mean w
        bias = parts.proj.bias if parts.proj.bias is not None else z.new_zeros(())
        cls_out = out[:, :1] + (frame.mean(1)[:, None, None] - 1) * bias
        patches = out[:, 1:] * rows(frame[:, :, None, None].expand(B, T, N, 1))
        out = torch.cat([cls_out, patches], 1)
    z = z + out
    return z + parts.drop_path(parts.mlp(z))


def _original_forward(
    block: Any, x: Tensor, B: int, T: int, W: int, *, time_major: bool, impl: str
) -> Tensor:
    parts = _DividedParts(
        block.temporal_norm1, block.temporal_attn.qkv, block.temporal_attn.proj, block.temporal_fc,
        block.norm1, block.attn.qkv, block.attn.proj, block.drop_path,
        lambda z: block.mlp(block.norm2(z)), block.attn.num_heads, block.attn.scale,
    )  # fmt: skip
    return _divided(parts, x, T, time_major, impl)


def _huggingface_forward(
    layer: Any, hidden_states: Tensor, output_attentions: bool = False, *, impl: str
) -> tuple[Tensor]:
    if output_attentions:
        raise NotImplementedError(
            "output_attentions=True: the fused attention of timefast.patch never forms attention "
            "probabilities; load the model again without patching it to look at them"
        )
    time, space = layer.temporal_attention, layer.attention
    parts = _DividedParts(
        layer.temporal_layernorm, time.attention.qkv, time.output.dense, layer.temporal_dense,
        layer.layernorm_before, space.attention.qkv, space.output.dense, layer.drop_path,
        lambda z: layer.output(layer.intermediate(layer.layernorm_after(z))),
        space.attention.num_heads, space.attention.scale,
    )  # fmt: skip
    return (_divided(parts, hidden_states, layer.config.num_frames, False, impl),)


def _is_original(module: Any) -> bool:
    return (
        _has(module, "temporal_norm1", "temporal_attn", "temporal_fc", "norm1", "attn", "norm2",
             "mlp", "drop_path")
        and _has(module.temporal_attn, "qkv", "proj")
        and _has(module.attn, "qkv", "proj")
        and hasattr(module.attn, "num_heads")
    )  # fmt: skip


def _is_huggingface(module: Any) -> bool:
    return (
        _has(module, "temporal_layernorm", "temporal_attention", "temporal_dense", "attention",
             "layernorm_before", "layernorm_after", "intermediate", "output", "drop_path")
        and _has(module.attention, "attention", "output")
        and hasattr(getattr(module, "config", None), "num_frames")
    )  # fmt: skip


def _huggingface_sample(layer: Any) -> tuple[tuple[int, ...], dict[str, Any]]:
    width = layer.config.image_size // layer.config.patch_size
    tokens = 1 + layer.config.num_frames * 2 * width
    return (2, tokens, layer.temporal_dense.in_features), {}


# ---- Motionformer and X-ViT


def _trajectory_forward(
    attn: Any,
    x: Tensor,
    seq_len: int = 196,
    num_frames: int = 8,
    approx: str = "none",
    num_landmarks: int = 128,
    *,
    impl: str,
) -> tuple[Tensor, None]:
    if approx != "none":
        raise NotImplementedError(
            f"approx={approx!r}: timefast.patch replaces exact trajectory attention only"
        )
    qkv = attn.qkv(x).unflatten(-1, (3, attn.num_heads, -1))  # [B, 1+T*N, 3, H, D]
    q, k, v = qkv[:, 1:].unflatten(1, (num_frames, seq_len)).unbind(3)
    cls_q, cls_k, cls_v = qkv[:, 0].unbind(1)
    out, cls_out = ops.trajectory_attention(
        q, k, v, cls_q, cls_k, cls_v,
        attn.proj_q.weight, attn.proj_q.bias, attn.proj_kv.weight, attn.proj_kv.bias,
        values="trajectory" if attn.use_original_code else "projected",
        scale=attn.scale, impl=impl,
    )  # fmt: skip
    rows = torch.cat([cls_out.flatten(1)[:, None], out.flatten(3).flatten(1, 2)], 1)
    return attn.proj_drop(attn.proj(rows)), None


def _is_trajectory(module: Any) -> bool:
    return _has(module, "qkv", "proj_q", "proj_kv", "proj", "proj_drop") and hasattr(
        module, "use_original_code"
    )


def _shift_forward(attn: Any, x: Tensor, *, impl: str) -> Tensor:
    shift = attn.control_point_query
    qkv = attn.qkv(x).unflatten(-1, (3, attn.num_heads, -1))  # [B*T, S, 3, H, D]
    q, k, v = qkv.unflatten(0, (-1, shift.n_segment)).unbind(3)
    out = ops.shift_attention(q, k, v, shift_div=shift.fold_div, scale=attn.scale, impl=impl)
    return attn.proj_drop(attn.proj(out.flatten(0, 1).flatten(2)))


def _is_shift(module: Any) -> bool:
    shifts = [getattr(module, f"control_point_{name}", None) for name in ("query", "value")]
    return _has(module, "qkv", "proj", "proj_drop") and all(
        hasattr(shift, "n_segment") and hasattr(shift, "fold_div") for shift in shifts
    )


_KINDS = (
    _Kind(
        "divided space-time attention of TimeSformer (Hugging Face)",
        _is_huggingface,
        lambda m: [
            drop
            for attn in (m.temporal_attention, m.attention)
            for drop in (attn.attention.attn_drop, attn.output.dropout)
        ],
        ("hidden_states", "output_attentions"),
        (_huggingface_forward,),
        _huggingface_sample,
    ),
    _Kind(
        "divided space-time attention of TimeSformer",
        _is_original,
        lambda m: [
            drop for attn in (m.temporal_attn, m.attn) for drop in (attn.attn_drop, attn.proj_drop)
        ],
        ("x", "B", "T", "W"),
        tuple(functools.partial(_original_forward, time_major=major) for major in (False, True)),
        lambda m: ((2, 1 + 3 * 4, m.temporal_fc.in_features), {"B": 2, "T": 3, "W": 2}),
    ),
    _Kind(
        "trajectory attention of Motionformer",
        _is_trajectory,
        lambda m: [m.attn_drop],
        ("x", "seq_len", "num_frames", "approx", "num_landmarks"),
        (_trajectory_forward,),
        lambda m: ((2, 1 + 3 * 4, m.proj.in_features), {"seq_len": 4, "num_frames": 3}),
    ),
    _Kind(
        "shifted attention of X-ViT",
        _is_shift,
        lambda m: [m.attn_drop],
        ("x",),
        (_shift_forward,),
        lambda m: ((2 * m.control_point_query.n_segment, 5, m.proj.in_features), {}),
    ),
)
