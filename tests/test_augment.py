"""RandAugment, resize and crop: the same for all frames of a clip, and what the formulas say."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from timefast.data.augment import (
    ENHANCE,
    GEOMETRY,
    OPS,
    Augmentation,
    apply_augmentations,
    draw_rand_augment,
    jittered_short_side,
    parse_rand_augment,
    random_crop,
    resize_crop,
    resized,
    view_crop,
)
from timefast.data.batch import ClipSpec
from timefast.errors import InputError

PUBLISHED = "rand-m20-mstd0.5-inc1"
GREY = (128, 128, 128)
BILINEAR = Image.Resampling.BILINEAR


def picture(height=24, width=32, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def augment(name, level=1.0, frame=None):
    frame = picture() if frame is None else frame
    return apply_augmentations(frame[None], [Augmentation(name, level, BILINEAR)], GREY)[0]


# -- RandAugment


def test_all_frames_of_a_clip_get_the_same_operations():
    clip = np.repeat(picture()[None], 5, axis=0)
    changed = 0
    for seed in range(60):
        drawn = draw_rand_augment(PUBLISHED, np.random.default_rng(seed))
        result = apply_augmentations(clip, drawn, GREY)
        assert (result == result[0]).all()
        changed += bool((result != clip).any())
    assert changed > 15


def test_published_magnitude_is_always_full_strength():
    for seed in range(200):
        for drawn in draw_rand_augment(PUBLISHED, np.random.default_rng(seed)):
            assert abs(drawn.level) == 1


def test_half_of_the_clips_stay_and_the_others_get_two_operations_of_all_kinds():
    draws = [draw_rand_augment(PUBLISHED, np.random.default_rng(seed)) for seed in range(1000)]
    assert {len(d) for d in draws} == {0, 2}
    assert 430 < sum(not d for d in draws) < 570
    assert {a.name for d in draws for a in d} == set(OPS)
    for name in (*GEOMETRY, *ENHANCE):
        levels = {a.level for d in draws for a in d if a.name == name}
        assert min(levels) < 0 < max(levels)


def test_smaller_magnitudes_vary_with_the_noise():
    rngs = (np.random.default_rng(seed) for seed in range(100))
    levels = {
        abs(a.level) for rng in rngs for a in draw_rand_augment("rand-m5-mstd0.5-inc1-n3", rng)
    }
    assert len(levels) > 50 and 0.2 < min(levels) < max(levels) < 0.8


def test_operations_at_full_strength_do_what_the_recipe_lists():
    frame = picture()
    assert (augment("Posterize") == 0).all()  # no bits left
    assert (augment("Solarize") == 255 - frame).all()  # threshold 0
    assert (augment("Invert") == 255 - frame).all()
    add = np.where(frame < 128, np.minimum(frame.astype(int) + 110, 255), frame)
    assert (augment("SolarizeAdd") == add).all()
    assert np.abs(augment("Brightness", -1.0) - frame * 0.1).max() <= 1
    assert np.abs(augment("Brightness", 1.0) - np.minimum(frame * 1.9, 255)).max() <= 1
    shift = 0.45 * frame.shape[1]  # 14.4 of 32 pixels, to the left
    moved = augment("TranslateXRel")
    assert (moved[:, int(32 - shift) + 1 :] == 128).all()
    turned = augment("Rotate", frame=np.zeros((40, 40, 3), np.uint8))
    assert (turned[0, 0] == 128).all() and (turned[20, 20] == 0).all()


def test_level_zero_changes_nothing_where_there_is_a_direction():
    for name in (*GEOMETRY, *ENHANCE):
        assert (augment(name, 0.0) == picture()).all()


@pytest.mark.parametrize("name", OPS)
def test_every_operation_keeps_shape_and_type(name):
    result = augment(name, frame=picture(17, 23))
    assert result.shape == (17, 23, 3) and result.dtype == np.uint8


def test_notation_is_checked():
    assert parse_rand_augment(PUBLISHED) == (20.0, 0.5, 2)
    assert parse_rand_augment("rand-m9-inc1-n3") == (9.0, 0.0, 3)
    for wrong in ("rand", "rand-m9", "auto-m9-inc1", "rand-m9-inc0", "rand-m..-inc1"):
        with pytest.raises(InputError, match="RandAugment"):
            parse_rand_augment(wrong)


# -- resize and crop


@settings(max_examples=30, deadline=None)
@given(
    height=st.integers(2, 40),
    width=st.integers(2, 40),
    tall=st.integers(8, 60),
    wide=st.integers(8, 60),
    data=st.data(),
)
def test_resize_crop_equals_interpolating_everything_and_cutting(height, width, tall, wide, data):
    frames = np.stack([picture(height, width, seed) for seed in range(2)])
    spec = ClipSpec(crop=8, mean=(0.5, 0.4, 0.3), std=(0.5, 0.25, 0.2))
    top = data.draw(st.integers(0, tall - 8))
    left = data.draw(st.integers(0, wide - 8))
    got = resize_crop(frames, (tall, wide), top, left, spec)
    whole = torch.from_numpy(frames).permute(0, 3, 1, 2).double() / 255
    whole = torch.nn.functional.interpolate(
        whole, (tall, wide), mode="bilinear", align_corners=False
    )
    cut = whole[:, :, top : top + 8, left : left + 8]
    mean, std = (torch.tensor(v).view(3, 1, 1).double() for v in (spec.mean, spec.std))
    expected = ((cut - mean) / std).transpose(0, 1)
    assert got.shape == (3, 2, 8, 8) and got.dtype == torch.float32
    assert torch.allclose(got.double(), expected, atol=2e-5)


def test_full_size_crop_is_only_normalised():
    frames = picture(16, 16)[None]
    got = resize_crop(frames, (16, 16), 0, 0, ClipSpec(crop=16))
    expected = torch.from_numpy(frames[0]).permute(2, 0, 1) / 127.5 - 1
    assert torch.allclose(got[:, 0], expected, atol=1e-6)


def test_wide_panorama_costs_no_memory():
    frames = np.zeros((1, 4, 4000, 3), np.uint8)
    size = resized(4, 4000, 256)
    assert size == (256, 256_000)
    assert resize_crop(frames, size, 0, 1000, ClipSpec()).shape == (3, 1, 224, 224)


def test_jitter_is_uniform_in_one_over_size():
    rng = np.random.default_rng(0)
    sizes = np.array([jittered_short_side(256, 320, rng) for _ in range(4000)])
    assert sizes.min() == 256 and sizes.max() == 320
    middle = 2 / (1 / 256 + 1 / 320)  # half of the draws lie below the harmonic mean
    assert abs((sizes < middle).mean() - 0.5) < 0.03


@settings(max_examples=100, deadline=None)
@given(height=st.integers(8, 40), width=st.integers(8, 40), seed=st.integers(0, 20))
def test_random_crop_lies_inside_and_never_at_the_last_offset(height, width, seed):
    for offset, room in zip(
        random_crop(height, width, 8, np.random.default_rng(seed)),
        (height - 8, width - 8),
        strict=True,
    ):
        assert 0 <= offset < max(room, 1)


def test_long_side_is_rounded_down():
    assert resized(240, 427, 256) == (256, 455)
    assert resized(427, 240, 256) == (455, 256)
    assert resized(100, 100, 64) == (64, 64)


def test_three_crops_are_both_ends_and_the_middle_of_the_long_side():
    crops = [view_crop(224, 301, 224, view, 3) for view in range(3)]
    assert crops == [(0, 0), (0, 39), (0, 77)]  # ceil(77 / 2)
    assert [view_crop(301, 224, 224, view, 3) for view in range(3)] == [(0, 0), (39, 0), (77, 0)]
    assert view_crop(224, 301, 224, 0, 1) == (0, 39)
    for view, views in ((3, 3), (0, 2)):
        with pytest.raises(ValueError):
            view_crop(224, 301, 224, view, views)


def test_normalisation_follows_the_spec():
    frames = np.full((1, 4, 4, 3), 255, np.uint8)
    spec = replace(ClipSpec(crop=4), mean=(0.45,) * 3, std=(0.225,) * 3)
    assert torch.allclose(resize_crop(frames, (4, 4), 0, 0, spec), torch.tensor(0.55 / 0.225))
