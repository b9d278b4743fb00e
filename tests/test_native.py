"""The C loops behind impl="cpu": what tests/test_ops.py does not reach, and how they are built."""

import functools
import platform
import shutil
import threading

import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx

from timefast import ops
from timefast.kernels import native
from timefast.kernels import trajectory_attention as trajectory

HAS_GCC = shutil.which("gcc") is not None
on_x86 = pytest.mark.skipif(platform.machine() != "x86_64", reason="x86 has narrower registers")
SHAPES = {
    "time_attention": (2, 3, 2, 2, 16), "space_attention": (2, 2, 4, 2, 16),
    "shift_attention": (1, 3, 4, 2, 24), "pairwise_attention": (2, 2, 5, 24),
    "trajectory_attention": (1, 2, 3, 2, 16),
}  # fmt: skip


@pytest.fixture
def calls(monkeypatch):
    """The C loops that ran, by their names."""
    if not HAS_GCC and native.why_not():
        pytest.skip(native.why_not())
    assert native.why_not() is None
    seen, run = [], native.run_attention

    def spy(tensors, *args, **kwargs):
        seen.append("attend" if len(tensors) == 4 else "attend_backward")
        return run(tensors, *args, **kwargs)

    monkeypatch.setattr(native, "run_attention", spy)
    return seen


@pytest.fixture
def unbuilt(monkeypatch, tmp_path):
    """Nothing compiled yet, and an empty cache folder; afterwards all is as before."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(native, "_library", functools.cache(native._library.__wrapped__))
    return tmp_path / "timefast"


@pytest.fixture
def quick_build(unbuilt, monkeypatch):
    if not HAS_GCC:
        pytest.skip("gcc is not installed")
    monkeypatch.setenv("CC", "gcc")
    monkeypatch.setattr(native, "FLAGS", (*native.FLAGS, "-O0"))
    return unbuilt


def inputs(name, *shape, dtype=torch.float32):
    """Arguments of an op for the shape of its q; q, k and v are slices of a fused projection."""
    shape = shape or SHAPES[name]
    generator = torch.Generator().manual_seed(0)

    def normal(*size, std=1.0):
        return (std * torch.randn(*size, generator=generator)).to(dtype)

    args = normal(*shape[:-2], 3, *shape[-2:]).unbind(-3)
    if name in ("space_attention", "trajectory_attention"):
        args += normal(shape[0], 3, *shape[3:]).unbind(1)
    if name == "trajectory_attention":
        dim = shape[3] * shape[4]
        args += (normal(dim, dim, std=dim**-0.5), normal(dim))
        args += (normal(2 * dim, dim, std=dim**-0.5), normal(2 * dim))
    return args


def with_gradients(name, args, impl="cpu", **kwargs):
    """Outputs, and gradients of all inputs for upstream gradients that are all different."""
    leaves = [x.detach().requires_grad_() for x in args]
    out = getattr(ops, name)(*leaves, **kwargs, impl=impl)
    out = out if isinstance(out, tuple) else (out,)
    generator = torch.Generator().manual_seed(1)
    draws = [torch.randn(x.shape, generator=generator).bfloat16() for x in out]
    upstream = [draw.to(x.dtype) for draw, x in zip(draws, out, strict=True)]  # nothing rounded
    return [x.detach() for x in (*out, *torch.autograd.grad(out, leaves, upstream))]


def agrees(name, args, tolerance=2e-5, **kwargs):
    """Outputs and gradients are those of the float64 reference."""
    got = with_gradients(name, args, **kwargs)
    true = with_gradients(name, [x.double() for x in args], "reference", **kwargs)
    for i, (g, t) in enumerate(zip(got, true, strict=True)):
        assert g.isfinite().all()
        # by the size of the numbers: gradients that cancel out are zero but for rounding
        error = (g.double() - t).norm() / (t.norm() + 1e-2 * t.numel() ** 0.5)
        assert error < tolerance, f"output or gradient {i}"


def same(a, b):
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("width", [1, 3, 8, 24, 63, 64, 80, 128])
@pytest.mark.parametrize("length", [1, 2, 17])
def test_any_width_and_few_tokens(width, length, calls):
    agrees("time_attention", inputs("time_attention", 1, length, 2, 1, width))
    agrees("space_attention", inputs("space_attention", 1, 2, length, 2, width))
    assert calls == ["attend", "attend_backward"] * 2


@pytest.mark.parametrize("change", [-1, 0, 1])
@pytest.mark.parametrize("width", [20, 80])  # fewer than the queries, and at one tile more
def test_around_whole_tiles_of_queries(change, width, calls):
    tile = 4 * native.lanes()
    agrees("time_attention", inputs("time_attention", 1, tile + change, 1, 1, width))
    agrees("pairwise_attention", inputs("pairwise_attention", 1, 1, 2 * tile + change, width))
    # with the class token a whole tile is one patch less
    agrees("space_attention", inputs("space_attention", 1, 1, tile - 1 + change, 1, width))
    assert calls == ["attend", "attend_backward"] * 3


@pytest.mark.parametrize("shift_div", [1, 2, 3, 5, 7, 48, 10**6])
@pytest.mark.parametrize("frames", [1, 2, 4])
def test_folds_of_whole_heads_and_inside_heads(shift_div, frames, calls):
    args = inputs("shift_attention", 2, frames, 5, 2, 24)
    agrees("shift_attention", args, shift_div=shift_div)
    assert calls


@pytest.mark.parametrize("values", ["trajectory", "projected"])
@pytest.mark.parametrize("workspace", [1, 1 << 16, 1 << 27])
def test_trajectory_attention_in_parts_and_without_biases(values, workspace, calls, monkeypatch):
    monkeypatch.setattr(trajectory, "WORKSPACE", workspace)
    width = 2 * native.lanes()
    args = inputs("trajectory_attention", 2, 5, 3, 2, width)
    agrees("trajectory_attention", args, values=values)

    def without_biases(*args, **kwargs):
        return ops.trajectory_attention(*args[:7], None, args[7], None, **kwargs)

    few = (*args[:7], args[8])
    out, expected = (without_biases(*few, values=values, impl=x) for x in ("cpu", "reference"))
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-5)
    assert calls.count("attend_backward") > 1


def padded(x):  # every stride odd, nothing aligned
    around = torch.nn.functional.pad(x, [1, 2] * x.dim())
    return around[(slice(1, -2),) * x.dim()]


def backwards_in_memory(x):
    order = tuple(reversed(range(x.dim())))
    return x.permute(order).contiguous().permute(order)


def one_for_all_frames(x):
    return x[:, :1].expand_as(x) if x.dim() > 1 else x


def one_number_for_all_channels(x):
    return x[..., :1].expand_as(x) / 4


def with_a_sign_to_come(x):
    return torch._neg_view(x)


@pytest.mark.parametrize(
    "view",
    [padded, backwards_in_memory, one_for_all_frames, one_number_for_all_channels,
     with_a_sign_to_come],
)  # fmt: skip
@pytest.mark.parametrize("name", SHAPES)
def test_views_are_read_as_they_are(name, view, calls):
    args = inputs(name)
    views = [view(x) for x in args]
    dense = [x.resolve_neg().contiguous() for x in views]
    got, expected = with_gradients(name, views), with_gradients(name, dense)
    if name == "trajectory_attention":  # its products are the library's, which look at addresses
        torch.testing.assert_close(got, expected)
    else:
        assert same(got, expected)
    agrees(name, views)
    assert calls


@pytest.mark.parametrize("name", SHAPES)
def test_upstream_gradients_may_be_views(name, calls):
    leaves = [x.detach().requires_grad_() for x in inputs(name)]
    out = getattr(ops, name)(*leaves, impl="cpu")
    out = out if isinstance(out, tuple) else (out,)

    def given(make):
        return torch.autograd.grad(out, leaves, [make(x) for x in out], retain_graph=True)

    ones = given(torch.ones_like)
    torch.testing.assert_close(given(lambda x: torch.ones(()).expand(x.shape)), ones)
    torch.testing.assert_close(given(lambda x: torch._neg_view(-torch.ones(x.shape))), ones)


@pytest.mark.parametrize("name", SHAPES)
def test_bfloat16_rounds_inputs_and_outputs_only(name, calls):
    agrees(name, inputs(name, dtype=torch.bfloat16), tolerance=3e-3)
    assert calls


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("which", [0, 1, 2])
@pytest.mark.parametrize("name", ["time_attention", "space_attention", "shift_attention"])
def test_nan_and_inf_go_where_the_reference_has_them(name, which, bad, calls):
    args = [x.clone() for x in inputs(name)]
    args[which][0, 1, 1, 1, 3] = bad
    got, expected = with_gradients(name, args), with_gradients(name, args, "reference")
    for g, e in zip(got, expected, strict=True):
        finite = e.isfinite()
        assert torch.equal(g.isfinite(), finite)
        torch.testing.assert_close(g[finite], e[finite], rtol=1e-4, atol=1e-5)
    assert not got[0].isfinite().all()
    assert got[0].isfinite().any()  # other sequences of the same thread stay as they are
    assert calls


@pytest.mark.parametrize("size", [1e4, 1e18])
def test_large_scores_do_not_overflow(size, calls):
    q, k, v = inputs("time_attention", 1, 19, 2, 1, 16)
    out = ops.time_attention(q * size, k * size, v, impl="cpu")
    expected = ops.time_attention((q * size).double(), (k * size).double(), v.double())
    torch.testing.assert_close(out, expected.float())


@pytest.mark.parametrize("name", [x for x in SHAPES if x != "trajectory_attention"])
def test_any_number_of_threads_gives_the_same_bits(name, calls):
    before = torch.get_num_threads()
    found = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            found.append(with_gradients(name, inputs(name)))
    finally:
        torch.set_num_threads(before)
    assert same(found[0], found[1])
    assert same(found[0], found[2])
    assert calls


def test_python_threads_may_call_at_once(calls):
    args = inputs("space_attention", 2, 4, 17, 2, 24)
    expected, differ = with_gradients("space_attention", args), []

    def work():
        for _ in range(10):
            if not same(with_gradients("space_attention", args), expected):
                differ.append(threading.current_thread().name)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not differ


@pytest.mark.parametrize("name", SHAPES)
def test_defaults_for_new_tensors_do_not_matter(name, calls):
    expected = with_gradients(name, inputs(name))
    args, before = inputs(name), torch.get_default_dtype()
    for dtype in (torch.float64, torch.bfloat16):
        torch.set_default_dtype(dtype)
        try:
            got = with_gradients_of_sum(name, args)
        finally:
            torch.set_default_dtype(before)
        assert [x.dtype for x in got] == [torch.float32] * len(got)
        torch.testing.assert_close(got, with_gradients_of_sum(name, args))
    with torch.device("meta"):
        out = getattr(ops, name)(*args, impl="cpu")
    out = out if isinstance(out, tuple) else (out,)
    torch.testing.assert_close(list(out), expected[: len(out)])


def with_gradients_of_sum(name, args):
    leaves = [x.detach().requires_grad_() for x in args]
    out = getattr(ops, name)(*leaves, impl="cpu")
    out = out if isinstance(out, tuple) else (out,)
    return [*(x.detach() for x in out), *torch.autograd.grad(sum(x.sum() for x in out), leaves)]


@pytest.mark.parametrize("name", SHAPES)
def test_disabled_the_ops_do_without_and_give_the_same(name, calls):
    expected = with_gradients(name, inputs(name))
    assert calls
    calls.clear()
    with native.disabled():
        got = with_gradients(name, inputs(name))
        with native.disabled():
            pass
        getattr(ops, name)(*inputs(name), impl="cpu")
    assert not calls
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)
    getattr(ops, name)(*inputs(name), impl="cpu")
    assert calls


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
@pytest.mark.parametrize("name", SHAPES)
def test_other_dtypes_are_left_to_pytorch(name, dtype, calls):
    out = getattr(ops, name)(*inputs(name, dtype=dtype), impl="cpu")
    assert (out[0] if isinstance(out, tuple) else out).dtype == dtype
    assert not calls


def test_sequences_too_long_for_the_cache_are_left_to_pytorch(calls, monkeypatch):
    monkeypatch.setattr(native, "MAX_KEYS", 5 * 16)
    agrees("time_attention", inputs("time_attention", 1, 6, 1, 1, 16))
    assert not calls
    agrees("time_attention", inputs("time_attention", 1, 5, 1, 1, 16))
    assert calls


@pytest.mark.parametrize("name", SHAPES)
def test_a_tracer_sees_operations_it_can_record(name, calls):
    args = inputs(name)
    traced = make_fx(lambda *args: getattr(ops, name)(*args, impl="cpu"))(*args)
    assert not calls
    others = [x / 2 for x in args]
    expected = getattr(ops, name)(*others, impl="reference")
    torch.testing.assert_close(traced(*others), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", [x for x in SHAPES if x != "trajectory_attention"])
def test_a_compiled_function_keeps_the_loops(name, calls):
    torch._dynamo.reset()
    args = [x.requires_grad_() for x in inputs(name)]
    compiled = torch.compile(getattr(ops, name), backend="aot_eager", fullgraph=True)
    results = []
    for function in (compiled, getattr(ops, name)):
        calls.clear()
        out = function(*args, impl="cpu")
        out = out if isinstance(out, tuple) else (out,)
        grads = torch.autograd.grad(out, args, [y.detach().cos() for y in out])
        results.append([*out, *grads])
        assert calls == ["attend", "attend_backward"]
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("classes", [False, True])
@pytest.mark.parametrize("tokens", [5, 40], ids=["kept", "formed-again"])  # probabilities
def test_the_operator_keeps_to_its_contract(tokens, classes, calls):
    q, k, v = (torch.randn(2, 3, tokens, 2, 24, requires_grad=True) for _ in range(3))
    cls = [torch.randn(2, 2, 24, requires_grad=True) if classes else None for _ in range(3)]
    arguments = (q, k, v, *cls, 0.3, [0, 1, 3, 2, 4], 0)
    torch.library.opcheck(native._attention_op, arguments)


def falls_back(caplog):
    """The op gives what it should without C loops; returns what was said about it, once."""
    args = inputs("time_attention")
    expected = ops.time_attention(*args, impl="reference")
    for _ in range(2):
        torch.testing.assert_close(ops.time_attention(*args, impl="cpu"), expected)
    (warning,) = (r for r in caplog.records if r.levelname == "WARNING")
    assert native.why_not() in warning.getMessage()
    return caplog.text


def test_without_a_compiler_the_ops_say_so_once_and_are_still_right(unbuilt, monkeypatch, caplog):
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setenv("PATH", "")
    assert "no C compiler: none of gcc, cc, clang is installed" in falls_back(caplog)


@pytest.mark.parametrize(
    "compiler, reason",
    [
        ("no-such-compiler", "No such file or directory: 'no-such-compiler'"),
        ("gcc 'unbalanced", "No closing quotation"),
        ("false", "false could not compile native.c: exit status 1"),
    ],
)
def test_a_compiler_that_fails_is_named_as_the_reason(
    compiler, reason, unbuilt, monkeypatch, caplog
):
    monkeypatch.setenv("CC", compiler)
    assert reason in falls_back(caplog)
    assert not unbuilt.exists() or not list(unbuilt.iterdir())  # nothing half made is left


def test_of_a_compiler_s_messages_the_first_error_is_told(unbuilt, monkeypatch, tmp_path):
    compiler = tmp_path / "cc"
    said = "a note|ld: cannot find -lomp|cc: error: linker failed".replace("|", "\\n")
    compiler.write_text(f"#!/bin/sh\nprintf '{said}' >&2\nexit 1\n")
    compiler.chmod(0o755)
    monkeypatch.setenv("CC", str(compiler))
    assert native.why_not().endswith("could not compile native.c: ld: cannot find -lomp")


def test_it_is_compiled_once_for_all_processes(quick_build, monkeypatch, calls):
    (file,) = quick_build.iterdir()
    made = file.stat().st_mtime_ns
    monkeypatch.setattr(native.subprocess, "run", None)  # would be called to compile
    native._library.cache_clear()
    assert native.why_not() is None
    assert file.stat().st_mtime_ns == made
    agrees("time_attention", inputs("time_attention"))
    assert calls


def test_a_changed_compiler_or_source_is_compiled_anew(quick_build, monkeypatch, tmp_path):
    assert native.why_not() is None
    changed = tmp_path / "native.c"
    changed.write_text(native.SOURCE.read_text() + "\n")
    monkeypatch.setattr(native, "SOURCE", changed)
    native._library.cache_clear()
    assert native.why_not() is None
    monkeypatch.setenv("CC", "gcc -g0")
    native._library.cache_clear()
    assert native.why_not() is None
    assert len(list(quick_build.iterdir())) == 3


@pytest.mark.parametrize("content", [b"", b"not what a compiler writes" * 100])
def test_a_spoilt_file_in_the_cache_is_compiled_again(content, quick_build, caplog):
    file = native._compiled()
    file.write_bytes(content)
    agrees("time_attention", inputs("time_attention"))
    assert native.why_not() is None
    assert file.read_bytes() != content
    assert not [x for x in caplog.records if x.levelname == "WARNING"]


def test_what_can_never_be_loaded_is_a_reason(quick_build, monkeypatch, caplog):
    def refuse(path):
        raise OSError(f"{path}: failed to map segment from shared object")

    monkeypatch.setattr(native.ctypes, "CDLL", refuse)
    assert "failed to map segment" in falls_back(caplog)


def test_a_cache_folder_that_cannot_be_made_is_replaced(quick_build, monkeypatch, tmp_path, calls):
    in_the_way = tmp_path / "file"
    in_the_way.touch()
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.setenv("XDG_CACHE_HOME", str(in_the_way))
    monkeypatch.setattr(native.tempfile, "tempdir", str(elsewhere))
    native._library.cache_clear()
    agrees("time_attention", inputs("time_attention"))
    assert calls
    (folder,) = elsewhere.iterdir()
    assert [x.suffix for x in folder.iterdir()] == [".so"]


@on_x86
@pytest.mark.parametrize("option, lanes", [("-mno-avx512f", 8), ("-mno-avx", 4)])
def test_processors_with_narrower_registers(option, lanes, quick_build, monkeypatch, calls):
    monkeypatch.setenv("CC", f"gcc {option}")
    monkeypatch.setattr(native, "FLAGS", (*native.FLAGS, "-O1"))
    native._library.cache_clear()
    assert native.lanes() <= lanes
    tile = 4 * native.lanes()
    for width in (3, 24, 80):
        agrees("time_attention", inputs("time_attention", 1, tile + 1, 2, 1, width))
        agrees("space_attention", inputs("space_attention", 1, 2, tile + 7, 1, width))
    agrees("shift_attention", inputs("shift_attention"), shift_div=5)
    for values in ("trajectory", "projected"):
        agrees(
            "trajectory_attention", inputs("trajectory_attention", 1, 3, 5, 2, 24), values=values
        )
    agrees("time_attention", inputs("time_attention", dtype=torch.bfloat16), tolerance=3e-3)
    assert len(calls) > 20
