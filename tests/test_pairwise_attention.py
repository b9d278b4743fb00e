"""What is special to the attention between neighbouring frames."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from timefast import ops


@pytest.fixture(params=["reference", "cpu", "triton"])
def impl(request):
    reasons = ops.implementations("pairwise_attention").get(request.param, ["there is none"])
    if reasons:
        pytest.skip("; ".join(reasons))
    return request.param


def tokens(b, p, n, c, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(3, b, p, n, c, generator=generator).unbind(0)


def test_pairs_do_not_see_each_other(impl):
    q, k, v = tokens(2, 3, 5, 32)
    before = ops.pairwise_attention(q, k, v, impl=impl)
    for x in (q, k, v):
        x[:, 1] = 100.0
    after = ops.pairwise_attention(q, k, v, impl=impl)
    assert torch.equal(after[:, [0, 2]], before[:, [0, 2]])


def test_permuting_the_earlier_frame_changes_nothing(impl):
    q, k, v = tokens(1, 2, 6, 32)
    order = torch.tensor([5, 2, 0, 1, 4, 3])
    permuted = ops.pairwise_attention(q, k[:, :, order], v[:, :, order], impl=impl)
    torch.testing.assert_close(permuted, ops.pairwise_attention(q, k, v, impl=impl))


def test_a_sharp_query_picks_its_patch(impl):
    """Keys are a basis: a patch that moved finds where it was."""
    keys = torch.eye(16)[None, None] * 30
    moved = torch.arange(16).roll(3)
    _, _, v = tokens(1, 1, 16, 16)
    out = ops.pairwise_attention(keys[:, :, moved], keys, v, impl=impl)
    torch.testing.assert_close(out, v[:, :, moved])


@settings(max_examples=10, deadline=None)
@given(st.integers(1, 2), st.integers(1, 3), st.integers(1, 30), st.integers(1, 40))
def test_it_is_sdpa_with_one_head(b, p, n, c):
    q, k, v = tokens(b, p, n, c)
    want = torch.nn.functional.scaled_dot_product_attention(q, k, v)
    torch.testing.assert_close(ops.pairwise_attention(q, k, v, impl="cpu"), want)


def test_frames_too_long_to_keep_probabilities_agree_with_the_reference():
    q, k, v = tokens(1, 1, 600, 8)
    want = ops.pairwise_attention(q, k, v, impl="reference")
    torch.testing.assert_close(ops.pairwise_attention(q, k, v, impl="cpu"), want)


def test_the_width_of_a_whole_model_is_one_head(impl):
    q, k, v = (x.requires_grad_() for x in tokens(1, 1, 20, 768))
    out = ops.pairwise_attention(q, k, v, impl=impl)
    grads = torch.autograd.grad(out.square().sum(), (q, k, v))
    true = [x.detach().double().requires_grad_() for x in (q, k, v)]
    want = ops.pairwise_attention(*true, impl="reference")
    for got, expected in zip(grads, torch.autograd.grad(want.square().sum(), true), strict=True):
        assert (got - expected).norm() <= 1e-5 * expected.norm()
