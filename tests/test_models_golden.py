"""The models against values that the published code computed."""

import pytest
import torch
from golden_rule import assert_near, part, read_golden, rule_state, rule_video

import timefast
from timefast.losses import time_losses
from timefast.models.vit import settled

TIME = [
    "time_timesformer_t4",
    "time_timesformer_t8",
    "time_motionformer_t4",
    "time_motionformer_t8",
    "time_motionformer_joint_t4",
    "time_xvit_t4",
    "time_xvit_t8",
]
UPSTREAM = [
    "upstream_timesformer_divided",
    "upstream_timesformer_joint",
    "upstream_timesformer_spaceonly",
    "hf_timesformer_divided",
    "upstream_motionformer_traj",
    "upstream_motionformer_divided",
    "upstream_motionformer_jointattn",
    "upstream_xvit",
]


def load(state: dict[str, torch.Tensor], config: dict) -> torch.nn.Module:
    """The golden model, told only what shapes cannot tell; no dropout."""
    keywords = {"heads": config["num_heads"], "image_size": config["img"], "drop_path": 0.0}
    if config["backbone"] == "xvit":
        keywords |= {
            "head_heads": config["temporal_head"]["heads"], "head_dropout": 0.0,
            "frames": config["frames"],
        }  # fmt: skip
    if not config.get("use_original_traj_code", True):
        keywords["values"] = "projected"
    if config.get("approx", "none") != "none":
        keywords |= {"approx": config["approx"], "landmarks": config["num_landmarks"]}
    return timefast.load_model(state, **keywords)


def layout(video: torch.Tensor) -> torch.Tensor:
    return video.transpose(1, 2)  # the files have [B, T, 3, height, width]


def block_outputs(model: torch.nn.Module, run) -> list[torch.Tensor]:
    """Raw outputs of the blocks during run(), each [rows, tokens, C] with the class token first."""
    outputs = []

    def keep(_, __, out):
        if isinstance(out, tuple):
            *cls, x, pending = out
            x = settled(x, pending)
            # X-ViT: [B, T, S, C], else class token and patches
            out = torch.cat([cls[0][:, None], x.flatten(1, 2)], 1) if cls else x.flatten(0, 1)
        outputs.append(out.detach())

    hooks = [block.register_forward_hook(keep) for block in model.blocks]
    run()
    for hook in hooks:
        hook.remove()
    return outputs


@pytest.mark.parametrize("name", TIME)
def test_features_and_outputs_of_time(name):
    golden, config = read_golden(name)
    model = load(part(golden, "state"), config)
    video = layout(golden["input/video"])
    shuffled = video[:, :, golden["input/perm"]]
    with torch.no_grad():
        model.eval()
        assert_near(model(video), golden["eval/logits"], 1e-5)
        if "alt/video" in golden:
            assert_near(model(layout(golden["alt/video"])), golden["alt/eval_logits"], 1e-5)
        model.train()
        blocks = block_outputs(model, lambda: model.features(video))
        for i, block in enumerate(blocks):
            assert_near(block, golden[f"feat/block{i}"], 1e-5, f"block {i}")
        features = model.features(video)
        out = model.time_outputs(video)
        assert_near(features.cls, golden["feat/cls"], 1e-5, "cls")
        assert_near(out.tokens, golden["feat/tokens"], 1e-5, "tokens")
        assert_near(out.logits, golden["train/logits"], 1e-5, "logits")
        assert_near(out.order, golden["train/order_logits"], 1e-5, "order")
        assert_near(out.flow, golden["train/flow_logits"], 1e-5, "flow")
        assert_near(model(video), golden["train/head_only_logits"], 1e-5)
        assert_near(model(shuffled), golden["train/head_only_logits_shuffled"], 1e-5)


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
@pytest.mark.parametrize("name", TIME)
def test_losses_and_gradients_of_time(name, smoothing):
    golden, config = read_golden(name)
    model = load(part(golden, "state"), config).train()
    tag = f"s{round(smoothing * 10):02d}"
    losses = losses_of(model, layout(golden["input/video"]), golden, smoothing)
    check_losses(losses, golden, tag)
    losses["total"].backward()
    grads = {key: p.grad for key, p in model.named_parameters()}
    for key, expected in part(golden, f"grad_{tag}").items():
        if expected.norm() < 1e-5:  # a gradient that is zero but for rounding
            assert grads[key].abs().max() < 1e-6
        else:
            assert_near(grads[key], expected, 5e-5, key)
    check_gradnorms(grads, golden, tag)


@pytest.mark.parametrize("name", UPSTREAM)
def test_outputs_of_the_original_projects(name):
    golden, config = read_golden(name)
    model = load(part(golden, "state"), config).eval()
    runs = [("input/video", "eval/logits")]
    runs += [(f"alt{i}/video", f"alt{i}/eval_logits") for i in (0, 1)]
    for video, logits in runs:
        if video in golden:
            with torch.no_grad():
                assert_near(model(layout(golden[video])), golden[logits], 1e-5, video)


def test_rule_makes_the_stated_values():
    golden, config = read_golden("full_timesformer_d2_grad")
    state = rule_state({**config, "state_shapes": {"cls_token": [1, 1, 768]}})
    expected = torch.tensor([0.42263442, 0.57194698, -0.26500216])
    assert torch.equal(state["cls_token"].flatten()[:3], expected)
    assert torch.equal(rule_video(config)[0, :, 0].flatten()[:64], golden["input/video_head"])


@pytest.mark.parametrize(
    "name",
    [
        "full_timesformer_d2_grad",
        pytest.param("full_motionformer_d2_grad", marks=pytest.mark.slow),
        pytest.param("full_xvit_d2_grad", marks=pytest.mark.slow),
    ],
)
def test_full_width_losses_and_gradients(name):
    golden, config = read_golden(name)
    state = rule_state(config)
    first = torch.stack([value.flatten()[0] for value in state.values()])
    assert torch.equal(first.sort()[0], golden["state_check/first"].sort()[0])
    model = load(state, config).train()
    del state
    video = rule_video(config)
    losses = {}
    blocks = block_outputs(model, lambda: losses.update(losses_of(model, video, golden, 0.2)))
    rows = len(golden["feat/block0_cls"])  # of the clips as they are; the shuffled ones follow
    check_full_blocks([block[:rows] for block in blocks[: config["depth"]]], golden)
    check_losses(losses, golden, "s02")
    losses["total"].backward()
    grads = {key: p.grad for key, p in model.named_parameters()}
    for key, expected in part(golden, "gradslice_s02").items():
        flat = grads[key].flatten()
        piece = flat[:: max(1, flat.numel() // 64)][:64]
        scale = max(expected.abs().max(), flat.abs().max())
        assert (piece - expected).abs().max() <= max(5e-5 * scale, 1e-6), key
    check_gradnorms(grads, golden, "s02")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["full_timesformer_d12", "full_motionformer_d12", "full_xvit_d12"])
def test_full_depth_outputs_and_losses(name):
    golden, config = read_golden(name)
    model = load(rule_state(config), config).train()
    video = rule_video(config)
    with torch.no_grad():
        check_full_outputs(model, video, golden)
        check_losses(losses_of(model, video, golden, 0.2), golden, "s02")


def losses_of(model, video, golden, smoothing):
    return time_losses(
        model,
        video,
        golden["input/labels"],
        golden["input/flow_labels"],
        golden["input/perm"],
        label_smoothing=smoothing,
    )


def check_losses(losses, golden, tag):
    for ours, theirs in {"ce": "cls", "order": "order", "debias": "debias", "flow": "flow"}.items():
        assert_near(losses[ours], golden[f"loss_{tag}/{theirs}"], 1e-5, ours)
    assert_near(losses["total"], golden[f"loss_{tag}/total"], 1e-5, "total")


def check_gradnorms(grads, golden, tag):
    norms = part(golden, f"gradnorm_{tag}")
    assert set(norms) == set(grads)
    for key, norm in norms.items():
        if norm < 0:
            assert grads[key] is None, f"{key} is not used, but has a gradient"
        elif norm < 1e-5:
            assert grads[key].norm() < 1e-5, key
        else:
            assert_near(grads[key].double().norm(), norm, 5e-5, f"norm of {key}")


def check_full_blocks(blocks, golden):
    for i, block in enumerate(blocks):
        assert_near(block[:, 0], golden[f"feat/block{i}_cls"], 1e-5, f"block {i}")
        assert_near(block.norm(dim=-1), golden[f"feat/block{i}_rownorm"], 1e-5, f"block {i}")


def check_full_outputs(model, video, golden):
    check_full_blocks(block_outputs(model, lambda: model.features(video)), golden)
    out = model.time_outputs(video)
    assert_near(out.logits, golden["train/logits"], 1e-5, "logits")
    assert_near(out.order, golden["train/order_logits"], 1e-5, "order")
    assert_near(out.flow, golden["train/flow_logits"], 1e-5, "flow")
    shuffled = model(video[:, :, golden["input/perm"]])
    assert_near(shuffled, golden["train/head_only_logits_shuffled"], 1e-5, "shuffled")
    model.eval()
    assert_near(model(video), golden["eval/logits"], 1e-5, "eval")
    model.train()
