"""The flow is OpenCV's: against stored results of OpenCV 5, and against the OpenCV installed."""

import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from torch.utils.data import DataLoader, Dataset

from timefast.kernels.farneback import (
    farneback,
    farneback_op,
    farneback_reference,
    pyramid,
    smooth_texture,
)
from timefast.kernels.flow_labels import flow_labels

GOLDEN = sorted((Path(__file__).parent / "golden").glob("farneback_*.safetensors"))
STATIC = ("identical", "object_-4_2")  # exactly static regions: floor() decides what is inside


def golden_pairs(path):
    with safe_open(path, "pt") as file:
        for name in json.loads(file.metadata()["names"]):
            prefix = f"{name}."
            keys = [key for key in file.keys() if key.startswith(prefix)]  # noqa: SIM118
            yield name, {key.removeprefix(prefix): file.get_tensor(key) for key in keys}


def assert_like_opencv(flow, expected, static=False):
    error = (flow - expected).norm(dim=-3)
    assert error.mean() <= 1e-5
    assert error.max() <= (0.1 if static else 1e-2)


def texture(height, width, seed=0, batch=()):
    return smooth_texture(batch, height, width, torch.Generator().manual_seed(seed), "cpu")


def shifted(height, width, dx, dy):
    """Two crops of one texture: the content moves by (dx, dy)."""
    big = texture(height + 2 * abs(dy), width + 2 * abs(dx))
    y, x = abs(dy), abs(dx)
    prev = big[y : y + height, x : x + width]
    return prev, big[y - dy : y - dy + height, x - dx : x - dx + width]


def turned(height, width, degrees):
    """A texture, and the same turned about its middle (from right to down)."""
    prev = texture(height, width)
    angle = torch.tensor(degrees).deg2rad()
    rotation = torch.stack([angle.cos(), angle.sin(), -angle.sin(), angle.cos()]).view(2, 2)
    half = torch.tensor([width / 2, height / 2])  # positions run from -1 to 1 on either axis
    places = torch.cat([rotation * half / half[:, None], torch.zeros(2, 1)], dim=1)
    grid = F.affine_grid(places[None], [1, 1, height, width], align_corners=False)
    after = F.grid_sample(prev[None, None], grid, padding_mode="reflection", align_corners=False)
    return prev, after[0, 0]


@pytest.mark.parametrize(
    ("impl", "device"),
    [
        ("reference", "cpu"),
        ("cpu", "cpu"),
        pytest.param("reference", "cuda", marks=pytest.mark.gpu),
        pytest.param("triton", "cuda", marks=pytest.mark.gpu),
    ],
)
@pytest.mark.parametrize("path", GOLDEN, ids=lambda path: path.stem)
def test_flow_equals_the_stored_flow_of_opencv(path, impl, device):
    for name, pair in golden_pairs(path):
        flow = farneback(pair["prev"].to(device), pair["next"].to(device), impl=impl).cpu()
        assert_like_opencv(flow, pair["flow"].permute(2, 0, 1), name in STATIC)
        if name in ("constant", "brightness_step"):
            assert not flow.any()


@settings(max_examples=25, deadline=None)
@given(
    height=st.integers(16, 75),
    width=st.integers(16, 75),
    pyr_scale=st.sampled_from([0.5, 0.6, 0.8]),
    levels=st.integers(0, 3),
    winsize=st.integers(5, 22),
    iterations=st.integers(1, 3),
    window=st.sampled_from([(5, 1.2), (7, 1.5), (5, 1.1), (3, 0.0)]),
    motion=st.sampled_from(["roll", (3, -1), (-2, 2), -5.0, 12.0]),  # pixels, degrees
    gain=st.sampled_from([0.02, 1.0, 4.0]),
    seed=st.integers(0, 9),
)
def test_reference_equals_the_installed_opencv(
    height, width, pyr_scale, levels, winsize, iterations, window, motion, gain, seed
):
    pytest.importorskip("cv2")
    if motion == "roll":
        prev = texture(height, width, seed)
        next = prev.roll((1, -2), dims=(0, 1)) + 3 * torch.randn(height, width)
    elif isinstance(motion, tuple):
        prev, next = shifted(height, width, *motion)
    else:
        prev, next = turned(height, width, motion)
    prev, next = prev * gain, next * gain
    parameters = {
        "pyr_scale": pyr_scale,
        "levels": levels,
        "winsize": winsize,
        "iterations": iterations,
        "poly_n": window[0],
        "poly_sigma": window[1],
    }
    expected = farneback(prev, next, **parameters, impl="cv2")
    assert_like_opencv(farneback(prev, next, **parameters, impl="reference"), expected)


@pytest.mark.parametrize(
    ("height", "width", "parameters"),
    [
        (16, 20, {}),
        (72, 64, {"winsize": 9, "levels": 1, "poly_n": 7, "poly_sigma": 1.5}),
        (97, 96, {"pyr_scale": 0.6, "levels": 5, "winsize": 21, "iterations": 2}),
        (65, 131, {"levels": 0}),
        (80, 48, {"winsize": 8}),
    ],
)
def test_every_parameter_means_what_it_means_in_opencv(height, width, parameters):
    pytest.importorskip("cv2")
    prev, next = shifted(height, width, 2, -1)
    expected = farneback(prev, next, **parameters, impl="cv2")
    flow = farneback(prev, next, **parameters, impl="reference")
    assert_like_opencv(flow, expected)
    if parameters:
        default = farneback(prev, next, impl="reference")
        assert (flow - default).abs().max() > 1e-3  # the parameter had an effect


@pytest.mark.slow
def test_a_full_hd_pair_has_the_flow_of_opencv():
    pytest.importorskip("cv2")
    prev, next = shifted(1080, 1920, 5, -3)
    expected = farneback(prev, next, impl="cv2")
    assert_like_opencv(farneback(prev, next, impl="reference"), expected)


def test_a_turned_texture_has_the_flow_of_a_rotation():
    flow = farneback(*turned(96, 128, 3.0), impl="cpu")
    y, x = torch.meshgrid(torch.arange(96) - 47.5, torch.arange(128) - 63.5, indexing="ij")
    expected = torch.stack([-y, x]) * torch.tensor(3.0).deg2rad()
    middle = (slice(None), slice(24, -24), slice(24, -24))
    assert (flow - expected)[middle].abs().mean() < 0.1 < expected[middle].abs().mean()


def test_scales_stop_before_a_side_falls_under_32_pixels():
    def sizes(*arguments):
        return [(s.height, s.width) for s in pyramid(*arguments)]

    assert sizes(224, 224, 0.5, 3) == [(56, 56), (112, 112), (224, 224)]
    assert sizes(64, 200, 0.5, 3) == [(32, 100), (64, 200)]
    assert sizes(63, 200, 0.5, 3) == [(63, 200)]
    assert sizes(97, 131, 0.5, 3) == [(48, 66), (97, 131)]  # halves round to even
    assert sizes(1080, 1920, 0.5, 3)[0] == (135, 240)


@pytest.mark.parametrize("impl", ["reference", "cpu"])
def test_a_batch_of_pairs_equals_its_single_pairs(impl):
    prev = texture(48, 66, batch=(2, 3))
    next = prev.roll((1, 2), dims=(-2, -1))
    flow = farneback(prev, next, impl=impl)
    assert flow.shape == (2, 3, 2, 48, 66)
    for i in range(2):
        for j in range(3):
            torch.testing.assert_close(
                flow[i, j], farneback(prev[i, j], next[i, j], impl=impl), rtol=0, atol=1e-6
            )


@pytest.mark.parametrize("impl", ["reference", "cpu"])
def test_a_shift_is_measured_in_pixels(impl):
    prev, next = shifted(112, 112, 3, -2)
    flow = farneback(prev, next, impl=impl)[:, 24:-24, 24:-24].mean((1, 2))
    torch.testing.assert_close(flow, torch.tensor([3.0, -2.0]), rtol=0, atol=0.1)


@pytest.mark.parametrize("size", [(64, 64), (97, 131)])
def test_constant_images_have_exactly_no_flow_in_the_reference(size):
    prev = torch.full(size, 100 / 3)
    assert not farneback(prev, prev, impl="reference").any()
    assert not farneback(prev, prev + 17.3, impl="reference").any()


def test_a_mirrored_pair_has_the_mirrored_flow():
    prev, next = shifted(64, 64, 2, 1)
    flow = farneback(prev, next, impl="reference")
    mirrored = farneback(prev.flip(-1), next.flip(-1), impl="reference")
    # The last column counts as outside and the first does not, so only the middle is symmetric.
    expected = (flow.flip(-1) * torch.tensor([-1.0, 1.0])[:, None, None])[:, 16:-16, 16:-16]
    torch.testing.assert_close(mirrored[:, 16:-16, 16:-16], expected, rtol=0, atol=1e-2)


def test_flow_ignores_an_offset_of_the_grey_values_and_vanishes_without_contrast():
    prev, next = shifted(64, 64, 2, 1)
    flow = farneback(prev, next, impl="reference")
    brighter = farneback(prev + 128, next + 128, impl="reference")
    torch.testing.assert_close(brighter, flow, rtol=0, atol=1e-2)
    assert farneback(prev / 255, next / 255, impl="reference").abs().mean() < 0.05


@pytest.mark.parametrize("impl", ["reference", "cpu"])
def test_any_real_dtype_and_any_strides_are_taken(impl):
    prev, next = ((x * 2 + 128).clamp(0, 255).byte() for x in shifted(40, 48, 1, 1))
    expected = farneback(prev.float(), next.float(), impl=impl)
    for dtype in (torch.uint8, torch.int32, torch.float64, torch.float16):
        assert torch.equal(farneback(prev.to(dtype), next.to(dtype), impl=impl), expected)
    columns = torch.stack([prev, next]).permute(2, 1, 0).contiguous().permute(2, 1, 0)
    assert torch.equal(farneback(columns[0], columns[1], impl=impl), expected)
    one = prev.float().expand(3, -1, -1)
    assert farneback(one, next.float().expand(3, -1, -1), impl=impl).shape == (3, 2, 40, 48)
    assert farneback(prev.float().requires_grad_(), next, impl=impl).requires_grad is False


@pytest.mark.parametrize("impl", ["reference", "cpu"])
def test_no_pairs_give_no_flow(impl):
    assert farneback(torch.zeros(0, 3, 32, 40), torch.zeros(0, 3, 32, 40), impl=impl).shape == (
        0,
        3,
        2,
        32,
        40,
    )


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"pyr_scale": 1.0}, "pyr_scale"),
        ({"levels": -1}, "levels"),
        ({"winsize": 1}, "winsize"),
        ({"iterations": 0}, "iterations"),
        ({"poly_n": 0}, "poly_n"),
        ({"poly_sigma": -1.0}, "poly_sigma"),
        ({"impl": "fastest"}, "fastest"),
    ],
)
def test_a_wrong_parameter_is_named(parameters, message):
    image = torch.zeros(32, 32)
    with pytest.raises(ValueError, match=message):
        farneback(image, image, **parameters)


def test_wrong_images_are_named():
    with pytest.raises(ValueError, match=r"next: expected \[32, 32\] like prev, got \[32, 31\]"):
        farneback(torch.zeros(32, 32), torch.zeros(32, 31))
    with pytest.raises(ValueError, match="prev: expected"):
        farneback(torch.zeros(32), torch.zeros(32))
    with pytest.raises(ValueError, match="complex"):
        farneback(torch.zeros(32, 32, dtype=torch.complex64), torch.zeros(32, 32))


def test_opencv_is_refused_where_its_border_weights_are_not_the_definition():
    small = texture(8, 40)
    with pytest.raises(NotImplementedError, match="8 x 40"):
        farneback(small, small, poly_n=3, impl="cpu")
    expected = farneback(small, small, poly_n=3, impl="reference")
    assert torch.equal(farneback(small, small, poly_n=3), expected)  # auto goes on to the reference


@pytest.mark.parametrize("impl", ["auto", "reference", "cpu", "cv2", "triton"])
def test_images_smaller_than_the_window_of_the_expansion_are_named(impl):
    small = torch.zeros(2, 10, 40)
    with pytest.raises(ValueError, match="10 x 40 are too small to expand: .* 11 x 11"):
        farneback(small, small, impl=impl)
    assert farneback(small, small, poly_n=4, impl="reference").shape == (2, 2, 10, 40)


class Pairs(Dataset):
    def __len__(self):
        return 4

    def __getitem__(self, index):
        prev = texture(48, 48, index, (3,))
        return prev, farneback(prev, prev.roll(1, dims=-1), impl="cpu")


def test_cpu_gives_the_same_inside_loader_workers_after_use_in_the_parent():
    here = [Pairs()[i][1] for i in range(4)]
    for i, (_, flow) in enumerate(DataLoader(Pairs(), num_workers=2, timeout=60)):
        assert torch.equal(flow[0], here[i])


def test_threads_do_not_change_the_flow(monkeypatch):
    prev = texture(48, 48, batch=(5,))
    next = prev.roll(1, dims=-1)
    one = farneback(prev, next, impl="cv2")
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    assert torch.equal(farneback(prev, next, impl="cpu"), one)


def test_the_reference_compiles_without_graph_breaks():
    prev = texture(40, 40, batch=(1,))
    parameters = {
        "pyr_scale": 0.5,
        "levels": 1,
        "winsize": 5,
        "iterations": 1,
        "poly_n": 3,
        "poly_sigma": 1.0,
    }
    compiled = torch.compile(farneback_reference, backend="eager", fullgraph=True)
    expected = farneback_reference(prev, prev.roll(1, dims=-1), **parameters)
    assert torch.equal(compiled(prev, prev.roll(1, dims=-1), **parameters), expected)


@pytest.mark.parametrize("case", farneback_op.cases, ids=lambda case: case.name)
def test_cases_have_inputs_that_move(case):
    (prev, next), parameters = case.build(torch.float32, "cpu", torch.Generator().manual_seed(0))
    expected = farneback(prev, next, **parameters, impl="reference")
    assert_like_opencv(farneback(prev, next, **parameters, impl="cpu"), expected)
    assert expected.abs().max() > 0.5


def test_the_cuda_class_of_opencv_is_refused_where_opencv_has_none():
    cv2 = pytest.importorskip("cv2")
    if hasattr(cv2.cuda, "FarnebackOpticalFlow_create"):
        pytest.skip("this OpenCV has it")
    image = texture(32, 32)
    with pytest.raises(NotImplementedError, match=r"no cuda.FarnebackOpticalFlow.*\n.*no CUDA dev"):
        farneback(image, image, impl="cv2_cuda")
    with pytest.raises(NotImplementedError, match=r"no cuda.FarnebackOpticalFlow"):
        flow_labels(torch.zeros(1, 3, 2, 32, 32), impl="cv2_cuda")


class StandInSolver:
    def calc(self, prev, next, flow):
        assert flow is None
        expected = cv2_flow(prev.frame, next.frame)
        return StandInMatrix(expected.movedim(0, -1).numpy())


class StandInMatrix:
    def __init__(self, frame=None):
        self.frame = frame

    def upload(self, frame):
        self.frame = frame

    def download(self):
        return self.frame


def cv2_flow(prev, next):
    return farneback(torch.from_numpy(prev), torch.from_numpy(next), impl="cv2")


def test_the_cuda_class_of_opencv_is_handed_each_pair(monkeypatch):
    cv2 = pytest.importorskip("cv2")
    arguments = []

    def create(*given):
        arguments.append(given)
        return StandInSolver()

    monkeypatch.setattr(cv2.cuda, "FarnebackOpticalFlow_create", create, raising=False)
    monkeypatch.setattr(cv2.cuda, "GpuMat", StandInMatrix)
    monkeypatch.setattr(cv2.cuda, "getCudaEnabledDeviceCount", lambda: 1)
    prev = texture(32, 40, batch=(2, 1))
    next = prev.roll(1, dims=-1)
    flow = farneback(prev, next, impl="cv2_cuda")
    assert arguments == [(3, 0.5, False, 15, 3, 5, 1.2, 0)]
    assert torch.equal(flow, farneback(prev, next, impl="cv2"))
    video = torch.stack([prev, next], dim=2).expand(2, 3, 2, 32, 40) / 128
    labels = flow_labels(video, patch_size=8, rule="tau", tau=0.5, impl="cv2_cuda")
    assert torch.equal(labels, flow_labels(video, patch_size=8, rule="tau", tau=0.5, impl="cv2"))
    assert labels.any()
    with pytest.raises(NotImplementedError, match="poly_n=3"):
        farneback(prev, next, poly_n=3, impl="cv2_cuda")
