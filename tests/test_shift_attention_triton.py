"""The Triton kernels of the shifted attention against the reference in float64: small cases in the
interpreter without a GPU, the paper's shapes with one. test_ops.py sweeps what all ops promise."""

import pytest
import torch

from timefast.ops import shift_attention

pytest.importorskip("triton")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# Relative errors of output and gradients; exact products, see docs/kernels/shift_attention.md.
LIMITS = {
    torch.float32: (2e-6, 2e-6), torch.float16: (1e-3, 1e-3), torch.bfloat16: (8e-3, 1.2e-2),
}  # fmt: skip


def qkv(shape, dtype=torch.float32):
    B, T, S, H, D = shape
    generator = torch.Generator().manual_seed(0)
    return torch.randn(B, T, S, 3, H, D, generator=generator).to(DEVICE, dtype).unbind(3)


def with_gradients(inputs, grad, **config):
    leaves = [x.detach().requires_grad_() for x in inputs]
    out = shift_attention(*leaves, **config)
    return [out.detach(), *torch.autograd.grad(out, leaves, grad.to(out.dtype))]


def check(shape, shift_div, dtype):
    inputs = qkv(shape, dtype)
    grad = torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(DEVICE, dtype)
    wide = [x.double() for x in inputs]
    truth = with_gradients(wide, grad, shift_div=shift_div, impl="reference")
    found = with_gradients(inputs, grad, shift_div=shift_div, impl="triton")
    for i, (got, true) in enumerate(zip(found, truth, strict=True)):
        # a gradient that is zero but for rounding is measured against the one it comes from
        error = (got.double() - true).norm() / true.norm().clamp(min=0.1 * grad.double().norm())
        assert error <= LIMITS[dtype][i > 0], ("output", "dq", "dk", "dv")[i]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["float32", "float16"])
@pytest.mark.parametrize(
    ("shape", "shift_div"),
    [
        ((1, 2, 1, 2, 16), 3),  # one token; all three sources in one head
        ((1, 2, 33, 1, 48), 6),  # a tile and one token; folds of 8 columns
        ((1, 2, 37, 2, 24), 7),  # folds of 6 columns: nothing is aligned
        ((1, 3, 5, 2, 96), 2),  # every head is shifted
        ((1, 1, 7, 3, 16), 1),  # one frame, one fold: all is zero
    ],
    ids=str,
)
def test_any_fold_gives_outputs_and_gradients_of_the_reference(shape, shift_div, dtype):
    check(shape, shift_div, dtype)


@pytest.mark.parametrize("shift_div", [4, 5], ids=["whole heads", "inside heads"])
def test_no_element_is_left_unwritten(shift_div, monkeypatch):
    """Allocations hold NaN until something is written."""

    def poisoned(like, *args, empty=torch.Tensor.new_empty, **kwargs):
        return empty(like, *args, **kwargs).fill_(float("nan"))

    inputs = qkv((1, 2, 5, 4, 16))
    monkeypatch.setattr(torch.Tensor, "new_empty", poisoned)
    for x in with_gradients(inputs, inputs[0], shift_div=shift_div, impl="triton"):
        assert x.isfinite().all()


def test_a_head_without_a_neighbour_gives_exactly_nothing():
    q, k, v = qkv((1, 3, 5, 4, 16))
    out, dq, dk, dv = with_gradients((q, k, v), q, shift_div=4, impl="triton")
    assert not out[:, -1, :, 0].any() and not out[:, 0, :, 1].any()
    assert not dq[:, -1, :, 0].any() and not dq[:, 0, :, 1].any()
    for x in (dk, dv):  # nobody reads the first frame from before, or the last from after
        assert not x[:, 0, :, 0].any() and not x[:, -1, :, 1].any()
        assert x[:, 1:, :, 0].all() and x[:, :-1, :, 1].all()


@pytest.mark.parametrize("fold", [16, 12])
def test_custom_op_is_registered_as_torch_expects(fold):
    from timefast.kernels.shift_attention_triton import shift_attention_op

    inputs = [x.detach().requires_grad_() for x in qkv((1, 2, 3, 3, 16))]
    torch.library.opcheck(shift_attention_op, (*inputs, fold, 0.25))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", LIMITS, ids=str)
@pytest.mark.parametrize("shift_div", [4, 8, 5], ids=lambda div: f"div {div}")
def test_on_a_gpu_the_papers_shape_is_right_in_every_dtype(dtype, shift_div):
    check((8, 8, 197, 12, 64), shift_div, dtype)


@pytest.mark.gpu
@pytest.mark.parametrize("width", [16, 48, 80, 96, 128])
def test_on_a_gpu_odd_lengths_and_widths_are_right(width):
    for shape in ((1, 2, 4097, 2, width), (2, 5, 51, 3, width)):
        check(shape, 3, torch.float16)


@pytest.mark.gpu
@pytest.mark.parametrize("shift_div", [4, 5])
def test_on_a_gpu_the_shift_takes_no_memory(shift_div):
    inputs = qkv((2, 8, 197, 12, 64), torch.bfloat16)
    shift_attention(*inputs, shift_div=shift_div, impl="triton")
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    out = shift_attention(*inputs, shift_div=shift_div, impl="triton")
    statistics = 4 * out.numel() // out.shape[-1]
    taken = torch.cuda.max_memory_allocated() - before
    assert taken <= 1.05 * (out.numel() * out.element_size() + statistics)


@pytest.mark.gpu
def test_on_a_gpu_repetition_gives_the_same_bits():
    inputs = qkv((2, 5, 197, 3, 64), torch.bfloat16)
    first = with_gradients(inputs, inputs[0], shift_div=4, impl="triton")
    again = with_gradients(inputs, inputs[0], shift_div=4, impl="triton")
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
