"""--cuda-graphs: a replayed step is the step itself.

Without a GPU the graphs are recordings of what was dispatched during a capture. A replay computes
where the capture did, as on a GPU, and so shows what is kept past its time.
"""

import contextlib
import copy
import functools
import re

import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tests.test_train import assert_same_weights, lines, main, train
from tests.test_train_step import BACKBONES, SIDE, T, batch, small
from timefast import cuda_graph, distributed
from timefast.config import RunConfig
from timefast.cuda_graph import GraphedMethod, check_cuda_graphs
from timefast.data.batch import Batch
from timefast.demo_data import write_demo_data
from timefast.errors import InputError
from timefast.methods.time_ssl import TimeMethod

LOSSES = ["total", "ce", "order", "debias", "flow"]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """24 training and 12 validation videos."""
    root = tmp_path_factory.mktemp("data") / "demo"
    return write_demo_data(root, train_per_class=2, val_per_class=1)


class RecordedGraph:
    """What torch.cuda.CUDAGraph is to a GPU: the ops of a capture, done again on the same memory.

    `pool` holds the graphs that share memory, in the order of their captures.
    """

    replayed = 0  # times, of all graphs

    def __init__(self):
        self.ops: list[tuple] = []
        self.made: list[torch.Tensor] = []  # its own memory
        self.pool: list[RecordedGraph] = []

    @contextlib.contextmanager
    def capture(self, pool):
        self.pool = pool
        pool.append(self)
        with Recorder(self):
            yield

    @torch.no_grad()
    @torch.autocast("cpu", enabled=False)  # what it cast is among the ops
    def replay(self):
        RecordedGraph.replayed += 1
        for later in self.pool[self.pool.index(self) + 1 :]:
            for x in later.made:  # free when this graph was captured, so it may compute there
                x.fill_(torch.nan if x.is_floating_point() else 0)
        for func, args, kwargs, outs in self.ops:
            for old, new in zip(outs, tree_leaves(func(*args, **kwargs)), strict=True):
                if isinstance(old, torch.Tensor) and old.data_ptr() != new.data_ptr():
                    old.copy_(new)


class Recorder(TorchDispatchMode):
    def __init__(self, graph):
        super().__init__()
        self.graph = graph

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        outs = tree_leaves(result)
        self.graph.ops.append((func, args, kwargs, outs))
        given = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
        there = {x.untyped_storage().data_ptr() for x in given}
        for x in outs:
            if isinstance(x, torch.Tensor) and x.untyped_storage().data_ptr() not in there:
                self.graph.made.append(x)
        return result


@pytest.fixture
def replays(monkeypatch):
    """Graphs that need no GPU under the library's own make_graphed_callables; how many of both
    passes were replayed."""
    monkeypatch.setattr(RecordedGraph, "replayed", 0)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", RecordedGraph)
    monkeypatch.setattr(torch.cuda, "graph", lambda graph, pool: graph.capture(pool))
    monkeypatch.setattr(torch.cuda.graphs, "graph_pool_handle", list)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch.cuda, "Stream", lambda: None)
    monkeypatch.setattr(torch.cuda, "stream", lambda _: contextlib.nullcontext())
    return lambda: RecordedGraph.replayed / 2


def method_of(backbone, weights=(1, 1, 1), impl="reference", **more):
    """With plain formulas, all of whose ops are dispatched (those in C for a CPU are not)."""
    method = TimeMethod(small(backbone, drop_path=0.5, impl=impl, **more), weights=weights)
    method.freeze_unread()
    return method


def order(seed):
    return torch.randperm(T, generator=torch.Generator().manual_seed(seed))


def assert_follows(
    method, sizes, *, accumulate, device="cpu", autocast=contextlib.nullcontext, rtol=1e-3,
    atol=1e-4,
):  # fmt: skip
    """Eager and graphed copies of `method` on batches of these sizes, the first one captured, the
    weights moved after every `accumulate` of them."""
    method = method.to(device)
    eager, twin = method, copy.deepcopy(method)
    graphed = GraphedMethod(twin, batch(9, sizes[0]).to(device), autocast)
    seen: list[tuple[dict, dict]] = []
    for number, clips in enumerate(sizes):
        given, permutation = batch(number, clips).to(device), order(number).to(device)
        both = []
        for compute in (eager, graphed):
            torch.manual_seed(number)  # stochastic depth
            with autocast():
                losses = compute(given, permutation)
            (losses["total"] * (1 + number)).backward()
            both.append(losses)
        seen.append((both[0], both[1]))
        if number % accumulate < accumulate - 1:
            continue
        for (name, one), two in zip(eager.named_parameters(), twin.parameters(), strict=True):
            assert (one.grad is None) == (two.grad is None), name
            if one.grad is not None and two.grad is not None:
                torch.testing.assert_close(
                    two.grad, one.grad, rtol=rtol, atol=atol, msg=lambda m, n=name: f"{n}: {m}"
                )
        for model in (eager, twin):
            torch.optim.SGD(model.parameters(), lr=0.05).step()
            model.zero_grad()
    for one, two in seen:  # read late, as a line of metrics reads them
        assert list(one) == list(two) == LOSSES
        for name in LOSSES:
            torch.testing.assert_close(two[name], one[name], rtol=rtol, atol=atol)


@pytest.mark.parametrize("other", ["--shard", "--compile", "--profile"])
def test_flags_that_do_not_go_together_are_refused(other):
    with pytest.raises(InputError, match=f"^--cuda-graphs and {other}: leave one of the two out$"):
        RunConfig(cuda_graphs=True, **{other.removeprefix("--"): True})


@pytest.mark.parametrize("what", ["mlp", "blocks"])
def test_activations_are_not_computed_again_inside_of_a_graph(what):
    with pytest.raises(InputError, match="--cuda-graphs and --checkpoint-activations: leave one"):
        RunConfig(cuda_graphs=True, checkpoint_activations=what)


def test_a_device_without_graphs_is_refused(data, tmp_path, capsys):
    assert train(data, tmp_path / "run", "--cuda-graphs") == 2
    message = "error: --cuda-graphs: expected a CUDA device, got cpu; leave it out"
    assert capsys.readouterr().err.splitlines()[-1] == message
    assert not (tmp_path / "run").exists()


def test_more_than_one_process_is_refused(monkeypatch):
    monkeypatch.setattr(distributed, "world_size", lambda: 2)
    check_cuda_graphs(False, torch.device("cpu"))
    with pytest.raises(InputError, match="^--cuda-graphs: .* one process, got 2; leave it out$"):
        check_cuda_graphs(True, torch.device("cuda"))


@pytest.mark.parametrize("backbone", BACKBONES)
def test_each_batch_gets_its_own_losses_and_gradients(backbone, replays):
    assert_follows(method_of(backbone), [3, 3, 3], accumulate=1)
    assert replays() == 3


def test_gradients_add_up_over_replays_and_a_short_batch(replays):
    assert_follows(method_of("timesformer"), [3, 3, 3, 2, 2, 3], accumulate=3)
    assert replays() == 4


@pytest.mark.parametrize("weights", [(0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1), (1, 1, 0)])
def test_heads_whose_loss_has_no_weight_are_left_alone(weights, replays):
    assert_follows(method_of("timesformer", weights), [2, 2], accumulate=1)
    assert replays() == 2


def test_a_parameter_that_nobody_reads_gets_no_gradient(replays):
    method = TimeMethod(small("timesformer", impl="reference"), weights=(0, 0, 0))
    assert method.model.temp_head.weight.requires_grad
    assert_follows(method, [2, 2], accumulate=1)


def test_flow_labels_may_be_missing_where_nobody_reads_them(replays):
    method = method_of("timesformer", (1, 1, 0))
    graphed = GraphedMethod(method, batch(), contextlib.nullcontext)
    given = batch(1)
    given.flow_label = None
    assert graphed(given, order(1))["flow"] == 0
    graphed = GraphedMethod(method_of("timesformer"), batch(), contextlib.nullcontext)
    with pytest.raises(ValueError, match="flow_labels: expected"):
        graphed(given, order(1))


def test_casts_of_weights_belong_to_the_captured_step(replays):
    """With a cast from outside the second batch would meet the weights of the first."""
    bf16 = functools.partial(torch.autocast, "cpu", torch.bfloat16)
    assert_follows(method_of("timesformer"), [2, 2, 2], accumulate=1, autocast=bf16)
    assert replays() == 3


def test_nothing_holds_the_autograd_graph_of_the_capture(replays, monkeypatch):
    """Its nodes belong to the stream of the capture, and the library keeps the captured losses."""
    kept = []
    real = cuda_graph._Step.forward
    monkeypatch.setattr(
        cuda_graph._Step, "forward", lambda *given: kept.append(real(*given)) or kept[-1]
    )
    GraphedMethod(method_of("timesformer"), batch(), contextlib.nullcontext)
    warm_up, last = kept[-2], kept[-1]
    assert warm_up[0].grad_fn is not None  # it was trained on
    assert [x.requires_grad for x in last] == [False] * len(LOSSES)


def test_a_step_that_does_not_fit_says_what_to_change(monkeypatch):
    def full(*given, **options):
        raise torch.OutOfMemoryError("Tried to allocate 9 GiB")

    monkeypatch.setattr(torch.cuda, "make_graphed_callables", full)
    said = re.escape(f"batches of [3, 3, {T}, {SIDE}, {SIDE}]. Halve --batch-size")
    with pytest.raises(torch.OutOfMemoryError, match=f"{said}[^\n]+\nTried to allocate"):
        GraphedMethod(method_of("timesformer"), batch(), contextlib.nullcontext)


def test_a_run_with_graphs_is_the_run_without_bit_for_bit(data, tmp_path, monkeypatch, replays):
    """Batches of 10, 10 and 4 clips, the last around the graph; two parts to a step, dropped
    blocks. Continued without graphs and again with them."""
    monkeypatch.setattr("timefast.train.check_cuda_graphs", lambda asked, device: None)
    common = ["--batch-size", "10", "--accumulate", "2", "--drop-path", "0.5", "--depth", "2"]
    common += ["--max-steps", "6", "--eval-every", "1", "--impl", "reference"]
    assert train(data, tmp_path / "eager", *common) == 0
    assert replays() == 0
    run = tmp_path / "graphed"
    for stop, graphs in (("3", "--cuda-graphs"), ("4", "--no-cuda-graphs"), ("6", "--cuda-graphs")):
        assert train(data, run, *common, "--max-steps", stop, "--resume", graphs) == 0
    assert replays() == 4 + 0 + 2  # steps 1 and 3 replay twice; so does step 5
    assert_same_weights(run, tmp_path / "eager")
    numbers = [
        [{k: v for k, v in line.items() if k.startswith("loss")} for line in lines(r, kind="train")]
        for r in (run, tmp_path / "eager")
    ]
    assert numbers[0] == numbers[1]


def test_the_shape_of_a_lone_short_batch_is_captured(data, tmp_path, monkeypatch, replays):
    """Fewer videos than a batch has room for: their batch is the one that comes again."""
    monkeypatch.setattr("timefast.train.check_cuda_graphs", lambda asked, device: None)
    flags = ["--cuda-graphs", "--batch-size", "64", "--max-steps", "2", "--losses", "none"]
    flags += ["--impl", "reference"]
    assert train(data, tmp_path / "run", *flags) == 0
    assert replays() == 2


WAITS = {
    "_local_scalar_dense", "equal", "is_nonzero", "item", "masked_select", "nonzero",
    "nonzero_numpy", "repeat_interleave", "unique_consecutive", "unique_dim", "_unique", "_unique2",
}  # fmt: skip
FROM_HOST = {"tensor", "from_numpy", "asarray", "cpu", "numpy", "tolist", "item", "pin_memory"}


class NoteWaits(TorchDispatchMode):
    """Ops whose result, or its shape, the host would have to read from a device."""

    def __init__(self):
        super().__init__()
        self.seen: list[str] = []
        self.ops = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.ops += 1
        name = func.name().removeprefix("aten::").partition(".")[0]
        by_mask = name.startswith(("index", "_index")) and any(
            isinstance(x, torch.Tensor) and x.dtype in (torch.bool, torch.uint8)
            for x in (args[1] if len(args) > 1 and isinstance(args[1], (list, tuple)) else ())
        )
        if name in WAITS or by_mask:
            self.seen.append(func.name())
        return func(*args, **(kwargs or {}))


class NoteHostTensors(TorchFunctionMode):
    """Tensors made of Python numbers or NumPy arrays, which would be copied to a device."""

    def __init__(self):
        super().__init__()
        self.seen: list[str] = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        name = getattr(func, "__name__", "")
        as_tensor = name == "as_tensor" and not isinstance(args[0], torch.Tensor)
        if name in FROM_HOST or as_tensor:
            self.seen.append(name)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("backbone", BACKBONES)
def test_a_step_asks_the_device_nothing_and_sends_it_nothing(backbone):
    """What a capture forbids, read off the plain formulas, which are not CPU code of their own."""
    method, given, permutation = method_of(backbone), batch(), order(0)
    with NoteWaits() as waits, NoteHostTensors() as host:
        method.training_loss(given, permutation)["total"].backward()
    assert waits.ops > 100
    assert (waits.seen, host.seen) == ([], [])


def test_what_waits_is_noticed():
    x = torch.randn(5, requires_grad=True)
    with NoteWaits() as waits, NoteHostTensors() as host:
        (x[x > 0].sum() + x.masked_select(x < 0).sum()).backward()
        float(x.detach().sum())
        torch.nonzero(x)
        torch.tensor([1.0]), torch.as_tensor([2.0]), torch.as_tensor(x)
    assert {"aten::index.Tensor", "aten::masked_select", "aten::nonzero"} <= set(waits.seen)
    assert "aten::_local_scalar_dense" in waits.seen
    assert host.seen == ["tensor", "as_tensor"]


PRECISIONS = {
    "fp32": contextlib.nullcontext,
    "bf16": functools.partial(torch.autocast, "cuda", torch.bfloat16),
    "fp16": functools.partial(torch.autocast, "cuda", torch.float16),
}


@pytest.mark.gpu
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("backbone", BACKBONES)
def test_on_a_gpu_replays_follow_the_eager_step(backbone, precision):
    """Also the draws of stochastic depth and, in X-ViT, of dropout."""
    more = {"head_dropout": 0.5} if backbone == "xvit" else {}
    assert_follows(
        method_of(backbone, **more, impl="auto"), [3, 3, 3, 3], accumulate=1, device="cuda",
        autocast=PRECISIONS[precision],
        # a sum in another order may round a half-precision gradient the other way
        **({} if precision == "fp32" else {"rtol": 2e-2, "atol": 2e-3}),
    )  # fmt: skip


@pytest.mark.gpu
def test_on_a_gpu_gradients_add_up_over_replays_and_a_short_batch():
    method = method_of("timesformer", impl="auto")
    assert_follows(method, [3, 3, 3, 2, 2, 3], accumulate=3, device="cuda")


@pytest.mark.gpu
@pytest.mark.parametrize("weights", [(0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1)])
def test_on_a_gpu_heads_whose_loss_has_no_weight_are_left_alone(weights):
    assert_follows(
        method_of("timesformer", weights, impl="auto"), [2, 2], accumulate=1, device="cuda"
    )


@pytest.mark.gpu
def test_on_a_gpu_evaluation_between_two_replays_changes_nothing():
    method = method_of("timesformer", impl="auto").to("cuda")
    given, permutation = batch(1).to("cuda"), order(1).to("cuda")
    graphed = GraphedMethod(method, batch().to("cuda"), contextlib.nullcontext)

    def step():
        torch.manual_seed(1)
        method.zero_grad()
        losses = graphed(given, permutation)
        losses["total"].backward()
        return float(losses["total"].detach()), [p.grad.clone() for p in method.parameters()]

    loss, grads = step()
    method.model.eval()
    with torch.inference_mode():
        first = method.model(given.video)
        torch.testing.assert_close(method.model(given.video), first)
    method.model.train()
    again, same = step()
    assert again == pytest.approx(loss, rel=1e-5)
    torch.testing.assert_close(same, grads, rtol=1e-3, atol=1e-4)


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_on_a_gpu_a_run_with_graphs_is_the_run_without(data, tmp_path, precision, monkeypatch):
    """The whole command, with a short last batch, two parts to a step, and continued."""
    flags = ["--device", "cuda", "--precision", precision, "--batch-size", "10", "--depth", "2"]
    flags += ["--accumulate", "2", "--drop-path", "0.5", "--eval-every", "1"]
    assert train(data, tmp_path / "eager", *flags, "--max-steps", "4") == 0
    run = tmp_path / "graphed"
    replayed = []
    real = GraphedMethod.forward

    def noted(self, given: Batch, permutation):
        replayed.append(given.video.shape == self.shape)
        return real(self, given, permutation)

    monkeypatch.setattr(cuda_graph.GraphedMethod, "forward", noted)
    assert train(data, run, *flags, "--max-steps", "3", "--cuda-graphs") == 0
    assert main(["--resume", "--out", str(run), "--max-steps", "4"]) == 0
    assert replayed == [True, True, False] * 2
    for one, two in zip(lines(run, "train"), lines(tmp_path / "eager", "train"), strict=True):
        for key in ("loss", "loss_ce", "loss_order", "loss_debias", "loss_flow", "grad_norm"):
            assert one[key] == pytest.approx(two[key], rel=1e-2, abs=1e-3), (one["step"], key)


@pytest.mark.gpu
def test_on_a_gpu_a_replayed_step_does_not_wait_for_it():
    graphed = GraphedMethod(
        method_of("timesformer", impl="auto").to("cuda"), batch().to("cuda"), PRECISIONS["bf16"]
    )
    given, permutation = batch(1).to("cuda"), order(1).to("cuda")
    graphed(given, permutation)["total"].backward()
    torch.cuda.set_sync_debug_mode("error")
    try:
        graphed(given, permutation)["total"].backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
