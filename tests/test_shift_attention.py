"""What is special to the shifted attention of X-ViT; test_ops.py sweeps what all ops promise."""

import pytest
import torch

from timefast.kernels import native
from timefast.kernels.op import OPS
from timefast.ops import shift_attention

OP = OPS["shift_attention"]
TINY = [case for case in OP.cases if case.size == "tiny"]


def qkv(B: int = 1, T: int = 4, S: int = 3, H: int = 4, D: int = 8) -> list[torch.Tensor]:
    return list(torch.randn(B, T, S, 3, H, D, dtype=torch.float64).unbind(3))


def reads(frame: int, **config) -> torch.Tensor:
    """[T, H]: which frames' outputs, per head, change with keys and values of one frame."""
    q, k, v = qkv()
    before = shift_attention(q, k, v, **config)
    k, v = k.clone(), v.clone()
    k[:, frame] += 1
    v[:, frame] += 1
    return (shift_attention(q, k, v, **config) != before).any(-1).any(2)[0]


@pytest.mark.parametrize("case", TINY, ids=lambda case: case.name)
def test_portable_path_is_the_reference_with_its_gradients(case):
    args, kwargs = case.build(torch.float64, "cpu", torch.Generator().manual_seed(0))
    results = []
    for impl in ("reference", "cpu"):
        inputs = [x.detach().clone().requires_grad_() for x in args]
        out = shift_attention(*inputs, **kwargs, impl=impl)
        weight = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view(out.shape)
        results.append((out, *torch.autograd.grad((out * weight).sum(), inputs)))
    for expected, actual in zip(*results, strict=True):
        torch.testing.assert_close(actual, expected)


def test_library_attention_gives_the_same():
    inputs = qkv(S=5, H=3)
    for shift_div in (3, 4):  # folds of whole heads, folds inside heads
        expected = shift_attention(*inputs, shift_div=shift_div, impl="cpu")
        with native.disabled():
            out = shift_attention(*inputs, shift_div=shift_div, impl="cpu")
        torch.testing.assert_close(out, expected)


@pytest.mark.parametrize("impl", ["reference", "cpu"])
def test_heads_read_the_next_the_previous_and_their_own_frame(impl):
    changed = reads(2, shift_div=4, impl=impl)
    assert changed.tolist() == [
        [False, False, False, False],
        [True, False, False, False],  # head 0 of frame 1 reads frame 2
        [False, False, True, True],
        [False, True, False, False],  # head 1 of frame 3 reads frame 2
    ]


@pytest.mark.parametrize("impl", ["reference", "cpu"])
def test_beyond_the_ends_stand_zeros(impl):
    out = shift_attention(*qkv(), shift_div=4, impl=impl)
    assert not out[:, -1, :, 0].any() and not out[:, 0, :, 1].any()
    assert out[:, 0, :, 0].any() and out[:, -1, :, 1].any()


def test_a_fold_inside_a_head_mixes_its_channels():
    q, k, v = qkv(H=2, D=6)  # folds of 3 channels: half of head 0 from each side
    out = shift_attention(q, k, v, shift_div=4)
    mixed = torch.cat([v[:, 2:3, :, 0, :3], v[:, 0:1, :, 0, 3:]], -1)
    keys = torch.cat([k[:, 2:3, :, 0, :3], k[:, 0:1, :, 0, 3:]], -1)
    scores = q[:, 1:2, :, 0] @ keys.transpose(-1, -2) * 6**-0.5
    torch.testing.assert_close(out[:, 1:2, :, 0], scores.softmax(-1) @ mixed)


def test_mistakes_are_named():
    q, k, v = qkv()
    with pytest.raises(ValueError, match="shift_div: expected at least 1, got 0"):
        shift_attention(q, k, v, shift_div=0)
    with pytest.raises(ValueError, match=r"k: expected \[1, 4, 3, 4, 8\]"):
        shift_attention(q, k[:, :, 1:], v)
    with pytest.raises(ValueError, match=r"q: expected a floating \[B, T, S, H, D\]"):
        shift_attention(q[0], k, v)
