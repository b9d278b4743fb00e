"""Motionformer: every patch attends within each frame, then over its T answers ("trajectory").

`attention` "joint" attends over all tokens of the clip at once; "divided" over time and within
frames by turns, with the class token among the keys of both.

Letters: B clips, T frames of tokens (input frames / tube), N patches per frame, S = T * N, H heads,
D head width, C model width. As in TimeSformer, class token [B, C] and patches [B, T, N, C] are
separate tensors, and what a pass does not need is not computed.
"""

from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from timefast import ops
from timefast.kernels.trajectory_attention import attend_along
from timefast.models.heads import VideoTransformer
from timefast.models.vit import (
    NORM_EPS,
    AddNorm,
    Attention,
    Block,
    Mlp,
    PatchEmbed,
    Pending,
    PreLogits,
    add_scaled,
    attend_once,
    drop_path_rates,
    grid_of,
    init_published,
    init_scratch,
    keep_scale,
    last_block,
    resize_grid,
    table_size_of,
)
from timefast.profiling import part


class TubeEmbed(nn.Module):
    """Each block of `tube` frames and p x p pixels through one linear map."""

    def __init__(self, tube: int, patch_size: int, dim: int):
        super().__init__()
        size = (tube, patch_size, patch_size)
        # a convolution by name, shape and initialisation, as in the published checkpoints
        self.proj = nn.Conv3d(3, dim, kernel_size=size, stride=size)

    @part("patch embedding")
    def forward(self, video: Tensor) -> Tensor:
        """video [B, 3, T*tube, height, width] -> [B, T, gh, gw, C]."""
        tube, p, _ = self.proj.kernel_size
        if video.ndim != 5 or video.shape[1] != 3 or video.shape[2] % tube:
            raise ValueError(
                f"video: expected [B, 3, frames, height, width] with frames a multiple of "
                f"tube={tube}, got {list(video.shape)}"
            )
        gh, gw = grid_of(video.shape[-2:], p)
        patches = video.unflatten(4, (gw, p)).unflatten(3, (gh, p)).unflatten(2, (-1, tube))
        patches = patches.permute(0, 2, 4, 6, 1, 3, 5, 7).flatten(4)  # [B, T, gh, gw, 3*tube*p*p]
        return F.linear(patches, self.proj.weight.flatten(1), self.proj.bias)


class TrajectoryAttention(Attention):
    """The projections around trajectory attention, and its approximation by landmarks."""

    def __init__(
        self, dim: int, heads: int, values: str, approx: str | None, landmarks: int, impl: str
    ):
        super().__init__(dim, heads)
        self.values, self.approx, self.landmarks, self.impl = values, approx, landmarks, impl
        self.proj_q = nn.Linear(dim, dim)
        self.proj_kv = nn.Linear(dim, 2 * dim)

    @part("trajectory attention")
    def attend(self, cls: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        """cls [B, C], x [B, T, N, C] -> the same shapes."""
        q, k, v = self.split(x)
        cls_q, cls_k, cls_v = self.split(cls)
        second = self.proj_q.weight, self.proj_q.bias, self.proj_kv.weight, self.proj_kv.bias
        if self.approx is None:
            out, cls_out = ops.trajectory_attention(
                q, k, v, cls_q, cls_k, cls_v, *second, values=self.values, impl=self.impl
            )
        else:
            y = orthoformer(q, k, v, self.landmarks, self.first_landmark(q))
            out = attend_along(y, *second, values=self.values, scale=q.shape[-1] ** -0.5)
            cls_out = class_attention((cls_q, cls_k, cls_v), k, v)
        return self.merge(cls_out), self.merge(out)

    @part("trajectory attention")
    def class_only(self, cls: Tensor, x: Tensor) -> Tensor:
        """The first of `attend`'s results, without any trajectory."""
        out = self.merge(class_attention(self.split(cls), *self.keys_and_values(x)))
        # zero gradients, not none: optimizers and DDP make a difference between the two
        unread = (*self.proj_q.parameters(), *self.proj_kv.parameters())
        return out + 0 * torch.stack([p.flatten()[0] for p in unread]).sum()

    def first_landmark(self, q: Tensor) -> Tensor:
        """-> [B, H]: a patch of the clip at random; in evaluation always the same."""
        B, T, N, H, _ = q.shape
        if self.training:
            return torch.randint(T * N, (B, H), device=q.device)
        # the same for all clips, so that no answer depends on what else is in the batch
        first = torch.randint(T * N, (H,), generator=torch.Generator().manual_seed(0))
        return first.to(q.device).expand(B, H)


def class_attention(cls: Sequence[Tensor], k: Tensor, v: Tensor) -> Tensor:
    """Query, key and value of the class token, each [B, H, D], and k, v [B, T, N, H, D] of the
    patches -> [B, H, D]: the class token over all tokens of the clip."""
    cls_q, cls_k, cls_v = cls
    keys = torch.cat([cls_k[:, None], k.flatten(1, 2)], 1)  # [B, 1+S, H, D]
    return attend_once(cls_q, keys, torch.cat([cls_v[:, None], v.flatten(1, 2)], 1))


def orthoformer(q: Tensor, k: Tensor, v: Tensor, landmarks: int, first: Tensor) -> Tensor:
    """The answers of every frame to every patch by way of a few landmark queries.

    q, k, v [B, T, N, H, D], first [B, H] -> [B, T, N, T, H, D]. Landmarks carry no gradient. With
    fewer patches than landmarks (the published code then fails) all patches are landmarks.
    """
    B, T, N, H, D = q.shape
    q, k = q * D**-0.25, k * D**-0.25
    rows = q.permute(0, 3, 1, 2, 4).flatten(2, 3)  # [B, H, S, D]
    with torch.no_grad():
        chosen = choose_landmarks(rows.float(), min(landmarks, T * N), first)
        marks = rows.gather(2, chosen[..., None].expand(-1, -1, -1, D))  # [B, H, L, D]
    to_marks = (rows @ marks.transpose(2, 3)).softmax(-1)  # [B, H, S, L]
    from_marks = torch.einsum("bhld,btnhd->bhltn", marks, k).softmax(-1)
    seen = torch.einsum("bhltn,btnhd->bhltd", from_marks, v).flatten(3)  # [B, H, L, T*D]
    y = (to_marks @ seen).view(B, H, T, N, T, D)
    return y.permute(0, 2, 3, 4, 1, 5)


def choose_landmarks(rows: Tensor, count: int, first: Tensor) -> Tensor:
    """rows [B, H, S, D], first [B, H] -> indices [B, H, count]: each next row is the one whose
    largest absolute cosine similarity to the rows before it is smallest."""
    unit = F.normalize(rows, dim=-1)
    chosen = first[..., None]  # [B, H, 1]
    likeness = rows.new_zeros(rows.shape[:3])  # [B, H, S]
    for _ in range(count - 1):
        last = chosen[..., -1:]
        row = unit.gather(2, last[..., None].expand(-1, -1, -1, unit.shape[-1]))  # [B, H, 1, D]
        likeness = likeness.maximum((unit @ row.transpose(2, 3)).squeeze(-1).abs())
        likeness.scatter_(2, last, torch.inf)
        chosen = torch.cat([chosen, likeness.argmin(-1, keepdim=True)], -1)
    return chosen


class TrajectoryBlock(nn.Module):
    """z += Attn(LN z); z += MLP(LN z), each with stochastic depth per clip."""

    def __init__(self, attn: TrajectoryAttention, dim: int, mlp_ratio: float, drop_path: float):
        super().__init__()
        self.drop_path = drop_path
        self.norm1 = AddNorm(dim, impl=attn.impl)
        self.attn = attn
        self.norm2 = AddNorm(dim, impl=attn.impl)
        self.mlp = Mlp(dim, mlp_ratio)

    def forward(
        self, cls: Tensor, x: Tensor, pending: Pending = (), *, cls_only: bool = False
    ) -> tuple[Tensor, Tensor, Pending]:
        """cls [B, C], x [B, T, N, C] with a pending residual -> the same; nothing happens to x if
        `cls_only`."""
        x, normed = self.norm1(x, *pending)
        both, attn = (self.norm1(cls)[1], normed), self.attn
        residuals = (attn.class_only(*both), None) if cls_only else attn.attend(*both)
        return _end(self, cls, x, *residuals)


class DividedBlock(nn.Module):
    """Over time, then within frames, with the class token among the keys of both; in both steps
    the class token attends over the whole clip."""

    def __init__(self, dim: int, heads: int, mlp_ratio: float, drop_path: float, impl: str):
        super().__init__()
        self.drop_path, self.impl = drop_path, impl
        self.timeattn = Attention(dim, heads)
        self.attn = Attention(dim, heads)
        self.norm1, self.norm2, self.norm3 = (AddNorm(dim, impl=impl) for _ in range(3))
        self.mlp = Mlp(dim, mlp_ratio)

    def forward(
        self, cls: Tensor, x: Tensor, pending: Pending = (), *, cls_only: bool = False
    ) -> tuple[Tensor, Tensor, Pending]:
        """cls [B, C], x [B, T, N, C] with a pending residual -> the same; with `cls_only` nobody
        reads x."""
        x, normed = self.norm3(x, *pending)
        cls_residual, residual = self.attend(self.timeattn, self.norm3(cls)[1], normed, True)
        # no stochastic depth here, as in the published code
        cls, cls_normed = self.norm1(cls, cls_residual)
        x, normed = self.norm1(x, residual)
        cls_residual, residual = self.attend(self.attn, cls_normed, normed, False)
        return _end(self, cls, x, cls_residual, None if cls_only else residual)

    @part("time and space attention")
    def attend(
        self, attn: Attention, cls: Tensor, x: Tensor, over_time: bool
    ) -> tuple[Tensor, Tensor]:
        qkv, cls_qkv = attn.split(x), attn.split(cls)
        cls_out = attn.merge(class_attention(cls_qkv, *qkv[1:]))
        if over_time:  # the patches at one position in the place of those of one frame
            qkv = tuple(y.transpose(1, 2) for y in qkv)
        out, _ = ops.space_attention(*qkv, *cls_qkv, impl=self.impl)
        return cls_out, attn.merge(out.transpose(1, 2) if over_time else out)


def _end(
    block: TrajectoryBlock | DividedBlock,
    cls: Tensor,
    x: Tensor,
    cls_residual: Tensor,
    residual: Tensor | None,
) -> tuple[Tensor, Tensor, Pending]:
    """The residuals of attention, and the MLP; stochastic depth with one draw per clip, for class
    token and patches, for each of the two. Patches without a residual are left as they are."""
    clip, clip_again = (keep_scale(block, (cls.shape[0], 1), cls) for _ in range(2))
    cls, normed = block.norm2(cls, cls_residual, clip)
    cls = add_scaled(cls, block.mlp(normed), clip_again)
    if residual is None:
        return cls, x, ()
    x, normed = block.norm2(x, residual, None if clip is None else clip[..., None, None])
    return cls, x, (block.mlp(normed), None if clip_again is None else clip_again[..., None, None])


class Motionformer(VideoTransformer):
    """Keywords as in `create_model`; alone here: `attention` ("trajectory", "joint", "divided"),
    `values` (what the second step of trajectory attention averages, see
    `ops.trajectory_attention`), `approx` (None or "orthoformer", trajectory attention by way of
    `landmarks` queries), `position` ("separate" tables for space and time, or one "joint" table),
    `tube` (frames per token; `frames` counts input frames), `pre_logits` (activation of the layer
    behind the final norm, None: no such layer) and `table_size` (image size the position table is
    made for, published: 224).

    Other image sizes are met by bicubic resizing of the separate position table. There is no
    published rule for other numbers of frames, nor for other sizes with a joint table: both are
    refused.
    """

    backbone = "motionformer"

    def __init__(
        self,
        *,
        num_classes: int = 174,
        frames: int = 8,
        image_size: int | Sequence[int] = 224,
        patch_size: int = 16,
        dim: int = 768,
        depth: int = 12,
        heads: int = 12,
        mlp_ratio: float = 4.0,
        drop_path: float = 0.2,
        attention: Literal["trajectory", "joint", "divided"] = "trajectory",
        values: Literal["trajectory", "projected"] = "trajectory",
        approx: Literal["orthoformer"] | None = None,
        landmarks: int = 128,
        position: Literal["separate", "joint"] = "separate",
        tube: int = 1,
        pre_logits: Literal["tanh", "gelu", "relu"] | None = "tanh",
        table_size: int | Sequence[int] | None = None,
        time_embed_every_block: bool = False,
        time_heads: bool = True,
        init: Literal["published", "scratch"] = "published",
        impl: str = "auto",
    ):
        super().__init__(num_classes, frames, impl)
        _one_of("attention", attention, ("trajectory", "joint", "divided"))
        _one_of("values", values, ("trajectory", "projected"))
        _one_of("approx", approx, (None, "orthoformer"))
        _one_of("position", position, ("separate", "joint"))
        if approx is not None and attention != "trajectory":
            raise ValueError(f"approx: {approx} approximates trajectory attention, not {attention}")
        if landmarks < 1:
            raise ValueError(f"landmarks: expected at least 1, got {landmarks}")
        if tube < 1 or frames % tube:
            raise ValueError(f"frames: expected a multiple of tube={tube}, got {frames}")
        self.attention, self.position = attention, position
        self.time_embed_every_block = time_embed_every_block
        if table_size is None:
            joint = position == "joint"  # a joint table is not resized
            table_size = image_size if joint else table_size_of(image_size, patch_size)
        self.grid = grid_of(table_size, patch_size)
        rows, length = self.grid[0] * self.grid[1], frames // tube
        if tube == 1:
            self.patch_embed = PatchEmbed(patch_size, dim)
        else:
            self.patch_embed_3d = TubeEmbed(tube, patch_size, dim)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + rows, dim))
        if position == "joint":
            self.pos_embed.requires_grad_(False)  # in the published files, but never read
            self.st_embed = nn.Parameter(torch.zeros(1, 1 + rows * length, dim))
        else:
            self.temp_embed = nn.Parameter(torch.zeros(1, length, dim))

        def block(rate: float) -> nn.Module:
            if attention == "joint":
                return Block(dim, heads, mlp_ratio, rate, impl=impl)
            if attention == "divided":
                return DividedBlock(dim, heads, mlp_ratio, rate, impl)
            attn = TrajectoryAttention(dim, heads, values, approx, landmarks, impl)
            return TrajectoryBlock(attn, dim, mlp_ratio, rate)

        self.blocks = nn.ModuleList(block(rate) for rate in drop_path_rates(drop_path, depth))
        self.norm = nn.LayerNorm(dim, eps=NORM_EPS)
        self.pre_logits = nn.Identity() if pre_logits is None else PreLogits(dim, pre_logits)
        self.head = nn.Linear(dim, num_classes)
        if time_heads:
            self.add_time_heads(dim, length)
        self.length = length  # frames of tokens
        self.reset_parameters(init)

    @torch.no_grad()
    def reset_parameters(self, init: str) -> None:
        tables = [self.pos_embed, self.st_embed if self.position == "joint" else self.temp_embed]
        nn.init.trunc_normal_(self.cls_token, std=0.02)
        if init == "scratch":
            init_scratch(self)
            for table in tables:
                nn.init.normal_(table, std=0.3)
        elif init == "published":
            init_published(self)
            for table in tables:
                nn.init.trunc_normal_(table, std=0.02)
            if self.position == "separate":
                nn.init.zeros_(self.temp_embed)
        else:
            raise ValueError(f"init: expected published or scratch, got {init!r}")

    def embed(self, video: Tensor) -> Tensor:
        embed = self.patch_embed_3d if hasattr(self, "patch_embed_3d") else self.patch_embed
        x = embed(video)
        if x.shape[1] != self.length:
            raise ValueError(
                f"video: expected {self.frames} frames, got {video.shape[2]}; Motionformer has no "
                "rule for other numbers than those it was made for"
            )
        return x

    def run(self, x: Tensor, whole: int | None = None) -> tuple[Tensor, Tensor]:
        cls, x, cls_time, time = self._place(x)
        T, N = x.shape[1:3]
        if self.attention == "joint":
            z = torch.cat([cls[:, None], x.flatten(1, 2)], 1)  # [B, 1+T*N, C]
            again = torch.cat([cls_time[None], time.expand(T, N, -1).flatten(0, 1)])
            for i, block in enumerate(self.blocks):
                z = block(z + again if self.time_embed_every_block and i > 0 else z)
            cls, x = z[:, 0], z[:whole, 1:].unflatten(1, (T, N))
        else:
            pending: Pending = ()
            for block in self.blocks[:-1]:
                cls, x, pending = block(cls, x, pending)
                if self.time_embed_every_block:
                    cls, x = cls + cls_time, x + time
            cls, x = last_block(self.blocks[-1], cls, x, pending, whole)
        return self.pre_logits(self.norm(cls)), self.pre_logits(self.norm(x))

    @part("heads")
    def classify(self, cls: Tensor) -> Tensor:
        return self.head(cls)

    def _place(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """-> class token [B, C] and patches [B, T, N, C] with their embeddings, and what of these
        tells the time: [C] for the class token, [T, 1 or N, C] for the patches."""
        B, T, gh, gw, _ = x.shape
        x, cls = x.flatten(2, 3), self.cls_token[0, 0]
        if self.position == "joint":
            if (gh, gw) != self.grid:
                raise ValueError(
                    f"video: a joint position table is not resized; expected {self.grid[0]}x"
                    f"{self.grid[1]} patches, got {gh}x{gw}"
                )
            cls_time, time = self.st_embed[0, 0], self.st_embed[0, 1:].unflatten(0, (T, gh * gw))
            return (cls + cls_time).expand(B, -1), x + time, cls_time, time
        pos = resize_grid(self.pos_embed[0, 1:], self.grid, (gh, gw), "bicubic")
        time = self.temp_embed[0, :, None]  # [T, 1, C]
        cls_time = torch.zeros_like(cls)  # the class token has no place in time
        return (cls + self.pos_embed[0, 0]).expand(B, -1), x + pos + time, cls_time, time


def _one_of(name: str, value: object, allowed: Sequence[object]) -> None:
    if value not in allowed:
        raise ValueError(f"{name}: expected one of {', '.join(map(str, allowed))}, got {value!r}")
