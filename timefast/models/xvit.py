"""X-ViT: a frame-wise ViT whose attention mixes in channels of the neighbouring frames, and a small
temporal head that reads one class token per frame.

Letters: B clips, T frames, N patches per frame, S = 1 + N tokens of a frame, C model width.
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
    PreLogits,
    attend_once,
    drop_path_rates,
    grid_of,
    init_published,
    init_scratch,
    keep_scale,
    resize_grid,
    settled,
    split_pending,
    table_size_of,
)
from timefast.profiling import part

EMBED_FRAMES = 8  # rows of the published time embedding, whatever the number of frames
HEAD_EPS = 1e-5  # LayerNorm of the temporal head


class ShiftBlock(nn.Module):
    """A pre-norm block on each frame's tokens; keys and values are shifted within runs of
    `segments` frames. With shift_div None nothing is shifted."""

    def __init__(
        self,
        dim: int,
        heads: int,
        mlp_ratio: float,
        drop_path: float,
        shift_div: int | None,
        segments: int,
        impl: str,
    ):
        super().__init__()
        self.drop_path, self.shift_div, self.segments, self.impl = (
            drop_path, shift_div, segments, impl,
        )  # fmt: skip
        self.norm1 = AddNorm(dim, impl=impl)
        self.attn = Attention(dim, heads)
        self.norm2 = AddNorm(dim, impl=impl)
        self.mlp = Mlp(dim, mlp_ratio)

    def forward(
        self, z: Tensor, pending: Pending = (), *, cls_only: bool = False
    ) -> tuple[Tensor, Pending]:
        """z [B, T, S, C] with a pending residual -> the same, or with `cls_only` of its class
        tokens [B, T, 1, C] alone."""
        z, normed = self.norm1(z, *pending)
        residual = self.space_step(normed, cls_only)
        z, normed = self.norm2(z[:, :, :1] if cls_only else z, residual, self.keep(z))
        return z, (self.mlp(normed), self.keep(z))

    @part("space attention")
    def space_step(self, z: Tensor, cls_only: bool) -> Tensor:
        return self.attn.merge(self.attend_class(z) if cls_only else self.attend(z))

    def attend(self, z: Tensor) -> Tensor:
        """-> [B, T, S, H, D] before the output projection."""
        B, T = z.shape[:2]
        run = min(T, self.segments)
        q, k, v = (x.reshape(-1, run, *x.shape[2:]) for x in self.attn.split(z))
        div = self.shift_div or z.shape[-1] + 1  # more than there are channels: none is shifted
        out = ops.shift_attention(q, k, v, shift_div=div, impl=self.impl)
        return out.reshape(B, T, *out.shape[2:])

    def attend_class(self, z: Tensor) -> Tensor:
        """-> [B, T, 1, H, D]: what `attend` gives for the class tokens."""
        B, T, _, C = z.shape
        k, v = (x.flatten(3) for x in self.attn.keys_and_values(z))  # [B, T, S, C]
        if self.shift_div is not None:
            k, v = (self.shifted(x, C // self.shift_div) for x in (k, v))
        q = self.attn.queries(z[:, :, 0]).flatten(0, 1)  # [B*T, H, D]
        k, v = (x.flatten(0, 1).unflatten(-1, q.shape[1:]) for x in (k, v))
        return attend_once(q, k, v).unflatten(0, (B, T))[:, :, None]

    def shifted(self, x: Tensor, fold: int) -> Tensor:
        """x [B, T, S, C] with its first `fold` channels from the next frame and as many from the
        frame before, zeros beyond a run of frames."""
        runs = x.reshape(-1, min(x.shape[1], self.segments), *x.shape[2:])
        after = F.pad(runs[:, 1:, :, :fold], (0, 0, 0, 0, 0, 1))
        before = F.pad(runs[:, :-1, :, fold : 2 * fold], (0, 0, 0, 0, 1, 0))
        return torch.cat([after, before, runs[..., 2 * fold :]], -1).reshape(x.shape)

    def keep(self, z: Tensor) -> Tensor | None:
        return keep_scale(self, (*z.shape[:2], 1, 1), z)  # one draw per frame


class FrameEncoder(nn.Module):
    """The backbone without its temporal head."""

    def __init__(
        self,
        blocks: Sequence[ShiftBlock],
        dim: int,
        patch_size: int,
        grid: tuple[int, int],
        embed_frames: int,
        pre_logits: str | None,
        time_embed_every_block: bool,
    ):
        super().__init__()
        self.grid, self.time_embed_every_block = grid, time_embed_every_block
        self.cls_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + grid[0] * grid[1], dim))
        self.temp_embed = nn.Parameter(torch.zeros(1, embed_frames, 1, dim))
        self.patch_embed = PatchEmbed(patch_size, dim)
        self.blocks = nn.ModuleList(blocks)
        self.norm = nn.LayerNorm(dim, eps=NORM_EPS)
        self.pre_logits = None if pre_logits is None else PreLogits(dim, pre_logits)

    def forward(self, x: Tensor, whole: int | None = None) -> tuple[Tensor, Tensor]:
        """x [B, T, gh, gw, C] -> class features [B, T, C], patches [B, T, N, C] of the first
        `whole` clips (None: of all)."""
        B, T, gh, gw, _ = x.shape
        pos = resize_grid(self.pos_embed[0, 1:], self.grid, (gh, gw), "bicubic")
        cls = (self.cls_token[0, 0] + self.pos_embed[0, 0]).expand(B, T, 1, -1)
        z = torch.cat([cls, x.flatten(2, 3) + pos], 2)  # [B, T, S, C]
        rows = torch.arange(T, device=z.device) % self.temp_embed.shape[1]
        time = self.temp_embed[0, rows]  # [T, 1, C], for the class token too
        z = z + time
        pending: Pending = ()
        for block in self.blocks[:-1]:
            z, pending = block(z, pending)
            if self.time_embed_every_block:
                z = z + time
        if whole is None:
            z = self._last(z, pending)
            cls, x = z[:, :, 0], z[:, :, 1:]
        elif whole == 0:
            cls, x = self._last(z, pending, cls_only=True)[:, :, 0], z[:0, :, 1:]
        else:  # of the other clips the class tokens alone
            sizes = [whole, B - whole]
            first, rest = zip(z.split(sizes), split_pending(pending, sizes), strict=True)
            z, others = self._last(*first), self._last(*rest, cls_only=True)
            cls, x = torch.cat([z[:, :, 0], others[:, :, 0]]), z[:, :, 1:]
        return cls if self.pre_logits is None else self.pre_logits(cls), x

    def _last(self, z: Tensor, pending: Pending, cls_only: bool = False) -> Tensor:
        """Through the last block and the final norm."""
        return self.norm(settled(*self.blocks[-1](z, pending, cls_only=cls_only)))


class TemporalHead(nn.Module):
    """Class token and one feature per frame through plain blocks, then an MLP on the class row."""

    def __init__(
        self,
        dim: int,
        num_classes: int,
        heads: int,
        layers: int,
        width: int,
        dropout: float,
        impl: str,
    ):
        super().__init__()
        self.cls_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.temporal_encoder = nn.ModuleList(
            Block(dim, heads, 4.0, qkv_bias=False, norm_eps=HEAD_EPS, impl=impl)
            for _ in range(layers)
        )
        self.mlp_head = nn.Sequential(
            nn.LayerNorm(dim, eps=HEAD_EPS), nn.Linear(dim, width), nn.GELU(), nn.Dropout(dropout)
        )
        self.head = nn.Linear(width, num_classes)

    @part("heads")
    def forward(self, cls: Tensor) -> Tensor:
        """cls [B, T, C] -> logits [B, K]."""
        z = torch.cat([self.cls_token.expand(cls.shape[0], -1, -1), cls], 1)  # [B, 1+T, C]
        for block in self.temporal_encoder:
            z = block(z)
        return self.head(self.mlp_head(z[:, 0]))


class XViT(VideoTransformer):
    """Keywords as in `create_model`; alone here: `shift_div`, `shift_segments` (frames of a run
    within which channels are exchanged, default all), `shift_blocks` (numbers of the blocks that
    shift, default all), `head_heads`, `head_layers`, `head_width`, `head_dropout` of the temporal
    head, `pre_logits` (an extra layer on the class features, with this activation), `table_size`
    (image size the position table is made for, published: 224) and `embed_frames` (rows of the
    time embedding, published: 8).

    Other image sizes are met by bicubic resizing of the position table; frame t takes row
    t mod `embed_frames` of the time embedding. The number of frames must be below
    `shift_segments` or a multiple of it.
    """

    backbone = "xvit"

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
        drop_path: float = 0.0,
        shift_div: int = 4,
        shift_segments: int | None = None,
        shift_blocks: Sequence[int] | None = None,
        head_heads: int | None = None,
        head_layers: int = 1,
        head_width: int | None = None,
        head_dropout: float = 0.5,
        pre_logits: Literal["tanh", "gelu", "relu"] | None = None,
        table_size: int | Sequence[int] | None = None,
        embed_frames: int | None = None,
        time_embed_every_block: bool = False,
        time_heads: bool = True,
        init: Literal["published", "scratch"] = "published",
        impl: str = "auto",
    ):
        super().__init__(num_classes, frames, impl)
        self.segments = shift_segments or frames
        self.grid = grid_of(table_size or table_size_of(image_size, patch_size), patch_size)
        shifted = range(depth) if shift_blocks is None else shift_blocks
        rates = drop_path_rates(drop_path, depth)
        divs = [shift_div if i in shifted else None for i in range(depth)]
        self.base_model = FrameEncoder(
            [
                ShiftBlock(dim, heads, mlp_ratio, rate, div, self.segments, impl)
                for rate, div in zip(rates, divs, strict=True)
            ],
            dim,
            patch_size,
            self.grid,
            embed_frames or min(frames, EMBED_FRAMES),
            pre_logits,
            time_embed_every_block,
        )
        self.consensus = TemporalHead(
            dim,
            num_classes,
            head_heads or heads,
            head_layers,
            head_width or dim,
            head_dropout,
            impl,
        )
        if time_heads:
            self.add_time_heads(dim, frames)
        self.reset_parameters(init)

    @torch.no_grad()
    def reset_parameters(self, init: str) -> None:
        base = self.base_model
        nn.init.trunc_normal_(base.cls_token, std=0.02)
        if init == "scratch":
            init_scratch(self)
            nn.init.normal_(base.pos_embed, std=0.3)
            nn.init.normal_(base.temp_embed, std=0.3)
        elif init == "published":
            init_published(base)  # all outside of it keeps PyTorch's default
            nn.init.trunc_normal_(base.pos_embed, std=0.02)
        else:
            raise ValueError(f"init: expected published or scratch, got {init!r}")

    @property
    def blocks(self) -> nn.ModuleList:
        return self.base_model.blocks

    def classify(self, cls: Tensor) -> Tensor:
        return self.consensus(cls)

    def run(self, x: Tensor, whole: int | None = None) -> tuple[Tensor, Tensor]:
        return self.base_model(x, whole)

    def embed(self, video: Tensor) -> Tensor:
        frames = video.shape[2] if video.ndim == 5 else 0
        if frames > self.segments and frames % self.segments:
            raise ValueError(
                f"video: expected at most {self.segments} frames (shift_segments) or a multiple of "
                f"it, got {frames}"
            )
        return self.base_model.patch_embed(video)
