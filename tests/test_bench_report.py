"""Tables in README and docs come from the result files, and a stale one is noticed."""

import json
from pathlib import Path

import pytest

from bench import report

ROOT = Path(__file__).resolve().parent.parent
PAGE = "# Title\n\n<!-- table:{} -->\nold\n<!-- /table -->\n\nrest\n"


def demo_result(value: float, commit: str = "abc1234") -> dict:
    keys = (
        "temporal_original", "temporal_shuffled", "temporal_gap", "aligned", "conflict",
        "static_original", "static_shuffled", "all_original", "confidence", "shuffled_confidence",
    )  # fmt: skip
    rows = [
        {"losses": losses, "seed": seed, "seconds": 100.0 + seed}
        | dict.fromkeys(keys, value + 2.0 * seed)
        for losses in ("none", "order,debias,flow")
        for seed in (0, 1, 2)
    ]
    return {
        "what": "demo-losses", "device": "CPU, 2 cores", "date": "2026-11-20", "commit": commit,
        "versions": {"torch": "2.13.0"}, "protocol": "One view.", "rows": rows,
    }  # fmt: skip


def op_record(impl: str, median: float, **more) -> dict:
    return {
        "device": "Some GPU", "driver": "580.1", "versions": {"torch": "2.13.0", "DALI": None},
        "commit": "abc1234", "dirty": False, "op": "time_attention", "impl": impl,
        "case": "paper-ssv2", "shapes": [[8, 8, 196, 12, 64]], "dtype": "bfloat16",
        "direction": "fwd", "median": median, "p20": 0.9 * median, "p80": 1.1 * median,
        "peak_memory": 2**20, "bytes": 1e9, "flops": 1e12, "error": 0.001,
    } | more  # fmt: skip


@pytest.fixture
def root(tmp_path):
    (tmp_path / "bench" / "results").mkdir(parents=True)
    (tmp_path / "docs").mkdir()
    return tmp_path


def put(root: Path, name: str, content) -> None:
    (root / "bench" / "results" / name).write_text(json.dumps(content))


def test_demo_table_has_mean_and_sample_deviation_over_seeds(root):
    put(root, "demo-losses_cpu_2026-11-20_abc1234.json", demo_result(40.0))
    text = report.demo_losses(root, "")
    assert "| baseline | 42.0 ± 2.0 |" in text
    assert "**TIME** (all three)" in text
    assert "+ order" not in text  # no such run in the file
    assert "[demo-losses_cpu_2026-11-20_abc1234.json](bench/results/demo-losses_cpu" in text


def test_the_share_of_the_floor_is_that_of_what_binds_on_a_known_gpu(root):
    """1e9 bytes at 4.3e12 per second are 0.233 ms, 1e12 operations at 790e12 are 1.27 ms."""
    measured = [
        op_record("triton", 2e-3, device="NVIDIA H200"),
        op_record("sdpa", 2e-3, device="NVIDIA H200", flops=None),
        op_record("cpu", 2e-3, device="NVIDIA H200", dtype="float32"),
    ]
    put(root, "ops_nvidia-h200_2026-11-20_abc1234.json", measured)
    text = report.records(root, "", "ops")
    assert "| Of the floor |" in text
    assert [f"| {share} |" in text for share in ("63%", "12%")] == [True, True]
    assert text.count("%") == 2


def test_newest_file_of_a_device_counts(root):
    put(root, "demo-losses_cpu_2026-11-20_fff0000.json", demo_result(10.0))
    put(root, "demo-losses_cpu_2026-11-21_000aaaa.json", demo_result(50.0))
    text = report.demo_losses(root, "")
    assert "52.0 ± 2.0" in text
    assert "12.0 ± 2.0" not in text


def test_rates_are_computed_from_bytes_operations_and_median(root):
    put(root, "ops_gpu_2026-11-20_abc1234.json", [op_record("triton", 0.002)])
    text = report.records(root, "../", "ops")
    assert "| triton | 2 ms (1.8 ms to 2.2 ms) | 1 MiB | 500 | 500 | 1.0e-03 |" in text
    assert "../bench/results/ops_gpu" in text


def test_pipelines_are_shown_in_clips_per_second(root):
    record = op_record("cpu", 0.5, op="loader", case="ssv2", clips=16)
    for key in ("dtype", "direction", "bytes", "flops", "error"):
        del record[key]
    put(root, "pipelines_cpu_2026-11-20_abc1234.json", [record])
    text = report.records(root, "", "pipelines")
    assert "| Clips/s |" in text
    assert "| 32 |" in text
    assert "TFLOP/s" not in text


def test_speed_compares_with_the_best_alternative(root):
    measured = [op_record("reference", 0.008), op_record("triton", 0.001), op_record("sdpa", 0.002)]
    measured = [{**r, "direction": "fwd+bwd"} for r in measured]
    measured += [{**r, "direction": "bwd", "median": 0.004} for r in measured]
    put(root, "ops_gpu_2026-11-20_abc1234.json", measured)
    text = report.speed(root, "")
    assert "4 ms" not in text  # the front page shows both directions together
    assert "| 1 ms (triton) | 2 ms (sdpa) | 2.00 × |" in text
    assert "Not yet measured on an A100." in text


def step_record(impl: str, **more) -> dict:
    of_step = {
        "op": "train_step", "case": "xvit + TIME, mid", "clips": 2, "speedup": 1.25,
        "flops": 3e12, "matmul_rate": 1e13, "peak_memory": None, "kept_memory": 2**21,
    }  # fmt: skip
    return op_record(impl, 0.5) | of_step | more


def test_a_training_step_is_a_row_per_technique_in_the_order_measured(root):
    measured = [step_record("published form", speedup=1.0), step_record("+ AdamW (timefast)")]
    put(root, "train_step_cpu_2026-11-20_abc1234.json", measured)
    table = report.train_step(root, "")
    assert "**xvit + TIME, mid, 2 clips**" in table
    assert (
        "| + AdamW (timefast) | bfloat16 | 500 ms | 4 | 1.25 × | 60% | 2 MiB | 1.0e-03 |" in table
    )
    assert table.index("published form") < table.index("(timefast)")
    short = report.step_speed(root, "")
    assert "| xvit + TIME, mid, 2 clips, bfloat16 | 4 | 1.25 × |" in short
    assert short.count("xvit") == 1 and "Not yet measured on an A100." in short


def test_check_fails_on_a_stale_page_and_passes_after_rewriting(root, capsys):
    put(root, "demo-losses_cpu_2026-11-20_abc1234.json", demo_result(40.0))
    (root / "README.md").write_text(PAGE.format("demo-losses"))
    (root / "docs" / "benchmarks.md").write_text(PAGE.format("ops"))
    assert report.main(["--check"], root) == 1
    assert "README.md is stale" in capsys.readouterr().out
    assert "old" in (root / "README.md").read_text()
    assert report.main([], root) == 0
    assert report.main(["--check"], root) == 0
    text = (root / "README.md").read_text()
    assert text.startswith("# Title\n\n<!-- table:demo-losses -->\n| Losses |")
    assert text.endswith("<!-- /table -->\n\nrest\n")
    assert "Not yet measured." in (root / "docs" / "benchmarks.md").read_text()


@pytest.mark.parametrize("page", [PAGE.format("opps"), "<!-- table:ops -->\nno end\n"])
def test_wrong_markers_are_refused(root, page):
    with pytest.raises(ValueError, match="table"):
        report.rewrite(page, root, "")


def test_pages_of_this_repository_are_not_stale(capsys):
    assert report.main(["--check"], ROOT) == 0, capsys.readouterr().out
