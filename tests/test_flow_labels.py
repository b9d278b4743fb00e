"""Nine-way labels: against stored labels, and by what each rule promises."""

import json
import math
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open

from timefast.kernels.farneback import farneback_reference, smooth_texture
from timefast.kernels.flow_labels import (
    LUMA,
    PUBLISHED,
    _labels,
    flow_labels,
    flow_labels_op,
    grey,
    grey_channels,
    label_vectors,
)

GOLDEN = sorted((Path(__file__).parent / "golden").glob("farneback_*.safetensors"))
IMPLS = ["reference", "cpu", "cv2"]
MIRROR = torch.tensor([0, 4, 3, 2, 1, 8, 7, 6, 5])  # octant after dx -> -dx, away from borders


def golden_pairs(path):
    with safe_open(path, "pt") as file:
        for name in json.loads(file.metadata()["names"]):
            prefix = f"{name}."
            keys = [key for key in file.keys() if key.startswith(prefix)]  # noqa: SIM118
            yield name, {key.removeprefix(prefix): file.get_tensor(key) for key in keys}


def marginal_patches(vectors, tau):
    """[2, N] mean vectors -> patches where rounding may decide the label."""
    dx, dy = vectors.double()
    radius = torch.hypot(dx, dy)
    from_border = torch.atan2(dy, dx).rad2deg().remainder(45)
    marginal = torch.minimum(from_border, 45 - from_border) < 0.02
    if tau is None:
        extent = radius.max() - radius.min()
        return marginal | ((100 * (radius - radius.min()) / extent - 1).abs() < 0.02)
    return marginal | ((radius - tau).abs() < 1e-3)


def moving_video(dx, dy, frames=3, size=64, clips=1):
    """Normalised colour texture whose content moves by (dx, dy) each frame."""
    margin = frames * max(abs(dx), abs(dy))
    generator = torch.Generator().manual_seed(1)
    big = smooth_texture((clips, 3), size + 2 * margin, size + 2 * margin, generator, "cpu") / 100
    crops = []
    for t in range(frames):
        y, x = margin - t * dy, margin - t * dx
        crops.append(big[..., y : y + size, x : x + size])
    return torch.stack(crops, dim=2)  # [B, 3, T, height, width]


@pytest.mark.parametrize("path", GOLDEN, ids=lambda path: path.stem)
def test_labels_equal_the_stored_labels(path):
    equal, total = 0, 0
    for name, pair in golden_pairs(path):
        if "patch_flow" not in pair:
            continue
        flow = farneback_reference(pair["prev"], pair["next"], **PUBLISHED)
        for rule, tau in (("minmax", None), ("tau0.5", 0.5), ("tau1.0", 1.0)):
            if name == "identical" and rule == "minmax":
                continue
            labels = _labels(flow[None], 16, tau)[0]
            expected = pair[f"labels_{rule}"].long().flatten()
            vectors = pair["patch_flow"].permute(2, 0, 1).flatten(1)
            decided = ~marginal_patches(vectors, tau)
            assert torch.equal(labels[decided], expected[decided]), (name, rule)
            if name != "diag45_exact":  # the oracle's arctangent errs on exact diagonals
                equal += (labels == expected).sum().item()
                total += labels.numel()
    assert equal == total


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize(
    ("dx", "dy", "label"),
    [
        (3, 1, 1), (1, 3, 2), (-1, 3, 3), (-3, 1, 4),
        (-3, -1, 5), (-1, -3, 6), (1, -3, 7), (3, -1, 8),
    ],
)  # fmt: skip
def test_a_translated_video_has_the_octant_of_its_motion(dx, dy, label, impl):
    video = moving_video(dx, dy)
    labels = flow_labels(video, rule="tau", tau=0.5, impl=impl)
    assert labels.dtype == torch.int64
    assert labels.shape == (1, 2, 16)
    assert (labels == label).float().mean() > 0.9


def test_a_mirrored_video_has_mirrored_labels():
    video = moving_video(3, 1)
    labels = flow_labels(video, rule="tau", tau=0.5).view(2, 4, 4)
    mirrored = flow_labels(video.flip(-1), rule="tau", tau=0.5).view(2, 4, 4)
    assert (mirrored == MIRROR[labels.flip(-1)]).float().mean() > 0.9


@given(
    st.lists(
        st.tuples(st.floats(-20, 20, width=32), st.floats(-20, 20, width=32)),
        min_size=1,
        max_size=9,
    )
)
@settings(max_examples=100, deadline=None)
def test_octants_equal_the_exact_angle(pairs):
    labels = label_vectors(torch.tensor(pairs).T, tau=0.0)
    for (dx, dy), label in zip(pairs, labels.tolist(), strict=True):
        angle = math.degrees(math.atan2(dy, dx)) % 360
        if min(angle % 45, 45 - angle % 45) > 1e-9:
            assert label == int(angle // 45) + 1


def test_angles_exactly_on_a_border_belong_to_the_octant_that_starts_there():
    vectors = torch.tensor(
        [(1, 0), (1, 1), (0, 1), (-1, 1), (-1, 0), (-1, -1), (0, -1), (1, -1)], dtype=torch.float32
    )
    assert label_vectors(vectors.T, tau=0.5).tolist() == [1, 2, 3, 4, 5, 6, 7, 8]
    # just under a full turn
    assert label_vectors(torch.tensor([[1.0], [-1e-30]]), tau=0.5).tolist() == [8]
    assert label_vectors(torch.zeros(2, 1), tau=0.0).tolist() == [1]
    assert label_vectors(torch.tensor([[1.0], [-0.0]]), tau=0.5).tolist() == [1]


def test_tau_is_the_smallest_radius_that_moves():
    vectors = torch.tensor([[0.5, 0.3, 0.2999], [0.0, 0.4, 0.4]])
    assert label_vectors(vectors, tau=0.5).tolist() == [1, 2, 0]


def test_minmax_counts_motion_from_one_percent_of_the_range():
    radius = torch.tensor([2.0, 2.99, 3.0, 102.0])
    vectors = torch.stack([radius, torch.zeros(4)])
    assert label_vectors(vectors, tau=None).tolist() == [0, 0, 1, 1]


@pytest.mark.parametrize("tau", [None, 0.5])
def test_one_undefined_patch_leaves_a_pair_without_labels_and_other_pairs_alone(tau):
    vectors = torch.tensor([[[1.0, 2.0, 9.0], [1.0, 2.0, 9.0]]]).repeat(2, 1, 1)
    vectors[0, 1, 0] = float("nan")
    labels = label_vectors(vectors, tau)
    assert not labels[0].any()
    assert labels[1].any()


def test_minmax_keeps_the_slowest_patch_still_and_tau_does_not():
    video = moving_video(3, 1)
    assert (flow_labels(video) == 0).any(dim=-1).all()
    assert (flow_labels(video, rule="tau", tau=0.5) > 0).all()


@pytest.mark.parametrize("impl", IMPLS)
def test_constant_frames_and_brightness_steps_have_label_zero(impl):
    video = torch.full((2, 3, 4, 48, 64), 1 / 3)
    video[:, :, 2:] += 0.2
    assert not flow_labels(video, impl=impl).any()
    assert not flow_labels(video, rule="tau", tau=0.1, impl=impl).any()


def test_an_unchanged_video_is_still_under_tau():
    video = moving_video(3, 1)[:, :, :1].expand(-1, -1, 3, -1, -1)
    assert not flow_labels(video, rule="tau", tau=0.5).any()


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("rule", [{}, {"rule": "tau", "tau": 0.5}], ids=["minmax", "tau"])
def test_a_nan_frame_zeroes_its_pairs_and_no_other(rule, impl):
    video = moving_video(3, 1, frames=4)
    clean = flow_labels(video, **rule, impl=impl)
    video[0, 1, 3, 20, 30] = float("nan")
    labels = flow_labels(video, **rule, impl=impl)
    assert torch.equal(labels[:, :2], clean[:, :2])
    assert not labels[:, 2].any()


@pytest.mark.parametrize("impl", IMPLS)
def test_no_clips_give_empty_labels(impl):
    labels = flow_labels(torch.zeros(0, 3, 4, 32, 48), impl=impl)
    assert (labels.shape, labels.dtype) == ((0, 3, 6), torch.int64)


def test_labels_do_not_depend_on_the_normalisation():
    video = moving_video(2, -1)
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    shape = (1, 3, 1, 1, 1)
    frames = video * 0.5 + 0.5
    other = (frames - torch.tensor(mean).view(shape)) / torch.tensor(std).view(shape)
    rule = {"rule": "tau", "tau": 1.0}
    assert torch.equal(flow_labels(other, mean=mean, std=std, **rule), flow_labels(video, **rule))
    torch.testing.assert_close(
        grey(other, grey_channels(other.dtype, mean, std)),
        sum(luma * video[:, c] for c, luma in enumerate(LUMA)) * 128,
        rtol=0,
        atol=1e-4,
    )


def test_threads_do_not_change_the_labels(monkeypatch):
    video = moving_video(2, -1, frames=4, clips=2)
    one = flow_labels(video, impl="cv2")
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    assert torch.equal(flow_labels(video, impl="cpu"), one)
    assert torch.equal(one, flow_labels(video, impl="reference"))


def test_uint8_frames_are_the_unnormalised_video():
    frames = (moving_video(2, -1).mul(60).add(128)).clamp(0, 255).byte()
    normalised = (frames.float() / 255 - 0.5) / 0.5
    assert torch.equal(flow_labels(frames), flow_labels(normalised))


def test_labels_take_any_strides_and_carry_no_gradient():
    video = moving_video(3, 1, clips=2)
    expected = flow_labels(video)
    assert torch.equal(flow_labels(video.permute(4, 0, 2, 3, 1).contiguous().permute(1, 4, 2, 3, 0)), expected)  # fmt: skip  # noqa: E501
    assert torch.equal(flow_labels(video.clone().requires_grad_()), expected)
    assert torch.equal(flow_labels(video.double()), expected)
    assert torch.equal(flow_labels(video[1:]), expected[1:])


def test_patches_are_numbered_row_by_row():
    still = moving_video(3, 1, frames=1, size=64)[:, :, 0]
    after = still.clone()
    after[..., 16:32, 32:64] = still[..., 16:32, 30:62]
    labels = flow_labels(torch.stack([still, after], dim=2), rule="tau", tau=0.6)[0, 0]
    assert set(labels.nonzero().flatten().tolist()) >= {6, 7}
    assert not labels[8:].reshape(2, 4)[1].any()


@pytest.mark.parametrize(
    ("shape", "options", "message"),
    [
        ((1, 3, 2, 40, 48), {}, "multiples of patch_size=16, got 40 x 48"),
        ((1, 4, 2, 32, 32), {}, "expected \\[B, 3, T"),
        ((3, 2, 32, 32), {}, "expected \\[B, 3, T"),
        ((1, 3, 1, 32, 32), {}, "two or more frames.* got T = 1"),
        ((1, 3, 0, 32, 32), {}, "two or more frames.* got T = 0"),
        ((1, 3, 2, 8, 32), {"patch_size": 8}, "8 x 32 are too small to expand"),
        ((1, 3, 2, 32, 32), {"rule": "tau"}, "needs a threshold"),
        ((1, 3, 2, 32, 32), {"tau": 0.5}, "no threshold"),
        ((1, 3, 2, 32, 32), {"rule": "tau", "tau": -1.0}, "0 or more"),
        ((1, 3, 2, 32, 32), {"rule": "max"}, "max"),
        ((1, 3, 2, 32, 32), {"mean": (0.5,)}, "three numbers"),
        ((1, 3, 2, 32, 32), {"impl": "gpu"}, "gpu"),
    ],
)
def test_wrong_arguments_are_named(shape, options, message):
    with pytest.raises(ValueError, match=message):
        flow_labels(torch.zeros(shape), **options)


def test_integer_videos_other_than_uint8_are_refused():
    with pytest.raises(ValueError, match="int32"):
        flow_labels(torch.zeros(1, 3, 2, 32, 32, dtype=torch.int32))


@pytest.mark.parametrize("case", flow_labels_op.cases, ids=lambda case: case.name)
def test_all_implementations_agree_on_the_cases(case):
    if case.size == "paper":
        pytest.skip("for GPUs")
    (video,), options = case.build(torch.float32, "cpu", torch.Generator().manual_seed(0))
    expected = flow_labels(video, **options, impl="reference")
    for impl in ("cpu", "cv2"):
        different = flow_labels(video, **options, impl=impl) != expected
        assert different.sum() <= 0.005 * expected.numel()
    assert expected.any()


def test_the_help_tells_rules_and_implementations():
    words = flow_labels.__doc__
    assert "see above" not in words
    assert all(f'"{name}"' in words for name in ("auto", *flow_labels_op.all_impls()))
