"""What is special to the Triton kernels of the residual sum and its norm; without a GPU in the
interpreter. test_add_layer_norm.py has what every implementation promises."""

import pytest
import torch

from timefast.ops import add_layer_norm

kernels = pytest.importorskip("timefast.kernels.add_layer_norm_triton")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SMALL = {torch.float32: 1e-6, torch.float16: 5e-4, torch.bfloat16: 4e-3}
F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16
NAMES = ("x", "branch", "weight", "bias", "branch_bias")


def draw(shape, *, x=F32, branch=F32, weight=F32, scaled=True, biased=True):
    """Arguments by name; `branch` None: no branch. A fifth of the rows is dropped."""
    generator = torch.Generator().manual_seed(0)

    def one(*sizes):
        return torch.randn(*sizes, generator=generator).to(DEVICE)

    given = {"x": 1 + one(*shape), "weight": 1 + 0.2 * one(shape[-1]), "bias": one(shape[-1])}
    given = {key: y.to(x if key == "x" else weight) for key, y in given.items()}
    kept = torch.rand(*shape[:-1], 1, generator=generator) < 0.8
    if branch is None:
        return {**given, "branch": None}
    given["branch"] = one(*shape).to(branch)
    if scaled:
        given["branch_scale"] = kept.float().to(DEVICE) / 0.8
    if biased:
        given["branch_bias"] = one(shape[-1]).to(branch)
    return given


def run(given, *, impl="triton", autocast=None, function=add_layer_norm, use=(0, 1)):
    """Outputs, and the gradients of all that gets one where the outputs in `use` are used."""
    given = dict(given)
    leaves = {key: given[key] for key in NAMES if given.get(key) is not None}
    leaves = {key: x.detach().requires_grad_() for key, x in leaves.items()}
    given |= leaves
    first = [given.pop(key) for key in ("x", "branch", "weight", "bias")]
    with torch.autocast(DEVICE, autocast or BF16, enabled=autocast is not None):
        out = function(*first, **given, impl=impl)
    generator = torch.Generator().manual_seed(1)
    upstream = [torch.randn(x.shape, generator=generator).to(DEVICE, BF16) for x in out]
    grads = torch.autograd.grad(
        [out[i] for i in use], list(leaves.values()), [upstream[i].to(out[i].dtype) for i in use],
        allow_unused=True,
    )  # fmt: skip
    for leaf, grad in zip(leaves.values(), grads, strict=True):
        assert grad is None or (grad.dtype, grad.shape) == (leaf.dtype, leaf.shape)
    results = dict(zip(("total", "normed"), out, strict=True))
    return results | dict(zip([f"d_{key}" for key in leaves], grads, strict=True))


def error(got, true):
    assert got.shape == true.shape and got.isfinite().all()
    return ((got.double() - true).norm() / true.norm().clamp(min=1e-30)).item()


def check(given, autocast=None, **how):
    """Against the float64 reference; the reference in these dtypes measures what they cost."""
    wide = {key: None if x is None else x.double() for key, x in given.items()}
    truth = run(wide, impl="reference", **how)
    plain = run(given, impl="reference", autocast=autocast, **how)
    found = run(given, autocast=autocast, **how)
    for key, true in truth.items():
        if true is None:  # does not depend on what is used
            assert found[key] is None or not found[key].any(), key
            continue
        assert found[key].dtype == plain[key].dtype, key
        low = {found["total"].dtype, found["normed"].dtype, found[key].dtype}
        # the interpreter cuts float32 down to bfloat16 where a GPU rounds: up to twice the error
        factor = 4 if BF16 in low and DEVICE == "cpu" else 2
        limit = factor * error(plain[key], true) + max(SMALL[dtype] for dtype in low)
        assert error(found[key], true) <= limit, key
    return found


@pytest.fixture
def poisoned():
    """Fresh memory is full of NaN, so that an element nobody writes shows."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.empty(8).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def few_programs(monkeypatch):
    """Three programs backward, tiles of four rows of 16 columns."""
    monkeypatch.setattr(kernels, "launch_parameters", lambda entry, like, length: {
        "tile": 64, "programs": 3, "num_warps": 4, "num_stages": 2,
    })  # fmt: skip


MIXTURES = {
    "autocast": ({"branch": BF16}, BF16),
    "autocast, no branch": ({"branch": None}, BF16),
    "autocast, nothing dropped": ({"branch": BF16, "scaled": False, "biased": False}, BF16),
    "autocast to float16": ({"branch": F16}, F16),
    "all bfloat16": ({"x": BF16, "branch": BF16, "weight": BF16}, None),
    "all float16, no scale": ({"x": F16, "branch": F16, "weight": F16, "scaled": False}, None),
    "float32 branch on bfloat16": ({"x": BF16, "weight": BF16}, None),
    "both halves": ({"x": F16, "branch": BF16, "weight": F16}, None),
}


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("dtypes, autocast", MIXTURES.values(), ids=MIXTURES)
def test_every_argument_may_be_of_its_own_dtype(dtypes, autocast):
    check(draw((3, 7, 40), **dtypes), autocast)


def test_under_autocast_the_stream_stays_and_the_norm_is_rounded_at_once():
    found = run(draw((5, 24), branch=BF16), autocast=BF16)
    assert (found["total"].dtype, found["normed"].dtype) == (F32, BF16)


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("width", [1, 17, 768, 1000, 1024, 3000, 8192])
def test_any_width_fits_a_block(width):
    check(draw((2, 3, width)))


@pytest.mark.usefixtures("poisoned", "few_programs")
@pytest.mark.parametrize("rows", [1, 4, 12, 13, 61])
def test_programs_with_many_rows_or_none_to_spare_sum_them_all(rows):
    for branch in (F32, None):
        check(draw((rows, 16), branch=branch))


@pytest.mark.usefixtures("poisoned", "few_programs")
@pytest.mark.parametrize("use", [(0,), (1,)], ids=["total", "normed"])
@pytest.mark.parametrize("branch", [F32, None], ids=["branch", "no branch"])
def test_with_one_output_used_gradients_are_those_of_the_reference(use, branch):
    check(draw((29, 13), branch=branch), use=use)


@pytest.fixture
def backward_calls(monkeypatch):
    """The arguments of every backward pass."""
    seen = []
    op = kernels.add_layer_norm_backward_op
    monkeypatch.setattr(
        kernels, "add_layer_norm_backward_op", lambda *args: seen.append(args) or op(*args)
    )
    return seen


def test_the_gradient_of_an_unused_output_is_not_made(backward_calls):
    for use in ((0, 1), (0,), (1,)):
        run(draw((5, 8)), use=use)
    absent = [[x is None for x in args[:2]] for args in backward_calls]
    assert absent == [[False, False], [False, True], [True, False]]


def test_the_branch_has_a_gradient_of_its_own_only_where_it_differs(backward_calls):
    found = run(draw((5, 8), scaled=False))
    assert found["d_x"].data_ptr() == found["d_branch"].data_ptr()
    run(draw((5, 8)))
    run(draw((5, 8), scaled=False, branch=BF16))
    run(draw((5, 8), branch=None))
    assert [args[6] for args in backward_calls] == [False, True, True, False]


def test_forward_and_backward_see_the_total_as_it_was_rounded():
    given = draw((40, 24), x=BF16, branch=BF16, weight=F32)
    found = run(given, autocast=BF16, use=(1,))
    alone = {key: given[key] for key in ("weight", "bias")}
    again = run({"x": found["total"].detach(), "branch": None, **alone}, autocast=BF16, use=(1,))
    assert torch.equal(found["normed"], again["normed"])
    assert torch.equal(found["d_x"], again["d_x"])
    assert torch.equal(found["d_weight"], again["d_weight"])


def test_strided_tokens_and_gradients_are_right():
    given = draw((4, 6, 10))
    views = {
        key: y.flip(0).transpose(0, 1) if y.dim() == 3 and y.shape[-1] > 1 else y.flip(0)
        for key, y in given.items()
    }
    views["branch_scale"] = given["branch_scale"][:1].transpose(0, 1)
    check(views)
    grads = []
    for impl in ("reference", "triton"):
        leaves = [views[key].detach().requires_grad_() for key in NAMES[:4]]
        out = add_layer_norm(*leaves, impl=impl)
        grads.append(torch.autograd.grad(sum(x.sum() for x in out), leaves))  # of strides 0
    for got, true in zip(*reversed(grads), strict=True):
        assert error(got, true.double()) < 1e-5


@pytest.mark.parametrize("dtype", [F32, BF16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize(
    "given", [{"branch": None}, {"scaled": False, "biased": False}, {"scaled": False}, {}], ids=str
)
def test_custom_op_is_registered_as_torch_expects(given, dtype):
    given = draw((6, 12), **given)
    leaves = {
        key: given[key].detach().requires_grad_() for key in NAMES if given.get(key) is not None
    }
    scale = given.get("branch_scale")
    torch.library.opcheck(
        kernels.add_layer_norm_op,
        (
            leaves["x"], leaves.get("branch"), leaves["weight"], leaves["bias"],
            None if scale is None else scale.flatten(), leaves.get("branch_bias"), 1e-6, dtype,
        ),
    )  # fmt: skip


@pytest.mark.parametrize("use", [(0, 1), (0,), (1,)], ids=["both", "total", "normed"])
@pytest.mark.parametrize("branch", [BF16, None], ids=["branch", "no branch"])
def test_compiled_without_graph_breaks_gives_the_same_bits(branch, use):
    torch._dynamo.reset()
    compiled = torch.compile(add_layer_norm, fullgraph=True, backend="aot_eager")
    given = draw((3, 4, 24), branch=branch)
    eager = run(given, autocast=BF16, use=use)
    found = run(given, autocast=BF16, use=use, function=compiled)
    for key, x in eager.items():
        if x is None:  # a compiled function gives zeros instead
            assert found[key] is None or not found[key].any(), key
        else:
            assert torch.equal(found[key], x), key


def test_gradients_of_parameters_can_be_added_up_and_clipped_in_place():
    """They lie in one tensor, next to each other."""
    given = draw((6, 8), scaled=False, biased=False)
    weight, bias = (given[key].requires_grad_() for key in ("weight", "bias"))

    def backward():
        _, normed = add_layer_norm(given["x"], given["branch"], weight, bias, impl="triton")
        normed.square().sum().backward()
        return [x.grad.clone() for x in (weight, bias)]

    once, twice = backward(), backward()
    assert all(torch.allclose(2 * a, b) for a, b in zip(once, twice, strict=True))
    torch.nn.utils.clip_grad_norm_([weight, bias], 0.5)
    assert torch.allclose(torch.cat([weight.grad, bias.grad]).norm(), torch.tensor(0.5).to(DEVICE))
    torch.optim.SGD([weight, bias], lr=0.1).zero_grad(set_to_none=False)
    assert not weight.grad.any() and not bias.grad.any()


def test_second_derivatives_are_refused():
    given = draw((3, 8), biased=False)
    x, branch = (given[key].requires_grad_() for key in ("x", "branch"))
    _, normed = add_layer_norm(x, branch, given["weight"], given["bias"], impl="triton")
    (grad,) = torch.autograd.grad(normed.square().sum(), x, create_graph=True)
    with pytest.raises(NotImplementedError, match="twice"):
        grad.sum().backward()


@pytest.mark.parametrize("name", ["branch", "weight", "bias"])
def test_float64_is_refused_by_name(name):
    given = draw((3, 8), biased=False)
    given[name] = given[name].double()
    with pytest.raises(NotImplementedError, match=f"{name} is torch.float64"):
        run(given)


def test_rows_that_no_block_holds_are_refused():
    with pytest.raises(NotImplementedError, match="8193 wide"):
        run(draw((1, 8193)))


class Grids:
    """In the place of a kernel: keeps what it would have been launched with."""

    def __init__(self):
        self.seen = []

    def __getitem__(self, grid):
        self.seen.append(grid)
        return lambda *arguments, **constants: None


def test_launches_have_one_axis_however_many_rows_there_are(monkeypatch):
    """A second axis of a CUDA grid ends at 65,535; backward has a set number of programs."""
    grids = Grids()
    monkeypatch.setattr(kernels, "_add_layer_norm_fwd_kernel", grids)
    monkeypatch.setattr(kernels, "_add_layer_norm_bwd_kernel", grids)
    monkeypatch.setattr(kernels, "launch_parameters", lambda entry, like, length: {
        "tile": 16, "programs": 500, "num_warps": 4, "num_stages": 2,
    })  # fmt: skip
    for rows, programs in ((66_000, 500), (70, 70)):
        x, weight = torch.zeros(1).expand(rows, 16), torch.zeros(16)
        total, normed, moments = kernels.add_layer_norm_op(x, x, weight, weight, None, None, 0, F32)
        kernels.add_layer_norm_backward_op(
            total, normed, total, weight, None, moments, False, 2, F32, F32
        )
        assert grids.seen[-2:] == [(rows,), (programs,)]


def at_paper_size(**dtypes):
    return draw((8, 8, 196, 768), **dtypes)


@pytest.mark.gpu
@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("dtypes, autocast", MIXTURES.values(), ids=MIXTURES)
def test_on_a_gpu_the_papers_shape_is_right_in_every_mixture(dtypes, autocast):
    check(at_paper_size(**dtypes), autocast)


@pytest.mark.gpu
@pytest.mark.parametrize("width", [192, 384, 1000, 1024, 2048, 8192])
@pytest.mark.parametrize("dtype", [F32, BF16], ids=["float32", "bfloat16"])
def test_on_a_gpu_every_row_of_launch_parameters_is_right(width, dtype):
    check(draw((5000, width), branch=dtype), BF16 if dtype == BF16 else None)


@pytest.mark.gpu
def test_on_a_gpu_more_than_two_billion_elements_are_addressed():
    rows, width = 2_200_000, 1024
    x = torch.zeros(rows, width, dtype=BF16, device=DEVICE)
    x[-1] = torch.randn(width, device=DEVICE)
    weight, bias = torch.ones(width, device=DEVICE), torch.zeros(width, device=DEVICE)
    with torch.autocast(DEVICE, BF16):
        normed = add_layer_norm(x, None, weight, bias, impl="triton")[1]
        last = add_layer_norm(x[-1:], None, weight, bias, impl="reference")[1]
    assert torch.allclose(normed[-1:].float(), last.float(), atol=2e-2)
    assert not normed[:-1].any()


@pytest.mark.gpu
def test_on_a_gpu_repetition_gives_the_same_bits():
    given = at_paper_size(branch=BF16)
    first, again = (run(given, autocast=BF16) for _ in range(2))
    assert all(torch.equal(first[key], again[key]) for key in first)


@pytest.mark.gpu
def test_on_a_gpu_nothing_is_allocated_but_results_and_moments():
    given = at_paper_size(branch=BF16)
    run(given, autocast=BF16)
    given["branch_scale"] = given["branch_scale"].contiguous()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    with torch.autocast(DEVICE, BF16), torch.no_grad():
        first = [given[key] for key in ("x", "branch", "weight", "bias")]
        total, normed = add_layer_norm(
            *first, branch_scale=given["branch_scale"], branch_bias=given["branch_bias"],
            impl="triton",
        )  # fmt: skip
    results = sum(x.numel() * x.element_size() for x in (total, normed))
    assert torch.cuda.max_memory_allocated() - before <= 1.02 * results


@pytest.mark.gpu
def test_a_cuda_graph_replays_forward_and_backward():
    given = draw((4, 300, 768), branch=BF16)
    run(given, autocast=BF16)  # compiles
    leaves = {key: x.detach().requires_grad_() for key, x in given.items() if key in NAMES}
    upstream = torch.randn(4, 300, 768, device=DEVICE)

    def step():
        with torch.autocast(DEVICE, BF16):
            out = add_layer_norm(
                *(leaves[key] for key in ("x", "branch", "weight", "bias")),
                branch_scale=given["branch_scale"], branch_bias=leaves["branch_bias"],
                impl="triton",
            )  # fmt: skip
        grads = [upstream.to(x.dtype) for x in out]
        return [*out, *torch.autograd.grad(out, list(leaves.values()), grads)]

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        eager = step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    graph.replay()
    assert all(torch.equal(a, b) for a, b in zip(captured, eager, strict=True))
