"""Training in several processes (Gloo, on a CPU) is the training of one."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests import processes
from tests.test_train import TINY, lines, train, weights
from timefast import checkpoint
from timefast.demo_data import write_demo_data
from timefast.log import read_json_lines
from timefast.methods.time_ssl import TimeMethod

# no stochastic depth: its draws belong to a process; 24 videos in batches of 23 and 1, so that in
# the second step one of two processes has no clip at all
SAME = [*TINY, "--drop-path", "0", "--batch-size", "23", "--eval-every", "9", "--epochs", "1"]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """24 training and 12 validation videos."""
    root = tmp_path_factory.mktemp("data") / "demo"
    return write_demo_data(root, train_per_class=2, val_per_class=1)


def flags(data, out, *more):
    return [*SAME, "--data", data, "--out", out, *more]


@pytest.fixture(scope="module")
def alone(data, tmp_path_factory):
    run = tmp_path_factory.mktemp("runs") / "alone"
    assert train(data, run, *SAME[len(TINY) :]) == 0
    return run


def assert_same_training(run, other, rel=2e-4):
    a, b = lines(run, "train"), lines(other, "train")
    assert [line["step"] for line in a] == [line["step"] for line in b]
    for one, two in zip(a, b, strict=True):
        for key in ("loss", "loss_ce", "loss_order", "loss_debias", "loss_flow", "grad_norm"):
            assert one[key] == pytest.approx(two[key], rel=rel), (one["step"], key)
    a, b = weights(run), weights(other)
    # the bias of keys has no true gradient, only the noise of rounding, which AdamW makes large
    for key in (k for k in a if not k.endswith(("qkv.bias", "mlp_k.bias"))):
        torch.testing.assert_close(a[key], b[key], rtol=1e-3, atol=2e-4, msg=lambda m, k=key: k + m)


def test_two_processes_train_like_one_also_with_an_uneven_last_batch(data, alone, tmp_path):
    assert processes.run(2, flags(data, tmp_path / "two"), tmp_path / "log") == [0, 0]
    assert_same_training(tmp_path / "two", alone)
    assert json.loads((tmp_path / "two/config.json").read_text())["processes"] == 2
    assert "report:" in processes.said(tmp_path / "log", 0)
    assert processes.said(tmp_path / "log", 1) == ""  # the leader alone speaks and writes


@pytest.mark.parametrize("shard", ["--no-shard", "--shard"])
def test_two_processes_evaluate_like_one(data, alone, tmp_path, shard):
    """Of 12 videos in batches of 2 with one that cannot be read: for one batch a process has
    none. Continuing a finished run evaluates it again."""
    broken = tmp_path / "data"
    shutil.copytree(data, broken)
    entries = json.loads((broken / "something-something-v2-validation.json").read_text())
    (broken / "videos" / f"{entries[5]['id']}.webm").write_bytes(b"")
    rows = []
    for count in (1, 2):
        run = tmp_path / str(count)
        shutil.copytree(alone, run)
        again = ["--resume", "--data", broken, "--out", run, "--views", "4x3", shard]
        assert processes.run(count, again, tmp_path / "log") == [0] * count
        rows.append(lines(run, "eval"))
    for one, two in zip(*rows, strict=True):
        assert one["videos_evaluated"] == one["videos_expected"] - (one["subset"] != "static")
        assert one == pytest.approx(two, abs=1e-5)


def test_a_sharded_run_trains_like_one_process_and_either_continues_the_other(
    data,
    alone,
    tmp_path,
):
    """Two processes with sharded weights, stopped after the first step and continued by one; then
    begun by one and continued by two."""
    first, second, log = tmp_path / "a", tmp_path / "b", tmp_path / "log"
    assert processes.run(2, flags(data, first, "--shard", "--max-steps", "1"), log) == [0, 0]
    assert train(data, first, *SAME[len(TINY) :], "--max-steps", "2", "--resume") == 0
    assert_same_training(first, alone)
    assert train(data, second, *SAME[len(TINY) :], "--max-steps", "1") == 0
    more = ["--shard", "--max-steps", "2", "--resume"]
    assert processes.run(2, flags(data, second, *more), log) == [0, 0]
    assert_same_training(second, alone)
    assert "checkpoint is of 1 processes, this run has 2" in processes.said(log, 0)


def test_accumulated_gradients_are_exchanged_once_per_step(data, alone, tmp_path):
    counted = tmp_path / "exchanges"

    def count(rank):
        from torch.nn.parallel import DistributedDataParallel as DDP

        init = DDP.__init__

        def counting(self, *given, **named):
            init(self, *given, **named)

            def hook(state, bucket):
                with counted.with_suffix(f".{rank}").open("a") as file:
                    file.write("x")
                summed = torch.distributed.all_reduce(bucket.buffer(), async_op=True)
                return summed.get_future().then(lambda f: f.value()[0] / 2)

            self.register_comm_hook(None, hook)

        DDP.__init__ = counting

    batches = ["--batch-size", "5", "--accumulate", "3", "--max-steps", "2", "--losses", "flow"]
    run, one = tmp_path / "two", tmp_path / "one"
    assert processes.run(2, flags(data, run, *batches), tmp_path / "log", count) == [0, 0]
    assert counted.with_suffix(".0").read_text() == "xx"
    assert train(data, one, *SAME[len(TINY) :], *batches) == 0
    assert_same_training(run, one)


@pytest.mark.parametrize("shard", ["--no-shard", "--shard"])
def test_gradients_that_are_not_finite_in_one_process_leave_the_step_out_in_all(
    data, tmp_path, shard
):
    run, log = tmp_path / "run", tmp_path / "log"

    def nan_in_the_second_step_of_process_1(rank):
        real, calls = TimeMethod.training_loss, []

        def loss(self, *given):
            calls.append(0)
            losses = real(self, *given)
            if rank == 1 and len(calls) == 2:
                losses["total"] = losses["total"] * float("nan")
            return losses

        TimeMethod.training_loss = loss

    more = ["--batch-size", "6", "--max-steps", "3", "--save-every", "1", "--keep", "9", shard]
    codes = processes.run(2, flags(data, run, *more), log, nan_in_the_second_step_of_process_1)
    assert codes == [0, 0]
    one, two, three = (
        load_file(run / f"checkpoints/step-{n}/model.safetensors") for n in (1, 2, 3)
    )
    assert all(torch.equal(one[k], two[k]) for k in one)
    assert not all(torch.equal(two[k], three[k]) for k in two)
    assert "left out 1 steps" in processes.said(log, 0)
    state = torch.load(run / "checkpoints/step-3/state.pt", weights_only=True)
    assert state["skipped_steps"] == 1


def test_bad_videos_of_every_process_are_counted_and_named_once(data, tmp_path):
    broken, run, log = tmp_path / "data", tmp_path / "run", tmp_path / "log"
    shutil.copytree(data, broken)
    entries = json.loads((broken / "something-something-v2-train.json").read_text())
    bad = {f"{entry['id']}.webm" for entry in entries[:6]}
    for name in bad:
        (broken / "videos" / name).write_bytes(b"")
    assert processes.run(2, flags(broken, run), log) == [0, 0]
    failures = read_json_lines(run / "failures.jsonl")
    assert {failure["path"].rpartition("/")[2] for failure in failures} == bad
    assert processes.said(log, 0).count("not used:") == len(failures)


def test_a_signal_to_one_process_stops_all_at_the_same_step(data, tmp_path):
    run, log = tmp_path / "run", tmp_path / "log"
    more = ["--batch-size", "6", "--epochs", "500", "--eval-every", "999"]
    started = processes.start(2, flags(data, run, *more), log)
    deadline = time.monotonic() + processes.SECONDS
    while not (run / "metrics.jsonl").exists() or not lines(run, "train"):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    os.kill(started[1].pid, signal.SIGUSR1)
    assert processes.wait(started) == [128 + signal.SIGUSR1] * 2
    newest = checkpoint.newest_checkpoint(run)
    assert newest is not None
    assert newest.name == f"step-{lines(run, 'train')[-1]['step']}"


def test_all_processes_end_when_one_fails(data, tmp_path):
    run, log = tmp_path / "run", tmp_path / "log"

    def fail_in_process_1(rank):
        def loss(self, *given):
            raise AssertionError("of process 1")

        if rank == 1:
            TimeMethod.training_loss = loss

    codes = processes.run(2, flags(data, run), log, fail_in_process_1)
    assert codes == [1, 1]
    assert "AssertionError: of process 1" in processes.said(log, 1)
    assert "another process of this run ended" in processes.said(log, 0)
    assert "Traceback" not in processes.said(log, 0)


def test_wrong_usage_is_said_once(tmp_path):
    log = tmp_path / "log"
    codes = processes.run(2, flags(tmp_path / "nothing", tmp_path / "run"), log)
    assert codes == [2, 2]
    assert (processes.said(log, 0) + processes.said(log, 1)).count("error") == 1


@pytest.mark.slow
def test_a_process_that_stops_answering_ends_the_others(data, tmp_path):
    run, log = tmp_path / "run", tmp_path / "log"
    more = ["--batch-size", "6", "--epochs", "500", "--eval-every", "999", "--timeout", "3"]
    started = processes.start(2, flags(data, run, *more), log)
    deadline = time.monotonic() + processes.SECONDS
    while not (run / "metrics.jsonl").exists() or not lines(run, "train"):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    os.kill(started[1].pid, signal.SIGSTOP)
    started[0].join(15)
    assert started[0].exitcode == 1
    started[1].kill()
    assert "ended or fell silent" in processes.said(log, 0)


@pytest.mark.slow
def test_torchrun_starts_a_run_and_ends_it_when_a_process_dies(data, alone, tmp_path):
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    torchrun += ["--nproc-per-node", "2", "-m", "timefast.train"]
    done = subprocess.run([*torchrun, *map(str, flags(data, tmp_path / "run"))], timeout=120)
    assert done.returncode == 0
    assert_same_training(tmp_path / "run", alone)
    more = ["--batch-size", "6", "--epochs", "500", "--eval-every", "999", "--workers", "1"]
    endless = subprocess.Popen([*torchrun, *map(str, flags(data, tmp_path / "endless", *more))])
    deadline = time.monotonic() + 120
    while not (tmp_path / "endless/metrics.jsonl").exists():
        assert time.monotonic() < deadline
        time.sleep(0.2)
    children = Path(f"/proc/{endless.pid}/task/{endless.pid}/children").read_text().split()
    os.kill(int(children[1]), signal.SIGKILL)
    assert endless.wait(60) != 0
