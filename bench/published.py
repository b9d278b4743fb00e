"""The published form of a training step: what the fast one is measured against, and held to.

The same mathematics on the same parameters, computed as the research code of the three backbones
and of TIME does: one token tensor with the class token in front, rearranged copies around every
attention, attention weights in memory, a convolution per frame, a whole pass over the shuffled
frames, an optimizer that visits one tensor after the other. `sdpa` in the place of `materialised`
leaves the attention weights to the library and keeps the rest.

Letters: B clips, T frames, N patches per frame, S = 1 + T*N, H heads, D head width, C model width.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from timefast.data.batch import Batch
from timefast.losses import debias_loss, flow_loss, order_loss
from timefast.models import VideoTransformer
from timefast.models.motionformer import Motionformer, TrajectoryAttention
from timefast.models.timesformer import DividedBlock, TimeSformer
from timefast.models.vit import AddNorm, Attention, Mlp
from timefast.models.xvit import ShiftBlock, XViT

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]  # q, k, v [..., S, D] -> [..., S, D]


def materialised(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5).softmax(-1) @ v


sdpa: Attend = F.scaled_dot_product_attention


def losses(
    model: VideoTransformer,
    batch: Batch,
    permutation: Tensor,
    *,
    time: bool = True,
    label_smoothing: float = 0.2,
    attend: Attend = materialised,
) -> dict[str, Tensor]:
    """As `timefast.losses.time_losses` with weights 1 (0 without `time`), without dropout."""
    cls, tokens = _features(model, batch.video, attend)
    ce = F.cross_entropy(model.classify(cls).float(), batch.label, label_smoothing=label_smoothing)
    if not time:
        return {"total": ce, "ce": ce}
    shuffled, _ = _features(model, batch.video[:, :, permutation], attend)
    assert batch.flow_label is not None
    order = model.temp_head(tokens.mean(2))
    q, k, v = model.mlp_q(tokens[:, 1:]), model.mlp_k(tokens[:, :-1]), model.mlp_v(tokens[:, :-1])
    flow = model.flow_head(model.mlp_norm(model.mlp_proj(attend(q, k, v))))
    parts = {
        "ce": ce,
        "order": order_loss(order, label_smoothing=label_smoothing),
        "debias": debias_loss(model.classify(shuffled)),
        "flow": flow_loss(flow, batch.flow_label, label_smoothing=label_smoothing),
    }
    return {"total": sum(parts.values(), ce.new_zeros(())), **parts}


def optimizer(model: nn.Module, like: torch.optim.AdamW) -> torch.optim.AdamW:
    """`like` for the same parameters, tensor after tensor."""
    groups = [{k: g[k] for k in ("params", "weight_decay")} for g in like.param_groups]
    first = like.param_groups[0]
    return torch.optim.AdamW(
        groups, lr=first["lr"], betas=first["betas"], eps=first["eps"], amsgrad=first["amsgrad"],
        foreach=False, fused=False,
    )  # fmt: skip


def _mlp(mlp: Mlp, x: Tensor) -> Tensor:
    return mlp.fc2(F.gelu(mlp.fc1(x)))


def _norm(norm: AddNorm, x: Tensor) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], norm.weight, norm.bias, norm.eps)


def _features(model: VideoTransformer, video: Tensor, attend: Attend) -> tuple[Tensor, Tensor]:
    """Features.cls and Features.tokens."""
    if isinstance(model, TimeSformer):
        return _timesformer(model, video, attend)
    if isinstance(model, Motionformer):
        return _motionformer(model, video, attend)
    assert isinstance(model, XViT)
    return _xvit(model, video, attend)


def _patches(embed: nn.Module, video: Tensor) -> Tensor:
    """[B, 3, T, height, width] -> [B*T, N, C]"""
    frames = video.transpose(1, 2).flatten(0, 1)
    return embed.proj(frames).flatten(2).transpose(1, 2)


def _attention(attn: Attention, x: Tensor, attend: Attend) -> Tensor:
    """[A, S, C] -> [A, S, C]"""
    qkv = attn.qkv(x).unflatten(-1, (3, attn.heads, -1)).permute(2, 0, 3, 1, 4)
    return attn.proj(attend(*qkv).transpose(1, 2).reshape(x.shape))


def _timesformer(model: TimeSformer, video: Tensor, attend: Attend) -> tuple[Tensor, Tensor]:
    B, T = video.shape[0], video.shape[2]
    x = _patches(model.patch_embed, video)  # [B*T, N, C]
    N = x.shape[1]
    x = torch.cat([model.cls_token.expand(B * T, -1, -1), x], 1) + model.pos_embed
    cls = x.unflatten(0, (B, T))[:, 0, :1]  # [B, 1, C]
    x = x[:, 1:].reshape(B, T, N, -1).transpose(1, 2).reshape(B * N, T, -1) + model.time_embed
    x = x.reshape(B, N, T, -1).transpose(1, 2).reshape(B, T * N, -1)
    x = torch.cat([cls, x], 1)  # [B, S, C]
    for block in model.blocks:
        x = _divided_block(block, x, T, attend)
    x = model.norm(x)
    return x[:, 0], x[:, 1:].unflatten(1, (T, N))


def _divided_block(block: DividedBlock, x: Tensor, T: int, attend: Attend) -> Tensor:
    B, C = x.shape[0], x.shape[2]
    cls, patches = x[:, :1], x[:, 1:]
    N = patches.shape[1] // T
    by_place = patches.reshape(B, T, N, C).transpose(1, 2).reshape(B * N, T, C)
    out = _attention(block.temporal_attn, _norm(block.temporal_norm1, by_place), attend)
    out = out.reshape(B, N, T, C).transpose(1, 2).reshape(B, T * N, C)
    patches = patches + block.temporal_fc(out)

    by_frame = patches.reshape(B * T, N, C)
    copies = cls.repeat(1, T, 1).reshape(B * T, 1, C)
    frames = torch.cat([copies, by_frame], 1)  # [B*T, 1+N, C]
    out = _attention(block.attn, _norm(block.norm1, frames), attend)
    of_class = out[:, 0].reshape(B, T, C).mean(1, keepdim=True)
    x = torch.cat([cls, patches], 1) + torch.cat([of_class, out[:, 1:].reshape(B, T * N, C)], 1)
    return x + _mlp(block.mlp, _norm(block.norm2, x))


def _motionformer(model: Motionformer, video: Tensor, attend: Attend) -> tuple[Tensor, Tensor]:
    B, T = video.shape[0], video.shape[2]
    x = _patches(model.patch_embed, video).reshape(B, -1, model.cls_token.shape[-1])
    N = x.shape[1] // T
    x = torch.cat([model.cls_token.expand(B, -1, -1), x], 1)
    pos = _bicubic(model, N)
    places = torch.cat([pos[:, :1], pos[:, 1:].repeat(1, T, 1)], 1)
    times = model.temp_embed.repeat_interleave(N, 1)
    x = x + places + torch.cat([torch.zeros_like(places[:, :1]), times], 1)
    for block in model.blocks:
        x = x + _trajectory(block.attn, _norm(block.norm1, x), T, attend)
        x = x + _mlp(block.mlp, _norm(block.norm2, x))
    x = model.pre_logits(model.norm(x))
    return x[:, 0], x[:, 1:].unflatten(1, (T, N))


def _trajectory(attn: TrajectoryAttention, x: Tensor, T: int, attend: Attend) -> Tensor:
    B, H, C = x.shape[0], attn.heads, x.shape[2]
    q, k, v = attn.qkv(x).unflatten(-1, (3, H, -1)).permute(2, 0, 3, 1, 4)  # [B, H, S, D]
    of_class = attend(q[:, :, :1], k, v)
    q, k, v = (y[:, :, 1:] for y in (q, k, v))
    N = q.shape[2] // T
    frames = (y.unflatten(2, (T, N)) for y in (k, v))  # [B, H, T, N, D]
    k, v = (y.transpose(1, 2).reshape(B * T, H, N, -1) for y in frames)
    q = q[:, None].expand(-1, T, -1, -1, -1).reshape(B * T, H, T * N, -1)
    y = attend(q, k, v).unflatten(0, (B, T))  # [B, T, H, T*N, D]
    y = y.permute(0, 3, 1, 2, 4).reshape(B, T * N, T, C)  # every patch's answer from every frame
    own = y.reshape(B, T, N, T, C).diagonal(dim1=1, dim2=3)  # [B, N, C, T]
    own = own.permute(0, 3, 1, 2).reshape(B, T * N, C)
    q2 = attn.proj_q(own).unflatten(-1, (H, -1)) * q.shape[-1] ** -0.5  # [B, T*N, H, D]
    k2, _ = attn.proj_kv(y).chunk(2, -1)  # the second half is computed and not used
    along = torch.einsum("bshd,bsthd->bsht", q2, k2.unflatten(-1, (H, -1))).softmax(-1)
    out = torch.einsum("bsht,bsthd->bshd", along, y.unflatten(-1, (H, -1))).flatten(2)
    return attn.proj(torch.cat([of_class.transpose(1, 2).flatten(2), out], 1))


def _xvit(model: XViT, video: Tensor, attend: Attend) -> tuple[Tensor, Tensor]:
    base = model.base_model
    B, T = video.shape[0], video.shape[2]
    x = _patches(base.patch_embed, video)  # [B*T, N, C]
    N = x.shape[1]
    x = torch.cat([base.cls_token.expand(B * T, -1, -1), x], 1) + _bicubic(base, N)
    x = (x.reshape(B, T, 1 + N, -1) + base.temp_embed).reshape(B * T, 1 + N, -1)
    for block in base.blocks:
        x = x + _shifted(block, _norm(block.norm1, x), T, attend)
        x = x + _mlp(block.mlp, _norm(block.norm2, x))
    x = base.norm(x).unflatten(0, (B, T))
    return x[:, :, 0], x[:, :, 1:]


def _shifted(block: ShiftBlock, x: Tensor, T: int, attend: Attend) -> Tensor:
    H, C = block.attn.heads, x.shape[-1]
    assert block.shift_div is not None
    fold = C // block.shift_div
    q, k, v = block.attn.qkv(x).chunk(3, -1)  # [B*T, 1+N, C]
    mixed = []
    for y in (k, v):
        y = y.unflatten(0, (-1, T))
        out = torch.zeros_like(y)
        out[:, :-1, :, :fold] = y[:, 1:, :, :fold]
        out[:, 1:, :, fold : 2 * fold] = y[:, :-1, :, fold : 2 * fold]
        out[..., 2 * fold :] = y[..., 2 * fold :]
        mixed.append(out.flatten(0, 1))
    q, k, v = (y.unflatten(-1, (H, -1)).transpose(1, 2).contiguous() for y in (q, *mixed))
    return block.attn.proj(attend(q, k, v).transpose(1, 2).reshape(x.shape))


def _bicubic(holder: nn.Module, patches: int) -> Tensor:
    """A position table [1, 1+N, C] for square frames of this many patches."""
    table, side = holder.pos_embed, round(patches**0.5)
    if holder.grid == (side, side):
        return table
    image = table[:, 1:].reshape(1, *holder.grid, -1).permute(0, 3, 1, 2)
    image = F.interpolate(image, size=(side, side), mode="bicubic", align_corners=False)
    return torch.cat([table[:, :1], image.flatten(2).transpose(1, 2)], 1)
