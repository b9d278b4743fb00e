"""What the three backbones share: patch embedding, attention projections, MLP, plain block,
stochastic depth, resizing of position tables, initialisation, result types.

Letters: B clips, T frames, N patches per frame (row-major), H heads, D head width, C model width,
K classes. Module names are those of the published checkpoints.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from timefast import ops
from timefast.profiling import part

NORM_EPS = 1e-6  # LayerNorm of every backbone (the temporal head of X-ViT has torch's 1e-5)


@dataclass
class Features:
    """What a backbone sees in a clip, after its final norm."""

    cls: Tensor  # [B, C]; X-ViT: [B, T, C], one per frame
    tokens: Tensor  # [B, T, N, C]


@dataclass
class TimeOutputs:
    """Class logits and the logits of the TIME heads, from one pass."""

    logits: Tensor  # [B, K]
    order: Tensor | None  # [B, T, L], L frames of the training clips; None if not asked for
    flow: Tensor | None  # [B, T-1, N, 9]; None if not asked for
    tokens: Tensor  # [B, T, N, C], what the heads see


def grid_of(image_size: int | Sequence[int], patch_size: int) -> tuple[int, int]:
    """Patches along height and width of an image of `image_size` (int or (height, width))."""
    height, width = (image_size, image_size) if isinstance(image_size, int) else image_size
    if height < patch_size or width < patch_size or height % patch_size or width % patch_size:
        raise ValueError(
            f"image_size: expected a positive multiple of patch_size={patch_size}, "
            f"got {height}x{width}"
        )
    return height // patch_size, width // patch_size


def table_size_of(image_size: int | Sequence[int], patch_size: int) -> int | Sequence[int]:
    """The image size that Motionformer and X-ViT make their position table for: 224 whatever the
    crop, where that can be resized to the crop."""
    square = isinstance(image_size, int) or image_size[0] == image_size[1]
    return 224 if square and 224 % patch_size == 0 else image_size


class PatchEmbed(nn.Module):
    """Each p x p patch of each frame through one linear map."""

    def __init__(self, patch_size: int, dim: int):
        super().__init__()
        # a convolution by name, shape and initialisation, as in the published checkpoints
        self.proj = nn.Conv2d(3, dim, kernel_size=patch_size, stride=patch_size)

    @part("patch embedding")
    def forward(self, video: Tensor) -> Tensor:
        """video [B, 3, T, height, width] -> [B, T, gh, gw, C]."""
        if video.ndim != 5 or video.shape[1] != 3:
            raise ValueError(
                f"video: expected [B, 3, T, height, width], got {list(video.shape)}; "
                "frames are the third dimension"
            )
        p = self.proj.kernel_size[0]
        gh, gw = grid_of(video.shape[-2:], p)
        # one gathering copy and one matrix product, instead of a copy for the folded frames and
        # a convolution; the gathered order is that of the convolution weight: channel, row, column
        patches = video.unflatten(4, (gw, p)).unflatten(3, (gh, p))  # [B, 3, T, gh, p, gw, p]
        patches = patches.permute(0, 2, 3, 5, 1, 4, 6).flatten(4)  # [B, T, gh, gw, 3*p*p]
        return F.linear(patches, self.proj.weight.flatten(1), self.proj.bias)


def merged(second: nn.Linear, first: nn.Linear) -> tuple[Tensor, Tensor]:
    """Weight and bias of second(first(x)) as one linear map, formed in float32 under autocast too.

    A product of two C x C matrices per step, instead of one more with every token.
    """
    with torch.autocast(first.weight.device.type, enabled=False):
        return second.weight @ first.weight, second.weight @ first.bias


# A residual that the next norm adds: nothing, or a branch [..., C] and its stochastic depth.
Pending = tuple[()] | tuple[Tensor, Tensor | None]


def settled(x: Tensor, pending: Pending) -> Tensor:
    """x with its pending residual."""
    return add_scaled(x, *pending) if pending else x


def split_pending(pending: Pending, sizes: list[int]) -> list[Pending]:
    """By the first dimension, as torch.split does."""
    parts = [[None] * len(sizes) if y is None else y.split(sizes) for y in pending]
    return list(zip(*parts, strict=True)) or [()] * len(sizes)  # type: ignore[arg-type]


def add_scaled(x: Tensor, branch: Tensor, scale: Tensor | None) -> Tensor:
    return x + (branch if scale is None else scale * branch)


class AddNorm(nn.Module):
    """LayerNorm of tokens to which it first adds a residual, in the same pass."""

    def __init__(self, dim: int, eps: float = NORM_EPS, impl: str = "auto"):
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.ones(dim)), nn.Parameter(torch.zeros(dim))
        self.eps = eps
        # an implementation that only an attention op has says nothing about this one
        self.impl = impl if impl in ops.implementations("add_layer_norm") else "auto"

    def extra_repr(self) -> str:
        return f"{len(self.weight)}, eps={self.eps}"

    def forward(
        self,
        x: Tensor,
        branch: Tensor | None = None,
        scale: Tensor | None = None,
        branch_bias: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """x + scale * branch + branch_bias [..., C], x itself if there is no branch, and that
        normalised, under autocast in its dtype: see `ops.add_layer_norm`."""
        return ops.add_layer_norm(
            x, branch, self.weight, self.bias,
            branch_scale=scale, branch_bias=branch_bias, eps=self.eps, impl=self.impl,
        )  # fmt: skip


class Attention(nn.Module):
    """The two projections around an attention op."""

    def __init__(self, dim: int, heads: int, qkv_bias: bool = True):
        super().__init__()
        if dim % heads:
            raise ValueError(f"heads: expected a divisor of dim={dim}, got {heads}")
        self.heads = heads
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        self.proj = nn.Linear(dim, dim)

    def split(self, x: Tensor) -> tuple[Tensor, ...]:
        """x [..., C] -> q, k, v [..., H, D]: strided views of one projection, nothing copied."""
        return self.qkv(x).unflatten(-1, (3, self.heads, -1)).unbind(-3)

    def keys_and_values(self, x: Tensor) -> tuple[Tensor, ...]:
        """x [..., C] -> k, v [..., H, D], where nobody reads queries."""
        C, bias = x.shape[-1], self.qkv.bias
        both = F.linear(x, self.qkv.weight[C:], None if bias is None else bias[C:])
        return both.unflatten(-1, (2, self.heads, -1)).unbind(-3)

    def queries(self, x: Tensor) -> Tensor:
        """x [..., C] -> q [..., H, D]."""
        C, bias = x.shape[-1], self.qkv.bias
        q = F.linear(x, self.qkv.weight[:C], None if bias is None else bias[:C])
        return q.unflatten(-1, (self.heads, -1))

    def merge(self, out: Tensor) -> Tensor:
        """out [..., H, D] -> [..., C]."""
        return self.proj(out.flatten(-2))

    @part("attention")
    def forward(self, x: Tensor) -> Tensor:
        """Plain attention over the tokens of x [..., S, C]."""
        q, k, v = (y.transpose(-3, -2) for y in self.split(x))  # [..., H, S, D]
        return self.merge(F.scaled_dot_product_attention(q, k, v).transpose(-3, -2))


def attend_once(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """One query q [A, H, D] over k, v [A, S, H, D] -> [A, H, D]."""
    k, v = k.transpose(1, 2), v.transpose(1, 2)
    return F.scaled_dot_product_attention(q[:, :, None], k, v)[:, :, 0]


class Mlp(nn.Module):
    def __init__(self, dim: int, mlp_ratio: float):
        super().__init__()
        self.fc1 = nn.Linear(dim, int(dim * mlp_ratio))
        self.fc2 = nn.Linear(int(dim * mlp_ratio), dim)

    @part("mlp")
    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.fc1(x))

    def second(self, hidden: Tensor) -> Tensor:
        return self.fc2(F.gelu(hidden))


class PreLogits(nn.Module):
    """A linear layer of the model's width with an activation, between backbone and heads."""

    def __init__(self, dim: int, activation: str):
        super().__init__()
        if activation not in _ACTIVATIONS:
            raise ValueError(
                f"pre_logits: expected one of {', '.join(_ACTIVATIONS)} or None, got {activation!r}"
            )
        self.activation = _ACTIVATIONS[activation]
        self.fc = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.activation(self.fc(x))


_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "tanh": torch.tanh,
    "gelu": F.gelu,
    "relu": F.relu,
}


class Block(nn.Module):
    """z += Attn(LN z); z += MLP(LN z), each with stochastic depth per entry of z's first dim."""

    def __init__(
        self,
        dim: int,
        heads: int,
        mlp_ratio: float,
        drop_path: float = 0.0,
        *,
        qkv_bias: bool = True,
        norm_eps: float = NORM_EPS,
        impl: str = "auto",
    ):
        super().__init__()
        self.drop_path = drop_path
        self.norm1 = AddNorm(dim, norm_eps, impl)
        self.attn = Attention(dim, heads, qkv_bias)
        self.norm2 = AddNorm(dim, norm_eps, impl)
        self.mlp = Mlp(dim, mlp_ratio)

    def forward(self, z: Tensor) -> Tensor:
        """z [B, S, C] -> [B, S, C]."""
        per_clip = (z.shape[0], 1, 1)
        residual = self.attn(self.norm1(z)[1])
        z, normed = self.norm2(z, residual, keep_scale(self, per_clip, z))
        residual = self.mlp(normed)
        return add_scaled(z, residual, keep_scale(self, per_clip, z))


def checkpoint_activations(model: nn.Module, what: str) -> None:
    """Let the backward pass compute activations again instead of keeping them, in place.

    "gelu": the activation in every MLP, half of what an MLP keeps, for one more pass over its
    hidden layer (of `mlp_ratio` times the width). "mlp": that layer too, for one more of the MLP's
    first products. "blocks": all inside of every block, for one more forward pass.
    """
    if what not in ("gelu", "mlp", "blocks"):
        raise ValueError(f"checkpoint_activations: expected gelu, mlp or blocks, got {what!r}")
    for block in model.blocks:  # type: ignore[union-attr]
        if what == "blocks":
            # nothing is left pending between blocks: it would be kept, too
            block.forward = _again(_settling(block.forward), draws=True)  # type: ignore[method-assign]
            continue
        for mlp in (module for module in block.modules() if isinstance(module, Mlp)):
            # of the second half of an MLP nothing is computed again but its product's input
            name = "second" if what == "gelu" else "forward"
            setattr(mlp, name, _again(getattr(mlp, name), draws=False))


def _settling(forward: Callable[..., Any]) -> Callable[..., Any]:
    def run(*args: Any, **kwargs: Any) -> Any:
        out = forward(*args, **kwargs)
        return (*out[:-2], settled(*out[-2:]), ()) if isinstance(out, tuple) else out

    return run


def _again(forward: Callable[..., Any], draws: bool) -> Callable[..., Any]:
    """`draws`: random numbers, the same ones the second time."""
    return lambda *args, **kwargs: checkpoint(
        forward, *args, use_reentrant=False, preserve_rng_state=draws, **kwargs
    )


def last_block(
    block: nn.Module, cls: Tensor, x: Tensor, pending: Pending, whole: int | None
) -> tuple[Tensor, Tensor]:
    """The block's results for the first `whole` clips (None: for all), and for the others only
    class tokens. -> class tokens [B, C] of all, patches [whole, T, N, C]."""
    if whole is None:
        cls, *patches = block(cls, x, pending)
        return cls, settled(*patches)
    if whole == 0:
        return block(cls, x, pending, cls_only=True)[0], x[:0]
    sizes = [whole, len(cls) - whole]
    first, rest = zip(cls.split(sizes), x.split(sizes), split_pending(pending, sizes), strict=True)
    cls, *patches = block(*first)
    return torch.cat([cls, block(*rest, cls_only=True)[0]]), settled(*patches)


def keep_scale(module: nn.Module, shape: tuple[int, ...], like: Tensor) -> Tensor | None:
    """Stochastic depth: Bernoulli(1-r)/(1-r), r = module.drop_path, one draw per entry of `shape`.

    None where nothing can be dropped: in evaluation, and for r = 0.
    """
    rate = float(module.drop_path)  # type: ignore[arg-type]
    if not module.training or rate == 0.0:
        return None
    keep = 1.0 - rate
    return torch.empty(shape, dtype=like.dtype, device=like.device).bernoulli_(keep).div_(keep)


def drop_path_rates(drop_path: float, depth: int) -> list[float]:
    """The rate of each block, from 0 at the first to `drop_path` at the last."""
    if not 0.0 <= drop_path < 1.0:
        raise ValueError(f"drop_path: expected 0 <= rate < 1, got {drop_path}")
    return [drop_path * i / max(depth - 1, 1) for i in range(depth)]


def resize_frames(table: Tensor, frames: int) -> Tensor:
    """table [L, C] -> [T, C]: row floor(t*L/T) for frame t (1-D nearest neighbour)."""
    length = len(table)
    if frames == length:
        return table
    return table[torch.arange(frames, device=table.device) * length // frames]


def resize_grid(table: Tensor, old: tuple[int, int], new: tuple[int, int], mode: str) -> Tensor:
    """table [old_h*old_w, C] -> [new_h*new_w, C] by 2-D interpolation ("nearest", "bicubic")."""
    if old == new:
        return table
    image = table.reshape(1, *old, -1).permute(0, 3, 1, 2)  # [1, C, old_h, old_w]
    align = None if mode == "nearest" else False
    image = F.interpolate(image, size=new, mode=mode, align_corners=align)
    return image.permute(0, 2, 3, 1).flatten(0, 2)


@torch.no_grad()
def init_published(module: nn.Module) -> None:
    """The published initialisation: truncated normal 0.02 (cut at +-2) for linear weights, zero
    biases; convolutions keep PyTorch's default."""
    for layer in module.modules():
        if isinstance(layer, nn.Linear):
            nn.init.trunc_normal_(layer.weight, std=0.02)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)


@torch.no_grad()
def init_scratch(module: nn.Module) -> None:
    """For training without pre-trained weights: Xavier-uniform for all linear weights, zero biases.

    The published initialisation is made for ImageNet weights. From scratch, with its time path at
    zero, no order was learned on the demo data: shuffled clips were classified as well as others.
    """
    for layer in module.modules():
        if isinstance(layer, nn.Linear):
            nn.init.xavier_uniform_(layer.weight)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)
