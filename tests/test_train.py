"""The training loop: what a run leaves behind, exact resume, faults on the way."""

import contextlib
import io
import json
import multiprocessing
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

from timefast import checkpoint
from timefast.demo_data import write_demo_data
from timefast.log import read_json_lines
from timefast.methods.time_ssl import TimeMethod
from timefast.run_folder import lock_run
from timefast.train import Trainer, main

AS_FP32 = contextlib.nullcontext, "fp32"
TINY = ["--recipe", "demo", "--depth", "1", "--dim", "32", "--heads", "2", "--device", "cpu"]
TINY += ["--batch-size", "6", "--log-every", "1", "--shuffles", "1", "--workers", "0"]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """24 training and 12 validation videos."""
    root = tmp_path_factory.mktemp("data") / "demo"
    return write_demo_data(root, train_per_class=2, val_per_class=1)


def train(data, out, *flags):
    return main([*TINY, "--data", str(data), "--out", str(out), *flags])


def weights(run):
    newest = checkpoint.newest_checkpoint(run)
    assert newest is not None
    return load_file(newest / "model.safetensors")


def assert_same_weights(a, b):
    a, b = weights(a), weights(b)
    assert a.keys() == b.keys()
    assert [k for k in a if not torch.equal(a[k], b[k])] == []


def lines(run, kind):
    return [m for m in read_json_lines(run / "metrics.jsonl") if m["kind"] == kind]


@pytest.fixture(scope="module")
def finished(data, tmp_path_factory):
    run = tmp_path_factory.mktemp("runs") / "straight"
    assert train(data, run, "--max-steps", "6", "--eval-every", "1") == 0
    return run


def test_a_run_leaves_all_its_files(finished):
    assert (finished / "report.html").exists()
    config = json.loads((finished / "config.json").read_text())
    assert config["config"]["optim"]["batch_size"] == 6
    assert config["implementations"]["time_attention"]
    assert config["pipeline"].startswith("cpu")
    assert config["versions"]["torch"]
    steps = [line["step"] for line in lines(finished, "train")]
    assert steps == [1, 2, 3, 4, 5, 6]
    wanted = {"lr", "loss", "loss_ce", "loss_order", "loss_debias", "loss_flow", "grad_norm"}
    wanted |= {"step", "epoch", "clips_per_s", "data_s", "step_s"}
    assert wanted <= set(lines(finished, "train")[0])
    final = [line for line in lines(finished, "eval") if line["step"] == 6]
    assert {line["subset"] for line in final} == {"all", "temporal", "static"}
    everything = final[0]
    assert (everything["videos_expected"], everything["videos_evaluated"]) == (12, 12)
    assert everything["gap"] == pytest.approx(everything["top1"] - everything["shuffled_top1"])
    assert everything["protocol"].startswith("clip: 8 frames")
    names = {p.name for p in (finished / "checkpoints/step-6").iterdir()}
    assert names == {"model.safetensors", "state.pt", "index.json"}


def test_the_total_loss_is_the_sum_of_its_parts(finished):
    for line in lines(finished, "train"):
        parts = sum(line[f"loss_{k}"] for k in ("ce", "order", "debias", "flow"))
        assert line["loss"] == pytest.approx(parts, rel=1e-5)


@pytest.mark.parametrize("name", ["cv2", "xformers", "fortran"])
def test_an_implementation_that_models_have_not_is_refused_at_once(name, data, tmp_path, capsys):
    assert train(data, tmp_path / "run", "--impl", name) == 2
    assert f"--impl {name}: expected auto, cpu, reference, triton" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_one_from_the_environment_is_refused_by_that_name(data, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("TIMEFAST_IMPL", "cv2")
    assert train(data, tmp_path / "run") == 2
    assert "TIMEFAST_IMPL=cv2: expected auto, cpu," in capsys.readouterr().err


def test_one_that_cannot_run_here_is_refused_at_once(data, tmp_path, capsys, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert train(data, tmp_path / "run", "--impl", "triton") == 2
    said = capsys.readouterr().err
    assert "--impl triton: torch sees no CUDA device" in said and "Without it each op" in said
    assert not (tmp_path / "run").exists()


def test_a_start_that_failed_leaves_its_folder_to_the_next(data, tmp_path, monkeypatch):
    """Nothing is lost with a folder that holds a configuration and no step."""

    def fail(*_):
        raise NotImplementedError("no kernel for this")

    with monkeypatch.context() as broken:
        broken.setattr(Trainer, "_forward_backward", fail)
        assert train(data, tmp_path / "run", "--lr", "0.5") == 2
    assert (tmp_path / "run/config.json").exists()
    assert train(data, tmp_path / "run", "--max-steps", "1") == 0
    config = json.loads((tmp_path / "run/config.json").read_text("utf-8"))
    assert config["config"]["optim"]["lr"] != 0.5


def test_interrupted_and_resumed_equals_uninterrupted_bit_for_bit(data, finished, tmp_path):
    """Stopped in the middle of epoch 1 (4 steps an epoch) and of epoch 0, with other workers."""
    run = tmp_path / "stopped"
    for stop, workers in ((1, "0"), (5, "1"), (6, "0")):
        flags = ["--max-steps", str(stop), "--eval-every", "1", "--workers", workers]
        assert train(data, run, *flags, "--resume") == 0
    assert_same_weights(run, finished)

    def numbers(run):
        timeless = ("clips_per_s", "data_s", "step_s")
        return [{k: v for k, v in m.items() if k not in timeless} for m in lines(run, "train")]

    assert numbers(run) == numbers(finished)
    state = [
        torch.load(r / "checkpoints/step-6/state.pt", weights_only=True) for r in (run, finished)
    ]
    for a, b in zip(*(s["optimizer"]["state"].values() for s in state), strict=True):
        assert all(torch.equal(a[k], b[k]) for k in a)


def test_sigterm_saves_stops_and_can_be_resumed(data, finished, tmp_path):
    run = tmp_path / "signalled"
    command = [
        sys.executable,
        "-m",
        "timefast.train",
        *TINY,
        "--data",
        str(data),
        "--out",
        str(run),
    ]
    command += ["--eval-every", "1", "--workers", "1"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 120
    while not (run / "metrics.jsonl").exists() or not lines(run, "train"):
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    stderr = process.communicate(timeout=60)[1]
    assert process.returncode == 128 + signal.SIGTERM, stderr
    assert "--resume" in stderr and "Traceback" not in stderr
    steps = [line["step"] for line in lines(run, "train")]
    newest = checkpoint.newest_checkpoint(run)
    assert newest is not None and newest.name == f"step-{steps[-1]}"
    if steps[-1] < 6:
        assert train(data, run, "--eval-every", "1", "--max-steps", "6", "--resume") == 0
        assert_same_weights(run, finished)


def test_a_signal_at_the_very_end_of_a_step_loses_nothing(data, tmp_path, monkeypatch):
    real = Trainer._log

    def signalled(self, *given):
        real(self, *given)
        if self.step == 1:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(Trainer, "_log", signalled)
    assert train(data, tmp_path / "run") == 128 + signal.SIGTERM
    newest = checkpoint.newest_checkpoint(tmp_path / "run")
    assert newest is not None
    assert newest.name == f"step-{lines(tmp_path / 'run', 'train')[-1]['step']}"


def test_resuming_takes_the_stored_configuration(data, finished, tmp_path, capsys):
    run = tmp_path / "run"
    assert train(data, run, "--max-steps", "1") == 0
    assert main(["--resume", "--out", str(run), "--max-steps", "2"]) == 0
    assert [line["step"] for line in lines(run, "train")] == [1, 2]
    assert main(["--resume", "--out", str(run), "--lr", "0.5"]) == 2
    assert "--lr: 0.002 there, 0.5 asked for" in capsys.readouterr().err


def test_a_folder_with_a_run_is_not_overwritten(data, finished, capsys):
    assert train(data, finished, "--max-steps", "6", "--eval-every", "1") == 2
    assert "add --resume" in capsys.readouterr().err
    assert train(data, finished, "--lr", "0.5") == 2
    assert "--lr: 0.002 there, 0.5 asked for" in capsys.readouterr().err


def test_two_runs_do_not_write_to_one_folder(data, tmp_path, capsys):
    run = tmp_path / "run"
    run.mkdir()
    with lock_run(run):
        assert train(data, run) == 2
    assert f"pid {os.getpid()}" in capsys.readouterr().err


def test_a_process_that_was_forked_does_not_hold_the_lock(tmp_path):
    """As a decoding process does that lives on for seconds after its run was killed."""
    lock = lock_run(tmp_path)
    reading, writing = os.pipe()
    child = os.fork()
    if not child:
        os.write(writing, b"forked")
        time.sleep(30)
        os._exit(0)
    os.read(reading, 6)
    lock.close()
    try:
        lock_run(tmp_path).close()
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


def test_a_run_is_not_continued_on_other_videos(data, tmp_path, capsys):
    run, moved, other = tmp_path / "run", tmp_path / "moved", tmp_path / "other"
    assert train(data, run, "--max-steps", "3") == 0
    shutil.copytree(data, moved)
    assert main(["--resume", "--out", str(run), "--data", str(moved), "--max-steps", "4"]) == 0
    shutil.copytree(data, other)
    entries = json.loads((other / "something-something-v2-train.json").read_text())
    (other / "something-something-v2-train.json").write_text(json.dumps(entries[:7]))
    assert main(["--resume", "--out", str(run), "--data", str(other), "--max-steps", "9"]) == 2
    assert "24 then, 7 now" in capsys.readouterr().err


def test_continuing_needs_no_image_model_and_keeps_the_precision(data, tmp_path, monkeypatch):
    run = tmp_path / "run"
    read = []
    monkeypatch.setattr("timefast.weights.load_imagenet", lambda *given: read.append(given))
    assert train(data, run, "--max-steps", "1", "--weights", "imagenet") == 0
    assert len(read) == 1
    monkeypatch.setattr("timefast.train.autocast_for", lambda *given: read.append(given) or AS_FP32)
    assert main(["--resume", "--out", str(run), "--max-steps", "2"]) == 0
    assert len(read) == 2 and read[1][1] == "fp32"


def test_accumulated_gradients_equal_one_large_batch(data, tmp_path):
    """Two halves of a batch, the last step of the epoch with fewer clips than the others."""
    common = ["--losses", "order,flow", "--drop-path", "0", "--epochs", "1", "--eval-every", "9"]
    assert train(data, tmp_path / "one", *common, "--batch-size", "10") == 0
    assert train(data, tmp_path / "two", *common, "--batch-size", "5", "--accumulate", "2") == 0
    assert len(lines(tmp_path / "two", "train")) == 3
    one, two = lines(tmp_path / "one", "train"), lines(tmp_path / "two", "train")
    for a, b in zip(one, two, strict=True):
        for key in ("loss", "loss_order", "loss_flow", "grad_norm"):
            assert a[key] == pytest.approx(b[key], rel=2e-4)


def test_the_loss_falls_and_the_baseline_trains_without_time_heads(data, tmp_path):
    assert train(data, tmp_path / "base", "--losses", "none", "--epochs", "6", "--lr", "5e-3") == 0
    losses = [line["loss"] for line in lines(tmp_path / "base", "train")]
    assert sum(losses[-4:]) < 0.9 * sum(losses[:4])
    assert all(line["loss_order"] == 0 for line in lines(tmp_path / "base", "train"))
    assert not any(k.startswith("flow_head") for k in weights(tmp_path / "base"))


def test_a_step_with_gradients_that_are_not_finite_is_left_out(data, tmp_path, monkeypatch, caplog):
    real = TimeMethod.training_loss
    calls = []

    def sometimes_nan(self, batch, permutation):
        calls.append(0)
        losses = real(self, batch, permutation)
        if len(calls) == 2:
            losses["total"] = losses["total"] * float("nan")
        return losses

    monkeypatch.setattr(TimeMethod, "training_loss", sometimes_nan)
    assert (
        train(data, tmp_path / "run", "--max-steps", "3", "--save-every", "1", "--keep", "9") == 0
    )
    one, two, three = (
        load_file(tmp_path / f"run/checkpoints/step-{n}/model.safetensors") for n in (1, 2, 3)
    )
    assert all(torch.equal(one[k], two[k]) for k in one)
    assert not all(torch.equal(two[k], three[k]) for k in two)
    assert lines(tmp_path / "run", "train")[1]["loss"] is None

    monkeypatch.setattr(
        TimeMethod, "training_loss",
        lambda *a: {k: v * float("nan") for k, v in real(*a).items()},
    )  # fmt: skip
    assert train(data, tmp_path / "lost", "--epochs", "9", "--eval-every", "99") == 1


def test_a_bad_video_is_skipped_named_and_counted(data, tmp_path):
    broken = tmp_path / "data"
    subprocess.run(["cp", "-r", str(data), str(broken)], check=True)
    (broken / "timefast-scan.jsonl").unlink(missing_ok=True)  # what earlier runs noted down
    entries = json.loads((broken / "something-something-v2-train.json").read_text())
    (broken / "videos" / f"{entries[0]['id']}.webm").write_bytes(b"")
    assert train(broken, tmp_path / "run", "--max-steps", "4") == 0
    (failure,) = read_json_lines(tmp_path / "run/failures.jsonl")
    assert failure["class"] == "empty"
    assert failure["path"].endswith(f"{entries[0]['id']}.webm")
    assert failure["count"] == 1


def test_lines_that_are_none_do_not_keep_a_run_from_going_on(data, tmp_path):
    run = tmp_path / "run"
    assert train(data, run, "--max-steps", "1") == 0
    with (run / "metrics.jsonl").open("ab") as file:
        file.write(b'5\n{"kind": "train"}\n\xff\n{"kind": "train", "st')
    assert main(["--resume", "--out", str(run), "--max-steps", "2"]) == 0
    assert [line["step"] for line in lines(run, "train")] == [1, 2]


def test_too_many_bad_videos_end_the_run_with_a_list(data, tmp_path, capsys):
    broken = tmp_path / "data"
    subprocess.run(["cp", "-r", str(data), str(broken)], check=True)
    for entry in json.loads((broken / "something-something-v2-train.json").read_text())[:16]:
        (broken / "videos" / f"{entry['id']}.webm").write_bytes(b"<html>not found</html>")
    assert train(broken, tmp_path / "run") == 2
    message = capsys.readouterr().err
    assert "not-a-video" in message and "--max-bad-fraction" in message


def test_a_full_disk_is_a_warning_and_the_third_time_an_error(data, tmp_path, monkeypatch, caplog):
    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("timefast.train.save_checkpoint", full)
    assert train(data, tmp_path / "a", "--max-steps", "2", "--save-every", "1") == 0
    assert train(data, tmp_path / "b", "--max-steps", "3", "--save-every", "1") == 1


def test_continuing_a_finished_run_leaves_its_metrics_as_they_were(data, tmp_path):
    run = tmp_path / "run"
    assert train(data, run, "--max-steps", "2") == 0
    before = (run / "metrics.jsonl").read_text()
    assert main(["--resume", "--out", str(run)]) == 0
    assert (run / "metrics.jsonl").read_text() == before


def test_what_a_full_disk_refuses_of_the_metrics_is_written_later(data, tmp_path, monkeypatch):
    """An open file whose second flush fails, as on a disk that has room again later."""
    run = tmp_path / "run"
    calls = []

    class Full(io.FileIO):
        def write(self, raw):
            calls.append(0)
            if len(calls) == 2:
                raise OSError(28, "No space left on device")
            return super().write(raw)

    def opened(lines, path):
        lines.path = path
        lines._file = io.TextIOWrapper(io.BufferedWriter(Full(path, "ab")), encoding="utf-8")

    monkeypatch.setattr("timefast.log.JsonLines.__init__", opened)
    assert train(data, run, "--max-steps", "3") == 0
    assert [line["step"] for line in lines(run, "train")] == [1, 2, 3]


def test_a_disk_that_is_full_from_the_start_is_one_message(data, tmp_path, monkeypatch, capsys):
    def full(path, value):
        raise OSError(28, "No space left on device", str(path))

    monkeypatch.setattr("timefast.train.write_json", full)
    assert train(data, tmp_path / "run", "--max-steps", "1") == 1
    message = capsys.readouterr().err.splitlines()[-1]
    assert message.startswith("error: ") and "config.json" in message


def test_tensorboard_gets_the_last_points_and_may_fail(data, tmp_path, monkeypatch, caplog):
    tensorboard = pytest.importorskip("torch.utils.tensorboard")
    drawn = []

    class Writer:
        def __init__(self, *_, **__):
            pass

        def add_scalar(self, name, value, step):
            if len(drawn) == 3:
                raise OSError(28, "No space left on device")
            drawn.append(name)

        def close(self):
            drawn.append("closed")

    monkeypatch.setattr(tensorboard, "SummaryWriter", Writer)
    assert train(data, tmp_path / "a", "--max-steps", "1") == 0
    assert len(drawn) == 3 and "closed" not in drawn
    drawn[:] = [""] * 4
    assert train(data, tmp_path / "b", "--max-steps", "1") == 0
    assert drawn[-1] == "closed" and "eval/all/shuffled_top1" in drawn


def test_a_run_goes_on_when_its_decoding_processes_are_killed(data, tmp_path, monkeypatch, capsys):
    real = TimeMethod.training_loss

    def then_kill(*given):
        for process in multiprocessing.active_children():
            process.kill()
        return real(*given)

    monkeypatch.setattr(TimeMethod, "training_loss", then_kill)
    assert train(data, tmp_path / "run", "--workers", "1", "--max-steps", "3") == 0
    assert "ended (exit code -9)" in capsys.readouterr().err


@pytest.mark.parametrize(
    "flags",
    [
        ["--data", "/nowhere/at/all"],
        ["--recipe", "nope"],
        ["--device", "cuda:7"],
        ["--out", "/dev/null/x"],
        ["--weights", "/no/such/file.pth"],
    ],
    ids=lambda flags: flags[0],
)
def test_bad_input_is_one_message_and_exit_code_2(data, tmp_path, capsys, flags):
    if "--device" in flags and torch.cuda.is_available():
        pytest.skip("there is a CUDA device")
    assert train(data, tmp_path / "run", "--max-steps", "1", *flags) == 2
    stderr = capsys.readouterr().err
    assert flags[1] in stderr and "Traceback" not in stderr
    assert len(stderr.splitlines()) < 20


def test_nothing_to_resume_is_said(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main([*TINY, "--resume"]) == 2
    assert "no run of recipe demo in runs/" in capsys.readouterr().err


def test_paths_may_be_relative(data, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main([*TINY, "--data", os.path.relpath(data), "--out", "x/y", "--max-steps", "1"]) == 0
    assert Path("x/y/report.html").exists()
    config = json.loads(Path("x/y/config.json").read_text())
    root = Path(config["config"]["data"]["root"])
    assert root.is_absolute() and root.samefile(data)
    assert config["videos"]["train"]["videos"] == 24
