"""timefast.patch on Hugging Face's TimeSformer and on module trees with the original names."""

import copy
import logging

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import timefast
from timefast import ops

B, T, WIDTH, C, HEADS = 2, 4, 3, 48, 3  # two rows of three patches
N = 2 * WIDTH


class DropPath(nn.Module):
    """Stochastic depth per row, by name and interface as in the original repositories."""

    def __init__(self, rate: float):
        super().__init__()
        self.rate = rate

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return x
        keep = 1 - self.rate
        rows = torch.rand(len(x), *[1] * (x.ndim - 1)) + keep
        return x / keep * rows.floor()


class Attention(nn.Module):
    def __init__(self, drop: float = 0.0):
        super().__init__()
        self.num_heads, self.scale = HEADS, (C // HEADS) ** -0.5
        self.qkv, self.proj = nn.Linear(C, 3 * C), nn.Linear(C, C)
        self.attn_drop, self.proj_drop = nn.Dropout(drop), nn.Dropout(0.0)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.split(x)
        return self.proj_drop(self.proj(self.join(self.attn_drop(self.weights(q, k)) @ v)))

    def split(self, x: Tensor):
        return self.qkv(x).unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)

    def weights(self, q: Tensor, k: Tensor) -> Tensor:
        return (self.scale * q @ k.transpose(-2, -1)).softmax(-1)

    def join(self, x: Tensor) -> Tensor:
        return x.transpose(1, 2).flatten(2)


class Mlp(nn.Sequential):
    def __init__(self):
        super().__init__(nn.Linear(C, 2 * C), nn.GELU(), nn.Linear(2 * C, C))


class TimeSformerBlock(nn.Module):
    """The class token is copied into every frame; rows in patch-major or in time-major order."""

    time_major = False

    def __init__(self, drop: float = 0.0):
        super().__init__()
        self.temporal_norm1, self.norm1, self.norm2 = (nn.LayerNorm(C) for _ in range(3))
        self.temporal_attn, self.attn = Attention(drop), Attention(drop)
        self.temporal_fc, self.mlp = nn.Linear(C, C), Mlp()
        self.drop_path = DropPath(0.5)

    def forward(self, x, B, T, W):
        cls, x = x[:, :1], x[:, 1:]
        x = x.unflatten(1, (T, -1)).transpose(1, 2) if self.time_major else x.unflatten(1, (-1, T))
        N = x.shape[1]  # x [B, N, T, C]
        time = self.drop_path(self.temporal_attn(self.temporal_norm1(x.flatten(0, 1))))
        x = x + self.temporal_fc(time.unflatten(0, (B, N)))
        frames = torch.cat([cls.repeat_interleave(T, 0), x.transpose(1, 2).flatten(0, 1)], 1)
        space = self.drop_path(self.attn(self.norm1(frames))).unflatten(0, (B, T))
        cls = cls + space[:, :, 0].mean(1, keepdim=True)
        x = x + space[:, :, 1:].transpose(1, 2)
        z = torch.cat([cls, (x.transpose(1, 2) if self.time_major else x).flatten(1, 2)], 1)
        return z + self.drop_path(self.mlp(self.norm2(z)))


class TimeMajorBlock(TimeSformerBlock):
    time_major = True


class TrajectoryAttention(Attention):
    """Motionformer's, with every projection applied to every trajectory token."""

    def __init__(self, use_original_code: bool):
        super().__init__()
        self.proj_q, self.proj_kv = nn.Linear(C, C), nn.Linear(C, 2 * C)
        self.use_original_code = use_original_code

    def forward(self, x, seq_len=196, num_frames=8, approx="none", num_landmarks=128):
        q, k, v = self.split(x)  # [B, H, 1+T*N, D]
        cls = self.join(self.weights(q[:, :, :1], k) @ v)
        q, k, v = q[:, :, 1:], *(y[:, :, 1:].unflatten(2, (num_frames, -1)) for y in (k, v))
        a = torch.einsum("bhqd,bhtnd->bhqtn", self.scale * q, k).softmax(-1)
        y = torch.einsum("bhqtn,bhtnd->bqthd", a, v).flatten(3)  # [B, T*N, T, C]
        own = torch.arange(num_frames).repeat_interleave(seq_len)
        q2 = self.proj_q(y[:, torch.arange(len(own)), own]).unflatten(-1, (HEADS, -1))
        k2, v2 = (z.unflatten(-1, (HEADS, -1)) for z in self.proj_kv(y).chunk(2, -1))
        a = torch.einsum("bqhd,bqthd->bqth", self.scale * q2, k2).softmax(2)
        values = y.unflatten(-1, (HEADS, -1)) if self.use_original_code else v2
        out = torch.einsum("bqth,bqthd->bqhd", a, values).flatten(2)
        return self.proj(torch.cat([cls, out], 1)), a


class TemporalShift(nn.Module):
    """Some channels from the next and some from the previous frame of each run."""

    def __init__(self, n_segment: int, fold_div: int):
        super().__init__()
        self.n_segment, self.fold_div = n_segment, fold_div

    def forward(self, x):  # [B*T, H, S, D]
        y = x.transpose(1, 2).flatten(2).unflatten(0, (-1, self.n_segment))
        fold = C // self.fold_div
        out = torch.zeros_like(y)
        out[:, :-1, :, :fold] = y[:, 1:, :, :fold]
        out[:, 1:, :, fold : 2 * fold] = y[:, :-1, :, fold : 2 * fold]
        out[..., 2 * fold :] = y[..., 2 * fold :]
        return out.flatten(0, 1).unflatten(2, (HEADS, -1)).transpose(1, 2)


class ShiftAttention(Attention):
    def __init__(self):
        super().__init__()
        self.control_point_query = TemporalShift(T, 4)
        self.control_point_value = TemporalShift(T, 4)

    def forward(self, x):
        q, k, v = self.split(x)
        k, v = self.control_point_query(k), self.control_point_value(v)
        return self.proj(self.join(self.weights(q, k) @ v))


class Stack(nn.Module):
    """A few modules of one kind, called with the same further arguments."""

    def __init__(self, parts: list[nn.Module], **arguments):
        super().__init__()
        self.blocks, self.arguments = nn.ModuleList(parts), arguments

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            out = block(x, **self.arguments)
            x = x + (out[0] if isinstance(out, tuple) else out)
        return x


def originals() -> dict[str, tuple[nn.Module, Tensor]]:
    clip, frames = torch.randn(B, 1 + T * N, C), torch.randn(B * T, 1 + N, C)
    sizes = {"B": B, "T": T, "W": WIDTH}
    trajectory = {"seq_len": N, "num_frames": T}
    return {
        "timesformer": (Stack([TimeSformerBlock(), TimeSformerBlock()], **sizes), clip),
        "time-major": (Stack([TimeMajorBlock(), TimeMajorBlock()], **sizes), clip),
        "motionformer": (Stack([TrajectoryAttention(True)] * 2, **trajectory), clip),
        "motionformer-projected": (Stack([TrajectoryAttention(False)], **trajectory), clip),
        "xvit": (Stack([ShiftAttention(), ShiftAttention()]), frames),
    }


def same_in_training(model, patched, run):
    """Outputs and gradients agree under one seed, stochastic depth included."""
    results = []
    for each in (model, patched):
        torch.manual_seed(3)
        out = run(each.train())
        out.square().sum().backward()
        results.append((out.detach(), {k: p.grad for k, p in each.named_parameters()}))
    (expected, grads), (out, new_grads) = results
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-5)
    for key, grad in grads.items():
        error = (new_grads[key] - grad).abs().max()
        assert error <= 1e-4 * max(grad.abs().max(), 1.0), key


@pytest.fixture
def calls(monkeypatch):
    """Names of the ops that were called."""
    seen = []
    for name in ("time_attention", "space_attention", "trajectory_attention", "shift_attention"):
        op = getattr(ops, name)
        monkeypatch.setattr(
            ops, name, lambda *a, _op=op, _name=name, **k: (seen.append(_name), _op(*a, **k))[1]
        )
    return seen


@pytest.mark.parametrize("name", list(originals()))
def test_original_module_trees_compute_the_same(name, calls):
    model, x = originals()[name]
    patched = copy.deepcopy(model)
    assert timefast.patch(patched) is patched
    assert set(patched.state_dict()) == set(model.state_dict())
    calls.clear()
    torch.testing.assert_close(patched.eval()(x), model.eval()(x), rtol=1e-4, atol=1e-5)
    kinds = {"timesformer": 2, "time-major": 2, "motionformer": 1, "xvit": 1}
    assert len(set(calls)) == kinds.get(name, 1)
    same_in_training(model, patched, lambda m: m(x))


def huggingface():
    transformers = pytest.importorskip("transformers")
    return transformers.TimesformerConfig(
        image_size=24, patch_size=8, num_frames=4, hidden_size=C, num_hidden_layers=2,
        num_attention_heads=HEADS, intermediate_size=2 * C, num_labels=5, initializer_range=0.2,
    )  # fmt: skip


def test_hugging_face_computes_the_same(calls):
    from transformers import TimesformerForVideoClassification, TimesformerModel

    model = TimesformerForVideoClassification(huggingface())
    model.timesformer.encoder.layer[1].drop_path = DropPath(0.5)
    patched = timefast.patch(copy.deepcopy(model))
    video = torch.randn(2, 4, 3, 24, 24)
    calls.clear()
    with torch.no_grad():
        expected = model.eval()(video, output_hidden_states=True)
        out = patched.eval()(video, output_hidden_states=True)
    assert calls == ["time_attention", "space_attention"] * 2
    torch.testing.assert_close(out.logits, expected.logits, rtol=1e-4, atol=1e-5)
    for state, wanted in zip(out.hidden_states, expected.hidden_states, strict=True):
        torch.testing.assert_close(state, wanted, rtol=1e-4, atol=1e-5)
    same_in_training(model, patched, lambda m: m(video).logits)
    bare = TimesformerModel(huggingface()).eval()
    again = timefast.patch(copy.deepcopy(bare))
    out, wanted = (m(video).last_hidden_state for m in (again, bare))
    torch.testing.assert_close(out, wanted, rtol=1e-4, atol=1e-5)


def test_hugging_face_cannot_give_attention_maps_any_more():
    from transformers import TimesformerModel

    model = timefast.patch(TimesformerModel(huggingface()))
    with pytest.raises(NotImplementedError, match="never forms attention probabilities"):
        model(torch.randn(1, 4, 3, 24, 24), output_attentions=True)


def test_gradient_checkpointing_of_hugging_face_still_works():
    from transformers import TimesformerModel

    model = timefast.patch(TimesformerModel(huggingface())).train()
    model.gradient_checkpointing_enable()
    model(torch.randn(1, 4, 3, 24, 24)).last_hidden_state.sum().backward()
    assert all(p.grad is not None for p in model.parameters())


def test_patching_twice_is_patching_once():
    model, x = originals()["timesformer"]
    timefast.patch(model)
    forward = model.blocks[0].forward
    assert timefast.patch(model).blocks[0].forward is forward


def test_a_copy_of_a_patched_model_uses_its_own_weights():
    model, x = originals()["xvit"]
    timefast.patch(model)
    twin = copy.deepcopy(model)
    nn.init.zeros_(twin.blocks[0].proj.weight)
    assert not torch.equal(twin(x), model(x))


def test_what_was_replaced_and_what_was_left_is_logged(caplog):
    mixed = Stack([ShiftAttention(), Attention()])
    with caplog.at_level(logging.INFO, logger="timefast"):
        timefast.patch(mixed)
    assert "shifted attention of X-ViT in blocks.0" in caplog.text
    assert "left as they are: blocks.1 (Attention)" in caplog.text


def test_unknown_models_are_refused_by_name():
    with pytest.raises(ValueError, match=r"no attention in this Linear. It knows divided"):
        timefast.patch(nn.Linear(3, 3))
    with pytest.raises(ValueError, match=r"attention of unknown form: blocks.0 \(Attention\)"):
        timefast.patch(Stack([Attention()]))


def test_attention_the_ops_do_not_compute_is_refused_and_nothing_changed():
    model = Stack([TimeSformerBlock(), TimeSformerBlock(drop=0.1)], B=B, T=T, W=WIDTH)
    with pytest.raises(ValueError, match=r"blocks.1 .*dropout 0.1 in attention.*set its p to 0"):
        timefast.patch(model)
    assert "forward" not in vars(model.blocks[0])

    class Cubed(ShiftAttention):
        def forward(self, x):
            return super().forward(x) ** 3

    with pytest.raises(ValueError, match=r"blocks.0 .*outputs differ by .* on a random input"):
        timefast.patch(Stack([Cubed()]))

    class Renamed(TimeSformerBlock):
        def forward(self, tokens, B, T, W):
            return super().forward(tokens, B, T, W)

    with pytest.raises(ValueError, match=r"forward takes \(tokens, B, T, W\), not \(x, B, T, W\)"):
        timefast.patch(Stack([Renamed()], B=B, T=T, W=WIDTH))


def test_patching_leaves_modes_and_random_state_alone():
    model, _ = originals()["timesformer"]
    model.train()
    model.blocks[1].eval()
    modes = [m.training for m in model.modules()]
    state = torch.get_rng_state()
    timefast.patch(model)
    assert [m.training for m in model.modules()] == modes
    assert torch.equal(torch.get_rng_state(), state)


def test_approximations_of_motionformer_are_not_replaced_silently():
    model, x = originals()["motionformer"]
    attn = timefast.patch(model).blocks[0]
    with pytest.raises(NotImplementedError, match="approx='orthoformer'"):
        attn(x, seq_len=N, num_frames=T, approx="orthoformer")
    assert F.mse_loss(attn(x, seq_len=N, num_frames=T)[0], attn(x, N, T)[0]) == 0
