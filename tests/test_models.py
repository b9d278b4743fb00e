"""What every backbone promises, and what is special to TimeSformer."""

import json

import pytest
import torch
import torch.nn.functional as F

from timefast import create_model, ops
from timefast.models import BACKBONES, motionformer, timesformer, vit, xvit
from timefast.models.vit import settled

SMALL = {"num_classes": 5, "frames": 4, "image_size": 16, "patch_size": 8, "dim": 32, "depth": 2,
         "heads": 2}  # fmt: skip


def small(backbone: str = "timesformer", **config) -> torch.nn.Module:
    """Two blocks on a 2x2 grid, with weights that let everything matter."""
    model = create_model(backbone, **{**SMALL, **config})
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1 or not parameter.any():
                parameter.normal_(std=0.3)
    return model


def clip(B: int = 2, T: int = 4, height: int = 16, width: int = 16) -> torch.Tensor:
    return torch.randn(B, 3, T, height, width)


@pytest.mark.parametrize("backbone", BACKBONES)
def test_shapes_are_the_same_in_training_and_evaluation(backbone):
    model = small(backbone)
    for training in (True, False):
        model.train(training)
        assert model(clip()).shape == (2, 5)
        features = model.features(clip())
        assert features.tokens.shape == (2, 4, 4, 32)
        assert features.cls.shape == ((2, 4, 32) if backbone == "xvit" else (2, 32))
        out = model.time_outputs(clip())
        assert out.logits.shape == (2, 5) and out.tokens.shape == (2, 4, 4, 32)
        assert out.order.shape == (2, 4, 4) and out.flow.shape == (2, 3, 4, 9)


@pytest.mark.parametrize("backbone", BACKBONES)
def test_config_rebuilds_the_model(backbone):
    model = create_model(backbone, **{**SMALL, "image_size": (16, 24)})
    again = create_model(**json.loads(json.dumps(model.config)))
    again.load_state_dict(model.state_dict())
    again.eval(), model.eval()
    video = clip(width=24)
    assert torch.equal(again(video), model(video))
    assert again.config == model.config


@pytest.mark.parametrize("backbone", BACKBONES)
def test_logits_of_the_class_pass_are_those_of_the_full_pass(backbone):
    model, video = small(backbone).eval(), clip()
    torch.testing.assert_close(model(video), model.time_outputs(video).logits)


@pytest.mark.parametrize("backbone", BACKBONES)
def test_every_parameter_gets_a_gradient(backbone):
    model = small(backbone)
    out = model.time_outputs(clip())
    (out.logits.square().sum() + out.order.square().sum() + out.flow.square().sum()).backward()
    assert [key for key, p in model.named_parameters() if p.grad is None] == []


@pytest.mark.parametrize("backbone", BACKBONES)
def test_half_precision_by_autocast_is_near_and_gives_all_gradients(backbone):
    model, video = small(backbone).eval(), clip()
    expected = model.time_outputs(video)
    with torch.autocast("cpu", torch.bfloat16):
        out = model.time_outputs(video)
    (out.logits.float().square().sum() + out.order.sum() + out.flow.sum()).backward()
    for name in ("logits", "order", "flow"):
        error = (getattr(out, name) - getattr(expected, name)).abs().max()
        assert error <= 0.05 * getattr(expected, name).abs().max(), name
    assert [key for key, p in model.named_parameters() if p.grad is None] == []


@pytest.mark.parametrize("backbone", BACKBONES)
def test_compiles_as_one_graph(backbone):
    model, video = small(backbone, depth=1).eval(), clip()
    with torch.no_grad():
        out = torch.compile(model.time_outputs, backend="eager", fullgraph=True)(video)
        expected = model.time_outputs(video)
    torch.testing.assert_close(out.logits, expected.logits)
    torch.testing.assert_close(out.flow, expected.flow)


@pytest.mark.parametrize("backbone", BACKBONES)
def test_no_dropout_in_evaluation(backbone):
    model, video = small(backbone, drop_path=0.5).eval(), clip()
    assert torch.equal(model(video), model(video))


@pytest.mark.parametrize("backbone", BACKBONES)
def test_time_embedding_again_before_every_block(backbone):
    model, video = small(backbone).eval(), clip()
    again = create_model(**{**model.config, "time_embed_every_block": True}).eval()
    again.load_state_dict(model.state_dict())
    assert not torch.allclose(model(video), again(video), atol=1e-3)
    for key, parameter in [*model.named_parameters(), *again.named_parameters()]:
        if "time_embed" in key or "temp_embed" in key:
            torch.nn.init.zeros_(parameter)
    torch.testing.assert_close(model(video), again(video))


def test_unknown_names_and_impossible_sizes_are_refused():
    with pytest.raises(ValueError, match="backbone: expected one of timesformer.*got 'resnet'"):
        create_model("resnet")
    with pytest.raises(ValueError, match="no keyword 'drop_pth'; did you mean 'drop_path'"):
        create_model("timesformer", drop_pth=0.1)
    with pytest.raises(ValueError, match="no keyword 'shift_div'"):
        create_model("timesformer", shift_div=4)
    with pytest.raises(ValueError, match="patch_size=16, got 225x224"):
        create_model("timesformer", image_size=(225, 224))
    with pytest.raises(ValueError, match="heads: expected a divisor of dim=32, got 5"):
        create_model("timesformer", **{**SMALL, "heads": 5})
    with pytest.raises(ValueError, match="attention: expected divided, joint or space"):
        create_model("timesformer", **SMALL, attention="trajectory")
    with pytest.raises(ValueError, match=r"frames are the third dimension"):
        small()(clip().transpose(1, 2))


def test_xvit_exchanges_channels_within_runs_of_frames_only():
    model = small("xvit", frames=8, depth=1, shift_segments=4).eval()
    video = clip(T=8)
    changed = video.clone()
    changed[:, :, 4] += 1
    cls, other = model.features(video).cls, model.features(changed).cls
    assert (cls != other).any(-1)[0].tolist() == [False] * 4 + [True, True] + [False] * 2
    with pytest.raises(ValueError, match="at most 4 frames .shift_segments. or a multiple"):
        model(clip(T=6))
    alone = small("xvit", depth=1, shift_blocks=[]).eval()
    differs = alone.features(video).cls != alone.features(changed).cls
    assert differs.any(-1)[0].tolist() == [False] * 4 + [True] + [False] * 3


def test_xvit_repeats_its_time_embedding_and_resizes_its_positions():
    model = small("xvit", embed_frames=2, shift_blocks=[]).eval()
    still = clip(T=1).expand(-1, -1, 4, -1, -1)
    cls = model.features(still).cls
    torch.testing.assert_close(cls[:, :2], cls[:, 2:])
    assert not torch.allclose(cls[:, 0], cls[:, 1], atol=1e-3)
    assert model.base_model.pos_embed.shape == (1, 1 + 28 * 28, 32)  # 224 pixels, patches of 8
    assert model(clip(height=32, width=32)).shape == (2, 5)


@pytest.mark.parametrize("attention", ["divided", "joint", "space"])
def test_timesformer_takes_other_lengths_and_sizes(attention):
    model = small(attention=attention)
    assert model(clip(T=7, height=24, width=32)).shape == (2, 5)
    assert model.features(clip(T=7, height=24, width=32)).tokens.shape == (2, 7, 12, 32)


def test_divided_attention_is_blind_to_order_without_a_time_embedding():
    model, video = small().eval(), clip()
    torch.nn.init.zeros_(model.time_embed)
    torch.testing.assert_close(model(video), model(video[:, :, [2, 0, 3, 1]]))
    torch.nn.init.normal_(model.time_embed)
    assert not torch.allclose(model(video), model(video[:, :, [2, 0, 3, 1]]), atol=1e-3)


def test_attention_reads_the_fused_projection_in_place(monkeypatch):
    seen = []

    def spy(name):
        op = getattr(ops, name)

        def call(q, k, v, *rest, **keywords):
            seen.append((name, q, k, v))
            return op(q, k, v, *rest, **keywords)

        monkeypatch.setattr(ops, name, call)

    spy("time_attention")
    spy("space_attention")
    model = small()
    model.features(clip())
    assert [name for name, *_ in seen] == ["time_attention", "space_attention"] * 2
    for _, *qkv in seen:
        assert len({x.untyped_storage().data_ptr() for x in qkv}) == 1
        assert all(x.shape == (2, 4, 4, 2, 16) and x.stride(-3) == 3 * 32 for x in qkv)


def test_published_initialisation():
    torch.manual_seed(0)
    model = create_model("timesformer", **{**SMALL, "dim": 64})
    for block in model.blocks:
        assert not block.temporal_fc.weight.any() and not block.temporal_fc.bias.any()
        assert 0.018 < block.attn.qkv.weight.std() < 0.022 and not block.attn.qkv.bias.any()
    assert not model.time_embed.any()
    assert 0.015 < model.pos_embed.std() < 0.025 and model.cls_token.any()


def test_scratch_initialisation_lets_time_through_at_once():
    model = create_model("timesformer", **{**SMALL, "dim": 64}, init="scratch")
    bound = (6 / (64 + 64)) ** 0.5
    for block in model.blocks:
        weight = block.temporal_fc.weight
        assert 0.9 * bound < weight.abs().max() <= bound
    assert 0.2 < model.time_embed.std() < 0.4 and 0.2 < model.pos_embed.std() < 0.4


def test_stochastic_depth_is_the_published_form(monkeypatch):
    """Draws per clip and position over time, per clip and frame over space, per clip for the MLP;
    the block then equals the form that copies the class token into every frame."""
    B, T, N, C = 2, 4, 4, 32
    block = small(drop_path=0.5).blocks[1].double().train()
    masks = {"time": (B, 1, N, 1), "space": (B, T), "mlp": (B, 1)}
    masks = {name: torch.randint(0, 2, shape).double() / 0.5 for name, shape in masks.items()}
    draws = iter(masks.values())

    def replay(module, shape, like):
        mask = next(draws)
        assert mask.shape == shape and module.drop_path == 0.5
        return mask

    monkeypatch.setattr(timesformer, "keep_scale", replay)
    cls, x = torch.randn(B, C).double(), torch.randn(B, T, N, C).double()
    with torch.no_grad():
        new_cls, *patches = block(cls, x)
        new_x = settled(*patches)

        rows = block.temporal_norm1(x)[1].transpose(1, 2).flatten(0, 1)  # [B*N, T, C]
        rows = block.temporal_attn(rows) * masks["time"].reshape(B * N, 1, 1)
        x = x + block.temporal_fc(rows).unflatten(0, (B, N)).transpose(1, 2)
        rows = torch.cat(
            [cls[:, None].repeat_interleave(T, 0), x.flatten(0, 1)], 1
        )  # [B*T, 1+N, C]
        rows = block.attn(block.norm1(rows)[1]) * masks["space"].reshape(B * T, 1, 1)
        rows = rows.unflatten(0, (B, T))
        z = torch.cat(
            [(cls + rows[:, :, 0].mean(1))[:, None], (x + rows[:, :, 1:]).flatten(1, 2)], 1
        )
        z = z + masks["mlp"][:, :, None] * block.mlp(block.norm2(z)[1])
    torch.testing.assert_close(new_cls, z[:, 0])
    torch.testing.assert_close(new_x.flatten(1, 2), z[:, 1:])


@pytest.mark.parametrize("backbone", BACKBONES)
def test_an_implementation_reaches_every_op(backbone):
    model = small(backbone, impl="reference")
    chosen = [module.impl for module in model.modules() if hasattr(module, "impl")]
    assert chosen and set(chosen) == {"reference"}


@pytest.mark.parametrize("attention", ["joint", "space"])
def test_shapes_are_known_without_a_device(attention):
    model = small(attention=attention).to("meta")
    assert model(clip().to("meta")).shape == (2, 5)


def replayed(monkeypatch, module, *shapes):
    """Draws of stochastic depth that `module` will make, given here."""
    masks = [torch.randint(0, 2, shape).double() / 0.5 for shape in shapes]
    draws = iter(masks)

    def replay(block, shape, like):
        mask = next(draws)
        assert mask.shape == shape and block.drop_path == 0.5
        return mask

    monkeypatch.setattr(module, "keep_scale", replay)
    return masks


def norm_of(norm, x):
    return F.layer_norm(x, x.shape[-1:], norm.weight, norm.bias, norm.eps)


@torch.no_grad()
def test_stochastic_depth_of_a_plain_block_is_per_clip_and_branch(monkeypatch):
    block = small(attention="joint", drop_path=0.5).blocks[1].double().train()
    attention, mlp = replayed(monkeypatch, vit, (8, 1, 1), (8, 1, 1))
    z = torch.randn(8, 5, 32).double()
    out = block(z)
    z = z + attention * block.attn(norm_of(block.norm1, z))
    z = z + mlp * block.mlp(norm_of(block.norm2, z))
    torch.testing.assert_close(out, z)


@torch.no_grad()
def test_stochastic_depth_of_xvit_is_per_frame_and_branch(monkeypatch):
    block = small("xvit", drop_path=0.5).blocks[1].double().train()
    attention, mlp = replayed(monkeypatch, xvit, (3, 4, 1, 1), (3, 4, 1, 1))
    z = torch.randn(3, 4, 5, 32).double()
    out = settled(*block(z))
    z = z + attention * block.attn.merge(block.attend(norm_of(block.norm1, z)))
    z = z + mlp * block.mlp(norm_of(block.norm2, z))
    torch.testing.assert_close(out, z)


@torch.no_grad()
@pytest.mark.parametrize("attention", ["trajectory", "divided"])
def test_stochastic_depth_of_motionformer_is_per_clip_and_branch(attention, monkeypatch):
    block = small("motionformer", attention=attention, drop_path=0.5).blocks[1].double().train()
    masks = replayed(monkeypatch, motionformer, (8, 1), (8, 1))
    cls, x = torch.randn(8, 32).double(), torch.randn(8, 4, 4, 32).double()
    new_cls, *patches = block(cls, x)
    if attention == "divided":  # nothing is dropped of attention over time
        given = norm_of(block.norm3, cls), norm_of(block.norm3, x)
        residuals = block.attend(block.timeattn, *given, True)
        cls, x = cls + residuals[0], x + residuals[1]
        given = norm_of(block.norm1, cls), norm_of(block.norm1, x)
        residuals = block.attend(block.attn, *given, False)
    else:
        residuals = block.attn.attend(norm_of(block.norm1, cls), norm_of(block.norm1, x))
    cls, x = cls + masks[0] * residuals[0], x + masks[0][..., None, None] * residuals[1]
    residuals = [block.mlp(norm_of(block.norm2, y)) for y in (cls, x)]
    cls, x = cls + masks[1] * residuals[0], x + masks[1][..., None, None] * residuals[1]
    torch.testing.assert_close(new_cls, cls)
    torch.testing.assert_close(settled(*patches), x)


def test_drop_path_rates_grow_linearly_and_keep_the_mean():
    model = create_model("timesformer", **{**SMALL, "depth": 3, "drop_path": 0.2})
    assert [block.drop_path for block in model.blocks] == [0.0, 0.1, 0.2]
    block = model.blocks[2]
    assert timesformer.keep_scale(model.blocks[0], (4,), torch.ones(1)) is None
    assert timesformer.keep_scale(block.eval(), (4,), torch.ones(1)) is None
    scale = timesformer.keep_scale(block.train(), (20000,), torch.ones(1))
    assert set(scale.tolist()) == {0.0, 1.25} and abs(scale.mean() - 1) < 0.02
