"""TimeSformer: attention along time and within frames by turns, one class token per clip.

`attention` "divided" is the published default; "joint" attends over all tokens of the clip at
once, "space" within frames only and averages the frames at the end.

Letters: B clips, T frames, N patches per frame, C model width. The class token [B, C] and the
patches [B, T, N, C] are separate tensors from the first block to the last: every linear layer and
norm works per token, so nothing has to be joined, and what one pass does not need (the patches
after the last block, when only class logits are asked for) is simply not computed.
"""

from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from timefast import ops
from timefast.models.heads import VideoTransformer
from timefast.models.vit import (
    NORM_EPS,
    AddNorm,
    Attention,
    Block,
    Mlp,
    PatchEmbed,
    Pending,
    add_scaled,
    attend_once,
    drop_path_rates,
    grid_of,
    init_published,
    init_scratch,
    keep_scale,
    last_block,
    merged,
    resize_frames,
    resize_grid,
)
from timefast.profiling import part


class DividedBlock(nn.Module):
    """One divided space-time block."""

    def __init__(self, dim: int, heads: int, mlp_ratio: float, drop_path: float, impl: str):
        super().__init__()
        self.drop_path, self.impl = drop_path, impl
        self.temporal_norm1 = AddNorm(dim, impl=impl)
        self.temporal_attn = Attention(dim, heads)
        self.temporal_fc = nn.Linear(dim, dim)
        self.norm1 = AddNorm(dim, impl=impl)
        self.attn = Attention(dim, heads)
        self.norm2 = AddNorm(dim, impl=impl)
        self.mlp = Mlp(dim, mlp_ratio)

    def forward(
        self, cls: Tensor, x: Tensor, pending: Pending = (), *, cls_only: bool = False
    ) -> tuple[Tensor, Tensor, Pending]:
        """cls [B, C], x [B, T, N, C] with a pending residual -> the same.

        With `cls_only` the patches are left as they are after the temporal step: nobody reads
        them any more.
        """
        x, normed = self.temporal_norm1(x, *pending)
        x, normed = self.norm1(x, *self.time_step(normed))
        _, cls_normed = self.norm1(cls)
        cls_residual, residual, frame = self.space_step(cls_normed, normed, cls_only)
        cls, cls_normed = self.norm2(cls, cls_residual)
        clip = keep_scale(self, (cls.shape[0], 1), cls)  # one draw per clip, for class and patches
        cls = add_scaled(cls, self.mlp(cls_normed), clip)
        if residual is None:
            return cls, x, ()
        x, normed = self.norm2(x, residual, frame)
        return cls, x, (self.mlp(normed), None if clip is None else clip[..., None, None])

    @part("time attention")
    def time_step(self, x: Tensor) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Each patch position over its own frames; the class token takes no part. -> residual, its
        stochastic depth, and a bias that survives it."""
        B, _, N, _ = x.shape
        q, k, v = self.temporal_attn.split(x)  # [B, T, N, H, D]
        out = ops.time_attention(q, k, v, impl=self.impl).flatten(-2)  # [B, T, N, C]
        # temporal_fc follows the output projection with nothing but a drop in between, so the two
        # are one matrix: W_fc m (W o + b) + b_fc = m (W_fc W) o + m W_fc b + b_fc
        fc = self.temporal_fc
        weight, bias = merged(fc, self.temporal_attn.proj)
        position = keep_scale(self, (B, 1, N, 1), fc.weight)  # one draw per clip and patch position
        if position is None:
            return F.linear(out, weight, bias + fc.bias), None, None
        return F.linear(out, weight, bias), position, fc.bias

    @part("space attention")
    def space_step(
        self, cls: Tensor, x: Tensor, cls_only: bool
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Each frame's patches and the class token within the frame; the class token's T answers
        are averaged. -> residual of the class token, that of the patches (None if `cls_only`) and
        its stochastic depth."""
        B, T = x.shape[:2]
        frame = keep_scale(self, (B, T), self.attn.proj.weight)  # one draw per clip and frame
        weight = None if frame is None else frame / T
        of_class = self.attn.split(cls)
        if cls_only:
            cls_out = self.class_over_frames(of_class, x, weight)
        else:
            q, k, v = self.attn.split(x)  # [B, T, N, H, D]
            out, cls_out = ops.space_attention(
                q, k, v, *of_class, frame_weight=weight, impl=self.impl
            )
        cls_residual = self.attn.merge(cls_out)
        if frame is not None:
            # the published mean over frames of w (W o + b) is W (mean w o) + b mean w
            cls_residual = cls_residual + (frame.mean(1, keepdim=True) - 1) * self.attn.proj.bias
        if cls_only:
            return cls_residual, None, None
        return cls_residual, self.attn.merge(out), None if frame is None else frame[..., None, None]

    def class_over_frames(
        self, of_class: tuple[Tensor, ...], x: Tensor, frame_weight: Tensor | None
    ) -> Tensor:
        """The second result of `ops.space_attention` without the first. -> [B, H, D]"""
        B, T = x.shape[:2]
        q, *rest = (y[:, None].expand(-1, T, -1, -1).flatten(0, 1) for y in of_class)
        tokens = (y.flatten(0, 1) for y in self.attn.keys_and_values(x))  # [B*T, N, H, D]
        k, v = (torch.cat([y[:, None], z], 1) for y, z in zip(rest, tokens, strict=True))
        out = attend_once(q, k, v).unflatten(0, (B, T))
        if frame_weight is None:
            return out.mean(1)
        return (frame_weight.to(out.dtype)[:, :, None, None] * out).sum(1)


class TimeSformer(VideoTransformer):
    """Keywords as in `create_model`. Other grid sizes and frame counts than those of the tables
    are met at run time: nearest neighbour for positions (2-D) and for frames (1-D)."""

    backbone = "timesformer"

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
        drop_path: float = 0.1,
        attention: Literal["divided", "joint", "space"] = "divided",
        time_embed_every_block: bool = False,
        time_heads: bool = True,
        init: Literal["published", "scratch"] = "published",
        impl: str = "auto",
    ):
        super().__init__(num_classes, frames, impl)
        if attention not in ("divided", "joint", "space"):
            raise ValueError(f"attention: expected divided, joint or space, got {attention!r}")
        if attention == "space" and time_embed_every_block:
            raise ValueError('time_embed_every_block: attention "space" has no time embedding')
        self.attention = attention
        self.time_embed_every_block = time_embed_every_block
        self.grid = grid_of(image_size, patch_size)
        self.patch_embed = PatchEmbed(patch_size, dim)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + self.grid[0] * self.grid[1], dim))
        if attention != "space":
            self.time_embed = nn.Parameter(torch.zeros(1, frames, dim))
        rates = drop_path_rates(drop_path, depth)
        self.blocks = nn.ModuleList(
            DividedBlock(dim, heads, mlp_ratio, rate, impl)
            if attention == "divided"
            else Block(dim, heads, mlp_ratio, rate, impl=impl)
            for rate in rates
        )
        self.norm = nn.LayerNorm(dim, eps=NORM_EPS)
        self.head = nn.Linear(dim, num_classes)
        if time_heads:
            self.add_time_heads(dim, frames)
        self.reset_parameters(init)

    @torch.no_grad()
    def reset_parameters(self, init: str) -> None:
        nn.init.trunc_normal_(self.cls_token, std=0.02)
        if init == "scratch":
            init_scratch(self)
            nn.init.normal_(self.pos_embed, std=0.3)
            if self.attention != "space":
                nn.init.normal_(self.time_embed, std=0.3)
        elif init == "published":
            init_published(self)
            nn.init.trunc_normal_(self.pos_embed, std=0.02)
            for block in self.blocks:
                if isinstance(block, DividedBlock):  # all blocks begin as the image model's
                    nn.init.zeros_(block.temporal_fc.weight)
        else:
            raise ValueError(f"init: expected published or scratch, got {init!r}")

    def embed(self, video: Tensor) -> Tensor:
        return self.patch_embed(video)

    def run(self, x: Tensor, whole: int | None = None) -> tuple[Tensor, Tensor]:
        cls, x, time = self._place(x)
        again = time if self.time_embed_every_block else None
        if self.attention == "divided":
            cls, x = self._divided(cls, x, again, whole)
        elif self.attention == "joint":
            cls, x = self._joint(cls, x, again)
        else:
            cls, x = self._space(cls, x)
        return self.norm(cls), self.norm(x[:whole])

    @part("heads")
    def classify(self, cls: Tensor) -> Tensor:
        return self.head(cls)

    def _divided(
        self, cls: Tensor, x: Tensor, again: Tensor | None, whole: int | None
    ) -> tuple[Tensor, Tensor]:
        pending: Pending = ()
        for block in self.blocks[:-1]:
            cls, x, pending = block(cls, x, pending)
            if again is not None:
                x = x + again
        return last_block(self.blocks[-1], cls, x, pending, whole)

    def _joint(self, cls: Tensor, x: Tensor, again: Tensor | None) -> tuple[Tensor, Tensor]:
        T, N = x.shape[1:3]
        z = torch.cat([cls[:, None], x.flatten(1, 2)], 1)  # [B, 1+T*N, C]
        for i, block in enumerate(self.blocks):
            if again is not None and i > 0:
                rows = again.expand(T, N, -1).flatten(0, 1)
                z = z + F.pad(rows, (0, 0, 1, 0))  # nothing for the class token
            z = block(z)
        return z[:, 0], z[:, 1:].unflatten(1, (T, N))

    def _space(self, cls: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        B, T, _, C = x.shape
        z = torch.cat([cls[:, None, None].expand(B, T, 1, C), x], 2).flatten(0, 1)
        for block in self.blocks:
            z = block(z)  # [B*T, 1+N, C]
        z = z.unflatten(0, (B, T))
        return z[:, :, 0].mean(1), z[:, :, 1:]

    def _place(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """-> class token [B, C], patches [B, T, N, C] with their embeddings, time [T, 1, C]."""
        B, T, gh, gw, _ = x.shape
        cls_pos, pos = self.pos_embed[0, 0], self.pos_embed[0, 1:]
        x = x.flatten(2, 3) + resize_grid(pos, self.grid, (gh, gw), "nearest")
        cls = (self.cls_token[0, 0] + cls_pos).expand(B, -1)
        if self.attention == "space":
            return cls, x, x.new_zeros(())
        time = resize_frames(self.time_embed[0], T)[:, None]  # [T, 1, C]
        return cls, x + time, time
