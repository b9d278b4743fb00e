"""The Triton kernels against the reference: in the interpreter on small images, without a GPU."""

import os

import pytest
import torch

from timefast.kernels import farneback as farneback_module
from timefast.kernels.farneback import PUBLISHED, farneback, smooth_texture
from timefast.kernels.flow_labels import flow_labels, label_vectors

pytest.importorskip("triton")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SMALL = {"winsize": 5, "iterations": 2, "poly_n": 3}


def pair(height, width, batch=()):
    prev = smooth_texture(batch, height, width, torch.Generator().manual_seed(3), "cpu")
    return prev.to(DEVICE), prev.roll((1, -1), dims=(-2, -1)).to(DEVICE)


def small_video(clips, frames, height, width):
    generator = torch.Generator().manual_seed(5)
    frame = smooth_texture((clips, 3, 1), height, width, generator, "cpu") / 100
    moved = [frame.roll((t, 2 * t), dims=(-2, -1)) for t in range(frames)]
    return torch.cat(moved, dim=2).to(DEVICE)


@pytest.fixture
def tiny_scales(monkeypatch):
    """Let small images have several scales: a scale may be 8 pixels high."""
    monkeypatch.setattr(farneback_module, "MINIMUM_SIDE", 8)


@pytest.fixture
def quick_labels(monkeypatch):
    """Fewer updates over a smaller box: the interpreter takes a minute for the published ones."""
    for name, value in {**SMALL, "iterations": 1}.items():
        monkeypatch.setitem(PUBLISHED, name, value)


@pytest.mark.parametrize(
    ("height", "width", "parameters"),
    [
        (16, 70, SMALL),  # two tiles of columns
        (19, 21, {"winsize": 6, "iterations": 1, "poly_n": 5, "poly_sigma": 1.1, "levels": 1}),
        (18, 16, {"winsize": 3, "iterations": 1, "poly_n": 1, "pyr_scale": 0.8, "levels": 2}),
    ],
)
def test_flow_equals_the_reference(height, width, parameters, tiny_scales):
    prev, next = pair(height, width)
    expected = farneback(prev, next, **parameters, impl="reference")
    flow = farneback(prev, next, **parameters, impl="triton")
    torch.testing.assert_close(flow, expected, rtol=0, atol=1e-4)
    assert expected.abs().max() > 0.3


def test_any_dtype_strides_and_leading_dimensions_are_taken():
    parameters = {**SMALL, "iterations": 1, "winsize": 3}
    prev, next = (image.mul(2).round() for image in pair(16, 16, batch=(1, 2)))
    expected = farneback(prev, next, **parameters, impl="reference")
    turned = next.half().transpose(-2, -1).contiguous().transpose(-2, -1)
    flow = farneback(prev.int(), turned, **parameters, impl="triton")
    assert flow.shape == (1, 2, 2, 16, 16)
    torch.testing.assert_close(flow, expected, rtol=0, atol=1e-4)


def test_constant_images_have_exactly_no_flow(tiny_scales):
    image = torch.full((17, 19), 100 / 3, device=DEVICE)
    assert not farneback(image, image + 20, **SMALL, impl="triton").any()


@pytest.mark.parametrize("options", [{}, {"rule": "tau", "tau": 0.3, "patch_size": 12}])
def test_labels_equal_the_reference(options, quick_labels):
    video = small_video(1, 3, 24, 48).transpose(-1, -2).contiguous().transpose(-1, -2)
    options = {"patch_size": 8, **options}
    expected = flow_labels(video, **options, impl="reference")
    assert torch.equal(flow_labels(video, **options, impl="triton"), expected)
    assert expected.any()


def test_parts_of_a_batch_give_what_the_whole_gives(quick_labels, monkeypatch):
    from timefast.kernels import farneback_triton

    video = small_video(3, 2, 16, 16)
    whole = flow_labels(video, impl="reference", patch_size=8)
    monkeypatch.setattr(farneback_triton, "WORKSPACE", 1)
    assert torch.equal(flow_labels(video, impl="triton", patch_size=8), whole)


def test_no_clips_and_no_pairs_launch_nothing():
    empty = torch.zeros(0, 32, 32, device=DEVICE)
    assert farneback(empty, empty, impl="triton").shape == (0, 2, 32, 32)
    one = torch.zeros(2, 3, 1, 32, 32, device=DEVICE)
    assert flow_labels(one, impl="triton").shape == (2, 0, 4)


@pytest.mark.parametrize("tau", [None, 0.0, 1.5])
@pytest.mark.parametrize("patches", [1, 5, 300])
def test_label_kernel_equals_the_reference_on_any_vector(tau, patches):
    from timefast.kernels.farneback_triton import labelled

    vectors = torch.randn(6, 2, patches) * 2
    vectors[0] = 0
    vectors[1] = torch.tensor([1.0, 1.0])[:, None]
    vectors[2, 1] = -vectors[2, 0]
    vectors[3, :, -1] = float("nan")
    vectors[4] = vectors[4].round()
    vectors = vectors.to(DEVICE)
    assert torch.equal(labelled(vectors, tau), label_vectors(vectors, tau))
    assert not labelled(vectors, tau)[3].any()


def test_a_compiled_function_keeps_the_ops_whole(quick_labels):
    video = small_video(1, 2, 16, 16)

    def labels(video):
        return flow_labels(video * 1.0, patch_size=16, rule="tau", tau=0.1, impl="triton")

    compiled = torch.compile(labels, backend="aot_eager", fullgraph=True)
    assert torch.equal(compiled(video), labels(video))


def test_fake_tensors_have_the_shapes_of_the_real_ones():
    from torch._subclasses import FakeTensorMode

    with FakeTensorMode():
        image = torch.empty(2, 3, 32, 40, device=DEVICE)
        assert farneback(image, image, impl="triton").shape == (2, 3, 2, 32, 40)
        labels = flow_labels(torch.empty(2, 3, 4, 32, 48, device=DEVICE), impl="triton")
    assert (labels.shape, labels.dtype) == ((2, 3, 6), torch.int64)


def test_triton_is_refused_with_reasons(monkeypatch):
    small = torch.zeros(8, 40)
    with pytest.raises(NotImplementedError, match="16 x 16 and larger"):
        farneback(small, small, impl="triton")
    if DEVICE == "cpu":
        monkeypatch.delenv("TRITON_INTERPRET")
        with pytest.raises(NotImplementedError, match="no CUDA device"):
            farneback(small, small, impl="triton")
