"""The attention kernels compile for GPUs that need not be here, and fit them.

A child process compiles: one that interprets kernels, as the tests do without a GPU, cannot.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from bench.compile_table import SHARED_LIMIT

ROOT = Path(__file__).resolve().parent.parent


def compile_in_child(*flags):
    env = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    command = [sys.executable, "-W", "ignore", "-m", "bench.compile_table", *flags]
    out = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=env)
    assert out.returncode == 0, out.stderr[-3000:]
    return json.loads(out.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def paper_shapes():
    return compile_in_child("--few")


def test_the_papers_shapes_compile_without_spills_within_an_a100(paper_shapes):
    assert {r["cc"] for r in paper_shapes} == {80, 90}
    for r in paper_shapes:
        assert r["spills"] == r["stack"] == 0, r
        assert r["shared"] <= SHARED_LIMIT[80], r


def test_the_papers_shapes_use_tensor_cores_and_wide_loads_and_no_atomics(paper_shapes):
    for r in paper_shapes:
        assert {"mma.sync", "wgmma"} & set(r["features"]), r
        assert "128-bit loads" in r["features"], r
        assert "atomics" not in r["features"], r
        if r["cc"] == 90 and r["kernel"].startswith("space"):
            assert "wgmma" in r["features"], r


@pytest.mark.slow
def test_every_choice_of_launch_parameters_fits_its_gpu():
    for r in compile_in_child("--json"):
        assert r["shared"] <= SHARED_LIMIT[r["cc"]], r
        if r["dtype"] == "bfloat16":
            assert r["spills"] == 0, r


def test_the_committed_readings_belong_to_the_committed_launch_parameters():
    from bench.compile_table import TARGETS, TYPES
    from timefast.kernels.tiles import find, table

    dtypes = {str(dtype).removeprefix("torch."): dtype for dtype in TYPES}
    for r in json.loads((ROOT / "docs/kernels/compiled.json").read_text("utf-8")):
        now = find(
            table(TARGETS[r["cc"]]), r["kernel"], dtypes[r["dtype"]], r["width"], r["length"]
        )
        assert r["params"] == now, f"{r['kernel']}: run python -m bench.compile_table"
