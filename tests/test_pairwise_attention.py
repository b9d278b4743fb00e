"""What is special to the attention between neighbouring frames."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from timefast import ops

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture(params=["reference", "cpu", "triton"])
def impl(request):
    reasons = ops.implementations("pairwise_attention").get(request.param, ["there is none"])
    if reasons:
        pytest.skip("; ".join(reasons))
    return request.param


@pytest.fixture
def long_frames(monkeypatch):
    """Frames of more than 16 patches, and heads wider than 16, take several tiles and parts."""
    kernels = pytest.importorskip(
        "timefast.kernels.flow_attention_triton", reason="no Triton", exc_type=ImportError
    )
    if reasons := ops.implementations("pairwise_attention")["triton"]:
        pytest.skip("; ".join(reasons))
    monkeypatch.setattr(kernels, "WHOLE", 16)
    launch = kernels.launch_parameters
    small = {"block": 32, "step": 16, "chunk": 16, "part": 16}
    monkeypatch.setattr(kernels, "launch_parameters", lambda *a, **k: {**launch(*a, **k), **small})
    calls = []
    started = kernels._launch
    monkeypatch.setattr(kernels, "_launch", lambda *a: calls.append(a[1]) or started(*a))
    yield calls
    assert calls
    assert all(name.startswith("long_") for name in calls)


def tokens(b, p, n, c, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(3, b, p, n, c, generator=generator).to(DEVICE).unbind(0)


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
    keys = torch.eye(16, device=DEVICE)[None, None] * 30
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


@pytest.mark.usefixtures("long_frames")
@pytest.mark.parametrize(
    "n, c", [(17, 8), (48, 24)]
)  # a last tile of one key; whole tiles, two parts
@pytest.mark.parametrize("dtype, limit", [(torch.float32, 1e-6), (torch.float16, 1e-3)])
def test_tiles_of_a_long_frame_add_up_to_the_reference(n, c, dtype, limit):
    q, k, v = (x.to(dtype) for x in tokens(1, 2, n, c))
    k = 3 * k  # sharp rows: the largest score is in any tile
    q, k, v = (x.requires_grad_() for x in (q[:, 1:], k[:, :-1], v[:, :-1]))
    upstream = tokens(1, 1, 1, c, seed=1)[0].expand(q.shape).to(dtype)
    out = ops.pairwise_attention(q, k, v, impl="triton")
    got = (out, *torch.autograd.grad(out, (q, k, v), upstream))
    true = [x.detach().double().requires_grad_() for x in (q, k, v)]
    want = ops.pairwise_attention(*true, impl="reference")
    want = (want, *torch.autograd.grad(want, true, upstream.double()))
    for a, b in zip(got, want, strict=True):
        assert (a - b).norm() <= limit * b.norm()


def test_a_long_frame_is_deterministic_and_pairs_stay_apart(long_frames):
    def run(k):
        leaves = [x.detach().requires_grad_() for x in (q, k, v)]
        out = ops.pairwise_attention(*leaves, impl="triton")
        return (out, *torch.autograd.grad(out.square().sum(), leaves))

    q, k, v = tokens(1, 2, 20, 24)
    before = run(k)
    assert all(torch.equal(a, b) for a, b in zip(before, run(k), strict=True))
    other = k.clone()
    other[:, 1] += 1
    assert all(torch.equal(a[:, 0], b[:, 0]) for a, b in zip(before, run(other), strict=True))
    assert set(long_frames) == {"long_fwd", "long_bwd_dq", "long_bwd_dkv"}


def test_long_frames_allocate_nothing_larger_than_their_tokens(monkeypatch):
    """With the launch parameters of the table, where tiles begin: 257 patches."""
    if reasons := ops.implementations("pairwise_attention")["triton"]:
        pytest.skip("; ".join(reasons))
    q, k, v = tokens(1, 1, 257, 16)
    want = ops.pairwise_attention(q, k, v, impl="reference")
    sizes = []
    new_empty = torch.Tensor.new_empty

    def recorded(*args, **kwargs):
        sizes.append((result := new_empty(*args, **kwargs)).numel())
        return result

    monkeypatch.setattr(torch.Tensor, "new_empty", recorded)
    out = ops.pairwise_attention(q, k, v, impl="triton")
    torch.testing.assert_close(out, want)
    assert max(sizes) == q.numel() < 257 * 257


@pytest.mark.slow
@pytest.mark.parametrize("n, c", [(300, 768), (1024, 64), (1024, 1024)])
def test_the_largest_frames_and_widths_agree_with_the_reference(impl, n, c, monkeypatch):
    if impl == "triton" and not torch.cuda.is_available():  # larger tiles, fewer programs
        from timefast.kernels import flow_attention_triton as kernels

        large = {"block": 256, "step": 256, "chunk": 128, "part": 256}
        launch = kernels.launch_parameters
        monkeypatch.setattr(
            kernels, "launch_parameters", lambda *a, **k: {**launch(*a, **k), **large}
        )
    q, k, v = (x.requires_grad_() for x in tokens(1, 1, n, c))
    out = ops.pairwise_attention(q, k, v, impl=impl)
    grads = torch.autograd.grad(out.square().sum(), (q, k, v))
    true = [x.detach().double().requires_grad_() for x in (q, k, v)]
    want = ops.pairwise_attention(*true, impl="reference")
    for got, expected in zip(grads, torch.autograd.grad(want.square().sum(), true), strict=True):
        assert (got - expected).norm() <= 1e-5 * expected.norm()


@pytest.mark.gpu
@pytest.mark.parametrize("n, c", [(196, 768), (257, 1024), (1024, 768)])
@pytest.mark.parametrize("dtype, limit", [(torch.bfloat16, 1.2e-2), (torch.float16, 1.5e-3)])
def test_on_a_gpu_large_frames_agree_with_the_reference(n, c, dtype, limit):
    q, k, v = (x.to(dtype).requires_grad_() for x in tokens(2, 3, n, c))
    upstream = tokens(2, 3, n, c, seed=1)[0].to(dtype)
    out = ops.pairwise_attention(q, k, v, impl="triton")
    got = (out, *torch.autograd.grad(out, (q, k, v), upstream))
    true = [x.detach().double().requires_grad_() for x in (q, k, v)]
    want = ops.pairwise_attention(*true, impl="reference")
    want = (want, *torch.autograd.grad(want, true, upstream.double()))
    for a, b in zip(got, want, strict=True):
        assert (a - b).norm() <= limit * b.norm()


def test_a_head_wider_than_1024_is_refused_with_its_width():
    q, k, v = tokens(1, 1, 2, 1025)
    with pytest.raises(NotImplementedError, match="1025 wide in its last dimension; .* takes 1024"):
        ops.pairwise_attention(q, k, v, impl="triton")
