"""What bench.autotune chooses, with a clock that needs no GPU."""

import pytest
import torch
from triton.runtime.errors import OutOfResources

from bench import autotune
from timefast.kernels import tiles

PRESENT = {"block_q": 64, "chunk": 128, "num_warps": 4}


def test_the_present_parameters_come_first_and_others_change_only_what_may_be_chosen():
    first, *others = autotune.candidates(PRESENT)
    assert first == PRESENT and PRESENT not in others
    assert {p["chunk"] for p in others} == {128}
    assert {p["num_warps"] for p in others} == set(autotune.CHOICES["num_warps"])
    assert len(others) == 4 * 3 - 1


def test_the_fastest_is_chosen_and_what_does_not_fit_is_passed_over():
    def clock(params):
        if params["block_q"] == 128:
            raise OutOfResources(200_000, 166_912, "shared memory")
        return 1.0 / params["num_warps"] + params["block_q"]

    best = autotune.fastest(autotune.candidates(PRESENT), clock)
    assert best == {"block_q": 16, "chunk": 128, "num_warps": 8}


def test_noise_does_not_replace_the_present_parameters():
    times = iter([1.0, *[0.99] * 11])
    assert autotune.fastest(autotune.candidates(PRESENT), lambda params: next(times)) == PRESENT


def test_a_tuned_row_serves_its_shapes_and_leaves_larger_ones_to_the_defaults():
    rows = tiles.table("sm_80")["time_attention_fwd"]
    for length in (16, 8, 16):  # the last one replaces the first
        looked_up = {"entry": "time_attention_fwd", "width": 64, "length": length}
        best = {"rows": length, "chunk": 128, "num_warps": 2}
        rows = autotune.in_front(autotune.tuned_row(torch.bfloat16, looked_up, best), rows)
    table = {"time_attention_fwd": rows}

    def found(width, length, dtype=torch.bfloat16):
        return tiles.find(table, "time_attention_fwd", dtype, width, length)

    assert [found(64, length)["rows"] for length in (4, 8, 9, 16)] == [8, 8, 16, 16]
    defaults = tiles.table("sm_80")
    for width, length, dtype in (
        (64, 17, torch.float16), (128, 8, torch.float16), (64, 8, torch.float32),
    ):  # fmt: skip
        default = tiles.find(defaults, "time_attention_fwd", dtype, width, length)
        assert found(width, length, dtype) == default
    assert len(rows) == len(defaults["time_attention_fwd"]) + 2


def test_every_launch_parameter_of_a_norm_may_be_chosen():
    for entry in ("add_layer_norm_fwd", "add_layer_norm_bwd"):
        present = tiles.find(tiles.table("sm_90"), entry, torch.bfloat16, 768, 1)
        assert set(present) <= set(autotune.CHOICES)
        assert all(value in autotune.CHOICES[key] for key, value in present.items())


def test_only_the_kernel_in_question_is_launched_with_the_candidate(monkeypatch):
    monkeypatch.setattr(autotune.triton.testing, "do_bench", lambda run, return_mode: run())
    q = torch.empty(1, 8, 4, 2, 64, dtype=torch.float16)

    def parameters(*entries):
        return [tiles.launch_parameters(entry, q, length=8) for entry in entries]

    both = ("time_attention_fwd", "time_attention_bwd")
    before = parameters(*both)
    during = autotune.time_with(both[1], lambda: parameters(*both), PRESENT)
    assert during == [before[0], PRESENT] and parameters(*both) == before


@pytest.mark.skipif(torch.cuda.is_available(), reason="with a GPU it runs")
@pytest.mark.parametrize("flags", [(), ("--op", "add_layer_norm")], ids=["all", "one op"])
def test_without_a_gpu_it_refuses_and_says_what_is_used_instead(flags, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["bench.autotune", *flags])
    with pytest.raises(SystemExit) as stopped:
        autotune.main()
    assert stopped.value.code == 2
    assert "no CUDA device" in capsys.readouterr().err
