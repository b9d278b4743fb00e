"""What is special to trajectory_attention; tests/test_ops.py has what every op promises."""

import contextlib

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from timefast import ops
from timefast.kernels import native
from timefast.kernels import trajectory_attention as portable
from timefast.kernels.op import OPS

CASES = {case.name: case for case in OPS["trajectory_attention"].cases}
KINDS = ["trajectory", "projected"]


def make(B, T, N, H, D, *, bias=True, dtype=torch.float64):
    """Leaves: q, k, v, the class token's, weights and biases."""
    dim = H * D

    def leaf(*shape, std=1.0):
        return (std * torch.randn(*shape)).to(dtype).requires_grad_()

    tokens = [leaf(B, T, N, H, D) for _ in range(3)] + [leaf(B, H, D) for _ in range(3)]
    b_q, b_kv = (leaf(dim), leaf(2 * dim)) if bias else (None, None)
    std = 1.5 * dim**-0.5
    return [*tokens, leaf(dim, dim, std=std), b_q, leaf(2 * dim, dim, std=std), b_kv]


def gradients(args, impl, **kwargs):
    leaves = [None if x is None else x.detach().requires_grad_() for x in args]
    out = ops.trajectory_attention(*leaves, impl=impl, **kwargs)
    generator = torch.Generator().manual_seed(1)
    grads = [torch.randn(x.shape, generator=generator).to(x.dtype) for x in out]
    torch.autograd.backward(out, grads)
    return [*out, *(x.grad for x in leaves if x is not None)]


def assert_equal(got, expected, tolerance):
    for x, y in zip(got, expected, strict=True):
        scale = max(1.0, y.abs().max().item()) if y.numel() else 1.0
        assert x.shape == y.shape and x.dtype == y.dtype
        assert torch.isfinite(x).all() and ((x - y).abs() <= tolerance * scale).all()


@pytest.mark.parametrize("values", KINDS)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("workspace", [1, 40_000, 1 << 27])
def test_any_split_of_the_portable_path_gives_the_same(values, bias, workspace, monkeypatch):
    args = make(3, 3, 5, 2, 16, bias=bias)
    expected = gradients(args, "reference", values=values)
    monkeypatch.setattr(portable, "WORKSPACE", workspace)
    assert_equal(gradients(args, "cpu", values=values), expected, 1e-12)


def test_the_reference_is_the_definition_written_out():
    q, k, v, cls_q, cls_k, cls_v, w_q, b_q, w_kv, b_kv = make(1, 2, 3, 1, 4)
    for values in KINDS:
        out, cls_out = ops.trajectory_attention(
            q, k, v, cls_q, cls_k, cls_v, w_q, b_q, w_kv, b_kv, values=values, impl="reference"
        )
        t, n = 1, 2
        x = [((q[0, t, n, 0] @ k[0, s, :, 0].T) / 2).softmax(-1) @ v[0, s, :, 0] for s in (0, 1)]
        q2 = w_q @ x[t] + b_q
        k2, v2 = zip(*((w_kv @ y + b_kv).chunk(2) for y in x), strict=True)
        along = torch.stack([q2 @ y / 2 for y in k2]).softmax(-1)
        chosen = x if values == "trajectory" else v2
        torch.testing.assert_close(out[0, t, n, 0], along[0] * chosen[0] + along[1] * chosen[1])
        keys = torch.cat([cls_k[0], k[0, :, :, 0].flatten(0, 1)])
        p = (cls_q[0, 0] @ keys.T / 2).softmax(-1)
        torch.testing.assert_close(
            cls_out[0, 0], p @ torch.cat([cls_v[0], v[0, :, :, 0].flatten(0, 1)])
        )


def test_with_one_frame_the_trajectory_is_the_answer_itself():
    q, k, v, *rest = make(2, 1, 5, 2, 8)
    out, _ = ops.trajectory_attention(q, k, v, *rest)
    heads_first = [x[:, 0].transpose(1, 2) for x in (q, k, v)]
    plain = torch.nn.functional.scaled_dot_product_attention(*heads_first)
    torch.testing.assert_close(out[:, 0], plain.transpose(1, 2))


def test_patches_of_a_frame_may_come_in_any_order():
    q, k, v, *rest = make(2, 3, 5, 2, 8)
    order = torch.randperm(5)
    out, cls_out = ops.trajectory_attention(q, k, v, *rest)
    moved, cls_moved = ops.trajectory_attention(q, k[:, :, order], v[:, :, order], *rest)
    torch.testing.assert_close(moved, out)
    torch.testing.assert_close(cls_moved, cls_out)


@pytest.mark.parametrize("impl", ["cpu", "triton"])
def test_parameters_that_nothing_depends_on_get_exact_zeros(impl):
    for values in KINDS:
        *_, dw_kv, db_kv = gradients(make(1, 2, 3, 2, 16, dtype=torch.float32), impl, values=values)
        (dw_k, dw_v), (db_k, db_v) = dw_kv.chunk(2), db_kv.chunk(2)
        assert dw_k.any() and not db_k.any()
        assert bool(dw_v.any()) == bool(db_v.any()) == (values == "projected")


@pytest.mark.parametrize("values", KINDS)
@pytest.mark.parametrize("path", [contextlib.nullcontext, native.disabled])
def test_neither_scores_nor_keys_of_the_whole_clip_are_ever_allocated(path, values, monkeypatch):
    B, T, N, H, D = 2, 8, 20, 2, 16
    monkeypatch.setattr(portable, "WORKSPACE", 1 << 16)
    args = make(B, T, N, H, D, dtype=torch.float32)
    seen = Largest()
    with path(), seen:
        gradients(args, "cpu", values=values)
    scores, projected = B * H * (T * N) ** 2, B * T * N * T * 2 * H * D
    assert seen.elements < min(scores, projected) / 4


class Largest(TorchDispatchMode):
    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for x in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(x, torch.Tensor):
                stored = x.untyped_storage().nbytes() // x.element_size()
                self.elements = max(self.elements, stored)
        return out


def test_wrong_arguments_are_named():
    args = make(1, 2, 3, 2, 8)
    with pytest.raises(ValueError, match="values: expected trajectory or projected, got 'both'"):
        ops.trajectory_attention(*args, values="both")
    for i, name in enumerate(["cls_q", "cls_k", "cls_v", "w_q", "b_q", "w_kv", "b_kv"], start=3):
        wrong = list(args)
        wrong[i] = wrong[i][..., :-1]
        with pytest.raises(ValueError, match=f"{name}: expected .* to go with q"):
            ops.trajectory_attention(*wrong)
    with pytest.raises(NotImplementedError, match="q has 65 frames; triton takes 1 to 64"):
        ops.trajectory_attention(*make(1, 65, 1, 1, 8, dtype=torch.float32), impl="triton")


@pytest.mark.parametrize("values", KINDS)
def test_several_tiles_and_parts_in_triton(values, monkeypatch):
    """Two tiles of queries and of keys, no biases, one clip of absorbed queries at a time."""
    from timefast.kernels import trajectory_attention_triton as kernels

    small = {"block_q": 16, "block_k": 16, "block_c": 16, "num_warps": 4, "num_stages": 1}
    monkeypatch.setattr(kernels, "launch_parameters", lambda *args, **kwargs: small)
    monkeypatch.setattr(kernels, "WORKSPACE", 1)
    args = make(2, 1, 17, 2, 16, bias=False, dtype=torch.float32)
    args[0] = torch.randn(2, 18, 3, 2, 16)[:, 1:, 0].unflatten(1, (1, 17))  # a slice
    wide = [None if x is None else x.double() for x in args]
    expected = gradients(wide, "reference", values=values)
    got = gradients(args, "triton", values=values)
    assert_equal([x.double() for x in got], expected, 2e-6)


@pytest.mark.parametrize("width", [20, 80, 96, 128])
def test_any_head_width_up_to_128_in_triton(width):
    args = make(1, 2, 2, 1, width, dtype=torch.float16)
    wide = [x.detach().double() for x in args]
    expected = gradients(wide, "reference")
    got = [x.double() for x in gradients(args, "triton")]
    assert all((x - y).norm() <= 5e-3 * y.norm() + 1e-5 for x, y in zip(got, expected, strict=True))


def test_the_triton_op_keeps_the_rules_of_custom_ops():
    from timefast.kernels.trajectory_attention_triton import trajectory_attention_op

    args, _ = CASES["tiny-odd"].build(torch.float32, "cpu", torch.Generator().manual_seed(0))
    leaves = [x.detach().requires_grad_() for x in args]
    checks = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(trajectory_attention_op, (*leaves, True, 0.25), test_utils=checks)


@pytest.mark.parametrize("values", KINDS)
def test_computing_the_first_step_again_changes_no_bit_and_keeps_less(values, monkeypatch):
    from timefast.kernels import trajectory_attention_triton as kernels

    args = make(1, 3, 2, 1, 16, dtype=torch.float32)
    kept, results = [], []
    for keep in (True, False):
        monkeypatch.setattr(kernels, "KEEP_X", keep)
        storages = {}

        def pack(x, storages=storages):
            storages[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
            return x

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            ops.trajectory_attention(*args, values=values, impl="triton")
        kept.append(sum(storages.values()))
        results.append(gradients(args, "triton", values=values))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    assert kept[0] - kept[1] >= 3 * args[0].nbytes  # the answers of three frames
