"""What is special to attention over time and over space."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from timefast import ops
from timefast.kernels.op import OPS

ON_GPU = torch.cuda.is_available()
IMPLS = ["reference", "cpu", "triton"]
TRUTH = "reference"


def skip_unless_it_runs(impl):
    if reasons := ops.implementations("time_attention")[impl]:
        pytest.skip("; ".join(reasons))


@pytest.fixture(params=IMPLS)
def impl(request):
    skip_unless_it_runs(request.param)
    return request.param


def tokens(*shape, seed=0, n=3, scale=1.0, dtype=torch.float32, device="cpu"):
    x = torch.randn(n, *shape, generator=torch.Generator().manual_seed(seed)) * scale
    return x.to(device, dtype).unbind(0)


def space_inputs(b, t, n, h, d, **options):
    return (*tokens(b, t, n, h, d, **options), *tokens(b, h, d, **options, seed=1))


def close(a, b, tolerance=2e-5):
    torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


def gradients(function, args):
    leaves = [x.detach().requires_grad_() for x in args]
    out = function(*leaves)
    out = out if isinstance(out, tuple) else (out,)
    total = sum((x * torch.linspace(-1, 1, x.numel()).view(x.shape).to(x)).sum() for x in out)
    return [*out, *torch.autograd.grad(total, leaves)]


def agrees_with_the_reference(name, impl, args, tolerance=2e-5, **kwargs):
    def run(which):
        return lambda *args: getattr(ops, name)(*args, **kwargs, impl=which)

    got = gradients(run(impl), args)
    true = gradients(run(TRUTH), [x.double() for x in args])
    for g, t in zip(got, true, strict=True):
        error = (g.double() - t).norm() / t.norm().clamp(min=1e-3)
        assert error < tolerance


def test_permuting_frames_permutes_the_output_of_time_attention(impl):
    q, k, v = tokens(2, 5, 3, 2, 16)
    order = torch.tensor([3, 0, 4, 1, 2])
    permuted = ops.time_attention(q[:, order], k[:, order], v[:, order], impl=impl)
    close(permuted, ops.time_attention(q, k, v, impl=impl)[:, order])


def test_with_one_frame_time_attention_returns_its_values(impl):
    q, k, v = tokens(2, 1, 7, 2, 16)
    close(ops.time_attention(q, k, v, impl=impl), v)


def test_time_attention_ignores_other_patches(impl):
    q, k, v = tokens(1, 4, 6, 2, 16)
    before = ops.time_attention(q, k, v, impl=impl)
    for x in (q, k, v):
        x[:, :, 1] = 100.0
    after = ops.time_attention(q, k, v, impl=impl)
    others = [0, 2, 3, 4, 5]
    assert torch.equal(after[:, :, others], before[:, :, others])
    assert not torch.equal(after[:, :, 1], before[:, :, 1])


def test_with_scale_zero_time_attention_averages_the_values(impl):
    q, k, v = tokens(1, 6, 3, 1, 16)
    out = ops.time_attention(q, k, v, scale=0.0, impl=impl)
    close(out, v.mean(1, keepdim=True).expand_as(v))


def test_space_attention_ignores_other_frames(impl):
    args = space_inputs(1, 3, 5, 2, 16)
    before, _ = ops.space_attention(*args, impl=impl)
    for x in args[:3]:
        x[:, 1] = 100.0
    after, _ = ops.space_attention(*args, impl=impl)
    assert torch.equal(after[:, [0, 2]], before[:, [0, 2]])


def test_equal_frame_weights_are_the_mean(impl):
    args = space_inputs(2, 4, 5, 2, 16)
    weight = torch.full((2, 4), 0.25)
    out, cls = ops.space_attention(*args, impl=impl)
    weighted_out, weighted_cls = ops.space_attention(*args, frame_weight=weight, impl=impl)
    close(weighted_cls, cls)
    assert torch.equal(weighted_out, out)


def test_a_frame_of_weight_zero_does_not_reach_the_class_token(impl):
    args = space_inputs(1, 3, 5, 2, 16)
    weight = torch.tensor([[0.5, 0.0, 0.5]])
    _, before = ops.space_attention(*args, frame_weight=weight, impl=impl)
    args[2][:, 1] = 100.0
    _, after = ops.space_attention(*args, frame_weight=weight, impl=impl)
    close(after, before)


def test_the_gradient_of_a_frame_weight_is_its_class_output_times_what_came_back(impl):
    args = space_inputs(2, 3, 5, 2, 16)
    weight = torch.rand(2, 3, requires_grad=True)
    upstream = torch.randn(2, 2, 16)
    _, cls = ops.space_attention(*args, frame_weight=weight, impl=impl)
    cls.backward(upstream)
    for t in range(3):
        only = torch.zeros(2, 3)
        only[:, t] = 1.0
        _, of_frame = ops.space_attention(*args, frame_weight=only, impl=impl)
        close(weight.grad[:, t], (upstream * of_frame).sum((1, 2)), 1e-4)


def test_a_class_token_that_all_keys_prefer_is_what_all_get(impl):
    q, k, v, cls_q, cls_k, cls_v = space_inputs(1, 2, 4, 1, 16)
    q, cls_q = q.abs(), cls_q.abs()
    out, cls = ops.space_attention(
        q, -k.abs(), v, cls_q, torch.full_like(cls_k, 100.0), cls_v, impl=impl
    )
    close(out, cls_v[:, None, None].expand_as(out))
    close(cls, cls_v)


@pytest.mark.parametrize("size", [30.0, 1000.0])
def test_large_scores_neither_overflow_nor_lose_the_gradient(impl, size):
    q, k, v = tokens(1, 3, 4, 1, 16)
    agrees_with_the_reference("time_attention", impl, (q * size, k, v), 1e-3)
    q, k, v, *cls = space_inputs(1, 2, 17, 1, 16)
    agrees_with_the_reference("space_attention", impl, (q * size, -k, v, *cls), 1e-3)


@settings(max_examples=12, deadline=None)
@given(
    st.integers(1, 2), st.integers(1, 9), st.integers(1, 11), st.integers(1, 3),
    st.sampled_from([8, 16, 20, 48]), st.sampled_from(["cpu", "triton"]),
)  # fmt: skip
def test_time_attention_of_any_size_agrees_with_the_reference(b, t, n, h, d, impl):
    skip_unless_it_runs(impl)
    agrees_with_the_reference("time_attention", impl, tokens(b, t, n, h, d))


@settings(max_examples=8, deadline=None)
@given(
    st.integers(1, 2), st.integers(1, 3), st.integers(1, 40), st.integers(1, 2),
    st.sampled_from([8, 16, 20, 48]), st.sampled_from(["cpu", "triton"]),
)  # fmt: skip
def test_space_attention_of_any_size_agrees_with_the_reference(b, t, n, h, d, impl):
    skip_unless_it_runs(impl)
    agrees_with_the_reference("space_attention", impl, space_inputs(b, t, n, h, d))


@pytest.mark.parametrize("frames", [32, 33, 128])
def test_long_clips_agree_with_the_reference(impl, frames):
    agrees_with_the_reference("time_attention", impl, tokens(1, frames, 2, 1, 80))


@pytest.mark.parametrize("patches", [63, 64, 65, 130])
def test_frames_around_a_tile_agree_with_the_reference(impl, patches):
    agrees_with_the_reference("space_attention", impl, space_inputs(1, 1, patches, 1, 16))


def test_frames_too_long_to_keep_probabilities_agree_with_the_reference():
    agrees_with_the_reference("space_attention", "cpu", space_inputs(1, 1, 600, 1, 8))
    agrees_with_the_reference("time_attention", "cpu", tokens(1, 520, 1, 2, 8))


QUICK = ("test_schema", "test_autograd_registration", "test_faketensor")


@pytest.mark.parametrize(
    "checks", [QUICK, pytest.param(("test_aot_dispatch_dynamic",), marks=pytest.mark.slow)]
)
@pytest.mark.parametrize("name", ["time_attention", "space_attention"])
def test_the_custom_ops_keep_the_rules_of_torch_library(name, checks):
    skip_unless_it_runs("triton")
    from timefast.kernels import divided_attention_triton as kernels

    args, _ = OPS[name].cases[0].build(torch.float32, "cpu", torch.Generator().manual_seed(0))
    leaves = [x.detach().requires_grad_() for x in args]
    op = getattr(kernels, f"{name}_op")
    torch.library.opcheck(op, (*leaves, 0.25), test_utils=checks)


@pytest.mark.parametrize("dtype, frames", [(torch.float32, 65), (torch.float16, 129)])
def test_more_frames_than_a_tile_holds_take_tiles_of_keys(dtype, frames):
    skip_unless_it_runs("triton")
    args = tokens(1, frames, 2, 2, 16, dtype=dtype)
    agrees_with_the_reference("time_attention", "triton", args, 1e-3)


def test_heads_wider_than_the_kernels_hold_are_refused_with_the_number():
    skip_unless_it_runs("triton")
    wide = tokens(1, 2, 1, 1, 136, n=1)[0]
    with pytest.raises(NotImplementedError, match="136 wide"):
        ops.time_attention(wide, wide, wide, impl="triton")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["time", "space", "shift", "trajectory"])
def test_offsets_beyond_31_bits_reach_the_right_clip(name):
    skip_unless_it_runs("triton")
    stride = 2**30 + 64  # between clips; the third starts beyond 2**31 elements
    memory = torch.empty(2 * stride + 4096, dtype=torch.float16)  # hardly any page is touched
    far = memory.as_strided((3, 2, 3, 1, 16), (stride, 48, 16, 16, 1))
    near = torch.randn(3, 2, 3, 1, 16, dtype=torch.float16)
    far.copy_(near)
    cls, weight = near[:, 0, 0], torch.randn(32, 16, dtype=torch.float16) / 4
    rest = {
        "space": (cls, cls, cls),
        "trajectory": (cls, cls, cls, weight[:16], None, weight, None),
    }.get(name, ())
    kwargs = {"shift_div": 2} if name == "shift" else {}

    def results(x):
        leaf = x.detach().requires_grad_()
        out = getattr(ops, f"{name}_attention")(leaf, leaf, leaf, *rest, **kwargs, impl="triton")
        out = out if isinstance(out, tuple) else (out,)
        return [*out, *torch.autograd.grad(sum(y.sum() for y in out), leaf)]

    for got, want in zip(results(far), results(near), strict=True):
        assert torch.equal(got, want)


GPU_SHAPES = [(2, 8, 196, 12, 64), (1, 16, 196, 12, 64), (2, 5, 49, 3, 48), (1, 96, 20, 2, 128)]
GPU_LIMITS = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.2e-2}


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", GPU_LIMITS)
@pytest.mark.parametrize("shape", GPU_SHAPES)
def test_on_a_gpu_the_kernels_agree_with_the_reference(shape, dtype):
    options = {"dtype": dtype, "device": "cuda"}
    limit = GPU_LIMITS[dtype]
    agrees_with_the_reference("time_attention", "triton", tokens(*shape, **options), limit)
    agrees_with_the_reference("space_attention", "triton", space_inputs(*shape, **options), limit)


@pytest.mark.gpu
def test_on_a_gpu_more_sequences_than_a_grid_axis_holds():
    args = tokens(340, 2, 196, 1, 16, dtype=torch.float16, device="cuda")  # 66,640 sequences
    agrees_with_the_reference("time_attention", "triton", args, 2e-3)
    args = space_inputs(340, 200, 3, 1, 16, dtype=torch.float16, device="cuda")  # 68,000 frames
    agrees_with_the_reference("space_attention", "triton", args, 2e-3)


@pytest.mark.gpu
def test_on_a_gpu_auto_takes_triton():
    q, k, v = tokens(1, 8, 49, 3, 64, dtype=torch.bfloat16, device="cuda")
    auto = ops.time_attention(q, k, v)
    assert torch.equal(auto, ops.time_attention(q, k, v, impl="triton"))
