"""The Triton kernels against the reference: in the interpreter on small images, without a GPU."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from test_farneback import GOLDEN, STATIC, assert_like_opencv, golden_pairs, shifted, turned
from test_flow_labels import marginal_patches
from torch._subclasses import FakeTensorMode

from timefast.kernels import farneback as farneback_module
from timefast.kernels.farneback import PUBLISHED, farneback, smooth_texture
from timefast.kernels.flow_labels import _labels, flow_labels, label_vectors

farneback_triton = pytest.importorskip(
    "timefast.kernels.farneback_triton", reason="Triton is not installed", exc_type=ImportError
)
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
ROOT = Path(__file__).parent.parent


def pair(height, width, batch=()):
    prev = smooth_texture(batch, height, width, torch.Generator().manual_seed(3), "cpu")
    return prev.to(DEVICE), prev.roll((1, -1), dims=(-2, -1)).to(DEVICE)


def small_video(clips, frames, height, width):
    generator = torch.Generator().manual_seed(5)
    frame = smooth_texture((clips, 3, 1), height, width, generator, "cpu") / 100
    moved = [frame.roll((t, 2 * t), dims=(-2, -1)) for t in range(frames)]
    return torch.cat(moved, dim=2).to(DEVICE)


@pytest.fixture(autouse=True)
def fewer_programs_in_the_interpreter(monkeypatch):
    if not torch.cuda.is_available():
        monkeypatch.setattr(farneback_triton, "TILE_ROWS", 16)


@pytest.fixture
def tiny_scales(monkeypatch):
    """Let small images have several scales: a scale may be 8 pixels high."""
    monkeypatch.setattr(farneback_module, "MINIMUM_SIDE", 8)


@pytest.fixture
def quick_labels(monkeypatch):
    """Fewer updates over a smaller box: the interpreter takes a minute for the published ones."""
    for name, value in {"winsize": 3, "iterations": 1, "poly_n": 2}.items():
        monkeypatch.setitem(PUBLISHED, name, value)


@pytest.mark.parametrize(
    ("height", "width", "parameters"),
    [
        # two tiles of columns, two updates, an even box
        (16, 66, {"winsize": 4, "iterations": 2, "poly_n": 3, "levels": 0}),
        # two tiles of rows, sizes that divide nothing, three scales of another ratio
        (17, 19, {"winsize": 3, "iterations": 1, "poly_sigma": 1.1, "pyr_scale": 0.7}),
    ],
)
def test_flow_equals_the_reference(height, width, parameters, tiny_scales):
    prev, next = (image.mul(2).round() for image in pair(height, width, batch=(1, 1)))
    expected = farneback(prev, next, **parameters, impl="reference")
    turned = next.half().transpose(-2, -1).contiguous().transpose(-2, -1)
    flow = farneback(prev.int(), turned, **parameters, impl="triton")
    assert flow.shape == (1, 1, 2, height, width)
    torch.testing.assert_close(flow, expected, rtol=0, atol=1e-4)
    assert expected.abs().max() > 0.3


def test_constant_images_stay_constant_at_every_scale_and_have_no_flow(tiny_scales):
    image = torch.full((16, 19), 100 / 3, device=DEVICE)
    for height, width, taps in farneback_module.pyramid(16, 19, 0.7, 3):
        shrunk = farneback_triton._shrunk(
            image.view(1, 1, 1, 16, 19), height, width, taps, (1.0, 0.0, 0.0, 0.0)
        )
        assert shrunk.unique().numel() == 1
    assert not farneback(image, image + 20, winsize=3, iterations=1, levels=0, impl="triton").any()


def test_labels_equal_the_reference(quick_labels, monkeypatch):
    monkeypatch.setattr(farneback_triton, "ROWS", 32)
    video = small_video(1, 3, 24, 36).transpose(-1, -2).contiguous().transpose(-1, -2)
    expected = flow_labels(video, patch_size=12, impl="reference")
    assert torch.equal(flow_labels(video, patch_size=12, impl="triton"), expected)
    assert expected.any()


def test_a_batch_gives_its_clips_labels_whole_and_in_parts(quick_labels, monkeypatch):
    options = {"patch_size": 8, "rule": "tau", "tau": 0.3, "std": (0.2, 0.3, 0.4)}
    video = small_video(2, 2, 16, 16)
    expected = flow_labels(video, **options, impl="reference")
    assert torch.equal(flow_labels(video, **options, impl="triton"), expected)
    monkeypatch.setattr(farneback_triton, "WORKSPACE", 1)
    assert torch.equal(flow_labels(video, **options, impl="triton"), expected)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # the interpreter divides by zero aloud
def test_constant_and_nan_frames_have_label_zero(quick_labels):
    video = torch.full((1, 3, 3, 16, 16), 1 / 3, device=DEVICE)
    video[:, :, 1] += 0.2
    video[:, :, 2] = small_video(1, 1, 16, 16)[:, :, 0]
    video[0, 1, 2, 3, 4] = float("nan")
    assert not flow_labels(video, patch_size=8, impl="triton").any()


class Recorder:
    """In place of a kernel: notes its launches."""

    def __init__(self, name, launches):
        self.name, self.launches = name, launches

    def __getitem__(self, grid):
        return lambda *args, **kwargs: self.launches.append((self.name, grid[0], kwargs))


@pytest.mark.parametrize("clips", [1, 64])
def test_labels_take_31_launches_one_expansion_a_frame_and_nothing_from_the_device(
    clips, monkeypatch
):
    """Tensors without data: reading one, as a wait for the device would, raises."""
    launches = []
    for name in [n for n in vars(farneback_triton) if n.endswith("_kernel")]:
        monkeypatch.setattr(farneback_triton, name, Recorder(name, launches))
    with FakeTensorMode():
        video = torch.empty(clips, 3, 8, 224, 224)
        vectors = video.new_empty((clips, 7, 2, 196))
        channels = (38.0, 75.0, 15.0, 0.0)
        farneback_triton._in_parts(video, vectors, channels=channels, patch_size=16, **PUBLISHED)
        farneback_triton.labelled(vectors.flatten(0, 1), None)
    assert len(launches) == 31
    assert launches[-2][0] == "_patch_means_kernel"  # no flow at full resolution
    tiles = [
        farneback_triton._tiles(side, side, farneback_triton.TILE_ROWS) for side in (56, 112, 224)
    ]
    expanded = [grid for name, grid, _ in launches if name == "_expand_columns_kernel"]
    assert expanded == [clips * 8 * n for n in tiles]
    assert sum(name == "_solve_kernel" for name, *_ in launches) == 3 * 3 - 1


def golden(names):
    """Stored pairs, name and tensors; all of them if `names` is None."""
    return [
        pytest.param(name, tensors, id=f"{path.stem}-{name}")
        for path in GOLDEN
        for name, tensors in golden_pairs(path)
        if names is None or name in names
    ]


def one_tile(monkeypatch, height, width):
    """The interpreter's time is a matter of the number of programs."""
    if not torch.cuda.is_available():
        sizes = {"ROWS": height, "TILE_ROWS": height, "COLS": width}
        for name, size in sizes.items():
            monkeypatch.setattr(farneback_triton, name, 1 << (size - 1).bit_length())


def check_golden(name, stored, flow):
    assert_like_opencv(flow, stored["flow"].permute(2, 0, 1), name in STATIC)
    if name in ("constant", "brightness_step"):
        assert not flow.any()
    for rule, tau in (("minmax", None), ("tau0.5", 0.5), ("tau1.0", 1.0)):
        if "patch_flow" not in stored or (name == "identical" and rule == "minmax"):
            continue
        labels = _labels(flow[None], 16, tau)[0]
        expected = stored[f"labels_{rule}"].long().flatten()
        decided = ~marginal_patches(stored["patch_flow"].permute(2, 0, 1).flatten(1), tau)
        assert torch.equal(labels[decided], expected[decided]), rule
        if name != "diag45_exact":  # the oracle's arctangent errs on exact diagonals
            assert torch.equal(labels, expected), rule


@pytest.mark.parametrize("name, stored", golden(["translate_-1.2_2.6"]))
def test_a_stored_pair_has_the_flow_and_labels_of_opencv(name, stored, monkeypatch):
    one_tile(monkeypatch, 64, 64)
    flow = farneback(stored["prev"].to(DEVICE), stored["next"].to(DEVICE), impl="triton")
    check_golden(name, stored, flow.cpu())


@pytest.mark.slow
@pytest.mark.parametrize("name, stored", golden(None))
def test_every_stored_pair_has_the_flow_and_labels_of_opencv(name, stored, monkeypatch):
    one_tile(monkeypatch, *stored["prev"].shape)
    flow = farneback(stored["prev"].to(DEVICE), stored["next"].to(DEVICE), impl="triton")
    check_golden(name, stored, flow.cpu())


@pytest.mark.slow
@pytest.mark.parametrize("name, stored", golden(["object_5_0_noise3", "rotate_-5deg"]))
def test_labels_without_flow_are_those_of_opencv(name, stored, monkeypatch):
    one_tile(monkeypatch, *stored["prev"].shape)
    pair = torch.stack([stored["prev"], stored["next"]]).to(DEVICE)
    video = pair.expand(1, 3, -1, -1, -1) / 128
    for rule in ("minmax", "tau0.5"):
        options = {"rule": "tau", "tau": 0.5} if rule == "tau0.5" else {}
        labels = flow_labels(video, **options, impl="triton")[0, 0].cpu()
        assert torch.equal(labels, stored[f"labels_{rule}"].long().flatten())


@pytest.mark.slow
@pytest.mark.parametrize(
    ("motion", "size", "parameters"),
    [
        ("turn", (16, 16), {}),
        ("turn", (47, 33), {"winsize": 9, "levels": 1, "poly_n": 7, "poly_sigma": 1.5}),
        ("shift", (67, 96), {"pyr_scale": 0.6, "levels": 5, "winsize": 21, "iterations": 2}),
        ("shift", (65, 131), {"levels": 0, "winsize": 8}),
        ("noise", (80, 48), {"pyr_scale": 0.8, "poly_n": 3, "poly_sigma": 0.0}),
        ("shift", (1080, 1920), {"iterations": 1}),
    ],
)
def test_flow_equals_the_installed_opencv(motion, size, parameters, monkeypatch):
    pytest.importorskip("cv2")
    one_tile(monkeypatch, min(size[0], 64), size[1])
    prev, next = shifted(*size, 2, -1) if motion == "shift" else turned(*size, degrees=4)
    if motion == "noise":
        next = next + 3 * torch.randn(next.shape, generator=torch.Generator().manual_seed(7))
    expected = farneback(prev, next, **parameters, impl="cv2")
    flow = farneback(prev.to(DEVICE), next.to(DEVICE), **parameters, impl="triton").cpu()
    assert_like_opencv(flow, expected)
    assert expected.abs().max() > 0.3


def test_no_clips_and_no_pairs_give_empty_results():
    empty = torch.zeros(0, 32, 32, device=DEVICE)
    assert farneback(empty, empty, impl="triton").shape == (0, 2, 32, 32)
    none = torch.zeros(0, 3, 2, 32, 32, device=DEVICE)
    assert flow_labels(none, impl="triton").shape == (0, 1, 4)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # the interpreter divides by zero aloud
@pytest.mark.parametrize("tau", [None, 0.0, 1.5])
@pytest.mark.parametrize("patches", [1, 5, 300])
def test_label_kernel_equals_the_reference_on_any_vector(tau, patches):
    vectors = torch.randn(6, 2, patches) * 2
    vectors[0] = 0
    vectors[1] = torch.tensor([1.0, 1.0])[:, None]
    vectors[2, 1] = -vectors[2, 0]
    vectors[3, :, -1] = float("nan")
    vectors[4] = vectors[4].round()
    vectors = vectors.to(DEVICE)
    assert torch.equal(farneback_triton.labelled(vectors, tau), label_vectors(vectors, tau))
    assert not farneback_triton.labelled(vectors, tau)[3].any()


def test_a_compiled_function_keeps_the_ops_whole(quick_labels):
    video = small_video(1, 2, 16, 16)

    def labels(impl):
        return flow_labels(video * 1.0, patch_size=16, rule="tau", tau=0.1, impl=impl)

    compiled = torch.compile(labels, backend="aot_eager", fullgraph=True)
    assert torch.equal(compiled("triton"), labels("reference"))


def test_fake_tensors_have_the_shapes_of_the_real_ones():
    with FakeTensorMode():
        image = torch.empty(2, 3, 32, 40, device=DEVICE)
        assert farneback(image, image, impl="triton").shape == (2, 3, 2, 32, 40)
        labels = flow_labels(torch.empty(2, 3, 4, 32, 48, device=DEVICE), impl="triton")
    assert (labels.shape, labels.dtype) == ((2, 3, 6), torch.int64)


def test_triton_is_refused_with_reasons(monkeypatch):
    small = torch.zeros(12, 40)
    with pytest.raises(NotImplementedError, match="16 x 16 and larger"):
        farneback(small, small, impl="triton")
    if not torch.cuda.is_available():
        monkeypatch.delenv("TRITON_INTERPRET")
        with pytest.raises(NotImplementedError, match="no CUDA device"):
            farneback(small, small, impl="triton")


def resources(*options):
    """What bench/compile_flow.py finds; a process that interprets Triton cannot compile it."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, "-W", "ignore", "-m", "bench.compile_flow", "--json", *options]
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def assert_they_fit(kernels):
    for kernel in kernels:
        assert kernel["spills"] == 0, kernel
        assert kernel["shared"] <= 163 * 1024, kernel  # what a block may have on sm_80


@pytest.mark.slow
def test_every_variant_compiles_for_sm_80_and_sm_90_without_spills():
    kernels = resources("--cc", "80", "90")
    assert {kernel["cc"] for kernel in kernels} == {80, 90}
    assert_they_fit(kernels)


@pytest.mark.gpu
def test_labels_run_on_a_side_stream_and_in_a_graph():
    video = small_video(2, 3, 64, 64)
    expected = flow_labels(video, impl="reference")
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        aside = flow_labels(video, impl="triton")
    torch.cuda.current_stream().wait_stream(stream)
    assert torch.equal(aside, expected)
    graph = torch.cuda.CUDAGraph()
    still = torch.zeros_like(video)
    with torch.cuda.graph(graph):
        captured = flow_labels(still, impl="triton")
    still.copy_(video)
    graph.replay()
    assert torch.equal(captured, expected)


@pytest.mark.gpu
def test_flow_and_labels_never_wait_for_the_device():
    video = small_video(2, 3, 64, 64)
    flow_labels(video, impl="triton")  # compiles
    farneback(video[:, 0, :-1], video[:, 0, 1:], impl="triton")
    torch.cuda.set_sync_debug_mode("error")
    try:
        flow_labels(video, impl="triton")
        farneback(video[:, 0, :-1], video[:, 0, 1:], impl="triton")
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
@pytest.mark.parametrize("size", [(16, 20), (97, 131), (224, 224), (1080, 1920)])
def test_flow_on_the_gpu_equals_opencv(size):
    pytest.importorskip("cv2")
    prev, next = pair(*size, batch=(2,))
    expected = farneback(prev.cpu(), next.cpu(), impl="cv2")
    error = (farneback(prev, next, impl="triton").cpu() - expected).norm(dim=1)
    assert error.mean() <= 1e-5
    assert error.max() <= 1e-2
