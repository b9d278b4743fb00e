"""The profile of training steps: written once, or said why not."""

import pytest
import torch

from timefast import profiling
from timefast.profiling import StepProfiler


@pytest.fixture
def warnings(monkeypatch):
    said = []
    monkeypatch.setattr(profiling.logger, "warning", lambda text, *args: said.append(text % args))
    return said


@pytest.mark.parametrize("steps", [1, 2, 3])
def test_a_run_too_short_for_a_profile_says_so_once(tmp_path, warnings, steps):
    profiler = StepProfiler(tmp_path / "profile", torch.device("cpu"))
    for _ in range(steps):
        profiler.end_step()
    profiler.close()
    profiler.close()
    told = "no profile was written: it needs at least 3 steps before the first evaluation, there"
    assert warnings == ([] if steps == 3 else [f"{told} were {steps}"])
    assert (tmp_path / "profile/parts.txt").exists() == (steps == 3)


def test_without_a_folder_nothing_is_said(warnings):
    profiler = StepProfiler(None, torch.device("cpu"))
    profiler.end_step()
    profiler.close()
    assert not warnings
