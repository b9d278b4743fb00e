"""Dense optical flow by polynomial expansion (Farnebäck 2003), as OpenCV computes it.

    next(y + dy, x + dx) ~ prev(y, x)

Every image is modelled around each pixel as c + b.(x, y) + (x, y) A (x, y)'; a displacement d
changes b by -2 A d, so d follows from the two expansions by weighted least squares over a box,
iterated and carried from the coarsest scale of a pyramid to the finest. The definition followed
here is OpenCV's `calcOpticalFlowFarneback` with flags 0, which the published training code of the
flow labels calls: its borders, weights, rounding rules and the absolute 1e-3 in the determinant.

Letters: P pairs of frames; `height`, `width` in pixels. The Triton kernels stand in
`farneback_triton.py`; docs/kernels/farneback.md counts launches and bytes. Everything is float32:
half precision or TF32 anywhere in here changes labels, and so does float64, because coordinates
of static pixels sit exactly on the edge of what counts as inside the image.
"""

import importlib.util
import math
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from timefast.kernels.op import Case, Impl, Op, dispatch, register, triton_unavailable

MINIMUM_SIDE = 32  # pixels; a scale with a shorter side is not used
DETERMINANT_FLOOR = 1e-3
PUBLISHED: dict[str, Any] = {  # of the flow labels, and the defaults
    "pyr_scale": 0.5,
    "levels": 3,
    "winsize": 15,
    "iterations": 3,
    "poly_n": 5,
    "poly_sigma": 1.2,
}
BORDER_WEIGHTS = (0.14, 0.14, 0.4472, 0.4472, 0.4472)  # by distance from the edge, then 1


def farneback(
    prev: Tensor,
    next: Tensor,
    *,
    pyr_scale: float = 0.5,
    levels: int = 3,
    winsize: int = 15,
    iterations: int = 3,
    poly_n: int = 5,
    poly_sigma: float = 1.2,
    impl: str = "auto",
) -> Tensor:
    """Flow from `prev` to `next` in pixels: [..., 2, height, width] float32, channel 0 dx, 1 dy.

    `prev` and `next` are grey images [..., height, width] of equal shape, any real dtype and any
    strides, with values on a 0..255-like scale (an offset is harmless, a small range is not: images
    in 0..1 yield no flow). x points right, y down. The result carries no gradient.

    `levels` counts the reduced scales above full resolution, each `pyr_scale` (0..1) times the one
    below; scales with a side under 32 pixels are left out. `winsize` is the side of the averaging
    box, `iterations` the number of updates per scale, `poly_n` the radius and `poly_sigma` the
    standard deviation of the expansion's Gaussian window, all in pixels.

    Raises ValueError for wrong shapes, dtypes or parameters and for images smaller than the window
    of the expansion, 2 poly_n + 1 pixels a side; NotImplementedError with the reasons if the
    implementation named cannot run: "reference" (PyTorch), "cpu" (OpenCV over a pool of
    `torch.get_num_threads()` threads), "cv2" (OpenCV, pair after pair), "cv2_cuda" (OpenCV's CUDA
    class, where the installed OpenCV has it) or "triton".
    """
    if prev.dim() < 2 or 0 in prev.shape[-2:]:
        raise ValueError(f"prev: expected [..., height, width], got {list(prev.shape)}")
    if next.shape != prev.shape:
        raise ValueError(f"next: expected {list(prev.shape)} like prev, got {list(next.shape)}")
    if next.device != prev.device:
        raise ValueError(f"next: expected a tensor on {prev.device} like prev, got {next.device}")
    for name, image in (("prev", prev), ("next", next)):
        if image.is_complex():
            raise ValueError(f"{name}: expected a real dtype, got {image.dtype}")
    check_parameters(pyr_scale, levels, winsize, iterations, poly_n, poly_sigma)
    check_size("prev", prev.shape[-2], prev.shape[-1], poly_n)
    return dispatch(
        farneback_op,
        impl,
        prev.detach(),
        next.detach(),
        pyr_scale=float(pyr_scale),
        levels=int(levels),
        winsize=int(winsize),
        iterations=int(iterations),
        poly_n=int(poly_n),
        poly_sigma=float(poly_sigma),
    )


def check_parameters(
    pyr_scale: float, levels: int, winsize: int, iterations: int, poly_n: int, poly_sigma: float
) -> None:
    """Raise ValueError for the first parameter outside its range."""
    if not 0 < pyr_scale < 1:
        raise ValueError(f"pyr_scale: expected a number between 0 and 1, got {pyr_scale}")
    for name, value, least in (
        ("levels", levels, 0),
        ("winsize", winsize, 2),  # OpenCV's running sums start wrong at 1
        ("iterations", iterations, 1),
        ("poly_n", poly_n, 1),
    ):
        if value != int(value) or value < least:
            raise ValueError(f"{name}: expected an integer of at least {least}, got {value}")
    if not 0 <= poly_sigma < math.inf:
        raise ValueError(f"poly_sigma: expected a number of pixels, 0 or more, got {poly_sigma}")


def check_size(name: str, height: int, width: int, poly_n: int) -> None:
    """Raise ValueError for images that hold no window of the polynomial expansion."""
    window = 2 * poly_n + 1
    if min(height, width) < window:
        raise ValueError(
            f"{name}: images of {height} x {width} are too small to expand: poly_n={poly_n} fits "
            f"polynomials over {window} x {window} pixels; use larger images or a smaller poly_n"
        )


class Scale(NamedTuple):
    """One scale of the pyramid: its size, and the blur that precedes its sampling."""

    height: int
    width: int
    taps: tuple[float, ...]  # Gaussian weights, an odd number of them, at full resolution


def pyramid(height: int, width: int, pyr_scale: float, levels: int) -> list[Scale]:
    """The scales that are used, coarsest first; the last one is full resolution."""
    factors = [1.0]
    for _ in range(levels):
        factor = factors[-1] * pyr_scale
        if min(height, width) * factor < MINIMUM_SIDE:
            break
        factors.append(factor)
    scales = []
    for factor in reversed(factors):
        sigma = (1 / factor - 1) / 2
        count = max(3, round(5 * sigma) | 1)
        if sigma > 0:
            taps = [math.exp(-((i - count // 2) ** 2) / (2 * sigma**2)) for i in range(count)]
        else:
            taps = [1.0, 2.0, 1.0]  # full resolution is blurred as well
        total = sum(taps)
        size = round(height * factor), round(width * factor)  # round half to even
        scales.append(Scale(*size, tuple(tap / total for tap in taps)))
    return scales


class Basis(NamedTuple):
    """Gaussian window of the expansion and the inverse of its normal matrix."""

    weights: tuple[float, ...]  # at distance 0, 1 .. poly_n; both sides together sum to 1
    linear: float  # inverse entry of (x, x) and (y, y)
    constant: float  # of (1, x x)
    square: float  # of (x x, x x)
    mixed: float  # of (x y, x y)


def basis(poly_n: int, poly_sigma: float) -> Basis:
    """Weights of the quadratic fit.

    With a separable window of moments 1, m2, m4 the normal matrix over (1, x, y, xx, yy, xy) has
    the closed inverse below; its (xx, yy) entry is zero.
    """
    sigma = poly_sigma if poly_sigma >= torch.finfo(torch.float32).eps else 0.3 * poly_n
    weights = [math.exp(-(i**2) / (2 * sigma**2)) for i in range(poly_n + 1)]
    total = weights[0] + 2 * sum(weights[1:])
    weights = [w / total for w in weights]
    m2 = 2 * sum(i**2 * w for i, w in enumerate(weights))
    m4 = 2 * sum(i**4 * w for i, w in enumerate(weights))
    variance = m4 - m2**2
    return Basis(tuple(weights), 1 / m2, -m2 / variance, 1 / variance, 1 / m2**2)


@torch.no_grad()
def farneback_reference(
    prev: Tensor,
    next: Tensor,
    *,
    pyr_scale: float,
    levels: int,
    winsize: int,
    iterations: int,
    poly_n: int,
    poly_sigma: float,
) -> Tensor:
    """The definition, batched over all leading dimensions. -> [..., 2, height, width]"""
    *batch, height, width = prev.shape
    pairs = math.prod(batch)
    images = torch.stack([prev, next]).reshape(2 * pairs, height, width).float()
    weights = basis(poly_n, poly_sigma)
    flow = images.new_zeros(pairs, 2, 1, 1)
    for number, scale in enumerate(pyramid(height, width, pyr_scale, levels)):
        blurred = _correlate(_correlate(images, scale.taps, -2), scale.taps, -1)
        expansion = _expand(_resize(blurred, scale.height, scale.width), weights)
        before, after = expansion.view(2, pairs, 5, scale.height, scale.width)
        # 1 / pyr_scale also where rounding makes the ratio of the sizes another number
        flow = _resize(flow, scale.height, scale.width) * (1 / pyr_scale if number else 1)
        for _ in range(iterations):
            flow = _solve(_box_mean(_normal_equations(before, after, flow), winsize))
    return flow.view(*batch, 2, height, width)


def _shifts(image: Tensor, dim: int, radius: int, mirror: bool) -> list[Tensor]:
    """The image moved by -radius .. radius along `dim`; beyond the border it is mirrored without
    repeating the edge pixel, or the edge pixel is repeated."""
    size = image.shape[dim]
    index = torch.arange(-radius, size + radius, device=image.device)
    if mirror and size > 1:
        index = index.remainder(2 * size - 2)
        index = torch.minimum(index, 2 * size - 2 - index)
    padded = image.index_select(dim, index.clamp(0, size - 1))
    return [padded.narrow(dim, i, size) for i in range(2 * radius + 1)]


def _correlate(image: Tensor, taps: tuple[float, ...], dim: int) -> Tensor:
    # Sums of shifted images here and below: a convolution may run in TF32 on a GPU.
    shifts = _shifts(image, dim, len(taps) // 2, mirror=True)
    return sum(
        (tap * shift for tap, shift in zip(taps[1:], shifts[1:], strict=True)), taps[0] * shifts[0]
    )


def _resize(image: Tensor, height: int, width: int) -> Tensor:
    """Bilinear, half-pixel centres, no antialiasing. a + f (b - a) keeps constants exact."""
    for dim, size in ((-2, height), (-1, width)):
        old = image.shape[dim]
        if old == size:
            continue
        at = (torch.arange(size, device=image.device, dtype=torch.float64) + 0.5) * (old / size)
        at = (at - 0.5).clamp(0, old - 1)
        low = at.long()
        fraction = (at - low).float()
        if dim == -2:
            fraction = fraction[:, None]
        a = image.index_select(dim, low)
        b = image.index_select(dim, (low + 1).clamp(max=old - 1))
        image = a + fraction * (b - a)
    return image


def _moments(image: Tensor, weights: tuple[float, ...], dim: int) -> tuple[Tensor, Tensor, Tensor]:
    """Weighted sums of 1, i and i squared along one axis. Opposite pixels are paired, which makes
    the odd sum of a constant exactly zero."""
    radius = len(weights) - 1
    shifts = _shifts(image, dim, radius, mirror=False)
    zeroth = weights[0] * image
    first = torch.zeros_like(image)
    second = torch.zeros_like(image)
    for i in range(1, radius + 1):
        total = shifts[radius + i] + shifts[radius - i]
        zeroth = zeroth + weights[i] * total
        first = first + i * weights[i] * (shifts[radius + i] - shifts[radius - i])
        second = second + i * i * weights[i] * total
    return zeroth, first, second


def _expand(image: Tensor, weights: Basis) -> Tensor:
    """[P, height, width] -> [P, 5, height, width]: coefficients of y, x, yy, xx, xy."""
    v0, v1, v2 = _moments(image, weights.weights, -2)
    one, x, xx = _moments(v0, weights.weights, -1)
    y, xy, _ = _moments(v1, weights.weights, -1)
    yy, _, _ = _moments(v2, weights.weights, -1)
    return torch.stack(
        [
            y * weights.linear,
            x * weights.linear,
            one * weights.constant + yy * weights.square,
            one * weights.constant + xx * weights.square,
            xy * weights.mixed,
        ],
        dim=-3,
    )


def _border_weight(height: int, width: int, device: torch.device) -> Tensor:
    """[height, width]: less trust near the edges, a product over the four of them."""

    def along(size: int) -> Tensor:
        near = torch.ones(size, device=device)
        near[: len(BORDER_WEIGHTS)] = torch.tensor(BORDER_WEIGHTS, device=device)[:size]
        return near * near.flip(0)

    return along(height)[:, None] * along(width)


def _normal_equations(before: Tensor, after: Tensor, flow: Tensor) -> Tensor:
    """Expansions [P, 5, height, width], flow [P, 2, height, width] -> the five distinct numbers of
    each pixel's 2 x 2 system, [P, 5, height, width]."""
    height, width = flow.shape[-2:]
    dx, dy = flow.unbind(-3)
    x = torch.arange(width, device=flow.device, dtype=torch.float32) + dx
    y = torch.arange(height, device=flow.device, dtype=torch.float32)[:, None] + dy
    left, top = x.floor(), y.floor()
    # The last row and column count as outside even where the flow is zero.
    inside = (left >= 0) & (left < width - 1) & (top >= 0) & (top < height - 1)
    corner = torch.where(inside, top, 0).long() * width + torch.where(inside, left, 0).long()
    fx, fy = x - left, y - top
    moved = torch.zeros_like(after)
    for down, right, share in (
        (0, 0, (1 - fx) * (1 - fy)),
        (0, 1, fx * (1 - fy)),
        (1, 0, (1 - fx) * fy),
        (1, 1, fx * fy),
    ):
        index = (corner + inside * (down * width + right)).flatten(-2).unsqueeze(-2)
        sample = after.flatten(-2).gather(-1, index.expand(-1, 5, -1)).view_as(after)
        moved = moved + share.unsqueeze(-3) * sample
    inside = inside.unsqueeze(-3)
    slope = (before - torch.where(inside, moved, 0))[:, :2] / 2
    curve = torch.where(inside, (before + moved) / 2, before)[:, 2:]
    by, bx = slope.unbind(-3)
    yy, xx, xy = curve.unbind(-3)
    xy = xy / 2  # off the diagonal of A
    by = by + yy * dy + xy * dx
    bx = bx + xy * dy + xx * dx
    weight = _border_weight(height, width, flow.device)
    yy, xx, xy, by, bx = (value * weight for value in (yy, xx, xy, by, bx))
    return torch.stack(
        [
            yy * yy + xy * xy,
            (yy + xx) * xy,
            xx * xx + xy * xy,
            yy * by + xy * bx,
            xy * by + xx * bx,
        ],
        dim=-3,
    )


def _box_mean(matrices: Tensor, winsize: int) -> Tensor:
    """Sum over an odd box, divided by winsize squared also where winsize is even. Direct sums:
    a summed-area table in float32 loses the digits that decide labels."""
    for dim in (-2, -1):
        shifts = _shifts(matrices, dim, winsize // 2, mirror=False)
        matrices = sum(shifts[1:], shifts[0])
    return matrices * (1 / winsize**2)


def _solve(matrices: Tensor) -> Tensor:
    g11, g12, g22, h1, h2 = matrices.unbind(-3)
    inverse = 1 / (g11 * g22 - g12 * g12 + DETERMINANT_FLOOR)
    return torch.stack([(g11 * h2 - g12 * h1) * inverse, (g22 * h1 - g12 * h2) * inverse], dim=-3)


def farneback_cv2(prev: Tensor, next: Tensor, **parameters: Any) -> Tensor:
    """OpenCV itself, pair after pair on the calling thread."""
    return _opencv(prev, next, threads=1, **parameters)


def farneback_cpu(prev: Tensor, next: Tensor, **parameters: Any) -> Tensor:
    """OpenCV over a pool of threads: it holds no lock while it works on a pair. The workers of a
    `DataLoader` have one PyTorch thread each, and therefore start no pool."""
    return _opencv(prev, next, threads=torch.get_num_threads(), **parameters)


def _opencv(prev: Tensor, next: Tensor, *, threads: int, **parameters: Any) -> Tensor:
    if torch.compiler.is_compiling():
        torch._dynamo.graph_break()  # a decorator would import the compiler with this file
    import cv2

    *batch, height, width = prev.shape
    pairs = math.prod(batch)
    first = prev.reshape(pairs, height, width).float().contiguous().numpy()
    second = next.reshape(pairs, height, width).float().contiguous().numpy()
    flow = torch.empty(pairs, height, width, 2)
    out = flow.numpy()

    def one(pair: int) -> None:
        cv2.calcOpticalFlowFarneback(first[pair], second[pair], out[pair], **parameters, flags=0)

    for_each(one, pairs, threads)
    return flow.permute(0, 3, 1, 2).contiguous().view(*batch, 2, height, width)


def opencv_patch_means(prev: np.ndarray, next: np.ndarray, rows: int, columns: int) -> np.ndarray:
    """Mean vectors [rows, columns, 2] of the published flow between two grey float32 images, taken
    while the flow is in cache."""
    import cv2

    parameters: dict[str, Any] = {**PUBLISHED, "flags": 0}
    flow = cv2.calcOpticalFlowFarneback(prev, next, None, **parameters)  # type: ignore[call-overload]
    return cv2.resize(flow, (columns, rows), interpolation=cv2.INTER_AREA)


def for_each(work: Callable[[int], None], count: int, threads: int) -> None:
    """work(0) .. work(count - 1) over a pool, for work that holds no lock most of the time."""
    if threads > 1 and count > 1:
        with ThreadPoolExecutor(min(threads, count)) as pool:
            list(pool.map(work, range(count)))  # the list re-raises what a thread raised
    else:
        for i in range(count):
            work(i)


def farneback_cv2_cuda(
    prev: Tensor,
    next: Tensor,
    *,
    pyr_scale: float,
    levels: int,
    winsize: int,
    iterations: int,
    poly_n: int,
    poly_sigma: float,
) -> Tensor:
    """The CUDA class of an OpenCV that was built with it: for comparisons, never chosen by "auto".

    Pair after pair, through host memory and with a wait for each result. It is another
    implementation than OpenCV's CPU code, which defines the flow here, and its results differ.
    """
    import cv2

    *batch, height, width = prev.shape
    pairs = [image.reshape(-1, height, width).float().cpu().numpy() for image in (prev, next)]
    cuda: Any = cv2.cuda
    solver = cuda.FarnebackOpticalFlow_create(
        levels, pyr_scale, False, winsize, iterations, poly_n, poly_sigma, 0
    )
    flow = torch.empty(math.prod(batch), height, width, 2)
    for out, *frames in zip(flow, *pairs, strict=True):
        uploaded = [cuda.GpuMat() for _ in frames]
        for matrix, frame in zip(uploaded, frames, strict=True):
            matrix.upload(frame)
        out.copy_(torch.from_numpy(solver.calc(*uploaded, None).download()))
    return flow.movedim(-1, 1).reshape(*batch, 2, height, width).to(prev.device)


def _farneback_triton(prev: Tensor, next: Tensor, **parameters: Any) -> Tensor:
    from timefast.kernels.farneback_triton import farneback_triton

    return farneback_triton(prev, next, **parameters)


def why_not_triton(prev: Tensor, *others: Tensor, **parameters: Any) -> list[str]:
    reasons = []
    if prev.device.type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
        reasons.append(f"the input is on {prev.device}; triton takes CUDA")
    if min(prev.shape[-2:]) < 16:
        reasons.append(
            f"images are {prev.shape[-2]} x {prev.shape[-1]}; triton takes 16 x 16 and larger"
        )
    return reasons


def opencv_without_threads() -> None:
    """For a forked process: OpenCV on the calling thread alone.

    The number is 0, not 1: to shrink its pool to 1 OpenCV waits for the parent's threads, for ever.
    """
    import cv2

    cv2.setNumThreads(0)


def opencv_missing() -> list[str]:
    if importlib.util.find_spec("cv2") is None:
        return ["OpenCV is not installed; `pip install opencv-python-headless` provides it"]
    return []


def opencv_cuda_missing() -> list[str]:
    if reasons := opencv_missing():
        return reasons
    import cv2

    if not hasattr(cv2, "cuda") or not hasattr(cv2.cuda, "FarnebackOpticalFlow_create"):
        reasons.append(
            f"OpenCV {cv2.__version__} here has no cuda.FarnebackOpticalFlow; no package on PyPI "
            "has, it takes a build of opencv_contrib with WITH_CUDA=ON"
        )
    if not hasattr(cv2, "cuda") or not cv2.cuda.getCudaEnabledDeviceCount():
        reasons.append("OpenCV sees no CUDA device")
    return reasons


def _why_not_cv2_cuda(prev: Tensor, next: Tensor, *, poly_n: int, **parameters: Any) -> list[str]:
    return [] if poly_n in (5, 7) else [f"poly_n={poly_n}; OpenCV's CUDA class takes 5 and 7"]


def _why_not_cv2(prev: Tensor, next: Tensor, **parameters: Any) -> list[str]:
    return [] if prev.device.type == "cpu" else [f"prev is on {prev.device}; OpenCV takes CPU"]


def _why_not_cpu(prev: Tensor, next: Tensor, **parameters: Any) -> list[str]:
    reasons = _why_not_cv2(prev, next)
    if min(prev.shape[-2:]) < 2 * len(BORDER_WEIGHTS):
        reasons.append(
            f"images are {prev.shape[-2]} x {prev.shape[-1]}; under {2 * len(BORDER_WEIGHTS)} "
            "pixels OpenCV drops some border weights (an unsigned number wraps around)"
        )
    return reasons


def smooth_texture(
    batch: tuple[int, ...], height: int, width: int, generator: torch.Generator, device: str
) -> Tensor:
    """Random texture of standard deviation about 50, smooth over some four pixels."""
    noise = torch.randn(math.prod(batch), height, width, generator=generator, device=device)
    taps = tuple(math.exp(-((i - 6) ** 2) / 8) / 5.01 for i in range(13))
    smooth = _correlate(_correlate(noise, taps, -2), taps, -1)
    return (smooth * 350).view(*batch, height, width)


def _case(name: str, batch: tuple[int, ...], height: int, width: int, size: str, **kwargs: Any):
    def build(
        dtype: torch.dtype, device: str, generator: torch.Generator
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        prev = smooth_texture(batch, height, width, generator, device)
        return (prev.to(dtype), prev.roll((1, 2), dims=(-2, -1)).to(dtype)), dict(kwargs)

    return Case(name, build, size)


farneback_op = register(
    Op(
        name="farneback",
        reference=farneback_reference,
        impls={
            "triton": Impl(_farneback_triton, why_not_triton, triton_unavailable, auto=("cuda",)),
            "cpu": Impl(farneback_cpu, _why_not_cpu, opencv_missing, auto=("cpu",)),
            "cv2": Impl(farneback_cv2, _why_not_cv2, opencv_missing, auto=()),
            "cv2_cuda": Impl(farneback_cv2_cuda, _why_not_cv2_cuda, opencv_cuda_missing, auto=()),
        },
        cases=(
            _case("one-scale", (1,), 17, 19, "tiny", winsize=3, iterations=1, poly_n=2),
            _case("clip-112", (1, 7), 112, 112, "mid"),
        ),
    )
)
