"""The fast training step computes what the published form of it computes."""

import json

import pytest
import torch
import torch.nn.functional as F

from bench import published
from bench.memory import Allocations
from tests.test_train import train
from timefast.config import OptimConfig
from timefast.data.batch import Batch
from timefast.demo_data import write_demo_data
from timefast.losses import time_losses
from timefast.methods.time_ssl import TimeMethod
from timefast.models import create_model
from timefast.models.vit import checkpoint_activations
from timefast.optim import build_optimizer
from timefast.train import Trainer

BACKBONES = ["timesformer", "motionformer", "xvit"]
T, SIDE = 4, 32


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """24 training and 12 validation videos."""
    root = tmp_path_factory.mktemp("data") / "demo"
    return write_demo_data(root, train_per_class=2, val_per_class=1)


def small(backbone, **more):
    if backbone == "xvit":
        more = {"head_dropout": 0.0, **more}
    torch.manual_seed(0)
    return create_model(
        backbone, num_classes=7, frames=T, image_size=SIDE, patch_size=8, dim=32, heads=2,
        **{"depth": 3, "drop_path": 0.0, **more},
    )  # fmt: skip


def batch(seed=0, clips=3):
    draw = torch.Generator().manual_seed(seed)
    return Batch(
        video=torch.randn(clips, 3, T, SIDE, SIDE, generator=draw),
        label=torch.randint(7, (clips,), generator=draw),
        sample=torch.arange(clips),
        view=torch.zeros(clips, dtype=torch.int64),
        flow_label=torch.randint(9, (clips, T - 1, 16), generator=draw),
    )


@pytest.mark.parametrize("backbone", BACKBONES)
def test_losses_follow_the_published_form_of_the_step_for_20_steps(backbone):
    fast, slow = small(backbone), small(backbone)
    method = TimeMethod(fast, label_smoothing=0.2)
    config = OptimConfig(lr=1e-3)
    optimizer = build_optimizer(fast, config)
    totals = []
    slow_optimizer = published.optimizer(slow, build_optimizer(slow, config))
    for step in range(20):
        order = torch.randperm(T, generator=torch.Generator().manual_seed(step))
        ours = method.training_loss(batch(), order)
        theirs = published.losses(slow, batch(), order)
        totals.append(theirs["total"].item())
        for name, expected in theirs.items():
            torch.testing.assert_close(ours[name], expected, rtol=2e-4, atol=2e-5)
        for losses, by in ((ours, optimizer), (theirs, slow_optimizer)):
            by.zero_grad()
            losses["total"].backward()
            by.step()
    assert totals[-1] < totals[0] - 0.2


FORMS = [
    ("timesformer", {}),
    ("timesformer", {"attention": "joint"}),
    ("timesformer", {"attention": "space"}),
    ("timesformer", {"time_embed_every_block": True}),
    ("motionformer", {}),
    ("motionformer", {"tube": 2}),
    ("motionformer", {"attention": "divided"}),
    ("motionformer", {"attention": "joint", "position": "joint"}),
    ("xvit", {}),
    ("xvit", {"time_embed_every_block": True, "pre_logits": "tanh"}),
]


@pytest.mark.parametrize(("backbone", "form"), FORMS)
def test_one_pass_over_original_and_shuffled_clips_equals_two(backbone, form):
    model, clips, order = small(backbone, **form), batch(), torch.tensor([2, 0, 3, 1])
    scores = []
    for shuffled in (True, False):
        model.zero_grad()
        if shuffled:
            out, other = model.paired_outputs(clips.video, order)
        else:
            out, other = model.time_outputs(clips.video), model(clips.video[:, :, order])
        values = [out.logits, out.order, out.flow, other]
        sum((v.square().mean() for v in values), torch.zeros(())).backward()
        grads = [p.grad.clone() for p in model.parameters() if p.grad is not None]
        scores.append(values + grads)
    for one, two in zip(*scores, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-5)


def test_the_flow_head_is_attention_of_its_four_layers():
    model = small("timesformer")
    for layer in (model.mlp_q, model.mlp_k, model.mlp_v, model.mlp_proj):
        torch.nn.init.normal_(layer.bias)
    tokens = torch.randn(2, T, 16, 32, requires_grad=True)
    q, k, v = model.mlp_q(tokens[:, 1:]), model.mlp_k(tokens[:, :-1]), model.mlp_v(tokens[:, :-1])
    moved = F.scaled_dot_product_attention(q, k, v)
    expected = model.flow_head(model.mlp_norm(model.mlp_proj(moved)))
    ours = model.flow_logits(tokens)
    torch.testing.assert_close(ours, expected)
    weights = [layer.weight for layer in (model.mlp_q, model.mlp_k, model.mlp_v, model.mlp_proj)]
    pull = torch.randn_like(expected)
    for one, two in zip(
        torch.autograd.grad(ours, [tokens, *weights], pull),
        torch.autograd.grad(expected, [tokens, *weights], pull),
        strict=True,
    ):
        torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-4)
    model.flow_logits(tokens).sum().backward()
    assert model.mlp_k.bias.grad is not None and not model.mlp_k.bias.grad.any()


@pytest.mark.parametrize("backbone", BACKBONES)
def test_activations_computed_again_change_no_gradient_and_need_less_memory(backbone):
    """Also with stochastic depth, which must be drawn alike both times."""
    grads, memory = [], []
    for what in ("none", "gelu", "mlp", "blocks"):
        model = small(backbone, drop_path=0.5)
        if what != "none":
            checkpoint_activations(model, what)
        torch.manual_seed(1)
        clips = batch()
        with Allocations() as made:
            losses = time_losses(model, clips.video, clips.label, clips.flow_label, [2, 0, 3, 1])
        memory.append(made.alive())
        losses["total"].backward()
        grads.append([p.grad for p in model.parameters()])
    for other in grads[1:]:
        for one, two in zip(grads[0], other, strict=True):
            torch.testing.assert_close(one, two)
    assert memory == sorted(set(memory), reverse=True)  # less from each to the next


@pytest.mark.parametrize("backbone", BACKBONES)
def test_of_blocks_computed_again_the_input_alone_is_kept(backbone):
    memory = []
    for depth in (2, 4):
        model = small(backbone, depth=depth, drop_path=0.5)
        checkpoint_activations(model, "blocks")
        with Allocations() as made:
            out = model.features(batch(clips=4).video)  # noqa: F841, holds what it keeps
        memory.append(made.alive())
    tokens = 4 * 4 * T * 16 * 32  # bytes of float32 [4, T, 16, 32]
    assert memory[1] - memory[0] < 2 * 1.2 * tokens


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("backbone", BACKBONES)
def test_a_step_of_triton_kernels_is_that_of_the_references(backbone, device):
    """All of them in one model, with stochastic depth; on a CPU in the interpreter."""
    scores = []
    for impl in ("reference", "triton"):
        model = small(backbone, depth=2, drop_path=0.4, impl=impl).to(device)
        torch.manual_seed(1)
        order = torch.tensor([2, 0, 3, 1], device=device)
        losses = TimeMethod(model).training_loss(batch(clips=1).to(device), order)
        losses["total"].backward()
        grads = [p.grad for p in model.parameters() if p.grad is not None]
        scores.append([*losses.values(), *grads])
    for one, two in zip(*scores, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-3, atol=1e-5)


READS = ("item", "tolist", "cpu", "numpy", "__bool__", "__float__", "__int__", "__index__")


def test_a_step_reads_nothing_back_from_the_device(data, tmp_path, monkeypatch):
    """Any of these would wait for a GPU; only a line of metrics may."""
    inside, read = [], []

    def watched(method):
        def run(self, *given):
            inside.append(method.__name__)
            try:
                return method(self, *given)
            finally:
                inside.pop()

        return run

    for name in ("_forward_backward", "_optimizer_step"):
        monkeypatch.setattr(Trainer, name, watched(getattr(Trainer, name)))
    for name in READS:
        real = getattr(torch.Tensor, name)

        def noted(self, *given, real=real, name=name):
            if inside:
                read.append((inside[-1], name))
            return real(self, *given)

        monkeypatch.setattr(torch.Tensor, name, noted)
    more = ["--max-steps", "3", "--clip-grad", "1", "--accumulate", "2"]
    assert train(data, tmp_path / "run", *more) == 0
    assert read == []


@pytest.mark.gpu
def test_a_step_does_not_wait_for_the_gpu(data, tmp_path, monkeypatch):
    def strict(method):
        def run(self, *given):
            torch.cuda.set_sync_debug_mode("error")
            try:
                return method(self, *given)
            finally:
                torch.cuda.set_sync_debug_mode("default")

        return run

    assert train(data, tmp_path / "warm", "--device", "cuda", "--max-steps", "1") == 0
    for name in ("_forward_backward", "_optimizer_step"):
        monkeypatch.setattr(Trainer, name, strict(getattr(Trainer, name)))
    assert train(data, tmp_path / "run", "--device", "cuda", "--max-steps", "3") == 0


def test_profile_writes_a_trace_and_the_time_of_each_part(data, tmp_path):
    run = tmp_path / "run"
    assert train(data, run, "--max-steps", "4", "--profile") == 0
    rows = {
        line[:24].strip(): float(line[24:35])
        for line in (run / "profile/parts.txt").read_text().splitlines()[1:]
    }
    assert rows.keys() == {
        "data", "patch embedding", "time attention", "space attention", "mlp", "heads", "losses",
        "rest of the forward pass", "backward", "optimizer", "step",
    }  # fmt: skip
    assert all(ms > 0 for name, ms in rows.items() if name != "rest of the forward pass")
    whole = rows.pop("step")
    assert sum(rows.values()) == pytest.approx(whole, abs=0.1)
    assert json.loads((run / "profile/trace.json").read_text())["traceEvents"]


def test_a_head_whose_loss_has_no_weight_asks_for_no_gradient():
    method = TimeMethod(small("timesformer"), weights=(0, 0, 1))
    method.freeze_unread()
    frozen = {name for name, p in method.model.named_parameters() if not p.requires_grad}
    assert frozen == {"temp_head.weight", "temp_head.bias"}


@pytest.mark.parametrize("backbone", BACKBONES)
def test_bf16_losses_follow_those_of_fp32_for_20_steps(backbone):
    curves = []
    for bf16 in (False, True):
        model = small(backbone)
        method, optimizer = TimeMethod(model), build_optimizer(model, OptimConfig(lr=1e-3))
        totals = []
        for step in range(20):
            order = torch.randperm(T, generator=torch.Generator().manual_seed(step))
            with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
                total = method.training_loss(batch(), order)["total"]
            optimizer.zero_grad()
            total.backward()
            optimizer.step()
            totals.append(total.item())
        curves.append(totals)
    assert curves[1] == pytest.approx(curves[0], rel=1e-2)


@pytest.mark.parametrize("backbone", BACKBONES)
def test_both_passes_compile_as_one_graph(backbone):
    """What --compile compiles; the compiler's own code generation is not part of this."""
    model, clips = small(backbone, depth=2).eval(), batch()
    with torch.no_grad():
        expected = model.run(model.embed(clips.video), 1)
        model.embed = torch.compile(model.embed, backend="eager", fullgraph=True)
        model.run = torch.compile(model.run, backend="eager", fullgraph=True)
        for one, two in zip(model.run(model.embed(clips.video), 1), expected, strict=True):
            torch.testing.assert_close(one, two)


def test_training_with_compile_goes_through_the_compiled_backbone(data, tmp_path, monkeypatch):
    compiled = []

    def compile(function):
        def run(*given):
            compiled.append(function.__name__)
            return function(*given)

        return run

    monkeypatch.setattr(torch, "compile", compile)
    assert train(data, tmp_path / "run", "--max-steps", "1", "--compile") == 0
    assert compiled[:2] == ["embed", "run"]
