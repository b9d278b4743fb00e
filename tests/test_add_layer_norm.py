"""`ops.add_layer_norm`: every implementation against float64, and what the reference promises."""

import re

import pytest
import torch
import torch.nn.functional as F
from test_ops import DTYPES, SMALL, build, poisoned, relative_error

from timefast import ops
from timefast.kernels.op import OPS
from timefast.models.vit import AddNorm

OP = OPS["add_layer_norm"]
CASES = [pytest.param(case, id=case.name) for case in OP.cases if case.size == "tiny"]
__all__ = ["poisoned"]  # a fixture, by its name


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request):
    return request.param


def implementations(*args, **kwargs):
    return [
        name
        for name, impl in OP.all_impls().items()
        if not impl.unavailable() and not impl.why_not(*args, **kwargs)
    ]


def plain(x, branch, weight, bias, branch_scale=None, branch_bias=None, eps=1e-6):
    """What one would write, in the precision of the inputs."""
    total = x
    if branch is not None:
        total = x + (branch if branch_scale is None else branch_scale * branch)
        total = total if branch_bias is None else total + branch_bias
    return total, F.layer_norm(total, total.shape[-1:], weight, bias, eps)


def gradients(function, args, kwargs, dtype=None, used=(True, True)):
    """Outputs and the gradients of all but branch_scale, in float64."""

    def leaf(x):
        return (
            None if x is None else (x if dtype is None else x.to(dtype)).detach().requires_grad_()
        )

    args, kwargs = [leaf(x) for x in args], dict(kwargs)
    if "branch_scale" in kwargs and dtype is not None:
        kwargs["branch_scale"] = kwargs["branch_scale"].to(dtype)
    if "branch_bias" in kwargs:
        kwargs["branch_bias"] = leaf(kwargs["branch_bias"])
    out = function(*args, **kwargs)
    draw = torch.Generator().manual_seed(1)
    grads = [torch.randn(y.shape, generator=draw).to(args[0].device) for y in out]
    pairs = [(y, g.to(y.dtype)) for y, g, use in zip(out, grads, used, strict=True) if use]
    torch.autograd.backward(*zip(*pairs, strict=True))
    leaves = [x for x in (*args, kwargs.get("branch_bias")) if x is not None]
    found = [torch.zeros_like(x) if x.grad is None else x.grad for x in leaves]
    return [y.detach().double() for y in (*out, *found)]


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("case", CASES)
def test_it_keeps_to_float64(case, dtype, device):
    args, kwargs = build(case, dtype, device)
    truth = gradients(plain, args, kwargs, torch.float64)
    rough = gradients(plain, args, kwargs)
    for impl in implementations(*args, **kwargs):
        result = gradients(ops.add_layer_norm, args, {**kwargs, "impl": impl})
        # the interpreter cuts float32 down to bfloat16 where a GPU rounds: up to twice the error
        cut = (impl, dtype, device) == ("triton", torch.bfloat16, "cpu")
        for i, (got, bad, true) in enumerate(zip(result, rough, truth, strict=True)):
            limit = (4 if cut else 2) * relative_error(bad, true) + SMALL[dtype]
            assert relative_error(got, true) <= limit, (impl, f"output or gradient {i}")


@pytest.mark.parametrize("used", [(True, False), (False, True)], ids=["total", "normed"])
@pytest.mark.parametrize("case", CASES)
def test_gradients_of_one_output_alone(case, used, device):
    args, kwargs = build(case, device=device)
    truth = gradients(plain, args, kwargs, torch.float64, used)
    for impl in implementations(*args, **kwargs):
        result = gradients(ops.add_layer_norm, args, {**kwargs, "impl": impl}, None, used)
        for i, (got, true) in enumerate(zip(result, truth, strict=True)):
            assert relative_error(got, true) < 2e-6, (impl, i)


def test_what_is_normalised_is_the_sum_as_it_is_returned(device):
    args, kwargs = build(OP.cases[1], torch.bfloat16, device)
    for impl in implementations(*args, **kwargs):
        total, normed = ops.add_layer_norm(*args, **kwargs, impl=impl)
        _, again = ops.add_layer_norm(total, None, *args[2:], **kwargs, impl=impl)
        assert torch.equal(normed, again), impl


def test_without_a_branch_the_total_is_the_input_itself(device):
    args, kwargs = build(OP.cases[0], device=device)
    for impl in implementations(*args, **kwargs):
        assert ops.add_layer_norm(*args, **kwargs, impl=impl)[0] is args[0]


@pytest.mark.parametrize(
    "x, branch, total, under_autocast",
    [
        (torch.float32, torch.bfloat16, torch.float32, torch.bfloat16),
        (torch.bfloat16, torch.float32, torch.float32, torch.bfloat16),
        (torch.bfloat16, torch.bfloat16, torch.bfloat16, torch.bfloat16),
        (torch.float64, torch.float32, torch.float64, torch.float64),
    ],
    ids=str,
)
def test_dtypes_of_results_and_gradients(x, branch, total, under_autocast, device):
    args, kwargs = build(OP.cases[3], device=device)
    args = [y.to(t).requires_grad_() for y, t in zip(args, (x, branch, x, x), strict=True)]
    kwargs["branch_bias"].requires_grad_()
    for impl in implementations(*args, **kwargs):
        for autocast in (False, True):
            with torch.autocast(device, torch.bfloat16, enabled=autocast):
                out = ops.add_layer_norm(*args, **kwargs, impl=impl)
            normed = under_autocast if autocast else total
            assert [y.dtype for y in out] == [total, normed], impl
            leaves = [*args, kwargs["branch_bias"]]
            grads = torch.autograd.grad(sum(y.sum() for y in out), leaves)
            assert [g.dtype for g in grads] == [y.dtype for y in leaves], impl


def test_under_autocast_a_norm_and_its_linear_layer_give_what_pytorchs_do(device):
    torch.manual_seed(0)
    x, branch = torch.randn(2, 3, 5, 48, device=device).unbind(0)
    ours, theirs = AddNorm(48, 1e-6).to(device), torch.nn.LayerNorm(48, 1e-6).to(device)
    linear = torch.nn.Linear(48, 16).to(device)
    with torch.autocast(device, torch.bfloat16):
        total, normed = ours(x, branch.bfloat16())
        assert torch.equal(total, x + branch.bfloat16())
        want = linear(theirs(x + branch.bfloat16()))
        assert relative_error(linear(normed).double(), want.double()) < 2e-3
    assert ours.state_dict().keys() == theirs.state_dict().keys()


@pytest.mark.parametrize("case", CASES)
def test_inputs_are_left_alone_and_repetition_gives_the_same_bits(case, device):
    args, kwargs = build(case, device=device)
    given = [x for x in (*args, *kwargs.values()) if isinstance(x, torch.Tensor)]
    before = [x.clone() for x in given]
    for impl in implementations(*args, **kwargs):
        first = gradients(ops.add_layer_norm, args, {**kwargs, "impl": impl})
        again = gradients(ops.add_layer_norm, args, {**kwargs, "impl": impl})
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True)), impl
    assert all(torch.equal(a, b) for a, b in zip(given, before, strict=True))


def test_any_strides_give_the_same_result(device):
    args, kwargs = build(OP.cases[3], device=device)
    plainly = gradients(ops.add_layer_norm, args, {**kwargs, "impl": "reference"})
    views = [x.permute(*reversed(range(x.dim()))).contiguous() for x in args]
    views = [x.permute(*reversed(range(x.dim()))) for x in views]
    wide = torch.stack([kwargs["branch_scale"]] * 2, -1)[..., 0]
    for impl in implementations(*args, **kwargs):
        changed = {**kwargs, "branch_scale": wide, "impl": impl}
        result = gradients(ops.add_layer_norm, views, changed)
        for got, true in zip(result, plainly, strict=True):
            assert relative_error(got, true) < 1e-6, impl


def test_stochastic_depth_gets_no_gradient(device):
    args, kwargs = build(OP.cases[2], device=device)
    args[0].requires_grad_()
    kwargs["branch_scale"].requires_grad_()
    for impl in implementations(*args, **kwargs):
        total, normed = ops.add_layer_norm(*args, **kwargs, impl=impl)
        (total.sum() + normed.sum()).backward()
        assert kwargs["branch_scale"].grad is None, impl


def test_compiled_without_graph_breaks_gives_the_same(device):
    args, kwargs = build(OP.cases[3], device=device)
    for impl in ("auto", *implementations(*args, **kwargs)):
        torch._dynamo.reset()
        compiled = torch.compile(ops.add_layer_norm, fullgraph=True, backend="aot_eager")
        result = gradients(compiled, args, {**kwargs, "impl": impl})
        eager = gradients(ops.add_layer_norm, args, {**kwargs, "impl": impl})
        for got, true in zip(result, eager, strict=True):
            assert relative_error(got, true) < 1e-6, impl


def test_what_does_not_fit_is_named():
    args, kwargs = build(OP.cases[3])
    x, branch, weight, bias = args

    def refused(pattern, *args, **kwargs):
        with pytest.raises(ValueError, match=pattern):
            ops.add_layer_norm(*args, **kwargs)

    refused(r"x: expected a floating \[\.\.\., C\].*int64", torch.ones(3).long(), None, *args[2:])
    refused("x: expected.*at least 1", torch.ones(3, 0), None, weight[:0], bias[:0])
    refused(r"branch: expected \[2, 3, 4, 40\].*got \[2, 3, 4, 39\]", x, branch[..., 1:], *args[2:])
    refused(r"weight: expected \[40\]", x, branch, weight[1:], bias)
    refused("bias: expected a floating", x, branch, weight, bias.long())
    refused("weight: expected a tensor .*got NoneType", x, branch, None, bias)
    refused("x: expected a tensor .*got list", [1.0], branch, weight, bias)
    refused("branch_scale: expected a tensor .*got 0.5", x, branch, weight, bias, branch_scale=0.5)
    refused(r"branch_bias: expected \[40\]", x, branch, weight, bias, branch_bias=bias[1:])
    for scale in (torch.ones(2, 3, 4, 40), torch.ones(2, 1, 1), torch.ones(2, 2, 1, 1)):
        shape = re.escape(str(list(scale.shape)))
        refused(
            rf"branch_scale: expected.*\[2, 3, 4, 1\].*got.*{shape}",
            x, branch, weight, bias, branch_scale=scale,
        )  # fmt: skip
    refused("expected None where there is no branch", x, None, weight, bias, **kwargs)
