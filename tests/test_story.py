"""The effect TIME is for, on the demo set with default settings: minutes, so only by -m slow."""

import pytest

from timefast.ablate import measure
from timefast.demo_data import demo_data_folder
from timefast.train import main


@pytest.mark.slow
def test_time_learns_the_order_of_frames_where_the_baseline_reads_the_cue(tmp_path):
    """One seed. What was seen over three seeds is in bench/results; the bounds here are loose."""
    data = demo_data_folder()
    result = {}
    for losses in ("none", "order,debias,flow"):
        run = tmp_path / losses
        flags = ["--recipe", "demo", "--losses", losses, "--data", str(data), "--out", str(run)]
        assert main(flags) == 0
        result[losses] = measure(run, (1, 1), 3)
    base, time = result["none"], result["order,debias,flow"]
    assert time["temporal_original"] - base["temporal_original"] >= 15
    assert time["temporal_shuffled"] <= base["temporal_shuffled"]
    assert time["temporal_gap"] >= 35
    assert time["shuffled_confidence"] <= 0.4
    assert base["static_original"] - time["static_original"] <= 8
    assert base["conflict"] < 35 < base["aligned"]
