"""What is special to Motionformer; tests/test_models.py has what every backbone promises, and
tests/test_models_golden.py the published values."""

import pytest
import test_models_golden as published
import torch
from golden_rule import read_golden
from test_models import SMALL, clip, small

from timefast import create_model, load_model, ops
from timefast.errors import InputError
from timefast.models import motionformer
from timefast.models.motionformer import choose_landmarks, class_attention, orthoformer
from timefast.models.vit import settled

ATTENTION = ["trajectory", "joint", "divided"]


def test_orthoformer_is_the_published_one(monkeypatch):
    """All values of the golden file, from the first landmarks that the published code drew."""
    name = "time_motionformer_orthoformer_t4"
    first, load = read_golden(name)[0]["ortho/first_index"], published.load

    def load_with_first(state, config):
        model = load(state, config)
        for block, index in zip(model.blocks, first, strict=True):
            # one pass over the clips and their shuffled frames: twice the clips in the golden file
            block.attn.first_landmark = lambda q, i=index: i.repeat(len(q) // len(i), 1)
        return model

    monkeypatch.setattr(published, "load", load_with_first)
    published.test_features_and_outputs_of_time(name)
    published.test_losses_and_gradients_of_time(name, 0.0)
    published.test_losses_and_gradients_of_time(name, 0.2)


def test_with_all_patches_as_landmarks_order_and_number_do_not_matter():
    q, k, v = torch.randn(3, 2, 2, 3, 2, 16).unbind(0)  # [B, T, N, H, D]
    a = orthoformer(q, k, v, 6, torch.zeros(2, 2, dtype=torch.long))
    b = orthoformer(q, k, v, 128, torch.full((2, 2), 5))
    torch.testing.assert_close(a, b)
    assert a.shape == (2, 2, 3, 2, 2, 16)


def test_landmarks_are_distinct_and_far_apart():
    rows = torch.eye(8)[torch.tensor([3, 3, 1, 6, 1, 0])][None, None]  # [1, 1, 6, 8]
    first = torch.tensor([[1]])
    assert choose_landmarks(rows, 4, first)[0, 0].tolist() == [1, 2, 3, 5]
    assert sorted(choose_landmarks(rows, 6, first)[0, 0].tolist()) == list(range(6))


@pytest.mark.parametrize("landmarks", [3, 500])
def test_orthoformer_trains_and_evaluates_without_chance(landmarks):
    model = small("motionformer", approx="orthoformer", landmarks=landmarks)
    out = model.train().time_outputs(clip())
    (out.logits.square().sum() + out.order.square().sum() + out.flow.square().sum()).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    model.eval()
    video = clip()
    with torch.no_grad():
        both = model(video)
        assert torch.equal(both, model(video))
        torch.testing.assert_close(both[1:], model(video[1:]))  # whatever is beside a clip
        torch.testing.assert_close(both, model.time_outputs(video).logits)


@pytest.mark.parametrize("attention", ATTENTION)
@pytest.mark.parametrize("position", ["separate", "joint"])
@pytest.mark.parametrize("tube", [1, 2])
def test_every_form_gives_the_shapes_and_loads_back(attention, position, tube):
    form = {"attention": attention, "position": position, "tube": tube}
    model = small("motionformer", table_size=16, values="projected", **form).eval()
    out = model.time_outputs(clip())
    T = 4 // tube
    assert out.tokens.shape == (2, T, 4, 32) and out.order.shape == (2, T, T)
    assert out.flow.shape == (2, T - 1, 4, 9) and out.logits.shape == (2, 5)
    torch.testing.assert_close(model(clip() * 0), model.time_outputs(clip() * 0).logits)
    again = load_model(model.state_dict(), heads=2, values="projected").eval()
    assert {key: again.config[key] for key in form} == form and again.frames == 4
    video = clip()
    assert torch.equal(again(video), model(video))


@pytest.mark.parametrize("attention", ATTENTION)
def test_class_logits_alone_leave_no_parameter_without_a_gradient(attention):
    """DDP and AdamW tell a zero gradient from none."""
    model = small("motionformer", attention=attention, time_heads=False)
    model(clip()).square().sum().backward()
    assert [key for key, p in model.named_parameters() if p.grad is None] == []


def test_exactly_zero_gradients_where_nothing_depends_on_a_parameter():
    for values in ("trajectory", "projected"):
        model = small("motionformer", values=values)
        model.time_outputs(clip()).tokens.square().sum().backward()
        for block in model.blocks:
            weight, bias = (p.grad.chunk(2) for p in block.attn.proj_kv.parameters())
            assert weight[0].any() and not bias[0].any()  # keys
            assert bool(weight[1].any()) == bool(bias[1].any()) == (values == "projected")


def test_divided_attention_sees_the_class_token_and_one_group():
    block = small("motionformer", attention="divided").blocks[0].eval()
    cls, x = torch.randn(2, 32), torch.randn(2, 4, 9, 32)
    for over_time in (True, False):
        _, out = block.attend(block.attn, cls, x, over_time)
        for change in ((0, slice(None), 3), (0, 1, slice(None))):  # one position, one frame
            other = x.clone()
            other[change] += 1
            moved = (block.attend(block.attn, cls, other, over_time)[1] - out).abs().amax(-1) > 1e-6
            expected = torch.zeros(2, 4, 9, dtype=torch.bool)
            if over_time:  # tokens of every position that was touched
                expected[0, :, change[2]] = True
            else:
                expected[0, change[1]] = True
            assert torch.equal(moved, expected)
        new_cls, moved = block.attend(block.attn, cls + 1, x, over_time)
        assert ((moved - out).abs().amax(-1) > 1e-6).all()


def test_class_token_attends_over_the_whole_clip():
    cls, k, v = (
        torch.randn(3, 2, 3, 8).unbind(0),
        torch.randn(2, 4, 5, 3, 8),
        torch.randn(2, 4, 5, 3, 8),
    )
    keys = torch.cat([cls[1][:, None], k.flatten(1, 2)], 1)
    p = (torch.einsum("bhd,bshd->bhs", cls[0], keys) * 8**-0.5).softmax(-1)
    values = torch.cat([cls[2][:, None], v.flatten(1, 2)], 1)
    torch.testing.assert_close(class_attention(cls, k, v), torch.einsum("bhs,bshd->bhd", p, values))


def test_trajectory_attention_reads_the_fused_projection_in_place(monkeypatch):
    seen = []

    def spy(q, k, v, *rest, **keywords):
        seen.append((q, k, v))
        return trajectory_attention(q, k, v, *rest, **keywords)

    trajectory_attention = ops.trajectory_attention
    monkeypatch.setattr(ops, "trajectory_attention", spy)
    small("motionformer").features(clip())
    assert len(seen) == 2
    for qkv in seen:
        assert len({x.untyped_storage().data_ptr() for x in qkv}) == 1


def test_other_sizes_resize_the_position_table_and_other_lengths_are_refused():
    model = small("motionformer")
    assert model.pos_embed.shape == (1, 1 + 28 * 28, 32)  # made for 224 whatever the crop
    assert model.features(clip(height=24, width=32)).tokens.shape == (2, 4, 12, 32)
    with pytest.raises(ValueError, match="expected 4 frames, got 6"):
        model(clip(T=6))
    with pytest.raises(ValueError, match="a joint position table is not resized"):
        small("motionformer", position="joint")(clip(height=24))
    with pytest.raises(ValueError, match="frames a multiple of tube=2"):
        small("motionformer", tube=2)(clip(T=3))
    with pytest.raises(InputError, match="no rule was published for resizing its table to 8"):
        load_model(model.state_dict(), heads=2, frames=8)


def test_impossible_forms_are_refused():
    wrong = {
        "attention": ("space", "attention: expected one of trajectory"),
        "values": ("both", "values: expected one of trajectory"),
        "approx": ("nystrom", "approx: expected one of None, orthoformer, got 'nystrom'"),
        "position": ("none", "position: expected one of separate"),
        "pre_logits": ("sin", "pre_logits: expected one of tanh"),
        "tube": (3, "frames: expected a multiple of tube=3, got 4"),
        "landmarks": (0, "landmarks: expected at least 1"),
        "init": ("zero", "init: expected published or scratch"),
    }
    for name, (value, message) in wrong.items():
        with pytest.raises(ValueError, match=message):
            create_model("motionformer", **SMALL, **{name: value})
    with pytest.raises(ValueError, match="orthoformer approximates trajectory attention"):
        create_model("motionformer", **SMALL, attention="joint", approx="orthoformer")


def test_initialisations():
    model = create_model("motionformer", **{**SMALL, "dim": 64})
    assert not model.temp_embed.any() and 0.018 < model.pos_embed.std() < 0.022
    assert 0.018 < model.blocks[0].attn.proj_kv.weight.std() < 0.022
    joint = create_model("motionformer", **SMALL, position="joint")
    assert 0.015 < joint.st_embed.std() < 0.025 and not joint.pos_embed.requires_grad
    scratch = create_model("motionformer", **{**SMALL, "dim": 64}, init="scratch")
    assert 0.2 < scratch.temp_embed.std() < 0.4 and 0.2 < scratch.pos_embed.std() < 0.4


def test_stochastic_depth_draws_once_per_clip_and_branch(monkeypatch):
    draws = []

    def drop_all(module, shape, like):
        draws.append(shape)
        return torch.zeros(shape)

    monkeypatch.setattr(motionformer, "keep_scale", drop_all)
    model = small("motionformer")
    cls, x = torch.randn(2, 32), torch.randn(2, 4, 4, 32)
    for cls_only in (False, True):
        new_cls, *patches = model.blocks[0](cls, x, cls_only=cls_only)
        assert torch.equal(new_cls, cls) and torch.equal(settled(*patches), x)
    assert draws == [(2, 1)] * 4
