"""The contract every op keeps, swept over the records: each implementation against the reference.

Tolerance, for outputs and gradients alike: twice the relative error that the plain formula makes
when it runs in that precision itself, and a little for results that happen to come out exact.
"""

import re
import subprocess
import sys

import pytest
import torch

from timefast import ops
from timefast.kernels import native
from timefast.kernels.op import OPS

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
SMALL = {torch.float32: 1e-6, torch.float16: 5e-4, torch.bfloat16: 4e-3}
DIFFERENTIABLE = (
    "time_attention", "space_attention", "shift_attention", "trajectory_attention",
    "pairwise_attention",
)  # fmt: skip
TINY = [(op.name, case) for op in OPS.values() for case in op.cases if case.size == "tiny"]
ATTENTION = [(name, case) for name, case in TINY if name in DIFFERENTIABLE]
MID = [(name, case) for name in DIFFERENTIABLE for case in OPS[name].cases if case.size == "mid"]


def named(pairs):
    return [pytest.param(*pair, id=f"{pair[0]}-{pair[1].name}") for pair in pairs]


@pytest.fixture(params=["cpu", "cpu-without-native", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request):
    if request.param == "cpu-without-native":
        with native.disabled():
            yield "cpu"
    else:
        yield request.param


def implementations_for(name, args, kwargs):
    """On a GPU its kernels; the portable implementations are swept on the CPU, "cpu" with the C
    loops and without them."""
    for key, impl in OPS[name].impls.items():
        runs = not impl.unavailable() and not impl.why_not(*args, **kwargs)
        again = not native._enabled and key != "cpu"
        if runs and not again and (key == "triton" or not args[0].is_cuda):
            yield key


def build(case, dtype=torch.float32, device="cpu"):
    return case.build(dtype, device, torch.Generator().manual_seed(0))


def run(function, args, kwargs, dtype=None, grads=()):
    """Outputs and the gradients of all floating inputs, as float64; inputs in `dtype`."""

    def leaf(x):
        if not isinstance(x, torch.Tensor) or not x.is_floating_point():
            return x
        # .to(dtype) keeps a view a view, so that slices of a fused projection stay slices
        return (x if dtype is None else x.to(dtype)).detach().requires_grad_()

    args, kwargs = [leaf(x) for x in args], {key: leaf(x) for key, x in kwargs.items()}
    out = function(*args, **kwargs)
    out = out if isinstance(out, tuple) else (out,)
    if grads:
        torch.autograd.backward(
            out, [g.to(x.dtype).expand(x.shape) for g, x in zip(grads, out, strict=True)]
        )
    inputs = [x for x in (*args, *kwargs.values()) if isinstance(x, torch.Tensor)]
    return [x.detach().double() for x in (*out, *(x.grad for x in inputs if grads))]


def upstream(name, args, kwargs):
    """One upstream gradient per output."""
    out = getattr(ops, name)(*args, **kwargs, impl="reference")
    out = out if isinstance(out, tuple) else (out,)
    generator = torch.Generator().manual_seed(1)
    draws = [torch.randn(x.shape, generator=generator, dtype=torch.float64) for x in out]
    return [x.to(args[0].device) for x in draws]


def relative_error(result, truth):
    assert result.shape == truth.shape
    assert result.isfinite().all()
    if truth.norm() < 1e-5:  # zero but for rounding: a relative error would say nothing
        return (result - truth).abs().max().item() if truth.numel() else 0.0
    return ((result - truth).norm() / truth.norm().clamp(min=1e-30)).item()


def with_defaults(name, kwargs, args):
    """The keywords a record's own functions take; the public function fills in the scale."""
    return {**kwargs, "scale": args[0].shape[-1] ** -0.5}


@pytest.fixture
def poisoned():
    """Fresh memory is full of NaN, so that an element nobody writes shows."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.empty(8).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("name, case", named(ATTENTION))
def test_attention_keeps_to_the_float64_reference(name, case, dtype, device):
    keeps_to_the_float64_reference(name, case, dtype, device)


@pytest.mark.gpu
@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("name, case", named(MID))
def test_on_a_gpu_attention_of_several_tiles_keeps_to_the_float64_reference(name, case, dtype):
    keeps_to_the_float64_reference(name, case, dtype, "cuda")


def keeps_to_the_float64_reference(name, case, dtype, device):
    args, kwargs = build(case, dtype, device)
    grads = [g.to(dtype).double() for g in upstream(name, args, kwargs)]
    public = getattr(ops, name)
    truth = run(public, args, {**kwargs, "impl": "reference"}, torch.float64, grads)
    plain = run(
        OPS[name].reference.__wrapped__, args, with_defaults(name, kwargs, args), None, grads
    )
    for impl in implementations_for(name, args, kwargs):
        result = run(public, args, {**kwargs, "impl": impl}, None, grads)
        # the interpreter cuts float32 down to bfloat16 where a GPU rounds: up to twice the error
        cut = (impl, dtype, device) == ("triton", torch.bfloat16, "cpu")
        for i, (got, rough, true) in enumerate(zip(result, plain, truth, strict=True)):
            limit = (4 if cut else 2) * relative_error(rough, true) + SMALL[dtype]
            assert relative_error(got, true) <= limit, (impl, f"output or gradient {i}")


@pytest.mark.parametrize("name, case", named(TINY))
def test_inputs_are_left_alone_and_repetition_gives_the_same_bits(name, case, device):
    args, kwargs = build(case, device=device)
    given = [x for x in args if x is not None]
    before = [x.clone() for x in given]
    for impl in implementations_for(name, args, kwargs):
        first = run(getattr(ops, name), args, {**kwargs, "impl": impl})
        again = run(getattr(ops, name), args, {**kwargs, "impl": impl})
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True)), impl
    assert all(torch.equal(a, b) for a, b in zip(given, before, strict=True))


@pytest.mark.parametrize("name", DIFFERENTIABLE)
def test_any_strides_give_the_same_result(name, device):
    args, kwargs = build(OPS[name].cases[0], device=device)

    def padded(x):  # every stride odd, nothing aligned
        return torch.nn.functional.pad(x, [v for _ in x.shape for v in (1, 2)])[
            tuple(slice(1, -2) for _ in x.shape)
        ]

    def backwards_in_memory(x):
        order = tuple(reversed(range(x.dim())))
        return x.permute(order).contiguous().permute(order)

    def expanded(x):
        return x[:1].expand_as(x)

    for change in (padded, backwards_in_memory, expanded):
        views = [change(x) for x in args]
        grads = [torch.ones((), dtype=torch.float64, device=device)] * len(
            upstream(name, args, kwargs)
        )
        plain = [x.contiguous() for x in views]
        truth = run(getattr(ops, name), plain, {**kwargs, "impl": "reference"}, None, grads)
        for impl in implementations_for(name, args, kwargs):
            result = run(getattr(ops, name), views, {**kwargs, "impl": impl}, None, grads)
            for got, true in zip(result, truth, strict=True):
                assert relative_error(got, true) < 1e-5, (impl, change.__name__)


@pytest.mark.parametrize("name", DIFFERENTIABLE)
def test_gradients_are_right_when_only_some_inputs_want_one(name, device):
    args, kwargs = build(OPS[name].cases[0], device=device)
    grads = upstream(name, args, kwargs)
    for impl in implementations_for(name, args, kwargs):
        all_of_them = run(getattr(ops, name), args, {**kwargs, "impl": impl}, None, grads)
        outputs = len(grads)
        for i in range(len(args)):
            some = [x.detach().requires_grad_(i == j) for j, x in enumerate(args)]
            out = getattr(ops, name)(*some, **kwargs, impl=impl)
            out = out if isinstance(out, tuple) else (out,)
            wanted = [(x, g.float()) for x, g in zip(out, grads, strict=True) if x.requires_grad]
            out, upstream_grads = zip(*wanted, strict=True)
            (grad,) = torch.autograd.grad(out, some[i], upstream_grads)
            assert torch.equal(grad.double(), all_of_them[outputs + i]), (impl, i)


@pytest.mark.parametrize("name", DIFFERENTIABLE)
def test_one_unused_output_gives_finite_gradients(name, device):
    args, kwargs = build(OPS[name].cases[0], device=device)
    for impl in implementations_for(name, args, kwargs):
        leaves = [x.detach().requires_grad_() for x in args]
        out = getattr(ops, name)(*leaves, **kwargs, impl=impl)
        for one in out if isinstance(out, tuple) else (out,):
            # an input on which this output does not depend: zeros, from PyTorch's functions None
            library = not native._enabled
            grads = torch.autograd.grad(one.sum(), leaves, retain_graph=True, allow_unused=library)
            assert all((library and g is None) or g.isfinite().all() for g in grads), impl


@pytest.mark.parametrize("name", DIFFERENTIABLE)
def test_second_derivatives_are_refused_or_the_librarys(name, device):
    args, kwargs = build(OPS[name].cases[0], device=device)

    def second(impl):
        leaves = [x.detach().requires_grad_() for x in args]
        out = getattr(ops, name)(*leaves, **kwargs, impl=impl)
        total = sum(x.square().sum() for x in (out if isinstance(out, tuple) else (out,)))
        (grad,) = torch.autograd.grad(total, leaves[0], create_graph=True)
        grad.sum().backward()
        return leaves[0].grad.double()

    for impl in implementations_for(name, args, kwargs):
        try:
            got = second(impl)
        except (NotImplementedError, RuntimeError) as error:
            library = "" if native._enabled else "|derivative for"
            assert re.search(f"twice|differentiable{library}", str(error)), impl
        else:
            assert not native._enabled, f"{impl}: no error"
            assert relative_error(got, second("reference")) < 1e-5, impl


@pytest.mark.parametrize("name", DIFFERENTIABLE)
def test_compiled_without_graph_breaks_gives_the_same(name, device):
    args, kwargs = build(OPS[name].cases[0], device=device)
    grads = upstream(name, args, kwargs)
    for impl in ("auto", *implementations_for(name, args, kwargs)):
        torch._dynamo.reset()
        compiled = torch.compile(getattr(ops, name), fullgraph=True, backend="aot_eager")
        result = run(compiled, args, {**kwargs, "impl": impl}, None, grads)
        eager = run(getattr(ops, name), args, {**kwargs, "impl": impl}, None, grads)
        for got, true in zip(result, eager, strict=True):
            assert relative_error(got, true) < 1e-6, impl


@pytest.mark.parametrize("name", DIFFERENTIABLE)
def test_autocast_rounds_inputs_to_its_dtype(name, device):
    args, kwargs = build(OPS[name].cases[0], device=device)
    low = [x.bfloat16() for x in args]
    for impl in implementations_for(name, args, kwargs):
        with torch.autocast(device, torch.bfloat16):
            result = getattr(ops, name)(*args, **kwargs, impl=impl)
            leaves = [x.detach().requires_grad_() for x in args]
            out = getattr(ops, name)(*leaves, **kwargs, impl=impl)
        expected = getattr(ops, name)(*low, **kwargs, impl=impl)
        for got, want in zip(
            result if isinstance(result, tuple) else (result,),
            expected if isinstance(expected, tuple) else (expected,),
            strict=True,
        ):
            assert got.dtype == torch.bfloat16
            assert torch.equal(got, want), impl
        outputs = out if isinstance(out, tuple) else (out,)
        used = outputs[:1] if native._enabled else outputs  # see unused outputs above
        sum(x.float().sum() for x in used).backward()
        assert all(x.grad.dtype == torch.float32 for x in leaves), impl


@pytest.mark.parametrize("name", DIFFERENTIABLE)
def test_a_backward_pass_under_autocast_is_as_exact_as_outside(name, device):
    args, kwargs = build(OPS[name].cases[0], device=device)
    grads = upstream(name, args, kwargs)
    for impl in implementations_for(name, args, kwargs):
        outside = run(getattr(ops, name), args, {**kwargs, "impl": impl}, None, grads)
        leaves = [x.detach().requires_grad_() for x in args]
        out = getattr(ops, name)(*leaves, **kwargs, impl=impl)
        out = out if isinstance(out, tuple) else (out,)
        with torch.autocast(device, torch.bfloat16):
            inside = torch.autograd.grad(
                out, leaves, [g.to(x.dtype) for g, x in zip(grads, out, strict=True)]
            )
        # without its own backward pass trajectory attention gets that of PyTorch's products
        own = native._enabled or name != "trajectory_attention"
        for got, want in zip(inside, outside[len(out) :], strict=False):
            assert relative_error(got.double(), want) < (1e-6 if own else 2e-2), impl


@pytest.mark.parametrize("name", DIFFERENTIABLE)
def test_under_activation_checkpointing_gradients_are_the_same(name, device):
    args, kwargs = build(OPS[name].cases[0], device=device)
    grads = upstream(name, args, kwargs)

    def checkpointed(*args, **kwargs):
        return torch.utils.checkpoint.checkpoint(
            getattr(ops, name), *args, use_reentrant=False, **kwargs
        )

    for impl in implementations_for(name, args, kwargs):
        kept = run(getattr(ops, name), args, {**kwargs, "impl": impl}, None, grads)
        redone = run(checkpointed, args, {**kwargs, "impl": impl}, None, grads)
        assert all(torch.equal(a, b) for a, b in zip(kept, redone, strict=True)), impl


@pytest.mark.gpu
@pytest.mark.parametrize("name", DIFFERENTIABLE)
def test_a_cuda_graph_replays_forward_and_backward(name):
    args, kwargs = build(OPS[name].cases[0], torch.bfloat16, "cuda")
    leaves = [x.detach().requires_grad_() for x in args]
    grads = [g.bfloat16() for g in upstream(name, args, kwargs)]

    def step():
        out = getattr(ops, name)(*leaves, **kwargs, impl="triton")
        out = out if isinstance(out, tuple) else (out,)
        return [*out, *torch.autograd.grad(out, leaves, grads)]

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


class Grids:
    """In the place of a kernel: keeps what it would have been launched with."""

    def __init__(self):
        self.seen = []

    def __getitem__(self, grid):
        self.seen.append(grid)
        return lambda *arguments, **constants: None


@pytest.mark.parametrize("module", ["divided", "shift", "trajectory"])
def test_launches_have_one_axis_however_many_sequences_there_are(module, monkeypatch):
    """A second axis of a CUDA grid ends at 65,535."""
    kernels = pytest.importorskip(f"timefast.kernels.{module}_attention_triton")
    grids = Grids()
    for name in [x for x in vars(kernels) if x.startswith("_") and x.endswith("_kernel")]:
        monkeypatch.setattr(kernels, name, grids)
    if module == "trajectory":
        monkeypatch.setattr(
            kernels, "_FRAMES_KERNELS", dict.fromkeys(kernels._FRAMES_KERNELS, grids)
        )

    q = torch.zeros(1).expand(66_000, 1, 2, 1, 16)
    cls = q[:, 0, 0]
    if module == "divided":
        kernels.time_attention_op(q, q, q, 1.0)
        kernels.time_attention_backward_op(q, q, q, q, 1.0)
        out, cls_out, lse = kernels.space_attention_op(q, q, q, cls, cls, cls, 1.0)
        kernels.space_attention_backward_op(
            q, cls_out, q, q, q, cls, cls, cls, out, cls_out, lse, 1.0
        )
    elif module == "shift":
        out, lse = kernels.shift_attention_op(q, q, q, 4, 1.0)
        kernels.shift_attention_backward_op(q, q, q, q, out, lse, 4, 1.0)
    else:
        inputs = (q, q, q, cls, cls, cls, torch.zeros(16, 16), None, torch.zeros(32, 16), None)
        out, cls_out, *saved = kernels.trajectory_attention_op(*inputs, False, 1.0)
        kernels.trajectory_attention_backward_op(out, cls_out, *inputs, *saved, False, 1.0)
    assert len(grids.seen) == {"divided": 5, "shift": 3, "trajectory": 5}[module]
    assert all(len(grid) == 1 and grid[0] > 65_535 for grid in grids.seen)


@pytest.mark.parametrize("name, argument", [(n, i) for n in DIFFERENTIABLE for i in (1, 2)])
def test_a_wrong_shape_or_dtype_is_named(name, argument):
    args, kwargs = build(OPS[name].cases[0])
    public = getattr(ops, name)
    wrong = list(args)
    wrong[argument] = wrong[argument][..., :-1]
    with pytest.raises(ValueError, match=f"{'qkv'[argument]}: expected .*got"):
        public(*wrong, **kwargs)
    wrong[argument] = args[argument].double()
    with pytest.raises(ValueError, match=f"{'qkv'[argument]}: expected .*got torch.float64"):
        public(*wrong, **kwargs)
    with pytest.raises(ValueError, match="q: expected"):
        public(args[0][0], *args[1:], **kwargs)


@pytest.mark.parametrize("name", OPS)
def test_an_unknown_implementation_is_refused_with_the_known_ones(name):
    args, kwargs = build(OPS[name].cases[0])
    with pytest.raises(ValueError, match="fortran.*reference"):
        getattr(ops, name)(*args, **kwargs, impl="fortran")
    with pytest.raises(ValueError, match="unknown op"):
        ops.implementations("telepathy")


def test_a_named_implementation_that_cannot_run_raises_with_its_reasons():
    for name in DIFFERENTIABLE:
        args, kwargs = build(OPS[name].cases[0], torch.float64)
        for key, impl in OPS[name].impls.items():
            reasons = impl.unavailable() or impl.why_not(*args, **kwargs)
            if reasons:
                with pytest.raises(NotImplementedError) as raised:
                    getattr(ops, name)(*args, **kwargs, impl=key)
                assert all(reason in str(raised.value) for reason in reasons)
                assert str(list(args[0].shape)) in str(raised.value)


def test_the_process_default_is_read_at_each_call(monkeypatch):
    args, _ = build(OPS["time_attention"].cases[0])
    monkeypatch.setenv("TIMEFAST_IMPL", "reference")
    by_default = ops.time_attention(*args)
    assert torch.equal(by_default, ops.time_attention(*args, impl="reference"))
    monkeypatch.setenv("TIMEFAST_IMPL", "fortran")
    with pytest.raises(ValueError, match="fortran"):
        ops.time_attention(*args)
    ops.time_attention(*args, impl="cpu")  # a named one is not replaced


def test_importing_the_ops_loads_no_optional_package():
    heavy = ["triton", "xformers", "cv2", "av", "matplotlib", "nvidia.dali"]
    code = f"import sys, timefast.ops; print([m for m in {heavy} if m in sys.modules])"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"
