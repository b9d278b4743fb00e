"""Checkpoints: complete or not there, never damaged unnoticed, never executed."""

import os
import shutil
from pathlib import Path

import pytest
import torch

from timefast import checkpoint
from timefast.checkpoint import (
    list_checkpoints,
    load_checkpoint,
    newest_checkpoint,
    problem,
    prune,
    read_description,
    save_checkpoint,
)
from timefast.errors import InputError

WEIGHTS = {"w": torch.arange(12.0).reshape(3, 4)}
STATE = {"step": 1, "optimizer": {"m": torch.ones(2)}, "failures": [{"path": "x", "count": 2}]}


def save(run: Path, step: int) -> Path:
    return save_checkpoint(run, step, WEIGHTS, {**STATE, "step": step}, {"classes": ["a"]})


def test_what_was_saved_comes_back(tmp_path):
    path = save(tmp_path, 7)
    loaded = load_checkpoint(path)
    assert loaded.step == 7
    assert torch.equal(loaded.weights["w"], WEIGHTS["w"])
    assert torch.equal(loaded.state["optimizer"]["m"], torch.ones(2))
    assert loaded.state["failures"] == STATE["failures"]
    assert read_description(path / "model.safetensors") == {"format": 1, "classes": ["a"]}


def test_order_is_by_step_not_by_name_or_time(tmp_path):
    for step in (900, 1000, 20):
        save(tmp_path, step)
    assert [p.name for p in list_checkpoints(tmp_path)] == ["step-1000", "step-900", "step-20"]


@pytest.mark.parametrize("name", ["model.safetensors", "state.pt"])
@pytest.mark.parametrize("damage", ["flip", "cut", "empty", "gone"])
def test_damage_falls_back_to_the_one_before_and_says_so(tmp_path, caplog, name, damage):
    save(tmp_path, 1)
    newest = save(tmp_path, 2)
    file = newest / name
    data = bytearray(file.read_bytes())
    if damage == "flip":
        data[-3] ^= 1
    if damage == "gone":
        file.unlink()
    else:
        file.write_bytes({"flip": data, "cut": data[:-5], "empty": b""}[damage])
    assert newest_checkpoint(tmp_path) == tmp_path / "checkpoints/step-1"
    assert "step-2 is damaged" in caplog.text


def test_a_run_whose_checkpoints_are_all_damaged_does_not_start_over(tmp_path):
    (save(tmp_path, 1) / "state.pt").write_bytes(b"")
    with pytest.raises(InputError, match="all 1 checkpoints are damaged"):
        newest_checkpoint(tmp_path)


def test_a_newer_format_is_named(tmp_path):
    path = save(tmp_path, 1)
    index = (path / "index.json").read_text().replace('"format": 1', '"format": 99')
    (path / "index.json").write_text(index)
    assert "newer" in str(problem(path))


def test_pruning_keeps_the_newest_and_clears_leftovers(tmp_path):
    for step in range(1, 5):
        save(tmp_path, step)
    (tmp_path / "checkpoints/.tmp-step-9").mkdir()
    prune(tmp_path, 4, keep=2)
    left = sorted(p.name for p in (tmp_path / "checkpoints").iterdir())
    assert left == ["step-3", "step-4"]


def test_a_damaged_later_checkpoint_does_not_push_out_the_sound_one_just_written(tmp_path):
    for step in (1, 2):
        save(tmp_path, step)
    (tmp_path / "checkpoints/step-2/state.pt").write_bytes(b"")
    save(tmp_path, 1)  # what a run writes that went on from step 0
    prune(tmp_path, 1, keep=1)
    assert newest_checkpoint(tmp_path) == tmp_path / "checkpoints/step-1"


def test_a_full_disk_leaves_the_old_checkpoint_alone(tmp_path, monkeypatch):
    save(tmp_path, 1)

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("timefast.checkpoint.torch.save", full)
    with pytest.raises(OSError, match="No space"):
        save(tmp_path, 2)
    assert newest_checkpoint(tmp_path) == tmp_path / "checkpoints/step-1"
    assert not list((tmp_path / "checkpoints").glob(".tmp-*"))


def _save_and_die_at(run: Path, stage: int) -> int:
    """Exit code of a forked process that dies at its stage-th call that touches the disk."""
    child = os.fork()
    if child:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    calls = 0

    def dying(original):
        def call(*args, **kwargs):
            nonlocal calls
            calls += 1
            if calls == stage:
                os._exit(9)
            return original(*args, **kwargs)

        return call

    checkpoint.save_file = dying(checkpoint.save_file)
    torch.save = dying(torch.save)
    checkpoint._flush = dying(checkpoint._flush)
    os.replace = dying(os.replace)
    shutil.rmtree = dying(shutil.rmtree)
    save(run, 2)
    prune(run, 2, 1)
    os._exit(0)


def test_a_kill_at_any_stage_of_saving_leaves_a_sound_checkpoint(tmp_path):
    codes = []
    while 0 not in codes:  # one stage later each time, until the process survives
        run = tmp_path / str(len(codes))
        save(run, 1)
        codes.append(_save_and_die_at(run, len(codes) + 1))
        path = newest_checkpoint(run)
        assert path is not None
        assert load_checkpoint(path).state["step"] in (1, 2)
    assert len(codes) > 8 and set(codes) == {0, 9}


class Payload:
    def __reduce__(self):
        return (os.system, ("touch executed",))


def test_code_in_a_checkpoint_is_refused_not_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = save(tmp_path, 1)
    torch.save({"step": Payload()}, path / "state.pt")
    with pytest.raises(Exception, match="weights_only|Unsupported|WeightsUnpickler"):
        load_checkpoint(path)
    assert not (tmp_path / "executed").exists()
